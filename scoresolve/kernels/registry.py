"""Kernels by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scoresolve.errors import ArgumentError, known_name
from scoresolve.kernels.base import Kernel, StepSize
from scoresolve.kernels.hamiltonian import HMC
from scoresolve.kernels.langevin import MALA, ULA
from scoresolve.kernels.underdamped import BAOAB, OBABO

__all__ = ["KERNELS", "get_kernel"]

KERNELS: dict[str, Callable[..., Any]] = {
    "ula": ULA,
    "mala": MALA,
    "baoab": BAOAB,
    "obabo": OBABO,
    "hmc": HMC,
}
"""From a name to a class that is made with its step size."""

_ADAPTED = ("mala", "hmc")


def get_kernel(kernel: str | Kernel, step_size: StepSize | None = None) -> Kernel:
    """The kernel of that name, or `kernel` itself.

    Args:
        kernel: a name of `KERNELS`, or a kernel made of its class with a step size of its own.
        step_size: > 0, a number or [B]; may be left out where warm-up adapts it.

    Raises:
        UnknownNameError: no such kernel.
        ArgumentError: the step size is missing, is given twice, or is out of range.
    """
    if isinstance(kernel, Kernel):
        if step_size is not None:
            raise ArgumentError(f"{kernel.name!r} has a step size of its own: leave out step_size")
        return kernel
    name = known_name("kernel", kernel, KERNELS)
    if step_size is None and name not in _ADAPTED:
        raise ArgumentError(f"{name!r} is not adjusted, so its step size is yours: give step_size")
    made: Kernel = KERNELS[name]() if step_size is None else KERNELS[name](step_size)
    return made
