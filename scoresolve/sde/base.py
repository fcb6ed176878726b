"""Stochastic differential equations and their time reversal.

Forward: dx = f(x, t) dt + g(t) dw, from data at t = 0 to noise at t = T. With the score
s = grad log p_t, every member of the family

    dx = [f - (1 + eta^2)/2 g^2 s] dt + eta g dw        (run from T down to 0)

has the marginals p_t: eta = 1 is the reverse SDE (Anderson 1982), eta = 0 the probability flow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, check_output

__all__ = ["SDE", "Score", "TimeLike", "as_time", "check_interval", "expand"]

TimeLike = float | Tensor
Score = Callable[..., Tensor]


def as_time(t: TimeLike, like: Tensor | None = None) -> Tensor:
    """`t` as a floating tensor; a Python number becomes float64, on the device of `like`."""
    if isinstance(t, Tensor):
        return t if t.is_floating_point() else t.to(torch.float64)
    return torch.as_tensor(t, dtype=torch.float64, device=None if like is None else like.device)


def check_interval(sde: SDE) -> None:
    """Raise `ArgumentError` unless 0 <= t_min < T < inf."""
    if not 0 <= sde.t_min < sde.T < math.inf:
        raise ArgumentError(f"t_min = {sde.t_min}, T = {sde.T}: need 0 <= t_min < T")


def expand(value: Tensor, x: Tensor, t: TimeLike = 0.0) -> Tensor:
    """Shape a coefficient so that it multiplies `x` [B, *event], in the dtype of `x`.

    Args:
        value: [*t.shape, *prefix], where prefix (often empty) runs along the first event axes.
        x: the state it will multiply.
        t: the time it was computed at, [] or [B].
    """
    batched = isinstance(t, Tensor) and t.ndim == 1
    if value.ndim == 0:
        return value.to(x)
    if not batched:
        value = value[None]
    return value.to(x).reshape(value.shape + (1,) * (x.ndim - value.ndim))


class SDE(ABC):
    """A process dx = f(x, t) dt + g(t) dw on t in [0, T].

    A new process needs `drift` and `diffusion` only; any nonlinear drift will do.
    Processes with Gaussian transitions derive from `GaussianSDE` instead.

    Attributes:
        T: end of the process, where only noise is left.
        t_min: where sampling stops unless told otherwise.
        has_prior: whether the law at T is known, so that `from_normals` and `prior_log_prob` are.
    """

    T: float = 1.0
    t_min: float = 0.0
    has_prior: bool = False

    @abstractmethod
    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        """f(x, t), shape of `x` [B, *event]; `t` [] or [B]."""

    @abstractmethod
    def diffusion(self, t: TimeLike) -> Tensor:
        """g(t), shape of `t`; a degenerate process appends axes for the first event axes."""

    def from_normals(self, z: Tensor) -> Tensor:
        """A draw of the prior made of standard normals `z` [B, *event], shape of `z`.

        Raises:
            ArgumentError: the process has no prior.
        """
        raise ArgumentError(f"{self} has no prior: give the start x=")

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log-density of the prior at `x` [B, *event], [B].

        Raises:
            ArgumentError: the process has no prior.
        """
        raise ArgumentError(f"{self} has no prior: give the law at its end as prior=")

    def reverse_drift(
        self, x: Tensor, t: TimeLike, score: Score, eta: float = 1.0, **cond: Any
    ) -> Tensor:
        """Drift f - (1 + eta^2)/2 g^2 score of the marginal-preserving family.

        Its diffusion is `eta * diffusion(t)`; the equation runs backwards in time.

        Args:
            x: state, [B, *event].
            t: time, [] or [B].
            score: callable `score(x, t, **cond)` returning grad log p_t(x).
            eta: noise level >= 0; 1 is Anderson's reverse SDE, 0 the probability flow.
            **cond: passed on to `score`.

        Returns:
            The drift, shape of `x`.

        Raises:
            ShapeError: the score has another shape than `x`, so that it would broadcast.

        Source:
            Song et al. 2021 (2011.13456), eq. 6 and 13; Zhang and Chen 2023 (2204.13902), eq. 6.
        """
        g, value = expand(self.diffusion(t), x, t), score(x, t, **cond)
        check_output(value, x)
        return self.drift(x, t) - (1 + eta**2) / 2 * g**2 * value

    def probability_flow_drift(self, x: Tensor, t: TimeLike, score: Score, **cond: Any) -> Tensor:
        """Velocity f - g^2/2 score of the probability-flow ODE, shape of `x`.

        Source:
            Song et al. 2021 (2011.13456), eq. 13.
        """
        return self.reverse_drift(x, t, score, eta=0.0, **cond)
