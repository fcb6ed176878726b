"""A sampler of anyone, as a function, with what it claims."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number, whole_number
from scoresolve.models import Model
from scoresolve.sde import GaussianSDE

__all__ = ["BadOutput", "BlackBox", "Normals"]

Normals = Callable[[Tensor], Tensor]
"""`noise(like)`: standard normals of the shape and dtype of `like`, [B, *event]."""


class BadOutput(ShapeError):
    """A sampler returned something else than a tensor of the shape of its start."""


@dataclass(frozen=True)
class BlackBox:
    """A sampler as a function, whatever library wrote it.

    Args:
        run: `run(model, x, n, noise)`, the samples [B, *event] from states x [B, *event] at the
            time `start`, in n steps; x is its own to write to. `model` is exact: `model(x, t)` is
            the score, `model.predict("eps", x, t)` and its like are what a network would say,
            `model.sde` is the process. Normals may be taken from `noise(like)` or drawn by torch
            itself.
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
        ArgumentError: `run` is not callable, a claim has a value it cannot have, or the claims
            contradict one another.
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
        if self.order is not None:
            real_number("order", self.order, above=0)
        if self.start is not None and not callable(self.start):
            real_number("start", self.start, above=0)
        if self.end is not None:
            real_number("end", self.end, least=0)
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ArgumentError(f"dtype = {self.dtype}: give a floating-point one")
        if self.refinements:
            object.__setattr__(self, "refinements", refined(self.refinements))
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
        y = self.run(model, x.clone(), n, noise)
        if not isinstance(y, Tensor):
            raise BadOutput(f"{self.name} returned {type(y).__name__}: return a tensor")
        if y.shape != x.shape:
            raise BadOutput(
                f"{self.name} returned shape {tuple(y.shape)} for a start of shape "
                f"{tuple(x.shape)}: return one sample for each state"
            )
        return y


def refined(steps: Sequence[int]) -> tuple[int, ...]:
    """`steps` as increasing whole numbers, at least two; else raises `ArgumentError`."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise ArgumentError(f"refinements = {steps!r}: give increasing step counts")
    found = tuple(whole_number("refinements", n, least=2) for n in steps)
    if len(found) < 2 or any(b <= a for a, b in itertools.pairwise(found)):
        raise ArgumentError(f"refinements = {found}: give increasing step counts")
    return found
