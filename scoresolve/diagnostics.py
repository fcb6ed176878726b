"""How well Markov chains have mixed, in numbers: ESS, split R-hat, autocorrelation time.

The estimators are those of ArviZ (Vehtari, Gelman, Simpson, Carpenter, Buerkner 2021): ranks over
all chains are turned into normal scores, every chain is split in two, and

    R-hat = sqrt(pooled variance / variance within),    ESS = draws / (1 + 2 sum_k rho_k),

the sum cut off where the autocorrelations of the chains together cease to fall (Geyer 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ScoresolveError, ShapeError
from scoresolve.monte_carlo import Chains
from scoresolve.precision import host

__all__ = ["Diagnostics", "diagnose"]


@dataclass(frozen=True)
class Diagnostics:
    """What `diagnose` returns; every tensor is [*event] in float64.

    Attributes:
        chains, draws: how many of both, the failed chains left out.
        ess_bulk: effective sample size for the centre, of all chains together.
        ess_tail: the lesser one of the 5 % and 95 % quantiles.
        rhat: split R-hat, the greater of ranks and folded ranks; below 1.01 when chains agree.
        autocorrelation_time: draws that are worth one independent one, for the mean.
        acceptance: mean acceptance probability, where it is known.
        evaluations: of the score, of all chains together, warm-up included, where it is known.
    """

    chains: int
    draws: int
    ess_bulk: Tensor
    ess_tail: Tensor
    rhat: Tensor
    autocorrelation_time: Tensor
    acceptance: float | None = None
    evaluations: int | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.chains} chains of {self.draws} draws",
            f"ESS          {float(self.ess_bulk.min()):.0f} bulk, {float(self.ess_tail.min()):.0f} "
            "tail, the least of any coordinate",
            f"R-hat        {float(self.rhat.max()):.4f} at most",
            f"correlation  {float(self.autocorrelation_time.max()):.1f} draws at most",
        ]
        if self.acceptance is not None:
            lines.append(f"acceptance   {self.acceptance:.3f}")
        if self.evaluations is not None:
            each = 1000 * float(self.ess_bulk.min()) / self.evaluations
            lines.append(f"ESS per 1000 evaluations of the score {each:.1f}")
        return "\n".join(lines)


def diagnose(chains: Chains | Tensor) -> Diagnostics:
    """Effective sample size, split R-hat and autocorrelation time of every coordinate.

    Args:
        chains: of `run_chains`, which kept its samples, or states [S, B, *event] of B chains.
            Chains that failed or have a value that is not finite are left out.

    Returns:
        `Diagnostics`.

    Raises:
        ArgumentError: no samples were kept, or no chain is finite.
        ShapeError: there are fewer than four draws, or no chain axis.
        ScoresolveError: arviz-stats is not installed (extra `mcmc`).

    Source:
        Vehtari et al. 2021 (1903.08008), by arviz-stats.
    """
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise ScoresolveError(
            "diagnose needs arviz-stats: pip install 'scoresolve[mcmc]'"
        ) from error
    samples = chains.samples if isinstance(chains, Chains) else chains
    if samples is None:
        raise ArgumentError("no samples were kept: run the chains with keep=True")
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.is_meta:
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise ArgumentError(f"samples are {kind}: give real floating-point states that have values")
    if samples.ndim < 2 or len(samples) < 4:
        raise ShapeError(
            f"samples of shape {tuple(samples.shape)}: give [S, B, *event] with S >= 4"
        )
    flat = samples.detach().flatten(2) if samples.ndim > 2 else samples.detach()[..., None]
    good = torch.isfinite(flat).all(2).all(0)
    if isinstance(chains, Chains):
        good = good & chains.ok.to(good.device)
    if not bool(good.any()):
        raise ArgumentError("every chain has values that are not finite: there is no diagnosis")
    values = host(flat[:, good]).numpy()
    axes = {"chain_axis": 1, "draw_axis": 0}

    def shaped(numbers: object) -> Tensor:
        return host(numbers).reshape(samples.shape[2:])

    ess = array_stats.ess
    draws = values.shape[0] * values.shape[1]
    acceptance = evaluations = None
    if isinstance(chains, Chains):
        evaluations = chains.nfe * values.shape[1]
        if chains.acceptance is not None:
            acceptance = float(chains.acceptance[good.to(chains.acceptance.device)].mean())
    return Diagnostics(
        chains=values.shape[1],
        draws=values.shape[0],
        ess_bulk=shaped(ess(values, method="bulk", **axes)),
        ess_tail=shaped(ess(values, method="tail", prob=(0.05, 0.95), **axes)),
        rhat=shaped(array_stats.rhat(values, method="rank", **axes)),
        autocorrelation_time=draws / shaped(ess(values, method="mean", **axes)),
        acceptance=acceptance,
        evaluations=evaluations,
    )
