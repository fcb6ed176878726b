r"""Nodes along the probability flow, and the weights of everything that is a sum over them.

With x' = x/alpha, k = sigma/alpha and g = c^2/(c^2 + k^2), the state y = x'/sqrt(k^2 + c^2) has

    dy/dlog k = -(x0 - g x')/sqrt(k^2 + c^2),   log p_0(x) = log N(y_inf; 0, I) - D log c
                                                             - int (tr dx0/dx' - g D) dlog k

for all k from 0 to infinity. The clock u = sqrt(atan(k/c)) runs over [0, sqrt(pi/2)], and both
integrands are smooth in it, their behaviour at its ends known: one set of nodes serves the Adams
method for the path and, with a cubic spline through all of them, the integral of the trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import BSpline, CubicSpline, make_interp_spline
from scipy.sparse.linalg import spsolve

from scoresolve.precision import host
from scoresolve.sde import GaussianSDE
from scoresolve.solvers.adaptive.drift import rounded_inside

__all__ = ["ORDER", "Nodes", "allocate", "lagrange_weights", "place_nodes"]

Array = npt.NDArray[np.float64]

ORDER: Final = 4
"""Slopes that the Adams predictor and corrector use."""

_END: Final = math.sqrt(math.pi / 2)
_FARTHEST: Final = 1000.0  # in units of c: beyond, the data are too small to matter
_LOG_SHARE: Final = 0.03  # nodes lie evenly in u + this * log k, so that no decade goes without


@dataclass(frozen=True)
class Nodes:
    """Nodes of a flow from data (first) to noise (last).

    Attributes:
        c: scale of the data per coordinate.
        times, alpha, sigma: the schedule at the nodes.
        clock: u at the nodes.
        rate: dlog k/du at the nodes.
        weights: of the trace in the integral over log k, from 0 to the last node.
        coarse: the same by every second node alone, 0 at the others.
        last: u at the last time of the process, at least that of the last node.
    """

    c: float
    times: Array
    alpha: Array
    sigma: Array
    clock: Array
    rate: Array
    weights: Array
    coarse: Array
    last: float

    def __len__(self) -> int:
        return len(self.times)

    @property
    def k(self) -> Array:
        """sigma/alpha at the nodes."""
        return self.sigma / self.alpha

    @property
    def radius(self) -> Array:
        """sqrt(sigma^2 + c^2 alpha^2), the size of x for y of size 1."""
        return np.hypot(self.sigma, self.c * self.alpha)

    @property
    def distrusted(self) -> int:
        """How many of the last nodes, 0 or 1, are not asked what lies beyond, see `path`."""
        return int(_END - self.clock[-1] < self.clock[-1] - self.clock[-2])

    def weights_between(self, past: Sequence[int], start: float, end: float) -> Array:
        """Weights of the slopes at the nodes `past` for the integral over u from start to end."""
        return lagrange_weights(self.clock[list(past)], start, end)


def place_nodes(
    sde: GaussianSDE, c: float, count: int, t_start: float, t_end: float, *, single: bool = False
) -> Nodes:
    """`count` nodes, evenly in u between two times of a process.

    Args:
        sde: the process.
        c: scale of the data per coordinate, > 0.
        count: at least 2.
        t_start, t_end: times, increasing; nodes go no farther than sigma/alpha = 1000 c.
        single: whether the network will be called with times in float32.
    """
    ends = np.exp(-sde.log_snr(host([t_start, t_end])).numpy() / 2)
    low, last = (math.sqrt(math.atan(float(k) / c)) for k in ends)
    high = max(min(last, math.sqrt(math.atan(_FARTHEST))), (low + last) / 2)
    low = max(low, 0.01)
    bottom, top = (math.log(math.tan(u**2)) for u in (low, high))
    fine = np.linspace(bottom, top, 2048)
    place = np.sqrt(np.arctan(np.exp(fine))) + _LOG_SHARE * fine
    k = c * np.exp(np.interp(np.linspace(place[0], place[-1], count), place, fine))
    times = sde.time_from_log_snr(torch.from_numpy(-2 * np.log(k))).clamp(t_start, t_end)
    if single:
        times = times.float().clamp(*rounded_inside(t_start, t_end, torch.float32)).double()
    alpha, sigma = sde.alpha(times).numpy(), sde.sigma(times).numpy()
    angle = np.arctan2(sigma, c * alpha)
    clock, rate = np.sqrt(angle), 2 * np.sqrt(angle) / (np.sin(angle) * np.cos(angle))
    half = np.unique(np.r_[0:count:2, count - 1])
    weights, coarse = _integral(clock) * rate, np.zeros(count)
    coarse[half] = _integral(clock[half]) * rate[half]
    weights[0] += 0.5
    coarse[0] += 0.5  # the integrand grows with k^2 up to the first node
    return Nodes(
        c=c,
        times=times.numpy(),
        alpha=alpha,
        sigma=sigma,
        clock=clock,
        rate=rate,
        weights=weights,
        coarse=coarse,
        last=max(last, float(clock[-1])),
    )


def _integral(clock: Array) -> Array:
    """Weights of the integral of the cubic spline through values at the nodes."""
    if len(clock) < 4:
        few: Array = CubicSpline(clock, np.eye(len(clock))).integrate(clock[0], clock[-1])
        return few
    spline = make_interp_spline(clock, clock)
    areas = (spline.t[4:] - spline.t[:-4]) / 4  # of the basis splines
    values = BSpline.design_matrix(clock, spline.t, 3)
    weights: Array = spsolve(values.T.tocsc(), areas)
    return weights


def lagrange_weights(nodes: Array, start: float, end: float) -> Array:
    """Weights of values at `nodes` [n] in the integral of the polynomial through them."""
    points, shares = _legendre(len(nodes) // 2 + 1)
    points, shares = start + (end - start) * (points + 1) / 2, shares * (end - start) / 2
    itself = np.eye(len(nodes), dtype=bool)
    rising = np.where(itself, 1.0, (points[:, None] - nodes)[:, None]).prod(2)
    weights: Array = shares @ rising / np.where(itself, 1.0, nodes[:, None] - nodes).prod(1)
    return weights


_legendre = functools.cache(np.polynomial.legendre.leggauss)


def allocate(density: Array, total: int) -> npt.NDArray[np.int64]:
    """Whole numbers of at least 1, about proportional to `density` [n], with the sum max(total, n).

    Args:
        density: weight times standard deviation of each term; the variance of the sum is least
            for counts in that proportion.
        total: their sum.

    Source:
        Neyman 1934, "On the two different aspects of the representative method".
    """
    count = len(density)
    left = max(total, count)
    density = np.where(np.isfinite(density) & (density > 0), density, 0.0)
    if not density.any():
        density = np.ones(count)
    share = density / density.sum() * left
    while (share < 1).any():  # give 1 to those below it, the rest to the others
        small = share <= 1
        free = density[~small].sum()
        if free == 0:
            break
        share = np.where(small, 1.0, density / free * (left - small.sum()))
    counts: npt.NDArray[np.int64] = np.maximum(1, np.floor(share)).astype(np.int64)
    order = np.argsort(counts - share, kind="stable")
    counts[order[: left - counts.sum()]] += 1
    return counts
