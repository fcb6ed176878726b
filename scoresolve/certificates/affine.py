"""The exact law of any sampler on Gaussian data, from its answers alone.

There the exact model is affine in the state, so a sampler whose steps are linear is

    y = A x + b + sum_k C_k z_k

in its start x and its draws z_k, whatever library wrote it. One run on a batch of unit vectors,
the row for b all zeros, gives A, b and every C_k; one more row, of random start and draws, must be
the sum that these predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.certificates.probes import Watched
from scoresolve.certificates.randomness import Draws, Seeded
from scoresolve.errors import ScoresolveError
from scoresolve.noise import Philox
from scoresolve.peers import BlackBox
from scoresolve.sde import GaussianSDE
from scoresolve.targets import GaussianMixture

__all__ = ["AffineLaw", "NotAffine", "affine_law"]


class NotAffine(ScoresolveError):
    """A sampler is not an affine map of its start and its draws, even on Gaussian data."""


@dataclass(frozen=True)
class AffineLaw:
    """Law of a sampler on independent normal coordinates, started from the exact marginal.

    Attributes:
        gain: derivative of the output with respect to the start, [D, D].
        output_mean, covariance: of the output, [D] and [D, D].
        start_mean, start_variance, target_mean, target_variance: what is exact at the start and at
            the end, [D].
        draws: how many times it drew normals.
        calls: how many times it called the model.
        lowest: the least time of a call.
    """

    gain: Tensor
    output_mean: Tensor
    covariance: Tensor
    start_mean: Tensor
    start_variance: Tensor
    target_mean: Tensor
    target_variance: Tensor
    draws: int
    calls: int
    lowest: float

    @property
    def mean_error(self) -> float:
        """RMS over coordinates of output mean minus target mean."""
        return _finite((self.output_mean - self.target_mean).square().mean().sqrt())

    @property
    def variance_error(self) -> float:
        """Largest entry of the relative error of the covariance."""
        std = self.target_variance.sqrt()
        relative = self.covariance / std / std[:, None] - torch.eye(len(std), dtype=std.dtype)
        return _finite(relative.abs().max())

    @property
    def path_error(self) -> float:
        """RMS per coordinate between the output and the exact flow's image of its start."""
        exact = (self.target_variance / self.start_variance).sqrt()
        slope = self.gain - torch.diag(exact)
        spread = (slope.square() * self.start_variance).sum(1)
        return _finite(((self.output_mean - self.target_mean).square() + spread).mean().sqrt())


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def affine_law(
    box: BlackBox,
    model: Watched,
    target: GaussianMixture,
    sde: GaussianSDE,
    n: Any,
    ends: tuple[float, float],
) -> AffineLaw:
    """The exact law of `box` on Gaussian data.

    Args:
        box: the sampler.
        model: the exact model of `target`.
        target: one Gaussian with independent coordinates, of dimension D.
        sde: the process.
        n: the number of steps, or the times of a gridded sampler.
        ends: the times of the states it is given and of those it returns.

    Raises:
        NotAffine: the answers to a random start and random draws are not the sums they should be.
        Exception: whatever the sampler raises.
    """
    start_mean, start_variance = _moments(target, sde, ends[0])
    target_mean, target_variance = _moments(target, sde, ends[1])
    size = len(start_mean)
    before, model.low = model.calls, math.inf
    draws = _run(box, model, torch.zeros(2, size, dtype=box.dtype), n, None)[1]
    calls, lowest = model.calls - before, model.low

    x = torch.zeros(2 + size * (1 + draws), size, dtype=torch.float64)
    x[1 : 1 + size] = torch.eye(size, dtype=torch.float64)
    x[-1] = Philox(0).normal(x[-1:], 0)[0]

    random = Philox(1).normal(x.new_empty(1, draws * size), 0)[0]

    def unit(k: int) -> Tensor:
        z = torch.zeros_like(x)
        z[1 + size * (1 + k) : 1 + size * (2 + k)] = torch.eye(size)
        z[-1] = random[size * k : size * (k + 1)]
        return z

    y, seen = _run(box, model, x.to(box.dtype), n, unit)
    y = y.double()
    if seen != draws:
        raise NotAffine(f"drew {draws} times in one run and {seen} times in another")
    offset = y[0]
    linear = y[1:-1] - offset
    gain, responses = linear[:size].T, linear[size:]
    predicted = offset + gain @ x[-1] + random @ responses
    scale = linear.abs().max().clamp(min=offset.abs().max())
    gap = float((y[-1] - predicted).abs().max() / scale)
    if gap > (1e-6 if box.dtype == torch.float64 else 1e-3):
        raise NotAffine(f"answers to a sum and the sum of answers are {gap:.1e} apart")
    noise = responses.T @ responses
    return AffineLaw(
        gain=gain,
        output_mean=offset + gain @ start_mean,
        covariance=gain * start_variance @ gain.T + noise,
        start_mean=start_mean,
        start_variance=start_variance,
        target_mean=target_mean,
        target_variance=target_variance,
        draws=draws,
        calls=calls,
        lowest=lowest,
    )


def _run(
    box: BlackBox, model: Watched, x: Tensor, n: Any, unit: Callable[[int], Tensor] | None
) -> tuple[Tensor, int]:
    """The samples, and how many draws were made; those are zeros or, if given, `unit(k)`."""

    def answer(like: Tensor, index: int) -> Tensor:
        if like.numel() != x.numel():
            raise NotAffine(f"draws of shape {tuple(like.shape)} for {tuple(x.shape)} states")
        return torch.zeros_like(like) if unit is None else unit(index).reshape(like.shape)

    with Seeded(0), torch.no_grad(), Draws(answer) as draws:
        y = box(model, x, n, torch.randn_like)
    return y, draws.normals


def _moments(target: GaussianMixture, sde: GaussianSDE, t: float) -> tuple[Tensor, Tensor]:
    at = target.marginal(sde, t) if t > 0 else target
    return at.mean, at.covariance.diagonal()
