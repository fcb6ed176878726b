"""Multistep methods on the probability flow: one network call a step, memory instead of stages.

Adams-Bashforth integrates the polynomial through the last slopes over the step,

    y_s = y_t + sum_j w_j k_j,    w_j = int_{tau_t}^{tau_s} l_j(tau) dtau,

with l_j the Lagrange polynomials of the past clock readings: any step sizes, exact weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scoresolve.errors import ArgumentError
from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import get_form
from scoresolve.solvers.runge_kutta import EULER, HEUN, KUTTA3, advance

__all__ = ["AdamsBashforth", "DPMSolverPP2M", "adams_weights"]


def adams_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals of the Lagrange polynomials of distinct `nodes` from `start` to `end`."""
    h = end - start
    u = [(node - start) / h for node in nodes]
    weights = []
    for j, u_j in enumerate(u):
        basis = [1.0]  # of prod_k (u - u_k), lowest power first
        for u_k in u[:j] + u[j + 1 :]:
            shifted = [0.0, *basis]
            basis = [high - u_k * low for high, low in zip(shifted, [*basis, 0.0], strict=True)]
        scale = math.prod(u_j - u_k for u_k in u[:j] + u[j + 1 :])
        weights.append(h * sum(c / (n + 1) for n, c in enumerate(basis)) / scale)
    return weights


class AdamsBashforth(Solver):
    """Variable-step Adams-Bashforth of order 2 to 4 in any form of the probability flow.

    Until enough slopes are known the steps are Runge-Kutta of order one less, which keeps the
    global order: order 3 spends one extra call on its start, order 4 four.

    Args:
        order: 2, 3 or 4.
        form: "eps", "x0", "v" or "flow"; see `scoresolve.solvers.forms`.

    Raises:
        ArgumentError: another order.
        UnknownNameError: no such form.

    Source:
        Hairer, Norsett and Wanner 1993, III.5; in eps form the tAB-DEIS of Zhang and Chen 2023
        (2204.13902), section 3.3, with sigma/alpha for its clock.
    """

    source = "Hairer et al. 1993, III.5; Zhang and Chen 2023 (2204.13902)"

    def __init__(self, order: int = 3, form: str = "eps") -> None:
        if order not in (2, 3, 4):
            raise ArgumentError(f"Adams-Bashforth of order {order}: choose 2, 3 or 4")
        self.order: int = order
        self.form = get_form(form)
        self.predicts = self.form.prediction
        self.name = f"ab{order}" if form == "eps" else f"ab{order}_{form}"
        self.starter = {2: EULER, 3: HEUN, 4: KUTTA3}[order]

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form, y = self.form, x / self.form.scale(run, t)
        known = run.past[max(0, len(run.past) - self.order + 1) :]
        if len(known) + 1 < self.order - 1:
            y, _ = advance(self.starter, form, y, t, s, run)
            return form.scale(run, s) * y
        slopes = [form.rate(run, past.t) * past.m for past in known]
        slopes.append(form.slope(run, y, t))
        nodes = [form.clock(run, past.t) for past in known] + [form.clock(run, t)]
        weights = adams_weights(nodes, nodes[-1], form.clock(run, s))
        y = sum((w * k for w, k in zip(weights, slopes, strict=True)), start=y)
        return form.scale(run, s) * y


class DPMSolverPP2M(Solver):
    """DPM-Solver++ (2M): exponential two-step method on the data prediction.

    With lam = log(alpha/sigma), h = lam_s - lam_t and r the previous step over h,

        D = (1 + 1/(2r)) m_t - 1/(2r) m_previous,
        x_s = sigma_s/sigma_t x_t - alpha_s (exp(-h) - 1) D.

    The first step takes D = m_t.

    Source:
        Lu et al. 2022 (2211.01095), algorithm 2.
    """

    name, predicts, order = "dpmpp_2m", "x0", 2
    source = "Lu et al. 2022 (2211.01095), algorithm 2"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        m, h = run.predict(x, t), run.log_snr_half(s) - run.log_snr_half(t)
        slope = 0.0 * m
        if run.past:
            slope = (h / run.past[-1].h / 2) * (m - run.past[-1].m)
        decay = run.sigma(s) / run.sigma(t)
        return decay * x - run.alpha(s) * math.expm1(-h) * (m + slope)
