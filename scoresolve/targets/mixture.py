"""Mixtures of Gaussians, the targets whose every quantity is known: sum_k pi_k N(mu_k, Sigma_k).

Under x_t = alpha x0 + sigma eps a mixture stays one, sum_k pi_k N(alpha mu_k, alpha^2 Sigma_k +
sigma^2 I); so are the law of a linear measurement y = A x + s n and the posterior given it, whose
components follow the identities of `linear_gaussian` and whose weights are

    pi_k' ~ pi_k N(y; A mu_k, A Sigma_k A^T + s^2 I).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ScoresolveError, ShapeError
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import SDE, GaussianSDE, LinearSDE, TimeLike, as_time
from scoresolve.targets.covariance import Covariance, Diagonal, Full, Isotropic
from scoresolve.targets.linear import LinearMixtureModel
from scoresolve.targets.linear_gaussian import Moments, condition, marginal
from scoresolve.targets.low_rank import LowRank
from scoresolve.targets.model import Components, MixtureModel, Point, Posterior
from scoresolve.targets.rows import full_precision

__all__ = ["GaussianMixture"]

ArrayLike = Tensor | Sequence[Any] | float


class GaussianMixture:
    """The density sum_k pi_k N(x; mu_k, Sigma_k), with all that follows from it.

    The dtype is that of `means` if it is float32 or float64; integers, lists and other arrays
    become float64. Matrices are factorised once, here.

    Args:
        weights: pi, [K], positive; they are normalised.
        means: mu, [K, *event]; D is the number of event elements.
        covariances: full [K, D, D], diagonal [K, D] or [K, *event], isotropic [K] or a number,
            or `LowRank`. Zero variances are allowed (point masses); then there is no density
            until noise is added.

    On a CPU `log_prob`, `score` and every prediction of `score_model` give a row the same bits in
    any batch. Inside `torch.autocast` all is computed as outside.

    Raises:
        ShapeError: the shapes do not agree.
        ArgumentError: a value is not finite, a weight is not positive, a covariance is not
            symmetric positive semidefinite, a dtype is complex or half precision, or an array is
            sparse or without numbers.
    """

    @full_precision
    def __init__(
        self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike | LowRank
    ) -> None:
        centres = _floating("means", means)
        if centres.ndim < 1 or not centres.numel():
            raise ShapeError(f"means of shape {tuple(centres.shape)}: give [K, *event]")
        if centres.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"means are {centres.dtype}: give float32 or float64")
        shares = _floating("weights", weights, centres)
        if shares.shape != centres.shape[:1]:
            raise ShapeError(
                f"weights of shape {tuple(shares.shape)} for {len(centres)} means: "
                "give one weight for each"
            )
        if not bool((shares > 0).all()):
            raise ArgumentError(f"the smallest weight is {float(shares.min()):.3g}: need > 0")
        self._parts = Components(
            (shares / shares.sum()).log(),
            centres.reshape(len(centres), -1),
            _covariance(covariances, centres),
            centres.shape[1:],
        )

    @classmethod
    def _of(cls, parts: Components) -> GaussianMixture:
        mixture = object.__new__(cls)
        mixture._parts = parts
        return mixture

    @classmethod
    def from_data(cls, points: ArrayLike, std: float = 0.0) -> GaussianMixture:
        """The mixture with a component of standard deviation `std` at every point.

        With `std` = 0 its score model is the ideal denoiser of a finite data set.

        Args:
            points: [K, *event].
            std: at least 0.
        """
        centres = _floating("points", points)
        return cls(centres.new_ones(len(centres)), centres, _nonnegative("std", std) ** 2)

    @classmethod
    def fit(
        cls, data: Tensor, components: int, kind: str = "full", seed: int = 0, **options: object
    ) -> GaussianMixture:
        """The mixture that scikit-learn's expectation maximisation finds for `data`.

        Args:
            data: [N, *event].
            components: K, at most N.
            kind: "full", "diag" or "spherical".
            seed: of the initialisation.
            **options: passed on to `sklearn.mixture.GaussianMixture`.

        Raises:
            ArgumentError: `kind` is not one of the three, or `components` is out of range.
            ScoresolveError: scikit-learn is not installed (extra `fit`).
        """
        if kind not in ("full", "diag", "spherical"):
            raise ArgumentError(f"kind = {kind!r}: give 'full', 'diag' or 'spherical'")
        try:
            from sklearn.mixture import GaussianMixture as Estimator
        except ImportError as error:
            raise ScoresolveError(
                "GaussianMixture.fit needs scikit-learn: pip install 'scoresolve[fit]'"
            ) from error
        rows = _floating("data", data)
        if not 1 <= components <= len(rows):
            raise ArgumentError(f"components = {components} for {len(rows)} points: give 1 to that")
        estimator = Estimator(components, covariance_type=kind, random_state=seed, **options)
        estimator.fit(rows.reshape(len(rows), -1).cpu().numpy())
        means = torch.as_tensor(estimator.means_).to(rows)
        return cls(
            torch.as_tensor(estimator.weights_),
            means.reshape(-1, *rows.shape[1:]),
            torch.as_tensor(estimator.covariances_),
        )

    def __repr__(self) -> str:
        parts = self._parts
        kind = type(parts.covariance).__name__
        return f"GaussianMixture({len(parts.means)} {kind} on {tuple(parts.event)})"

    @property
    def weights(self) -> Tensor:
        """pi, [K], with sum 1."""
        return self._parts.log_weights.exp()

    @property
    def means(self) -> Tensor:
        """mu, [K, *event]."""
        return self._parts.means.reshape(-1, *self._parts.event)

    @property
    @full_precision
    def covariances(self) -> Tensor:
        """Sigma, [K, D, D], formed on each call."""
        return self._parts.covariance.dense(self._parts.means)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one sample."""
        return self._parts.event

    @property
    @full_precision
    def mean(self) -> Tensor:
        """E[x], [*event]."""
        return (self.weights @ self._parts.means).reshape(self._parts.event)

    @property
    @full_precision
    def covariance(self) -> Tensor:
        """Cov[x] = sum_k pi_k (Sigma_k + (mu_k - E[x]) (mu_k - E[x])^T), [D, D]."""
        spread = self._parts.means - self.weights @ self._parts.means
        within = self._parts.covariance.average(self.weights, self._parts.means)
        return within + (self.weights[:, None] * spread).mT @ spread

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> GaussianMixture:
        """The same mixture in another dtype (float32 or float64) or on another device."""
        means = self._parts.means
        device = means.device if device is None else torch.empty(0, device=device).device
        return GaussianMixture._of(self._parts.to(dtype or means.dtype, device))

    @full_precision
    def sample(self, n: int, seed: int = 0, first_sample: int = 0) -> Tensor:
        """`n` independent samples, [n, *event], in the mixture's dtype and on its device.

        Sample i depends on `seed` and `first_sample` + i alone, not on `n`. Full covariances colour
        it by their symmetric root, which no choice of eigenvectors changes.

        Args:
            n: how many.
            seed: in [0, 2**64).
            first_sample: number of the first one; the rest of a larger set can be drawn later.
        """
        means, covariance = self._parts.means, self._parts.covariance
        noise = Philox(seed, first_sample)
        uniform = noise.uniform(means.new_empty(n, 1, dtype=torch.float64), 0, Purpose.TARGET)
        edges = self.weights.double().cumsum(0)[:-1]
        index = torch.searchsorted(edges, uniform[:, 0].contiguous())
        z = noise.normal(means.new_empty(n, covariance.noise_size), 1, Purpose.TARGET)
        return (means[index] + covariance.colour(index, z)).reshape(n, *self._parts.event)

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at `x` [B, *event], [B] in the dtype of `x`.

        Raises:
            ArgumentError: a component has a direction without variance, so no density exists.
            ShapeError: `x` is not [B, *event].
        """
        self._require_density()
        return self._parts.read(Point.log_prob, x, 1.0, 0.0)

    def score(self, x: Tensor) -> Tensor:
        """grad log density at `x` [B, *event], shape and dtype of `x`; raises as `log_prob`."""
        self._require_density()
        return self._parts.read(Point.mean, x, 1.0, 0.0, 0.0, 0.0, -1.0)

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob` and `score` at `x` for about the price of the score."""
        self._require_density()
        return self._parts.read(Point.log_prob_and_score, x, 1.0, 0.0)

    @full_precision
    def marginal(self, sde: GaussianSDE, t: TimeLike) -> GaussianMixture:
        """The exact law of x_t, of the same kind of covariance.

        Args:
            sde: a Gaussian process.
            t: one time.

        Raises:
            ShapeError: `t` is not a single time.
        """
        time = as_time(t)
        if time.numel() != 1:
            raise ShapeError(f"t of shape {tuple(time.shape)}: a marginal has one time")
        alpha, sigma = float(sde.alpha(time)), float(sde.sigma(time))
        parts = self._parts
        return GaussianMixture._of(
            Components(
                parts.log_weights,
                alpha * parts.means,
                parts.covariance.affine(alpha, sigma),
                parts.event,
            )
        )

    @overload
    def score_model(self, sde: LinearSDE) -> LinearMixtureModel: ...  # type: ignore[overload-overlap]
    @overload
    def score_model(self, sde: SDE) -> MixtureModel: ...
    def score_model(self, sde: SDE) -> MixtureModel | LinearMixtureModel:
        """The exact score model of this mixture under a Gaussian or linear process `sde`."""
        if isinstance(sde, LinearSDE):
            parts = self._parts
            dense = parts.covariance.dense(parts.means)
            return LinearMixtureModel(parts.log_weights, parts.means, dense, parts.event, sde)
        return MixtureModel(self._parts, sde)

    def posterior(self, sde: SDE, x: Tensor, t: TimeLike) -> Posterior:
        """Mean [B, *event] and covariance [B, D, D] of x0 given x_t = `x` at `t` [] or [B]."""
        return self.score_model(sde).posterior(x, t)

    @full_precision
    def condition(self, operator: Tensor, y: Tensor, noise_std: float) -> GaussianMixture:
        """The exact posterior given the measurement y = A x + noise_std n, n ~ N(0, I).

        Its components have full covariances, so D must be moderate.

        Args:
            operator: A, [M, D], acting on flattened events.
            y: [M].
            noise_std: at least 0; with 0, A must have full row rank where there is variance.

        Raises:
            ShapeError: `operator` or `y` has another shape.
            ArgumentError: the measurement has no density (zero noise on a fixed direction).

        Source:
            Bishop 2006, "Pattern Recognition and Machine Learning", eq. 2.113-2.117, for each
            component, with the covariance in Joseph's form.
        """
        prior, a, noise = self._measurement(operator, noise_std)
        target = _floating("y", y, a)
        if target.shape != a.shape[:1]:
            raise ShapeError(
                f"y of shape {tuple(target.shape)} for an operator of shape {tuple(a.shape)}: "
                "give [M] and [M, D]"
            )
        found = condition(prior, a, noise, target)
        weights = self._parts.log_weights + found.log_evidence
        return GaussianMixture._of(
            Components(
                weights.log_softmax(0),
                found.mean,
                Full.from_matrices(found.covariance),
                self._parts.event,
            )
        )

    @full_precision
    def measured(self, operator: Tensor, noise_std: float) -> GaussianMixture:
        """The exact law of the measurement y = A x + noise_std n, n ~ N(0, I), on [M].

        Its `log_prob` is the evidence that `condition` weighs components by. Arguments and errors
        as for `condition`; without noise it may have no density.
        """
        law = marginal(*self._measurement(operator, noise_std))
        return GaussianMixture._of(
            Components(
                self._parts.log_weights,
                law.mean,
                Full.from_matrices(law.covariance),
                law.mean.shape[1:],
            )
        )

    def _measurement(self, operator: Tensor, noise_std: float) -> tuple[Moments, Tensor, Tensor]:
        """Moments of the components [K, D], A [M, D] and the covariance of the noise [M, M]."""
        means = self._parts.means
        a = _floating("operator", operator, means)
        if a.ndim != 2 or a.shape[1] != means.shape[1]:
            raise ShapeError(
                f"operator of shape {tuple(a.shape)} for D = {means.shape[1]}: give [M, D]"
            )
        variance = _nonnegative("noise_std", noise_std) ** 2
        noise = variance * torch.eye(len(a), dtype=a.dtype, device=a.device)
        return Moments(means, self._parts.covariance.dense(means)), a, noise

    def _require_density(self) -> None:
        if self._parts.singular:
            raise ArgumentError(
                "the mixture has directions without variance and so no density: "
                "use marginal(sde, t) or score_model(sde) at a time with noise"
            )


