"""A Runge-Kutta method of weak order 3 for the reverse SDE, four calls a step.

In x0 form with eta = 1 the clock is tau = alpha^2/sigma^2, y = alpha x/sigma^2, and the reverse
SDE is dy = x0(x, t) dtau + dB. With h = tau_s - tau_t and the B and H of `strong`, a step is

    k_i = x0(y + h sum_j a_ij k_j + c_i W + q_i sqrt(12) H, tau_t + c_i h),
    y_s = y + h sum_i w_i k_i + W.

With q_i^2 = c_i (1 - c_i) the noise of a stage has, jointly with W, the law of B at its time.
Every moment of y_s is then right up to h^3 if, with C_ij = c_i c_j + q_i q_j,

    sum w = 1,   sum w c = 1/2,   sum w c^2 = 1/3,   sum w q = 1/sqrt(12),
    sum w_i a_ij c_j = sum w_i a_ij C_ij = 1/6.

The fourth makes h sum w_i (c_i W + q_i sqrt(12) H) the integral of B: paths are of order 1.5 too.
"""

from __future__ import annotations

import math

from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import data_form

__all__ = ["WeakRungeKutta"]


class WeakRungeKutta(Solver):
    """Weak order 3 for additive noise, with positive weights and noise of the law of B.

          c  |   a                            q sqrt(12) H added
         0   |                                 0
         1/9 |  1/9                           -sqrt(8)/9
         1/9 | -4/45    1/5                   +sqrt(8)/9
       11/16 | -1.446   0.808   1.325         +sqrt(55)/16
        -----+--------------------------------
             |  3/22    0.139   0.024  640/913

    The nodes and a_32 are chosen for a small error on Gaussian data in steps of .5 to 4 in
    log-SNR; the rest follows from the conditions above.

    Source:
        Weak order 3 for additive noise: Debrabant 2010 (BIT Numer. Math. 50), whose AN3D1 meets
        the same conditions with other noises. This tableau is the project's own.
    """

    name, source = "weak_rk3", "own, on the conditions of Debrabant 2010 (BIT 50)"
    predicts, order, strong_order, stochastic, grid = "x0", 3, 1.5, True, "log_snr"
    jumps_at_noise, jumps_at_data = True, True
    nodes = (0.0, 1 / 9, 1 / 9, 11 / 16)
    rows = (
        (),
        (1 / 9,),
        (-4 / 45, 1 / 5),
        (-1.445591236354335, 0.8077394567882458, 1.3253517795660895),
    )
    weights = (3 / 22, 0.1389835228191379, 0.02366707959050066, 640 / 913)
    bridges = (0.0, -math.sqrt(8) / 9, math.sqrt(8) / 9, math.sqrt(55) / 16)

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form = data_form(1.0)
        start, h = form.clock(run, t), form.clock(run, s) - form.clock(run, t)
        y = x / form.scale(run, t)
        w, bridge = math.sqrt(h) * run.noise(t, s), math.sqrt(h) * run.area(t, s)
        slopes: list[Linear] = []
        for node, row, q in zip(self.nodes, self.rows, self.bridges, strict=True):
            time = form.time(run, start + node * h) if slopes else t
            drift = (h * a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(form.slope(run, sum(drift, y + node * w + q * bridge), time))
        drift = (h * a * k for a, k in zip(self.weights, slopes, strict=True))
        return form.scale(run, s) * sum(drift, y + w)
