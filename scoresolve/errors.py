"""What goes wrong, in two forms.

A call that cannot be right raises a `ScoresolveError` before the model is called.
A row that fails on the way (NaN, step limit, call limit, interrupt) keeps its neighbours
untouched: results carry one `Status` per sample, and only `raise_on_failure` makes it an exception.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

__all__ = [
    "MOST_STEPS",
    "ArgumentError",
    "GridError",
    "ModelWarning",
    "ScoresolveError",
    "ShapeError",
    "SolveError",
    "Status",
    "UnknownNameError",
    "check_output",
    "check_transforms",
    "checked_place",
    "is_transformed",
    "nearest_names",
    "real_number",
    "row_status",
    "short",
    "step_count",
    "whole_number",
    "yes_or_no",
]


MOST_STEPS = 10**6
"""Most steps of a grid or chain: a plan holds about 1 kB a step, so that more would fill memory.

The finest grids in use, integer chains, have some thousands."""
_FEW = 20  # names that a message can hold


class ScoresolveError(Exception):
    """Base of every exception that scoresolve raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own would call __init__ with the message alone, which fails where there are
        # other arguments; a process pool that cannot read an exception waits for ever.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[ScoresolveError], args: tuple[Any, ...], state: Any) -> ScoresolveError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ArgumentError(ScoresolveError, ValueError):
    """An argument has a value or a dtype that cannot be used."""


class ShapeError(ScoresolveError, ValueError):
    """A tensor has a shape that would broadcast or cannot be used."""


class GridError(ScoresolveError, ValueError):
    """A time grid is not monotone, leaves the interval, or meets a singular coefficient."""


class UnknownNameError(ScoresolveError, LookupError):
    """A name is not in a registry; the message carries the nearest names.

    Args:
        what: what it should be the name of.
        name: the name.
        known: the names there are; a few are all told if none looks like it.
        listed: where to read the names, if they are many.
    """

    def __init__(self, what: str, name: object, known: Iterable[str], listed: str = "") -> None:
        names = list(known)
        near = nearest_names(str(name), names)
        if near:
            hint = f"did you mean {', '.join(map(repr, near))}?"
        elif len(names) > _FEW:
            hint = f"there are {len(names)}" + (f", listed by {listed}" if listed else "")
        else:
            hint = f"known are {', '.join(map(repr, names))}" if names else "there are none"
        super().__init__(f"unknown {what} {short(name)}: {hint}")


class SolveError(ScoresolveError, RuntimeError):
    """Some samples failed and the caller asked for an exception (`raise_on_failure=True`).

    Attributes:
        result: the result whose `status` tells which rows failed; good rows keep their values.
    """

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result


class ModelWarning(UserWarning):
    """The model is usable, but probably not what the caller wants (for example dropout is on)."""


