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

__all__ = ["Numbers", "Rows", "combine", "lift", "padded", "row_norm"]

Numbers = NDArray[Any]
"""One number, or several, for each row; always on the host."""
Part = Numbers | Tensor

_LANES = 16
_FEW = 16


class Rows(NamedTuple):
    """Rows in the batch; numbers [..., b] on the host, states [..., b, *event] on the device.

    Attributes:
        place: their numbers in the caller's batch, [b].
        u: how far each has come, [b].
        h: size of its next step, [b].
        past: errors of its last two accepted steps, [2, b].
        growth: greatest factor on its next step, [b].
        status, accepted, rejected: how it goes, [b].
        y: its state, [b, *event].
        slope: dy/du there.
        before: u, y, slope and the event's value at the point before, if the path is recorded.
        memory: what the method keeps.
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
            if isinstance(part, Tensor):
                return part.index_select(part.ndim - self.y.ndim, at)
            return part.take(index, -1)

        return Rows(*map(pick, self))

    def part(self, rows: slice) -> Rows:
        """Some of rows that have not started."""
        return self.take(np.arange(len(self.place))[rows])

    def revert(self, old: Rows, index: Numbers) -> Rows:
        """The rows, where those of `index` keep the state, slope and memory of `old`."""
        if not len(index):
            return self
        if len(index) == len(self.place):
            return self._replace(y=old.y, slope=old.slope, memory=old.memory)
        at = torch.from_numpy(index).to(self.y.device)

        def kept(new: Part, old: Part) -> Any:
            if new is old:
                return new
            if isinstance(new, Tensor) and isinstance(old, Tensor):
                dim = new.ndim - self.y.ndim
                return new.index_copy(dim, at, old.index_select(dim, at))
            new = np.array(new)
            new[..., index] = old[..., index]
            return new

        memory = tuple(map(kept, self.memory, old.memory))
        return self._replace(
            y=kept(self.y, old.y), slope=kept(self.slope, old.slope), memory=memory
        )

    def common(self) -> Rows:
        """Rows that go together, with one number [..., 1] for all where they have the same."""
        return self._shared(lambda part: part[..., :1])

    def spread(self) -> Rows:
        """The rows of `common`, each with its own numbers again."""
        return self._shared(lambda part: part.repeat(len(self.place), -1))

    def _shared(self, change: Callable[[Numbers], Numbers]) -> Rows:
        memory = (m if isinstance(m, Tensor) else change(m) for m in self.memory)
        return self._replace(
            u=change(self.u),
            h=change(self.h),
            past=change(self.past),
            growth=change(self.growth),
            status=change(self.status),
            accepted=change(self.accepted),
            rejected=change(self.rejected),
            memory=tuple(memory),
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
            if isinstance(part[0], Tensor):
                return torch.cat(part, part[0].ndim - parts[0].y.ndim)
            return np.concatenate(part, -1)

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
    """[..., b] as [..., b, 1, ...] on the device of `x`, in its dtype unless it is a mask."""
    values = torch.from_numpy(rows)
    dtype = values.dtype if values.dtype is torch.bool else x.dtype
    return values.to(x.device, dtype).reshape(*rows.shape, *(1,) * (x.ndim - 1))


def row_norm(error: Tensor) -> Numbers:
    """Root mean square over each row of [n, b, *event], [n, b]."""
    squares: Any = error.square().reshape(error.shape[:2].numel(), -1).T
    size = len(squares)
    while len(squares) > _FEW:
        squares = _pairs(squares)
    squares = np.ascontiguousarray(squares.cpu().numpy().astype(np.float64))
    while len(squares) > 1:
        squares = _pairs(squares)
    norms: Numbers = np.sqrt(squares[0] / size).reshape(error.shape[:2])
    return norms


def _pairs(v: Any) -> Any:
    """Sums [n // 2, b] of two of [n, b], the first of three if n is odd."""
    half = len(v) // 2
    total = v[:half] + v[half : 2 * half]
    if len(v) % 2:
        total[0] += v[-1]
    return total


def padded(function: Callable[[Numbers], tuple[Numbers, ...]], u: Numbers) -> list[Numbers]:
    """The numbers [b] that `function` makes of each of [b], elementwise: the same for any b."""
    filled = np.concatenate([u, u[-1:].repeat(-len(u) % _LANES)])
    return [part[: len(u)] for part in function(filled)]
