"""Distances along random directions, and the exact Wasserstein distance.

In one dimension the optimal plan sorts, W_p^p = int_0^1 |F^-1(u) - G^-1(u)|^p du, and the
Kolmogorov-Smirnov statistic is sup |F - G|. Directions theta_l are uniform on the sphere:

    sliced W_p^p = mean over l of W_p^p(theta_l . x, theta_l . y).

In several dimensions W_p is the cheapest assignment of N points to N points, or, for sets of
different sizes, a linear program.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import ks_2samp
from torch import Tensor

from scoresolve.distances.floor import Distance, against_floor, draw_floor
from scoresolve.distances.pairs import LEAST, Pair, Unavailable
from scoresolve.errors import real_number, whole_number
from scoresolve.noise import Purpose

__all__ = ["directions", "ks", "sliced_wasserstein", "wasserstein"]


def sliced_wasserstein(
    pair: Pair, *, order: float = 2, projections: int = 128, draws: int = 39
) -> Distance:
    """The sliced Wasserstein distance W_p, in the unit of x.

    Args:
        pair: of `distances.pair`.
        order: p >= 1.
        projections: number of directions; in one dimension there is one.
        draws: of the floor, at least 19.

    Raises:
        ArgumentError: a number is out of range.

    Source:
        Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    p = real_number("order", order, least=1)
    along = directions(pair, projections)

    def statistic(x: Tensor, y: Tensor) -> float:
        return float(_transport(along @ x.mT, along @ y.mT, p).mean() ** (1 / p))

    return against_floor(
        "sliced_wasserstein",
        statistic(pair.x, pair.y),
        draw_floor(pair, statistic, draws),
        pair,
        detail=f"order {p:g}, {len(along)} projections",
    )


def wasserstein(pair: Pair, *, order: float = 2, most: int = 500, draws: int = 39) -> Distance:
    """The exact Wasserstein distance W_p between the two sets, in the unit of x.

    In one dimension all rows are used. Between sets of different sizes in several dimensions it
    needs POT (extra `distances`).

    Args:
        pair: of `distances.pair`.
        order: p >= 1.
        most: rows to take of either set, at random; the cost grows as their cube.
        draws: of the floor, at least 19.

    Raises:
        ScoresolveError: POT is needed and not installed.
        ArgumentError: a number is out of range.

    Source:
        Villani 2009, "Optimal transport: old and new", chapter 6; scipy's assignment, or POT.
    """
    p = real_number("order", order, least=1)
    most = whole_number("most", most, least=LEAST, most=10_000)
    pair = pair if pair.x.shape[1] == 1 else pair.take(most)

    def statistic(x: Tensor, y: Tensor) -> float:
        if x.shape[1] == 1:
            return float(_transport(x.mT, y.mT, p) ** (1 / p))
        centre = y.double().mean(0)  # cdist rounds in units of the largest norm
        cost = torch.cdist(x.double() - centre, y.double() - centre).pow_(p).cpu().numpy()
        if len(x) == len(y):
            return float(cost[linear_sum_assignment(cost)].mean() ** (1 / p))
        try:
            from ot import emd2
        except ImportError as error:
            raise Unavailable(
                f"wasserstein between {len(x)} and {len(y)} rows needs POT: pip install "
                "'scoresolve[distances]', or give sets of one size"
            ) from error
        return float(emd2([], [], cost, numItermax=10**7) ** (1 / p))

    value = statistic(pair.x, pair.y)
    floor = draw_floor(pair, statistic, draws)
    return against_floor("wasserstein", value, floor, pair, detail=f"order {p:g}")


def ks(pair: Pair, *, projections: int = 64, draws: int = 39) -> Distance:
    """The Kolmogorov-Smirnov statistic of the worst of several random projections, 0 to 1.

    Its p-value is scipy's for that projection times their number (Bonferroni), at most 1.

    Args:
        pair: of `distances.pair`.
        projections: number of directions; in one dimension there is one.
        draws: of the floor, at least 19.

    Raises:
        ArgumentError: a number is out of range.

    Source:
        Hodges 1958, "The significance probability of the Smirnov two-sample test".
    """
    along = directions(pair, projections)

    def statistics(x: Tensor, y: Tensor) -> Tensor:
        return _kolmogorov_smirnov(along @ x.mT, along @ y.mT)

    worst = int(statistics(pair.x, pair.y).argmax())
    first, second = ((along @ each.mT)[worst].cpu().numpy() for each in (pair.x, pair.y))
    found = ks_2samp(first, second)
    return against_floor(
        "ks",
        float(found.statistic),
        draw_floor(pair, lambda x, y: float(statistics(x, y).max()), draws),
        pair,
        detail=f"worst of {len(along)} projections: number {worst}",
        p_value=min(1.0, len(along) * float(found.pvalue)),
    )


def directions(pair: Pair, count: int) -> Tensor:
    """Directions uniform on the sphere, [count, D]; in one dimension the one, [1, 1].

    Direction l depends on the seed and l alone.
    """
    count = whole_number("projections", count)
    dimension = pair.x.shape[1]
    if dimension == 1:
        return pair.x.new_ones(1, 1)
    normal = pair.noise.normal(pair.x.new_empty(count, dimension), 0, Purpose.DISTANCE)
    return torch.nn.functional.normalize(normal, dim=1)


def _transport(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p^p of every row of `x` [L, N] and `y` [L, M], [L]."""
    n, m = x.shape[1], y.shape[1]
    first, second = _sorted(x), _sorted(y)
    if n == m:
        return (first - second).abs_().pow_(p).mean(1)
    # In units of 1 / NM the quantile functions step at the multiples of M and of N.
    ends = (
        torch.cat(
            [torch.arange(1, n + 1, device="cpu") * m, torch.arange(1, m + 1, device="cpu") * n]
        )
        .sort()
        .values
    )
    steps = ends.diff(prepend=ends.new_zeros(1))
    rows, others = (((ends - 1) // size).to(x.device) for size in (m, n))
    weights = (steps.double() / (n * m)).to(x)
    moved: Tensor = (first[:, rows] - second[:, others]).abs_().pow_(p)
    return moved @ weights


def _kolmogorov_smirnov(x: Tensor, y: Tensor) -> Tensor:
    """sup |F - G| of every row of `x` [L, N] and `y` [L, M], float64 [L]."""
    both = torch.cat([x, y], 1)
    # numpy sorts some ten times as fast as torch on a CPU.
    order = torch.from_numpy(both.numpy().argsort(1)) if _on_cpu(both) else both.argsort(1)
    steps = torch.full(order.shape, -1 / y.shape[1], dtype=torch.float64, device=x.device)
    steps[order < x.shape[1]] = 1 / x.shape[1]
    gaps = steps.cumsum(1)[:, :-1].abs_()
    values = both.gather(1, order)
    gaps[values[:, 1:] == values[:, :-1]] = 0  # between equal values neither law has a value
    return gaps.max(1).values


def _sorted(x: Tensor) -> Tensor:
    """The rows of `x` [L, N], each in order."""
    return torch.from_numpy(np.sort(x.numpy(), axis=1)) if _on_cpu(x) else x.sort(1).values


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"
