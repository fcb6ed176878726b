"""Points of a path, and the polynomial through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.solvers.adaptive.rows import lift

__all__ = ["Point", "hermite"]


class Point(NamedTuple):
    """Rows `place` at one point: u [b] on the host, y and dy/du [b, *event]."""

    place: Tensor
    u: Tensor
    y: Tensor
    slope: Tensor

    def take(self, index: Tensor) -> Point:
        return Point(*(part[index.to(part.device)] for part in self))


def hermite(points: Sequence[Point], u: Tensor) -> Tensor:
    """The polynomial through states and slopes at `points`, at u [b], by divided differences.

    A last point that coincides with the first is left out, row by row.
    """
    nodes = [point.u for point in points for _ in (0, 1)]
    column = [point.y for point in points for _ in (0, 1)]
    total, product = column[0], torch.ones_like(u)
    for depth in range(1, len(nodes)):
        below = column
        column = []
        for i in range(len(nodes) - depth):
            gap = nodes[i + depth] - nodes[i]
            if depth == 1 and i % 2 == 0:
                column.append(points[i // 2].slope)
            else:
                share = torch.where(gap == 0, 0.0, 1 / gap)
                column.append((below[i + 1] - below[i]) * lift(share, below[i]))
        product = product * (u - nodes[depth - 1])
        total = total + lift(product, column[0]) * column[0]
    return total
