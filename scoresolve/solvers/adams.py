"""Adams methods on the flow: one network call a step, memory instead of stages.

In a form dy = k dtau + dN with slopes k, the polynomial through the last slopes is integrated,

    y_s = y_t + sum_j w_j k_j + N,    w_j = int_{tau_t}^{tau_s} l_j(u(tau)) dtau,

with l_j the Lagrange polynomials of the past readings of a variable u: tau itself, half the
log-SNR, sigma/alpha or time. The weights are exact for any step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from scoresolve.errors import ArgumentError, known_name, whole_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import Form, exponential_form, get_form
from scoresolve.solvers.runge_kutta import EULER, HEUN, KUTTA3, RK4, Tableau, advance

__all__ = [
    "DEIS",
    "Adams",
    "AdamsBashforth",
    "ExponentialAdams",
    "adams_weights",
    "midpoint_weights",
    "slope_weights",
]

Variable = Callable[[Run, Sequence[float]], Sequence[float]]
"""Its values at several lam at once."""
VARIABLES: dict[str, Variable] = {
    "log_snr": lambda run, lams: lams,
    "sigma": lambda run, lams: [math.exp(-lam) for lam in lams],
    "angle": lambda run, lams: [math.atan(math.exp(-lam)) for lam in lams],
    "time": lambda run, lams: run.times_at(lams),
}
MATCHED_FROM = 24
"""Steps of a grid from which a "matched" start takes its Runge-Kutta steps."""
STARTERS = {1: EULER, 2: HEUN, 3: KUTTA3, 4: RK4}
_ABSCISSAE, _WEIGHTS = (values.tolist() for values in np.polynomial.legendre.leggauss(12))
_NEGLIGIBLE = 40.0  # in lam: exp(-40) is below rounding


def adams_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals of the Lagrange polynomials of distinct `nodes` from `start` to `end`.

    Args:
        nodes: n distinct numbers.
        start, end: distinct ends.

    Returns:
        n weights; their sum is `end - start`.
    """
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


def slope_weights(
    form: Form, variable: str | Variable, run: Run, nodes: Sequence[float], t: float, s: float
) -> list[float]:
    """Weights of the slopes at the times `nodes` in the integral of their polynomial over [t, s].

    Args:
        form: whose tau is integrated over.
        variable: what the polynomial is in: "clock" (tau), "log_snr", "sigma", "angle" or "time",
            or a function of the run and several lam.
        run: the run.
        nodes: distinct times.
        t, s: ends of the step.

    Returns:
        One weight for each node.

    Raises:
        ArgumentError: the form has no such polynomials.
    """
    if variable == "clock":
        clock = [form.clock(run, node) for node in nodes]
        return adams_weights(clock, form.clock(run, t), form.clock(run, s))
    if form.clock_rate is None:
        raise ArgumentError(f"a form of {form.prediction!r} has no polynomials in {variable!r}")
    place = VARIABLES[variable] if isinstance(variable, str) else variable
    start, length, panels = _window(form.clock_rate, run.log_snr_half(t), run.log_snr_half(s))
    half = length / panels / 2
    lams = [start + half * (2 * panel + 1 + x) for panel in range(panels) for x in _ABSCISSAE]
    values = place(run, [*(run.log_snr_half(node) for node in nodes), *lams])
    points, values = values[: len(nodes)], values[len(nodes) :]
    weights = [0.0] * len(nodes)
    for lam, u, share in zip(lams, values, _WEIGHTS * panels, strict=True):
        density = half * share * form.clock_rate(lam)
        gaps = [u - u_k for u_k in points]
        for j in range(len(points)):
            weights[j] += density * math.prod(gaps[:j] + gaps[j + 1 :])
    scales = (
        math.prod(u_j - u_k for k, u_k in enumerate(points) if k != j)
        for j, u_j in enumerate(points)
    )
    return [weight / scale for weight, scale in zip(weights, scales, strict=True)]


def midpoint_weights(run: Run, form: Form, nodes: Sequence[float], s: float) -> list[float]:
    """Weights of two slopes, the last at the start of a step to `s`: the line's value halfway in
    half-log-SNR times the length of the step, the "2M" of DPM-Solver++.
    """
    before, now, after = (run.log_snr_half(time) for time in (*nodes, s))
    length = form.clock(run, s) - form.clock(run, nodes[-1])
    extra = length * (after - now) / (now - before) / 2
    return [-extra, length + extra]


