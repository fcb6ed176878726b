"""The path between the steps: states at given times, anywhere on it, and events.

What lies between the ends of a step is known to the coordinates (`Coordinates.between`), and costs
no call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, Status, real_number
from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.points import Point
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lift

__all__ = ["Event", "Path", "Record"]

Event = Callable[[Tensor, Tensor], Tensor]

_BISECTIONS = 60
_SLACK = 1e-6


class _Segment(NamedTuple):
    """One accepted step of some rows, by its end, its start and the point before.

    It counts up to u = reach, where the step or the row ended.
    """

    reach: Numbers
    new: Point
    now: Point
    before: Point

    @property
    def place(self) -> Numbers:
        return self.now.place

    def at(self, way: Coordinates, u: Numbers) -> Tensor:
        return way.between(self.now, self.new, self.before, u)

    def take(self, index: Numbers) -> _Segment:
        points = (self.new.take(index), self.now.take(index), self.before.take(index))
        return _Segment(self.reach[index], *points)


class Record:
    """What is kept of the path while it is found.

    Args:
        way: the coordinates.
        y: the start of all rows, [B, *event].
        save_at: times to keep states at, in the direction of time; one that a tensor of float32
            rounds beyond an end of the interval is that end.
        dense: whether to keep every step.
        event: where rows end.

    Attributes:
        segments: the steps, if dense.

    Raises:
        ArgumentError: `save_at` is not ordered or leaves the interval, or the event does not
            return one number per sample.
    """

    def __init__(
        self,
        way: Coordinates,
        y: Tensor,
        save_at: Sequence[float],
        dense: bool,
        event: Event | None,
    ) -> None:
        self.way, self.y, self.dense, self.event = way, y, dense, event
        ends = [float(way.time(np.array([u]))[0]) for u in (way.start, way.end)]
        low, high = min(ends), max(ends)
        slack = _SLACK * (high - low)
        if sorted(save_at, reverse=ends[1] < ends[0]) != [*save_at] or any(
            not low - slack <= t <= high + slack for t in save_at
        ):
            raise ArgumentError(
                f"save_at = {tuple(save_at)}: give times from {ends[0]:g} to {ends[1]:g}, in order"
            )
        marks = [way.clock(min(max(t, low), high)) for t in save_at]
        self.marks = np.array(marks, dtype=np.float64)[:, None]
        self.value(y[:1], np.array([way.start]))  # before any call
        self._saved = list[tuple[Numbers, Tensor]]()
        self.segments: list[_Segment] = []
        self.stops: tuple[Numbers, Numbers, Tensor] | None = None

    @property
    def idle(self) -> bool:
        return not (len(self.marks) or self.dense or self.event)

    @property
    def saved(self) -> Tensor:
        """States x at `save_at`, [S, B, *event]; NaN where a row did not come so far."""
        places, states = zip(*self._saved, strict=True) if self._saved else ((), ())
        x = self.y.new_full((len(self.marks) * len(self.y), *self.y.shape[1:]), torch.nan)
        if states:
            place = torch.from_numpy(np.concatenate(places)).to(x.device)
            x = x.index_copy(0, place, torch.cat(states))
        return x.reshape(len(self.marks), *self.y.shape)

    def begin(self, rows: Rows) -> tuple[Any, ...]:
        """The point before the start, which is the start; with the event's value there."""
        if self.idle:
            return ()
        number, row = (self.marks == rows.u).nonzero()
        x = self.way.state(rows.y, rows.u)[torch.from_numpy(row).to(rows.y.device)]
        self._save(number, rows.place[row], x)
        return rows.u, rows.y, rows.slope, self.value(rows.y, rows.u)

    def see(
        self, rows: Rows, u: Numbers, y: Tensor, slope: Tensor, value: Numbers, accept: Numbers
    ) -> tuple[Any, ...]:
        """Record the accepted steps of `rows` to (u, y, slope), where the event has that value.

        Returns:
            Their points before.
        """
        if self.idle:
            return ()
        moved = accept.nonzero()[0]
        new, now = Point(rows.place, u, y, slope), Point(rows.place, rows.u, rows.y, rows.slope)
        segment = _Segment(u, new, now, Point(rows.place, *rows.before[:3])).take(moved)
        if self.event and len(moved):
            reach = self._cross(segment, rows.before[3][moved], value[moved], moved)
            segment = segment._replace(reach=reach)
        if self.dense:
            self.segments.append(segment)
        passed = (segment.now.u - self.marks) * (segment.reach - self.marks) <= 0
        number, row = (passed & (segment.now.u != self.marks)).nonzero()
        if len(row):
            part, at = segment.take(row), self.marks[number, 0]
            self._save(number, part.place, self.way.state(part.at(self.way, at), at))
        (old_u, old_y, old_slope, old_value), mask = rows.before, lift(accept, y)
        return (
            np.where(accept, now.u, old_u),
            torch.where(mask, now.y, old_y),
            torch.where(mask, now.slope, old_slope),
            np.where(accept, value, old_value),
        )

    def stop(self, rows: Rows) -> Rows:
        """`rows`, those whose event happened at its place and ended."""
        if self.stops is None:
            return rows
        index, u, y = self.stops
        self.stops = None
        reached, status = rows.u.copy(), rows.status.copy()
        reached[index], status[index] = u, int(Status.EVENT)
        y = rows.y.index_copy(0, torch.from_numpy(index).to(y.device), y)
        return rows._replace(u=reached, y=y, status=status)

    def value(self, y: Tensor, u: Numbers) -> Numbers:
        """The event's value at states and their places, [b]: -1 and 1 for a condition."""
        if self.event is None:
            return np.zeros(1)
        way, u = self.way, np.broadcast_to(u, len(y))
        with torch.no_grad():
            value = self.event(way.state(y, u).to(way.inside.dtype), way.inside.times(way.time(u)))
        if not isinstance(value, Tensor) or value.shape != u.shape or value.is_complex():
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(
                f"the event returned {found} for {len(u)} samples: return a tensor [b] with one "
                "real number, or one condition, per sample"
            )
        number = value.cpu().double().numpy()
        return 2 * number - 1 if value.dtype is torch.bool else number

    def _cross(self, segment: _Segment, old: Numbers, new: Numbers, moved: Numbers) -> Numbers:
        """Where the event happened, or else the ends of the steps, [b]."""
        hit = ((np.sign(old) * np.sign(new) < 0) | ((new == 0) & (old != 0))).nonzero()[0]
        if not len(hit):
            return segment.new.u
        part, sign = segment.take(hit), np.sign(old[hit])
        low, high = part.now.u, part.new.u
        with torch.no_grad():
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                same = np.sign(self.value(part.at(self.way, middle), middle)) == sign
                low, high = np.where(same, middle, low), np.where(same, high, middle)
        self.stops = moved[hit], high, part.at(self.way, high)
        reach = segment.new.u.copy()
        reach[hit] = high
        return reach

    def _save(self, number: Numbers, place: Numbers, x: Tensor) -> None:
        self._saved.append((number * len(self.y) + place, x))


class Path:
    """The path of all rows: `path(t)` is x at time t.

    Args:
        record: what was kept of it.
    """

    def __init__(self, record: Record) -> None:
        self.way, self.y, self.segments = record.way.bare(), record.y, record.segments

    def __call__(self, t: float) -> Tensor:
        """x at time `t`, [B, *event]; NaN for the rows that did not come so far.

        Raises:
            ArgumentError: `t` is outside the interval.
        """
        ends = [self.way.start, self.way.end]
        u = self.way.clock(real_number("t", t))
        if not min(ends) <= u <= max(ends):
            raise ArgumentError(f"t = {t:g} is outside the interval of the path")
        y = torch.full_like(self.y, torch.nan) if u != self.way.start else self.y
        for segment in self.segments:
            inside = ((segment.now.u - u) * (segment.reach - u) <= 0).nonzero()[0]
            if len(inside):
                part = segment.take(inside)
                place = torch.from_numpy(part.place).to(y.device)
                y = y.index_copy(0, place, part.at(self.way, np.full(len(inside), u)))
        return self.way.state(y, np.full(y.shape[0], u))
