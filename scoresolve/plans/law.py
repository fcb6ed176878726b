"""The exact law of a plan on Gaussian data.

For x_0 ~ N(mu, Sigma) every prediction is affine in x and acts on each eigenvector of Sigma
alone: with eigenvalue v, E[p x0 + q eps | x] = p mu + k (x - alpha mu),
k = (p alpha v + q sigma) / (alpha^2 v + sigma^2). So the output of a plan is

    y = gain x_T + offset + sum_k c_k z_k

per eigenvector: the offset by one pass forwards, the gain and all c_k by one pass backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, short
from scoresolve.models import prediction_rows
from scoresolve.plans.stages import Call, Combine, Draw, Mark, Stage
from scoresolve.precision import host
from scoresolve.sde import SchedulePoint

__all__ = ["Law", "Traced", "propagate"]

Array = NDArray[np.float64]


class Traced(Protocol):
    """The part of a plan that fixes its law; see `Plan`."""

    @property
    def solver(self) -> str: ...
    @property
    def process(self) -> str: ...
    @property
    def denoised(self) -> bool: ...
    @property
    def start(self) -> SchedulePoint | None: ...
    @property
    def end(self) -> SchedulePoint | None: ...
    @property
    def prior_std(self) -> float | None: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def output(self) -> int: ...


@dataclass(frozen=True)
class Law:
    """Exact output law of a plan on Gaussian data, per eigenvector of the data covariance.

    Attributes:
        basis: eigenvectors as columns, [D, D]; None if the covariance was diagonal.
        gain: derivative of the output with respect to the start, [D].
        noise_variance: variance that the solver's own noise adds, [D].
        output_mean: mean of the output in the basis, [D].
        start_mean, start_variance: law of the start in the basis, [D].
        target_mean, target_variance: law that a perfect solver would reach, [D]: the marginal
            at the last time, or its denoised law if the plan ends with a call to sigma = 0.
        target_gain: derivative of the exact probability-flow map, [D].
    """

    basis: Tensor | None
    gain: Tensor
    noise_variance: Tensor
    output_mean: Tensor
    start_mean: Tensor
    start_variance: Tensor
    target_mean: Tensor
    target_variance: Tensor
    target_gain: Tensor

    @property
    def output_variance(self) -> Tensor:
        """Variance of the output along the eigenvectors, [D]."""
        return self.gain**2 * self.start_variance + self.noise_variance

    @property
    def mean(self) -> Tensor:
        """Mean of the output, [D]."""
        return self.output_mean if self.basis is None else self.basis @ self.output_mean

    @property
    def covariance(self) -> Tensor:
        """Covariance of the output, [D, D]."""
        return self._matrix(self.output_variance)

    @property
    def cross_covariance(self) -> Tensor:
        """Covariance of the output with the start, [D, D]."""
        return self._matrix(self.gain * self.start_variance)

    @property
    def mean_error(self) -> float:
        """RMS over coordinates of output mean minus target mean."""
        return float((self.output_mean - self.target_mean).square().mean().sqrt())

    @property
    def variance_error(self) -> float:
        """Largest |output variance / target variance - 1| over the eigenvectors."""
        return float((self.output_variance / self.target_variance - 1).abs().max())

    @property
    def path_error(self) -> float:
        """RMS per coordinate between the output and the exact probability-flow image of its start.

        Meaningful for deterministic plans, where it is the strong error.
        """
        shift = self.output_mean - self.target_mean
        slope = self.gain - self.target_gain
        centre = shift + self.target_gain * (self._marginal_start_mean - self.start_mean)
        total = centre**2 + slope**2 * self.start_variance + self.noise_variance
        return float(total.mean().sqrt())

    @property
    def wasserstein(self) -> float:
        """2-Wasserstein distance between output law and target law."""
        spread = self.output_variance.sqrt() - self.target_variance.sqrt()
        return float(((self.output_mean - self.target_mean) ** 2 + spread**2).sum().sqrt())

    _marginal_start_mean: Tensor

    def _matrix(self, diagonal: Tensor) -> Tensor:
        if self.basis is None:
            return torch.diag(diagonal)
        return self.basis * diagonal @ self.basis.T


def propagate(
    plan: Traced,
    mean: Tensor | Sequence[float] | float,
    covariance: Tensor | Sequence[Any] | float,
    start: str,
) -> Law:
    """The law of `plan`; see `Plan.law`."""
    if plan.start is None or plan.end is None or plan.prior_std is None:
        raise ArgumentError(
            f"{plan.process} is not a Gaussian process: its plans have no exact law"
        )
    if opaque := next(
        (s for s in plan.stages if not isinstance(s, Call | Combine | Draw | Mark)), None
    ):
        raise ArgumentError(
            f"the plan of {plan.solver!r} has a {opaque.kind} stage at t = {opaque.t:g}, which is "
            "not linear: it has no exact law"
        )
    mu, variance, basis = _eigen(mean, covariance)
    calls = [stage for stage in plan.stages if isinstance(stage, Call)]
    slopes, shifts = _predictions(calls, mu, variance)
    affine = {call.out: (slopes[i], shifts[i]) for i, call in enumerate(calls)}
    marginal_mean = plan.start.alpha * mu
    marginal_variance = plan.start.alpha**2 * variance + plan.start.sigma**2
    if start == "prior":
        start_mean = np.zeros_like(mu)
        start_variance = np.full_like(mu, plan.prior_std**2)
    elif start == "marginal":
        start_mean, start_variance = marginal_mean, marginal_variance
    else:
        raise ArgumentError(f"start = {start!r}: choose 'prior' or 'marginal'")

    zero = np.zeros_like(mu)
    values: dict[int, Array] = {0: start_mean}
    for stage in plan.stages:
        if isinstance(stage, Call):
            slope, shift = affine[stage.out]
            values[stage.out] = slope * values[stage.x] + shift
        elif isinstance(stage, Draw):
            values[stage.out] = zero
        elif isinstance(stage, Combine):
            values[stage.out] = sum((c * values[r] for r, c in stage.terms), start=zero)

    adjoint: dict[int, Array] = {plan.output: np.ones_like(mu)}
    noise_variance = zero
    for stage in reversed(plan.stages):
        if isinstance(stage, Mark) or stage.out not in adjoint:
            continue
        weight = adjoint.pop(stage.out)
        if isinstance(stage, Draw):
            noise_variance = noise_variance + weight**2
        elif isinstance(stage, Call):
            adjoint[stage.x] = adjoint.get(stage.x, zero) + affine[stage.out][0] * weight
        elif isinstance(stage, Combine):
            for register, coefficient in stage.terms:
                adjoint[register] = adjoint.get(register, zero) + coefficient * weight

    end_variance = plan.end.alpha**2 * variance + plan.end.sigma**2
    target_gain = np.sqrt(end_variance / marginal_variance)
    target_mean, target_variance = plan.end.alpha * mu, end_variance
    if plan.denoised:
        last = Call(-1, -1, 0.0, "x0", plan.end)
        (shrink,), (shift,) = _predictions([last], mu, variance)
        target_mean = shrink * target_mean + shift
        target_gain, target_variance = shrink * target_gain, shrink**2 * target_variance
    return Law(
        basis=None if basis is None else torch.from_numpy(basis),
        gain=_tensor(adjoint.get(0, zero)),
        noise_variance=_tensor(noise_variance),
        output_mean=_tensor(values[plan.output]),
        start_mean=_tensor(start_mean),
        start_variance=_tensor(start_variance),
        target_mean=_tensor(target_mean),
        target_variance=_tensor(target_variance),
        target_gain=_tensor(target_gain),
        _marginal_start_mean=_tensor(marginal_mean),
    )


def _eigen(
    mean: Tensor | Sequence[float] | float, covariance: Tensor | Sequence[Any] | float
) -> tuple[Array, Array, Array | None]:
    """Mean and variances in the eigenbasis of the covariance, and the basis."""
    try:
        mu, sigma = host(mean), host(covariance)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"mean = {short(mean)}, covariance = {short(covariance)}: give numbers"
        ) from error
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise ArgumentError("mean or covariance is not finite: give finite numbers")
    mu = mu[None] if mu.ndim == 0 else mu
    dimension = max(mu.shape[0], sigma.shape[-1] if sigma.ndim else 1)
    if mu.ndim > 1 or sigma.ndim > 2 or mu.shape[0] not in (1, dimension):
        raise ShapeError(
            f"mean of shape {tuple(mu.shape)} and covariance of shape {tuple(sigma.shape)}: "
            "give [D] and [D, D], [D] or a number"
        )
    if sigma.ndim == 2 and sigma.shape[0] != sigma.shape[1]:
        raise ShapeError(f"covariance of shape {tuple(sigma.shape)} is not square")
    if sigma.ndim and sigma.shape[-1] != dimension:
        raise ShapeError(f"covariance has D = {sigma.shape[-1]}, the mean has D = {dimension}")
    mu = mu.expand(dimension).clone()
    if sigma.ndim < 2:
        variance, basis = sigma.expand(dimension).clone(), None
    else:
        if not torch.allclose(sigma, sigma.T):
            raise ArgumentError("the covariance is not symmetric")
        variance, basis = torch.linalg.eigh(sigma)
        mu = basis.T @ mu
    if variance.min() < -1e-10 * variance.abs().max():
        raise ArgumentError(f"the covariance has the negative eigenvalue {float(variance.min()):g}")
    return mu.numpy(), variance.clamp(min=0.0).numpy(), None if basis is None else basis.numpy()


def _predictions(calls: Sequence[Call], mu: Array, variance: Array) -> tuple[Array, Array]:
    """Slope and shift of each call's prediction as an affine function of x, [calls, D]."""
    columns: list[tuple[float, float, float, float, bool]] = []
    for call in calls:
        assert call.point is not None
        p, q = prediction_rows(call.prediction, call.point)
        alpha, sigma = call.point.alpha, call.point.sigma
        columns.append((float(p), float(q), float(alpha), float(sigma), call.prediction == "score"))
    p, q, alpha, sigma, is_score = np.array(columns, dtype=np.float64).reshape(-1, 5).T[..., None]
    total = alpha**2 * variance + sigma**2
    slope = np.where(is_score > 0, -1.0, p * alpha * variance + q * sigma) / total
    return slope, p * mu - slope * alpha * mu


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values))
