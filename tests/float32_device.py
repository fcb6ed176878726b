"""A device without float64, played on the CPU: what Apple's MPS refuses is refused here.

A tensor of it says that it lies on "mps" and keeps a tensor of the CPU inside. A float64 tensor
there is a TypeError as on the real one, so is NumPy on it; an operation on tensors of two devices
is a RuntimeError, unless one of them is a single number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

DEVICE = torch.device("mps")
aten = torch.ops.aten
_MIXES = (aten._to_copy, aten.copy_, aten.index, aten.index_put_)


class Single(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.inner.tolist()

    @staticmethod
    def __new__(cls, inner: Tensor) -> Single:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype: float64 is not supported"
            )
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),  # torch was built without the other
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Single({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet, asked = func.overloadpacket, kwargs.get("device")
    tensors: list[Tensor] = []

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value.inner if isinstance(value, Single) else value
        return [bare(part) for part in value] if isinstance(value, list | tuple) else value

    plain = [bare(value) for value in args]
    named = {name: bare(value) for name, value in kwargs.items()}
    if asked is not None:
        named["device"] = torch.device("cpu")
    there = any(isinstance(leaf, Single) for leaf in tensors)
    strangers = any(leaf.ndim and not isinstance(leaf, Single) for leaf in tensors)
    if there and strangers and packet not in _MIXES:
        raise RuntimeError(f"Expected all tensors to be on the same device, mps and cpu: {func}")
    found = func(*plain, **named)
    if packet is aten.copy_:
        return args[0]
    if not (there if asked is None else _is_device(asked)):
        return found
    wrapped = tree_map(lambda leaf: Single(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """Torch looks for a device it was built without before it dispatches, so not here."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        places = any(_is_device(value) for value in (*args, *kwargs.values()))
        if func is torch.device or not places:
            return func(*args, **kwargs)
        if args and isinstance(args[0], Single):  # it is there
            args = tuple(value for value in args if not _is_device(value))
            kwargs = {name: value for name, value in kwargs.items() if not _is_device(value)}
            return func(*args, **kwargs) if args[1:] or kwargs or func is not Tensor.to else args[0]
        cpu = torch.device("cpu")
        args = tuple(cpu if _is_device(value) else value for value in args)
        kwargs = {name: cpu if _is_device(value) else value for name, value in kwargs.items()}
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor):
            return found
        return Single(found.detach().clone()).requires_grad_(found.requires_grad)


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device | str) and str(value).partition(":")[0] == "mps"


@contextmanager
def float32_device() -> Iterator[Callable[[Tensor], Tensor]]:
    """In it the device exists; gives a function that puts tensors there."""
    with _Function(), _Dispatch():
        yield lambda x: x.to(DEVICE)
