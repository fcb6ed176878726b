"""Models that watch who calls them, and misbehave where a test of manners asks for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresolve.models import Model
from scoresolve.sde import TimeLike, as_time

__all__ = ["ENDLESS", "Endless", "Misshapen", "Spoilt", "Watched"]


ENDLESS = 200_000
"""Calls after which even a good model is not asked any more."""


class Endless(Exception):
    """A sampler called its model so often that it does not seem to return."""


class Watched(Model):
    """A model that notes the times of its calls, and takes any condition.

    Args:
        model: what it answers.
        most: calls after which it raises `Endless`.

    Attributes:
        calls: calls so far.
        low, high: least and greatest time asked for.
    """

    def __init__(self, model: Model, most: float = math.inf) -> None:
        self.model, self.sde, self.most = model, model.sde, most
        self.data_scale = model.data_scale
        self.calls, self.low, self.high = 0, math.inf, -math.inf

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        self.calls += 1
        if self.calls > self.most:
            raise Endless(f"more than {self.most:g} calls")
        times = as_time(t)
        self.low, self.high = min(self.low, float(times.min())), max(self.high, float(times.max()))
        return self.model.predict(prediction, x, t)


class Spoilt(Watched):
    """A model that is not a number for one row, the `row`-th state or the one of condition `row`.

    Args:
        model, most: as in `Watched`.
        row: number of the row.
    """

    def __init__(self, model: Model, row: int, most: float) -> None:
        super().__init__(model, most)
        self.row = row

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        m = super().predict(prediction, x, t)
        ids = cond.get("row", torch.arange(len(x), device=x.device))
        bad = (ids == self.row).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.where(bad, torch.nan, m)


class Misshapen(Watched):
    """A model that forgot an axis: [B, 1] for states [B, D]."""

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        return super().predict(prediction, x, t, **cond)[:, :1]
