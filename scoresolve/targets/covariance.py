"""Sets of K covariance matrices, and what a mixture of Gaussians asks of them.

With V_k = alpha^2 Sigma_k + sigma^2 I and y_k = V_k^-1 (x - alpha mu_k), all that is ever needed is

    quadratic_k = (x - alpha mu_k)^T y_k,   log det V_k,   sum_k w_k (a Sigma_k + b I) y_k.

Each kind factorises its matrices once, so that this costs matrix products alone at any alpha and
sigma. Batches run along the first axis, [B, K, D], and alpha, sigma, a, b are [] or [B]. All of it
is made of what `rows` offers, so that a row does not depend on its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.targets.rows import Number, across, each_product, is_timed, last_sum, product

__all__ = ["Covariance", "Diagonal", "Full", "Isotropic", "Resolvent"]

Centres = TypeVar("Centres")


class Resolvent(ABC):
    """y_k = (alpha^2 Sigma_k + sigma^2 I)^-1 (x - alpha mu_k) for every component and sample.

    Attributes:
        quadratic: (x - alpha mu_k)^T y_k, [B, K].
        log_det: log det(alpha^2 Sigma_k + sigma^2 I), [K] or [B, K].
    """

    quadratic: Tensor
    log_det: Tensor

    @abstractmethod
    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        """sum_k w_k (a Sigma_k + b I) y_k, [B, D], for `weights` [B, K]."""

    @abstractmethod
    def components(self, a: Number, b: Number) -> Tensor:
        """(a Sigma_k + b I) y_k, [B, K, D]."""

    @abstractmethod
    def square_norm(self) -> Tensor:
        """|y_k|^2, [B, K]."""

    @abstractmethod
    def trace(self) -> Tensor:
        """tr (alpha^2 Sigma_k + sigma^2 I)^-1, [K] or [B, K]."""


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
        return torch.cat([block.components(1.0, 0.0).permute(1, 2, 0) for block in blocks], 2)

    def average(self, weights: Tensor, means: Tensor) -> Tensor:
        """sum_k w_k Sigma_k, [D, D], for `weights` [K]; `means` as for `dense`."""
        blocks = self.inverses(means, 0.0, 1.0)
        rows = (block.combine(weights.expand_as(block.quadratic), 1.0, 0.0) for block in blocks)
        return torch.cat(list(rows))

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
        identity = torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
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
        """Coordinates [B, K, D] in each basis to vectors [B, K, D]."""

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
        self.kind, self.values = kind, kind.values
        self.shifted = across(alpha**2, 2) * self.values + across(sigma**2, 2)
        self.y = residual / self.shifted
        self.quadratic = last_sum(residual * self.y)
        self.log_det = last_sum(self.shifted.log())

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        if isinstance(a, float) and a == 0:
            return self.kind.gather(self.y * (across(b, 1) * weights)[..., None])
        return self.kind.gather(self._gain(a, b) * self.y * weights[..., None])

    def components(self, a: Number, b: Number) -> Tensor:
        return self.kind.synthesise(self._gain(a, b) * self.y)

    def square_norm(self) -> Tensor:
        return last_sum(self.y.square())

    def trace(self) -> Tensor:
        return last_sum(self.shifted.reciprocal())

    def _gain(self, a: Number, b: Number) -> Tensor:
        return across(a, 2) * self.values + across(b, 2)


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
        return (self.basis @ means[..., None])[..., 0]

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        coordinates = product(x, self.basis.flatten(0, 1).mT).reshape(len(x), *self.values.shape)
        return _SpectralResolvent(self, coordinates - across(alpha, 2) * centres, alpha, sigma)

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return each_product(coordinates, self.basis)

    def gather(self, coordinates: Tensor) -> Tensor:
        return product(coordinates.flatten(1), self.basis.flatten(0, 1))

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        # The symmetric root alone does not hang on the signs and the order of the eigenvectors.
        root = (self.basis.mT * self.values.sqrt()[:, None]) @ self.basis
        return grouped_product(index, z, root)


@dataclass(frozen=True, eq=False)
class Diagonal(_Spectral):
    """Sigma_k = diag(values_k), with `values` [K, D], >= 0."""

    def centres(self, means: Tensor) -> Tensor:
        return means

    def at(self, x: Tensor, centres: Tensor, alpha: Number, sigma: Number) -> Resolvent:
        return _SpectralResolvent(self, x[:, None] - across(alpha, 2) * centres, alpha, sigma)

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def gather(self, coordinates: Tensor) -> Tensor:
        return coordinates.sum(1)

    def colour(self, index: Tensor, z: Tensor) -> Tensor:
        return z * self.values[index].sqrt()


class _Cloud(NamedTuple):
    """Means as a common centre [1, D], offsets from it [K, D] and their squared norms [K]."""

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
        return _Cloud(centre, offsets, last_sum(offsets.square()))

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
        self.values = kind.values
        scale, square_scale = across(alpha, 1), across(alpha**2, 1)
        self.x = x - scale * cloud.centre
        distance = last_sum(self.x.square())[:, None]
        self.shifted = square_scale * self.values + across(sigma**2, 1)
        if len(cloud.offsets) > 1:  # one alone has no offset
            cross = product(self.x, cloud.offsets.mT)
            distance = distance - 2 * scale * cross + square_scale * cloud.norms
        self.quadratic = distance / self.shifted
        self.log_det = kind.dimension * self.shifted.log()

    def combine(self, weights: Tensor, a: Number, b: Number) -> Tensor:
        weights = weights * self._gain(a, b)
        if len(self.offsets) == 1:
            return self.x * weights
        lost = product(across(self.alpha, 1) * weights, self.offsets)
        return self.x * last_sum(weights)[:, None] - lost

    def components(self, a: Number, b: Number) -> Tensor:
        residual = self.x[:, None] - across(self.alpha, 2) * self.offsets
        return self._gain(a, b)[..., None] * residual

    def square_norm(self) -> Tensor:
        return self.quadratic / self.shifted

    def trace(self) -> Tensor:
        return self.dimension / self.shifted

    def _gain(self, a: Number, b: Number) -> Tensor:
        return (across(a, 1) * self.values + across(b, 1)) / self.shifted


def repeat_rows(value: Number, times: int) -> Number:
    """Each entry of a coefficient [B] repeated, [B * times]; a single one as it is."""
    return value.repeat_interleave(times) if is_timed(value) else value


def grouped_product(index: Tensor, rows: Tensor, matrices: Tensor) -> Tensor:
    """rows[i] @ matrices[index[i]], [n, D], one product for each matrix in use."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for k in sorted(set(index.tolist())):
        chosen = index == k
        out[chosen] = product(rows[chosen], matrices[k])
    return out
