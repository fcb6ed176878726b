r"""The evidence bound in continuous time, and where to sample its integrand.

    -log p(x) <= KL(q(x_T|x) || p(x_T)) + 1/2 int E|x - x0(x_t, t)|^2 dSNR - E log p(x|x_1)

If x0 is the exact E[x|x_t], the integral is, for every x, the divergence of the noised paths of x
from those of the data,

    E log q(x_1|x)/q(x_1) - E log q(x_T|x)/q(x_T),

so that only the two ends, prior and decoder, can leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.bounds.estimator import MOST, Estimator, Levels, VariationalBound, clock, clock_time
from scoresolve.errors import ArgumentError, GridError, whole_number
from scoresolve.grid import Grid
from scoresolve.models import Model
from scoresolve.noise import NoiseSource, as_noise
from scoresolve.precision import doubled
from scoresolve.sde import GaussianSDE

__all__ = ["TimeProposal", "continuous_bound", "fit_times"]


@dataclass(frozen=True)
class TimeProposal:
    """A density of times for `continuous_bound`: constant on intervals of q = log(1 + SNR).

    Attributes:
        edges: of the intervals, increasing, [M + 1].
        mass: probability of each, positive, sum 1, [M].
    """

    edges: tuple[float, ...]
    mass: tuple[float, ...]

    def __post_init__(self) -> None:
        edges, mass = self._on_host()
        fits = len(edges) == len(mass) + 1 > 1 and bool((edges.diff() > 0).all())
        if not fits or bool((mass <= 0).any()) or abs(float(mass.sum()) - 1) > 1e-6:
            raise ArgumentError(
                "a proposal needs M + 1 increasing edges and M positive masses of sum 1"
            )

    def _on_host(self) -> tuple[Tensor, Tensor]:
        edges, mass = (
            torch.tensor(v, dtype=torch.float64, device="cpu") for v in (self.edges, self.mass)
        )
        return edges, mass

    def at(self, sde: GaussianSDE, u: Tensor) -> tuple[Tensor, Tensor]:
        """Time and weight dSNR/du at the quantile `u` in (0, 1), in float64 and its shape."""
        edges, mass = self._on_host()
        below = torch.cat([mass.new_zeros(1), mass.cumsum(0)[:-1]])
        cell = torch.searchsorted(below, u.double().contiguous(), right=True) - 1
        rate = (edges.diff() / mass)[cell]
        q = edges[cell] + (u - below[cell]) * rate
        return clock_time(sde, q), rate * q.exp()


def continuous_bound(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    x: Tensor,
    *,
    times: TimeProposal | None = None,
    nodes: int = 16,
    t_start: float | None = None,
    t_end: float | None = None,
    levels: Levels | None = None,
    draws: int = 8,
    stratified: bool = True,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    **cond: Any,
) -> VariationalBound:
    r"""Evidence bound in continuous time, as of variational diffusion models.

        -log p(x) <= KL(q(x_T|x) || p(x_T)) + 1/2 int E|x - x0(x_t, t)|^2 dSNR - E log p(x|x_1)

    With the exact E[x|x_t], the integral equals, for every x,

        E log q(x_1|x)/q(x_1) - E log q(x_T|x)/q(x_T),

    so the bound is tight up to its ends: by KL(q(x_1|x) || p(x|x_1) as a posterior) at the data,
    and KL(q(x_T|x) || prior) - KL(q(x_T|x) || q(x_T)) at the noise. An error of the score adds
    its weighted square in the mean over the data.

    The decoder needs no network: N(x; x_1/alpha, (sigma/alpha)^2) for continuous data, whose mean
    is closed, D/2 (1 + log 2 pi sigma^2/alpha^2); for levels, p(x|x_1) ~ q(x_1|x) normalised.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`.
        sde: the process, a Gaussian one.
        x: data, [B, *event], floating point.
        times: where the integrand is sampled, as `fit_times` finds it; even in log(1 + SNR) from
            `t_start` to `t_end` if omitted.
        nodes: times in a draw, evenly spread in the proposal from a random start for each sample
            (low discrepancy), one call each.
        t_start, t_end: first and last time; `sde.t_min` and `sde.T` if omitted.
        levels: the values that elements of `x` take, increasing, [L]; continuous if omitted.
        draws, stratified, seed, noise, cond: as in `variational_bound`.

    Returns:
        A `VariationalBound` without `terms`.

    Raises:
        ArgumentError: the process is not Gaussian, `x` is not on the levels, the proposal covers
            another interval, or a number is out of range.
        GridError: the interval is empty or leaves that of the process.

    Source:
        Kingma et al. 2021 (2107.00630), sections 3 and 5 (the decoder, continuous time) and the
        low-discrepancy sampler of its appendix; Kong et al. 2023 (2302.03792), section 2, for an
        exact relation of each x.
    """
    run = Estimator(score, sde, x, levels, draws, stratified, as_noise(noise, seed), cond)
    first, last = _ends(sde, t_start, t_end)
    proposal = times or TimeProposal((clock(sde, last), clock(sde, first)), (1.0,))
    off = abs(proposal.edges[0] - clock(sde, last)) + abs(proposal.edges[-1] - clock(sde, first))
    if off > 1e-6 * (1 + proposal.edges[-1]):
        raise ArgumentError(
            f"the proposal covers other times than [{first:g}, {last:g}]: fit it to those"
        )
    count = whole_number("nodes", nodes, 1, MOST)

    def evaluate(draw: int) -> tuple[Tensor, Tensor]:
        z, start = run.normals(draw, count + 1), run.offset(draw)
        found = []
        for j in range(count):
            t, weight = proposal.at(sde, (j + start) / count)
            error = run.error(t, z(j))
            found.append(error * weight.to(error) / (2 * count))
        ratio = float((-sde.log_snr(first) / 2).exp())
        if run.levels is None:
            closed = run.dimension * (0.5 + math.log(ratio) + math.log(2 * math.pi) / 2)
            return torch.stack(found, 1), torch.full_like(found[0], closed)
        times = torch.full((len(x),), first, dtype=torch.float64, device="cpu")
        seen = doubled(run.noised(times, z(count)).reshape(len(x), -1)) / float(sde.alpha(first))
        logits = -(seen[..., None] - run.levels).square() / (2 * ratio**2)
        log_mass = logits.log_softmax(-1).gather(-1, run.place[..., None])
        return torch.stack(found, 1), -log_mass.sum((1, 2))

    return run.result(evaluate, last, False)


@torch.no_grad()
def fit_times(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    x: Tensor,
    *,
    intervals: int = 24,
    t_start: float | None = None,
    t_end: float | None = None,
    draws: int = 2,
    seed: int = 0,
    **cond: Any,
) -> TimeProposal:
    r"""The proposal of least variance among those constant on intervals of log(1 + SNR).

        density ~ sqrt(E f^2),   f = (1 + SNR)/2 |x - x0(x_t, t)|^2

    A bound that samples by it is unbiased for any proposal, which must not depend on the
    samples whose bound it gives if one wants these to be independent: fit it to others.

    Args:
        score, sde, t_start, t_end, cond: as in `continuous_bound`.
        x: pilot data, [B, *event].
        intervals: number M >= 1.
        draws: noise draws for each sample in each interval.
        seed: of these draws.

    Returns:
        A `TimeProposal`; each interval has at least a tenth of the mass of an even one.

    Raises:
        ArgumentError, GridError: as for `continuous_bound`.

    Source:
        Kingma et al. 2021 (2107.00630), section 5, lower the same variance by a learned schedule.
    """
    run = Estimator(score, sde, x, None, draws, True, as_noise(None, seed), cond)
    first, last = _ends(sde, t_start, t_end)
    count = whole_number("intervals", intervals, 1, MOST)
    host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    edges = torch.linspace(clock(sde, last), clock(sde, first), count + 1, **host)
    even = TimeProposal((float(edges[0]), float(edges[-1])), (1.0,))
    square = torch.zeros(count, **host)
    for draw in range(run.draws):
        z, start = run.normals(draw, count), run.offset(draw)
        for j in range(count):
            t, weight = even.at(sde, (j + start) / count)
            value = run.error(t, z(j)) * weight.to(run.x.device)
            square[j] += value.square().mean().cpu()
    density = square.sqrt()
    mass = density / density.sum() + 0.1 / count
    return TimeProposal(tuple(edges.tolist()), tuple((mass / mass.sum()).tolist()))


def _ends(sde: GaussianSDE, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    first, last = sde.t_min if t_start is None else t_start, sde.T if t_end is None else t_end
    Grid((first, last)).check(sde)
    if not first < last or float(sde.sigma(first)) == 0:
        raise GridError(f"[{first:g}, {last:g}] is no interval from data with some noise to noise")
    return first, last
