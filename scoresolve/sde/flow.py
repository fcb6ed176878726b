"""Rectified flow as a Gaussian process: x_t = (1 - t) x_0 + t eps, whose velocity is eps - x_0.

alpha = 1 - t,   sigma = t,   f = -x / (1 - t),   g^2 = 2 t / (1 - t)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.sde.base import TimeLike, as_time, check_interval
from scoresolve.sde.gaussian import GaussianSDE

__all__ = ["RectifiedFlow"]


@dataclass(frozen=True)
class RectifiedFlow(GaussianSDE):
    """The straight path between data (t = 0) and noise (t = 1).

    Drift and diffusion are infinite at t = 1, where alpha = 0; the velocity is not.

    Args:
        T: end time, at most 1.
        t_min: where sampling stops unless told otherwise.

    Raises:
        ArgumentError: not 0 <= t_min < T <= 1.

    Source:
        Liu et al. 2022 (2209.03003), eq. 1; Lipman et al. 2022 (2210.02747), example II.
    """

    T: float = 1.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        check_interval(self)
        if self.T > 1:
            raise ArgumentError(f"T = {self.T}: the path ends at t = 1, give T in (0, 1]")

    def alpha(self, t: TimeLike) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: TimeLike) -> Tensor:
        return as_time(t).clone()

    def log_alpha(self, t: TimeLike) -> Tensor:
        return torch.log1p(-as_time(t))

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return torch.ones_like(as_time(t))

    def drift_rate(self, t: TimeLike) -> Tensor:
        return -1 / (1 - as_time(t))

    def diffusion(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        return (2 * t / (1 - t)).sqrt()

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        return torch.sigmoid(-as_time(log_snr) / 2).clamp(0, self.T)

    @property
    def prior_std(self) -> float:
        return 1.0
