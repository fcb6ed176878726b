"""Sets of K covariance matrices, and what a mixture of Gaussians asks of them.

With V_k = alpha^2 Sigma_k + sigma^2 I and y_k = V_k^-1 (x - alpha mu_k), all that is ever needed is

    quadratic_k = (x - alpha mu_k)^T y_k,   log det V_k,   sum_k w_k (a Sigma_k + b I) y_k.

Each kind factorises its matrices once, so that this costs matrix products alone at any alpha and
sigma. Batches run along the last axis, [K, D, B], and alpha, sigma, a, b are [] or [B].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Self, TypeGuard, TypeVar

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError

__all__ = ["Covariance", "Diagonal", "Full", "Isotropic", "Number", "Resolvent"]

Number = float | Tensor
Centres = TypeVar("Centres")


class Resolvent(ABC):
    """y_k = (alpha^2 Sigma_k + sigma^2 I)^-1 (x - alpha mu_k) for every component and sample.

    Attributes:
        quadratic: (x - alpha mu_k)^T y_k, [K, B].
        log_det: log det(alpha^2 Sigma_k + sigma^2 I), [K, 1] or [K, B].
    """

    quadratic: Tensor
    log_det: Tensor

    @abstractmethod
    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        """sum_k w_k (a Sigma_k + b I) y_k, [B, D], for `weights` [K, B]."""

    @abstractmethod
    def components(self, a: Number, b: Number) -> Tensor:
        """(a Sigma_k + b I) y_k, [K, D, B]."""

    @abstractmethod
    def square_norm(self) -> Tensor:
        """|y_k|^2, [K, B]."""

    @abstractmethod
    def trace(self) -> Tensor:
        """tr (alpha^2 Sigma_k + sigma^2 I)^-1, [K, 1] or [K, B]."""


@dataclass(frozen=True, eq=False)
class Covariance(ABC, Generic[Centres]):
    """K symmetric positive semidefinite D x D matrices of one kind."""

    @abstractmethod
    def centres(self, means: Tensor) -> Centres:
        """What `at` needs to know of the means [K, D], computed once."""

    @abstractmethod
    def at(self, x: Tensor, centres: Centres, alpha: Number, sigma: Number) -> Resolvent:
        """The resolvent at the points `x` [B, D]."""

    @abstractmethod
    def affine(self, alpha: Number, sigma: Number) -> Self:
        """alpha^2 Sigma_k + sigma^2 I as the same kind, for scalar alpha and sigma."""

    @abstractmethod
    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        """Standard normals `z` [n, noise_size] to samples [n, D] of N(0, Sigma_index)."""

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """How many standard normals one sample takes."""

    @property
    @abstractmethod
    def singular(self) -> bool:
        """Whether a direction has variance 0, so that there is no density."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Self:
        """The same matrices in another dtype or on another device."""
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{name: v.to(device, dtype) for name, v in tensors.items()})

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute in for points of `dtype`: half precision is not enough."""
        return torch.promote_types(dtype, torch.float32)

    def dense(self, means: Tensor) -> Tensor:
        """All the matrices, [K, D, D]; `means` [K, D] gives the shape, dtype and device."""
        blocks = self.inverses(means, 0.0, 1.0)
        return torch.cat([block.components(1.0, 0.0) for block in blocks], 2)

    def average(self, weights: Tensor, means: Tensor) -> Tensor:
        """sum_k w_k Sigma_k, [D, D], for `weights` [K]; `means` as for `dense`."""
        blocks = self.inverses(means, 0.0, 1.0)
        return torch.cat([block.combine(weights[:, None], 1.0, 0.0) for block in blocks])

    def inverses(self, means: Tensor, alpha: Number, sigma: Number) -> Iterator[Resolvent]:
        """V_k^-1 itself: its columns, y_k for x - alpha mu_k = e_j, in blocks that bound memory.

        Args:
            means: [K, D], for the shape, dtype and device.
            alpha, sigma: [] or [B]; with [B] every block runs over its columns for each in turn.

        Yields:
            Resolvents of J columns, or of B J.
        """
        centres = self.centres(torch.zeros_like(means))
        rows = alpha.shape[0] if is_timed(alpha) else 1
        size = max(1, 2**24 // (means.numel() * rows))
        identity = torch.eye(means.shape[1]).to(means)
        for start in range(0, len(identity), size):
            block = identity[start : start + size]
            levels = (repeat_rows(level, len(block)) for level in (alpha, sigma))
            yield self.at(block.repeat(rows, 1), centres, *levels)


@dataclass(frozen=True, eq=False)
class _Spectral(Covariance[Tensor]):
    """Matrices that are diagonal in a basis of their own, with eigenvalues `values` [K, D]."""

    values: Tensor

    @abstractmethod
    def synthesise(self, coordinates: Tensor) -> Tensor:
        """Coordinates [K, D, B] in each basis to vectors [K, D, B]."""

    @abstractmethod
    def gather(self, coordinates: Tensor) -> Tensor:
        """The sum over k of `synthesise(coordinates)`, [B, D]."""

    @property
    def noise_size(self) -> int:
        return self.values.shape[1]

    @property
    def singular(self) -> bool:
        return not bool((self.values > 0).all())

    def affine(self, alpha: Number, sigma: Number) -> Self:
        return replace(self, values=alpha**2 * self.values + sigma**2)


class _SpectralResolvent(Resolvent):
    def __init__(self, kind: _Spectral, residual: Tensor, alpha: Number, sigma: Number) -> None:
        self.kind, self.values = kind, kind.values[..., None]
        self.shifted = alpha**2 * self.values + sigma**2
        self.y = residual / self.shifted
        self.quadratic = (residual * self.y).sum(1)
        self.log_det = self.shifted.log().sum(1)

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        if isinstance(a, float) and a == 0:
            return self.kind.gather(self.y * (b * weights)[:, None])
        return self.kind.gather((a * self.values + b) * self.y * weights[:, None])

    def components(self, a: Number, b: Number) -> Tensor:
        return self.kind.synthesise((a * self.values + b) * self.y)

    def square_norm(self) -> Tensor:
        return self.y.square().sum(1)

    def trace(self) -> Tensor:
        return self.shifted.reciprocal().sum(1)


@dataclass(frozen=True, eq=False)
class Full(_Spectral):
    """Sigma_k = U_k diag(values_k) U_k^T.

    Args:
        values: eigenvalues, [K, D], >= 0.
        basis: the transposed U_k, [K, D, D]; row i of `basis[k]` is an eigenvector.
    """

    basis: Tensor

    @classmethod
    def from_matrices(cls, matrices: Tensor) -> Full:
        """Factorise symmetric positive semidefinite `matrices` [K, D, D].

        Eigenvalues within rounding of zero become zero.

        Raises:
            ArgumentError: a matrix is not symmetric or has a negative eigenvalue.
        """
        eps = torch.finfo(matrices.dtype).eps
        scale = matrices.abs().amax((1, 2))
        asymmetry = (matrices - matrices.mT).abs().amax((1, 2))
        if bool((asymmetry > eps**0.5 * scale).any()):
            k = int((asymmetry - eps**0.5 * scale).argmax())
            raise ArgumentError(
                f"covariance {k} differs from its transpose by {float(asymmetry[k]):.3g}: "
                "give symmetric matrices, for example (S + S.mT) / 2"
            )
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        lowest, largest = values[:, 0], values[:, -1:]
        if bool((lowest < -(eps**0.5) * scale).any()):
            k = int(lowest.argmin())
            raise ArgumentError(
                f"covariance {k} has the eigenvalue {float(lowest[k]):.3g}: "
                "give positive semidefinite matrices"
            )
        rounding = matrices.shape[1] * eps * largest
        return cls(torch.where(values > rounding, values, 0.0), vectors.mT.contiguous())

    def centres(self, means: Tensor) -> Tensor:
        return (self.basis @ means[..., None]).flatten(0, 1)

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        residual = torch.addmm(alpha * centres, self.basis.flatten(0, 1), x.mT, beta=-1)
        shape = (*self.values.shape, x.shape[0])
        return _SpectralResolvent(self, residual.reshape(shape), alpha, sigma)

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return self.basis.mT @ coordinates

    def gather(self, coordinates: Tensor) -> Tensor:
        return coordinates.flatten(0, 1).mT @ self.basis.flatten(0, 1)

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        return grouped_matmul(index, z * self.values[index].sqrt(), self.basis)


@dataclass(frozen=True, eq=False)
class Diagonal(_Spectral):
    """Sigma_k = diag(values_k), with `values` [K, D], >= 0."""

    def centres(self, means: Tensor) -> Tensor:
        return means[..., None]

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        return _SpectralResolvent(self, x.mT.contiguous() - alpha * centres, alpha, sigma)

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def gather(self, coordinates: Tensor) -> Tensor:
        return coordinates.sum(0).mT.contiguous()

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        return z * self.values[index].sqrt()


class _Cloud(NamedTuple):
    """Means as a common centre [1, D], offsets from it [K, D] and their squared norms [K, 1]."""

    centre: Tensor
    offsets: Tensor
    norms: Tensor


@dataclass(frozen=True, eq=False)
class Isotropic(Covariance[_Cloud]):
    """Sigma_k = values_k I, with `values` [K], >= 0, for any number of components.

    Distances come from one product of the [B, D] points with the [K, D] means, so that no
    [K, D, B] array is formed. That costs digits where sigma is small, hence float64 throughout.
    """

    values: Tensor
    dimension: int

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    def centres(self, means: Tensor) -> _Cloud:
        centre = means.mean(0, keepdim=True)
        offsets = means - centre
        return _Cloud(centre, offsets, offsets.square().sum(1, keepdim=True))

    def at(self, x: Tensor, centres: _Cloud, alpha: Number, sigma: Number) -> Resolvent:
        return _IsotropicResolvent(self, x, centres, alpha, sigma)

    def affine(self, alpha: Number, sigma: Number) -> Isotropic:
        return replace(self, values=alpha**2 * self.values + sigma**2)

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        return z * self.values[index, None].sqrt()

    @property
    def noise_size(self) -> int:
        return self.dimension

    @property
    def singular(self) -> bool:
        return not bool((self.values > 0).all())


class _IsotropicResolvent(Resolvent):
    def __init__(
        self, kind: Isotropic, x: Tensor, cloud: _Cloud, alpha: Number, sigma: Number
    ) -> None:
        self.alpha, self.offsets, self.dimension = alpha, cloud.offsets, kind.dimension
        self.values = kind.values[:, None]
        self.x = x - (alpha * cloud.centre.mT).mT
        cross = cloud.offsets @ self.x.mT
        square = self.x.square().sum(1)
        self.shifted = alpha**2 * self.values + sigma**2
        distance = square - 2 * alpha * cross + alpha**2 * cloud.norms
        self.quadratic = distance / self.shifted
        self.log_det = kind.dimension * self.shifted.log()

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        weights = weights * ((a * self.values + b) / self.shifted)
        return self.x * weights.sum(0)[:, None] - (self.alpha * weights).mT @ self.offsets

    def components(self, a: Number, b: Number) -> Tensor:
        gain = (a * self.values + b) / self.shifted
        return gain[:, None] * (self.x.mT - self.alpha * self.offsets[..., None])

    def square_norm(self) -> Tensor:
        return self.quadratic / self.shifted

    def trace(self) -> Tensor:
        return self.dimension / self.shifted


def is_timed(value: Number) -> TypeGuard[Tensor]:
    """Whether a coefficient is [B], one value a sample, rather than one for all."""
    return isinstance(value, Tensor) and value.ndim == 1


def repeat_rows(value: Number, times: int) -> Number:
    """Each entry of a coefficient [B] repeated, [B * times]; a single one as it is."""
    return value.repeat_interleave(times) if is_timed(value) else value


def grouped_matmul(index: Tensor, rows: Tensor, matrices: Tensor) -> Tensor:
    """rows[i] @ matrices[index[i]], [n, D], one product for each matrix in use."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for k in sorted(set(index.tolist())):
        chosen = index == k
        out[chosen] = rows[chosen] @ matrices[k]
    return out
