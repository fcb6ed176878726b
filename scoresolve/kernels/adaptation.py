"""Adapting the step size of each chain to an acceptance, by dual averaging."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["DualAveraging"]


class DualAveraging:
    """Steps that drive the mean acceptance of every chain to delta.

        H_m = (1 - 1/(m + t0)) H_{m-1} + (delta - a_m) / (m + t0),
        log h_m = log(10 h_0) - sqrt(m)/gamma H_m,
        log hbar_m = m^-kappa log h_m + (1 - m^-kappa) log hbar_{m-1}.

    Every chain is adapted on its own, so none knows of its neighbours.

    Args:
        step_size: h_0, [B].
        acceptance: delta, in (0, 1).

    Attributes:
        step_size: h_m, for the next step while adapting, [B].

    Source:
        Hoffman and Gelman 2014, "The No-U-Turn sampler" (1111.4246), algorithm 5 with its values
        gamma = 0.05, t0 = 10, kappa = 0.75.
    """

    gamma, t0, kappa = 0.05, 10.0, 0.75

    def __init__(self, step_size: Tensor, acceptance: float) -> None:
        self.step_size, self.acceptance = step_size, acceptance
        self.centre = (10 * step_size).log()
        self.excess, self.log_average = torch.zeros_like(step_size), torch.zeros_like(step_size)
        self.count = 0

    def update(self, acceptance: Tensor) -> None:
        """Take in the acceptance probabilities [B] of a step."""
        self.count += 1
        self.excess = torch.lerp(
            self.excess, self.acceptance - acceptance, 1 / (self.count + self.t0)
        )
        log_step = self.centre - math.sqrt(self.count) / self.gamma * self.excess
        self.log_average = torch.lerp(self.log_average, log_step, self.count**-self.kappa)
        self.step_size = log_step.exp()

    @property
    def average(self) -> Tensor:
        """hbar_m, for the steps after adapting, [B]."""
        return self.log_average.exp() if self.count else self.step_size