def _window(rate: Callable[[float], float], t: float, s: float) -> tuple[float, float, int]:
    """Where to start, how far to go and in how many panels, for an integral of rate over lam."""
    t, s = (min(max(lam, -_NEGLIGIBLE), _NEGLIGIBLE) for lam in (t, s))
    growth = math.log(abs(rate(s) / rate(t)))
    if abs(s - t) > _NEGLIGIBLE:  # keep the end that carries the mass
        reach = math.copysign(_NEGLIGIBLE, s - t)
        t, s = (s - reach, s) if growth > 0 else (t, t + reach)
    return t, s - t, max(1, math.ceil(max(abs(s - t), abs(growth) / 2)))


class Adams(Solver):
    """Variable-step Adams predictor, with a corrector that costs no call if wanted.

    The corrector integrates the last step again once the slope at its end is known, which is
    called for anyway (PEC mode): the state moves by sum_j (c_j - w_j) k_j.

    Args:
        order: of the predictor, 1 to 5.
        form: a `Form`.
        variable: what the polynomial is in; see `slope_weights`.
        corrector: None for no corrector; else how many slopes it takes, `order` or one more.
        start: "matched" takes Runge-Kutta steps of order one less (one call more for order 3,
            four for order 4, nine for order 5) until enough slopes are known, which keeps the
            global order; with a corrector of one slope more they are of one order more, as is
            the method. On grids of less than 24 steps, where the calls are better spent on
            steps, and with "graded" everywhere it takes the slopes there are, as most published
            code does; kept up on finer grids that leaves order 2 at most, 3 with a corrector.

    Raises:
        ArgumentError: another order, corrector or start.
        UnknownNameError: no such variable.

    Source:
        Hairer, Norsett and Wanner 1993, III.1 and III.5.
    """

    source = "Hairer et al. 1993, III.5"

    def __init__(
        self,
        order: int,
        form: Form,
        variable: str | Variable = "clock",
        corrector: int | None = None,
        start: str = "matched",
    ) -> None:
        order = whole_number("order", order, most=5)
        if isinstance(variable, str):
            known_name("variable", variable, ("clock", *VARIABLES))
        if corrector is not None and corrector not in (max(2, order), order + 1):
            raise ArgumentError(
                f"a corrector of {corrector} slopes for {order}: choose None, "
                f"{max(2, order)} or {order + 1}"
            )
        if start not in ("matched", "graded"):
            raise ArgumentError(f"start = {start!r}: choose 'matched' or 'graded'")
        self.nodes, self.form, self.variable = order, form, variable
        self.corrector, self.start = corrector, start
        self.remembers = order > 1 or corrector is not None
        reach = 5 if start == "matched" else 2 if corrector is None else 3
        self.order = min(corrector or order, reach)
        self.predicts = form.prediction
        self.jumps_at_noise = form.singular_at_noise or variable in ("log_snr", "sigma")
        self.jumps_at_data = form.singular_at_data or variable == "log_snr"
        self.grid = "log_snr" if form.singular_at_data else "flow"

    def form_at(self, run: Run, t: float) -> Form:
        """The form of the step that starts at `t`; a noise level that changes overrides this."""
        return self.form

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form, (nodes, corrector) = self.form_at(run, t), self.slopes(run, run.index)
        past = run.past[-self.nodes :]
        if self._starting(len(run.past), run):
            y, _ = advance(self._starter(), form, x / form.scale(run, t), t, s, run)
            return form.scale(run, s) * y
        times = [*(node.t for node in past), t]
        slopes = [form.slope_from(run, node.t, node.x, node.m) for node in past]
        slopes.append(form.slope(run, x / form.scale(run, t), t))
        if corrector and past and not self._starting(len(run.past) - 1, run):
            x = x + self._correction(times, slopes, corrector, run)
        y = x / form.scale(run, t)
        weights = self.weights(run, form, times[-nodes:], t, s)
        for weight, slope in zip(weights[::-1], slopes[::-1], strict=False):  # newest first
            y = y + weight * slope
        noise = form.noise(run, t, s)
        return form.scale(run, s) * (y if noise is None else y + noise)

    def slopes(self, run: Run, index: int) -> tuple[int, int]:
        """How many slopes predictor and corrector of a step take; 0 for no corrector."""
        return self.nodes, self.corrector or 0

    def weights(
        self, run: Run, form: Form, nodes: Sequence[float], t: float, s: float
    ) -> list[float]:
        """Weights of the slopes at `nodes` over the step from t to s.

        The last node is t for the predictor and s for the corrector.
        """
        return slope_weights(form, self.variable, run, nodes, t, s)

    def _starting(self, known: int, run: Run) -> bool:
        """Whether a step that finds `known` earlier slopes is one of the start-up."""
        matched = self.start == "matched" and len(run.times) > MATCHED_FROM
        return matched and known + 1 < self.nodes - 1

    def _starter(self) -> Tableau:
        return STARTERS[min((self.corrector or self.nodes) - 1, 4)]

    def _correction(
        self, times: list[float], slopes: list[Linear], corrector: int, run: Run
    ) -> Linear:
        """What the slope at the end of the last step, the newest, adds to the state there."""
        t, s = times[-2:]
        form, taken = self.form_at(run, t), self.slopes(run, run.index - 1)[0]
        before = self.weights(run, form, times[:-1][-taken:], t, s)
        before = [0.0] * (len(times) - 1 - len(before)) + before
        after = self.weights(run, form, times[-corrector:], t, s)
        after = [0.0] * (len(times) - len(after)) + after
        gains = (new - old for new, old in zip(after, [*before, 0.0], strict=True))
        terms = (form.scale(run, s) * gain * k for gain, k in zip(gains, slopes, strict=True))
        return sum(terms, start=0.0 * slopes[-1])


