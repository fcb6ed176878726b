"""What a piece of code does, counted instead of timed: operations, allocations, bytes held."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["SYNCHRONISING", "Counting"]

SYNCHRONISING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")
"""Operations after which the host waits for the device."""


class Counting(TorchDispatchMode):
    """Counts what torch does on this thread, operation by operation.

    Views and writes in place take no memory and count as operations alone. What reads memory past
    the dispatcher, as `tolist` does on a CPU, is not seen.

    Attributes:
        operations: names of the operations, in order, such as "mul_" or "add".
        allocations: how many times memory was taken.
        held, peak: bytes that are held now, and the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.allocations = self.held = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operations.append(str(func).split(".")[1])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._live:
                    self._live[key] = storage.nbytes()
                    self.allocations += 1
                    self.held += storage.nbytes()
                    self.peak = max(self.peak, self.held)
                    weakref.finalize(storage, self._free, key)
        return out

    @property
    def waits(self) -> int:
        """How many operations made the host wait for the device."""
        return sum(name in SYNCHRONISING for name in self.operations)

    def _free(self, key: int) -> None:
        self.held -= self._live.pop(key)
