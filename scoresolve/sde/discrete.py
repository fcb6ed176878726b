"""DDPM's integer-time chain as a Gaussian process.

The chain x_n = sqrt(1 - beta_n) x_{n-1} + sqrt(beta_n) eps, n = 1..N, is the VP SDE with rate
-log(1 - beta_n) on (n - 1, n]: log alpha is linear between integers, and all the chain's
marginals and transitions are met exactly at t = n. Where the last beta is 1, so that no signal is
left, alpha^2 is linear on the last interval instead, with the rate 1/(N - t).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number, short
from scoresolve.precision import host
from scoresolve.sde.base import TimeLike, as_time
from scoresolve.sde.vp import VariancePreserving

__all__ = ["DiscreteVP"]


@dataclass(frozen=True)
class DiscreteVP(VariancePreserving):
    """The process of an integer-time DDPM; t = n after n noising steps, t = 0 the data.

    A network that was trained with timesteps 0..N-1 is at t = timestep + 1.

    Args:
        alphas_cumprod: [N], strictly decreasing in (0, 1); entry n-1 is alpha(n)^2. The last may
            be 0 (zero terminal SNR): a model is then read at t = N by its x0, v or flow.
        t_min: where sampling stops unless told otherwise.

    Raises:
        ArgumentError: the schedule does not decrease strictly inside (0, 1), or t_min is not in
            [0, N].

    Source:
        Ho et al. 2020 (2006.11239), section 2; Song et al. 2021 (2011.13456), appendix B; Lin et
        al. 2024 (2305.08891), section 3.1, for zero terminal SNR.
    """

    alphas_cumprod: Sequence[float] | Tensor = field(repr=False)
    t_min: float = 1.0

    def __post_init__(self) -> None:
        values = _numbers("alphas_cumprod", self.alphas_cumprod).flatten().tolist()
        object.__setattr__(self, "alphas_cumprod", tuple(values))
        chain = [1.0, *values]
        falls = all(0 <= b < a for a, b in itertools.pairwise(chain))
        if len(chain) < 2 or not falls:
            raise ArgumentError(
                "alphas_cumprod must decrease strictly inside (0, 1), and may end with 0"
            )
        t_min = real_number("t_min", self.t_min, least=0, most=len(values))
        object.__setattr__(self, "t_min", t_min)
        fades = chain[-1] == 0
        levels = [*chain[:-1], chain[-2]] if fades else chain
        logs = host(levels).log() / 2
        object.__setattr__(self, "_log_alphas", logs)
        object.__setattr__(self, "_fades", fades)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor, t_min: float = 1.0) -> DiscreteVP:
        """The process of the chain with noise rates `betas`, [N] in (0, 1); the last may be 1."""
        beta = _numbers("betas", betas)
        return cls((1 - beta).cumprod(0), t_min)

    @property
    def T(self) -> float:  # type: ignore[override]
        return float(len(self.alphas_cumprod))

    def _table(self, t: Tensor) -> Tensor:
        """log alpha at 0..N in the dtype of `t`; at N that of N - 1 where all signal fades."""
        table: Tensor = self._log_alphas  # type: ignore[attr-defined]
        return table.to(t)

    def _cell(self, t: Tensor) -> Tensor:
        return t.ceil().long().clamp(1, len(self.alphas_cumprod))

    def _fading(self, t: Tensor) -> Tensor:
        """Whether `t` lies on a last interval where alpha^2 falls to 0 linearly."""
        fades: bool = self._fades  # type: ignore[attr-defined]
        return (t > self.T - 1) & fades

    def beta(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        table, n = self._table(t), self._cell(t)
        return torch.where(self._fading(t), 1 / (self.T - t), 2 * (table[n - 1] - table[n]))

    def log_alpha(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        table, n = self._table(t), self._cell(t)
        within = (t - (n - 1)) * (table[n] - table[n - 1])
        return table[n - 1] + torch.where(self._fading(t), (self.T - t).log() / 2, within)

    def alpha_dot(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        steep = -(self._table(t)[-1].exp() / (self.T - t).sqrt() / 2)  # infinite at N
        return torch.where(self._fading(t), steep, super().alpha_dot(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        level = (2 * self._table(t)[-1]).exp() / (2 * self.sigma(t))
        return torch.where(self._fading(t), level, super().sigma_dot(t))

    def time_from_log_snr(self, log_snr: TimeLike) -> Tensor:
        log_snr = as_time(log_snr)
        log_alpha = -torch.logaddexp(torch.zeros_like(log_snr), -log_snr) / 2
        table = self._table(log_alpha)
        n = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, len(self.alphas_cumprod))
        t = n - 1 + (log_alpha - table[n - 1]) / (table[n] - table[n - 1])
        if self._fades:  # type: ignore[attr-defined]
            faded = self.T - (2 * (log_alpha - table[-1])).exp()
            t = torch.where(log_alpha < table[-1], faded, t)
        return t.clamp(0, self.T)


def _numbers(name: str, values: object) -> Tensor:
    try:
        return host(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} = {short(values)}: give a sequence of numbers") from error
