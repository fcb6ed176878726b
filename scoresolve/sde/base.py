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
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import (
    ArgumentError,
    ShapeError,
    check_output,
    is_transformed,
    real_number,
    short,
)
from scoresolve.precision import host, widest

__all__ = [
    "SDE",
    "Score",
    "TimeLike",
    "as_rows",
    "as_time",
    "check_interval",
    "expand",
]

TimeLike = float | Tensor
Score = Callable[..., Tensor]


def as_time(t: TimeLike, like: Tensor | None = None) -> Tensor:
    """`t` as a floating tensor.

    A Python number becomes float64 on the host, where it mixes with tensors of any device. With
    `like` it goes to the device of `like`, in float64 if `like` is, else in float32: not every
    device has float64.

    Raises:
        ArgumentError: `t` is no real number or tensor of them.
    """
    if isinstance(t, Tensor):
        if t.is_floating_point():
            return t
        if t.is_complex() or t.dtype is torch.bool:
            raise ArgumentError(f"the time is {t.dtype}: give real numbers")
        return t.to(widest(t.device))
    try:
        if isinstance(t, str | bytes | bool):
            raise TypeError
        if like is None:
            return host(t)
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        return torch.as_tensor(t, dtype=dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"the time is {short(t)}: give a number or a tensor") from error


def check_interval(sde: SDE) -> None:
    """Make floats of the numbers that a process is made with, and check its interval.

    Raises:
        ArgumentError: a number is not finite, or not 0 <= t_min < T.
    """
    parameters: tuple[Any, ...] = fields(sde) if is_dataclass(sde) else ()
    for name in (each.name for each in parameters if each.type == "float"):
        object.__setattr__(sde, name, real_number(name, getattr(sde, name)))
    if not 0 <= sde.t_min < sde.T < math.inf:
        raise ArgumentError(f"t_min = {sde.t_min}, T = {sde.T}: need 0 <= t_min < T")


def as_rows(t: TimeLike, x: Tensor) -> Tensor:
    """`t` as a tensor [] or [B] for `x` [B, *event]; a column [B, 1, ..., 1] is one too.

    Raises:
        ShapeError: it has another shape.
    """
    time = as_time(t)
    if time.ndim:
        _check_rows(time, x)
        time = time.reshape(time.shape[0])
    return time


def _check_rows(t: Tensor, x: Tensor) -> None:
    rows = x.shape[0] if x.ndim else 1
    if t.shape[0] not in (1, rows) or any(size != 1 for size in t.shape[1:]):
        raise ShapeError(
            f"t of shape {tuple(t.shape)} for x of shape {tuple(x.shape)}: give one time, or one "
            f"for each sample, [{rows}]"
        )


def expand(value: Tensor, x: Tensor, t: TimeLike = 0.0) -> Tensor:
    """Shape a coefficient so that it multiplies `x` [B, *event], in the dtype of `x`.

    Args:
        value: [*t.shape, *prefix], where prefix (often empty) runs along the first event axes.
        x: the state it will multiply.
        t: the time it was computed at, [] or [B]; a column [B, 1, ..., 1] counts as [B].

    Raises:
        ShapeError: `t` or `value` has another shape, so that it would broadcast.
    """
    times = t if isinstance(t, Tensor) and t.ndim else None
    if times is not None:
        _check_rows(times, x)
    if value.ndim == 0:
        return value.to(x)
    if times is None:
        value = value[None]
    elif times.ndim > 1 and value.shape[: times.ndim] == times.shape:
        value = value.reshape(times.shape[0], *value.shape[times.ndim :])
    if value.ndim > x.ndim or value.shape[0] not in (1, x.shape[0]):
        raise ShapeError(
            f"a coefficient of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: it "
            "needs the shape of t, and then of the first axes of the event"
        )
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
            score: callable `score(x, t, **cond)` returning grad log p_t(x); a single `t` reaches
                it as [B], as in `sample`.
            eta: noise level >= 0; 1 is Anderson's reverse SDE, 0 the probability flow.
            **cond: passed on to `score`.

        Returns:
            The drift, shape of `x`.

        Raises:
            ShapeError: score or drift have another shape than `x`, or `t` is neither [] nor [B],
                so that it would broadcast.
            ArgumentError: `eta` is out of range.

        Source:
            Song et al. 2021 (2011.13456), eq. 6 and 13; Zhang and Chen 2023 (2204.13902), eq. 6.
        """
        eta = real_number("eta", eta, least=0)
        times = as_time(t, x)
        if not times.ndim and x.ndim and not is_transformed(x):
            times = times.expand(len(x))
        g, value = expand(self.diffusion(t), x, t), score(x, times, **cond)
        check_output(value, x)
        drift = self.drift(x, t)
        if drift.shape != x.shape:
            raise ShapeError(
                f"the drift of {self} has shape {tuple(drift.shape)} for x of shape "
                f"{tuple(x.shape)}: return one value per element of x"
            )
        return drift - (1 + eta**2) / 2 * g**2 * value

    def probability_flow_drift(self, x: Tensor, t: TimeLike, score: Score, **cond: Any) -> Tensor:
        """Velocity f - g^2/2 score of the probability-flow ODE, shape of `x`.

        Source:
            Song et al. 2021 (2011.13456), eq. 13.
        """
        return self.reverse_drift(x, t, score, eta=0.0, **cond)
