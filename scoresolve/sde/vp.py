"""Variance-preserving processes: dx = -beta(t)/2 x dt + g(t) dw with B(t) = int_0^t beta.

VP:        alpha^2 = exp(-B),  sigma^2 = 1 - alpha^2,      g^2 = beta
SubVP:     alpha^2 = exp(-B),  sigma   = 1 - alpha^2,      g^2 = beta (1 - alpha^4)
CosineVP:  alpha = cos(theta)/cos(theta_0), theta linear in t, sigma^2 = 1 - alpha^2
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.sde.base import TimeLike, as_time, check_interval
from scoresolve.sde.gaussian import GaussianSDE

__all__ = ["VP", "CosineVP", "SubVP", "VariancePreserving"]


class VariancePreserving(GaussianSDE):
    """Drift -beta/2 x, from `beta` and `log_alpha`; unless overridden alpha^2 + sigma^2 = 1."""

    @abstractmethod
    def beta(self, t: TimeLike) -> Tensor:
        """Noise rate beta(t) = -2 d log alpha / dt, shape of `t`."""

    def alpha(self, t: TimeLike) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: TimeLike) -> Tensor:
        return torch.expm1(2 * self.log_alpha(t)).abs().sqrt()

    def drift_rate(self, t: TimeLike) -> Tensor:
        return -self.beta(t) / 2

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return self.drift_rate(t) * self.alpha(t)

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return self.beta(t) * self.alpha(t) ** 2 / (2 * self.sigma(t))

    def diffusion(self, t: TimeLike) -> Tensor:
        return self.beta(t).sqrt()

    @property
    def prior_std(self) -> float:
        return 1.0


class _LinearBeta(VariancePreserving):
    beta_min: float
    beta_max: float

    def __post_init__(self) -> None:
        check_interval(self)
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max == 0:
            raise ArgumentError(
                f"beta_min = {self.beta_min}, beta_max = {self.beta_max}: "
                "need 0 <= beta_min <= beta_max and beta_max > 0"
            )

    def beta(self, t: TimeLike) -> Tensor:
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        return -t * (t * (self.beta_max - self.beta_min) + 2 * self.beta_min) / 4

    def _time_from_integral(self, integral: Tensor) -> Tensor:
        # The root of B(t) = integral, written without a difference of nearly equal numbers.
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * integral).sqrt()
        t = 2 * integral / (self.beta_min + root)
        return torch.where(integral == 0, 0.0, torch.where(integral.isinf(), self.T, t)).clamp(
            0, self.T
        )


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance-preserving SDE with beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

    Args:
        beta_min: rate at t = 0, >= 0.
        beta_max: rate at t = 1, >= beta_min.
        T: end time.
        t_min: where sampling stops unless told otherwise.

    Source:
        Song et al. 2021 (2011.13456), eq. 11 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-3

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        log_snr = as_time(log_snr)
        return self._time_from_integral(torch.logaddexp(torch.zeros_like(log_snr), -log_snr))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-variance-preserving SDE: the drift of `VP` with standard deviation 1 - alpha^2.

    Source:
        Song et al. 2021 (2011.13456), eq. 12 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-3

    def sigma(self, t: TimeLike) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return self.beta(t) * self.alpha(t) ** 2

    def diffusion(self, t: TimeLike) -> Tensor:
        return (-self.beta(t) * torch.expm1(4 * self.log_alpha(t))).sqrt()

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        root_snr = (as_time(log_snr) / 2).exp()
        sigma = 2 / (1 + (1 + 4 * root_snr**2).sqrt())
        integral = torch.where(
            sigma < 0.5, -torch.log1p(-sigma), -2 * (sigma.log() + as_time(log_snr) / 2)
        )
        return self._time_from_integral(integral)


@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """Variance-preserving SDE of the cosine schedule, theta = pi/2 (t + s)/(1 + s).

    alpha vanishes at t = 1, where beta is infinite; the process ends at T < 1 instead.

    Args:
        s: offset that keeps beta finite and small at t = 0, > 0.
        T: end time in (0, 1).
        t_min: where sampling stops unless told otherwise.

    Source:
        Nichol and Dhariwal 2021 (2102.09672), eq. 17; T = 0.9946 from Lu et al. 2022
        (2206.00927), appendix D.
    """

    s: float = 0.008
    T: float = 0.9946
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        check_interval(self)
        if not self.s > 0 or not 0 < self.T < 1:
            raise ArgumentError(f"s = {self.s}, T = {self.T}: need s > 0 and 0 < T < 1")

    def _angle(self, t: TimeLike) -> Tensor:
        return math.pi / 2 * (as_time(t) + self.s) / (1 + self.s)

    @property
    def _angle_0(self) -> float:
        return math.pi / 2 * self.s / (1 + self.s)

    def beta(self, t: TimeLike) -> Tensor:
        return math.pi / (1 + self.s) * self._angle(t).tan()

    def log_alpha(self, t: TimeLike) -> Tensor:
        return self._angle(t).cos().log() - math.log(math.cos(self._angle_0))

    def sigma(self, t: TimeLike) -> Tensor:
        angle, angle_0 = self._angle(t), self._angle_0
        swept = math.pi / 2 * as_time(t) / (1 + self.s)
        return (swept.sin() * (angle + angle_0).sin()).sqrt() / math.cos(angle_0)

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        log_snr = as_time(log_snr)
        cos_0, sin_0 = math.cos(self._angle_0), math.sin(self._angle_0)
        cos_squared = cos_0**2 * torch.sigmoid(log_snr)
        sin_squared = sin_0**2 + cos_0**2 * torch.sigmoid(-log_snr)
        angle = torch.atan2(sin_squared.sqrt(), cos_squared.sqrt())
        return ((angle - self._angle_0) * (1 + self.s) * 2 / math.pi).clamp(0, self.T)
