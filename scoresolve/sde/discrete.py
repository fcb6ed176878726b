"""DDPM's integer-time chain as a Gaussian process.

The chain x_n = sqrt(1 - beta_n) x_{n-1} + sqrt(beta_n) eps, n = 1..N, is the VP SDE with rate
-log(1 - beta_n) on (n - 1, n]: log alpha is linear between integers, and all the chain's
marginals and transitions are met exactly at t = n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.sde.base import TimeLike, as_time
from scoresolve.sde.vp import VariancePreserving

__all__ = ["DiscreteVP", "cosine_betas", "linear_betas", "scaled_linear_betas"]


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's schedule, [steps] float64 (Ho et al. 2020, 2006.11239, section 4)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Latent diffusion's schedule, linear in sqrt(beta), [steps] float64 (Rombach et al. 2022)."""
    return torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Tensor:
    """Cosine schedule, [steps] float64 (Nichol and Dhariwal 2021, 2102.09672, eq. 17)."""
    n = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((n / steps + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


@dataclass(frozen=True)
class DiscreteVP(VariancePreserving):
    """The process of an integer-time DDPM; t = n after n noising steps, t = 0 the data.

    A network that was trained with timesteps 0..N-1 is at t = timestep + 1.

    Args:
        alphas_cumprod: [N], strictly decreasing in (0, 1); entry n-1 is alpha(n)^2.
        t_min: where sampling stops unless told otherwise.

    Raises:
        ArgumentError: the schedule does not decrease strictly inside (0, 1).

    Source:
        Ho et al. 2020 (2006.11239), section 2; Song et al. 2021 (2011.13456), appendix B.
    """

    alphas_cumprod: Sequence[float] | Tensor = field(repr=False)
    t_min: float = 1.0

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).flatten().tolist()
        object.__setattr__(self, "alphas_cumprod", tuple(values))
        chain = [1.0, *values]
        if len(chain) < 2 or any(not 0 < b < a for a, b in itertools.pairwise(chain)):
            raise ArgumentError("alphas_cumprod must decrease strictly inside (0, 1)")
        logs = torch.tensor(chain, dtype=torch.float64).log() / 2
        object.__setattr__(self, "_log_alphas", logs)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor, t_min: float = 1.0) -> DiscreteVP:
        """The process of the chain with noise rates `betas`, [N] in (0, 1)."""
        beta = torch.as_tensor(betas, dtype=torch.float64)
        return cls((1 - beta).cumprod(0), t_min)

    @property
    def T(self) -> float:  # type: ignore[override]
        return float(len(self.alphas_cumprod))

    def _table(self, t: Tensor) -> Tensor:
        table: Tensor = self._log_alphas  # type: ignore[attr-defined]
        return table.to(t)

    def _cell(self, t: Tensor) -> Tensor:
        return t.ceil().long().clamp(1, len(self.alphas_cumprod))

    def beta(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        table, n = self._table(t), self._cell(t)
        return 2 * (table[n - 1] - table[n])

    def log_alpha(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        table, n = self._table(t), self._cell(t)
        return table[n - 1] + (t - (n - 1)) * (table[n] - table[n - 1])

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        log_snr = as_time(log_snr)
        log_alpha = -torch.logaddexp(torch.zeros_like(log_snr), -log_snr) / 2
        table = self._table(log_alpha)
        n = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, len(self.alphas_cumprod))
        t = n - 1 + (log_alpha - table[n - 1]) / (table[n] - table[n - 1])
        return t.clamp(0, self.T)
