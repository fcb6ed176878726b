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

import torch
from torch import Tensor

__all__ = [
    "ArgumentError",
    "GridError",
    "ModelWarning",
    "ScoresolveError",
    "ShapeError",
    "SolveError",
    "Status",
    "UnknownNameError",
    "check_output",
    "nearest_names",
    "real_number",
    "row_status",
    "whole_number",
]


class ScoresolveError(Exception):
    """Base of every exception that scoresolve raises on purpose."""


class ArgumentError(ScoresolveError, ValueError):
    """An argument has a value or a dtype that cannot be used."""


class ShapeError(ScoresolveError, ValueError):
    """A tensor has a shape that would broadcast or cannot be used."""


class GridError(ScoresolveError, ValueError):
    """A time grid is not monotone, leaves the interval, or meets a singular coefficient."""


class UnknownNameError(ScoresolveError, LookupError):
    """A name is not in a registry; the message carries the nearest names."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = list(known)
        near = nearest_names(str(name), names)
        listed = ", ".join(map(repr, near or names))
        hint = f"did you mean {listed}?" if near else f"known are {listed}"
        super().__init__(f"unknown {what} {name!r}: {hint}")


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
    """Raise `ShapeError` unless the model's output `m` has the shape of its input `x`."""
    if not isinstance(m, Tensor):
        raise ShapeError(f"the model returned {type(m).__name__}: return a tensor")
    if m.shape != x.shape:
        raise ShapeError(
            f"the model returned shape {tuple(m.shape)} for x of shape {tuple(x.shape)}: "
            "return one value per element of x"
        )


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as an int from `least` to `most`; raises `ArgumentError` for anything else."""
    number = math.nan if isinstance(value, bool) else value
    try:
        whole = int(number)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        whole = None
    bad = whole is None or whole != number or isinstance(value, str)
    if bad or whole < least or (most is not None and whole > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ArgumentError(f"{name} = {value!r}: give a whole number {bounds}")
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
        number = math.nan if isinstance(value, str | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and above < number <= most and number >= least):
        low = f" above {above:g}" if above > -math.inf else ""
        low = f" from {least:g}" if least > -math.inf else low
        high = "" if most == math.inf else f" up to {most:g}"
        raise ArgumentError(f"{name} = {value!r}: give a finite number{low}{high}")
    return number
