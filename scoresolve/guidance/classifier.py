"""Classifier guidance: the score of p_t(x) p(y | x)^w, from a log-probability of noised states.

    score <- score + w grad_x log p(y | x_t).

With the exact log-probability and w = 1 this is Bayes' rule: the score of p_t(x | y).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.guidance.base import Cost, GuidedModel, cost_at
from scoresolve.models import Model, combine, conversion, from_energy
from scoresolve.sde import SDE, TimeLike

__all__ = ["classifier"]


def classifier(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    log_prob: Callable[..., Tensor],
    scale: float = 1.0,
    shared: Sequence[str] = (),
) -> GuidedModel:
    """Classifier guidance: score + w grad log p(y | x_t), the gradient by autograd.

    A call costs one evaluation of the model, and one evaluation and one vector-Jacobian product
    of the classifier.

    Args:
        score: the model, a callable `score(x, t, **cond)` or a `Model`.
        sde: the process.
        log_prob: callable `log_prob(x, t, **cond)` returning [B], differentiable in `x`; up to a
            constant it is log p(y | x_t = x), as `log_softmax(...)[range(B), y]`.
        scale: w.
        shared: names of the conditions that the model gets too; the others go to `log_prob` alone.

    Returns:
        A `Model`.

    Raises:
        ArgumentError: `scale` is not finite.
        ShapeError: at a call, `log_prob` did not return [B].

    Source:
        Dhariwal and Nichol 2021 (2105.05233), eq. 14; Song et al. 2021 (2011.13456), eq. 14.
    """
    return _Classifier(score, sde, log_prob, scale, shared)


class _Classifier(GuidedModel):
    def __init__(
        self,
        model: Model | Callable[..., Tensor],
        sde: SDE,
        log_prob: Callable[..., Tensor],
        scale: float,
        shared: Sequence[str],
    ) -> None:
        super().__init__(model, sde)
        if not math.isfinite(scale):
            raise ArgumentError(f"scale = {scale}: give a finite number")

        def energy(x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
            value = log_prob(x, t, **cond)
            if value.shape != x.shape[:1]:
                raise ShapeError(
                    f"log_prob returned shape {tuple(value.shape)} for x of shape "
                    f"{tuple(x.shape)}: return one log-probability per sample, [B]"
                )
            return -value

        self.gradient, self.scale, self.shared = from_energy(energy), scale, frozenset(shared)

    def cost(self, t: float) -> Cost:
        inner = cost_at(self.model, t)
        return Cost(inner.forwards + 1, inner.products + 1)

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        own = {name: value for name, value in cond.items() if name in self.shared}
        time = self.settled(x, t)
        gradient = self.gradient(x, time, **cond)
        _, w = conversion("score", prediction, self.sde.point(time))
        return combine(
            self.scale * w, gradient, 1.0, self.model.predict(prediction, x, t, **own), t
        )
