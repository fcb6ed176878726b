"""The random numbers a sampler draws from torch, seen and, where wanted, answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Draws"]

_STANDARD = (torch.randn, torch.randn_like)
_OTHERS = (
    *(torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm),
    *(torch.bernoulli, torch.multinomial, torch.poisson, torch.Tensor.uniform_),
    *(torch.Tensor.random_, torch.Tensor.exponential_, torch.Tensor.bernoulli_),
)


class Draws(TorchFunctionMode):
    """Watches torch's draws within a `with`; normals may be answered by another source.

    A draw is known by the state of its generator, so a source that sets its seed anew to draw the
    same numbers again, as trees of Brownian motion do, gets the same answer again.

    Args:
        answer: gives the normals in place of torch, `answer(like, index)` for the index-th
            distinct draw; None leaves torch's own.

    Attributes:
        normals: distinct draws of normal numbers so far.
        others: draws of other laws, which are never answered.
    """

    def __init__(self, answer: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.answer, self.others = answer, 0
        self._known: dict[tuple[bytes, torch.Size], int] = {}

    @property
    def normals(self) -> int:
        return len(self._known)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        standard, shifted = func in _STANDARD, func in (torch.normal, torch.Tensor.normal_)
        self.others += func in _OTHERS
        if not (standard or shifted):
            return func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        before = generator.get_state().numpy().tobytes()
        drawn = func(*args, **kwargs)
        index = self._known.setdefault((before, drawn.shape), len(self._known))
        if self.answer is None:
            return drawn
        z = self.answer(drawn.detach(), index).to(drawn)
        if standard:
            return drawn.copy_(z)
        mean, std = _mean_and_std(func, args, kwargs)
        return drawn.copy_(mean + std * z)


def _mean_and_std(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    given = args[1:] if func is torch.Tensor.normal_ else args
    names = ("mean", "std")
    values = dict(zip(names, given, strict=False)) | {k: kwargs[k] for k in names if k in kwargs}
    return values.get("mean", 0.0), values.get("std", 1.0)
