"""The random numbers a sampler draws, seen and, where they are torch's, answered if wanted."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Draws", "Seeded"]

_STANDARD = (torch.randn, torch.randn_like)
_OTHERS = (
    *(torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm),
    *(torch.bernoulli, torch.multinomial, torch.poisson, torch.Tensor.uniform_),
    *(torch.Tensor.random_, torch.Tensor.exponential_, torch.Tensor.bernoulli_),
)
_SHIFTED = (torch.normal, torch.Tensor.normal_)
_DRAWS = frozenset((*_STANDARD, *_OTHERS, *_SHIFTED))


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

    def held(self, rows: int) -> bool:
        """Whether all that was drawn are normals for `rows` rows at once, which can be answered."""
        return not self.others and all(shape[:1] == (rows,) for _, shape in self._known)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWS:  # as nearly every operation is
            return func(*args, **kwargs)
        if func in _OTHERS:
            self.others += 1
            return func(*args, **kwargs)
        standard = func in _STANDARD
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


class Seeded:
    """Global generators of torch, numpy and Python at one seed, and afterwards as they were.

    Args:
        seed: of all three.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._torch = seed, torch.random.fork_rng(devices=[])

    def __enter__(self) -> Seeded:
        self._torch.__enter__()
        self._before = np.random.get_state(), random.getstate()
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)  # torchsde takes its entropy from here
        random.seed(self.seed)
        self._begun = self._states()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        np.random.set_state(self._before[0])
        random.setstate(self._before[1])
        self._torch.__exit__(kind, error, trace)

    def moved(self) -> bool:
        """Whether anything was drawn from the generators of numpy or Python since."""
        return self._states() != self._begun

    def _states(self) -> tuple[str, object]:
        return repr(np.random.get_state(legacy=False)["state"]), random.getstate()
