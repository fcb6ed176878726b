"""Published multistep methods with weights of their own.

Each combines the predictions at the last few states; what differs is the weights:

    eps form   x_s/alpha_s = x_t/alpha_t + (k_s - k_t) e,   k = sigma/alpha,
    x0 form    x_s/sigma_s = x_t/sigma_t + (1/k_s - 1/k_t) d,

with e or d a fixed (PNDM, iPNDM) or step-dependent (2M) mean of past predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

from scoresolve.errors import ArgumentError, known_name, real_number, whole_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.adams import Adams, ExponentialAdams, midpoint_weights
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import Form, exponential_form, get_form

__all__ = ["IPNDM", "PNDM", "DPMSolverPP", "GradientEstimation", "UniPC"]

EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth weights for equal steps, newest first."""


class DPMSolverPP(ExponentialAdams):
    """DPM-Solver++ multistep (2M, 3M) on the data prediction.

    With lam = log(alpha/sigma), h = lam_s - lam_t and r the previous step over h, order 2 is

        D = (1 + 1/(2r)) m_t - 1/(2r) m_previous,
        x_s = sigma_s/sigma_t x_t - alpha_s (exp(-h) - 1) D.

    Order 3 integrates the parabola in lam through the last three predictions. (The published 3M
    halves its second difference, which leaves order 2.)

    Args:
        order: 1 (DDIM), 2 or 3.
        start: "matched" or "graded", as in `Adams`; order 3 as published is graded.

    Raises:
        ArgumentError: another order or start.

    Source:
        Lu et al. 2022 (2211.01095), algorithm 2 and appendix B.
    """

    source = "Lu et al. 2022 (2211.01095), algorithm 2"

    def __init__(self, order: int = 2, start: str = "matched") -> None:
        super().__init__(whole_number("order", order, most=3), "x0", start)
        self.name = f"dpmpp_{order}m"

    def weights(
        self, run: Run, form: Form, nodes: Sequence[float], t: float, s: float
    ) -> list[float]:
        if self.nodes != 2 or len(nodes) != 2:
            return super().weights(run, form, nodes, t, s)
        return midpoint_weights(run, form, nodes, s)


class UniPC(Adams):
    """UniPC: predictor UniP-p and corrector UniC-p, which costs no call.

    Both are Adams methods with the polynomial in half the log-SNR. The function B(h) of the paper
    cancels wherever its linear system is solved; it matters where the published code puts 1/2 for
    the solution, in the predictor of two nodes and the corrector of two:

        UniP-2   y_s = y_t + (tau_s - tau_t) m_t + b (m_t - m_previous) h/(2 h_previous),
        UniC-1   y_s = y_t + (tau_s - tau_t) m_t + b (m_s - m_t)/2,

    with b in units of tau: tau_s - tau_t for B_2 = exp(h) - 1, and h dtau/dlam at s for B_1 = h.

    Args:
        order: p, 1 to 4.
        variant: "bh1" or "bh2".
        form: "x0" or "eps".
        correct: whether the corrector is used; without it this is UniP-p.
        start: "matched" or "graded", as in `Adams`; the paper's is graded.

    Raises:
        ArgumentError: another order, variant or start.

    Source:
        Zhao et al. 2023 (2302.04867), algorithms 1 and 2, section 3.
    """

    source = "Zhao et al. 2023 (2302.04867), algorithms 1 and 2"

    def __init__(
        self,
        order: int = 3,
        variant: str = "bh1",
        form: str = "x0",
        correct: bool = True,
        start: str = "matched",
    ) -> None:
        order = whole_number("order", order, most=4)
        super().__init__(
            order, exponential_form(form), "log_snr", order + 1 if correct else None, start
        )
        self.variant = known_name("variant", variant, ("bh1", "bh2"))
        settings = zip((str(order), variant, form), ("3", "bh1", "x0"), strict=True)
        named = (value for value, usual in settings if value != usual)
        self.name = "_".join(["uni_pc" if correct else "uni_p", *named])

    def weights(
        self, run: Run, form: Form, nodes: Sequence[float], t: float, s: float
    ) -> list[float]:
        if len(nodes) != 2 or form.clock_rate is None:
            return super().weights(run, form, nodes, t, s)
        first, last, start, end = (run.log_snr_half(time) for time in (*nodes, t, s))
        b = length = form.clock(run, s) - form.clock(run, t)
        if self.variant == "bh1":
            b = form.clock_rate(end) * (end - start)
        extra = b / 2 * (end - start) / (last - first)
        return [-extra, length + extra] if nodes[-1] == t else [length - extra, extra]


