"""Classifier guidance: the score of p_t(x) p(y | x)^w, from a log-probability of noised states.

    score <- score + w grad_x log p(y | x_t).

With the exact log-probability and w = 1 this is Bayes' rule: the score of p_t(x | y).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number
from scoresolve.guidance.base import Cost, GuidedModel, cost_at, own_copy
from scoresolve.models import Model, combine, conversion
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
            constant it is log p(y | x_t = x), as `log_softmax(...)[range(B), y]`. It gets a copy
            of x, in the dtype of its parameters if it is a module.
        scale: w.
        shared: names of the conditions that the model gets too; the others go to `log_prob` alone.

    Returns:
        A `Model`.

    Raises:
        ArgumentError: `scale` is not finite, or an argument is of the wrong kind; at a call,
            `log_prob` has no gradient in x.
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
        if not callable(log_prob):
            raise ArgumentError(
                f"log_prob is {type(log_prob).__name__}: give a callable log_prob(x, t)"
            )
        if isinstance(shared, str):
            raise ArgumentError(f"shared = {shared!r}: give a sequence of names")
        self.log_prob, self.scale = log_prob, real_number("scale", scale)
        self.shared = frozenset(shared)

    def cost(self, t: float) -> Cost:
        inner = cost_at(self.model, t)
        return Cost(inner.forwards + 1, inner.products + 1)

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        own = {name: value for name, value in cond.items() if name in self.shared}
        time = self.settled(x, t)
        gradient = self._gradient(x, time, cond)
        _, w = conversion("score", prediction, self.sde.point(time))
        return combine(
            self.scale * w, gradient, 1.0, self.model.predict(prediction, x, t, **own), t
        )

    def _gradient(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """grad log p(y | x_t), shape of `x`."""
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            value: object = self.log_prob(own_copy(self.log_prob, leaf), t, **cond)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(
                    f"log_prob returned shape {what} for x of shape {tuple(x.shape)}: return one "
                    "log-probability per sample, [B]"
                )
            found = None
            if value.requires_grad:
                (found,) = torch.autograd.grad(
                    value.sum(), leaf, create_graph=keep_graph, allow_unused=True
                )
        if found is None:
            raise ArgumentError(
                "log_prob has no gradient in x: take it out of torch.no_grad and "
                "torch.inference_mode, or use one that depends on x"
            )
        return found
