"""Exponential Runge-Kutta: nodes spread in half the log-SNR, weights exact for polynomials in it.

With lam_i = lam_t + r_i h and y, k, tau, N of a form (`scoresolve.solvers.forms`),

    y_i = y_t + int_{tau_t}^{tau_i} P_i dtau + N_i,

where P_i is the polynomial in lam through the slopes of some earlier stages. N_i is one path: its
increments between neighbouring stages are independent.
"""

from __future__ import annotations

import math

from scoresolve.errors import GridError, real_number, whole_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.adams import slope_weights
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import Form, data_form, exponential_form, noise_form

__all__ = [
    "RES2S",
    "RES3S",
    "SEEDS",
    "DPMSolver",
    "DPMSolverFast",
    "DPMSolverPPS",
    "ExponentialRungeKutta",
    "SDEDPMSolverPPS",
]

Scheme = tuple[tuple[float, tuple[int, ...]], ...]
"""For each stage but the first: where it ends, and the stages its polynomial goes through."""

MIDPOINT: Scheme = ((1 / 2, (0,)), (1.0, (1,)))
TWO: Scheme = ((1 / 2, (0,)), (1.0, (0, 1)))
THREE: Scheme = ((1 / 3, (0,)), (2 / 3, (0, 1)), (1.0, (0, 2)))
EXPONENTIAL: dict[int, Scheme] = {1: ((1.0, (0,)),), 2: MIDPOINT, 3: THREE}


class ExponentialRungeKutta(Solver):
    """One step of a `Scheme` in a form; its subclasses are the published methods."""

    jumps_at_noise, jumps_at_data = True, True

    def __init__(self, scheme: Scheme, form: Form) -> None:
        self.scheme, self.form, self.predicts = scheme, form, form.prediction
        self.grid = "log_snr" if form.singular_at_data else "flow"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form, start = self.form, run.log_snr_half(t)
        h = run.log_snr_half(s) - start
        y = stage = x / form.scale(run, t)
        times, slopes, noise = [t], [form.slope(run, y, t)], 0.0 * x
        for r, through in self.scheme:
            end = s if r == 1 else run.time(start + r * h)
            nodes = [times[i] for i in through]
            increment = form.noise(run, times[-1], end)
            noise = noise if increment is None else noise + increment
            weights = slope_weights(form, "log_snr", run, nodes, t, end)
            stage = y + noise
            for weight, i in zip(weights, through, strict=True):
                stage = stage + weight * slopes[i]
            if r < 1:
                times.append(end)
                slopes.append(form.slope(run, stage, end))
        return form.scale(run, s) * stage


class DPMSolver(ExponentialRungeKutta):
    """DPM-Solver, singlestep: order 2 with its node at h/2, order 3 at h/3 and 2h/3, on eps.

    Order 1 is DDIM, order 2 the DPM2 of Karras et al.: the midpoint in log(sigma/alpha).

    Args:
        order: 1, 2 or 3.

    Raises:
        ArgumentError: another order.

    Source:
        Lu et al. 2022 (2206.00927), algorithms 1 and 2.
    """

    source = "Lu et al. 2022 (2206.00927), algorithms 1 and 2"

    def __init__(self, order: int = 2) -> None:
        super().__init__(_scheme(order), noise_form())
        self.order, self.name = order, f"dpm_solver_{order}"


