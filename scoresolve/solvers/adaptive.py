r"""Dormand-Prince 5(4) with a step size, an error norm and a status of its own for every sample.

An embedded Runge-Kutta step of size h from (x, t), with stages k_i at the times t + c_i h,

    k_i = f(x + h sum_j a_ij k_j, t + c_i h),   x' = x + h sum_j b_j k_j,   e = h sum_j e_j k_j,

is accepted when err = rms(e / (atol + rtol max(|x|, |x'|))) <= 1, the mean taken over the event.
A PI controller sets the next step, h' = h safety err^-(1/q - 3/4 beta) err_past^beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, Status, row_status
from scoresolve.models import check_output
from scoresolve.noise import NoiseSource
from scoresolve.plans import check_state
from scoresolve.sde.base import TimeLike
from scoresolve.solvers.integrator import Integrator, RowDrift, Solution

__all__ = ["DORMAND_PRINCE", "BoundedDrift", "CallLimit", "DormandPrince", "Tableau", "unmoved"]


@dataclass(frozen=True)
class Tableau:
    """An embedded explicit Runge-Kutta pair whose last stage is its solution (FSAL).

    Attributes:
        order: order q of the solution; the embedded one has order q - 1.
        c: times of the stages, as fractions of the step.
        a: weights of the stages, row i has i entries; the last row are the weights b.
        e: weights of the error estimate, solution minus embedded solution.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]


