"""The path between the steps: states at given times, anywhere on it, and events.

Through the ends of a step and the point before it, (u_i, y_i, y_i'), runs a polynomial of degree 5
(Hermite); on the first step there is no point before, and the degree is 3. It costs no call, and is
as good as the steps up to order 5: under the long steps of dop853 it is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, Status, real_number
from scoresolve.solvers.adaptive.coordinates import Coordinates
from scoresolve.solvers.adaptive.rows import Rows, lift

__all__ = ["Event", "Path", "Point", "Record", "hermite"]

Event = Callable[[Tensor, Tensor], Tensor]

_BISECTIONS = 60


class Point(NamedTuple):
    """Rows at one point: u [b] on the host, y and dy/du [b, *event]."""

    u: Tensor
    y: Tensor
    slope: Tensor

    def take(self, index: Tensor) -> Point:
        return Point(*(part[index.to(part.device)] for part in self))


def hermite(points: Sequence[Point], u: Tensor) -> Tensor:
    """The polynomial through states and slopes at `points`, at u [b], by divided differences.

    A last point that coincides with the first is left out, row by row.
    """
    nodes = [point.u for point in points for _ in (0, 1)]
    column = [point.y for point in points for _ in (0, 1)]
    total, product = column[0], torch.ones_like(u)
    for depth in range(1, len(nodes)):
        below = column
        column = []
        for i in range(len(nodes) - depth):
            gap = nodes[i + depth] - nodes[i]
            if depth == 1 and i % 2 == 0:
                column.append(points[i // 2].slope)
            else:
                share = torch.where(gap == 0, 0.0, 1 / gap)
                column.append((below[i + 1] - below[i]) * lift(share, below[i]))
        product = product * (u - nodes[depth - 1])
        total = total + lift(product, column[0]) * column[0]
    return total


class _Segment(NamedTuple):
    """One accepted step of some rows, by its end, its start and the point before.

    It counts up to u = reach, where the step or the row ended.
    """

    place: Tensor
    reach: Tensor
    new: Point
    now: Point
    before: Point

    def at(self, u: Tensor) -> Tensor:
        return hermite((self.now, self.new, self.before), u)

    def take(self, index: Tensor) -> _Segment:
        points = (self.new.take(index), self.now.take(index), self.before.take(index))
        return _Segment(self.place[index], self.reach[index], *points)


class Record:
    """What is kept of the path while it is found.

    Args:
        way: the coordinates.
        y: the start of all rows, [B, *event].
        save_at: times to keep states at, in the direction of time.
        dense: whether to keep every step.
        event: where rows end.

    Attributes:
        saved: states x at `save_at`, [S, B, *event]; NaN where a row did not come so far.
        segments: the steps, if dense.

    Raises:
        ArgumentError: `save_at` is not ordered or leaves the interval.
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
        times = [real_number("save_at", t) for t in save_at]
        ends = [
            float(way.time(torch.tensor([u], dtype=torch.float64))) for u in (way.start, way.end)
        ]
        if times != sorted(times, reverse=ends[1] < ends[0]) or any(
            not min(ends) <= t <= max(ends) for t in times
        ):
            raise ArgumentError(
                f"save_at = {tuple(times)}: give times from {ends[0]:g} to {ends[1]:g}, in order"
            )
        self.marks = [way.clock(t) for t in times]
        self._value(y[:1], torch.tensor([way.start], dtype=torch.float64))  # before any call
        self.saved = y.new_full((len(times), *y.shape), torch.nan)
        self.segments: list[_Segment] = []
        self.stops: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def idle(self) -> bool:
        return not (self.marks or self.dense or self.event)

    def begin(self, rows: Rows) -> tuple[Tensor, ...]:
        """The point before the start, which is the start; with the event's value there."""
        if self.idle:
            return ()
        for number, mark in enumerate(self.marks):
            if mark == self.way.start:
                self._save(number, rows.place, self.way.state(rows.y, rows.u))
        return rows.u, rows.y, rows.slope, self._value(rows.y, rows.u)

    def see(
        self, rows: Rows, u: Tensor, y: Tensor, slope: Tensor, accept: Tensor
    ) -> tuple[Tensor, ...]:
        """Record the accepted steps of `rows` to (u, y, slope); returns their points before."""
        if self.idle:
            return ()
        value = self._value(y, u) if self.event else rows.before[3]
        moved = accept.nonzero().flatten()
        before = Point(*rows.before[:3])
        segment = _Segment(
            rows.place, u, Point(u, y, slope), Point(rows.u, rows.y, rows.slope), before
        ).take(moved)
        if self.event and len(moved):
            reach = self._cross(segment, rows.before[3][moved], value[moved], moved)
            segment = segment._replace(reach=reach)
        if self.dense:
            self.segments.append(segment)
        for number, mark in enumerate(self.marks):
            passed = (segment.now.u - mark) * (segment.reach - mark) <= 0
            inside = (passed & (segment.now.u != mark)).nonzero().flatten()
            if len(inside):
                at = torch.full((len(inside),), mark, dtype=torch.float64)
                part = segment.take(inside)
                self._save(number, part.place, self.way.state(part.at(at), at))
        now = (rows.u, rows.y, rows.slope, value)
        return tuple(
            torch.where(lift(accept, a) if a.ndim > 1 else accept, a, b)
            for a, b in zip(now, rows.before, strict=True)
        )

    def stop(self, rows: Rows) -> Rows:
        """`rows`, those whose event happened at its place and ended."""
        if self.stops is None:
            return rows
        index, u, y = self.stops
        self.stops = None
        status = rows.status.index_fill(0, index, int(Status.EVENT))
        return rows._replace(
            u=rows.u.index_copy(0, index, u),
            y=rows.y.index_copy(0, index.to(y.device), y),
            status=status,
        )

    def _value(self, y: Tensor, u: Tensor) -> Tensor:
        if self.event is None:
            return torch.zeros_like(u)
        way = self.way
        with torch.no_grad():
            value = self.event(way.state(y, u).to(way.drift.dtype), way.drift.times(way.time(u)))
        if value.shape != u.shape:
            raise ArgumentError(
                f"the event returned shape {tuple(value.shape)} for {len(u)} samples: "
                "return one number per sample"
            )
        return value.cpu().double()

    def _cross(self, segment: _Segment, old: Tensor, new: Tensor, moved: Tensor) -> Tensor:
        """Where the event happened, or else the ends of the steps, [b]."""
        hit = ((old.sign() * new.sign() < 0) | ((new == 0) & (old != 0))).nonzero().flatten()
        if not len(hit):
            return segment.new.u
        part, sign = segment.take(hit), old[hit].sign()
        low, high = part.now.u, part.new.u
        with torch.no_grad():
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                same = self._value(part.at(middle), middle).sign() == sign
                low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        self.stops = moved[hit], high, part.at(high)
        return segment.new.u.index_copy(0, hit, high)

    def _save(self, number: int, place: Tensor, x: Tensor) -> None:
        index = place.to(x.device)
        row = self.saved[number].index_copy(0, index, x)
        self.saved = torch.stack([*self.saved[:number], row, *self.saved[number + 1 :]])


class Path:
    """The path of all rows: `path(t)` is x at time t.

    Args:
        record: what was kept of it.
    """

    def __init__(self, record: Record) -> None:
        self.way, self.y, self.segments = record.way, record.y, record.segments

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
            inside = ((segment.now.u - u) * (segment.reach - u) <= 0).nonzero().flatten()
            if len(inside):
                part = segment.take(inside)
                at = part.at(torch.full((len(inside),), u, dtype=torch.float64))
                y = y.index_copy(0, part.place.to(y.device), at)
        return self.way.state(y, torch.full((y.shape[0],), u, dtype=torch.float64))
