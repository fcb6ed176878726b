"""The exact score model of a mixture of Gaussians under any Gaussian process.

Given component k and x_t = alpha x0 + sigma eps, every prediction m = p x0 + q eps has the mean

    E[m | x, k] = p mu_k + (p alpha Sigma_k + q sigma I) V_k^-1 (x - alpha mu_k),
    V_k = alpha^2 Sigma_k + sigma^2 I,

weighted by w_k(x) proportional to pi_k N(x; alpha mu_k, V_k). Nothing is divided by alpha, nor by
sigma where Sigma_k has full rank, so it holds at both ends of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError, is_transformed
from scoresolve.models import PREDICTIONS, Model, scale_of_data
from scoresolve.precision import widest
from scoresolve.sde import SDE, GaussianSDE, TimeLike, as_time
from scoresolve.targets.covariance import Covariance, repeat_rows
from scoresolve.targets.rows import (
    Number,
    across,
    full_precision,
    is_timed,
    last_sum,
    product,
    shares,
)

__all__ = ["Components", "MixtureModel", "Point", "Posterior"]

Result = TypeVar("Result")

# Rows of a part are a multiple of the first number, with about the product of both as elements
# [B, K, D], so that a core's cache holds them; shorter parts pay for their calls.
_ROWS, _PART = 192, 2**9
# From here on torch shares a sum among threads (GRAIN_SIZE of ATen).
_GRAIN: Final = 2**15


class Posterior(NamedTuple):
    """Moments of x0 given x_t.

    Attributes:
        mean: E[x0 | x_t], [B, *event].
        covariance: Cov[x0 | x_t], [B, D, D].
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Components:
    """The parts of a mixture, validated: log-weights [K], means [K, D] and covariances.

    Attributes:
        event: the event shape, whose elements are the D dimensions.
    """

    log_weights: Tensor
    means: Tensor
    covariance: Covariance[Any]
    event: torch.Size
    centres: Any = field(init=False, repr=False)
    singular: bool = field(init=False)
    _casts: dict[tuple[torch.dtype, torch.device], Components] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "centres", self.covariance.centres(self.means))
        object.__setattr__(self, "singular", self.covariance.singular)

    def to(self, dtype: torch.dtype, device: torch.device) -> Components:
        """The same mixture in another dtype or on another device; kept once made."""
        if (dtype, device) == (self.means.dtype, self.means.device):
            return self
        if (dtype, device) not in self._casts:
            self._casts[dtype, device] = replace(
                self,
                log_weights=self.log_weights.to(device, dtype),
                means=self.means.to(device, dtype),
                covariance=self.covariance.to(dtype, device),
            )
        return self._casts[dtype, device]

    @full_precision
    def read(
        self,
        quantity: Callable[..., Result],
        x: Tensor,
        alpha: Number,
        sigma: Number,
        *row: Number,
    ) -> Result:
        """A quantity of `Point` at each row of `x`, in parts that fit a cache.

        Args:
            quantity: a method of `Point`; it returns a tensor [B, ...] or a tuple of such.
            x: [B, *event].
            alpha, sigma: [] or [B].
            *row: further arguments of the method, [] or [B].

        Raises:
            ShapeError, ArgumentError: `x` has another shape or no real floating dtype.
        """
        if x.shape[1:] != self.event or not x.ndim:
            raise ShapeError(
                f"x of shape {tuple(x.shape)} for a mixture over events of shape "
                f"{tuple(self.event)}: give (B, {', '.join(map(str, self.event))})"
            )
        if not x.is_floating_point():
            raise ArgumentError(f"x is {x.dtype}: give a real floating dtype")
        dtype, count, whole = self.covariance.compute_dtype(x.dtype), len(x), (alpha, sigma, *row)
        if dtype is torch.float64 and widest(x.device) is not dtype:
            levels = [value.cpu() if isinstance(value, Tensor) else value for value in whole]
            on_host = self.read(quantity, x.cpu(), levels[0], levels[1], *levels[2:])
            return _join(lambda values: values[0].to(x.device), [on_host])
        parts = self.to(dtype, x.device)
        if count == 1 and self._splits_one_row(x):
            twice = [repeat_rows(value, 2) for value in whole]
            point = Point(parts, x.expand(2, *x.shape[1:]), twice[0], twice[1])
            return _join(lambda values: values[0][:1], [quantity(point, *twice[2:])])
        size = count if x.device.type != "cpu" else max(1, _PART // parts.means.numel()) * _ROWS
        if count <= size:
            return quantity(Point(parts, x, alpha, sigma), *row)
        found = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            levels = [value[part] if is_timed(value) else value for value in whole]
            found.append(quantity(Point(parts, x[part], levels[0], levels[1]), *levels[2:]))
        return _join(torch.cat, found)

    def _splits_one_row(self, x: Tensor) -> bool:
        """Whether threads share a sum of a single row, which they do with no other batch."""
        longest = max(len(self.means), self.means.shape[1] if len(self.means) == 1 else 1)
        return x.device.type == "cpu" and torch.get_num_threads() > 1 and longest >= _GRAIN


class Point:
    """Quantities of the mixture's law, sum_k pi_k N(alpha mu_k, V_k), at the points `x`."""

    def __init__(self, parts: Components, x: Tensor, alpha: Number, sigma: Number) -> None:
        self.parts, self.x = parts, x
        self.alpha, self.sigma = _like(alpha, parts.means), _like(sigma, parts.means)
        rows = x.reshape(x.shape[0], parts.means.shape[1]).to(parts.means.dtype)
        self.resolvent = parts.covariance.at(rows, parts.centres, self.alpha, self.sigma)
        exponent = self.resolvent.quadratic + self.resolvent.log_det
        self.logits = torch.sub(parts.log_weights, exponent, alpha=0.5).contiguous()

    def log_prob(self) -> Tensor:
        """log sum_k pi_k N(x; alpha mu_k, V_k), [B]."""
        constant = self.parts.means.shape[1] / 2 * math.log(2 * math.pi)
        return (self.logits.logsumexp(1) - constant).to(self.x.dtype)

    def mean(self, p: Number, a: Number, b: Number) -> Tensor:
        """sum_k w_k [p mu_k + (a Sigma_k + b I) V_k^-1 (x - alpha mu_k)], shape of `x`."""
        p, a, b = (_like(value, self.parts.means) for value in (p, a, b))
        weights = shares(self.logits)
        result = self.resolvent.combine(weights, a, b)
        if not (isinstance(p, float) and p == 0):
            result = result + product(across(p, 1) * weights, self.parts.means)
        return result.to(self.x.dtype).reshape(self.x.shape)

    def log_prob_and_score(self) -> tuple[Tensor, Tensor]:
        """Both from one resolvent."""
        return self.log_prob(), self.mean(0.0, 0.0, -1.0)

    def divergence(self) -> Tensor:
        """Trace of the Jacobian of the score, [B].

        sum_k w_k (|s_k|^2 - tr V_k^-1) - |s|^2, with s_k the score of component k.
        """
        weights = shares(self.logits)
        score = self.resolvent.combine(weights, 0.0, -1.0)
        parts = weights * (self.resolvent.square_norm() - self.resolvent.trace())
        return (last_sum(parts) - last_sum(score.square())).to(self.x.dtype)

    def posterior(self) -> Posterior:
        """Moments of x0 given `x`: each component's, and the spread between components."""
        weights = shares(self.logits)
        means = self.parts.means + self.resolvent.components(self.alpha, 0.0)
        mean = (weights[..., None] * means).sum(1)
        spread = means - mean[:, None]
        # row by row: a product of batches is another one for each size of the batch
        pairs = zip((weights[..., None] * spread).mT, spread, strict=True)
        covariance = self._within(weights)
        if len(spread):
            covariance = covariance + torch.stack([left @ right for left, right in pairs])
        return Posterior(mean.to(self.x.dtype).reshape(self.x.shape), covariance.to(self.x.dtype))

    def _within(self, weights: Tensor) -> Tensor:
        """sum_k w_k sigma^2 Sigma_k V_k^-1, [B, D, D], from the columns of the identity."""
        weights = weights * across(self.sigma**2, 1)
        result = []
        for block in self.parts.covariance.inverses(self.parts.means, self.alpha, self.sigma):
            columns = block.components(1.0, 0.0)
            if is_timed(self.alpha):
                columns = columns.reshape(len(weights), -1, *columns.shape[1:])
                summed = (weights[:, None, :, None] * columns).sum(2)
            else:
                flat = columns.movedim(1, 0).flatten(1)
                summed = product(weights, flat).reshape(len(weights), *columns[:, 0].shape)
            result.append(summed.mT)
        return torch.cat(result, 2)


class MixtureModel(Model):
    """The exact score model of a mixture: every prediction, density and divergence.

    It is differentiable and works under `torch.func`. Half precision is computed in float32,
    isotropic components in float64; results have the dtype of `x`.

    Args:
        components: the mixture, see `GaussianMixture.score_model`.
        sde: the process; it must be Gaussian.

    Raises:
        ArgumentError: `sde` is not Gaussian.

    Source:
        Bishop 2006, "Pattern Recognition and Machine Learning", eq. 2.113-2.117, for each
        component.
    """

    sde: GaussianSDE

    def __init__(self, components: Components, sde: SDE) -> None:
        if not isinstance(sde, GaussianSDE):
            raise ArgumentError(
                f"the marginals of {sde} are not known in closed form: give a Gaussian process"
            )
        self.components, self.sde = components, sde

    @cached_property
    @full_precision
    def data_scale(self) -> float:  # type: ignore[override]
        """About the noise level sigma/alpha at which the mixture's modes part."""
        parts, weights = self.components, self.components.log_weights.exp()
        spread = parts.means - weights @ parts.means
        within = parts.covariance.average(weights, parts.means).diagonal()
        variance = (within + weights @ spread.square()).mean()
        return scale_of_data(math.sqrt(float(variance)), parts.means.shape[1])

    def on(self, sde: SDE) -> Model:
        return self if sde == self.sde else MixtureModel(self.components, sde)

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: object) -> Tensor:
        """E[prediction | x_t = x], shape of `x`.

        Args:
            prediction: one of `PREDICTIONS`.
            x: state [B, *event].
            t: time, [] or [B].
            **cond: must be empty, a mixture has no conditions.

        Raises:
            UnknownNameError: `prediction` is not in `PREDICTIONS`.
            ShapeError: `x` or `t` has a wrong shape.
            ArgumentError: there are conditions, or point masses are asked at sigma = 0.
        """
        if cond:
            raise ArgumentError(f"a mixture takes no conditions, got {', '.join(cond)}")
        time, alpha, sigma = self._levels(x, t)
        row = self._row(prediction, time, alpha, sigma)
        return self.components.read(Point.mean, x, alpha, sigma, *row)

    def log_prob(self, x: Tensor, t: TimeLike) -> Tensor:
        """log p_t(x), [B]; arguments as for `predict`."""
        _, alpha, sigma = self._levels(x, t)
        return self.components.read(Point.log_prob, x, alpha, sigma)

    def log_prob_and_score(self, x: Tensor, t: TimeLike, **cond: object) -> tuple[Tensor, Tensor]:
        """log p_t(x) [B] and its gradient, for about the price of it; arguments as `predict`."""
        if cond:
            raise ArgumentError(f"a mixture takes no conditions, got {', '.join(cond)}")
        _, alpha, sigma = self._levels(x, t)
        return self.components.read(Point.log_prob_and_score, x, alpha, sigma)

    def divergence(self, x: Tensor, t: TimeLike) -> Tensor:
        """The divergence sum_i d score_i / d x_i, [B], in closed form; arguments as `predict`."""
        _, alpha, sigma = self._levels(x, t)
        return self.components.read(Point.divergence, x, alpha, sigma)

    def posterior(self, x: Tensor, t: TimeLike) -> Posterior:
        """Mean and covariance of x0 given x_t = x.

        Cov[x0 | x] = sum_k w_k (sigma^2 Sigma_k V_k^-1 + (m_k - m)(m_k - m)^T),
        m_k = E[x0 | x, k], m = sum_k w_k m_k.

        Args:
            x: state [B, *event].
            t: time, [] or [B].

        Returns:
            `Posterior` with mean [B, *event] and covariance [B, D, D].
        """
        _, alpha, sigma = self._levels(x, t)
        return self.components.read(Point.posterior, x, alpha, sigma)

    def _levels(self, x: Tensor, t: TimeLike) -> tuple[Tensor, Number, Number]:
        """Time, alpha and sigma, one where one time serves all rows, else [B]."""
        time = as_row_times(as_time(t), x)
        # Not by its length: a row must be computed in the same way in a batch of one.
        if time.ndim and len(time) and time.stride(0) == 0:
            time = time[0]
        alpha, sigma = _number(self.sde.alpha(time)), _number(self.sde.sigma(time))
        if self.components.singular and not isinstance(t, Tensor) and sigma == 0:
            raise ArgumentError(
                f"the mixture has point masses and t = {t} adds no noise: take a later time"
            )
        return time, alpha, sigma

    def _row(
        self, prediction: str, t: Tensor, alpha: Number, sigma: Number
    ) -> tuple[Number, Number, Number]:
        """(p, p alpha, q sigma) of the prediction m = p x0 + q eps."""
        if prediction == "score":
            return 0.0, 0.0, -1.0
        if prediction == "eps":
            return 0.0, 0.0, sigma
        if prediction == "x0":
            return 1.0, alpha, 0.0
        if prediction == "v":
            return -sigma, -sigma * alpha, sigma * alpha
        if prediction == "flow":
            alpha_dot, sigma_dot = self.sde.alpha_dot(t), self.sde.sigma_dot(t)
            # sigma' may be infinite where sigma = 0; (sigma^2)' is then g^2
            half_rate = self.sde.diffusion(t) ** 2 / 2
            if isinstance(sigma, Tensor):
                half_rate = torch.where(sigma > 0, sigma * sigma_dot, half_rate)
            elif sigma > 0:
                half_rate = sigma * sigma_dot
            return alpha_dot, alpha_dot * alpha, half_rate
        raise UnknownNameError("prediction", prediction, PREDICTIONS)