def _floating(name: str, values: ArrayLike, like: Tensor | None = None) -> Tensor:
    """Finite real `values` as a floating tensor, in the dtype and on the device of `like`."""
    given = as_tensor(name, values)
    if given.layout is not torch.strided or given.is_meta:
        kind = "on the meta device" if given.is_meta else f"of layout {given.layout}"
        raise ArgumentError(f"{name} are {kind}: give a dense tensor that holds its numbers")
    if given.is_complex():
        raise ArgumentError(f"{name} are {given.dtype}: give real numbers")
    given = given.detach() if given.is_floating_point() else given.to(torch.float64)
    if not bool(torch.isfinite(given).all()):
        raise ArgumentError(f"{name} hold values that are not finite: give finite numbers")
    return given if like is None else given.to(like)


def as_tensor(name: str, values: ArrayLike) -> Tensor:
    """`values` as a tensor; what is none yet becomes float64.

    Raises:
        ArgumentError: they are no numbers, or lists of different lengths.
    """
    if isinstance(values, Tensor):
        return values
    # The default device is where the user works, but the meta device holds no numbers.
    home = "cpu" if torch.get_default_device().type == "meta" else None
    try:
        return torch.as_tensor(values, dtype=torch.float64, device=home)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} are no array of numbers ({error}): give numbers") from error