class IPNDM(Solver):
    """iPNDM: Adams-Bashforth weights for equal steps on eps, whatever the steps are.

        x_s/alpha_s = x_t/alpha_t + (k_s - k_t) (55 e_t - 59 e_1 + 37 e_2 - 9 e_3)/24.

    The fixed weights limit the measured order to 2 on any grid that is not even in k = sigma/alpha;
    `AdamsBashforth` has the weights for unequal steps (iPNDM_v).

    Args:
        order: weights of 1 to 4 predictions; the first steps take as many as there are.

    Raises:
        ArgumentError: another order.

    Source:
        Zhang and Chen 2023 (2204.13902), appendix B.4.
    """

    predicts, grid, jumps_at_noise, remembers = "eps", "karras", True, True
    source = "Zhang and Chen 2023 (2204.13902), appendix B.4"

    def __init__(self, order: int = 4) -> None:
        self.terms = whole_number("order", order, most=4)
        self.order = min(self.terms, 2)
        self.name = "ipndm" if order == 4 else f"ipndm_{order}"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        e = run.predict(x, t)
        known = [past.m for past in run.past[: -self.terms : -1]]
        return _transfer(x, _mean([e, *known]), t, s, run)


class PNDM(Solver):
    """Pseudo numerical methods: Adams-Bashforth weights for equal steps after a special start.

    The start is three Runge-Kutta steps with nodes halfway in time (4 calls each), or, as "plms",
    one improved Euler step (2 calls) and then as many predictions as there are. As in `IPNDM` the
    fixed weights limit the measured order to 2.

    Args:
        start: "runge_kutta" or "plms".

    Raises:
        ArgumentError: another start.

    Source:
        Liu et al. 2022 (2202.09778), eq. 9 to 13, algorithm 2.
    """

    predicts, order, grid, jumps_at_noise, remembers = "eps", 2, "karras", True, True
    source = "Liu et al. 2022 (2202.09778), algorithm 2"

    def __init__(self, start: str = "runge_kutta") -> None:
        if start not in ("runge_kutta", "plms"):
            raise ArgumentError(f"start = {start!r}: choose 'runge_kutta' or 'plms'")
        self.start, self.name = start, "pndm" if start == "runge_kutta" else "plms"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        e_1 = run.predict(x, t)
        if self.start == "plms" and not run.past:
            e_2 = run.predict(_transfer(x, e_1, t, s, run), s)
            return _transfer(x, (e_1 + e_2) / 2, t, s, run)
        if self.start == "runge_kutta" and len(run.past) < 3:
            middle = (t + s) / 2
            e_2 = run.predict(_transfer(x, e_1, t, middle, run), middle)
            e_3 = run.predict(_transfer(x, e_2, t, middle, run), middle)
            e_4 = run.predict(_transfer(x, e_3, t, s, run), s)
            return _transfer(x, (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6, t, s, run)
        known = [past.m for past in run.past[:-4:-1]]
        return _transfer(x, _mean([e_1, *known]), t, s, run)


class GradientEstimation(Solver):
    """Gradient estimation: DDIM along an eps that is pushed away from the previous one.

        e = e_t + (gamma - 1) (e_t - e_previous).

    gamma = 3/2 would be Adams-Bashforth for equal steps; the published 2 is of order 1.

    Args:
        gamma: the push, 1 is DDIM.

    Raises:
        ArgumentError: `gamma` is no finite number.

    Source:
        Permenter and Yuan 2023 (2306.04848), eq. 13 and algorithm 2.
    """

    name, predicts, order = "gradient_estimation", "eps", 1
    jumps_at_noise, remembers = True, True
    source = "Permenter and Yuan 2023 (2306.04848), algorithm 2"

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = real_number("gamma", gamma)
        if gamma != 2:
            self.name = f"gradient_estimation(gamma={gamma:g})"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        e = run.predict(x, t)
        push = (self.gamma - 1) * (e - run.past[-1].m) if run.past else 0.0 * e
        return _transfer(x, e + push, t, s, run)


def _mean(newest_first: Sequence[Linear]) -> Linear:
    """The mean of past predictions with Adams-Bashforth weights for equal steps."""
    terms = zip(EQUAL_STEPS[len(newest_first) - 1], newest_first, strict=True)
    return sum((weight * e for weight, e in terms), start=0.0 * newest_first[0])


def _transfer(x: Linear, e: Linear, t: float, s: float, run: Run) -> Linear:
    """DDIM from t to s with the given eps."""
    form = get_form("eps")
    y = x / form.scale(run, t) + (form.clock(run, s) - form.clock(run, t)) * e
    return form.scale(run, s) * y
