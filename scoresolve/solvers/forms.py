"""The probability flow as dy/dtau = rate * m, for each prediction m the model may give.

With x = scale y, k = sigma/alpha and r = sqrt(alpha^2 + sigma^2):

    form   m               scale   tau        rate     source
    eps    eps             alpha   k          1        Song et al. 2020 (2010.02502), eq. 14
    x0     x0              sigma   1/k        1        Lu et al. 2022 (2211.01095), eq. 8
    v      v               r       atan(k)    1/r      Salimans and Ho 2022 (2202.00512), app. D
    flow   dx/dt           1       t          1        Song et al. 2021 (2011.13456), eq. 13
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scoresolve.errors import UnknownNameError
from scoresolve.plans import Linear, Run

__all__ = ["FORMS", "Form", "get_form"]


@dataclass(frozen=True)
class Form:
    """A change of variables that turns the probability flow into dy/dtau = rate * m.

    Attributes:
        prediction: the prediction m.
        scale: x / y at a time.
        clock: tau at a time.
        time: inverse of `clock`.
        rate: factor of m at a time.
    """

    prediction: str
    scale: Callable[[Run, float], float]
    clock: Callable[[Run, float], float]
    time: Callable[[Run, float], float]
    rate: Callable[[Run, float], float] = lambda run, t: 1.0

    def slope(self, run: Run, y: Linear, t: float) -> Linear:
        """dy/dtau at (y, t): one network call."""
        return self.rate(run, t) * run.predict(self.scale(run, t) * y, t, self.prediction)


def _radius(run: Run, t: float) -> float:
    return math.hypot(run.alpha(t), run.sigma(t))


def _log_tan(angle: float) -> float:
    return math.log(math.tan(angle)) if angle > 0 else -math.inf


FORMS = {
    "eps": Form(
        "eps",
        scale=lambda run, t: run.alpha(t),
        clock=lambda run, t: math.exp(-run.log_snr_half(t)),
        time=lambda run, tau: run.time(-math.log(tau)),
    ),
    "x0": Form(
        "x0",
        scale=lambda run, t: run.sigma(t),
        clock=lambda run, t: math.exp(run.log_snr_half(t)),
        time=lambda run, tau: run.time(math.log(tau)),
    ),
    "v": Form(
        "v",
        scale=_radius,
        clock=lambda run, t: math.atan2(run.sigma(t), run.alpha(t)),
        time=lambda run, tau: run.time(-_log_tan(tau)),
        rate=lambda run, t: 1 / _radius(run, t),
    ),
    "flow": Form(
        "flow",
        scale=lambda run, t: 1.0,
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
