r"""The evidence bound of a diffusion chain x_T -> ... -> x_1 -> x, as of DDPM.

    -log p(x) <= KL(q(x_T|x) || p(x_T)) + sum_t E KL(q(x_s|x_t, x) || p(x_s|x_t)) - E log p(x|x_1)

With the posterior's variance a diffusion term is (SNR_s - SNR_t)/2 E|x - x0(x_t, t)|^2: the sum is
that of rectangles under E|x - x0|^2 of the noisier ends, above the integral of continuous time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.bounds.estimator import MOST, Estimator, Levels, VariationalBound, clock, clock_time
from scoresolve.errors import ArgumentError, GridError, known_name, real_number, whole_number
from scoresolve.grid import Grid, as_grid
from scoresolve.models import Model
from scoresolve.noise import NoiseSource, as_noise
from scoresolve.sde import DiscreteVP, GaussianSDE

__all__ = ["variational_bound"]

_VARIANCES: Final = ("posterior", "beta")


def variational_bound(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    x: Tensor,
    *,
    steps: int | None = None,
    grid: Grid | Sequence[float] | Tensor | None = None,
    variance: str = "posterior",
    levels: Levels | None = None,
    decoder_std: float | None = None,
    terms: int | None = None,
    draws: int = 1,
    stratified: bool = True,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    **cond: Any,
) -> VariationalBound:
    r"""Evidence bound of the chain of ancestral sampling on a grid, as of DDPM.

        L_T     = KL(N(alpha_T x, sigma_T^2) || N(0, prior_std^2))
        L_(t-1) = E |mu(x_t, x) - mu(x_t, x0)|^2 / (2 var) + KL of the variances
        L_0     = -E log p(x|x_1),   p Gaussian around x0(x_1), or its mass on the bin of x

    Args:
        score: callable `score(x, t, **cond)` or a `Model`.
        sde: the process, a Gaussian one.
        x: data, [B, *event], floating point.
        steps: steps of a grid even in log(1 + SNR) from `sde.t_min` to `sde.T`; or
        grid: the times of the chain, at least two. If both are omitted, 1, ..., N of a
            `DiscreteVP`, else 100 steps.
        variance: of the reverse steps, "posterior" (that of q(x_s|x_t, x), optimal for data that
            is one point) or "beta" (that of q(x_t|x_s), optimal for data N(0, I) under VP).
        levels: the values that elements of `x` take, increasing, [L], for the discretised
            decoder: the mass between the midpoints of neighbours, open at both ends. If omitted
            the data is continuous and the decoder a density.
        decoder_std: standard deviation of the decoder; sigma at the first time if omitted.
        terms: how many of the diffusion terms to evaluate in a draw, evenly spread from a random
            start for each sample; the bound stays unbiased. All if omitted.
        draws: independent evaluations K >= 1, whose spread gives the standard error.
        stratified: spread the lengths of the noises of a draw evenly over their law.
        seed: seed of the counter-based noise; sample i gets the same in any batch.
        noise: a noise source, a `torch.Generator`, or a callable, instead of `seed`.
        **cond: passed on to the model.

    Returns:
        A `VariationalBound`.

    Raises:
        ArgumentError: the process is not Gaussian, `x` is not on the levels, or a number is out
            of range.
        GridError, UnknownNameError, ShapeError: for a bad grid, variance or state.

    Source:
        Ho et al. 2020 (2006.11239), eq. 5, 8 and 13, and section 3.2 for the two variances;
        Sohl-Dickstein et al. 2015 (1503.03585), section 2.4.
    """
    known_name("variance", variance, _VARIANCES)
    run = Estimator(score, sde, x, levels, draws, stratified, as_noise(noise, seed), cond)
    at = torch.tensor(_chain(sde, steps, grid), dtype=torch.float64, device="cpu")
    log_snr, sigma = sde.log_snr(at), sde.sigma(at)
    lost = -torch.expm1(log_snr[1:] - log_snr[:-1])
    scale = log_snr[:-1].exp() * lost
    apart = torch.zeros_like(lost)
    if variance == "beta":
        ratio = (sigma[:-1] / sigma[1:]).square()
        scale, apart = scale * ratio, (ratio - 1 - ratio.log()) / 2
    count = len(lost)
    chosen = None if terms is None else whole_number("terms", terms, 1, count)
    std = float(sigma[0]) if decoder_std is None else real_number("decoder_std", decoder_std, 0)

    def evaluate(draw: int) -> tuple[Tensor, Tensor]:
        total = count if chosen is None else chosen
        z = run.normals(draw, total + 1)
        found = []
        for j in range(total):
            index = torch.tensor(j, device="cpu").expand(len(x))
            if chosen is not None:
                spread = (j + run.offset(draw)) * count / chosen
                index = spread.floor().long().clamp(max=count - 1)
            error = run.error(at[index + 1], z(j))
            term = error * scale[index].to(error) / 2 + run.dimension * apart[index].to(error)
            found.append(term * count / total)
        first = at[:1].expand(len(x))
        mean = run.predict(run.noised(first, z(total)), first)
        if run.levels is not None:
            return torch.stack(found, 1), -run.log_mass(mean, std)
        decoded = (run.x - mean).square().sum(1) / (2 * std**2)
        constant = math.log(std) + math.log(2 * math.pi) / 2
        return torch.stack(found, 1), decoded + run.dimension * constant

    return run.result(evaluate, float(at[-1]), chosen is None)


def _chain(
    sde: GaussianSDE, steps: int | None, grid: Grid | Sequence[float] | Tensor | None
) -> list[float]:
    """The increasing times of the chain."""
    if steps is not None and grid is not None:
        raise ArgumentError("steps= and grid= are both given: give one of them")
    if grid is not None:
        made = as_grid(grid)
    elif steps is None and isinstance(sde, DiscreteVP):
        return [float(n) for n in range(1, int(sde.T) + 1)]
    elif float(sde.sigma(sde.t_min)) == 0:
        raise GridError(f"sigma vanishes at t_min = {sde.t_min:g}: give a grid that starts later")
    else:
        count = whole_number("steps", 100 if steps is None else steps, 1, MOST)
        ends = clock(sde, sde.t_min), clock(sde, sde.T)
        q = torch.linspace(*ends, count + 1, dtype=torch.float64, device="cpu")
        return [sde.t_min, *clock_time(sde, q[1:-1]).tolist(), sde.T]
    made.check(sde)
    if float(sde.sigma(min(made.times))) == 0:
        raise GridError("sigma vanishes at the first time, where no decoder is left: start later")
    return sorted(made.times)
