"""Overdamped Langevin dynamics dx = score dt + sqrt(2) dw, with and without a correction."""

from __future__ import annotations

import torch

from scoresolve.kernels.base import (
    ChainNoise,
    ChainState,
    Kernel,
    StepSize,
    checked_acceptance,
    checked_step,
    metropolis,
)
from scoresolve.kernels.target import Target, inner

__all__ = ["MALA", "ULA"]


class ULA(Kernel):
    """The unadjusted Langevin algorithm, Euler-Maruyama of Langevin dynamics.

        y = x + h score(x) + sqrt(2h) z.

    Its stationary law is not pi: on a Gaussian with precision A the covariance is
    A^-1 (I - h A / 2)^-1, and it diverges from h A = 2 on.

    Args:
        step_size: h > 0, a variance; a number or [B].

    Raises:
        ArgumentError, ShapeError: the step size is out of range.

    Source:
        Roberts and Tweedie 1996, "Exponential convergence of Langevin distributions and their
        discrete approximations", Bernoulli 2, section 1.4.
    """

    name, power = "ula", 2
    source = "Roberts and Tweedie 1996, Bernoulli 2, section 1.4"

    def __init__(self, step_size: StepSize) -> None:
        self.step_size = checked_step(step_size)

    def step(
        self, state: ChainState, target: Target, noise: ChainNoise, h: torch.Tensor
    ) -> ChainState:
        x, score = state.point.x, state.point.score
        y = torch.addcmul(x, h, score).addcmul_((2 * h).sqrt(), noise.normal(x))
        return ChainState(target(y))


class MALA(Kernel):
    """The Metropolis-adjusted Langevin algorithm: a step of ULA, accepted or rejected.

        y = x + h score(x) + sqrt(2h) z,    w = sqrt(h/2) (score(x) + score(y)),
        log a = log pi(y) - log pi(x) - <w, z + w/2>,

    where the last term is log q(y -> x) - log q(x -> y), as the way back needs the noise -(z + w).

    Args:
        step_size: h > 0, a variance; a number or [B]. Warm-up adapts it.
        acceptance: to which it is adapted, in (0, 1).

    Raises:
        ArgumentError, ShapeError: a value is out of range.

    Source:
        Roberts and Tweedie 1996, Bernoulli 2, section 1.4; acceptance 0.574 of Roberts and
        Rosenthal 1998, J. R. Statist. Soc. B 60.
    """

    name, power = "mala", 2
    source = "Roberts and Tweedie 1996, Bernoulli 2, section 1.4"

    def __init__(self, step_size: StepSize = 0.1, *, acceptance: float = 0.574) -> None:
        self.step_size = checked_step(step_size)
        self.target_acceptance = checked_acceptance(acceptance)

    def step(
        self, state: ChainState, target: Target, noise: ChainNoise, h: torch.Tensor
    ) -> ChainState:
        old, z = state.point, noise.normal(state.point.x)
        y = torch.addcmul(old.x, h, old.score).addcmul_((2 * h).sqrt(), z)
        new = target(y)
        w = (old.score + new.score).mul_((h / 2).sqrt())
        return metropolis(old, new, -inner(w, z.add_(w, alpha=0.5)), target, noise)