DORMAND_PRINCE: Final = Tableau(
    order=5,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    e=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


class CallLimit(Exception):
    """The drift was asked for one call more than allowed."""


class BoundedDrift:
    """A drift that stays inside its interval, counts its calls and checks what it returns.

    Args:
        drift: callable (x [b, *event], t [b], rows [b]) -> shape of `x`.
        x: the caller's state; the drift gets states of this dtype.
        t_start, t_end: ends of the interval, in either order.
        max_calls: calls allowed, at least 1.

    Attributes:
        calls: calls made.
        state_dtype: the dtype to integrate in, that of `x` but at least float32.

    Raises:
        ArgumentError: the state is not real floating-point, or a time is not finite.
        ShapeError: the state has no batch axis.
    """

    def __init__(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        max_calls: int,
    ) -> None:
        check_state(x)
        if not (math.isfinite(t_start) and math.isfinite(t_end)):
            raise ArgumentError(f"the interval [{t_start}, {t_end}] is not finite: give two times")
        self.drift, self.max_calls, self.calls = drift, max_calls, 0
        self.dtype, self.device = x.dtype, x.device
        self.state_dtype = torch.promote_types(x.dtype, torch.float32)
        ends = torch.tensor([t_start, t_end], dtype=torch.float64).sort().values
        inside = ends.to(self.state_dtype)
        toward = inside.flip(0)
        outside = torch.stack((inside[0] < ends[0], inside[1] > ends[1]))
        self.low, self.high = torch.where(outside, inside.nextafter(toward), inside).tolist()

    def times(self, t: TimeLike) -> Tensor:
        """`t` as the drift gets it: its dtype and device, and inside the interval when rounded."""
        t = torch.as_tensor(t, dtype=self.state_dtype)
        return t.clamp(self.low, self.high).to(self.device)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The drift at states [b, *event] of `rows` [b] and times [b] or [], made by `times`.

        Raises:
            CallLimit: all allowed calls are made.
            ShapeError: the drift returned another shape than that of `x`.
        """
        if self.calls >= self.max_calls:
            raise CallLimit
        self.calls += 1
        x = x.to(self.dtype)
        value = self.drift(x, t.expand(x.shape[0]), rows.to(x.device))
        check_output(value, x)
        return value.to(self.state_dtype)


def unmoved(x: Tensor, t: float) -> Solution:
    """The solution of an interval of no length: a copy of `x`, and no call."""
    status = row_status(x)
    times = torch.full(status.shape, t, dtype=torch.float64, device=x.device)
    steps = torch.zeros_like(status)
    return Solution(x.clone(), times, status, 0, steps, steps.clone())


class DormandPrince(Integrator):
    r"""Dormand-Prince 5(4), each sample at its own time and with its own step.

    No row's numbers depend on the other rows, apart from what the drift itself does: sums run in
    a fixed order, and powers are taken by one routine. A finished row leaves the batch, so the
    drift works only for rows that still move. A row ends with

    - `Status.OK` at `t_end`;
    - `Status.NONFINITE` if the drift is not finite at the start, or at every step down to a few
      ulp of the time: a trial step that meets such a value is shrunk by 10 and tried again;
    - `Status.STEP_LIMIT` after `max_steps`, or if the tolerance asks for a step of a few ulp;
    - `Status.CALL_LIMIT` or `Status.INTERRUPTED` (from the keyboard), which end all rows.

    The state is carried in its own dtype, but at least in float32, and the times in float64 on
    the host. The relative tolerance is at least `ROUNDING` ulp of the dtype of `x`. Each attempted
    step waits for the device once, to fetch the error norms. Gradients flow if they are enabled;
    step sizes count as constants.

    Args:
        rtol, atol: tolerances per element, at least 0.
        max_steps: attempted steps per row, at least 1.
        max_calls: calls of the drift, at least 1.
        first_step: size of the first step, above 0; None chooses it (one call more).
        safety: factor on the proposed step, in (0, 1).
        beta: weight of the previous error, in [0, 0.2]; 0 leaves an integral controller.

    Raises:
        ArgumentError: an argument is out of its range.

    Source:
        Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980; Hairer, Norsett,
        Wanner, "Solving Ordinary Differential Equations I", 2nd ed., sections II.4 (error norm,
        first step) and II.5 (table 5.2); Gustafsson, "Control theoretic techniques for stepsize
        selection in explicit Runge-Kutta methods", 1991; Hairer, Wanner, "Solving Ordinary
        Differential Equations II", section IV.2. Defaults are those of the code DOPRI5.
    """

    name = "dopri5"
    source = "Dormand and Prince 1980; Hairer et al. 1993, II.4-5"
    tableau: Tableau = DORMAND_PRINCE
    order = float(DORMAND_PRINCE.order)

    ROUNDING: Final = 10

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        *,
        max_steps: int = 10_000,
        max_calls: int = 100_000,
        first_step: float | None = None,
        safety: float = 0.9,
        beta: float = 0.04,
    ) -> None:
        for name, value, valid, needed in (
            ("rtol", rtol, 0 <= rtol < math.inf, "at least 0"),
            ("atol", atol, 0 <= atol < math.inf, "at least 0"),
            ("max_steps", max_steps, max_steps >= 1, "at least 1"),
            ("max_calls", max_calls, max_calls >= 1, "at least 1"),
            ("first_step", first_step, first_step is None or first_step > 0, "above 0 or None"),
            ("safety", safety, 0 < safety < 1, "in (0, 1)"),
            ("beta", beta, 0 <= beta <= 0.2, "in [0, 0.2]"),
        ):
            if not valid:
                raise ArgumentError(f"{name} is {value!r}: give a number {needed}")
        self.rtol, self.atol = rtol, atol
        self.max_steps, self.max_calls, self.first_step = max_steps, max_calls, first_step
        self.safety, self.beta = safety, beta

    def solve(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> Solution:
        """Integrate dx = drift(x, t) dt; `diffusion` and `noise` are not read."""
        field = BoundedDrift(drift, x, t_start, t_end, self.max_calls)
        if t_start == t_end or not x.numel():
            return unmoved(x, t_end)
        way = _Way(t_start, t_end, max(self.rtol, self.ROUNDING * torch.finfo(x.dtype).eps))
        ended: list[_Rows] = []
        rows, advance = self._start(field, x, way), self._first_step
        while True:
            done = (rows.status != Status.OK) | (rows.t == t_end)
            if done.any():
                ended.append(rows.take(done.nonzero().flatten()))
                rows = rows.take(done.logical_not().nonzero().flatten())
            if not len(rows.place):
                break
            try:
                rows = advance(field, rows, way)
            except CallLimit:
                rows = rows.stop(Status.CALL_LIMIT)
            except KeyboardInterrupt:
                rows = rows.stop(Status.INTERRUPTED)
            advance = self._attempt
        last = _Rows(*(torch.cat(parts) for parts in zip(*ended, strict=True)))
        last = last.take(last.place.argsort())
        host = (last.t, last.status, last.accepted, last.rejected)
        t, status, accepted, rejected = (part.to(x.device) for part in host)
        return Solution(last.x.to(x.dtype), t, status, field.calls, accepted, rejected)

    def _start(self, field: BoundedDrift, x: Tensor, way: _Way) -> _Rows:
        """All rows at `t_start`; those with no finite drift there have failed."""
        t = torch.full((x.shape[0],), way.start, dtype=torch.float64)
        past, growth = torch.full_like(t, _LEAST_PAST), torch.full_like(t, _MAX_FACTOR)
        x = x.to(field.state_dtype)
        k = field(x, field.times(t), torch.arange(len(t)))
        status = row_status(x).maximum(row_status(k)).cpu()
        none = torch.zeros_like(status)
        return _Rows(torch.arange(len(t)), t, 0 * t, past, growth, status, none, none, x, k)

    def _first_step(self, field: BoundedDrift, rows: _Rows, way: _Way) -> _Rows:
        """Hairer's choice of the first step, by the size of x'' over one small Euler step."""
        if self.first_step is not None:
            return rows._replace(h=torch.full_like(rows.t, min(self.first_step, way.length)))
        d0, d1 = torch.stack([self._norm(way, v, rows.x) for v in (rows.x, rows.k)]).cpu().double()
        flat = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = torch.where(flat, 1e-6, 0.01 * d0 / d1).clamp(max=way.length)
        x = rows.x + _lift(way.sign * h0, rows.x) * rows.k
        k = field(x, field.times(rows.t + way.sign * h0), rows.place)
        d2 = self._norm(way, k - rows.k, rows.x).cpu().double() / h0
        steep = torch.maximum(d1, d2)
        h1 = torch.where(
            steep > 1e-15, _power(0.01 / steep, 1 / self.order), (1e-3 * h0).clamp(min=1e-6)
        )
        h = torch.where(d2.isfinite(), torch.minimum(100 * h0, h1), h0)
        return rows._replace(h=h.clamp(max=way.length).maximum(way.least_step(rows.t)))

    def _attempt(self, field: BoundedDrift, rows: _Rows, way: _Way) -> _Rows:
        """One trial step of every row."""
        left = (way.end - rows.t).abs()
        last = 1.01 * rows.h >= left
        h = torch.where(last, left, rows.h)
        c = torch.tensor(self.tableau.c, dtype=torch.float64)[:, None]
        times = field.times(rows.t + way.sign * c * h)
        step = _lift(way.sign * h, rows.x)
        x, k = rows.x, [rows.k]
        for weights, t in zip(self.tableau.a[1:], times[1:], strict=True):
            x = rows.x + step * _combine(weights, k)
            k.append(field(x, t, rows.place))
        with torch.no_grad():
            e = step * _combine(self.tableau.e, k)
            norm = self._norm(way, e, rows.x.abs().maximum(x.abs()))
            norm = norm.masked_fill(row_status(x).maximum(row_status(e)) != Status.OK, math.inf)
            accept = _lift(norm <= 1, rows.x)
        return self._control(rows, h, last, norm.cpu().double(), way)._replace(
            x=torch.where(accept, x, rows.x), k=torch.where(accept, k[-1], rows.k)
        )

    def _control(self, rows: _Rows, h: Tensor, last: Tensor, err: Tensor, way: _Way) -> _Rows:
        """The rows' times, next steps and statuses after trial steps `h` with errors `err`."""
        accept, finite = err <= 1, err.isfinite()
        reached = torch.where(last, way.end, rows.t + way.sign * h)
        t = torch.where(accept, reached, rows.t)
        sound = torch.where(finite, err, 1.0).clamp(min=_LEAST_ERROR)
        factor = self.safety * _power(sound, 0.75 * self.beta - 1 / self.order)
        factor = torch.where(accept, factor * _power(rows.past, self.beta), factor)
        factor = factor.clamp(min=_MIN_FACTOR).minimum(rows.growth)
        h = h * torch.where(finite, factor, _NONFINITE_FACTOR)
        accepted, rejected = rows.accepted + accept, rows.rejected + ~accept
        ended = torch.where(finite, int(Status.STEP_LIMIT), int(Status.NONFINITE))
        stuck = ~accept & (h < way.least_step(t))
        spent = (accepted + rejected >= self.max_steps) & (t != way.end)
        return rows._replace(
            t=t,
            h=h,
            past=torch.where(accept, err.clamp(min=_LEAST_PAST), rows.past),
            growth=torch.where(accept, _MAX_FACTOR, 1.0),
            status=torch.where(stuck, ended, torch.where(spent, int(Status.STEP_LIMIT), 0)),
            accepted=accepted,
            rejected=rejected,
        )

    @torch.no_grad()
    def _norm(self, way: _Way, v: Tensor, x: Tensor) -> Tensor:
        """Root mean square of v / (atol + rtol |x|) over each row, [b]."""
        scale = (x.abs() * way.rtol + self.atol).clamp(min=torch.finfo(x.dtype).tiny)
        squares = (v / scale).clamp(-_LARGE, _LARGE).square().reshape(v.shape[0], -1)
        return (_row_sum(squares) / squares.shape[1]).sqrt()


class _Way(NamedTuple):
    """The interval of one solve, and its relative tolerance."""

    start: float
    end: float
    rtol: float

    @property
    def sign(self) -> float:
        return math.copysign(1.0, self.end - self.start)

    @property
    def length(self) -> float:
        return abs(self.end - self.start)

    def least_step(self, t: Tensor) -> Tensor:
        """A step of a few ulp, below which the stages' times are no longer distinct."""
        return 16 * torch.finfo(t.dtype).eps * t.abs().clamp(min=abs(self.end))


class _Rows(NamedTuple):
    """Rows still in the batch; x and k = f(x, t) on the device, the others [b] on the host."""

    place: Tensor  # in the caller's batch
    t: Tensor
    h: Tensor  # size of the next step
    past: Tensor  # error of the last accepted step
    growth: Tensor  # greatest factor on the next step
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    x: Tensor
    k: Tensor

    def take(self, index: Tensor) -> _Rows:
        return _Rows(*(part[index.to(part.device)] for part in self))

    def stop(self, status: Status) -> _Rows:
        return self._replace(status=torch.full_like(self.status, int(status)))


_LEAST_ERROR: Final = 1e-16
_LEAST_PAST: Final = 1e-4
_MIN_FACTOR, _MAX_FACTOR, _NONFINITE_FACTOR = 0.2, 10.0, 0.1
_LARGE: Final = 1e15


def _combine(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    """sum_j weights_j k_j; each product is rounded, as a fused one might not be in every lane."""
    terms = [(w, v) for w, v in zip(weights, k, strict=False) if w]
    total = terms[0][0] * terms[0][1]
    for w, v in terms[1:]:
        total = total + w * v
    return total


def _lift(rows: Tensor, x: Tensor) -> Tensor:
    """[b] as [b, 1, ...] on the device of `x`, and in its dtype unless it is a mask."""
    dtype = rows.dtype if rows.dtype is torch.bool else x.dtype
    return rows.to(x.device, dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _row_sum(v: Tensor) -> Tensor:
    """Sum of each row of [b, n] in an order of its own: pairs, then pairs of pairs.

    A library's sum over a row may depend on the number of rows, and then so would the step.
    """
    while (n := v.shape[1]) > 1:
        head = v[:, : (n + 1) // 2].clone()
        head[:, : n // 2] += v[:, (n + 1) // 2 :]
        v = head
    return v[:, 0]


def _power(base: Tensor, exponent: float) -> Tensor:
    # torch takes another routine for the tail of a tensor than for its body; numpy does not.
    return torch.from_numpy(np.power(base.numpy(), exponent))
