"""Runge-Kutta methods of strong order 1.5 for the reverse SDE, two calls a step.

In x0 form with eta = 1 the clock is tau = alpha^2/sigma^2, y = alpha x/sigma^2, and

    dy = x0(x, t) dtau + dB,

a Brownian motion of unit rate in tau: additive noise, for which two normals a step suffice,

    W = B(tau_s) - B(tau_t) = sqrt(h) z,    H = int (B - chord) dtau / h = sqrt(h/12) z',

h = tau_s - tau_t. H is the space-time Levy area, independent of W. The order shows on one
path of B with its areas, as `BrownianPath.in_snr` gives it.
"""

from __future__ import annotations

import math

from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import data_form

__all__ = ["SRA1", "ShARK"]


class _Strong(Solver):
    predicts, order, strong_order, stochastic, grid = "x0", 2, 1.5, True, "log_snr"
    jumps_at_noise, jumps_at_data = True, True
    node: float
    weights: tuple[float, float]
    areas: tuple[float, float]
    """Factor of H at the two nodes; W enters the second by the factor `chord`."""
    chord: float

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form = data_form(1.0)
        start, h = form.clock(run, t), form.clock(run, s) - form.clock(run, t)
        y, middle = x / form.scale(run, t), form.time(run, start + self.node * h)
        w = math.sqrt(h) * run.noise(t, s)
        area = math.sqrt(h / 12) * run.area(t, s)
        first = form.slope(run, y + self.areas[0] * area, t)
        shift = self.chord * w + self.areas[1] * area
        second = form.slope(run, y + self.node * h * first + shift, middle)
        y = y + h * (self.weights[0] * first + self.weights[1] * second) + w
        return form.scale(run, s) * y


class SRA1(_Strong):
    """SRA1 of Roessler for additive noise.

        k_1 = x0(y, t),   k_2 = x0(y + 3/4 (h k_1 + W) + 3/2 H, tau_t + 3/4 h),
        y_s = y + h (k_1 + 2 k_2)/3 + W.

    Source:
        Roessler 2010 (SIAM J. Numer. Anal. 48), table 6.3, with I_10/h = W/2 + H.
    """

    name, source = "sra1", "Roessler 2010, table 6.3"
    node, chord, weights, areas = 3 / 4, 3 / 4, (1 / 3, 2 / 3), (0.0, 3 / 2)


class ShARK(_Strong):
    """ShARK: shifted additive-noise Runge-Kutta.

        k_1 = x0(y + H, t),   k_2 = x0(y + 5/6 (h k_1 + W) + H, tau_t + 5/6 h),
        y_s = y + h (2 k_1 + 3 k_2)/5 + W.

    Source:
        Foster, dos Reis and Strange 2023 (2210.17543), eq. 6.1.
    """

    name, source = "shark", "Foster et al. 2023 (2210.17543), eq. 6.1"
    node, chord, weights, areas = 5 / 6, 5 / 6, (2 / 5, 3 / 5), (1.0, 1.0)
