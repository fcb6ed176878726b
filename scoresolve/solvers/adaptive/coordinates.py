"""What an adaptive solver integrates, and over what, with k = sigma/alpha and x' = x/alpha.

"time" is for any process, the others are for Gaussian ones:

    time      y = x    over u = t,           dy/du = drift(x, t)
    scaled    y = x/S  over u = atan(k/k1),  dy/du = (p eps - q x0) Q1/(k1 S^3)
    log_snr   y = x'   over u = log k,       dy/du = k eps

"scaled" has the variables of the default solver. From dx'/dk = eps follow

    S^2 = sigma^2 + 2 b c alpha sigma + (c alpha)^2,   Q1 = sigma^2 + (k1 alpha)^2,
    p = c (c alpha + b sigma),   q = sigma + b c alpha,

which is regular at alpha = 0 and at sigma = 0. y is measured in units of the data's own size:
`unit` y is x over sqrt(sigma^2 + (scale alpha)^2).
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.models import conversion
from scoresolve.precision import host
from scoresolve.sde import GaussianSDE, SchedulePoint
from scoresolve.solvers.adaptive.drift import BoundedDrift, Interval
from scoresolve.solvers.adaptive.points import Point, hermite
from scoresolve.solvers.adaptive.rows import Numbers, lift, padded
from scoresolve.solvers.integrator import GaussianFlow, RowDrift
from scoresolve.solvers.scaled import TURN, B, C

__all__ = ["COORDINATES", "Coordinates", "check_ends", "check_velocity", "coordinates_for"]


class Coordinates(ABC):
    """One problem in its coordinates; times and u are float64 numbers on the host.

    Attributes:
        start, end: the interval of u.
        drift: the bounded right-hand side; `bare` ones have none.
        inside: its interval of times.
    """

    start: float
    end: float
    drift: BoundedDrift
    inside: Interval

    def bare(self) -> Coordinates:
        """The coordinates without the right-hand side, and so without the model behind it."""
        way = copy(self)
        del way.drift
        return way

    @property
    def sign(self) -> float:
        return math.copysign(1.0, self.end - self.start)

    @property
    def length(self) -> float:
        return abs(self.end - self.start)

    @abstractmethod
    def time(self, u: Numbers) -> Numbers:
        """t at u [b]."""

    @abstractmethod
    def clock(self, t: float) -> float:
        """u at time t."""

    @abstractmethod
    def slope(self, y: Tensor, u: Numbers, place: Numbers) -> Tensor:
        """dy/du at states [b, *event], for one call."""

    def state(self, y: Tensor, u: Numbers) -> Tensor:
        """x of y."""
        return y

    def start_of(self, x: Tensor) -> Tensor:
        """y of x at the start."""
        return x

    def unit(self, u: Numbers) -> Numbers | None:
        """The factor on y that makes errors comparable, [b]; None for 1."""
        return None

    def between(self, now: Point, new: Point, before: Point, u: Numbers) -> Tensor:
        """y at u [b] within the step from `now` to `new`, given the point `before` it.

        The polynomial of degree 5 through the three, or on a first step, which has no point before,
        of degree 3. It is as good as the steps up to order 5: under the long ones of dop853 less.
        """
        return hermite((now, new, before), u)

    @property
    def least_step(self) -> float:
        """A step of a few ulp, below which the stages' times are no longer distinct."""
        return 16 * sys.float_info.epsilon * (abs(self.end) + self.length)


class Time(Coordinates):
    def __init__(self, drift: BoundedDrift, t_start: float, t_end: float) -> None:
        self.drift, self.inside = drift, drift.inside
        self.start, self.end = t_start, t_end

    def time(self, u: Numbers) -> Numbers:
        return u

    def clock(self, t: float) -> float:
        return t

    def slope(self, y: Tensor, u: Numbers, place: Numbers) -> Tensor:
        return self.drift(y, self.inside.times(u), torch.from_numpy(place))


class _Schedule(NamedTuple):
    """At some u: the time, as the model sees it too, x/y, what x and the prediction count for in
    dy/du, and the unit of y.
    """

    t: Numbers
    seen: Numbers
    size: Numbers
    of_state: Numbers
    of_prediction: Numbers
    unit: Numbers


