"""Distances that need no second set of samples: between Gaussians, and in log-density.

For p = N(m, A) and q = N(n, B), with A = L L^T, B = K K^T and P S Q^T = svd(K^T L),

    W2^2(p, q) = |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) = |m - n|^2 + |L - K P Q^T|^2,
    KL(p | q)  = log p(m) - log q(m) + (tr(B^-1 A) - D) / 2,

the second form of W2 free of differences of large terms. For any density p and samples x,

    gap = E_p[log p] - mean log p(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.distances.pairs import at_rows, pair
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.targets import GaussianMixture

__all__ = ["DensityGap", "gaussian_kl", "gaussian_wasserstein", "log_density_gap"]


def gaussian_wasserstein(p: GaussianMixture, q: GaussianMixture) -> float:
    """The 2-Wasserstein distance between two Gaussians, in the unit of x.

    Args:
        p, q: mixtures of one component, as `targets.gaussian` makes them; a `Law` gives its
            `mean` and `covariance`. Variances may be 0. [D, D] matrices are formed.

    Raises:
        ArgumentError: one has several components.
        ShapeError: their events differ.

    Source:
        Dowson, Landau 1982; the orthogonal form: Bhatia, Jain, Lim 2019, theorem 1.
    """
    _require_gaussians(p, q)
    left, right = (_root(each) for each in (p, q))
    u, _, vh = torch.linalg.svd(right.mT @ left)
    shift = (p.mean - q.mean).double().flatten()
    return float((shift.square().sum() + (left - right @ u @ vh).square().sum()).sqrt())


def gaussian_kl(p: GaussianMixture, q: GaussianMixture) -> float:
    """The Kullback-Leibler divergence KL(p | q) = E_p[log p - log q] of two Gaussians, in nats.

    Args:
        p, q: mixtures of one component with a density, as `targets.gaussian` makes them.

    Raises:
        ArgumentError: one has several components, or a direction without variance.
        ShapeError: their events differ.
    """
    _require_gaussians(p, q)
    first, second = p.to(torch.float64), q.to(torch.float64)
    covariance = first.covariance
    size = len(covariance)
    # The score of q at its mean + v is -B^-1 v: the columns of A give those of B^-1 A.
    columns = second.mean + covariance.reshape(size, *second.event_shape)
    trace = -at_rows(second.score, columns).reshape(size, size).diagonal().sum()
    centre = first.mean[None]
    gap = first.log_prob(centre) - second.log_prob(centre)
    return float(gap[0] + (trace - size) / 2)


@dataclass(frozen=True)
class DensityGap:
    """What `log_density_gap` returns.

    Attributes:
        value: E_p[log p] - mean log p(x), in nats; above 0 for samples that stray, below 0 for
            samples that are too narrow.
        standard_error: of `value`, from both sets of samples.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"log-density gap {self.value:.4f} +- {self.standard_error:.4f} nats"


def log_density_gap(
    x: Tensor, target: GaussianMixture, *, exact: int = 20_000, seed: int = 0
) -> DensityGap:
    """How far the mean log-density of samples lies from that of exact ones.

    Args:
        x: [N, *event], N >= 8.
        target: with `log_prob` and `sample(n, seed)`: a mixture or one of your own.
        exact: number of exact samples that E_p[log p] is estimated from, at least 8.
        seed: of these, which differ from `target.sample(n, seed)`.

    Returns:
        A `DensityGap`.

    Raises:
        ArgumentError: `x` is not floating or has rows that are not finite, or the target lacks
            a method.
        ShapeError: `x` is not [N, *event], or has fewer than 8 rows.
    """
    both = pair(x, target, exact=exact, seed=seed)
    return gap_of(both.log_prob(both.x), both.log_prob(both.y))


def gap_of(at_samples: Tensor, at_exact: Tensor) -> DensityGap:
    """The gap from log p at the samples [N] and at exact ones [M]."""
    variance = sum(float(each.var()) / len(each) for each in (at_samples, at_exact))
    return DensityGap(float(at_exact.mean() - at_samples.mean()), math.sqrt(variance))


def _root(law: GaussianMixture) -> Tensor:
    """L with L L^T the covariance, [D, D]."""
    values, vectors = torch.linalg.eigh(law.covariance.double())
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _require_gaussians(p: GaussianMixture, q: GaussianMixture) -> None:
    for law in (p, q):
        if not isinstance(law, GaussianMixture) or len(law.weights) != 1:
            raise ArgumentError(
                f"{law!r} is not one Gaussian: there is no closed form, use compare_samples"
            )
    if p.event_shape != q.event_shape:
        raise ShapeError(
            f"laws on {tuple(p.event_shape)} and {tuple(q.event_shape)}: give one event shape"
        )
