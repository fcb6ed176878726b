"""Solvers of the reverse SDE and its family: one Gaussian transition a step, from t to s < t.

ancestral   x_s ~ q(x_s | x_t, x0 = prediction), with the noise scaled by eta
reverse     discretisations of dx = [f - (1 + eta^2)/2 g^2 score] dt + eta g dw
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scoresolve.errors import ArgumentError, real_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import check_eta

__all__ = ["DDIM", "DDPM", "EulerMaruyama", "FlowSDE", "ReverseDiffusion", "StochasticHeun"]


class DDIM(Solver):
    """DDIM: the predicted x0, and noise that is partly kept and partly fresh.

        x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z,
        c = eta sigma_s sqrt(1 - SNR_t / SNR_s).

    Args:
        eta: 0 is deterministic (Euler in eps form), 1 ancestral sampling (DDPM).

    Raises:
        ArgumentError: eta is negative or so large that c exceeds sigma_s (eta > 1).

    Source:
        Song et al. 2020 (2010.02502), eq. 12 and 16, with the general alpha and sigma.
    """

    predicts, order = "x0", 1
    source = "Song et al. 2020 (2010.02502), eq. 12 and 16"

    def __init__(self, eta: float = 0.0) -> None:
        self.eta = check_eta(eta)
        if eta > 1:
            raise ArgumentError(f"eta = {eta}: DDIM needs eta in [0, 1]")
        self.stochastic = eta > 0
        self.name = "ddim" if eta == 0 else f"ddim(eta={eta:g})"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        x0 = run.predict(x, t)
        eps = (x - run.alpha(t) * x0) / run.sigma(t)
        if not self.eta:
            return run.alpha(s) * x0 + run.sigma(s) * eps
        c = self.eta * run.sigma(s) * run.transition(s, t)[1] / run.sigma(t)
        snr_ratio = math.exp(2 * (run.log_snr_half(t) - run.log_snr_half(s)))
        kept = run.sigma(s) * math.sqrt(1 - self.eta**2 + self.eta**2 * snr_ratio)
        return run.alpha(s) * x0 + kept * eps + c * run.noise(t, s)


class DDPM(Solver):
    """Ancestral sampling: x_s = E[q(x_s | x_t, x0)] + std z at the predicted x0.

        mean = (SNR_t/SNR_s)(alpha_s/alpha_t) x_t + alpha_s (1 - SNR_t/SNR_s) x0.

    Args:
        variance: "posterior", sigma_s^2 (1 - SNR_t/SNR_s), right for data that is one point, or
            "forward", the variance b^2 of x_t | x_s, right for data that is N(0, I).

    Raises:
        ArgumentError: another variance.

    Source:
        Ho et al. 2020 (2006.11239), eq. 7 and section 3.2.
    """

    predicts, order, stochastic, jumps_at_data = "x0", 1, True, True
    source = "Ho et al. 2020 (2006.11239), eq. 7 and section 3.2"

    def __init__(self, variance: str = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ArgumentError(f"variance = {variance!r}: choose 'posterior' or 'forward'")
        self.variance = variance
        self.name = "ddpm" if variance == "posterior" else "ddpm_forward"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        x0 = run.predict(x, t)
        scale, forward_std = run.transition(s, t)
        shrink = run.sigma(s) / run.sigma(t)
        mean = scale * shrink**2 * x + run.alpha(s) * (forward_std / run.sigma(t)) ** 2 * x0
        std = forward_std * (shrink if self.variance == "posterior" else 1.0)
        return mean + std * run.noise(t, s)


class EulerMaruyama(Solver):
    """Euler-Maruyama on the marginal-preserving family, in time.

        x_s = x_t + (s - t) [f - (1 + eta^2)/2 g^2 score] + eta g sqrt(t - s) z.

    Args:
        eta: noise level in [0, 5]; 1 is the reverse SDE, 0 Euler on the probability flow.

    Raises:
        ArgumentError: another eta.

    Source:
        Song et al. 2021 (2011.13456), eq. 6; Zhang and Chen 2023 (2204.13902), eq. 6.
    """

    predicts, order, jumps_at_noise = "score", 1, True
    source = "Song et al. 2021 (2011.13456), eq. 6"

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = check_eta(eta)
        self.stochastic = eta > 0
        self.name = "euler_maruyama" if eta == 1 else f"euler_maruyama(eta={eta:g})"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        result = x + (s - t) * _reverse_drift(x, t, run, self.eta)
        if self.eta:
            result += self.eta * run.diffusion(t) * math.sqrt(abs(t - s)) * run.noise(t, s)
        return result


class StochasticHeun(Solver):
    """Heun's method on the marginal-preserving family: weak order 2, as its noise is additive.

        noise = eta sqrt((t - s) (g_t^2 + g_s^2)/2) z,   x' = x_t + (s - t) d(x_t, t) + noise,
        x_s = x_t + (s - t)/2 [d(x_t, t) + d(x', s)] + noise.

    Args:
        eta: noise level in [0, 5]; 1 is the reverse SDE, 0 Heun on the probability flow.

    Raises:
        ArgumentError: another eta.

    Source:
        Kloeden and Platen 1992, section 15.1 (simplified for additive noise).
    """

    predicts, order, grid = "score", 2, "karras"
    jumps_at_noise, jumps_at_data = True, True
    source = "Kloeden and Platen 1992, section 15.1"

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = check_eta(eta)
        self.stochastic = eta > 0
        self.name = "stochastic_heun" if eta == 1 else f"stochastic_heun(eta={eta:g})"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        h = s - t
        first = _reverse_drift(x, t, run, self.eta)
        noise = 0.0 * x
        if self.eta:
            mean_square = (run.diffusion(t) ** 2 + run.diffusion(s) ** 2) / 2
            noise = self.eta * math.sqrt(abs(h) * mean_square) * run.noise(t, s)
        second = _reverse_drift(x + h * first + noise, s, run, self.eta)
        return x + h / 2 * (first + second) + noise


def _reverse_drift(x: Linear, t: float, run: Run, eta: float) -> Linear:
    score = run.predict(x, t, "score")
    return run.drift(x, t) - (1 + eta**2) / 2 * run.diffusion(t) ** 2 * score


class ReverseDiffusion(Solver):
    """The reverse-diffusion predictor: the forward discretisation, run backwards.

    With the exact forward transition x_t = a x_s + b z,

        x_s = (2 - a) x_t + b^2 score + b z.

    The published discretisation takes b^2 = beta/N, which passes 1 at few steps and returns NaN;
    the exact transition agrees with it to first order and cannot.

    Source:
        Song et al. 2021 (2011.13456), appendix E, eq. 46.
    """

    name, predicts, order, stochastic = "reverse_diffusion", "score", 1, True
    jumps_at_data = True
    source = "Song et al. 2021 (2011.13456), eq. 46"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        a, b = run.transition(s, t)
        return (2 - a) * x + b**2 * run.predict(x, t) + b * run.noise(t, s)


class FlowSDE(Solver):
    """Euler-Maruyama on the marginal-preserving SDE of a flow model, with any noise level w(t).

        dx = [u - w^2/2 score] dt + w dw backward in time,   u = E[dx/dt | x],

    so that w = g is the reverse SDE and w = 0 the flow. The default is regular at both ends,

        w^2 = g^2 alpha^2/(alpha^2 + sigma^2),   which for the rectified flow is
        2 alpha sigma/(alpha^2 + sigma^2).

    Args:
        level: w as a function of time, finite and >= 0.

    Raises:
        ArgumentError: `level` is no function, or on tracing, it returns no such number.

    Source:
        Albergo et al. 2023 (2303.08797), corollary 18; Ma et al. 2024 (2401.08740), eq. 5.
    """

    name, predicts, order, stochastic = "flow_sde", "x0", 1, True
    source = "Albergo et al. 2023 (2303.08797), corollary 18"

    def __init__(self, level: Callable[[float], float] | None = None) -> None:
        if level is not None and not callable(level):
            raise ArgumentError(f"level = {level!r}: give a function of time")
        self.level = level
        if level is not None:
            self.name = "flow_sde(level)"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        alpha, sigma, (alpha_dot, sigma_dot) = run.alpha(t), run.sigma(t), run.rates(t)
        if self.level is None:
            w = math.sqrt(2 * alpha * sigma * (alpha * sigma_dot - sigma * alpha_dot))
            w /= math.hypot(alpha, sigma)
        else:
            w = real_number("level", self.level(t), least=0)
        x0 = run.predict(x, t)
        eps = (x - alpha * x0) / sigma
        drift = alpha_dot * x0 + sigma_dot * eps + w**2 / (2 * sigma) * eps
        return x + (s - t) * drift + w * math.sqrt(abs(t - s)) * run.noise(t, s)