class _Gaussian(Coordinates):
    """Coordinates in which the slope is a mix p x0 + q eps."""

    def __init__(
        self, drift: BoundedDrift, flow: GaussianFlow, t_start: float, t_end: float
    ) -> None:
        self.drift, self.inside = drift, drift.inside
        self.sde, self.scale = flow.sde, flow.scale
        self.t_start, self.t_end = self._ends = t_start, t_end
        self.start, self.end = self.clock(t_start), self.clock(t_end)
        self.prediction = flow.prediction
        self._known: tuple[Numbers, _Schedule] | None = None
        at = self.schedule(np.array([self.start, self.end]))
        regular: Numbers = np.isfinite(np.array(at[2:5])).all(0, keepdims=True)[0]
        check_regular(flow, t_start, t_end, regular.tolist())

    @abstractmethod
    def size(self, alpha: Numbers, sigma: Numbers) -> Numbers:
        """x/y."""

    @abstractmethod
    def mix(self, alpha: Numbers, sigma: Numbers, size: Numbers) -> tuple[Numbers, Numbers]:
        """p and q of the slope, given x/y."""

    @abstractmethod
    def log_snr(self, u: Numbers) -> Numbers: ...

    def schedule(self, u: Numbers) -> _Schedule:
        """What depends on u [b] alone; kept for the last u asked for."""
        if self._known is None or self._known[0] is not u:
            self._known = u, _Schedule(*padded(self._schedule, u))
        return self._known[1]

    def _schedule(self, u: Numbers) -> tuple[Numbers, ...]:
        with np.errstate(divide="ignore", invalid="ignore"):  # at alpha = 0 and at sigma = 0
            known = self.sde.time_from_log_snr(torch.from_numpy(self.log_snr(u)))
            t = known.clamp(min(self._ends), max(self._ends)).numpy()
            t[u == self.start], t[u == self.end] = self._ends
            seen = self.inside.rounded(t)
            at = seen.double()
            alpha, sigma = self.sde.alpha(at).numpy(), self.sde.sigma(at).numpy()
            point: Any = (alpha, sigma, math.nan, math.nan)
            if self.prediction == "flow":  # alone it needs how the schedule moves
                point = [host(part).numpy() for part in self.sde.point(at)]
            size, typical = self.size(alpha, sigma), np.hypot(sigma, self.scale * alpha)
            mix: Any = self.mix(alpha, sigma, size)
            shares: Any = conversion(self.prediction, mix, SchedulePoint(*point))
            return t, seen.numpy(), size, *shares, size / typical

    def time(self, u: Numbers) -> Numbers:
        return self.schedule(u).t

    def slope(self, y: Tensor, u: Numbers, place: Numbers) -> Tensor:
        at = self.schedule(u)
        size, kept, gained = lift(np.array(at[2:5]), y).unbind()
        x = size * y
        seen = torch.from_numpy(at.seen).to(y.device)
        prediction = self.drift(x, seen, torch.from_numpy(place))
        return kept * x + gained * prediction

    def state(self, y: Tensor, u: Numbers) -> Tensor:
        return lift(self.schedule(u).size, y) * y

    def start_of(self, x: Tensor) -> Tensor:
        u = np.full(x.shape[0], self.start)
        return x / lift(self.schedule(u).size, x)

    def unit(self, u: Numbers) -> Numbers | None:
        return self.schedule(u).unit


class Scaled(_Gaussian):
    def size(self, alpha: Numbers, sigma: Numbers) -> Numbers:
        side = C * self.scale * alpha
        size: Numbers = np.sqrt((side + 2 * B * sigma) * side + sigma * sigma)
        return size

    def mix(self, alpha: Numbers, sigma: Numbers, size: Numbers) -> tuple[Numbers, Numbers]:
        c, turn = C * self.scale, TURN * self.scale
        side, turned = c * alpha, turn * alpha
        speed = (sigma * sigma + turned * turned) / (turn * size * size * size)
        return -(sigma + B * side) * speed, c * (side + B * sigma) * speed

    def clock(self, t: float) -> float:
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return math.atan2(sigma, TURN * self.scale * alpha)

    def log_snr(self, u: Numbers) -> Numbers:
        return -2 * np.log(TURN * self.scale * np.tan(u))


