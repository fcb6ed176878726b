"""Hamiltonian Monte Carlo: H(x, p) = -log pi(x) + |p|^2 / 2, integrated by leapfrog."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number, whole_number
from scoresolve.kernels.base import (
    ChainNoise,
    ChainState,
    Kernel,
    StepSize,
    checked_acceptance,
    checked_step,
    metropolis,
)
from scoresolve.kernels.target import Point, Target, column, inner

__all__ = ["HMC", "leapfrog"]


def leapfrog(
    target: Target, point: Point, p: Tensor, h: Tensor, steps: int
) -> tuple[Point, Tensor]:
    """`steps` times: p <- p + h/2 score(x), x <- x + h p, p <- p + h/2 score(x).

    It is undone by itself from (x, -p), and keeps volume in (x, p).

    Args:
        target: gives the score, once a step.
        point, p: where it begins.
        h: step sizes [B, 1, ...].
        steps: how many.
    """
    p = torch.addcmul(p, h / 2, point.score)
    for left in reversed(range(steps)):
        point = target(torch.addcmul(point.x, h, p))
        p = torch.addcmul(p, h if left else h / 2, point.score)
    return point, p


class HMC(Kernel):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps of a size that varies.

        p ~ N(0, I),    h' = h (1 + jitter (2 u - 1)),  u uniform,
        (y, r) = leapfrog(x, p) with h',
        log a = log pi(y) - log pi(x) - (|r|^2 - |p|^2) / 2.

    A trajectory of one length is nearly a period of some direction of pi, or half of one, and then
    |x| in that direction hardly changes. So every chain draws its length anew in every step.

    Args:
        step_size: h > 0, a length; a number or [B]. Warm-up adapts it.
        leapfrogs: leapfrog steps, each an evaluation of the score, >= 1.
        acceptance: to which the step size is adapted, in (0, 1).
        jitter: share by which the step size varies, in [0, 1); 0 for steps of one size.

    Raises:
        ArgumentError, ShapeError: a value is out of range.

    Source:
        Neal 2011, "MCMC using Hamiltonian dynamics" (1206.1901), sections 3.2 and, for steps that
        vary by 20 %, 3.3; acceptance 0.651 of Beskos et al. 2013 (1001.4460).
    """

    name = "hmc"
    source = "Neal 2011 (1206.1901), section 3.2"

    def __init__(
        self,
        step_size: StepSize = 0.1,
        leapfrogs: int = 10,
        *,
        acceptance: float = 0.651,
        jitter: float = 0.2,
    ) -> None:
        self.step_size = checked_step(step_size)
        self.target_acceptance = checked_acceptance(acceptance)
        self.leapfrogs = self.evaluations = whole_number("leapfrogs", leapfrogs)
        self.jitter = real_number("jitter", jitter, least=0.0)
        if self.jitter >= 1:
            raise ArgumentError(f"jitter = {jitter}: give a number in [0, 1)")

    def step(self, state: ChainState, target: Target, noise: ChainNoise, h: Tensor) -> ChainState:
        old, p = state.point, noise.normal(state.point.x)
        if self.jitter:
            u = noise.uniform(p.new_empty(len(p)))
            h = h * column(1 + self.jitter * (2 * u - 1), p)
        new, r = leapfrog(target, old, p, h, self.leapfrogs)
        return metropolis(old, new, (inner(p, p) - inner(r, r)) / 2, target, noise)
