r"""Adams methods of variable step and order, one call a step: the default adaptive solver.

With slopes f known at the last places u_0 (the newest), u_1, ... and their divided differences
phi_j = f[u_0, ..., u_j], the polynomial through p slopes gives over a step from u_0 to u'

    predictor    y^p = y + sum_{j < p} g_j phi_j,    g_j = int (u - u_0) ... (u - u_{j-1}) du.

The call at y^p makes phi'_0 = f' and phi'_{j+1} = (phi'_j - phi_j)/(u' - u_j), and

    corrector    y' = y^p + g_p phi'_p,    of order p + 1; that of order p is off by
    error        phi'_p (g_p - (u' - u_{p-1}) g_{p-1}).

The slope at y^p serves as that of the next step, so a step costs one call (PEC mode). The errors of
the orders below and above tell which would allow the longest next step.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import whole_number
from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.rows import Rows, lift, power

__all__ = ["AdaptiveAdams"]

_POINTS, _SHARES = (v / 2 for v in np.polynomial.legendre.leggauss(4))

_GROWTH: Final = 3.0
_FIRST: Final = 1 / 20


class AdaptiveAdams(Adaptive):
    """Adams predictor and corrector of orders 1 to 5, one call a step.

    For a Gaussian process it steps in the variables of the default solver ("scaled" coordinates),
    where data of any stiffness between two noise levels are smooth; else in time.

    Args:
        rtol, atol: as in `Adaptive`; in scaled coordinates relative to the standard deviation of
            the noised data.
        order: greatest order, 1 to 5.
        **options: as in `Adaptive`.

    Raises:
        ArgumentError: an argument is out of its range.

    Source:
        Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd ed., sections
        III.1 (PEC), III.5 (variable step) and III.7 (order); Shampine and Gordon 1975. The
        coordinates are this package's.
    """

    name, source = "adams", "Hairer et al. 1993, III.1, III.5, III.7; coordinates: this package"
    usual_coordinates = None

    def __init__(
        self,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        *,
        order: int = 5,
        safety: float = 0.7,
        **options: Any,
    ) -> None:
        super().__init__(rtol, atol, safety=safety, **options)
        self.most = whole_number("order", order, 1, 5)
        self.order = float(self.most)

    def memory(self, way: Coordinates, rows: Rows) -> tuple[Tensor, ...]:
        """Order, number of slopes known, their places [b, q] and differences [b, q, *event]."""
        one, kept = torch.ones_like(rows.place), self.most + 1
        rest = torch.zeros_like(rows.slope)[:, None].expand(-1, kept - 1, *rows.slope.shape[1:])
        differences = torch.cat([rows.slope[:, None], rest], 1)
        return one, one, rows.u[:, None].repeat(1, kept), differences

    def trial(self, way: Coordinates, rows: Rows, u: Tensor, h: Tensor) -> Trial:
        order, known, places, differences = rows.memory
        old, slots = differences.unbind(1), torch.arange(self.most + 1)
        ahead, g = u[:, None] - places, _integrals(places, rows.u, h)
        shares = _columns(torch.where(slots < order[:, None], g[:, :-1], 0.0), old[0])
        y = rows.y
        for j in range(int(order.max())):
            y = y + shares[j] * old[j]
        slope = way.slope(y, u, rows.place)
        inverse = _columns(torch.where(slots < known[:, None], 1 / ahead, 0.0), old[0])
        new = [slope]
        for j in range(int(known.max())):
            new.append((new[-1] - old[j]) * inverse[j])
        new += [torch.zeros_like(slope)] * (self.most + 2 - len(new))
        found = torch.stack(new, 1)

        orders = torch.stack((order, (order - 1).clamp(min=1), order + 1))
        every = torch.arange(len(order))
        top = found[every.to(y.device), orders.to(y.device)]
        off = (g[:, 1:] - ahead * g[:, :-1])[every, orders - 1]
        y = y + lift(g[every, order], y) * top[0]
        errors = off.to(y).reshape(3, -1, *(1,) * (y.ndim - 1)) * top
        known = (known + 1).clamp(max=self.most + 1)
        places = torch.cat([u[:, None], places[:, :-1]], 1)
        return Trial(y, slope, errors, (order, known, places, found[:, :-1]))

    def judge(self, rows: Rows, errors: Tensor) -> Tensor:
        """The errors of the order, the one below and the one above, infinite if there is none."""
        order, known = rows.memory[:2]
        there = torch.stack((order > 0, order > 1, (order < known) & (order < self.most)))
        return errors.masked_fill(~there, math.inf)

    def first_steps(self, way: Coordinates, rows: Rows) -> Tensor:
        """A twentieth of the way where the coordinates are scaled to the data."""
        if way.unit(rows.u) is None:
            return super().first_steps(way, rows)
        return torch.full_like(rows.u, _FIRST * way.length)

    def resize(self, rows: Rows, errors: Tensor, accept: Tensor) -> tuple[Tensor, Rows]:
        """The order that allows the longest next step, and that step; higher only if accepted."""
        order, known, *kept = rows.memory
        sound = errors.clamp(1e-10, 1e30)
        factor, best = self.safety * power(sound[0], -1.0 / (order + 1)), order
        for error, other in ((sound[1], order - 1), (sound[2], order + 1)):
            step = self.safety * power(error, -1.0 / (other + 1).clamp(min=1))
            better = (step > factor) & (accept | (other < order))
            factor, best = torch.where(better, step, factor), torch.where(better, other, best)
        least, most = torch.where(accept, 0.2, 0.1), torch.where(accept, _GROWTH, 0.9)
        return factor.minimum(most).maximum(least), rows._replace(memory=(best, known, *kept))


def _columns(weights: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Columns of weights [b, q], each shaped to multiply `like` [b, *event]."""
    shaped = weights.to(like).reshape(*weights.shape, *(1,) * (like.ndim - 1))
    return shaped.unbind(1)


def _integrals(places: Tensor, start: Tensor, h: Tensor) -> Tensor:
    """g_0 to g_q [b, q + 1] of places [b, q], by Gauss's rule of four points: exact for q <= 7."""
    nodes, first, length = places.numpy(), start.numpy()[:, None], h.numpy()[:, None]
    u, product = first + length * (0.5 + _POINTS), length * _SHARES
    columns = [product]
    for j in range(nodes.shape[1]):
        columns.append(columns[-1] * (u - nodes[:, j : j + 1]))
    terms = np.stack(columns, 1)
    return torch.from_numpy((terms[..., 0] + terms[..., 1]) + (terms[..., 2] + terms[..., 3]))
