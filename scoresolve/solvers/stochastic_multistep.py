"""Multistep methods for the reverse SDE in x0 form: exact noise, polynomials for the drift.

    x_s = scale_s/scale_t x_t + scale_s (sum_j w_j x0_j + N),

the form of `scoresolve.solvers.forms.data_form`; the methods differ in its noise and in w. The
noise that earlier predictions saw limits the weak order, whatever the polynomial's degree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scoresolve.errors import ArgumentError, known_name, real_number, whole_number
from scoresolve.plans import Run
from scoresolve.solvers.adams import Adams, midpoint_weights
from scoresolve.solvers.forms import Form, check_eta, data_form, phi_form

__all__ = ["ERSDE", "GDDIM", "SASolver", "SDEDPMSolverPP"]


class SDEDPMSolverPP(Adams):
    """DPM-Solver++ on the reverse SDE, multistep (2M, 3M).

    With h the step in half-log-SNR, r the previous step over h and q = (1 + eta^2) h, order 2 is

        x_s = sigma_s/sigma_t exp(h - q) x_t + alpha_s (1 - exp(-q)) m_t + D + noise,
        midpoint   D = alpha_s (1 - exp(-q))/2 (m_t - m_previous)/r,
        heun       D = alpha_s (1 - (1 - exp(-q))/q) (m_t - m_previous)/r;

    order 3 integrates the parabola in sigma/alpha through three predictions. (The published 3M has
    a parabola in log-SNR, of which it halves the second difference; on coarse grids that multiplies
    the variance.)

    Args:
        order: 2 or 3.
        variant: "midpoint" or "heun", of order 2.
        eta: noise level, in (0, 5]; 1 is the reverse SDE. Elsewhere eta^2 is called eta.

    Raises:
        ArgumentError: another order or eta, or the heun variant of order 3.
        UnknownNameError: another variant.

    Source:
        Lu et al. 2022 (2211.01095), section 5 and eq. 19, with a noise level.
    """

    source = "Lu et al. 2022 (2211.01095), section 5"
    stochastic = True

    def __init__(self, order: int = 2, variant: str = "midpoint", eta: float = 1.0) -> None:
        order = whole_number("order", order, least=2, most=3)
        known_name("variant", variant, ("midpoint", "heun"))
        if (order, variant) == (3, "heun"):
            raise ArgumentError("variant = 'heun' is of order 2: order 3 has the exact integral")
        form = data_form(real_number("eta", eta, above=0))
        super().__init__(order, form, "log_snr" if order == 2 else "sigma", start="graded")
        self.variant = variant
        suffix = "_heun" * (variant == "heun") + ("" if eta == 1 else f"(eta={eta:g})")
        self.name = f"dpmpp_{order}m_sde{suffix}"

    def weights(
        self, run: Run, form: Form, nodes: Sequence[float], t: float, s: float
    ) -> list[float]:
        if len(nodes) != 2 or self.variant == "heun" or self.nodes == 3:
            return super().weights(run, form, nodes, t, s)
        return midpoint_weights(run, form, nodes, s)


_STEADY = {2: 2.5, 3: 5.0, 4: 10.0, 5: 20.0}
"""Sum of |weights| over |sum of weights| up to which SA-Solver takes so many predictions.

