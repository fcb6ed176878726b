"""Adaptive Runge-Kutta: the embedded pairs of the textbooks, in any coordinates."""

from __future__ import annotations

import math

import numpy as np
import torch

from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.rows import Numbers, Rows, combine, lift
from scoresolve.solvers.adaptive.tableaus import (
    BOGACKI_SHAMPINE,
    DOP853,
    DORMAND_PRINCE,
    TSITOURAS,
    Tableau,
)

__all__ = ["BogackiShampine", "DormandPrince", "DormandPrince853", "Tsitouras"]


class _EmbeddedPair(Adaptive):
    tableau: Tableau

    def trial(self, way: Coordinates, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        y, slopes, step = rows.y, [rows.slope], lift(h, rows.y)
        for c, weights in zip(self.tableau.c[1:], self.tableau.a[1:], strict=True):
            y = rows.y + step * combine(weights, slopes)
            slopes.append(way.slope(y, u if c == 1 else rows.u + c * h, rows.place))
        errors = torch.stack([combine(e, slopes) for e in self.tableau.e])
        return Trial(y, slopes[-1], errors, factors=h)

    def judge(self, rows: Rows, errors: Numbers) -> Numbers:
        if len(errors) == 1:
            return errors
        first, second = np.square(errors)
        total = np.sqrt(first + second / 100)
        decisive = np.where(np.isfinite(total), 0.0, math.inf)
        np.divide(first, total, out=decisive, where=np.isfinite(total) & (total > 0))
        return decisive[None]


class BogackiShampine(_EmbeddedPair):
    """Bogacki-Shampine 3(2), three calls a step; arguments as in `Adaptive`.

    Source:
        Bogacki, Shampine, "A 3(2) pair of Runge-Kutta formulas", 1989.
    """

    name, source = "bosh3", "Bogacki and Shampine 1989"
    tableau, order = BOGACKI_SHAMPINE, float(BOGACKI_SHAMPINE.order)


class DormandPrince(_EmbeddedPair):
    """Dormand-Prince 5(4), six calls a step; arguments as in `Adaptive`.

    Source:
        Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980; Hairer, Norsett,
        Wanner, "Solving Ordinary Differential Equations I", 2nd ed., sections II.4 (error norm)
        and II.5 (table 5.2); Gustafsson, "Control theoretic techniques for stepsize
        selection in explicit Runge-Kutta methods", 1991. Its control is that of the code DOPRI5.
    """

    name, source = "dopri5", "Dormand and Prince 1980; Hairer et al. 1993, II.4-5"
    tableau, order = DORMAND_PRINCE, float(DORMAND_PRINCE.order)
    usual_control = (0.2, 0.65, 0.0)


class Tsitouras(_EmbeddedPair):
    """Tsitouras 5(4), six calls a step; arguments as in `Adaptive`.

    Source:
        Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
        assumption", 2011, table 1.
    """

    name, source = "tsit5", "Tsitouras 2011, table 1"
    tableau, order = TSITOURAS, float(TSITOURAS.order)
    usual_control = (0.2, 0.65, 0.0)


class DormandPrince853(_EmbeddedPair):
    """Dormand-Prince 8(5,3), twelve calls a step; arguments as in `Adaptive`.

    Source:
        Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 2nd ed., section
        II.10, and its code DOP853.
    """

    name, source = "dop853", "Hairer et al. 1993, II.10"
    tableau, order = DOP853, float(DOP853.order)
