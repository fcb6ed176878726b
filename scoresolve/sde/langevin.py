"""Langevin dynamics: processes that leave a given density p invariant.

    overdamped:   dx = g^2/2 grad log p(x) dt + g dw
    underdamped:  dq = p/m dt,   dp = [grad log p(q) - gamma p] dt + sqrt(2 gamma m) dw

At stationarity the overdamped probability flow vanishes; the underdamped one is Hamiltonian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, check_output, short
from scoresolve.sde.base import SDE, TimeLike, as_time, check_interval

__all__ = ["Langevin", "UnderdampedLangevin"]


@dataclass(frozen=True)
class Langevin(SDE):
    """Overdamped Langevin dynamics dx = g^2/2 score(x) dt + g dw, stationary at p.

    Args:
        score: grad log p as a function of `x` [B, *event], for example `mixture.score`.
        g: diffusion coefficient, > 0; the default gives dx = score dt + sqrt(2) dw.
        T: how long it runs, > 0.

    Raises:
        ArgumentError: `score` is no function, or a number is out of its range.

    Source:
        Roberts and Tweedie 1996, eq. 1.
    """

    score: Callable[[Tensor], Tensor]
    g: float = math.sqrt(2.0)
    T: float = 1.0

    def __post_init__(self) -> None:
        check_interval(self)
        _check_score(self.score)
        if not self.g > 0:
            raise ArgumentError(f"g = {self.g}: need a positive diffusion coefficient")

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        return self.g**2 / 2 * _checked(self.score, x)

    def diffusion(self, t: TimeLike) -> Tensor:
        return torch.full_like(as_time(t), self.g)


@dataclass(frozen=True)
class UnderdampedLangevin(SDE):
    """Underdamped (kinetic) Langevin dynamics on states (q, p) stacked as [B, 2, *event].

    The invariant density is p(q) N(p; 0, mass I). Noise acts on the momentum alone, so
    `diffusion` returns [*t.shape, 2].

    Args:
        score: grad log p as a function of the position [B, *event].
        friction: gamma > 0.
        mass: m > 0.
        T: how long it runs, > 0.

    Raises:
        ArgumentError: `score` is no function, or a number is out of its range.

    Source:
        Leimkuhler and Matthews 2013 (Applied Mathematics Research eXpress), eq. 1.
    """

    score: Callable[[Tensor], Tensor]
    friction: float = 1.0
    mass: float = 1.0
    T: float = 1.0

    def __post_init__(self) -> None:
        check_interval(self)
        _check_score(self.score)
        if not (self.friction > 0 and self.mass > 0):
            raise ArgumentError(
                f"friction = {self.friction}, mass = {self.mass}: both must be positive"
            )

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        q, p = self.split(x)
        return self.join(p / self.mass, _checked(self.score, q) - self.friction * p)

    def diffusion(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        g = math.sqrt(2 * self.friction * self.mass)
        return torch.stack([torch.zeros_like(t), torch.full_like(t, g)], dim=-1)

    def stationary_score(self, x: Tensor) -> Tensor:
        """Score of the invariant density of (q, p), shape of `x` [B, 2, *event]."""
        q, p = self.split(x)
        return self.join(_checked(self.score, q), -p / self.mass)

    @staticmethod
    def join(q: Tensor, p: Tensor) -> Tensor:
        """Position and momentum [B, *event] as one state [B, 2, *event]."""
        return torch.stack([q, p], dim=1)

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        """Position and momentum [B, *event] of a state [B, 2, *event].

        Raises:
            ShapeError: axis 1 of `x` does not hold the two parts.
        """
        if x.ndim < 2 or x.shape[1] != 2:
            raise ShapeError(
                f"state of shape {tuple(x.shape)}: "
                "position and momentum are stacked as [B, 2, *event]"
            )
        return x[:, 0], x[:, 1]


def _check_score(score: object) -> None:
    if not callable(score):
        raise ArgumentError(f"the score is {short(score)}: give a function of x")


def _checked(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = score(x)
    check_output(value, x)
    return value
