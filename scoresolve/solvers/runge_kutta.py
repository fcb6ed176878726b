"""Explicit Runge-Kutta methods on the probability flow, in any of its forms.

With tau the form's clock and h = tau_s - tau_t,

    k_i = slope(y + h sum_j a_ij k_j, tau_t + c_i h),    y_s = y_t + h sum_i b_i k_i.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoresolve.errors import known_name
from scoresolve.plans import Linear, Run
from scoresolve.sde import GaussianSDE
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import Form, get_form

__all__ = ["EULER", "HEUN", "KUTTA3", "MIDPOINT", "RK4", "RungeKutta", "Tableau", "advance"]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method: nodes c, rows of a, weights b, order."""

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    source: str


EULER = Tableau("euler", (0.0,), ((),), (1.0,), 1, "Euler 1768")
MIDPOINT = Tableau(
    "midpoint", (0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2, "Runge 1895; Hairer et al. 1993, II.1"
)
HEUN = Tableau(
    "heun", (0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2, "Heun 1900; in eps form Karras et al. 2022"
)
KUTTA3 = Tableau(
    "rk3",
    (0.0, 0.5, 1.0),
    ((), (0.5,), (-1.0, 2.0)),
    (1 / 6, 2 / 3, 1 / 6),
    3,
    "Kutta 1901; Hairer et al. 1993, II.1",
)
RK4 = Tableau(
    "rk4",
    (0.0, 0.5, 0.5, 1.0),
    ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    4,
    "Kutta 1901; Hairer et al. 1993, II.1",
)
_TABLEAUS = {tableau.name: tableau for tableau in (EULER, MIDPOINT, HEUN, KUTTA3, RK4)}


def advance(
    tableau: Tableau, form: Form, y: Linear, t: float, s: float, run: Run
) -> tuple[Linear, Linear]:
    """One step of the method on y from t to s; the new y, and the slope at t."""
    start, h = form.clock(run, t), form.clock(run, s) - form.clock(run, t)
    slopes: list[Linear] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        stage = sum((h * a * k for a, k in zip(row, slopes, strict=True) if a), start=y)
        time = t if c == 0 else s if c == 1 else form.time(run, start + c * h)
        slopes.append(form.slope(run, stage, time))
    result = sum((h * b * k for b, k in zip(tableau.b, slopes, strict=True) if b), start=y)
    return result, slopes[0]


class RungeKutta(Solver):
    """An explicit Runge-Kutta method on the probability flow.

    A method with a stage at the end of the step jumps to the predicted x0 where sigma ends at 0: no
    network is called there, and an N-step grid costs "heun" 2N - 1 calls.

    Args:
        method: "euler", "midpoint", "heun", "rk3" or "rk4".
        form: "eps", "x0", "v" or "flow"; see `scoresolve.solvers.forms`.

    Raises:
        UnknownNameError: no such method or form.

    Source:
        Hairer, Norsett and Wanner 1993, II.1; in eps form "heun" is that of Karras et al. 2022
        (2206.00364), algorithm 1.
    """

    def __init__(self, method: str = "heun", form: str = "eps") -> None:
        self.tableau = _TABLEAUS[known_name("Runge-Kutta method", method, _TABLEAUS)]
        self.form = get_form(form)
        self.name = method if form == "eps" else f"{method}_{form}"
        self.predicts, self.order = self.form.prediction, self.tableau.order
        self.source = self.tableau.source
        self.jumps_at_noise = self.form.singular_at_noise
        self.jumps_at_data = self.form.singular_at_data
        self.grid = {"eps": "karras", "x0": "log_snr"}.get(form, "flow")

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        if 1.0 in self.tableau.c and isinstance(run.sde, GaussianSDE) and run.sigma(s) == 0:
            return run.jump(x, t, s)
        y, _ = advance(self.tableau, self.form, x / self.form.scale(run, t), t, s, run)
        return self.form.scale(run, s) * y
