"""Forms: changes of variables in which the model's prediction is the whole drift.

With x = scale y, k = sigma/alpha, lam = -log k and r = sqrt(alpha^2 + sigma^2), every member of

    dx = [f - (1 + eta^2)/2 g^2 score] dt + eta g dw

is dy = (a x + b m) dtau + dN, where N has independent increments and no memory:

    form   m       scale      tau       a, b          std of N between t and s
    eps    eps     alpha      k         0, 1 + eta^2  eta sqrt(k_t^2 - k_s^2)
    x0     x0      alpha phi  1/phi     0, 1          sqrt((k_s/phi_s)^2 - (k_t/phi_t)^2)
    v      v       r          atan(k)   0, 1/r        0
    flow   dx/dt   1          t         0, 1          0
    scaled x0      R          sigma/R   *             0

    R = c alpha + sigma, * 1/sigma, -(alpha/sigma + 1/c): the slope is eps - x0/c.

phi = k^(1 + eta^2) in the x0 form; any phi(k) for which k/phi does not grow with k gives a process
with the same marginals. Without noise the forms are Song et al. 2020 (2010.02502), eq. 14; Lu et
al. 2022 (2211.01095), eq. 8; Salimans and Ho 2022 (2202.00512), appendix D; Song et al. 2021
(2011.13456), eq. 13. With noise: Lu et al. 2022, section 5, and Cui et al. 2023 (2309.06169),
proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scoresolve.errors import ArgumentError, UnknownNameError
from scoresolve.plans import Linear, Run

__all__ = ["FORMS", "Form", "check_eta", "data_form", "get_form", "noise_form", "scaled_form"]


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
        ends_at_data: whether tau and the scale are finite at sigma = 0.
    """

    prediction: str
    scale: Callable[[Run, float], float]
    clock: Callable[[Run, float], float]
    time: Callable[[Run, float], float]
    mix: Callable[[Run, float], tuple[float, float]] = _prediction_alone
    clock_rate: Callable[[float], float] | None = None
    std: Callable[[Run, float, float], float] = _zero
    ends_at_data: bool = True

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


def check_eta(eta: float) -> float:
    """A noise level as a float.

    Raises:
        ArgumentError: it is negative or not finite.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise ArgumentError(f"eta = {eta}: the noise level must be a finite number >= 0")
    return float(eta)


def noise_form(eta: float = 0.0) -> Form:
    """The eps form with noise level eta >= 0."""
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
    )


def data_form(
    eta: float = 0.0,
    excess: Callable[[float], float] | None = None,
    excess_rate: Callable[[float], float] | None = None,
) -> Form:
    """The x0 form with noise level eta >= 0, or with a function phi of one's own.

    Args:
        eta: phi = k^(1 + eta^2).
        excess: log(phi/k) as a function of lam = -log k, instead of `eta`; it falls with lam.
        excess_rate: its derivative.
    """
    square = check_eta(eta) ** 2
    over = excess or (lambda lam: -square * lam if square else 0.0)
    over_rate = excess_rate or (lambda lam: -square)

    def std(run: Run, t: float, s: float) -> float:
        before, after = (-over(run.log_snr_half(time)) for time in (t, s))
        return math.exp(after) * math.sqrt(-math.expm1(2 * (before - after)))

    return Form(
        "x0",
        scale=lambda run, t: run.sigma(t) * math.exp(over(run.log_snr_half(t))),
        clock=lambda run, t: math.exp(run.log_snr_half(t) - over(run.log_snr_half(t))),
        time=lambda run, tau: run.time(math.log(tau) / (1 + square)),
        clock_rate=lambda lam: (1 - over_rate(lam)) * math.exp(lam - over(lam)),
        std=std if square or excess else _zero,
        ends_at_data=False,
    )


def scaled_form(c: float = 0.5) -> Form:
    """The velocity scaled to data of standard deviation c > 0.

    With x/alpha = (c + k) y and tau = k/(c + k) in [0, 1], dy/dtau = eps - x0/c.
    """
    if not 0 < c < math.inf:
        raise ArgumentError(f"c = {c}: the scale of the data is a positive number")

    def scale(run: Run, t: float) -> float:
        return c * run.alpha(t) + run.sigma(t)

    return Form(
        "x0",
        scale=scale,
        clock=lambda run, t: run.sigma(t) / scale(run, t),
        time=lambda run, tau: run.time(math.log((1 - tau) / (c * tau))),
        mix=lambda run, t: (1 / run.sigma(t), -run.alpha(t) / run.sigma(t) - 1 / c),
    )


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
    if name not in FORMS:
        raise UnknownNameError("form", name, FORMS)
    return FORMS[name]
