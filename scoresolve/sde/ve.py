"""Variance-exploding processes: alpha = 1, dx = g(t) dw with g^2 = d sigma^2 / dt.

VE:   sigma(t) = sigma_min (sigma_max/sigma_min)^t, t in [0, 1]
EDM:  sigma(t) = t, t in [0, sigma_max]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.sde.base import TimeLike, as_time, check_interval
from scoresolve.sde.gaussian import GaussianSDE

__all__ = ["EDM", "VE"]


class _VarianceExploding(GaussianSDE):
    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        check_interval(self)
        if not 0 < self.sigma_min < self.sigma_max:
            raise ArgumentError(
                f"sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}: "
                "need 0 < sigma_min < sigma_max"
            )

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.ones_like(as_time(t))

    def log_alpha(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(as_time(t))

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: TimeLike) -> Tensor:
        return (2 * self.sigma(t) * self.sigma_dot(t)).sqrt()


@dataclass(frozen=True)
class VE(_VarianceExploding):
    """Variance-exploding SDE with sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    As published, sigma(0) = sigma_min: the law at t = 0 is the data blurred by sigma_min.

    Args:
        sigma_min: noise level at t = 0, > 0.
        sigma_max: noise level at t = 1, about the largest distance between two data points.
        T: end time.
        t_min: where sampling stops unless told otherwise.

    Source:
        Song et al. 2021 (2011.13456), eq. 9 and appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 1e-5

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def log_sigma(self, t: TimeLike) -> Tensor:
        return math.log(self.sigma_min) + as_time(t) * self._log_ratio

    def sigma(self, t: TimeLike) -> Tensor:
        return self.log_sigma(t).exp()

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return self.sigma(t) * self._log_ratio

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        t = (-as_time(log_snr) / 2 - math.log(self.sigma_min)) / self._log_ratio
        return t.clamp(0, self.T)


@dataclass(frozen=True)
class EDM(_VarianceExploding):
    """Variance-exploding SDE whose time is the noise level: sigma(t) = t.

    Args:
        sigma_min: where sampling stops unless told otherwise, > 0.
        sigma_max: noise level of the prior.

    Source:
        Karras et al. 2022 (2206.00364), table 1 and section 3.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.sigma_max

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    def sigma(self, t: TimeLike) -> Tensor:
        return as_time(t).clone()

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return torch.ones_like(as_time(t))

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        return (-as_time(log_snr) / 2).exp().clamp(0, self.T)
