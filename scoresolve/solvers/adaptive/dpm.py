"""DPM-Solver-12 and -23: an exponential pair in log-SNR."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from scoresolve.errors import whole_number
from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lift

__all__ = ["AdaptiveDPMSolver"]


class AdaptiveDPMSolver(Adaptive):
    """DPM-Solver-12 (two calls a step) or -23 (three), in y = x/alpha over k = sigma/alpha.

    With h the step in log-SNR/2, eps_r the noise predicted a share r of it ahead, and dk = k' - k,

        1   y + dk eps                                  the lower solution of 12
        2   y + dk eps + dk (eps_r - eps)/(2 r)         r = 1/2; the lower one of 23 with r = 1/3
        3   y + dk eps + 3/2 (k' + dk/h) (eps_2/3 - eps)

    with eps_2/3 taken at y + dk_2/3 eps + 2 (k_2/3 + 3/2 dk_2/3/h) (eps_1/3 - eps).

    Args:
        rtol, atol: as in `Adaptive`; 0.05 and 0.0078 are the published ones.
        order: 2 or 3; a step is at most half an e-fold of k with 2, a whole one with 3. Both
            solutions of a pair are right where eps does not change, so that the first steps call
            for leaps over all that follows: with the published tolerances alone DPM-Solver-23
            made the variance of N(0.7, 0.5^2) 14 times too large.
        **options: as in `Adaptive`; the coordinates are "log_snr".

    Raises:
        ArgumentError: an argument is out of its range.

    Source:
        Lu et al. 2022 (2206.00927), algorithms 1 and 2, appendix C (adaptive steps).
    """

    usual_coordinates = "log_snr"
    possible_coordinates = ("log_snr",)
    source = "Lu et al. 2022 (2206.00927), appendix C"

    def __init__(
        self, rtol: float = 0.05, atol: float = 0.0078, *, order: int = 3, **options: Any
    ) -> None:
        super().__init__(rtol, atol, **options)
        self.order = float(whole_number("order", order, 2, 3))
        self.longest = 0.5 if order == 2 else 1.0
        self.name = f"dpm_solver_{order - 1}{order}"

    def trial(self, way: Coordinates, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        shares = (0.5,) if self.order == 2 else (1 / 3, 2 / 3)
        k = [np.exp(at) for at in (rows.u, *(rows.u + r * h for r in shares), u)]
        eps = rows.slope / lift(k[0], rows.y)

        def ahead(i: int) -> Tensor:
            """The first-order solution at stage i."""
            return rows.y + lift(k[i] - k[0], rows.y) * eps

        def noise(y: Tensor, i: int) -> Tensor:
            return way.slope(y, rows.u + shares[i - 1] * h, rows.place) / lift(k[i], y)

        bend = noise(ahead(1), 1) - eps
        second = ahead(-1) + lift((k[-1] - k[0]) / (2 * shares[0]), bend) * bend
        if self.order == 2:
            y, lower = second, ahead(-1)
        else:
            inner = ahead(2) + lift(2 * _excess(k[0], k[2], 2 / 3 * h), bend) * bend
            turn = noise(inner, 2) - eps
            y, lower = ahead(-1) + lift(1.5 * _excess(k[0], k[-1], h), turn) * turn, second
        return Trial(y, way.slope(y, u, rows.place), (y - lower)[None])


def _excess(start: Numbers, end: Numbers, h: Numbers) -> Numbers:
    """k' - (k' - k)/h for a step h in log k from k to k'."""
    return end - (end - start) / h
