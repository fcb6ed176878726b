"""Distances that are sums over all pairs of samples, held a block at a time.

Over a symmetric kernel k, without the terms i = j,

    MMD^2 = sum k(x_i, x_j) / N(N - 1) + sum k(y_i, y_j) / M(M - 1) - 2 sum k(x_i, y_j) / N M,

unbiased, with k = exp(-r^2 / 2 h^2), r the distance of two points; with k = -r it is the energy
distance. For a score s and k = (1 + r^2 / h^2)^-1/2 the mean of the Stein kernel

    u(x, x') = k s(x).s(x') + s(x).grad' k + s(x').grad k + tr grad grad' k

is 0 under the law whose score is s. A floor of many splits costs one pass over the pairs: with
U [B, n] the splits as zeros and ones, all the sums follow from diag(U K U^T) and K 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresolve.distances.floor import FEWEST, Distance, against_floor
from scoresolve.distances.pairs import Pair, Unavailable
from scoresolve.errors import real_number, whole_number
from scoresolve.noise import Purpose
from scoresolve.precision import doubled

__all__ = ["energy", "ksd", "median_distance", "mmd"]

Block = Callable[[slice, slice], Tensor]


def energy(pair: Pair, *, draws: int = 199) -> Distance:
    """The energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, unbiased, in the unit of x.

    0 for equal laws alone; finite samples may give less.

    Args:
        pair: of `distances.pair`.
        draws: splits of the floor, at least 19.

    Raises:
        ArgumentError: `draws` is below 19.

    Source:
        Szekely, Rizzo 2013, "Energy statistics: a class of statistics based on distances".
    """
    value, floor = _two_sample(pair, lambda squares: squares.sqrt_().neg_(), draws)
    return against_floor("energy", value, floor, pair)


def mmd(pair: Pair, *, bandwidth: float | None = None, draws: int = 199) -> Distance:
    """The squared maximum mean discrepancy of the kernel exp(-|x - y|^2 / 2 h^2), unbiased.

    0 for equal laws alone; finite samples may give less.

    Args:
        pair: of `distances.pair`.
        bandwidth: h > 0; unless given, the median distance of two points of the reference.
        draws: splits of the floor, at least 19.

    Raises:
        ScoresolveError: that median is 0.
        ArgumentError: `draws` is below 19, or the bandwidth is not above 0.

    Source:
        Gretton et al. 2012, "A kernel two-sample test", eq. 3.
    """
    h = _bandwidth(pair, bandwidth)
    value, floor = _two_sample(pair, lambda squares: squares.mul_(-0.5 / h**2).exp_(), draws)
    return against_floor("mmd", value, floor, pair, detail=f"bandwidth {h:.4g}")


def ksd(pair: Pair, *, bandwidth: float | None = None, draws: int = 199) -> Distance:
    """The squared kernel Stein discrepancy with the inverse multiquadric kernel, unbiased.

    It takes samples and the score of the reference. 0 for the right law; finite samples may give
    less. The floor multiplies u(x, x') of exact samples, or of the samples themselves where none
    can be drawn, by random signs of both points.

    Args:
        pair: of `distances.pair`, of a target with `score` or with `score=`.
        bandwidth: h > 0; unless given, the median distance of two points of the reference.
        draws: sets of signs for the floor, at least 19.

    Raises:
        ScoresolveError: there is no score, or that median is 0.
        ArgumentError: `draws` is below 19, or the bandwidth is not above 0.

    Source:
        Liu, Lee, Jordan 2016 (1602.03253); the kernel: Gorham, Mackey 2017 (1703.01717).
    """
    h = _bandwidth(pair, bandwidth)
    count = whole_number("draws", draws, least=FEWEST)
    n = len(pair.x)

    def mean_over_pairs(x: Tensor, weights: Tensor) -> Tensor:
        block = _stein(x, pair.score(x), h)
        return _forms(block, weights, pair.chunk)[0] / (n * (n - 1))

    value = float(mean_over_pairs(pair.x, pair.x.new_ones(1, n))[0])
    exact = pair.x if pair.target is None else pair.null(0)[0]
    signs = pair.noise.signs(pair.x.new_empty(count, n), 0, Purpose.DISTANCE)
    floor = mean_over_pairs(exact, signs)
    origin = f"random signs on {'the samples' if pair.target is None else 'exact samples'}"
    return against_floor("ksd", value, floor, pair, detail=f"bandwidth {h:.4g}", origin=origin)


def median_distance(points: Tensor, most: int = 1000) -> float:
    """The median distance of two of the first `most` points of [M, D]."""
    return float(torch.nn.functional.pdist(doubled(points[:most])).median())


def _bandwidth(pair: Pair, given: float | None) -> float:
    h = median_distance(pair.y) if given is None else real_number("bandwidth", given, above=0)
    if h == 0:
        raise Unavailable(
            "mmd and ksd need a bandwidth: more than half of the pairs of the reference coincide, "
            "so that their median distance is 0; call distances.mmd or ksd with one"
        )
    return h


def _two_sample(pair: Pair, kernel: Callable[[Tensor], Tensor], draws: int) -> tuple[float, Tensor]:
    """The discrepancy of the pair and, [draws], of splits of one that differs by chance."""
    n, m = pair.sizes
    count = whole_number("draws", draws, least=FEWEST)
    splits = pair.x.new_zeros(count, n + m)
    for number, split in enumerate(splits):
        # Order 0 made the pair itself where there is no target.
        split[pair.order(number + 1)[:n]] = 1
    halves = pair.x.new_zeros(1, n + m)
    halves[:, :n] = 1

    def discrepancy(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
        block = _of_distances(torch.cat([x, y]), kernel)
        xx, sums = _forms(block, members, pair.chunk)
        xy = members.double() @ sums - xx
        yy = sums.sum() - 2 * xy - xx
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    value = float(discrepancy(pair.x, pair.y, halves)[0])
    return value, discrepancy(*pair.null(0), splits)


def _of_distances(points: Tensor, kernel: Callable[[Tensor], Tensor]) -> Block:
    """Blocks of `kernel`, which may write into the squared distances it is given."""
    centred = points - points.mean(0)
    norms = centred.square().sum(1)

    def block(rows: slice, columns: slice) -> Tensor:
        cross = torch.addmm(norms[columns], centred[rows], centred[columns].mT, alpha=-2)
        return kernel(cross.add_(norms[rows, None]).clamp_(min=0))

    return block


def _stein(x: Tensor, score: Tensor, h: float) -> Block:
    """Blocks of the Stein kernel, with q = 1 + r^2 / h^2 and k = q^-1/2."""
    centred = x - x.mean(0)
    norms, own = centred.square().sum(1), (centred * score).sum(1)
    dimension = x.shape[1]

    def block(rows: slice, columns: slice) -> Tensor:
        a, b = centred[rows], centred[columns]
        squares = (norms[rows, None] + norms[columns] - 2 * a @ b.mT).clamp_(min=0)
        # (s(x') - s(x)).(x - x')
        turn = a @ score[columns].mT + score[rows] @ b.mT - own[rows, None] - own[columns]
        q = 1 + squares / h**2
        k = q.rsqrt()
        slope = k / q
        return (
            k * (score[rows] @ score[columns].mT)
            + slope * (dimension - turn) / h**2
            - 3 * slope / q * squares / h**4
        )

    return block


def _forms(block: Block, weights: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """w K w^T of every row w of `weights` [B, n], and K 1 [n], without K's diagonal; float64."""
    n = weights.shape[1]
    forms = weights.new_zeros(len(weights), dtype=torch.float64)
    sums = weights.new_zeros(n, dtype=torch.float64)
    parts = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    for i, rows in enumerate(parts):
        for columns in parts[i:]:
            values = block(rows, columns)
            if rows == columns:
                values.fill_diagonal_(0)
            form = ((weights[:, rows] @ values) * weights[:, columns]).sum(1)
            sums[rows] += values.sum(1)
            if rows != columns:
                form = 2 * form
                sums[columns] += values.sum(0)
            forms += form
    return forms, sums
