"""Where float64 is to be had: on the host, and on devices that have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["default_on_host", "doubled", "host", "widest"]


def host(values: object) -> Tensor:
    """Numbers as a float64 tensor on the host, whatever torch's default device and dtype are.

    Raises:
        TypeError: they are none; of None and of "0.5" NumPy would make some.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # in this order: see `widest`
    found = np.array(values)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"numbers are needed, not {found.dtype}")
    return torch.from_numpy(found.astype(np.float64, copy=False))


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype of `device`: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def doubled(x: Tensor) -> Tensor:
    """`x` in float64, on its device or, where that has none, on the host."""
    return (x.cpu() if widest(x.device) is not torch.float64 else x).double()


@contextmanager
def default_on_host() -> Iterator[None]:
    """New tensors lie on the host, whatever torch's default device is; also a decorator."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield
