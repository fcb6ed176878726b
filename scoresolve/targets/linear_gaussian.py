"""Identities of Gaussians under linear maps: x ~ N(m, P) and y = A x + n with n ~ N(0, R).

    marginal     y ~ N(A m, S),  S = A P A^T + R
    joint        (x, y) ~ N((m, A m), [[P, P A^T], [A P, S]])
    conditional  x | y ~ N(m + G (y - A m), (I - G A) P (I - G A)^T + G R G^T),  G = P A^T S^-1
    Tweedie      E[A x | y] = y + R s(y),  Cov[A x | y] = R + R H(y) R

with the score s and its Jacobian H of the law of y, which hold for any law of x. G is the Kalman
gain; the covariance around it is Joseph's form, symmetric and semidefinite whatever the rounding.
Leading axes of m and P run over components, A and R may be shared.

Source:
    Bishop 2006, "Pattern Recognition and Machine Learning", eq. 2.113-2.117; Bucy and Joseph 1968,
    "Filtering for Stochastic Processes with Applications to Guidance"; Efron 2011, "Tweedie's
    Formula and Selection Bias", JASA 106, section 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.targets.rows import full_precision

__all__ = [
    "Conditioned",
    "Moments",
    "condition",
    "conditional",
    "joint",
    "log_density",
    "marginal",
    "tweedie",
]


class Moments(NamedTuple):
    """Mean [*K, D] and covariance [*K, D, D]."""

    mean: Tensor
    covariance: Tensor


class Conditioned(NamedTuple):
    """The law of x given y, and how likely y was.

    Attributes:
        mean: [*K, D].
        covariance: [*K, D, D].
        gain: G, [*K, D, M].
        log_evidence: log N(y; A m, S), [*K].
    """

    mean: Tensor
    covariance: Tensor
    gain: Tensor
    log_evidence: Tensor


@full_precision
def marginal(prior: Moments, operator: Tensor, noise: Tensor) -> Moments:
    """The law of y = A x + n.

    Args:
        prior: mean [*K, D] and covariance [*K, D, D] of x.
        operator: A, [M, D] or [*K, M, D].
        noise: R, [M, M] or [*K, M, M].

    Returns:
        Mean [*K, M] and covariance [*K, M, M].

    Raises:
        ShapeError: A or R has another shape.
    """
    rows, columns = operator.shape[-2:] if operator.ndim > 1 else (0, 0)
    if columns != prior.mean.shape[-1] or noise.shape[-2:] != (rows, rows):
        raise ShapeError(
            f"A of shape {tuple(operator.shape)} and R of shape {tuple(noise.shape)} for "
            f"D = {prior.mean.shape[-1]}: give [M, D] and [M, M]"
        )
    covariance = operator @ prior.covariance @ operator.mT + noise
    return Moments(_apply(operator, prior.mean), covariance)


@full_precision
def joint(prior: Moments, operator: Tensor, noise: Tensor) -> Moments:
    """The law of x and y together; arguments as in `marginal`.

    Returns:
        Mean [*K, D + M] and covariance [*K, D + M, D + M], x first.
    """
    y, cross = marginal(prior, operator, noise), operator @ prior.covariance
    top = torch.cat([prior.covariance, cross.mT], -1)
    bottom = torch.cat([cross, y.covariance], -1)
    return Moments(torch.cat([prior.mean, y.mean], -1), torch.cat([top, bottom], -2))


@full_precision
def condition(prior: Moments, operator: Tensor, noise: Tensor, y: Tensor) -> Conditioned:
    """The law of x given y = A x + n, by the Kalman gain.

    Args:
        prior, operator, noise: as in `marginal`; R may be singular, S may not.
        y: [M] or [*K, M].

    Returns:
        Mean [*K, D], covariance [*K, D, D], gain [*K, D, M] and log-evidence [*K].

    Raises:
        ArgumentError: S is singular to rounding.
        ShapeError: as in `marginal`, or y has another shape.
    """
    predicted, cross = marginal(prior, operator, noise), operator @ prior.covariance
    factor = _factor(predicted.covariance)
    gain = torch.cholesky_solve(cross, factor).mT
    if y.shape[-1:] != predicted.mean.shape[-1:]:
        raise ShapeError(f"y of shape {tuple(y.shape)}: give [{predicted.mean.shape[-1]}]")
    residual = y - predicted.mean
    kept = torch.eye(prior.mean.shape[-1], dtype=gain.dtype, device=gain.device) - gain @ operator
    return Conditioned(
        prior.mean + _apply(gain, residual),
        kept @ prior.covariance @ kept.mT + gain @ noise @ gain.mT,
        gain,
        _log_density(residual, factor),
    )


def conditional(law: Moments, known: Tensor, values: Tensor) -> Moments:
    """The law of the other coordinates given those at `known`.

    Args:
        law: mean [*K, D] and covariance [*K, D, D].
        known: [M] integers, different, or a mask [D].
        values: [M] or [*K, M], in the order of `known`.

    Returns:
        Mean [*K, D - M] and covariance [*K, D - M, D - M], in the order of the coordinates.

    Raises:
        ArgumentError: the known coordinates have a singular covariance.
    """
    identity = torch.eye(law.mean.shape[-1], dtype=law.mean.dtype, device=law.mean.device)
    chosen = identity[known]
    found = condition(law, chosen, chosen.new_zeros(len(chosen), len(chosen)), values)
    rest = chosen.sum(0) == 0
    return Moments(found.mean[..., rest], found.covariance[..., rest, :][..., rest])


@full_precision
def log_density(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance), [*K], for `x` and `mean` [*K, D] and `covariance` [*K, D, D].

    Raises:
        ArgumentError: the covariance is singular to rounding.
    """
    return _log_density(x - mean, _factor(covariance))


@full_precision
def tweedie(y: Tensor, score: Tensor, jacobian: Tensor, noise: Tensor) -> Moments:
    """Moments of the signal u of y = u + n, n ~ N(0, R), whatever the law of u.

    Args:
        y: [*K, M].
        score: s, the gradient of the log-density of y there, [*K, M].
        jacobian: H, that of the score, [*K, M, M].
        noise: R, [M, M] or [*K, M, M].

    Returns:
        E[u | y] = y + R s, [*K, M], and Cov[u | y] = R + R H R, [*K, M, M].

    Raises:
        ShapeError: `score` has not the shape of `y`.
    """
    if score.shape != y.shape:
        raise ShapeError(
            f"score of shape {tuple(score.shape)} for y of shape {tuple(y.shape)}: give one shape"
        )
    return Moments(y + _apply(noise, score), noise + noise @ jacobian @ noise)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    product: Tensor = (matrix @ vector[..., None])[..., 0]
    return product


def _factor(covariance: Tensor) -> Tensor:
    """The Cholesky factor of matrices [*K, M, M] that are positive definite beyond rounding."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square() / covariance.diagonal(dim1=-2, dim2=-1)
    least = covariance.shape[-1] * torch.finfo(covariance.dtype).eps
    if bool((info > 0).any()) or float(pivots.min()) <= least:
        raise ArgumentError(
            "a direction of y is without variance: give more noise or independent rows of operator"
        )
    return factor


def _log_density(residual: Tensor, factor: Tensor) -> Tensor:
    white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = residual.shape[-1] / 2 * math.log(2 * math.pi)
    density: Tensor = -white.square().sum((-2, -1)) / 2 - log_det - constant
    return density
