r"""Log-densities along SDE paths, without a divergence.

In y = x/alpha, with the noise variance k^2 = (sigma/alpha)^2 as clock, the process is a Brownian
motion. By Ito's formula and the Fokker-Planck equation, along any path with d<y> = dk^2, taken
from noise to data with the score s_y = alpha s at the noisier end of each step,

    d log p(y) = s_y . dy - |s_y|^2 / 2 |dk^2|,

where the Laplacian of log p has cancelled. Over a step dk^2 = h it is the exact log-ratio of
N(y_s; y_t + h s_y, h I), a step of the reverse chain, and N(y_t; y_s, h I), the noising step: so on
noised data its mean is the evidence lower bound of that chain, however coarse the grid is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.bounds.dequantisation import bits_per_dim, log_mean_exp, standard_error
from scoresolve.bounds.estimator import MOST
from scoresolve.conditions import unmarked
from scoresolve.driving import warn_of_dropout
from scoresolve.errors import ArgumentError, GridError, ShapeError, whole_number
from scoresolve.grid import Grid, as_grid, make_grid
from scoresolve.models import Model, as_model
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.plans import check_state, model_time
from scoresolve.precision import doubled
from scoresolve.sde import GaussianSDE

__all__ = ["PathEstimate", "ito_bound", "ito_log_density"]


@dataclass(frozen=True)
class PathEstimate:
    """What `ito_bound` returns, in nats, for the density at the first time of its grid.

    Attributes:
        paths: one estimate of the log-density for each path and sample, [K, B] float64.
        nfe: network calls, of all rows each.
        dimension: D, the number of event elements.
    """

    paths: Tensor
    nfe: int
    dimension: int

    @property
    def log_prob(self) -> Tensor:
        """Mean over the paths, in expectation a lower bound on the log-density, [B]."""
        return self.paths.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of `log_prob`, [B]; NaN for a single path."""
        return standard_error(self.paths)

    @property
    def importance_weighted(self) -> Tensor:
        """log of the mean of the exponentials: a bound that is tighter the more paths, [B]."""
        return log_mean_exp(self.paths)[0]

    @property
    def bits_per_dim(self) -> Tensor:
        """-log_prob / (D log 2), [B]: in expectation an upper bound."""
        return bits_per_dim(self.log_prob, self.dimension)


@torch.no_grad()
def ito_log_density(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    states: Tensor,
    times: Grid | Sequence[float] | Tensor,
    *,
    log_prob: Tensor | None = None,
    **cond: Any,
) -> Tensor:
    r"""Log-densities along a path of the reverse or the noising SDE.

        log p_s(x_s) = log p_t(x_t) + s_y . (y_s - y_t) - |s_y|^2/2 (k_t^2 - k_s^2)
                       + D log(alpha_t / alpha_s),   y = x/alpha, s_y = alpha_t score(x_t, t)

    With the exact score it is the log-density of the path's own state, up to an error whose
    variance falls as 1/steps; one network call a step, no divergence.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`.
        sde: the process, a Gaussian one.
        states: a path at every time, [S + 1, B, *event], as `Rollout.states` of a `GaussianChain`;
            its noise is that of the process (eta = 1).
        times: its times, monotone, [S + 1], in either direction.
        log_prob: log-density of the noisiest states, [B]; that of the prior if omitted.
        **cond: passed on to the model.

    Returns:
        Log-densities of all states, [S + 1, B] float64, in the order of `states`.

    Raises:
        ArgumentError: the process is not Gaussian.
        ShapeError: there is not one state a time.
        GridError: the times are not monotone, or alpha vanishes at one of them.

    Source:
        Skreta et al. 2024 (2412.17762), the Ito density estimator, in the variables y and
        k^2.
    """
    grid = _checked_grid(sde, as_grid(times))
    if states.ndim < 2 or len(states) != len(grid.times):
        raise ShapeError(
            f"states of shape {tuple(states.shape)} for {len(grid.times)} times: give "
            f"({len(grid.times)}, B, *event)"
        )
    check_state(states[0])
    falling = grid.times[0] > grid.times[-1]
    path = states if falling else states.flip(0)
    found = _along(
        as_model(score, sde),
        sde,
        path,
        sorted(grid.times, reverse=True),
        log_prob,
        unmarked(cond),
    )
    return found if falling else found.flip(0)


