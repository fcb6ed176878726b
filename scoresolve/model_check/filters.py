"""The best linear filter of the data, which a denoiser must beat.

Of data with mean m and covariance C, and y = x0 + k eps, it is m + C (C + k^2 I)^-1 (y - m). C is
estimated from the one half of the points and the filter applied to the other, so that it has not
seen what it filters, and shrunk towards a multiple of the identity, so that it exists for fewer
points than dimensions.

Source:
    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices",
    for the shrinkage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresolve.precision import doubled

__all__ = ["LinearFilter"]


class LinearFilter:
    """Filters every second point of some data by what the other points tell.

    Args:
        data: [N, *event], N >= 4.
    """

    def __init__(self, data: Tensor) -> None:
        rows = doubled(data.flatten(1))
        self.halves = [_Half(rows[1::2]), _Half(rows[::2])]

    def errors(self, data: Tensor, y: Tensor, k: float) -> Tensor:
        """|x0_hat - x0|^2 of each point, [N] in float64.

        Args:
            data: the points that the filter was made of.
            y: the noised points x0 + k eps, shape of `data`.
            k: the noise level.
        """
        rows, clean = doubled(y.flatten(1)), doubled(data.flatten(1))
        found = rows.new_empty(len(rows))
        for start, half in enumerate(self.halves):
            error = half.filter(rows[start::2], k) - clean[start::2]
            found[start::2] = error.square().sum(1)
        return found


class _Half:
    """Mean and covariance V diag(c) V^T + c0 (I - V V^T) of some points [n, D]."""

    def __init__(self, rows: Tensor) -> None:
        count, size = rows.shape
        self.mean = rows.mean(0)
        centred = rows - self.mean
        _, singular, self.axes = torch.linalg.svd(centred, full_matrices=False)
        variances = singular.square() / count
        average, square = variances.sum() / size, variances.square().sum()
        fourth = centred.square().sum(1).square().sum() / count**2
        apart = square - size * average**2
        noise = torch.minimum(fourth - square / count, apart)
        shrinkage = torch.where(apart > 0, noise / apart, 0.0)
        self.rest = shrinkage * average
        self.variances = (1 - shrinkage) * variances + self.rest

    def filter(self, y: Tensor, k: float) -> Tensor:
        centred = y - self.mean
        gain, rest = (c / (c + k**2) for c in (self.variances, self.rest))
        along = (centred @ self.axes.mT) * (gain - rest)
        filtered: Tensor = self.mean + rest * centred + along @ self.axes
        return filtered