def _nonnegative(name: str, value: float) -> float:
    if not (value >= 0 and math.isfinite(value)):
        raise ArgumentError(f"{name} = {value}: give a finite number, at least 0")
    return float(value)


def _covariance(given: ArrayLike | LowRank, means: Tensor) -> Covariance[Any]:
    """The covariance kind that the shape of `given` says, for `means` [K, *event]."""
    components, dimension = len(means), means[0].numel()
    if isinstance(given, LowRank):
        if given.factor.shape[:2] != (components, dimension):
            raise ShapeError(
                f"low-rank factor of shape {tuple(given.factor.shape)} for means of shape "
                f"{tuple(means.shape)}: give ({components}, {dimension}, R)"
            )
        factor, diagonal = given.factor, given.diagonal
        return LowRank(_floating("factor", factor, means), _floating("diagonal", diagonal, means))
    matrices = _floating("covariances", given, means)
    if matrices.shape == (components, dimension, dimension):
        return Full.from_matrices(matrices)
    if bool((matrices < 0).any()):
        raise ArgumentError(f"a variance is {float(matrices.min()):.3g}: give at least 0")
    if matrices.shape in ((), (components,)):
        return Isotropic(matrices.expand(components), dimension)
    if matrices.shape in ((components, dimension), means.shape):
        return Diagonal(matrices.reshape(components, dimension))
    raise ShapeError(
        f"covariances of shape {tuple(matrices.shape)} for means of shape {tuple(means.shape)}: "
        f"give ({components}, {dimension}, {dimension}), ({components}, {dimension}), "
        f"({components},) or a number"
    )
