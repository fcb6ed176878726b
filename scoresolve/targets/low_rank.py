"""Covariances of low rank plus a diagonal, Sigma_k = F_k F_k^T + diag(d_k).

With E = alpha^2 d + sigma^2 and M = I + alpha^2 F^T E^-1 F, the Woodbury identity gives

    h = M^-1 F^T E^-1 r,   y = V^-1 r = E^-1 (r - alpha^2 F h),   Sigma y = F h + d y,
    r^T y = |E^-1/2 (r - alpha^2 F h)|^2 + alpha^2 |h|^2,   log det V = sum log E + log det M,

each free of differences of large terms. The matrices to invert are R x R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.targets.covariance import Covariance, Number, Resolvent, grouped_matmul, is_timed

__all__ = ["LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank(Covariance[Tensor]):
    """K covariances F_k F_k^T + diag(d_k), light for images: no D x D matrix is formed.

    Args:
        factor: F, [K, D, R] floating, R >= 1.
        diagonal: d, [K, D], or [K] for multiples of the identity; >= 0. Where it is 0, the
            mixture is treated as one without a density at t = 0.

    Raises:
        ShapeError: `factor` or `diagonal` has another shape.
        ArgumentError: `diagonal` is negative.
    """

    factor: Tensor
    diagonal: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.factor.shape)
        if len(shape) != 3 or shape[2] < 1:
            raise ShapeError(f"factor of shape {shape}: give [K, D, R] with R >= 1")
        if self.diagonal.shape not in (shape[:1], shape[:2]):
            raise ShapeError(
                f"diagonal of shape {tuple(self.diagonal.shape)} for a factor of shape {shape}: "
                f"give {shape[:1]} or {shape[:2]}"
            )
        if bool((self.diagonal < 0).any()):
            lowest = float(self.diagonal.min())
            raise ArgumentError(f"diagonal holds {lowest:.3g}: give variances, at least 0")

    def centres(self, means: Tensor) -> Tensor:
        return means[..., None]

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        return _LowRankResolvent(self, x.mT.contiguous() - alpha * centres, alpha, sigma)

    def affine(self, alpha: Number, sigma: Number) -> LowRank:
        return replace(
            self, factor=alpha * self.factor, diagonal=alpha**2 * self.diagonal + sigma**2
        )

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        rank = self.factor.shape[2]
        spread = self.diagonal.reshape(len(self.diagonal), -1)[index].sqrt()
        return grouped_matmul(index, z[:, :rank], self.factor.mT) + spread * z[:, rank:]

    @property
    def noise_size(self) -> int:
        return self.factor.shape[1] + self.factor.shape[2]

    @property
    def singular(self) -> bool:
        return not bool((self.diagonal > 0).all())


class _LowRankResolvent(Resolvent):
    def __init__(self, kind: LowRank, residual: Tensor, alpha: Number, sigma: Number) -> None:
        self.factor, self.alpha = kind.factor, alpha
        self.diagonal = kind.diagonal.reshape(len(kind.diagonal), -1, 1)
        self.shifted = alpha**2 * self.diagonal + sigma**2
        identity = torch.eye(kind.factor.shape[2]).to(residual)
        inner = identity + _matrices(alpha**2) * self._gram(self.shifted.reciprocal())
        self.cholesky = torch.linalg.cholesky_ex(inner).L
        self.latent = self._solve(self.factor.mT @ (residual / self.shifted))
        rest = residual - alpha**2 * (self.factor @ self.latent)
        self.y = rest / self.shifted
        self.quadratic = (rest * self.y).sum(1) + alpha**2 * self.latent.square().sum(1)
        log_inner = 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.log_det = self._sum(self.shifted.log()) + log_inner

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        weights = weights[:, None]
        if isinstance(a, float) and a == 0:
            return (self.y * (b * weights)).sum(0).mT.contiguous()
        latent = (self.latent * (a * weights)).flatten(0, 1)
        rest = (self.y * ((a * self.diagonal + b) * weights)).sum(0)
        return torch.addmm(rest.mT, latent.mT, self.factor.mT.flatten(0, 1))

    def components(self, a: Number, b: Number) -> Tensor:
        return a * (self.factor @ self.latent) + (a * self.diagonal + b) * self.y

    def square_norm(self) -> Tensor:
        return self.y.square().sum(1)

    def trace(self) -> Tensor:
        inverse = self.shifted.reciprocal()
        inner = torch.cholesky_solve(self._gram(inverse.square()), self.cholesky)
        lost = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
        return self._sum(inverse) - self.alpha**2 * lost

    def _gram(self, weights: Tensor) -> Tensor:
        """F^T diag(weights) F for `weights` [K, D or 1, 1 or B], as [K, 1 or B, R, R]."""
        factor = self.factor
        if weights.shape[2] == 1:
            return ((factor * weights).mT @ factor)[:, None]
        products = (factor[..., :, None] * factor[..., None, :]).flatten(2)
        gram = weights.expand(-1, factor.shape[1], -1).mT @ products
        return gram.reshape(*gram.shape[:2], factor.shape[2], factor.shape[2])

    def _solve(self, columns: Tensor) -> Tensor:
        """M^-1 columns for `columns` [K, R, B]."""
        if self.cholesky.shape[1] == 1:
            return torch.cholesky_solve(columns, self.cholesky[:, 0])
        return torch.cholesky_solve(columns.mT[..., None], self.cholesky)[..., 0].mT

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the D rows of `values` [K, D or 1, 1 or B], which a multiple of I shares."""
        return values.sum(1) * (self.factor.shape[1] // values.shape[1])


def _matrices(value: Number) -> Number:
    """A coefficient [] or [B], shaped to multiply [K, B, R, R]."""
    return value[:, None, None] if is_timed(value) else value
