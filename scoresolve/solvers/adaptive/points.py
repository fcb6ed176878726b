"""Points of a path, and the polynomial through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.solvers.adaptive.rows import Numbers, lift

__all__ = ["Point", "hermite"]


class Point(NamedTuple):
    """Rows `place` [b] at one point u [b], y and dy/du [b, *event]."""

    place: Numbers
    u: Numbers
    y: Tensor
    slope: Tensor

    def take(self, index: Numbers) -> Point:
        at = torch.from_numpy(index).to(self.y.device)
        return Point(self.place[index], self.u[index], self.y[at], self.slope[at])


def hermite(points: Sequence[Point], u: Numbers) -> Tensor:
    """The polynomial through states and slopes at `points`, at u [b], by divided differences.

    A last point that coincides with the first is left out, row by row.
    """
    nodes = [point.u for point in points for _ in (0, 1)]
    column = [point.y for point in points for _ in (0, 1)]
    total, product = column[0], np.ones_like(u)
    for depth in range(1, len(nodes)):
        below = column
        column = []
        for i in range(len(nodes) - depth):
            gap = nodes[i + depth] - nodes[i]
            if depth == 1 and i % 2 == 0:
                column.append(points[i // 2].slope)
            else:
                share = np.divide(1.0, gap, out=np.zeros_like(gap), where=gap != 0)
                column.append((below[i + 1] - below[i]) * lift(share, below[i]))
        product = product * (u - nodes[depth - 1])
        total = total + lift(product, column[0]) * column[0]
    return total