class LogSNR(_Gaussian):
    def __init__(
        self, drift: BoundedDrift, flow: GaussianFlow, t_start: float, t_end: float
    ) -> None:
        check_ends(flow.sde, t_start, t_end)
        super().__init__(drift, flow, t_start, t_end)

    def size(self, alpha: Numbers, sigma: Numbers) -> Numbers:
        return alpha

    def mix(self, alpha: Numbers, sigma: Numbers, size: Numbers) -> tuple[Numbers, Numbers]:
        return np.zeros_like(alpha), sigma / alpha

    def clock(self, t: float) -> float:
        return -0.5 * float(self.sde.log_snr(t))

    def log_snr(self, u: Numbers) -> Numbers:
        return -2 * u


COORDINATES: Final = ("time", "scaled", "log_snr")


def check_ends(sde: GaussianSDE, t_start: float, t_end: float) -> None:
    """Raise `ArgumentError` if alpha or sigma is 0 at an end: log k and the reverse SDE need both.

    Args:
        sde: the process.
        t_start, t_end: the interval.
    """
    for name, t, other in (("t_start", t_start, t_end), ("t_end", t_end, t_start)):
        if not math.isfinite(log_snr := float(sde.log_snr(t))):
            raise ArgumentError(
                f"log-SNR is {log_snr} at {name} = {t:g}, where the equation of this solver is "
                f"singular: give {name}={_nearby(sde, t, other):.4g}, say"
            )


def check_velocity(flow: GaussianFlow, t_start: float, t_end: float) -> None:
    """Raise `ArgumentError` if the model's prediction does not tell dx/dt at an end.

    A prediction "v" may stand for a model that has a velocity of its own, so it is let through.
    """
    if flow.prediction == "v":
        return
    point = flow.sde.point(host([t_start, t_end]))
    shares = [host(c) for c in conversion(flow.prediction, "flow", point)]
    regular = torch.stack([torch.isfinite(c).expand(2) for c in shares]).all(0)
    check_regular(flow, t_start, t_end, regular.tolist())


def check_regular(
    flow: GaussianFlow, t_start: float, t_end: float, regular: Sequence[bool]
) -> None:
    """Raise `ArgumentError` if the slope is not `regular` at an end, the start's first."""
    for name, t, other, good in zip(
        ("t_start", "t_end"), (t_start, t_end), (t_end, t_start), regular, strict=True
    ):
        if not good:
            raise ArgumentError(
                f"a model that predicts {flow.prediction!r} does not tell the slope at "
                f"{name} = {t:g}, where alpha = {float(flow.sde.alpha(t)):.3g} and "
                f"sigma = {float(flow.sde.sigma(t)):.3g}: "
                f"give {name}={_nearby(flow.sde, t, other):.4g}, say"
            )


def _nearby(sde: GaussianSDE, t: float, other: float) -> float:
    """A time inside, next to the end `t`: where sampling stops by default, or a 1000th on."""
    inside = t + 1e-3 * (other - t)
    return min(inside, sde.t_min) if t < sde.t_min < other else inside


def coordinates_for(
    name: str | None,
    drift: RowDrift,
    flow: GaussianFlow | None,
    x: Tensor,
    t_start: float,
    t_end: float,
    max_calls: int,
) -> Coordinates:
    """The problem in the coordinates `name`; None takes "scaled" where the process is Gaussian.

    Raises:
        ArgumentError: the process is not Gaussian, and the coordinates need one.
    """
    name = name or ("scaled" if flow is not None else "time")
    if name == "time":
        if flow is not None:
            check_velocity(flow, t_start, t_end)
        return Time(BoundedDrift(drift, x, t_start, t_end, max_calls), t_start, t_end)
    if flow is None:
        raise ArgumentError(
            f"{name!r} coordinates need the schedule of a Gaussian process: take 'time'"
        )
    kind = {"scaled": Scaled, "log_snr": LogSNR}[name]
    return kind(BoundedDrift(flow.predict, x, t_start, t_end, max_calls), flow, t_start, t_end)
