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
from scoresolve.targets.covariance import Covariance, Resolvent, grouped_product
from scoresolve.targets.rows import Number, across, each_product, last_sum, product

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
        ArgumentError: `diagonal` is negative, or one is no floating tensor.
    """

    factor: Tensor
    diagonal: Tensor

    def __post_init__(self) -> None:
        for name, given in (("factor", self.factor), ("diagonal", self.diagonal)):
            if not (isinstance(given, Tensor) and given.is_floating_point()):
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise ArgumentError(f"{name} is {kind}: give a floating tensor")
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
        return means

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        return _LowRankResolvent(self, x[:, None] - across(alpha, 2) * centres, alpha, sigma)

    def affine(self, alpha: Number, sigma: Number) -> LowRank:
        return replace(
            self, factor=alpha * self.factor, diagonal=alpha**2 * self.diagonal + sigma**2
        )

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        rank = self.factor.shape[2]
        spread = self.diagonal.reshape(len(self.diagonal), -1)[index].sqrt()
        return grouped_product(index, z[:, :rank], self.factor.mT) + spread * z[:, rank:]

    @property
    def noise_size(self) -> int:
        return self.factor.shape[1] + self.factor.shape[2]

    @property
    def singular(self) -> bool:
        return not bool((self.diagonal > 0).all())


class _LowRankResolvent(Resolvent):
    def __init__(self, kind: LowRank, residual: Tensor, alpha: Number, sigma: Number) -> None:
        self.factor, self.square_scale = kind.factor, across(alpha**2, 1)
        self.diagonal = kind.diagonal.reshape(len(kind.diagonal), -1)
        self.shifted = across(alpha**2, 2) * self.diagonal + across(sigma**2, 2)
        rank = kind.factor.shape[2]
        identity = torch.eye(rank, dtype=residual.dtype, device=residual.device)
        inner = identity + across(alpha**2, 3) * self._gram(self.shifted.reciprocal())
        self.cholesky = torch.linalg.cholesky_ex(inner).L
        self.latent = self._solve(each_product(residual / self.shifted, self.factor))
        self.spanned = each_product(self.latent, self.factor.mT)
        rest = residual - across(alpha**2, 2) * self.spanned
        self.y = rest / self.shifted
        latent_square = last_sum(self.latent.square())
        self.quadratic = last_sum(rest * self.y) + self.square_scale * latent_square
        log_inner = 2 * last_sum(self.cholesky.diagonal(dim1=-2, dim2=-1).log())
        self.log_det = self._sum(self.shifted.log()) + log_inner

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        if isinstance(a, float) and a == 0:
            return (self.y * (across(b, 1) * weights)[..., None]).sum(1)
        latent = (self.latent * (across(a, 1) * weights)[..., None]).flatten(1)
        rest = (self._own(a, b) * weights[..., None]).sum(1)
        return rest + product(latent, self.factor.mT.flatten(0, 1))

    def components(self, a: Number, b: Number) -> Tensor:
        return across(a, 2) * self.spanned + self._own(a, b)

    def square_norm(self) -> Tensor:
        return last_sum(self.y.square())

    def trace(self) -> Tensor:
        inverse = self.shifted.reciprocal()
        inner = torch.cholesky_solve(self._gram(inverse.square()), self.cholesky)
        lost = last_sum(inner.diagonal(dim1=-2, dim2=-1))
        return self._sum(inverse) - self.square_scale * lost

    def _own(self, a: Number, b: Number) -> Tensor:
        """(a d + b) y, [B, K, D]."""
        return (across(a, 2) * self.diagonal + across(b, 2)) * self.y

    def _gram(self, weights: Tensor) -> Tensor:
        """F^T diag(weights) F for `weights` [K, D or 1] or [B, K, D or 1], [K or B, K, R, R]."""
        factor = self.factor
        if weights.ndim == 2:
            return (factor * weights[..., None]).mT @ factor
        products = (factor[..., :, None] * factor[..., None, :]).flatten(2)
        weights = weights.expand(-1, -1, factor.shape[1])
        gram = each_product(weights, products)
        return gram.reshape(*gram.shape[:2], factor.shape[2], factor.shape[2])

    def _solve(self, rows: Tensor) -> Tensor:
        """M^-1 of each row of `rows` [B, K, R]."""
        if self.cholesky.ndim == 4:
            return torch.cholesky_solve(rows[..., None], self.cholesky)[..., 0]
        # one factor for all rows: substitution would mix them, products with its inverse do not
        identity = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
        inverse = torch.linalg.solve_triangular(
            self.cholesky, identity.expand_as(self.cholesky), upper=False
        )
        return each_product(each_product(rows, inverse.mT), inverse)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over D of `values` [..., D or 1], which a multiple of the identity shares."""
        return last_sum(values) * (self.factor.shape[1] // values.shape[-1])
