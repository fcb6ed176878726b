"""The default: what the network adds to the solution for Gaussian data, integrated by Adams.

For data N(0, c^2 I) the flow is solved by y = x'/sqrt(k^2 + c^2) = const, with x' = x/alpha and
k = sigma/alpha, and the network would predict x0 = g x', g = c^2/(k^2 + c^2). For other data

    dy/dlog k = -(x0 - g x')/sqrt(k^2 + c^2),

which is small at both ends: at large k there is no signal to add, at small k x0 is nearly x'. The
same holds with Q(k; c, b) = k^2 + 2 b c k + c^2 for k^2 + c^2, where g = (c^2 + b c k)/Q; b = 0 is
the residual of EDM's preconditioning, b = 1 the velocity of a flow to data of scale c. As slope
over the clock dtau = c' dk/Q(k; c', b') it is taken for a polynomial in the angle atan(k/c'').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from scoresolve.errors import real_number, whole_number
from scoresolve.plans import Run
from scoresolve.solvers.adams import Adams
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import scaled_form

__all__ = ["ScaledAdams"]

C, B, RATE_C, RATE_B, TURN = 0.3, 0.75, 0.42, 0.5, 0.65
"""c, b, c', b' and c'' for data whose modes part at level 1; the levels c grow with it."""

LONGEST = {5: 0.3, 4: 0.5, 3: 0.85}
"""Steps of what length in log k still get that order; longer ones get 2, with a corrector of 3.

A direction in which the data have standard deviation s bends the path where k passes s. Data have
directions of many s, so wherever a step is long against the bend a high degree overshoots.
"""


class ScaledAdams(Adams):
    """Adams predictor and corrector on the scaled residual; the corrector costs no call.

    Args:
        order: slopes of the predictor, 2 to 5, and of the corrector. If omitted, both follow from
            the length of each step, see `LONGEST`.
        scale: noise level sigma/alpha at which the modes of the data part; `scale_of_data` has an
            estimate. If omitted it is that of the model (`Model.data_scale`); `sample` measures it
            if the model has none, see `scoresolve.tuning.scale_within`; 1 if all that fails.
        start: of a method of given order, "matched" or "graded" as in `Adams`. Without an order it
            is graded, and the grid makes its first step short instead.

    Raises:
        ArgumentError: another order or start, or a scale that is no positive number.

    Source:
        This package; see the module for the derivation and docs/choosing.md for what it measures.
        The constants were fitted to mixtures. PEC mode: Hairer, Norsett and Wanner 1993, III.1.
    """

    source = "this package; Hairer et al. 1993, III.1 (PEC mode)"

    def __init__(
        self, order: int | None = None, scale: float | None = None, start: str = "matched"
    ) -> None:
        self.scale = 1.0 if scale is None else real_number("scale", scale, above=0)
        self.settings, self.wants_scale = (order, scale, start), scale is None
        form = scaled_form(self.scale * C, B, self.scale * RATE_C, RATE_B)
        angle = partial(_angle, self.scale * TURN)

        if order is None:
            super().__init__(5, form, angle, 5, "graded")
        else:
            super().__init__(whole_number("order", order, 2, 5), form, angle, order, start)
        self.grid, self.grid_options = "scaled", {"scale": self.scale}
        kind = "auto" if order is None else f"scaled_{order}"
        self.name = kind if self.scale == 1 else f"{kind}(scale={self.scale:.3g})"

    def slopes(self, run: Run, index: int) -> tuple[int, int]:
        if self.settings[0] is not None:
            return super().slopes(run, index)
        t, s = run.times[index : index + 2]
        length = abs(run.log_snr_half(s) - run.log_snr_half(t))
        order = next((order for order, most in LONGEST.items() if length < most), 2)
        return order, max(3, order)

    def scaled(self, scale: float | None) -> Solver:
        order, _, start = self.settings
        return ScaledAdams(order, scale, start) if self.wants_scale else self


def _angle(turn: float, run: Run, lams: Sequence[float]) -> list[float]:
    return [math.atan(math.exp(-lam) / turn) for lam in lams]
