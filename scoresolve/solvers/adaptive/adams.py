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

from scoresolve.errors import whole_number
from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lifted

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

    def memory(self, way: Coordinates, rows: Rows) -> tuple[Any, ...]:
        """Order, number of slopes known, their places [b, q] and differences [b, q, *event]."""
        one, kept = np.ones_like(rows.place), self.most + 1
        rest = torch.zeros_like(rows.slope)[:, None].expand(-1, kept - 1, *rows.slope.shape[1:])
        differences = torch.cat([rows.slope[:, None], rest], 1)
        return one, one, rows.u[:, None].repeat(kept, 1), differences

    def trial(self, way: Coordinates, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        order, known, places, differences = rows.memory
        old, slots, every = differences.unbind(1), np.arange(self.most + 1), np.arange(len(u))
        ahead, g = u[:, None] - places, _integrals(places, rows.u, h)
        near, far = order.max(), known.max()
        shares = np.where(slots < order[:, None], g[:, :-1], 0.0)[:, :near]
        inverse = np.where(slots < known[:, None], 1 / ahead, 0.0)[:, :far]
        orders = np.stack((order, np.maximum(order - 1, 1), order + 1))
        off = (g[:, 1:] - ahead * g[:, :-1])[every, orders - 1]
        weights = lifted((*shares.T, *inverse.T, g[every, order], *off), rows.y)

        y = rows.y
        for weight, difference in zip(weights[:near], old, strict=False):
            y = y + weight * difference
        slope = way.slope(y, u, rows.place)
        new = [slope]
        for weight, difference in zip(weights[near : near + far], old, strict=False):
            new.append((new[-1] - difference) * weight)
        new += [torch.zeros_like(slope)] * (self.most + 2 - len(new))
        found = torch.stack(new, 1)
        top = found[torch.from_numpy(every).to(y.device), torch.from_numpy(orders).to(y.device)]
        y = y + weights[-4] * top[0]
        errors = torch.stack(weights[-3:]) * top
        places = np.concatenate((u[:, None], places[:, :-1]), 1)
        memory = (order, np.minimum(known + 1, self.most + 1), places, found[:, :-1])
        return Trial(y, slope, errors, memory)

    def judge(self, rows: Rows, errors: Numbers) -> Numbers:
        """The errors of the order, the one below and the one above, infinite if there is none."""
        order, known = rows.memory[:2]
        there = np.stack((order > 0, order > 1, (order < known) & (order < self.most)))
        return np.where(there, errors, math.inf)

    def first_steps(self, way: Coordinates, rows: Rows) -> Numbers:
        """A twentieth of the way where the coordinates are scaled to the data."""
        if way.unit(rows.u) is None:
            return super().first_steps(way, rows)
        return np.full_like(rows.u, _FIRST * way.length)

    def resize(self, rows: Rows, errors: Numbers, accept: Numbers) -> tuple[Numbers, Rows]:
        """The order that allows the longest next step, and that step; higher only if accepted."""
        order = rows.memory[0]
        orders = np.stack((order, order - 1, order + 1))
        steps = errors.clip(1e-10, 1e30) ** (-1.0 / np.maximum(orders + 1, 1))
        factor, best = steps[0], order
        for step, other, allowed in zip(steps[1:], orders[1:], (True, accept), strict=True):
            better = (step > factor) & allowed
            factor, best = np.where(better, step, factor), np.where(better, other, best)
        least, most = np.where(accept, 0.2, 0.1), np.where(accept, _GROWTH, 0.9)
        factor = np.maximum(np.minimum(self.safety * factor, most), least)
        return factor, rows._replace(memory=(best, *rows.memory[1:]))


def _integrals(nodes: Numbers, start: Numbers, h: Numbers) -> Numbers:
    """g_0 to g_q [b, q + 1] of nodes [b, q], by Gauss's rule of four points: exact for q <= 7."""
    u, share = start + h * (0.5 + _POINTS[:, None]), h * _SHARES[:, None]
    products = np.multiply.accumulate([share, *(u - node for node in nodes.T)])
    integrals: Numbers = (products[:, 0] + products[:, 1]) + (products[:, 2] + products[:, 3])
    return integrals.T