def as_row_times(time: Tensor, x: Tensor) -> Tensor:
    """`time` [], [B] or a column [B, 1, ...] as [] or [B], for `x` [B, ...].

    Raises:
        ShapeError: `time` has another shape.
    """
    rows = x.shape[:1]
    if time.ndim and not (time.shape[:1] == rows and all(size == 1 for size in time.shape[1:])):
        raise ShapeError(
            f"t of shape {tuple(time.shape)} for x of shape {tuple(x.shape)}: "
            "give one time, or one for each row of x"
        )
    return time.reshape(rows) if time.ndim > 1 else time


def _join(merge: Callable[[list[Tensor]], Tensor], found: list[Result]) -> Result:
    """Results of parts of a batch, tensors or named tuples of them, as one."""
    first = found[0]
    if isinstance(first, Tensor):
        return merge(found)  # type: ignore[arg-type, return-value]
    columns = [merge(list(column)) for column in zip(*found, strict=True)]
    return type(first)._make(columns) if hasattr(first, "_make") else tuple(columns)  # type: ignore


def _number(value: Tensor) -> Number:
    """A single number of the CPU as a float, of which operations are faster; else `value`."""
    plain = value.ndim == 0 and value.device.type == "cpu" and not value.requires_grad
    if not plain or is_transformed(value) or torch.compiler.is_compiling():
        return value
    # a tangent of forward differentiation would be lost
    return value if forward_ad._current_level >= 0 else float(value)


def _like(value: Number, x: Tensor) -> Number:
    """A coefficient [B] in the dtype and on the device of `x`; a scalar promotes nothing."""
    return value.to(x) if is_timed(value) else value
