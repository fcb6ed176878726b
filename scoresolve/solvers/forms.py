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
from functools import partial

from scipy.optimize import brentq

from scoresolve.errors import ArgumentError, known_name, real_number
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
    eta = check_eta(eta)
    return Form(
        "eps",
        scale=_alpha,
        clock=_noise_ratio,
        time=_time_of_noise_ratio,
        mix=partial(_prediction_times, 1 + eta**2),
        clock_rate=_noise_ratio_rate,
        std=partial(_noise_ratio_std, eta) if eta else _zero,
        singular_at_noise=True,
    )


def _alpha(run: Run, t: float) -> float:
    return run.alpha(t)


def _noise_ratio(run: Run, t: float) -> float:
    return math.exp(-run.log_snr_half(t))


def _time_of_noise_ratio(run: Run, tau: float) -> float:
    return run.time(-math.log(tau))


def _noise_ratio_rate(lam: float) -> float:
    return -math.exp(-lam)


def _noise_ratio_std(eta: float, run: Run, t: float, s: float) -> float:
    k_t, gained = math.exp(-run.log_snr_half(t)), run.log_snr_half(s) - run.log_snr_half(t)
    return eta * k_t * math.sqrt(-math.expm1(-2 * gained))


def _prediction_times(factor: float, run: Run, t: float) -> tuple[float, float]:
    return 0.0, factor


def data_form(eta: float = 0.0) -> Form:
    """The x0 form with noise level eta in [0, 5]: phi = k^(1 + eta^2).

    Raises:
        ArgumentError: another eta.
    """
    square = check_eta(eta) ** 2
    if square == 0:
        return replace(phi_form(_nothing, _nothing), std=_zero, singular_at_noise=False)
    return phi_form(partial(_product, -square), partial(_first, -square))


def _nothing(lam: float) -> float:
    return 0.0


def _product(factor: float, lam: float) -> float:
    return factor * lam


def _first(value: float, lam: float) -> float:
    return value


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
    phi = _Phi(excess, excess_rate)
    return Form(
        "x0",
        scale=phi.scale,
        clock=phi.clock,
        time=phi.time,
        clock_rate=phi.clock_rate,
        std=phi.std,
        singular_at_noise=True,
        singular_at_data=True,
    )


@dataclass(frozen=True)
class _Phi:
    excess: Callable[[float], float]
    excess_rate: Callable[[float], float]

    def scale(self, run: Run, t: float) -> float:
        return run.sigma(t) * math.exp(self.excess(run.log_snr_half(t)))

    def clock(self, run: Run, t: float) -> float:
        return math.exp(run.log_snr_half(t) - self.excess(run.log_snr_half(t)))

    def time(self, run: Run, tau: float) -> float:
        goal = math.log(tau)
        lam = brentq(lambda lam: lam - self.excess(lam) - goal, -100.0, 100.0, xtol=1e-14)
        return run.time(lam)

    def clock_rate(self, lam: float) -> float:
        return (1 - self.excess_rate(lam)) * math.exp(lam - self.excess(lam))

    def std(self, run: Run, t: float, s: float) -> float:
        before, after = (-self.excess(run.log_snr_half(time)) for time in (t, s))
        return math.exp(after) * math.sqrt(-math.expm1(2 * (before - after)))


def scaled_form(c: float, b: float, rate_c: float, rate_b: float) -> Form:
    """The flow less its exact solution for data of standard deviation about c; see `scaled`.

    With Q(k; c, b) = k^2 + 2 b c k + c^2: y = x/(alpha sqrt(Q(k; c, b))) and
    dtau/dk = rate_c/Q(k; rate_c, rate_b). Regular at alpha = 0 and sigma = 0.

    Args:
        c, rate_c: levels of sigma/alpha, > 0.
        b, rate_b: bends, in [0, 1).

    Raises:
        ArgumentError: a number is out of its range.
    """
    levels = (real_number(name, v, above=0) for name, v in (("c", c), ("rate_c", rate_c)))
    bends = (real_number(name, v, least=0) for name, v in (("b", b), ("rate_b", rate_b)))
    (c, rate_c), (b, rate_b) = levels, bends
    if max(b, rate_b) >= 1:
        raise ArgumentError(f"b = {b}, rate_b = {rate_b}: give bends in [0, 1)")
    scaled = _Scaled(c, b, rate_c, rate_b)
    return Form("x0", scaled.size, scaled.clock, scaled.time, scaled.mix, scaled.clock_rate)


@dataclass(frozen=True)
class _Scaled:
    c: float
    b: float
    rate_c: float
    rate_b: float

    @property
    def width(self) -> float:
        return math.sqrt(1 - self.rate_b**2)

    @property
    def angle_0(self) -> float:
        return math.atan(self.rate_b / self.width)

    def size(self, run: Run, t: float) -> float:
        c, alpha, sigma = self.c, run.alpha(t), run.sigma(t)
        return math.sqrt(sigma**2 + 2 * self.b * c * alpha * sigma + (c * alpha) ** 2)

    def clock(self, run: Run, t: float) -> float:
        side, height, width = self.rate_c * run.alpha(t), run.sigma(t), self.width
        return (math.atan2(height + self.rate_b * side, width * side) - self.angle_0) / width

    def time(self, run: Run, tau: float) -> float:
        width = self.width
        k = self.rate_c * (width * math.tan(width * tau + self.angle_0) - self.rate_b)
        return run.time(-math.log(k))

    def mix(self, run: Run, t: float) -> tuple[float, float]:
        c, b, rate_c = self.c, self.b, self.rate_c
        alpha, sigma, r = run.alpha(t), run.sigma(t), self.size(run, t)
        q = sigma**2 + 2 * self.rate_b * rate_c * alpha * sigma + (rate_c * alpha) ** 2
        return c * (c * alpha + b * sigma) * q / (rate_c * sigma * r**3), -q / (rate_c * sigma * r)

    def clock_rate(self, lam: float) -> float:
        rate_c, k = self.rate_c, math.exp(-lam)
        return -rate_c * k / (rate_c**2 + 2 * self.rate_b * rate_c * k + k**2)


def _radius(run: Run, t: float) -> float:
    return math.hypot(run.alpha(t), run.sigma(t))


def _polar_angle(run: Run, t: float) -> float:
    return math.atan2(run.sigma(t), run.alpha(t))


def _time_of_angle(run: Run, tau: float) -> float:
    return run.time(-math.log(math.tan(tau)) if tau > 0 else math.inf)


def _over_radius(run: Run, t: float) -> tuple[float, float]:
    return 0.0, 1 / _radius(run, t)


def _itself(run: Run, t: float) -> float:
    return t


FORMS = {
    "eps": noise_form(),
    "x0": data_form(),
    "v": Form(
        "v",
        scale=_radius,
        clock=_polar_angle,
        time=_time_of_angle,
        mix=_over_radius,
    ),
    "flow": Form(
        "flow",
        scale=_one,
        clock=_itself,
        time=_itself,
    ),
}


def get_form(name: str) -> Form:
    """The form of the given name.

    Raises:
        UnknownNameError: `name` is not in `FORMS`.
    """
    return FORMS[known_name("form", name, FORMS)]
