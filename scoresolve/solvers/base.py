"""A fixed-grid solver: one step, written as in its paper.

`step` is run on symbols (`scoresolve.plans.tracing`): states, predictions and noise can be
added and multiplied by numbers, and everything that depends on time alone is a plain float.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from scoresolve.errors import step_count
from scoresolve.grid import Grid, ends, make_grid
from scoresolve.plans import Linear, Run
from scoresolve.sde import SDE, GaussianSDE, as_time, check_process

__all__ = ["Solver"]

_SINGULAR = ("log_snr", "karras")


class Solver(ABC):
    """A fixed-grid solver.

    Attributes:
        name: what it is called in tables.
        predicts: the prediction its formula is written in, one of `models.PREDICTIONS`.
        order: nominal order of accuracy, which the certificate measures: of the path and the
            mean if deterministic, of mean and covariance (weak) if stochastic; None if refining
            the grid alone does not converge, as with an unadjusted corrector.
        strong_order: order along one Brownian path in the clock of the SNR, which
            `BrownianPath.in_snr` gives with its areas; None if it claims none.
        stochastic: whether a step draws noise.
        source: paper and equation.
        jumps_at_noise: whether its variables are singular at alpha = 0. A step from or to there
            is then a jump by the predicted x0 and eps, with one call.
        jumps_at_data: the same at sigma = 0.
        remembers: whether a step reads earlier ones.
        grid: name of the grid that suits it, which it gets unless told otherwise.
        grid_options: what that grid is made with, see `scoresolve.grid.make_grid`.
        wants_scale: whether `scaled` changes it.
    """

    name: str
    predicts: str
    order: int | None
    strong_order: float | None = None
    stochastic: bool = False
    source: str
    jumps_at_noise: bool = False
    jumps_at_data: bool = False
    remembers: bool = False
    grid: str = "flow"
    grid_options: Mapping[str, float] = MappingProxyType({})
    wants_scale: bool = False

    @abstractmethod
    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        """The state at `s`, from the state `x` at `t`."""

    def make_grid(
        self,
        sde: SDE,
        steps: int,
        t_start: float | None = None,
        t_end: float | None = None,
        denoise: bool | None = None,
    ) -> Grid:
        """The grid that suits it; arguments as in `scoresolve.grid.make_grid`.

        Where its grid is singular at alpha = 0 the first step jumps to log-SNR -9 or, of more than
        20 steps, lower; where it cannot jump, or at sigma = 0, the grid is "flow".
        """
        steps = step_count("steps", steps)
        check_process(sde)
        if not isinstance(sde, GaussianSDE):
            return make_grid("uniform", sde, steps, t_start, t_end, denoise)
        start, end = ends(sde, t_start, t_end)
        finite = [math.isfinite(float(sde.log_snr(as_time(time)))) for time in (start, end)]
        if self.grid not in _SINGULAR or all(finite):
            return make_grid(self.grid, sde, steps, t_start, t_end, denoise, **self.grid_options)
        if not (finite[1] and start > end and self.jumps_at_noise):
            return make_grid("flow", sde, steps, t_start, t_end, denoise)
        if steps == 1:
            return Grid((start, end), bool(denoise), self.grid)
        # the error of the jump is that of its alpha^2, which falls faster than that of the steps
        log_snr = -9.0 - 4 * math.log(max(1.0, steps / 20))
        landing = max(float(sde.time_from_log_snr(log_snr)), (start + end) / 2)
        below = make_grid(self.grid, sde, steps - 1, landing, end, denoise)
        return Grid((start, *below.times), below.denoise, self.grid)

    def scaled(self, scale: float | None) -> Solver:
        """The solver for data of that `Model.data_scale`, where that matters to it."""
        return self

    def budgeted(self, nfe: int) -> Solver:
        """The solver for a budget of so many calls, where that matters to it."""
        return self

    def steps_for_budget(self) -> int | None:
        """Steps that its budget fixes, if it has one."""
        return None

    def __repr__(self) -> str:
        return f"<solver {self.name}>"