Where steps are equal in log-SNR it is 2.4, 4.8 and 9.4 at most on the processes of the package.
Where they grow towards the data it passes 400 (50 steps, uniform in time), and multiplies the
noise of earlier predictions: the variance came out 640 times too wide.
"""


class SASolver(Adams):
    """SA-Solver: stochastic Adams predictor and corrector; the corrector costs no call.

    Where steps grow so fast that the weights would multiply the noise of earlier predictions, the
    oldest are left out, which the published code does not do.

    Args:
        order: of the predictor, 1 to 4.
        corrector: predictions that the corrector takes, `order` or one more; 0 for no corrector;
            one more if omitted.
        tau: noise level in [0, 5], or a function of sigma/alpha, read at the start of each step.

    Raises:
        ArgumentError: another order, corrector or tau.

    Source:
        Xue et al. 2023 (2309.05019), eq. 14 and 17, algorithm 1.
    """

    source = "Xue et al. 2023 (2309.05019), algorithm 1"

    def __init__(
        self,
        order: int = 3,
        corrector: int | None = None,
        tau: float | Callable[[float], float] = 1.0,
    ) -> None:
        order = whole_number("order", order, most=4)
        self.tau = tau if callable(tau) else None
        self.stochastic = callable(tau) or check_eta(tau, "tau") > 0
        first = data_form(1.0 if callable(tau) else tau)
        slopes = order + 1 if corrector is None else corrector or None
        super().__init__(order, first, "log_snr", slopes, start="graded")
        self.order = min(order, 2)
        suffix = "(tau(k))" if callable(tau) else "" if tau == 1 else f"(tau={tau:g})"
        self.name = ("sa_solver" if order == 3 else f"sa_solver_{order}") + suffix

    def weights(
        self, run: Run, form: Form, nodes: Sequence[float], t: float, s: float
    ) -> list[float]:
        weights = super().weights(run, form, nodes, t, s)
        steady = _STEADY.get(len(nodes))
        if steady is None or not sum(map(abs, weights)) > steady * abs(sum(weights)):
            return weights
        return [0.0, *self.weights(run, form, nodes[1:], t, s)]

    def form_at(self, run: Run, t: float) -> Form:
        if self.tau is None:
            return self.form
        return data_form(check_eta(self.tau(math.exp(-run.log_snr_half(t))), "tau"))


class ERSDE(Adams):
    """ER-SDE solvers: a noise scale phi(k) of its own, k = sigma/alpha, and x0 as polynomial in k.

        y_s = phi_s/phi_t y_t + phi_s sum_j w_j x0_j + sqrt(k_s^2 - (k_t phi_s/phi_t)^2) z,

    y = x/alpha and phi(k) = k (exp(k^0.3) + 10), the authors' choice. The polynomial is the one
    through the last predictions; the published third order has backward differences instead.

    Args:
        order: 1, 2 or 3 predictions.

    Raises:
        ArgumentError: another order.

    Source:
        Cui et al. 2023 (2309.06169), algorithms 1 to 3, eq. 17 and appendix A.
    """

    source = "Cui et al. 2023 (2309.06169), algorithms 1 to 3"
    stochastic = True

    def __init__(self, order: int = 3) -> None:
        order = whole_number("order", order, most=3)
        form = phi_form(_excess, _excess_rate)
        super().__init__(order, form, "sigma", start="graded")
        self.name = "er_sde" if order == 3 else f"er_sde_{order}"


def _excess(lam: float) -> float:
    power = math.exp(-0.3 * lam)
    return power + math.log1p(10 * math.exp(-power))


def _excess_rate(lam: float) -> float:
    power = math.exp(-0.3 * lam)
    return -0.3 * power / (1 + 10 * math.exp(-power))


class GDDIM(Adams):
    """gDDIM for a scalar process: exact for data at one point, at any noise level.

        x_s = alpha_s x0 + sigma_s (exp(-eta^2 h) eps + sqrt(1 - exp(-2 eta^2 h)) z).

    Args:
        eta: noise level (lambda of the paper), in (0, 5]; with 0 it would be DDIM.

    Raises:
        ArgumentError: another eta.

    Source:
        Zhang et al. 2022 (2206.05564), theorem 1 and eq. 24 for a scalar process.
    """

    source = "Zhang et al. 2022 (2206.05564), theorem 1"
    stochastic = True

    def __init__(self, eta: float = 1.0) -> None:
        real_number("eta", eta, above=0)
        super().__init__(1, data_form(eta), "log_snr")
        self.name = "gddim" if eta == 1 else f"gddim(eta={eta:g})"
