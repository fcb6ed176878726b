"""The right-hand side as an adaptive solver may call it: bounded, counted, checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ModelWarning, check_output, row_status
from scoresolve.plans import check_state
from scoresolve.precision import host, widest
from scoresolve.sde.base import TimeLike
from scoresolve.solvers.adaptive.rows import Numbers
from scoresolve.solvers.integrator import Solution

__all__ = ["BoundedDrift", "CallLimit", "Interval", "rounded_inside", "unmoved"]

_MANY: Final = 3_000


class CallLimit(Exception):
    """The drift was asked for one call more than allowed."""


class Interval:
    """Times as a drift may be given them, and the dtypes it works in.

    Args:
        x: the caller's state.
        t_start, t_end: ends of the interval, in either order.

    Attributes:
        dtype, device: those of `x`.
        state_dtype: the dtype to integrate in, that of `x` but at least float32.

    Raises:
        ArgumentError: the state is not real floating-point, or a time is not finite.
        ShapeError: the state has no batch axis.
    """

    def __init__(self, x: Tensor, t_start: float, t_end: float) -> None:
        check_state(x)
        if not (math.isfinite(t_start) and math.isfinite(t_end)):
            raise ArgumentError(f"the interval [{t_start}, {t_end}] is not finite: give two times")
        self.dtype, self.device = x.dtype, x.device
        self.state_dtype = torch.promote_types(x.dtype, torch.float32)
        self.low, self.high = rounded_inside(
            min(t_start, t_end), max(t_start, t_end), self.state_dtype
        )

    def rounded(self, t: TimeLike | Numbers) -> Tensor:
        """`t` as the drift gets it, on the host: in its dtype, and inside the interval for that."""
        given = t if isinstance(t, Tensor) else host(t)
        return given.to(self.state_dtype).clamp(self.low, self.high)

    def times(self, t: TimeLike | Numbers) -> Tensor:
        """`t` as the drift gets it."""
        return self.rounded(t).to(self.device)


class BoundedDrift:
    """A drift that stays inside its interval, counts its calls and checks what it returns.

    Args:
        drift: callable (x [b, *event], t [b], rows [b]) -> shape of `x`.
        x: the caller's state; the drift gets states of this dtype.
        t_start, t_end: ends of the interval, in either order.
        max_calls: calls allowed, at least 1.

    Attributes:
        calls: calls made.
        evaluations: how many of them each row of `x` was in, [B] int64 on the host.
        inside: the interval.
        state_dtype: its dtype to integrate in.

    Raises:
        ArgumentError, ShapeError: as in `Interval`.
    """

    def __init__(
        self,
        drift: Callable[..., Tensor],
        x: Tensor,
        t_start: float,
        t_end: float,
        max_calls: int,
    ) -> None:
        self.inside = Interval(x, t_start, t_end)
        self.drift, self.max_calls, self.calls = drift, max_calls, 0
        self.evaluations = torch.zeros(x.shape[0], dtype=torch.int64, device="cpu")
        self.state_dtype, self.times = self.inside.state_dtype, self.inside.times
        self._told = False

    def tell_of_many_calls(self, progress: Callable[[int], str]) -> None:
        """Warn, once, when a row was in 3,000 calls: it may go on for long.

        Args:
            progress: how far a row of `x` has come, in words.
        """
        if self._told or self.calls < _MANY or int(self.evaluations.max()) < _MANY:
            return
        self._told = True
        row = int(self.evaluations.argmax())
        warnings.warn(
            f"sample {row} was in {_MANY:,} calls and has come to {progress(row)}: the model is "
            "stiff or jumps there, or the tolerance is very small; it goes on until max_steps or "
            "max_calls: loosen rtol and atol, or take a solver with a fixed grid",
            ModelWarning,
            stacklevel=4,
        )

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The drift at states [b, *event] of `rows` [b] and times [b] or [], made by `times`.

        Raises:
            CallLimit: all allowed calls are made.
            ShapeError: the drift returned another shape than that of `x`.
        """
        if self.calls >= self.max_calls:
            raise CallLimit
        self.calls += 1
        self.evaluations.numpy()[rows.cpu().numpy()] += 1
        x = x.to(self.inside.dtype)
        value = self.drift(x, t.expand(x.shape[0]), rows.to(x.device))
        check_output(value, x)
        return value.to(self.state_dtype)


def rounded_inside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest number of `dtype` in an interval."""
    ends = host([low, high])
    inside = ends.to(dtype)
    outside = torch.stack((inside[0] < ends[0], inside[1] > ends[1]))
    first, last = torch.where(outside, inside.nextafter(inside.flip(0)), inside).tolist()
    return first, last


def unmoved(x: Tensor, t: float, saved: int = 0, dense: bool = False) -> Solution:
    """The solution of an interval of no length: a copy of `x`, and no call.

    Args:
        x: the state.
        t: the time.
        saved: how many times states are to be saved at.
        dense: whether the path is wanted.
    """
    status = row_status(x)
    times = torch.full(status.shape, t, dtype=widest(x.device), device=x.device)
    steps = torch.zeros_like(status)
    return Solution(
        x.clone(),
        times,
        status,
        0,
        steps,
        steps.clone(),
        steps.clone(),
        x.expand(saved, *x.shape).clone() if saved else None,
        _Still(x.clone()) if dense else None,
    )


class _Still:
    """The path of what does not move."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, t: float) -> Tensor:
        return self.x.clone()
