"""A sampler of anyone, as a function, with what it claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.models import Model
from scoresolve.sde import GaussianSDE

__all__ = ["BlackBox", "Normals"]

Normals = Callable[[Tensor], Tensor]
"""`noise(like)`: standard normals of the shape and dtype of `like`, [B, *event]."""


@dataclass(frozen=True)
class BlackBox:
    """A sampler as a function, whatever library wrote it.

    Args:
        run: `run(model, x, n, noise)`, the samples from states x [B, *event] at the time `start`,
            in n steps. `model` is exact: `model(x, t)` is the score, `model.predict("eps", x, t)`
            and its like are what a network would say, `model.sde` is the process. Normals may be
            taken from `noise(like)` or drawn by torch itself.
        name: what it is called in tables.
        order: order of accuracy it claims; None if none.
        stochastic: whether it claims to draw noise.
        gridded: whether `run` takes the decreasing times of a grid in place of n.
        adaptive: whether it chooses its own steps, so that n says nothing.
        start: time of the states it is given, or that time as a function of n; T if omitted.
        end: time that its samples claim to belong to, 0 for clean data; t_min if omitted.
        dtype: dtype of the states it is given.
        refinements: increasing numbers of steps between which its order is measured; those of
            `certify` if empty.
        sde: the only process it is made for; None if it runs on any Gaussian one.

    Raises:
        ArgumentError: `run` is not callable, or the claims contradict one another.
    """

    run: Callable[..., Tensor]
    name: str = ""
    order: float | None = None
    stochastic: bool = False
    gridded: bool = False
    adaptive: bool = False
    start: float | Callable[[int], float] | None = None
    end: float | None = None
    dtype: torch.dtype = torch.float64
    refinements: Sequence[int] = ()
    sde: GaussianSDE | None = None

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise ArgumentError(f"run = {self.run!r}: give a function run(model, x, n, noise)")
        if self.gridded and (self.adaptive or self.start is not None or self.end is not None):
            raise ArgumentError("a gridded sampler starts and ends with its grid: give no times")
        if self.order is not None and not 0 < self.order < math.inf:
            raise ArgumentError(f"order = {self.order}: give a number above 0, or None")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.run, "__name__", "sampler"))

    def start_of(self, sde: GaussianSDE, n: int) -> float:
        """The time of the states it is given for n steps."""
        if callable(self.start):
            return float(self.start(n))
        return sde.T if self.start is None else float(self.start)

    def end_of(self, sde: GaussianSDE) -> float:
        """The time its samples claim to belong to."""
        return sde.t_min if self.end is None else float(self.end)

    def __call__(self, model: Model, x: Tensor, n: Any, noise: Normals) -> Tensor:
        return self.run(model, x, n, noise)
