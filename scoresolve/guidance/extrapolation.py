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
from torch.utils import _pytree as pytree

from scoresolve.errors import ArgumentError, ShapeError, check_output, nearest_names, real_number
from scoresolve.grid import Grid
from scoresolve.guidance.base import Cost, GridAhead, GuidedModel, cost_at, flat
from scoresolve.models import Model, as_model, combine, conversion
from scoresolve.precision import host
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
        scale: w, or a callable that gives w, a number or of the same shape, for times [] or [B].
        null: what replaces conditions in the unconditional call, as `{"label": 10}`: a number, a
            tensor that broadcasts to the condition [B, ...], or None. Of a nested condition it
            holds the parts that are replaced, as `{"added": {"text_embeds": 0.0}}`. A condition
            `negative_label=` given to a verb, split with the batch as any other, takes its place.
            Or another model, which is called without conditions.
        interval: (low, high); where sigma/alpha is not in (low, high] the model is conditional.
        rescale: phi in [0, 1]; m is multiplied by 1 - phi + phi std(m_good) / std(m), the standard
            deviations over the event of a row, with m the prediction that the network makes.
        batched: make the two evaluations in one call with 2 B rows. Tensors of B rows in the
            conditions that `null` replaces are joined. Where another tensor has B rows too, it
            could be one for each row or one for all, and the evaluations are made apart.

    Returns:
        A `Model`.

    Raises:
        ArgumentError: a number is out of range, `null` is empty, or `batched` with two models; at
            a call, a condition that `null` names is missing, or cannot be joined.
        ShapeError: at a call, a null or w does not fit.

    Source:
        Ho and Salimans 2022 (2207.12598), eq. 6. interval: Kynkäänniemi et al. 2024 (2404.07724),
        section 3. rescale: Lin et al. 2023 (2305.08891), section 3.4.
    """
    if not isinstance(null, Mapping):
        if batched:
            raise ArgumentError("batched=True joins two calls of one network: give conditions null")
        return _Extrapolated(score, null, sde, scale, _Nothing(), interval, rescale)
    if not null:
        raise ArgumentError("null is empty: name the conditions that the unconditional call lacks")
    return _Extrapolated(score, score, sde, scale, _Null(dict(null)), interval, rescale, batched)


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
    ahead = partial(_scale_ahead, GridAhead(sde, grid), real_number("scale", scale))
    return classifier_free(score, sde, ahead, null, batched=batched)


def _scale_ahead(ahead: GridAhead, scale: float, t: Tensor) -> Tensor:
    return scale / -torch.expm1(-ahead(t)[1])


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
    return _Extrapolated(score, weak, sde, scale, _Same(), interval)


class _Same:
    """The conditions of two models that get the same."""

    def good(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of the good model, from those of a call."""
        return cond

    def other(self, cond: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """The conditions of the other model, at states `x`."""
        return cond


class _Nothing(_Same):
    """The other model gets no conditions."""

    def good(self, cond: dict[str, Any]) -> dict[str, Any]:
        for name in cond:
            if name.startswith(_NEGATIVE):
                raise ArgumentError(
                    f"{name}= replaces nothing: the unconditional model is called without "
                    "conditions"
                )
        return cond

    def other(self, cond: dict[str, Any], x: Tensor) -> dict[str, Any]:
        return {}


class _Null(_Same):
    """The other call gets `null`, or what a call names `negative_`, in place of conditions."""

    def __init__(self, null: dict[str, Any]) -> None:
        self.null = null

    def good(self, cond: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in cond.items() if not k.startswith(_NEGATIVE)}
        replaced = [name.removeprefix(_NEGATIVE) for name in cond if name not in kept]
        for name in (*self.null, *replaced):
            if name not in kept:
                near = nearest_names(name, kept)
                hint = f"; is {near[0]}= meant" if near else ""
                source = "null replaces" if name in self.null else f"{_NEGATIVE}{name}= replaces"
                raise ArgumentError(
                    f"{source} the condition {name!r}, which the call does not have: give "
                    f"{name}= too{hint}"
                )
        return kept

    def other(self, cond: dict[str, Any], x: Tensor) -> dict[str, Any]:
        result = self.good(cond)
        for name, value in self.null.items():
            if _NEGATIVE + name not in cond:
                result[name] = _filled(name, value, result[name], x)
        for name, value in cond.items():
            if name.startswith(_NEGATIVE):
                result[name.removeprefix(_NEGATIVE)] = value
        return result


class _Extrapolated(GuidedModel):
    """w good + (1 - w) other; `conditions` tells what each of the two models gets."""

    def __init__(
        self,
        good: Model | Callable[..., Tensor],
        other: Model | Callable[..., Tensor],
        sde: SDE,
        scale: Scale,
        conditions: _Same,
        interval: Interval | None = None,
        rescale: float = 0.0,
        batched: bool = False,
    ) -> None:
        super().__init__(good, sde)
        self.other = self.model if other is good else as_model(other, sde)
        self.scale = scale if callable(scale) else real_number("scale", scale)
        self.interval = None if interval is None else _interval(interval)
        self.rescale = real_number("rescale", rescale, least=0, most=1)
        self.conditions, self.batched = conditions, batched
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
        log_ratio = -self.sde.log_snr(t.detach().cpu().double()) / 2  # not every device has float64
        inside = (log_ratio > (math.log(low) if low else -math.inf)) & (log_ratio <= math.log(high))
        return inside.to(t.device)

    def _guided(
        self, prediction: str, x: Tensor, t: TimeLike, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction and that of the good model (or twice the only one evaluated)."""
        time = as_time(t, x)
        positive = self.conditions.good(cond)
        inside = None if self.interval is None else self._inside(time)
        if self.scale == 1 or (inside is not None and not bool(inside.any())):
            good = self.model.predict(prediction, x, t, **positive)
            return good, good
        if self.scale == 0 and inside is None:
            other = self.other.predict(prediction, x, t, **self.conditions.other(cond, x))
            return other, other
        good, other = self._both(prediction, x, t, positive, self.conditions.other(cond, x))
        w = self._weight(time)
        if inside is not None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            w = torch.where(inside, w.to(time.device, dtype), 1.0)
        return combine(w, good, 1 - w, other, time), good

    def _weight(self, time: Tensor) -> Tensor:
        """w, [] or the shape of `time`."""
        w: object = self.scale(time) if callable(self.scale) else self.scale
        if not isinstance(w, Tensor):
            return host(real_number("scale", w))
        if w.ndim and w.shape != time.shape:
            raise ShapeError(
                f"the scale of times of shape {tuple(time.shape)} has shape {tuple(w.shape)}: "
                "return a number, or one for each time"
            )
        return w

    def _both(
        self,
        prediction: str,
        x: Tensor,
        t: TimeLike,
        positive: dict[str, Any],
        negative: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        joined = self._joined(x.shape[0], positive, negative) if self.batched else None
        if joined is None:
            good = self.model.predict(prediction, x, t, **positive)
            other = self.other.predict(prediction, x, t, **negative)
            check_output(good, x)
            check_output(other, x)
            return good, other
        time = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
        both = torch.cat([x, x])
        m = self.model.predict(prediction, both, time, **joined)
        check_output(m, both)
        good, other = m.chunk(2)
        return good, other

    def _joined(
        self, batch: int, positive: dict[str, Any], negative: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The conditions of one call of 2 B rows; None if a tensor might or might not be joined."""
        result = {}
        for name, value in negative.items():
            pairs, other = pytree.tree_flatten(positive[name]), pytree.tree_flatten(value)
            if pairs[1] != other[1]:
                raise ArgumentError(_NOT_JOINED.format(name))
            leaves = []
            for a, b in zip(pairs[0], other[0], strict=True):
                per_row = _rows(a, batch) and _rows(b, batch)
                if a is b and (per_row or not isinstance(a, _PLAIN)):
                    return None
                if per_row and _alike(a, b):
                    leaves.append(torch.cat([a, b]))
                elif not per_row and _equal(a, b):
                    leaves.append(a)
                else:
                    raise ArgumentError(_NOT_JOINED.format(name))
            result[name] = pytree.tree_unflatten(leaves, other[1])
        return result


_PLAIN = (Tensor, str, int, float, type(None))  # anything else may hold rows of its own
_NOT_JOINED = (
    "the condition {!r} has no batch axis to join in one call: give tensors [B, ...] of one shape "
    "and dtype to both evaluations, or leave out batched="
)


def _rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (batch,)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        return a is b or (tensors and _alike(a, b) and torch.equal(a, b))
    return isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _filled(name: str, value: Any, like: Any, x: Tensor) -> Any:
    """`value` broadcast to the condition `like`, leaf by leaf.

    A number is broadcast to any tensor, a tensor to those over the batch; None and what stands for
    no tensor is passed on.
    """
    if isinstance(value, Mapping) and isinstance(like, Mapping):
        strays = [key for key in value if key not in like]
        if strays:
            raise ArgumentError(
                f"null {name!r} replaces {strays[0]!r}, which the condition does not have"
            )
        return {
            key: _filled(f"{name}.{key}", value[key], part, x) if key in value else part
            for key, part in like.items()
        }
    if type(value) in (list, tuple) and type(like) is type(value) and len(like) == len(value):
        parts = enumerate(zip(value, like, strict=True))
        return type(value)(_filled(f"{name}[{i}]", *pair, x) for i, pair in parts)
    if value is None or not isinstance(like, Tensor):
        return value
    per_row = bool(like.ndim) and like.shape[0] == x.shape[0]
    if isinstance(value, Tensor) and not per_row:
        return value
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"null {name!r} is {value!r} for a condition that is a tensor: give a number or tensor"
        ) from error
    null = given.to(like.device, like.dtype)
    if not like.is_floating_point() and bool((null != given.to(like.device)).any()):
        raise ArgumentError(
            f"null {name!r} = {value} for a condition of {like.dtype}: give whole numbers"
        )
    if null.ndim == like.ndim and null.ndim and null.shape[0] not in (1, like.shape[0]):
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


def _spread(m: Tensor) -> Tensor:
    """Standard deviation over the event, [B]."""
    return flat(m).std(1, correction=0) if m.numel() else m.new_zeros(m.shape[:1])


def _interval(interval: Interval) -> Interval:
    try:
        low, high = interval
        fits = 0 <= low < high
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ArgumentError(f"interval = {interval}: give 0 <= low < high, in sigma/alpha")
    return float(low), float(high)