class AdamsBashforth(Adams):
    """Variable-step Adams-Bashforth of order 2 to 5 in any form of the probability flow.

    Args:
        order: 2 to 5.
        form: "eps", "x0", "v" or "flow"; see `scoresolve.solvers.forms`.
        start: "matched" or "graded", as in `Adams`.

    Raises:
        ArgumentError: another order or start.
        UnknownNameError: no such form.

    Source:
        Hairer, Norsett and Wanner 1993, III.5; in eps form the rhoAB-DEIS of Zhang and Chen 2023
        (2204.13902), the linear multistep sampler of k-diffusion, and the iPNDM with steps of
        their own size (iPNDM_v).
    """

    source = "Hairer et al. 1993, III.5; Zhang and Chen 2023 (2204.13902)"

    def __init__(self, order: int = 3, form: str = "eps", start: str = "matched") -> None:
        order = whole_number("order", order, least=2, most=5)
        super().__init__(order, get_form(form), start=start)
        self.name = f"ab{order}" if form == "eps" else f"ab{order}_{form}"


class DEIS(Adams):
    """Diffusion exponential integrator sampler: the past eps as a polynomial in t or sigma/alpha.

        x_s = alpha_s/alpha_t x_t + alpha_s sum_j w_j eps_j,   w_j = int l_j d(sigma/alpha).

    Args:
        order: 1 to 4.
        variable: "time" (tAB), "sigma" (rhoAB) or "log_snr", all with the exact integral.
        start: "matched" or "graded", as in `Adams`; the paper's is graded.

    Source:
        Zhang and Chen 2023 (2204.13902), eq. 14 and 15, and appendix B.2.
    """

    source = "Zhang and Chen 2023 (2204.13902), eq. 14 and 15"

    def __init__(self, order: int = 3, variable: str = "time", start: str = "matched") -> None:
        order = whole_number("order", order, most=4)
        known_name("variable", variable, ("time", "sigma", "log_snr"))
        super().__init__(order, get_form("eps"), variable, start=start)
        short = {"time": "t", "sigma": "rho", "log_snr": "lam"}[variable]
        self.name = f"deis_{short}ab{order}"


class ExponentialAdams(Adams):
    """Exponential Adams-Bashforth: the past predictions as a polynomial in half the log-SNR.

        x_s = sigma_s/sigma_t x_t + sigma_s sum_j w_j x0_j,   w_j = int l_j d(exp lam),

    or the same with eps. Order 3 on x0 is what DPM-Solver++ (3M) aims at.

    Args:
        order: 1 to 5.
        form: "x0" or "eps".
        start: "matched" or "graded", as in `Adams`.

    Raises:
        ArgumentError: another order, form or start.

    Source:
        Hochbruck and Ostermann 2010, section 2.5; Zhang et al. 2023 (2308.02157), section 3.3.
    """

    source = "Hochbruck and Ostermann 2010, section 2.5"

    def __init__(self, order: int = 3, form: str = "x0", start: str = "matched") -> None:
        super().__init__(order, exponential_form(form), "log_snr", start=start)
        self.name = f"eab{order}" if form == "x0" else f"eab{order}_{form}"