@torch.no_grad()
def ito_bound(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    x: Tensor,
    *,
    steps: int = 100,
    grid: Grid | Sequence[float] | Tensor | None = None,
    draws: int = 8,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    **cond: Any,
) -> PathEstimate:
    r"""Lower bound on the log-density of data, by the Ito estimator on noised paths.

        log p(x) >= E[log p_T(x_T) + sum over steps of the estimator | x_0 = x]

    As the grid is refined it becomes tight if the score is exact, and else, in the mean over the
    data, lower by 1/2 int E|error of s_y|^2 dk^2.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`; no derivative is taken.
        sde: the process, a Gaussian one.
        x: data at the first time, [B, *event], floating point.
        steps: steps of a grid even in log-SNR from `sde.t_min` to `sde.T`; or
        grid: increasing times, instead of `steps`.
        draws: paths K >= 1 for each sample.
        seed: seed of the counter-based noise; sample i gets the same paths in any batch.
        noise: a noise source, a `torch.Generator`, or a callable, instead of `seed`.
        **cond: passed on to the model.

    Returns:
        A `PathEstimate`.

    Raises:
        ArgumentError, GridError: as for `ito_log_density`; also for times that fall.

    Source:
        Song et al. 2021 (2101.09258), theorem 3; Huang et al. 2021 (2106.02808); the estimator is
        that of Skreta et al. 2024 (2412.17762).
    """
    check_state(x)
    if grid is None:
        made = make_grid("log_snr", sde, whole_number("steps", steps, 1, MOST), sde.t_min, sde.T)
    else:
        made = as_grid(grid)
    times = _checked_grid(sde, made).times
    if times[0] > times[-1]:
        raise GridError("the times fall: noised paths start at the data, give increasing times")
    source, model, count = (
        as_noise(noise, seed),
        as_model(score, sde),
        whole_number("draws", draws, 1, MOST),
    )
    warn_of_dropout(score)
    found = []
    for path in range(count):
        states = [x]
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            scale, std = (float(c) for c in sde.transition(s, t))
            z = source.normal(x, path * len(times) + i, Purpose.SOLVER, (s, t))
            states.append(scale * states[-1] + std * z)
        reverse = torch.stack(states[::-1])
        found.append(_along(model, sde, reverse, times[::-1], None, unmarked(cond))[-1])
    return PathEstimate(torch.stack(found), count * (len(times) - 1), math.prod(x.shape[1:]))


def _along(
    model: Model,
    sde: GaussianSDE,
    states: Tensor,
    times: Sequence[float],
    log_prob: Tensor | None,
    cond: dict[str, Any],
) -> Tensor:
    """Log-densities [S + 1, B] of `states` at falling `times`."""
    at = torch.tensor(times, dtype=torch.float64, device="cpu")
    alpha, variance = sde.alpha(at), (-sde.log_snr(at)).exp()
    flat = doubled(states.reshape(*states.shape[:2], -1))
    dimension = flat.shape[2]
    if log_prob is None:
        z = flat[0] / sde.prior_std
        constant = math.log(sde.prior_std) + math.log(2 * math.pi) / 2
        log_prob = -z.square().sum(1) / 2 - dimension * constant
    values = [doubled(log_prob) + dimension * float(alpha[0].log())]
    for i, t in enumerate(times[:-1]):
        score = model.predict("score", states[i], model_time(t, states[i]), **cond)
        slope = float(alpha[i]) * doubled(score.reshape(flat[i].shape))
        step = flat[i + 1] / float(alpha[i + 1]) - flat[i] / float(alpha[i])
        fall = float(variance[i] - variance[i + 1])
        values.append(values[-1] + (slope * step).sum(1) - fall / 2 * slope.square().sum(1))
    return torch.stack(values) - dimension * alpha.log()[:, None].to(flat.device)


def _checked_grid(sde: GaussianSDE, grid: Grid) -> Grid:
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} has no alpha and sigma: give a Gaussian process")
    grid.check(sde)
    last = max(grid.times)
    if float(sde.alpha(last)) == 0:
        raise GridError(f"alpha vanishes at t = {last:g}: let the times end before")
    return grid
