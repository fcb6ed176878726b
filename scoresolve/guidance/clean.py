"""Predictions of x0 that are kept inside the range of the data.

    clip       x0 <- min(max(x0, low), high)
    threshold  x0 <- min(max(x0, -s), s) bound / s,   s = max(quantile_q |x0|, bound)

Both bend the score where a prediction leaves the range, so they are no longer exact for data that
does; strong guidance pushes predictions out and needs one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number
from scoresolve.guidance.base import CleanModel, Cost, GuidedModel, cost_at, flat, positive
from scoresolve.models import Model
from scoresolve.sde import SDE, TimeLike, expand

__all__ = ["clip_x0", "dynamic_threshold"]


def clip_x0(
    score: Model | Callable[..., Tensor], sde: SDE, low: float = -1.0, high: float = 1.0
) -> GuidedModel:
    """The model whose x0 is clipped to [low, high].

    Args:
        score: a callable `score(x, t, **cond)` or a `Model`.
        sde: the process.
        low, high: range of the data; an end may be infinite.

    Returns:
        A `Model` that costs what the given one does.

    Raises:
        ArgumentError: the range is empty.

    Source:
        Ho et al. 2020 (2006.11239), appendix B and its code; Saharia et al. 2022 (2205.11487),
        section 2.3, "static thresholding".
    """
    for name, end in (("low", low), ("high", high)):
        if not (isinstance(end, float) and math.isinf(end)):
            real_number(name, end)
    if not low < high:
        raise ArgumentError(f"low = {low}, high = {high}: need low < high")
    return _Edited(score, sde, partial(_clipped, low, high))


def dynamic_threshold(
    score: Model | Callable[..., Tensor], sde: SDE, quantile: float = 0.995, bound: float = 1.0
) -> GuidedModel:
    """The model whose x0 is clipped to [-s, s] and shrunk to [-bound, bound].

    s is the larger of `bound` and the quantile of |x0| over the event, for each row. Nothing
    changes where no more than a share 1 - quantile of the elements exceeds the bound.

    Args:
        score: a callable `score(x, t, **cond)` or a `Model`.
        sde: the process.
        quantile: in [0, 1].
        bound: of the data, > 0.

    Returns:
        A `Model` that costs what the given one does.

    Raises:
        ArgumentError: a number is out of range.

    Source:
        Saharia et al. 2022 (2205.11487), section 2.3.
    """
    share = real_number("quantile", quantile, least=0, most=1)
    return _Edited(score, sde, partial(_thresholded, share, positive("bound", bound)))


def _clipped(low: float, high: float, x0: Tensor) -> Tensor:
    return x0.clamp(low, high)


def _thresholded(quantile: float, bound: float, x0: Tensor) -> Tensor:
    ordered = flat(x0).abs().sort(1).values
    place = quantile * (ordered.shape[1] - 1)
    below, above = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    level = torch.lerp(below, above, place - math.floor(place)).clamp(min=bound)
    limit = expand(level, x0, level)
    return x0.clamp(-limit, limit) * (bound / limit)


class _Edited(CleanModel):
    def __init__(
        self,
        model: Model | Callable[..., Tensor],
        sde: SDE,
        edit: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(model, sde)
        self.edit = edit

    def cost(self, t: float) -> Cost:
        return cost_at(self.model, t)

    def clean(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        return self.edit(self.model.predict("x0", x, t, **cond))
