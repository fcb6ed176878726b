"""Rows of a batch that each go their own way, and sums that do not know how many they are.

A library's routine may round a row differently when the batch has another size. So sums over a row
run in an order of their own, and functions of a row's numbers are taken on padded arrays: what a
row gets never depends on its neighbours, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoresolve.errors import Status

__all__ = ["Numbers", "Rows", "combine", "lift", "lifted", "padded", "row_norm"]

Numbers = NDArray[Any]
"""One number, or several, for each row; always on the host."""
Part = Numbers | Tensor

_LARGE = 1e15
_LANES = 16


class Rows(NamedTuple):
    """Rows in the batch; numbers on the host, states and slopes on the device.

    Attributes:
        place: their numbers in the caller's batch, [b].
        u: how far each has come, [b].
        h: size of its next step, [b].
        past: errors of its last two accepted steps, [b, 2].
        growth: greatest factor on its next step, [b].
        status, accepted, rejected: how it goes, [b].
        y: its state, [b, *event].
        slope: dy/du there.
        before: u, y, slope and the event's value at the point before, if the path is recorded.
        memory: what the method keeps, each [b, ...].
    """

    place: Numbers
    u: Numbers
    h: Numbers
    past: Numbers
    growth: Numbers
    status: Numbers
    accepted: Numbers
    rejected: Numbers
    y: Tensor
    slope: Tensor
    before: tuple[Any, ...] = ()
    memory: tuple[Any, ...] = ()

    def take(self, index: Numbers) -> Rows:
        at = torch.from_numpy(index).to(self.y.device)

        def pick(part: Any) -> Any:
            if isinstance(part, tuple):
                return tuple(map(pick, part))
            return part.index_select(0, at) if isinstance(part, Tensor) else part[index]

        return Rows(*map(pick, self))

    def part(self, rows: slice) -> Rows:
        """Some of rows that have not started."""
        return self.take(np.arange(len(self.place))[rows])

    def revert(self, old: Rows, index: Numbers) -> Rows:
        """The rows, where those of `index` keep the state, slope and memory of `old`."""
        if not len(index):
            return self
        at = torch.from_numpy(index).to(self.y.device)

        def kept(new: Part, old: Part) -> Any:
            if isinstance(new, Tensor) and isinstance(old, Tensor):
                return new.index_copy(0, at, old.index_select(0, at))
            new = np.array(new)
            new[index] = old[index]
            return new

        memory = tuple(map(kept, self.memory, old.memory))
        return self._replace(
            y=kept(self.y, old.y), slope=kept(self.slope, old.slope), memory=memory
        )

    def bare(self) -> Rows:
        """The rows without what only a step needs."""
        return self._replace(before=(), memory=())

    def stop(self, status: Status, end: float) -> Rows:
        """The rows ended, those that had not ended by themselves or reached `end`."""
        moving = (self.status == Status.OK) & (self.u != end)
        return self._replace(status=np.where(moving, int(status), self.status))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        def link(*part: Any) -> Any:
            if isinstance(part[0], tuple):
                return tuple(link(*each) for each in zip(*part, strict=True))
            return torch.cat(part) if isinstance(part[0], Tensor) else np.concatenate(part)

        parts = [part for part in parts if len(part.place)] or parts[:1]
        return parts[0] if len(parts) == 1 else Rows(*map(link, *parts))


def combine(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j terms_j; each product is rounded, as a fused one might not be in every lane.

    Args:
        weights: numbers, of which zeros are left out.
        terms: each [b, *event].
    """
    pairs = [(w, v) for w, v in zip(weights, terms, strict=False) if w]
    total = pairs[0][0] * pairs[0][1]
    for w, v in pairs[1:]:
        total = total + w * v
    return total


def lift(rows: Numbers, x: Tensor) -> Tensor:
    """[b] as [b, 1, ...] on the device of `x`, and in its dtype unless it is a mask."""
    values = torch.from_numpy(rows)
    dtype = values.dtype if values.dtype is torch.bool else x.dtype
    return values.to(x.device, dtype).reshape(-1, *(1,) * (x.ndim - 1))


def lifted(columns: Sequence[Numbers], x: Tensor) -> tuple[Tensor, ...]:
    """`lift` of each [b], with one transfer to the device."""
    together = torch.from_numpy(np.array(columns)).to(x.device, x.dtype)
    return together.reshape(len(columns), -1, *(1,) * (x.ndim - 1)).unbind()


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


def padded(function: Callable[[Tensor], Tensor], u: Numbers) -> Numbers:
    """`function` of [b], or [b] more than once over, elementwise: the same for any b."""
    filled = np.concatenate([u, u[-1:].repeat(-len(u) % _LANES)])
    return function(torch.from_numpy(filled)).numpy()[..., : len(u)]
