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
from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.sde import GaussianSDE
from scoresolve.solvers.adaptive.drift import BoundedDrift
from scoresolve.solvers.adaptive.points import Point, hermite
from scoresolve.solvers.adaptive.rows import lift, padded
from scoresolve.solvers.integrator import GaussianFlow, RowDrift
from scoresolve.solvers.scaled import TURN, B, C

__all__ = ["COORDINATES", "Coordinates", "check_ends", "coordinates_for"]


class Coordinates(ABC):
    """One problem in its coordinates; times and u are float64 on the host.

    Attributes:
        start, end: the interval of u.
        drift: the bounded right-hand side.
    """

    start: float
    end: float
    drift: BoundedDrift

    @property
    def sign(self) -> float:
        return math.copysign(1.0, self.end - self.start)

    @property
    def length(self) -> float:
        return abs(self.end - self.start)

    @abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """t at u [b]."""

    @abstractmethod
    def clock(self, t: float) -> float:
        """u at time t."""

    @abstractmethod
    def slope(self, y: Tensor, u: Tensor, place: Tensor) -> Tensor:
        """dy/du at states [b, *event], for one call."""

    def state(self, y: Tensor, u: Tensor) -> Tensor:
        """x of y."""
        return y

    def start_of(self, x: Tensor) -> Tensor:
        """y of x at the start."""
        return x

    def unit(self, u: Tensor) -> Tensor | None:
        """The factor on y that makes errors comparable, [b]; None for 1."""
        return None

    def between(self, now: Point, new: Point, before: Point, u: Tensor) -> Tensor:
        """y at u [b] within the step from `now` to `new`, given the point `before` it.

        The polynomial of degree 5 through the three, or on a first step, which has no point before,
        of degree 3. It is as good as the steps up to order 5: under the long ones of dop853 less.
        """
        return hermite((now, new, before), u)

    def least_step(self, u: Tensor) -> Tensor:
        """A step of a few ulp, below which the stages' times are no longer distinct."""
        return 16 * torch.finfo(u.dtype).eps * u.abs().clamp(min=max(abs(self.end), self.length))


class Time(Coordinates):
    def __init__(self, drift: BoundedDrift, t_start: float, t_end: float) -> None:
        self.drift, self.start, self.end = drift, t_start, t_end

    def time(self, u: Tensor) -> Tensor:
        return u

    def clock(self, t: float) -> float:
        return t

    def slope(self, y: Tensor, u: Tensor, place: Tensor) -> Tensor:
        return self.drift(y, self.drift.times(u), place)


class _Gaussian(Coordinates):
    """Coordinates in which the slope is a mix p x0 + q eps."""

    def __init__(
        self, drift: BoundedDrift, flow: GaussianFlow, t_start: float, t_end: float
    ) -> None:
        self.drift, self.sde, self.scale = drift, flow.sde, flow.scale
        self.t_start, self.t_end = self._ends = t_start, t_end
        self.start, self.end = self.clock(t_start), self.clock(t_end)
        self._seen: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def size(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x/y."""

    @abstractmethod
    def mix(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """p and q of the slope."""

    @abstractmethod
    def log_snr(self, u: Tensor) -> Tensor: ...

    def schedule(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, alpha and sigma at u [b]; kept for the last u asked for."""
        if self._seen is None or self._seen[0] is not u:

            def at(u: Tensor) -> Tensor:
                t = self.sde.time_from_log_snr(self.log_snr(u))
                t = torch.where(u == self.start, self.t_start, t)
                t = torch.where(u == self.end, self.t_end, t).clamp(*sorted(self._ends))
                return torch.stack((t, self.sde.alpha(t), self.sde.sigma(t)))

            self._seen = u, padded(at, u)
        t, alpha, sigma = self._seen[1]
        return t, alpha, sigma

    def time(self, u: Tensor) -> Tensor:
        return self.schedule(u)[0]

    def slope(self, y: Tensor, u: Tensor, place: Tensor) -> Tensor:
        t, alpha, sigma = self.schedule(u)
        x = lift(self.size(alpha, sigma), y) * y
        return self.drift(x, self.drift.times(t), place, *self.mix(alpha, sigma))

    def state(self, y: Tensor, u: Tensor) -> Tensor:
        return lift(self.size(*self.schedule(u)[1:]), y) * y

    def start_of(self, x: Tensor) -> Tensor:
        u = torch.full((x.shape[0],), self.start, dtype=torch.float64)
        return x / lift(self.size(*self.schedule(u)[1:]), x)

    def unit(self, u: Tensor) -> Tensor | None:
        _, alpha, sigma = self.schedule(u)
        typical = (sigma.square() + (self.scale * alpha).square()).sqrt()
        return self.size(alpha, sigma) / typical


class Scaled(_Gaussian):
    def size(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        side = C * self.scale * alpha
        return (sigma.square() + 2 * B * side * sigma + side.square()).sqrt()

    def mix(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c, turn = C * self.scale, TURN * self.scale
        s = self.size(alpha, sigma)
        speed = (sigma.square() + (turn * alpha).square()) / (turn * s * s * s)
        return -(sigma + B * c * alpha) * speed, c * (c * alpha + B * sigma) * speed

    def clock(self, t: float) -> float:
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return math.atan2(sigma, TURN * self.scale * alpha)

    def log_snr(self, u: Tensor) -> Tensor:
        return -2 * (TURN * self.scale * u.tan()).log()


class LogSNR(_Gaussian):
    def __init__(
        self, drift: BoundedDrift, flow: GaussianFlow, t_start: float, t_end: float
    ) -> None:
        check_ends(flow.sde, t_start, t_end)
        super().__init__(drift, flow, t_start, t_end)

    def size(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def mix(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), sigma / alpha

    def clock(self, t: float) -> float:
        return -0.5 * float(self.sde.log_snr(t))

    def log_snr(self, u: Tensor) -> Tensor:
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
                f"singular: give {name}={t + 1e-3 * (other - t):.4g}, say"
            )


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
        return Time(BoundedDrift(drift, x, t_start, t_end, max_calls), t_start, t_end)
    if flow is None:
        raise ArgumentError(
            f"{name!r} coordinates need the schedule of a Gaussian process: take 'time'"
        )
    kind = {"scaled": Scaled, "log_snr": LogSNR}[name]
    return kind(BoundedDrift(flow.mix, x, t_start, t_end, max_calls), flow, t_start, t_end)