class Status(IntEnum):
    """How one sample ended."""

    OK = 0
    NONFINITE = 1
    STEP_LIMIT = 2
    CALL_LIMIT = 3
    INTERRUPTED = 4
    NOISY = 5
    EVENT = 6


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` known names that look like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def known_name(what: str, name: str, known: Collection[str]) -> str:
    """`name` if it is one of the `known` names of a `what`; else raises `UnknownNameError`."""
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(what, name, known)
    return name


def row_status(x: Tensor) -> Tensor:
    """`Status.OK` for the finite rows of `x` [B, *event], else `Status.NONFINITE`; int64 [B]."""
    finite = torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else torch.isfinite(x)
    return torch.where(finite, int(Status.OK), int(Status.NONFINITE))


def check_output(m: object, x: Tensor) -> None:
    """Raise unless the model's output `m` is real and of the shape and the device of its input `x`.

    Raises:
        ShapeError: it is no tensor or has another shape.
        ArgumentError: it is not floating point, sparse, or on another device.
    """
    if not isinstance(m, Tensor):
        raise ShapeError(f"the model returned {type(m).__name__}: return a tensor")
    if m.shape != x.shape:
        raise ShapeError(
            f"the model returned shape {tuple(m.shape)} for x of shape {tuple(x.shape)}: "
            + _how_to_mend(m, x)
        )
    if not m.is_floating_point():
        raise ArgumentError(
            f"the model returned {m.dtype} for x of {x.dtype}: return real floating-point numbers"
        )
    if m.layout is not torch.strided or m.device != x.device:
        kind = f"{m.layout} on {m.device}"
        raise ArgumentError(
            f"the model returned a tensor of layout {kind} for x on {x.device}: return a dense "
            "tensor on the device of x"
        )


def check_transforms(what: str, mapped: bool = False) -> None:
    """Raise inside a transform of `torch.func`, which hides the values that `what` decides by.

    Args:
        what: is called.
        mapped: whether `vmap` is all right.

    Raises:
        ArgumentError: a transform is active.
    """
    levels = retrieve_all_functorch_interpreters() if functorch.maybe_current_level() else []
    if any(not mapped or level.key() != functorch.TransformType.Vmap for level in levels):
        raise ArgumentError(
            f"{what} cannot run here inside a transform of torch.func (grad, jacrev, jvp, vmap), "
            "which hides the values that it decides by: call it outside, or make a plan outside "
            "and call its run(..., in_place=False) inside; sample(gradients=True) and "
            "differentiable_sample have gradients by autograd"
        )


def is_transformed(x: Tensor) -> bool:
    """Whether `x` belongs to a transform of `torch.func`, under which it has no values."""
    return bool(functorch.is_functorch_wrapped_tensor(x))


def _how_to_mend(m: Tensor, x: Tensor) -> str:
    text = "return one value per element of x"
    if x.ndim > 1 and m.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        text += (
            "; if the second half of its channels is a learned variance, keep the first half, "
            "as lambda x, t: net(x, t)[:, :x.shape[1]]"
        )
    return text


def short(value: object, most: int = 80) -> str:
    """`repr(value)` on one line, cut where it is longer than a sentence can hold."""
    text = " ".join(repr(value[: 2 * most] if isinstance(value, str) else value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def step_count(name: str, value: object, least: int = 1) -> int:
    """A number of steps as an int from `least` to `MOST_STEPS`; else raises `ArgumentError`."""
    number = whole_number(name, value, least)
    return whole_number(name, number, least, MOST_STEPS) if number > MOST_STEPS else number


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as an int from `least` to `most`; raises `ArgumentError` for anything else."""
    number = math.nan if isinstance(value, bool) else value
    try:
        whole = int(number)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = None
    bad = whole is None or whole != number or isinstance(value, str)
    if bad or whole < least or (most is not None and whole > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ArgumentError(f"{name} = {short(value)}: give a whole number {bounds}")
    return int(whole)


def real_number(
    name: str,
    value: object,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """`value` as a finite float, > `above`, >= `least`, <= `most`; else raises `ArgumentError`."""
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and above < number <= most and number >= least):
        low = f" above {above:g}" if above > -math.inf else ""
        low = f" from {least:g}" if least > -math.inf else low
        high = "" if most == math.inf else f" up to {most:g}"
        raise ArgumentError(f"{name} = {short(value)}: give a finite number{low}{high}")
    return number


def yes_or_no(name: str, value: object) -> bool:
    """`value` as a bool; raises `ArgumentError` for what is not True, False, 1 or 0."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ArgumentError(f"{name} = {short(value)}: give True or False")


def checked_place(
    dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype | None, torch.device | None]:
    """A dtype and a device that exist here; raises `ArgumentError` for anything else."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype = {dtype!r}: give a torch.dtype, such as torch.float32")
    if device is None:
        return dtype, None
    try:
        if isinstance(device, Tensor):
            raise TypeError("it is a tensor")
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ArgumentError(f"device = {short(device)} cannot be used here: {why}") from error
    return dtype, place
