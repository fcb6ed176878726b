"""Samples as a differentiable function of the start and of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from scoresolve.conditions import unmarked
from scoresolve.driving import check_call, warn_of_dropout
from scoresolve.errors import ArgumentError, check_transforms, whole_number
from scoresolve.gradients.path import Path
from scoresolve.grid import Grid, as_grid
from scoresolve.models import Model, as_model
from scoresolve.noise import Philox
from scoresolve.plans import check_state
from scoresolve.sde import SDE
from scoresolve.solvers import Integrator, Solver, get_solver

__all__ = ["differentiable_sample"]

Times = Grid | Sequence[float] | Tensor


def differentiable_sample(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    x: Tensor,
    *,
    solver: str | Solver = "auto",
    steps: int = 30,
    grid: Times | None = None,
    mode: str = "checkpoint",
    segment: int | None = None,
    refine: int = 1,
    seed: int = 0,
    **cond: Any,
) -> Tensor:
    r"""Samples as a differentiable function of the start and of the network's parameters.

    The values are those of `sample` on the same grid, in every mode.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`, differentiable in `x`.
        sde: the process.
        x: the state at the first time, [B, *event], floating point.
        solver: a fixed-grid solver or its name.
        steps: number of steps on the grid that suits the solver; or
        grid: a `Grid` or explicit times, instead of `steps`.
        mode: "direct", "checkpoint", "reverse" or "adjoint". The first three give one number to
            rounding. "reverse" is for deterministic solvers of one step, on grids fine enough that
            a step can be undone; "adjoint" for all deterministic ones, with the error of the plan
            plus that of Runge-Kutta steps of order 4, back over the grid.
        segment: steps that "checkpoint" recomputes at a time; the root of their number if omitted.
            What stays in memory is a few states for each segment, and the calls of one segment.
        refine: Runge-Kutta steps of the adjoint in each step of the grid, >= 1.
        seed: seed of the counter-based noise of a stochastic solver.
        **cond: passed on to the model; but for "direct", tensors that require a
            gradient are leaves.

    Returns:
        The final state, [B, *event], attached to `x` and to every leaf tensor that the model uses.

    Raises:
        ArgumentError: the solver chooses its own steps; it is stochastic or reads more than the
            state, and the mode keeps no more; or a number is out of range.
        ShapeError, GridError, UnknownNameError: as for `sample`; also for an unknown mode.
        SolveError: in the backward pass, a step cannot be undone.

    Source:
        Chen et al. 2018 (1806.07366), section 2 and appendix B; Chen et al. 2016 (1604.06174),
        section 4, for recomputation.
    """
    check_transforms("differentiable_sample")
    check_state(x)
    model, resolved = as_model(score, sde), get_solver(solver)
    if cond:
        check_call(score, cond, differentiable_sample)
    if isinstance(resolved, Integrator):
        raise ArgumentError(
            f"{resolved.name!r} chooses its steps at run time: take a fixed-grid solver, or "
            "sample(..., gradients=True)"
        )
    resolved = resolved.scaled(model.data_scale)
    times = (
        resolved.make_grid(sde, whole_number("steps", steps, 1, 10**6))
        if grid is None
        else as_grid(grid)
    )
    times.check(sde)
    warn_of_dropout(score)
    path = Path(resolved, sde, times, model, Philox(seed), unmarked(cond))
    return path.solve(x, mode, segment, refine)
