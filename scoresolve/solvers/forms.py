"""Forms: changes of variables in which the model's prediction is the whole drift.

With x = scale y, k = sigma/alpha, lam = -log k and r = sqrt(alpha^2 + sigma^2), every member of

    dx = [f - (1 + eta^2)/2 g^2 score] dt + eta g dw

is dy = rate m dtau + dN, where N has independent increments and no memory:

    form   m       scale      tau       rate        std of N between t and s
    eps    eps     alpha      k         1 + eta^2   eta sqrt(k_t^2 - k_s^2)
    x0     x0      alpha phi  1/phi     1           sqrt((k_s/phi_s)^2 - (k_t/phi_t)^2)
    v      v       r          atan(k)   1/r         0
    flow   dx/dt   1          t         1           0

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

__all__ = ["FORMS", "Form", "check_eta", "data_form", "get_form", "noise_form"]


def _zero(run: Run, t: float, s: float) -> float:
    return 0.0


def _one(run: Run, t: float) -> float:
    return 1.0


@dataclass(frozen=True)
class Form:
    """A change of variables that turns the flow into dy = rate * m dtau + dN.

    Attributes:
        prediction: the prediction m.
        scale: x / y at a time.
        clock: tau at a time.
        time: inverse of `clock`.
        rate: factor of m at a time.
        clock_rate: dtau/dlam as a function of lam; None where it is not needed.
        std: standard deviation of N between two times.
        ends_at_data: whether tau and the scale are finite at sigma = 0.
    """

    prediction: str
    scale: Callable[[Run, float], float]
    clock: Callable[[Run, float], float]
    time: Callable[[Run, float], float]
    rate: Callable[[Run, float], float] = _one
    clock_rate: Callable[[float], float] | None = None
    std: Callable[[Run, float, float], float] = _zero
    ends_at_data: bool = True

    def slope(self, run: Run, y: Linear, t: float) -> Linear:
        """rate * m at (y, t): one network call."""
        return self.rate(run, t) * run.predict(self.scale(run, t) * y, t, self.prediction)

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
        rate=lambda run, t: factor,
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
        rate=lambda run, t: 1 / _radius(run, t),
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
