"""Stages: what a Plan is made of.

A Plan is a flat list of stages over registers x_0, x_1, ... (register 0 is the start):

    Call      m = prediction of the model at (x, t)        one network call
    Draw      z = standard normal noise
    Combine   y = sum_k c_k x_k                            all c_k in float64, known beforehand
    Drift     d = f(x, t) of a process with nonlinear drift
    Custom    y = kernel(x, t), not linear: a corrector with a data-dependent step, a projection
    Mark      end of a step, for callbacks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from scoresolve.noise import NoiseSource
from scoresolve.sde import SchedulePoint

__all__ = ["Action", "Call", "Combine", "Custom", "Draw", "Drift", "Mark", "Stage"]

Predict = Callable[[str, Tensor, float], Tensor]


class Action(Protocol):
    """A state update that is not linear, held by a `Custom` stage."""

    name: str
    calls: int

    def __call__(
        self, x: Tensor, t: float, predict: Predict, noise: NoiseSource, draw: int
    ) -> Tensor:
        """The new state; calls `predict(prediction, x, t)` exactly `calls` times.

        `draw` is the first of `calls` noise indices reserved for this stage.
        """


@dataclass(frozen=True, slots=True)
class Call:
    """m = prediction of the model at register `x` and time `t`."""

    out: int
    x: int
    t: float
    prediction: str
    point: SchedulePoint | None
    kind: ClassVar[str] = "call"


@dataclass(frozen=True, slots=True)
class Draw:
    """z = standard normal, number `index`, that drives the interval from `t` to `s`.

    It is the increment of the noise there or, if `area`, its area against the chord.
    """

    out: int
    index: int
    t: float
    s: float
    area: bool = False
    kind: ClassVar[str] = "draw"

    def __call__(self, noise: NoiseSource, like: Tensor) -> Tensor:
        """The numbers that `noise` has for it, [B, *event] as `like`."""
        if self.area:
            return noise.area(like, self.index, (self.t, self.s))
        return noise.normal(like, self.index, times=(self.t, self.s))


@dataclass(frozen=True, slots=True)
class Combine:
    """y = sum of coefficient times register over `terms`."""

    out: int
    terms: tuple[tuple[int, float], ...]
    kind: ClassVar[str] = "combine"


@dataclass(frozen=True, slots=True)
class Drift:
    """d = f(x, t) of the process, where f is not a multiple of x."""

    out: int
    x: int
    t: float
    kind: ClassVar[str] = "drift"


@dataclass(frozen=True, slots=True)
class Custom:
    """y = kernel(x, t)."""

    out: int
    x: int
    t: float
    kernel: Action
    draw: int
    kind: ClassVar[str] = "custom"


@dataclass(frozen=True, slots=True)
class Mark:
    """Step `step` has ended at time `t` with the state in register `x`."""

    x: int
    step: int
    t: float
    kind: ClassVar[str] = "mark"


Stage = Call | Draw | Combine | Drift | Custom | Mark
