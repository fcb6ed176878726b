"""Forms: changes of variables in which the model's prediction is the whole drift.

With x = scale y, k = sigma/alpha, lam = -log k and r = sqrt(alpha^2 + sigma^2), every member of

    dx = [f - (1 + eta^2)/2 g^2 score] dt + eta g dw

is dy = (a x + b m) dtau + dN, where N has independent increments and no memory:

    form   m       scale      tau       a, b          std of N between t and s
    eps    eps     alpha      k         0, 1 + eta^2  eta sqrt(k_t^2 - k_s^2)
    x0     x0      alpha phi  1/phi     0, 1          sqrt((k_s/phi_s)^2 - (k_t/phi_t)^2)
    v      v       r          atan(k)   0, 1/r        0
    flow   dx/dt   1          t         0, 1          0

phi = k^(1 + eta^2) in the x0 form; any phi(k) for which k/phi does not grow with k gives a process
with the same marginals. Without noise the forms are Song et al. 2020 (2010.02502), eq. 14; Lu et
al. 2022 (2211.01095), eq. 8; Salimans and Ho 2022 (2202.00512), appendix D; Song et al. 2021
(2011.13456), eq. 13. With noise: Lu et al. 2022, section 5, and Cui et al. 2023 (2309.06169),
proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from scipy.optimize import brentq

from scoresolve.errors import known_name, real_number
from scoresolve.plans import Linear, Run

__all__ = [
    "FORMS",
    "Form",
    "check_eta",
    "data_form",
    "exponential_form",
    "get_form",
    "noise_form",
    "phi_form",
    "scaled_form",
]


def _zero(run: Run, t: float, s: float) -> float:
    return 0.0


def _one(run: Run, t: float) -> float:
    return 1.0


def _prediction_alone(run: Run, t: float) -> tuple[float, float]:
    return 0.0, 1.0


@dataclass(frozen=True)
class Form:
    """A change of variables that turns the flow into dy = (a x + b m) dtau + dN.

    Attributes:
        prediction: the prediction m.
        scale: x / y at a time.
        clock: tau at a time.
        time: inverse of `clock`.
        mix: a and b at a time.
        clock_rate: dtau/dlam as a function of lam; None where it is not needed.
        std: standard deviation of N between two times.
        singular_at_noise, singular_at_data: whether tau or the scale is not finite at alpha = 0
            and at sigma = 0.
    """

    prediction: str
    scale: Callable[[Run, float], float]
    clock: Callable[[Run, float], float]
    time: Callable[[Run, float], float]
    mix: Callable[[Run, float], tuple[float, float]] = _prediction_alone
    clock_rate: Callable[[float], float] | None = None
    std: Callable[[Run, float, float], float] = _zero
    singular_at_noise: bool = False
    singular_at_data: bool = False

    def slope(self, run: Run, y: Linear, t: float) -> Linear:
        """a x + b m at (y, t): one network call."""
        x = self.scale(run, t) * y
        return self.slope_from(run, t, x, run.predict(x, t, self.prediction))

    def slope_from(self, run: Run, t: float, x: Linear, m: Linear) -> Linear:
        """a x + b m of a prediction m made at (x, t)."""
        a, b = self.mix(run, t)
        return a * x + b * m if a else b * m

    def noise(self, run: Run, t: float, s: float) -> Linear | None:
        """The increment of N from t to s; None in a form without noise."""
        std = self.std(run, t, s)
        return std * run.noise(t, s) if std else None


def check_eta(eta: object, name: str = "eta") -> float:
    """A noise level from 0 to 5 as a float; beyond, exp(eta^2 lam) has no digits left.

    Raises:
        ArgumentError: it is negative, above 5 or not a number.
    """
    return real_number(name, eta, least=0, most=5)


def noise_form(eta: float = 0.0) -> Form:
    """The eps form with noise level eta in [0, 5].

    Raises:
        ArgumentError: another eta.
    """
    factor = 1 + check_eta(eta) ** 2

    def std(run: Run, t: float, s: float) -> float:
        k_t, gained = math.exp(-run.log_snr_half(t)), run.log_snr_half(s) - run.log_snr_half(t)
        return eta * k_t * math.sqrt(-math.expm1(-2 * gained))

    return Form(
        "eps",
        scale=lambda run, t: run.alpha(t),
        clock=lambda run, t: math.exp(-run.log_snr_half(t)),
        time=lambda run, tau: run.time(-math.log(tau)),
        mix=lambda run, t: (0.0, factor),
        clock_rate=lambda lam: -math.exp(-lam),
        std=std if eta else _zero,
        singular_at_noise=True,
    )


def data_form(eta: float = 0.0) -> Form:
    """The x0 form with noise level eta in [0, 5]: phi = k^(1 + eta^2).

    Raises:
        ArgumentError: another eta.
    """
    square = check_eta(eta) ** 2
    if square == 0:
        return replace(
            phi_form(lambda lam: 0.0, lambda lam: 0.0), std=_zero, singular_at_noise=False
        )
    return phi_form(lambda lam: -square * lam, lambda lam: -square)


def exponential_form(name: str, eta: float = 0.0) -> Form:
    """The form of an exponential integrator, "x0" or "eps", with noise level eta in [0, 5].

    Raises:
        UnknownNameError: another name.
        ArgumentError: another eta.
    """
    name = known_name("form", name, ("x0", "eps"))
    return data_form(eta) if name == "x0" else noise_form(eta)


def phi_form(excess: Callable[[float], float], excess_rate: Callable[[float], float]) -> Form:
    """The x0 form with a noise function phi(k) of one's own.

    Args:
        excess: log(phi/k) as a function of lam = -log k, not rising with lam.
        excess_rate: its derivative.
    """

    def std(run: Run, t: float, s: float) -> float:
        before, after = (-excess(run.log_snr_half(time)) for time in (t, s))
        return math.exp(after) * math.sqrt(-math.expm1(2 * (before - after)))

    def time(run: Run, tau: float) -> float:
        lam = brentq(lambda lam: lam - excess(lam) - math.log(tau), -100.0, 100.0, xtol=1e-14)
        return run.time(lam)

    return Form(
        "x0",
        scale=lambda run, t: run.sigma(t) * math.exp(excess(run.log_snr_half(t))),
        clock=lambda run, t: math.exp(run.log_snr_half(t) - excess(run.log_snr_half(t))),
        time=time,
        clock_rate=lambda lam: (1 - excess_rate(lam)) * math.exp(lam - excess(lam)),
        std=std,
        singular_at_noise=True,
        singular_at_data=True,
    )


def scaled_form(c: float, b: float, rate_c: float, rate_b: float) -> Form:
    """The flow less its exact solution for data of standard deviation about c; see `scaled`.

    With Q(k; c, b) = k^2 + 2 b c k + c^2: y = x/(alpha sqrt(Q(k; c, b))) and
    dtau/dk = rate_c/Q(k; rate_c, rate_b). Regular at alpha = 0 and sigma = 0.

    Args:
        c, rate_c: levels of sigma/alpha, > 0.
        b, rate_b: bends, in [0, 1).
    """
    width = math.sqrt(1 - rate_b**2)
    angle_0 = math.atan(rate_b / width)

    def size(run: Run, t: float) -> float:
        alpha, sigma = run.alpha(t), run.sigma(t)
        return math.sqrt(sigma**2 + 2 * b * c * alpha * sigma + (c * alpha) ** 2)

    def clock(run: Run, t: float) -> float:
        side, height = rate_c * run.alpha(t), run.sigma(t)
        return (math.atan2(height + rate_b * side, width * side) - angle_0) / width

    def time(run: Run, tau: float) -> float:
        return run.time(-math.log(rate_c * (width * math.tan(width * tau + angle_0) - rate_b)))

    def mix(run: Run, t: float) -> tuple[float, float]:
        alpha, sigma, r = run.alpha(t), run.sigma(t), size(run, t)
        q = sigma**2 + 2 * rate_b * rate_c * alpha * sigma + (rate_c * alpha) ** 2
        return c * (c * alpha + b * sigma) * q / (rate_c * sigma * r**3), -q / (rate_c * sigma * r)

    def clock_rate(lam: float) -> float:
        k = math.exp(-lam)
        return -rate_c * k / (rate_c**2 + 2 * rate_b * rate_c * k + k**2)

    return Form("x0", size, clock, time, mix, clock_rate)


def _radius(run: Run, t: float) -> float:
    return math.hypot(run.alpha(t), run.sigma(t))


def _log_tan(angle: float) -> float:
    return math.log(math.tan(angle)) if angle > 0 else -math.inf


FORMS = {
    "eps": noise_form(),
    "x0": data_form(),
    "v": Form(
        "v",
        scale=_radius,
        clock=lambda run, t: math.atan2(run.sigma(t), run.alpha(t)),
        time=lambda run, tau: run.time(-_log_tan(tau)),
        mix=lambda run, t: (0.0, 1 / _radius(run, t)),
    ),
    "flow": Form(
        "flow",
        scale=_one,
        clock=lambda run, t: t,
        time=lambda run, tau: tau,
    ),
}


def get_form(name: str) -> Form:
    """The form of the given name.

    Raises:
        UnknownNameError: `name` is not in `FORMS`.
    """
    return FORMS[known_name("form", name, FORMS)]
