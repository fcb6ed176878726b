"""Exact errors of samplers, ours or not, on data N(0, v).

There every sampler is affine, x_0 = A x_T + sum_j b_j z_j, so feeding unit vectors as the start and
as the draws gives A and all b_j in one run, and with them the exact variance of what it samples.
Orders are slopes over several halvings of the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.noise import CallableNoise
from scoresolve.sde import GaussianSDE

F64 = torch.float64
VARIANCE = 0.25
INSIDE = (0.5, 0.1)
"""Times of VP between which every step matters."""
HALVED = (40, 80, 160)
Run = Callable[[Sequence[float], Tensor, Any], Tensor]


def model_of(sde: GaussianSDE, variance: float = VARIANCE) -> ss.Model:
    return ss.targets.gaussian([0.0], [variance]).score_model(sde)


def std(sde: GaussianSDE, t: float, variance: float = VARIANCE) -> float:
    return math.hypot(float(sde.alpha(t)) * math.sqrt(variance), float(sde.sigma(t)))


def our(name: str, sde: GaussianSDE) -> Run:
    return lambda times, x, noise: ss.plan(name, sde, times).run(
        model_of(sde), x, CallableNoise(noise)
    )


def variance_of(run: Run, sde: GaussianSDE, times: Sequence[float]) -> float:
    """Exact variance of the samples at `times[-1]`, over the true one."""
    x = torch.zeros(4 * len(times), 1, dtype=F64)
    x[0] = std(sde, times[0])
    row = itertools.count(1)

    def unit(like: Tensor, t: float, s: float) -> Tensor:
        z = torch.zeros_like(like)
        z[next(row)] = 1.0
        return z

    return float(run(times, x, unit).square().sum()) / std(sde, times[-1]) ** 2


def errors(
    run: Run,
    sde: GaussianSDE,
    steps: Sequence[int],
    grid: str = "log_snr",
    ends: tuple[float | None, float | None] = (None, None),
) -> list[float]:
    """Relative errors of the variance at several numbers of steps."""
    grids = (ss.make_grid(grid, sde, n, *ends).times for n in steps)
    return [abs(variance_of(run, sde, times) - 1) for times in grids]


def slope(found: Sequence[float], steps: Sequence[int]) -> float:
    """Order of accuracy between the first and the last of the errors."""
    return math.log(found[0] / found[-1]) / math.log(steps[-1] / steps[0])
