"""Rows of a batch that each go their own way, and sums that do not know how many they are.

A library's routine may round a row differently when the batch has another size. So sums over a row
run in an order of their own, and functions of a row's numbers are taken on padded arrays: what a
row gets never depends on its neighbours, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import Status

__all__ = ["Rows", "combine", "lift", "padded", "power", "row_norm"]

_LARGE = 1e15
_LANES = 16


class Rows(NamedTuple):
    """Rows in the batch; y, slope and part of the memory on the device, the others [b] on the host.

    Attributes:
        place: their numbers in the caller's batch.
        u: how far each has come.
        h: size of its next step.
        past: errors of its last two accepted steps, [b, 2].
        growth: greatest factor on its next step.
        status, accepted, rejected: how it goes.
        y: its state, [b, *event].
        slope: dy/du there.
        before: u, y and slope at the point before, if the path is recorded.
        memory: what the method keeps, each [b, ...].
    """

    place: Tensor
    u: Tensor
    h: Tensor
    past: Tensor
    growth: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    y: Tensor
    slope: Tensor
    before: tuple[Tensor, ...] = ()
    memory: tuple[Tensor, ...] = ()

    def take(self, index: Tensor) -> Rows:
        def pick(part: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if isinstance(part, tuple):
                return tuple(each[index.to(each.device)] for each in part)
            return part[index.to(part.device)]

        return Rows(*map(pick, self))  # type: ignore[arg-type]

    def part(self, rows: slice) -> Rows:
        """Some of rows that have not started."""
        return self.take(torch.arange(len(self.place))[rows])

    def bare(self) -> Rows:
        """The rows without what only a step needs."""
        return self._replace(before=(), memory=())

    def stop(self, status: Status, end: float) -> Rows:
        """The rows ended, those that had not ended by themselves or reached `end`."""
        moving = (self.status == Status.OK) & (self.u != end)
        return self._replace(status=torch.where(moving, int(status), self.status))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        def link(*part: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if isinstance(part[0], tuple):
                return tuple(torch.cat(each) for each in zip(*part, strict=True))
            return torch.cat(part)  # type: ignore[arg-type]

        parts = [part for part in parts if len(part.place)] or parts[:1]
        return parts[0] if len(parts) == 1 else Rows(*map(link, *parts))  # type: ignore[arg-type]


def combine(weights: Sequence[float | Tensor], terms: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j terms_j; each product is rounded, as a fused one might not be in every lane.

    Args:
        weights: numbers, of which zeros are left out, or one number per row, [b] on the host.
        terms: each [b, *event].
    """
    pairs = [
        (lift(w, v) if isinstance(w, Tensor) else w, v)
        for w, v in zip(weights, terms, strict=False)
        if isinstance(w, Tensor) or w
    ]
    total = pairs[0][0] * pairs[0][1]
    for w, v in pairs[1:]:
        total = total + w * v
    return total


def lift(rows: Tensor, x: Tensor) -> Tensor:
    """[b] as [b, 1, ...] on the device of `x`, and in its dtype unless it is a mask."""
    dtype = rows.dtype if rows.dtype is torch.bool else x.dtype
    return rows.to(x.device, dtype).reshape(-1, *(1,) * (x.ndim - 1))


def row_norm(error: Tensor) -> Tensor:
    """Root mean square over each row of [b, *event], [b]."""
    squares = error.clamp(-_LARGE, _LARGE).square().reshape(error.shape[0], -1)
    return (_row_sum(squares) / squares.shape[1]).sqrt()


def _row_sum(v: Tensor) -> Tensor:
    """Sum of each row of [b, n]: pairs, then pairs of pairs."""
    while (n := v.shape[1]) > 1:
        half = v[:, : n // 2] + v[:, n // 2 : n - n % 2]
        v = torch.cat([half, v[:, n - 1 :]], 1) if n % 2 else half
    return v[:, 0]


def padded(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`function` of [b], or [b] more than once over, elementwise: the same for any b."""
    b = u.shape[0]
    filled = torch.cat([u, u[-1:].expand(-b % _LANES)])
    return function(filled)[..., :b]


def power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """base^exponent, both float64 on the host."""
    # torch takes another routine for the tail of a tensor than for its body; numpy does not.
    tall = exponent.numpy() if isinstance(exponent, Tensor) else exponent
    return torch.from_numpy(np.power(base.numpy(), tall))
