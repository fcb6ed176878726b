"""Guidance from two models: away from one prediction, past the other.

    m = m_other + w (m_good - m_other) = w m_good + (1 - w) m_other,

the score of p_other^(1 - w) p_good^w at every time. w = 1 is the good model itself, w = 0 the
other one, w > 1 extrapolates. Conversions between predictions are affine with weights that are
the same for both models, so m may be any prediction. The other model is the same network without
its condition (classifier-free guidance) or a weaker network (autoguidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, check_output
from scoresolve.grid import Grid
from scoresolve.guidance.base import Cost, GridAhead, GuidedModel, cost_at
from scoresolve.models import Model, as_model, combine, conversion
from scoresolve.sde import SDE, TimeLike, as_time, expand

__all__ = ["autoguidance", "cfg_plus_plus", "classifier_free"]

Scale = float | Callable[[Tensor], Tensor]
Other = Mapping[str, Any] | Model | Callable[..., Tensor]
Interval = tuple[float, float]

_NEGATIVE = "negative_"


def classifier_free(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    scale: Scale,
    null: Other,
    interval: Interval | None = None,
    rescale: float = 0.0,
    batched: bool = False,
) -> GuidedModel:
    """Classifier-free guidance: w conditional + (1 - w) unconditional.

    With w = 1 + (the w of the paper); w = 1 is the conditional model and costs one evaluation,
    as does w = 0 and every time outside `interval`; all else costs two.

    Args:
        score: the conditional model, a callable `score(x, t, **cond)` or a `Model`.
        sde: the process.
        scale: w, or a callable that gives w for times [] or [B] in float64.
        null: what replaces conditions in the unconditional call, as `{"label": 10}`: a number, or
            a tensor that broadcasts to the condition [B, ...]. A condition `negative_label=` given
            to a verb, split with the batch as any other, takes its place. Or another model, which
            is called without conditions.
        interval: (low, high); where sigma/alpha is not in (low, high] the model is conditional.
        rescale: phi in [0, 1]; m is multiplied by 1 - phi + phi std(m_good) / std(m), the standard
            deviations over the event of a row, with m the prediction that the network makes.
        batched: make the two evaluations in one call with 2 B rows.

    Returns:
        A `Model`.

    Raises:
        ArgumentError: a number is out of range, `null` is empty, or `batched` with two models.

    Source:
        Ho and Salimans 2022 (2207.12598), eq. 6. interval: Kynkäänniemi et al. 2024 (2404.07724),
        section 3. rescale: Lin et al. 2023 (2305.08891), section 3.4.
    """
    if not isinstance(null, Mapping):
        if batched:
            raise ArgumentError("batched=True joins two calls of one network: give conditions null")
        return _Extrapolated(score, null, sde, scale, lambda cond, x: {}, interval, rescale)
    if not null:
        raise ArgumentError("null is empty: name the conditions that the unconditional call lacks")
    negative = partial(_negative, dict(null))
    return _Extrapolated(score, score, sde, scale, negative, interval, rescale, batched)


def cfg_plus_plus(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    grid: Grid | Sequence[float] | Tensor,
    scale: float,
    null: Other,
    batched: bool = False,
) -> GuidedModel:
    """CFG++ for DDIM on a known grid: guided x0, unconditional noise.

    Its step x_s = alpha_s x0_lambda + sigma_s eps_null, with x0_lambda the guided prediction of
    scale lambda, is a DDIM step with the step-dependent scale

        w(t) = lambda / (1 - exp(-h)),   h = lam(s) - lam(t),   lam = log(alpha / sigma),

    because both are (alpha_s / alpha_t) x_t - k eps_null - lambda (alpha_s sigma_t / alpha_t) d
    with d = eps - eps_null, k = alpha_s sigma_t / alpha_t - sigma_s = alpha_s sigma_t / alpha_t
    (1 - exp(-h)), where plain guidance has w k in front of d. At the last time, before a jump to
    sigma = 0, w = lambda.

    Args:
        score: the conditional model.
        sde: the process.
        grid: the grid that the solver runs on; s is its next time below t.
        scale: lambda, in [0, 1] in the paper.
        null, batched: as in `classifier_free`.

    Returns:
        A `Model`, to be solved by "ddim" on `grid`.

    Raises:
        GridError: `grid` does not decrease strictly; at a call, the time is not on it.
        ArgumentError: as in `classifier_free`.

    Source:
        Chung et al. 2024 (2406.08070), algorithm 2.
    """
    _finite("scale", scale)
    ahead = GridAhead(sde, grid)
    return classifier_free(
        score, sde, lambda t: scale / -torch.expm1(-ahead(t)[1]), null, batched=batched
    )


def autoguidance(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    weak: Model | Callable[..., Tensor],
    scale: Scale,
    interval: Interval | None = None,
) -> GuidedModel:
    """Autoguidance: away from a weaker model of the same data, w good + (1 - w) weak.

    Args:
        score: the good model, a callable `score(x, t, **cond)` or a `Model`.
        sde: the process.
        weak: a smaller or less trained one; it gets the same conditions.
        scale, interval: as in `classifier_free`.

    Returns:
        A `Model`.

    Raises:
        ArgumentError: a number is out of range.

    Source:
        Karras et al. 2024 (2406.02507), section 4.
    """
    return _Extrapolated(score, weak, sde, scale, lambda cond, x: cond, interval)


class _Extrapolated(GuidedModel):
    """w good + (1 - w) other; `other_cond` makes the other model's conditions of the good one's."""

    def __init__(
        self,
        good: Model | Callable[..., Tensor],
        other: Model | Callable[..., Tensor],
        sde: SDE,
        scale: Scale,
        other_cond: Callable[[dict[str, Any], Tensor], dict[str, Any]],
        interval: Interval | None = None,
        rescale: float = 0.0,
        batched: bool = False,
    ) -> None:
        super().__init__(good, sde)
        self.other = self.model if other is good else as_model(other, sde)
        if not callable(scale):
            _finite("scale", scale)
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ArgumentError(f"interval = {interval}: give 0 <= low < high, in sigma/alpha")
        if not 0 <= rescale <= 1:
            raise ArgumentError(f"rescale = {rescale}: give a number in [0, 1]")
        self.scale, self.interval, self.rescale = scale, interval, rescale
        self.other_cond, self.batched = other_cond, batched
        self.home = self.model.bind("x0")[0]

    def cost(self, t: float) -> Cost:
        good, other = cost_at(self.model, t), cost_at(self.other, t)
        if self.scale == 1 or not self._inside(as_time(t)):
            return good
        if self.scale == 0 and self.interval is None:
            return other
        return Cost(*(a + b for a, b in zip(good, other, strict=True)))

    def bind(self, prediction: str) -> tuple[str, Callable[..., Tensor]]:
        source = self.home if self.rescale else self.model.bind(prediction)[0]
        return source, partial(self.predict, source)

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        if not self.rescale:
            return self._guided(prediction, x, t, cond)[0]
        time = as_time(t, x)
        u, w = conversion(self.home, prediction, self.sde.point(time))
        m, good = self._guided(self.home, x, t, cond)
        spread = _spread(m)
        ratio = torch.where(spread > 0, _spread(good) / spread, 1.0)
        m = m * expand(1 - self.rescale + self.rescale * ratio, x, ratio)
        return combine(u, x, w, m, time)

    def _inside(self, t: Tensor) -> Tensor:
        """Whether each time lies in the interval, shape of `t`."""
        if self.interval is None:
            return torch.ones_like(t, dtype=torch.bool)
        low, high = self.interval
        log_ratio = -self.sde.log_snr(t.double()) / 2
        return (log_ratio > (math.log(low) if low else -math.inf)) & (log_ratio <= math.log(high))

    def _guided(
        self, prediction: str, x: Tensor, t: TimeLike, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and that of the good model (or twice the only one evaluated)."""
        time = as_time(t, x)
        positive = {k: v for k, v in cond.items() if not k.startswith(_NEGATIVE)}
        inside = None if self.interval is None else self._inside(time)
        if self.scale == 1 or (inside is not None and not bool(inside.any())):
            good = self.model.predict(prediction, x, t, **positive)
            return good, good
        if self.scale == 0 and inside is None:
            other = self.other.predict(prediction, x, t, **self.other_cond(cond, x))
            return other, other
        good, other = self._both(prediction, x, t, positive, self.other_cond(cond, x))
        w = self.scale(time.double()) if callable(self.scale) else time.new_tensor(self.scale)
        w = w.expand(time.shape) if inside is None else torch.where(inside, w, 1.0)
        return combine(w, good, 1 - w, other, time), good

    def _both(
        self,
        prediction: str,
        x: Tensor,
        t: TimeLike,
        positive: dict[str, Any],
        negative: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        if not self.batched:
            good = self.model.predict(prediction, x, t, **positive)
            other = self.other.predict(prediction, x, t, **negative)
            check_output(good, x)
            check_output(other, x)
            return good, other
        time = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
        cond = {k: _joined(k, positive.get(k), negative[k], x.shape[0]) for k in negative}
        both = torch.cat([x, x])
        m = self.model.predict(prediction, both, time, **cond)
        check_output(m, both)
        good, other = m.chunk(2)
        return good, other


def _negative(null: dict[str, Any], cond: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The conditions of the unconditional call."""
    result = {k: v for k, v in cond.items() if not k.startswith(_NEGATIVE)}
    for name, value in null.items():
        result[name] = _filled(name, value, result.get(name), x)
    for name, value in cond.items():
        if name.startswith(_NEGATIVE):
            result[name.removeprefix(_NEGATIVE)] = value
    return result


def _filled(name: str, value: Any, like: Any, x: Tensor) -> Any:
    """`value` broadcast to the condition `like` if that is a tensor over the batch."""
    if not isinstance(like, Tensor) or like.shape[:1] != x.shape[:1]:
        return value
    null = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if null.ndim == like.ndim and null.shape[0] not in (1, like.shape[0]):
        raise ShapeError(
            f"null {name!r} of shape {tuple(null.shape)} for a condition of shape "
            f"{tuple(like.shape)}: give one for all rows, or {_NEGATIVE}{name}= to the verb"
        )
    try:
        return null.expand_as(like)
    except RuntimeError as error:
        raise ShapeError(
            f"null {name!r} of shape {tuple(null.shape)} does not broadcast to the condition of "
            f"shape {tuple(like.shape)}"
        ) from error


def _joined(name: str, positive: Any, negative: Any, batch: int) -> Any:
    if positive is negative and not isinstance(positive, Tensor):
        return positive
    pair = (positive, negative)
    if all(isinstance(value, Tensor) and value.shape[:1] == (batch,) for value in pair):
        return torch.cat(pair)
    raise ArgumentError(
        f"the condition {name!r} has no batch axis to join in one call: give a tensor [B, ...] or "
        "leave out batched="
    )


def _spread(m: Tensor) -> Tensor:
    """Standard deviation over the event, [B]."""
    return m.reshape(m.shape[0], -1).std(1, correction=0)


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ArgumentError(f"{name} = {value}: give a finite number")
