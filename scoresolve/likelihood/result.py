"""What a likelihood returns: numbers, where they come from, and how far they may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from scoresolve.errors import Status

__all__ = ["ErrorBudget", "Likelihood"]


@dataclass(frozen=True)
class ErrorBudget:
    """Separate estimates of the errors of a log-density in nats, each [B].

    Attributes:
        probes: standard error by the random probes.
        path: by the steps of the path: what the corrector changed, times the score; mostly too
            high by far.
        quadrature: by the quadrature of the trace: the difference to every second node. With
            random probes it holds their noise too.
        data_end: size of the correction for the noise below the first node; its own error is of
            the next order in that noise.
        prior: size of the correction for the data left in the last node, likewise, but for what
            their mean explains; mostly too high, and nats where the process ends too early.
    """

    probes: Tensor
    path: Tensor
    quadrature: Tensor
    data_end: Tensor
    prior: Tensor


@dataclass(frozen=True)
class Likelihood:
    """Log-densities; a failed sample has NaN where a number would mislead.

    Attributes:
        log_prob: log-density of each sample in nats, [B], at least float32.
        standard_error: that of `log_prob` by the random probes, [B]: 0 with the exact trace,
            NaN with a single fixed probe, which cannot tell its error, or several that are alike
            but for a sign. Where conditions hide the
            scale of the data, with `budget.path` added in square.
        latent: where the flow takes the samples, [B, *event].
        status: one `Status` per sample, [B] int64.
        nfe: network evaluations of a sample, the most of any, and the calls that all share.
        forwards: network evaluations of each sample, [B] int64; a sample that an adaptive solver
            has finished takes no further part in the calls.
        products: products of each sample with its Jacobian, [B] int64.
        bin_width: width of the bins of dequantised data; None for plain data.
        x: the samples themselves, [B, *event]: given, dequantised or drawn.
        log_det: log |det dlatent/dx|, [B]: `log_prob` less the log-density of the model's own
            law at `latent`, which the prior is at T, but for what is left of the data there.
        budget: errors by their source; None with a solver that was chosen by hand.
        shared: evaluations and products, once a call, that told scale and allocation.
    """

    log_prob: Tensor
    standard_error: Tensor
    latent: Tensor
    status: Tensor
    nfe: int
    forwards: Tensor
    products: Tensor
    bin_width: float | None = None
    x: Tensor | None = None
    log_det: Tensor | None = None
    budget: ErrorBudget | None = None
    shared: int = 0

    @property
    def ok(self) -> Tensor:
        """Which samples are good, [B] bool."""
        return self.status == int(Status.OK)

    @property
    def dimension(self) -> int:
        """D, the number of event elements."""
        return math.prod(self.latent.shape[1:])

    @property
    def cost(self) -> Tensor:
        """Evaluations and products of each sample, [B] float64, with its part of the shared."""
        return (self.forwards + self.products).double() + self.shared / max(1, len(self.status))

    @property
    def bits_per_dim(self) -> Tensor:
        """-log_prob / (D log 2), less log2(bin_width) for dequantised data, [B].

        For dequantised data its mean is an upper bound on the bits per element of the model of
        the discrete data.

        Source:
            Theis, van den Oord and Bethge 2016 (1511.01844), section 3.1.
        """
        bits = -self.log_prob / (self.dimension * math.log(2))
        return bits if self.bin_width is None else bits - math.log2(self.bin_width)