class DPMSolverFast(DPMSolver):
    """DPM-Solver-fast: steps of order 3, and the last ones of order 2 so that the calls come out.

    The published plan ends on a full step of order 1 when calls = 1 mod 3, which spoils the
    order; two steps of order 2 cost the same calls.

    Args:
        nfe: calls to make, >= 2, on a grid of the steps that `orders` tells; `sample(nfe=...)`
            sees to both. If omitted, the last step of any grid is of order 2 (3n - 1 calls).

    Raises:
        ArgumentError: `nfe` is not a whole number of at least 2.
        GridError: on tracing, a grid with another number of steps.

    Source:
        Lu et al. 2022 (2206.00927), section 3.4, with another end.
    """

    source = "Lu et al. 2022 (2206.00927), section 3.4"

    def __init__(self, nfe: int | None = None) -> None:
        super().__init__(3)
        self.name = "dpm_fast"
        self.nfe = None if nfe is None else whole_number("nfe", nfe, least=2)
        self.second = DPMSolver(2)

    def budgeted(self, nfe: int) -> Solver:
        return self if nfe < 2 else DPMSolverFast(nfe)

    def steps_for_budget(self) -> int | None:
        return None if self.nfe is None else len(self.orders(0))

    def orders(self, steps: int) -> tuple[int, ...]:
        """Order of each step; `steps` counts if there is no budget."""
        if self.nfe is None:
            return (3,) * (steps - 1) + (2,)
        twos = -self.nfe % 3
        return (3,) * ((self.nfe - 2 * twos) // 3) + (2,) * twos

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        orders = self.orders(len(run.times) - 1)
        if len(orders) != len(run.times) - 1:
            raise GridError(
                f"{self.nfe} calls are {len(orders)} steps of dpm_fast, and the grid has "
                f"{len(run.times) - 1}: give steps={len(orders)}"
            )
        if orders[run.index] == 2:
            return self.second.step(x, t, s, run)
        return super().step(x, t, s, run)


class DPMSolverPPS(ExponentialRungeKutta):
    """DPM-Solver++, singlestep (2S, 3S): DPM-Solver on x0.

    Args:
        order: 1, 2 or 3.

    Raises:
        ArgumentError: another order.

    Source:
        Lu et al. 2022 (2211.01095), algorithm 1 and appendix B.
    """

    source = "Lu et al. 2022 (2211.01095), algorithm 1"

    def __init__(self, order: int = 2) -> None:
        super().__init__(_scheme(order), data_form())
        self.order, self.name = order, f"dpmpp_{order}s"


class SDEDPMSolverPPS(ExponentialRungeKutta):
    """DPM-Solver++ 2S on the reverse SDE, its two noises increments of one path.

    Independent noises in the two halves, as they are often drawn, reduce the order to 1.

    Args:
        eta: noise level, in (0, 5]; 1 is the reverse SDE.

    Raises:
        ArgumentError: another eta.

    Source:
        Lu et al. 2022 (2211.01095), section 5, with the node of algorithm 1.
    """

    source = "Lu et al. 2022 (2211.01095), section 5 and algorithm 1"
    order, stochastic = 2, True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(MIDPOINT, data_form(real_number("eta", eta, above=0)))
        self.name = "dpmpp_sde" if eta == 1 else f"dpmpp_sde(eta={eta:g})"


class SEEDS(ExponentialRungeKutta):
    """SEEDS-1, 2 and 3: exponential Runge-Kutta for the reverse SDE.

    On x0, with nodes at h/2, or h/3 and 2h/3, these are ComfyUI's `seeds_2` and `seeds_3`; one
    stage is DDPM, two are DPM-Solver++ 2S on the SDE. On eps, the form of the paper's algorithms,
    a step adds noise of the level it leaves, so that a coarse grid multiplies the variance.

    Args:
        stages: 1, 2 or 3.
        form: "x0" or "eps".

    Raises:
        ArgumentError: another number of stages, or another form.

    Source:
        Gonzalez et al. 2023 (2305.14267), algorithms 1 to 3.
    """

    source = "Gonzalez et al. 2023 (2305.14267), algorithms 1 to 3"
    stochastic = True

    def __init__(self, stages: int = 2, form: str = "x0") -> None:
        super().__init__(_scheme(stages), exponential_form(form, eta=1.0))
        self.order, self.grid = min(stages, 2), "log_snr"
        self.name = f"seeds_{stages}" + ("" if form == "x0" else f"_{form}")


class RES2S(ExponentialRungeKutta):
    """Refined exponential solver of two stages, at h/2, with both order conditions, on x0.

    Source:
        Zhang et al. 2023 (2308.02157), table 2; Hochbruck and Ostermann 2005, eq. 5.3.
    """

    source = "Zhang et al. 2023 (2308.02157), table 2"
    name, order = "res_2s", 2

    def __init__(self) -> None:
        super().__init__(TWO, data_form())


class RES3S(Solver):
    """Refined exponential solver of three stages, at h/2 and h, with all order conditions, on x0.

        a_32 = 4 c_2 phi_2(-c_2 h) + 2 phi_2(-h),   slope = (4 (m_2 - m_1) + (m_3 - m_1))/3,
        x_s = exp(-h) alpha_s/alpha_t x_t + alpha_s h (phi_1 m_1 + phi_2 slope).

    Source:
        Hochbruck and Ostermann 2005, eq. 5.9 with c_2 = 1/2, c_3 = 1, gamma = 4; Zhang et al.
        2023 (2308.02157), section 3.2.
    """

    source = "Zhang et al. 2023 (2308.02157), section 3.2"
    name, predicts, order, grid = "res_3s", "x0", 3, "log_snr"
    jumps_at_noise, jumps_at_data = True, True

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form = data_form()
        middle = run.time((run.log_snr_half(t) + run.log_snr_half(s)) / 2)

        def integrals(end: float) -> tuple[float, float]:
            """Over [t, end], of 1 and of the line that is 0 at t and 1 at the middle."""
            first, second = slope_weights(form, "log_snr", run, (t, middle), t, end)
            return first + second, second

        y = x / form.scale(run, t)
        m_1 = form.slope(run, y, t)
        (whole_2, line_2), (whole_3, line_3) = integrals(middle), integrals(s)
        m_2 = form.slope(run, y + whole_2 * m_1, middle)
        a_32 = 4 * line_2 * math.exp(run.log_snr_half(s) - run.log_snr_half(middle)) + line_3
        m_3 = form.slope(run, y + whole_3 * m_1 + a_32 * (m_2 - m_1), s)
        slope = (4 * (m_2 - m_1) + (m_3 - m_1)) / 3
        return form.scale(run, s) * (y + whole_3 * m_1 + line_3 / 2 * slope)


def _scheme(order: int) -> Scheme:
    return EXPONENTIAL[whole_number("order", order, most=3)]
