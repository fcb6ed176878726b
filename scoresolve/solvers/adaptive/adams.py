r"""Adams methods of variable step and order, one call a step: the default adaptive solver.

With slopes f known at the last places u_0 (the newest), u_1, ... and a step h from u_0 to u', let

    phi_j = f[u_0, ..., u_j] (u' - u_0) ... (u' - u_{j-1}),
    g_j = int_0^1 (1 - a_0 r) ... (1 - a_{j-1} r) dr,    a_j = h/(u' - u_j).

The polynomial through p slopes gives

    predictor    y^p = y + h sum_{j < p} g_j phi_j.

The call at y^p makes phi'_0 = f' and phi'_{j+1} = phi'_j - phi_j, and

    corrector    y' = y^p + h g_p phi'_p,    of order p + 1; that of order p is off by
    error        h (g_p - g_{p-1}) phi'_p.

In the next step, to u'', phi_j is phi'_j times (u'' - u')/(u' - u_0) (u'' - u_0)/(u' - u_1) ..., of
j factors. Before the start the slope counts as constant.

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
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lift

__all__ = ["AdaptiveAdams"]

_GROWTH: Final = 3.0
_FIRST: Final = 1 / 20
_ORDERS: Final = np.array([[0], [-1], [1]])
"""The order, and those below and above."""


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
        """Order, number of slopes known, their places [q, b] and the phi' [q, b, *event]."""
        one = np.ones_like(rows.place)
        places = rows.u - way.sign * way.length * np.arange(self.most)[:, None]
        constant = torch.zeros_like(rows.slope).expand(self.most - 1, *rows.slope.shape)
        return one, one, places, torch.cat([rows.slope[None], constant])

    def trial(self, way: Coordinates, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        order, known, places, found = rows.memory
        ahead, behind, every = u - places, places[0] - places, np.arange(len(u))
        scale, g = np.ones_like(ahead), _integrals(h / ahead)
        np.cumprod(ahead[:-1] / behind[1:], 0, out=scale[1:])
        shares = h * g[:-1] * scale * (np.arange(self.most)[:, None] < order)
        orders = np.minimum(np.maximum(order + _ORDERS, 1), self.most)

        weights = lift(np.array((scale, shares)), rows.y)
        terms = (weights * found).flatten(0, 1).unbind()
        y = rows.y
        for term in terms[self.most :]:
            y = y + term
        slope = way.slope(y, u, rows.place)
        new = [slope]
        for term in terms[: self.most]:
            new.append(new[-1] - term)
        found = torch.stack(new)
        at = torch.from_numpy((orders * len(u) + every).ravel()).to(y.device)
        apart = found.reshape(-1, len(y) // len(u), *y.shape[1:])
        top = apart.index_select(0, at).reshape(3, *y.shape)
        y = y + lift(h * g[order, every], y) * top[0]
        memory = (
            order,
            np.minimum(known + 1, self.most),
            np.concatenate((u[None], places[:-1])),
            found[:-1],
        )
        return Trial(y, slope, top, memory, h * (g[orders, every] - g[orders - 1, every]))

    def judge(self, rows: Rows, errors: Numbers) -> Numbers:
        """The errors of the order, the one below and the one above, infinite if there is none."""
        order, known = rows.memory[:2]
        np.copyto(errors[1], math.inf, where=order == 1)
        np.copyto(errors[2], math.inf, where=order == known)
        return errors

    def first_steps(self, way: Coordinates, rows: Rows) -> Numbers:
        """A twentieth of the way where the coordinates are scaled to the data."""
        if way.unit(rows.u) is None:
            return super().first_steps(way, rows)
        return np.full_like(rows.u, _FIRST * way.length)

    def resize(self, rows: Rows, errors: Numbers, accept: Numbers) -> tuple[Numbers, Rows]:
        """The order that allows the longest next step, and that step; higher only if accepted."""
        order, every = rows.memory[0], np.arange(len(accept))
        sound = np.minimum(np.maximum(errors, 1e-10), 1e30)
        steps = sound ** (-1 / (order + 1 + _ORDERS))
        steps[2] *= accept
        best = steps.argmax(0)
        least, most = np.where(accept, 0.2, 0.1), np.where(accept, _GROWTH, 0.9)
        factor = np.maximum(np.minimum(self.safety * steps[best, every], most), least)
        return factor, rows._replace(memory=(order + _ORDERS[best, 0], *rows.memory[1:]))


def _integrals(shares: Numbers) -> Numbers:
    """g_0 to g_q [q + 1, b] of a_0 to a_{q-1} [q, b].

    With a factor r^(n-1) under the integral g_0 is 1/n, and g_{j+1} is g_j less a_j times the g_j
    of n + 1.
    """
    count = len(shares)
    g = np.empty((count + 1, shares.shape[1]))
    column: Any = 1 / np.arange(1.0, count + 2)[:, None]
    g[0] = 1.0
    for j, share in enumerate(shares):
        column = column[:-1] - share * column[1:]
        g[j + 1] = column[0]
    return g
