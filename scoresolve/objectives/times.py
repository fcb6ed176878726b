r"""Laws of the times at which an objective looks at its model.

With k = sigma/alpha, d log k / dt = g^2 / (2 sigma^2). So a law that is even in log k is the
proposal proportional to the likelihood weighting of the squared error of eps, in any process:

    int g^2/(2 sigma^2) |error|^2 dt = int |error|^2 d log k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.sde import GaussianSDE, TimeLike, as_time

__all__ = ["LogNormalTimes", "LogUniformTimes", "TimeLaw", "UniformTimes"]


_MASS = 1e-6  # with less, quantiles of the normal law are rounded to its ends in float32


class TimeLaw(ABC):
    """A law of times on an interval of a process.

    Args:
        sde: the process, a Gaussian one.
        low, high: the interval; `sde.t_min` and `sde.T` if omitted.

    Raises:
        ArgumentError: the process is not Gaussian, or the interval is empty or outside of it.
    """

    def __init__(
        self, sde: GaussianSDE, low: float | None = None, high: float | None = None
    ) -> None:
        if not isinstance(sde, GaussianSDE):
            raise ArgumentError(f"{sde} has no alpha and sigma: give a Gaussian process")
        self.sde = sde
        self.low = sde.t_min if low is None else real_number("low", low)
        self.high = sde.T if high is None else real_number("high", high)
        if not 0 <= self.low < self.high <= sde.T:
            raise ArgumentError(
                f"low = {self.low:g}, high = {self.high:g}: give an interval within [0, {sde.T:g}]"
            )

    @abstractmethod
    def at(self, u: Tensor) -> Tensor:
        """The times at the quantiles `u` in (0, 1), of its shape and dtype."""

    @abstractmethod
    def density(self, t: TimeLike) -> Tensor:
        """The density at `t` inside the interval, with respect to time, shape of `t`."""

    def draw(self, noise: NoiseSource, like: Tensor, draw: int = 0, even: bool = False) -> Tensor:
        """A time for each row of `like` [B, *event], [B].

        Args:
            noise: source of randomness.
            like: gives B, the device and the dtype, at least float32: not every device has
                float64, and half precision would round times.
            draw: number of the draw.
            even: spread them evenly in the law from one random start, by B equal steps, which
                lowers the variance of a mean over rows in random order.

        Source:
            Kingma et al. 2021 (2107.00630), appendix I.1, for even times.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        column = torch.empty(len(like), 1, dtype=dtype, device=like.device)
        u = noise.uniform(column, draw, Purpose.PROBE)[:, 0]
        if even and len(u):
            u = (u[:1] + torch.arange(len(u), dtype=dtype, device=u.device) / len(u)) % 1
        return self.at(u).to(dtype).clamp(self.low, self.high)

    def _log_ratio(self, t: TimeLike) -> Tensor:
        """log k = log(sigma/alpha)."""
        return -self.sde.log_snr(as_time(t)) / 2

    def _rate(self, t: TimeLike) -> Tensor:
        """d log k / dt."""
        t = as_time(t)
        return (self.sde.diffusion(t) / self.sde.sigma(t)) ** 2 / 2


class UniformTimes(TimeLaw):
    """Times even in t, as most networks are trained."""

    def at(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def density(self, t: TimeLike) -> Tensor:
        return torch.full_like(as_time(t), 1 / (self.high - self.low))


class LogUniformTimes(TimeLaw):
    """Times even in log(sigma/alpha), the likelihood proposal proportional to g^2/sigma^2.

    Args:
        sde, low, high: as for `TimeLaw`; neither sigma(low) nor alpha(high) may be 0.

    Raises:
        ArgumentError: as `TimeLaw`, or log(sigma/alpha) is infinite at an end.

    Source:
        Song et al. 2021 (2101.09258), section 4.3; Huang et al. 2021 (2106.02808), section 4.
    """

    def __init__(
        self, sde: GaussianSDE, low: float | None = None, high: float | None = None
    ) -> None:
        super().__init__(sde, low, high)
        self._ends = tuple(float(self._log_ratio(t)) for t in (self.low, self.high))
        if not all(map(math.isfinite, self._ends)):
            raise ArgumentError(
                f"log(sigma/alpha) goes from {self._ends[0]:g} to {self._ends[1]:g}: give low and "
                "high where neither sigma nor alpha vanishes"
            )

    def at(self, u: Tensor) -> Tensor:
        first, last = self._ends
        return self.sde.time_from_log_snr(-2 * (first + (last - first) * u))

    def density(self, t: TimeLike) -> Tensor:
        return self._rate(t) / (self._ends[1] - self._ends[0])


class LogNormalTimes(TimeLaw):
    """Times whose log(sigma/alpha) is normal, cut off at the ends of the interval.

    Args:
        sde, low, high: as for `TimeLaw`.
        mean, std: of log(sigma/alpha); EDM's values if omitted.

    Raises:
        ArgumentError: as `TimeLaw`, `std` is not positive, or the interval has no share in the
            normal law.

    Source:
        Karras et al. 2022 (2206.00364), table 1 and section 5.
    """

    def __init__(
        self,
        sde: GaussianSDE,
        mean: float = -1.2,
        std: float = 1.2,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__(sde, low, high)
        self.mean, self.std = real_number("mean", mean), real_number("std", std, above=0)
        ends = torch.stack([self._log_ratio(t) for t in (self.low, self.high)])
        self._masses = tuple(torch.special.ndtr((ends - self.mean) / self.std).tolist())
        if not self._masses[1] - self._masses[0] > _MASS:
            raise ArgumentError(
                f"mean = {mean}, std = {std}: log(sigma/alpha) goes from {float(ends[0]):g} to "
                f"{float(ends[1]):g}, where nothing of that normal law lies: give a mean within"
            )

    def at(self, u: Tensor) -> Tensor:
        first, last = self._masses
        z = torch.special.ndtri(first + (last - first) * u)
        return self.sde.time_from_log_snr(-2 * (self.mean + self.std * z))

    def density(self, t: TimeLike) -> Tensor:
        z = (self._log_ratio(t) - self.mean) / self.std
        peak = (self._masses[1] - self._masses[0]) * self.std * math.sqrt(2 * math.pi)
        density: Tensor = (-z.square() / 2).exp() / peak * self._rate(t)
        return density
