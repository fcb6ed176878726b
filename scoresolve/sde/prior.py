"""The law at the noisy end of a process: its own, or one that the caller gives."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.distributions import Distribution

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.sde.base import SDE
from scoresolve.sde.gaussian import GaussianSDE

__all__ = ["Prior", "check_prior", "log_prior", "prior_scale"]

Prior = Distribution | Callable[[Tensor], Tensor]


def check_prior(sde: SDE, prior: Prior | None) -> None:
    """Raise `ArgumentError` unless there is a law at the end of `sde`, given or its own."""
    if prior is None and not sde.has_prior:
        raise ArgumentError(f"{sde} has no prior in closed form: give the law at its end as prior=")
    if not (prior is None or isinstance(prior, Distribution) or callable(prior)):
        raise ArgumentError(
            f"prior is {type(prior).__name__}: give a distribution or a log-density"
        )


def prior_scale(sde: GaussianSDE, t: float) -> float:
    """What the standard deviation of the prior is multiplied by at `t`: sigma(t) / sigma(T)."""
    return float(sde.sigma(t) / sde.sigma(sde.T))


def log_prior(sde: SDE, x: Tensor, t: float, prior: Prior | None = None) -> Tensor:
    """Log-density of states at the noisy end, [B], differentiable as far as `prior` is.

    Args:
        sde: the process.
        x: states, [B, *event].
        t: their time.
        prior: the law there; if omitted the process's prior, its standard deviation scaled by
            `prior_scale`.

    Raises:
        ArgumentError: there is no prior.
        ShapeError: the prior's log-density is not [B].
    """
    check_prior(sde, prior)
    if prior is None:
        scale = prior_scale(sde, t) if isinstance(sde, GaussianSDE) else 1.0
        return sde.prior_log_prob(x / scale) - math.prod(x.shape[1:]) * math.log(scale)
    density: Tensor = prior.log_prob(x) if isinstance(prior, Distribution) else prior(x)
    if density.shape != x.shape[:1]:
        raise ShapeError(
            f"the prior's log-density has shape {tuple(density.shape)} for {len(x)} samples: "
            "give one that reduces the event, such as torch.distributions.Independent"
        )
    return density
