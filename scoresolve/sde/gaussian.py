"""Processes whose transitions are Gaussian: x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I).

Two functions, alpha and sigma, fix everything else:

    f(x, t) = (alpha'/alpha) x,  g^2 = (sigma^2)' - 2 (alpha'/alpha) sigma^2,
    log_snr = 2 log(alpha/sigma),
    x_t | x_s ~ N(a x_s, (sigma_t^2 - a^2 sigma_s^2) I) with a = alpha_t/alpha_s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from scoresolve.sde.base import SDE, TimeLike, as_rows, as_time, expand

__all__ = ["GaussianSDE", "SchedulePoint"]

Number = float | Tensor


class SchedulePoint(NamedTuple):
    """alpha, sigma and their time derivatives at one time (floats, or tensors of one shape)."""

    alpha: Number
    sigma: Number
    alpha_dot: Number
    sigma_dot: Number


def _derivative(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)  # forward AD refuses expanded tensors
    derivative: Tensor = torch.func.jvp(fn, (t,), (torch.ones_like(t),))[1]
    return derivative.to(t.dtype)


class GaussianSDE(SDE):
    """A process given by `alpha(t)` and `sigma(t)`; drift and diffusion follow by exact derivative.

    A new process overrides `alpha` and `sigma` (torch operations on a tensor of any shape).
    `log_alpha`, `log_sigma` and `time_from_log_snr` may be overridden by stable closed forms.
    """

    has_prior = True

    @abstractmethod
    def alpha(self, t: TimeLike) -> Tensor:
        """Signal scale alpha(t) >= 0, shape of `t`."""

    @abstractmethod
    def sigma(self, t: TimeLike) -> Tensor:
        """Noise standard deviation sigma(t) >= 0, shape of `t`."""

    def log_alpha(self, t: TimeLike) -> Tensor:
        """log alpha(t), shape of `t`."""
        return self.alpha(as_time(t)).log()

    def log_sigma(self, t: TimeLike) -> Tensor:
        """log sigma(t), shape of `t`."""
        return self.sigma(as_time(t)).log()

    def log_snr(self, t: TimeLike) -> Tensor:
        """log(alpha^2 / sigma^2), shape of `t`; decreases with t."""
        return 2 * (self.log_alpha(t) - self.log_sigma(t))

    def alpha_dot(self, t: TimeLike) -> Tensor:
        """d alpha / dt, shape of `t`."""
        return _derivative(self.alpha, as_time(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        """d sigma / dt, shape of `t`."""
        return _derivative(self.sigma, as_time(t))

    def drift_rate(self, t: TimeLike) -> Tensor:
        """The rate alpha'/alpha, with f(x, t) = rate * x; shape of `t`."""
        t = as_time(t)
        return self.alpha_dot(t) / self.alpha(t)

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        return expand(self.drift_rate(t), x, t) * x

    def diffusion(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        sigma = self.sigma(t)
        return (2 * sigma * (self.sigma_dot(t) - self.drift_rate(t) * sigma)).sqrt()

    def point(self, t: TimeLike) -> SchedulePoint:
        """alpha, sigma and their derivatives at `t`."""
        t = as_time(t)
        return SchedulePoint(self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t))

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        """The time at which `log_snr(t)` has the given value, by bisection; values outside clamp.

        Args:
            log_snr: any shape.

        Returns:
            Time in [0, T], shape of `log_snr`.
        """
        target = as_time(log_snr)
        low = torch.zeros_like(target)
        high = torch.full_like(target, self.T)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.log_snr(middle) > target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def marginal(self, x0: Tensor, t: TimeLike) -> tuple[Tensor, Tensor]:
        """Mean [B, *event] and standard deviation (broadcastable) of x_t given `x0` [B, *event].

        Raises:
            ShapeError: `t` is neither [] nor [B].
        """
        t = as_rows(t, x0)
        return expand(self.alpha(t), x0, t) * x0, expand(self.sigma(t), x0, t)

    def transition(self, s: TimeLike, t: TimeLike) -> tuple[Tensor, Tensor]:
        """Scale a and standard deviation b of x_t | x_s ~ N(a x_s, b^2 I), for s <= t.

        a = alpha_t / alpha_s and b^2 = sigma_t^2 (1 - SNR_t / SNR_s).
        """
        s, t = as_time(s), as_time(t)
        scale = (self.log_alpha(t) - self.log_alpha(s)).exp()
        return scale, self.sigma(t) * self._lost(s, t).sqrt()

    def posterior(
        self, x_t: Tensor, x_0: Tensor, s: TimeLike, t: TimeLike
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(x_s | x_t, x_0), for s < t.

        mean = (SNR_t / SNR_s) (alpha_s / alpha_t) x_t + alpha_s (1 - SNR_t / SNR_s) x_0,
        var = sigma_s^2 (1 - SNR_t / SNR_s).

        Source:
            Ho et al. 2020 (2006.11239), eq. 6-7; Kingma et al. 2021 (2107.00630), eq. 25-26 with
            the general alpha and sigma.
        """
        s, t = as_rows(s, x_t), as_rows(t, x_t)
        s, t = s + torch.zeros_like(t), t + torch.zeros_like(s)  # rows of one, scalar of the other
        lost = self._lost(s, t)
        ratio = self.alpha(t) / self.alpha(s) * (self.sigma(s) / self.sigma(t)) ** 2
        mean = expand(ratio, x_t, t) * x_t + expand(self.alpha(s) * lost, x_0, t) * x_0
        return mean, expand(self.sigma(s) * lost.sqrt(), x_t, t)

    def _lost(self, s: TimeLike, t: TimeLike) -> Tensor:
        """1 - SNR_t / SNR_s, the share of the signal-to-noise ratio that is gone at t."""
        at_s, at_t = self.log_snr(s), self.log_snr(t)
        return torch.where(at_s == at_t, 0.0, -torch.expm1(at_t - at_s))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior that sampling starts from."""
        return float(self.sigma(as_time(self.T)))

    def start_std(self, t: float) -> float:
        """Standard deviation of a start that is drawn at time `t` without any data in it.

        That of the prior, in proportion to the noise: prior_std sigma(t) / sigma(T).
        """
        if t == self.T:
            return self.prior_std
        return self.prior_std * float(self.sigma(t)) / float(self.sigma(self.T))

    def from_normals(self, z: Tensor) -> Tensor:
        return self.prior_std * z

    def prior_log_prob(self, x: Tensor) -> Tensor:
        density: Tensor = self.prior(tuple(x.shape), dtype=x.dtype, device=x.device).log_prob(x)
        return density

    def prior(self, shape: tuple[int, ...], **factory: object) -> Distribution:
        """The prior N(0, prior_std^2 I) on states of `shape` [B, *event].

        Returns:
            A `torch.distributions` object: `.sample()` is [B, *event], `.log_prob(x)` is [B].
        """
        loc = torch.zeros(shape, **factory)  # type: ignore[call-overload]
        return Independent(Normal(loc, self.prior_std), len(shape) - 1)
