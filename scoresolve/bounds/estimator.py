r"""What the variational bounds share: draws of |x - x0(x_t, t)|^2, and the sum of the parts.

    total = KL(q(x_T|x) || N(0, prior_std^2 I)) + diffusion - E log p(x|x_1)

The prior term is closed; the other two are averaged over independent draws of the noise (and of
the times), whose spread gives the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from scipy.special import gammaincinv
from torch import Tensor
from torch.special import log_ndtr

from scoresolve.bounds.dequantisation import bits_per_dim, standard_error
from scoresolve.conditions import unmarked
from scoresolve.driving import warn_of_dropout
from scoresolve.errors import ArgumentError, ShapeError, check_output, whole_number, yes_or_no
from scoresolve.models import Model, as_model
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.plans import check_state
from scoresolve.precision import doubled
from scoresolve.sde import GaussianSDE, expand

__all__ = ["MOST", "Estimator", "Levels", "VariationalBound", "clock", "clock_time"]

Levels = Sequence[float] | Tensor

MOST: Final = 10**6
"""Draws, steps or nodes at most, so that a slip does not run for ever."""


@dataclass(frozen=True)
class VariationalBound:
    """An upper bound on -log p(x) in nats, in its three parts, each [B] float64.

    Attributes:
        prior: KL(q(x_T|x) || p(x_T)), exact.
        diffusion: the sum or integral over the chain.
        reconstruction: -E log p(x|x_1).
        standard_error: of the sum of the three, over the draws; NaN for a single draw.
        terms: the diffusion term of every step from data to noise, [B, steps], where all were
            evaluated; None otherwise.
        nfe: network calls, of all rows each.
        dimension: D, the number of event elements.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    standard_error: Tensor
    terms: Tensor | None
    nfe: int
    dimension: int

    @property
    def total(self) -> Tensor:
        """prior + diffusion + reconstruction, in expectation >= -log p(x), [B]."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Tensor:
        """total / (D log 2), [B]: of masses if `levels` were given, else of a density."""
        return bits_per_dim(-self.total, self.dimension)


def clock(sde: GaussianSDE, t: float) -> float:
    """q = log(1 + SNR), finite also where alpha vanishes."""
    return float(torch.nn.functional.softplus(sde.log_snr(t).double()))


def clock_time(sde: GaussianSDE, q: Tensor) -> Tensor:
    """The time of q = log(1 + SNR), float64 of the shape of `q`."""
    return sde.time_from_log_snr(q.expm1().log())


class Estimator:
    """Draws of |x - x0(x_t, t)|^2, and what they are put together to."""

    def __init__(
        self,
        score: Model | Callable[..., Tensor],
        sde: GaussianSDE,
        x: Tensor,
        levels: Levels | None,
        draws: int,
        stratified: bool,
        noise: NoiseSource,
        cond: dict[str, Any],
    ) -> None:
        if not isinstance(sde, GaussianSDE):
            raise ArgumentError(f"{sde} has no alpha and sigma: give a Gaussian process")
        check_state(x)
        self.model, self.sde, self.state = as_model(score, sde), sde, x
        self.cond = unmarked(cond)
        self.draws = whole_number("draws", draws, 1, MOST)
        self.stratified = yes_or_no("stratified", stratified)
        self.noise, self.calls, self.dimension = noise, 0, math.prod(x.shape[1:])
        self.x = doubled(x.reshape(len(x), -1))
        self.levels = (
            None if levels is None else torch.as_tensor(levels, device=self.x.device).to(self.x)
        )
        if self.levels is not None:
            self.place = _places(self.x, self.levels)
        warn_of_dropout(score)

    def offset(self, draw: int, purpose: Purpose = Purpose.START) -> Tensor:
        """Uniform [B] float64, where the evenly spread times of a draw start."""
        like = torch.empty(len(self.x), dtype=torch.float64, device="cpu")
        return self.noise.uniform(like, draw, purpose)

    def normals(self, draw: int, count: int) -> Callable[[int], Tensor]:
        """The standard normal noises [B, *event] number 0 to count - 1 of a draw.

        Stratified, their lengths run evenly through the quantiles of the chi distribution from a
        random start for each sample, in steps of the golden ratio, so that with evenly spread
        times both are spread evenly in the plane.
        """

        def plain(index: int) -> Tensor:
            return self.noise.normal(self.state, (draw << 16) + index, Purpose.SOLVER)

        if not self.stratified:
            return plain
        start = self.offset(draw, Purpose.TARGET)
        steps = torch.arange(count, device="cpu")[:, None]
        place = (start + (5**0.5 - 1) / 2 * steps) % 1
        square = 2 * gammaincinv(self.dimension / 2, place.numpy())
        lengths = torch.from_numpy(square).sqrt().to(self.state)

        def even(index: int) -> Tensor:
            z = plain(index)
            length = z.reshape(len(z), -1).norm(dim=1).clamp(min=torch.finfo(z.dtype).tiny)
            stretch = lengths[index] / length
            return z * expand(stretch, z, stretch)

        return even

    def noised(self, t: Tensor, z: Tensor) -> Tensor:
        """x_t, [B, *event], at the times [B] with the noise z."""
        mean, std = self.sde.marginal(self.state, t)
        return mean + std * z

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's x0, [B, D] float64."""
        self.calls += 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        x0 = self.model.predict("x0", x, t.to(x.device, dtype), **self.cond)
        check_output(x0, x)
        return doubled(x0.reshape(len(x), -1))

    def error(self, t: Tensor, z: Tensor) -> Tensor:
        """|x - x0(x_t, t)|^2, [B] float64."""
        return (self.x - self.predict(self.noised(t, z), t)).square().sum(1)

    def log_mass(self, mean: Tensor, std: float) -> Tensor:
        """log of the mass of N(mean, std^2) on the bins of x, summed over the elements, [B]."""
        assert self.levels is not None
        inner = (self.levels[1:] + self.levels[:-1]) / 2
        ends = inner.new_full((1,), torch.inf)
        edges = torch.cat([-ends, inner, ends])
        low, high = (edges[self.place + i] - mean for i in (0, 1))
        upper = low > 0  # the tail in which the digits are
        low, high = torch.where(upper, -high, low) / std, torch.where(upper, -low, high) / std
        a, b = log_ndtr(low), log_ndtr(high)
        masses: Tensor = b + (-torch.expm1(a - b)).log()
        return masses.sum(1)

    @torch.no_grad()
    def result(
        self, evaluate: Callable[[int], tuple[Tensor, Tensor]], last: float, keep_terms: bool
    ) -> VariationalBound:
        """The bound, where `evaluate(draw)` gives the terms [B, n] and the reconstruction [B]."""
        found = [evaluate(draw) for draw in range(self.draws)]
        terms, decoded = (torch.stack(parts) for parts in zip(*found, strict=True))
        totals = terms.sum(2) + decoded
        ratio = (float(self.sde.sigma(last)) / self.sde.prior_std) ** 2
        shift = float(self.sde.alpha(last)) / self.sde.prior_std
        prior = (shift * self.x).square().sum(1) / 2
        prior = prior + self.dimension * (ratio - 1 - math.log(ratio)) / 2
        return VariationalBound(
            prior=prior,
            diffusion=terms.sum(2).mean(0),
            reconstruction=decoded.mean(0),
            standard_error=standard_error(totals),
            terms=terms.mean(0) if keep_terms else None,
            nfe=self.calls,
            dimension=self.dimension,
        )


def _places(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the level of each element, [B, D] int64."""
    if levels.ndim != 1 or len(levels) < 2 or bool((levels.diff() <= 0).any()):
        raise ShapeError("levels are the increasing values that elements take: give at least two")
    inner = (levels[1:] + levels[:-1]) / 2
    place = torch.searchsorted(inner, x.contiguous())
    if bool(((x - levels[place]).abs() > 1e-3 * levels.diff().min()).any()):
        raise ArgumentError(
            "x has elements off the levels: give data on them, or leave out levels="
        )
    return place
