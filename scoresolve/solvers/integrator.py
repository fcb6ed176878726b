"""Solvers that choose their steps while they run, and so have a loop of their own.

They integrate dx = drift(x, t) dt + diffusion(t) dw between two times, in either direction, and
report one status per sample.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scoresolve.errors import GridError
from scoresolve.noise import NoiseSource
from scoresolve.sde import SDE, GaussianSDE

__all__ = ["GaussianFlow", "Integrator", "RowDrift", "Solution"]

RowDrift = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Where an integration ended.

    Attributes:
        x: final state, [B, *event]; a failed row holds the last state that was accepted.
        t: the time each row reached, [B] float64, on MPS float32.
        status: one `Status` per row, [B] int64.
        nfe: calls of the drift (each for a whole batch).
        accepted: accepted steps per row, [B] int64.
        rejected: rejected steps per row, [B] int64.
        evaluations: calls that each row was in, [B] int64.
        saved: states at the times to save at, [S, B, *event], if any.
        path: `path(t)` is the state at time t, if it was kept.
    """

    x: Tensor
    t: Tensor
    status: Tensor
    nfe: int
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    saved: Tensor | None = None
    path: Callable[[float], Tensor] | None = None


@dataclass(frozen=True)
class GaussianFlow:
    """What a solver of a Gaussian process may use beside its drift.

    Attributes:
        sde: the process.
        scale: noise level sigma/alpha where the modes of the data part, `Model.data_scale`.
        prediction: what the model predicts, a name of `scoresolve.models.PREDICTIONS`.
        predict: callable (x [b, *event], t [b], rows [b]) -> that prediction, shape of `x`.
    """

    sde: GaussianSDE
    scale: float
    prediction: str
    predict: RowDrift


class Integrator(ABC):
    """A solver with a loop of its own.

    Attributes:
        name: its name in the registry.
        order: nominal order of accuracy.
        stochastic: whether it integrates the reverse SDE instead of the probability flow.
        source: paper or library.
        refills: whether `solve` keeps `width` rows in the batch, as long as some are waiting.
        max_calls: calls of the drift that `solve` may make.
        sde: the process that it was made for; None if for any.
    """

    name: str
    order: float
    stochastic: bool = False
    source: str
    refills: bool = False
    max_calls: int = sys.maxsize
    sde: SDE | None = None

    def check_direction(self, t_start: float, t_end: float) -> None:
        """Raise `GridError` if the solver is to run the reverse SDE upwards.

        Args:
            t_start, t_end: the interval of the reverse SDE.
        """
        if self.stochastic and t_end > t_start:
            raise GridError(
                f"{self.name!r} runs the reverse SDE, from noise to data, but the interval goes up "
                f"from t = {t_start:g} to {t_end:g}: give t_end below t_start, or a deterministic "
                "solver"
            )

    @abstractmethod
    def solve(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None = None,
        noise: NoiseSource | None = None,
        *,
        flow: GaussianFlow | None = None,
        width: int | None = None,
    ) -> Solution:
        """Integrate from `t_start` to `t_end`.

        Args:
            drift: callable (x [b, *event], t [b], rows [b]) -> shape of `x`, where `rows` tells
                which samples of the batch these are, as finished ones leave; never called
                outside the interval.
            x: state at `t_start`, [B, *event]; not written into.
            t_start, t_end: times, either one may be the larger.
            diffusion: g(t), [B] -> [B]; needed by a stochastic integrator.
            noise: source of randomness; needed by a stochastic integrator.
            flow: the process, where it is Gaussian; with it a stochastic integrator takes `drift`
                for that of the reverse SDE.
            width: rows to work on at a time, for one that refills; all if omitted.

        Raises:
            GridError: the reverse SDE is to go upwards.
        """

    def __repr__(self) -> str:
        return f"<solver {self.name}>"
