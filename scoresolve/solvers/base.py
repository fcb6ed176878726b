"""A fixed-grid solver: one step, written as in its paper.

`step` is run on symbols (`scoresolve.plans.tracing`): states, predictions and noise can be
added and multiplied by numbers, and everything that depends on time alone is a plain float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from scoresolve.plans import Linear, Run

__all__ = ["Solver"]


class Solver(ABC):
    """A fixed-grid solver.

    Attributes:
        name: what it is called in tables.
        predicts: the prediction its formula is written in, one of `models.PREDICTIONS`.
        order: nominal order of accuracy, which the certificate measures: of the path and the
            mean if deterministic, of mean and covariance (weak) if stochastic; None if refining
            the grid alone does not converge, as with an unadjusted corrector.
        stochastic: whether a step draws noise.
        source: paper and equation.
        jumps_at_ends: whether its variables are singular at alpha = 0 and at sigma = 0. A step
            from or to there is then a jump by the predicted x0, with one call.
        grid: name of the grid that suits it, which it gets unless told otherwise.
    """

    name: str
    predicts: str
    order: int | None
    stochastic: bool = False
    source: str
    jumps_at_ends: bool = False
    grid: str = "flow"

    @abstractmethod
    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        """The state at `s`, from the state `x` at `t`."""

    def __repr__(self) -> str:
        return f"<solver {self.name}>"
