r"""The adaptive loop: every row with its own time, step size and status.

A method makes a trial step and says how far two of its answers are apart. With err the root mean
square over the event of that distance over atol + rtol max(|y|, |y'|), a step is accepted if
err <= 1, and the next one is

    h' = h safety err^-((I + P + D)/q) err_1^((P + 2 D)/q) err_2^(-D/q),

err_1 and err_2 those of the two accepted before, and q the order of err in h.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import (
    ArgumentError,
    ModelWarning,
    Status,
    known_name,
    real_number,
    row_status,
    whole_number,
)
from scoresolve.noise import NoiseSource
from scoresolve.precision import widest
from scoresolve.solvers.adaptive.coordinates import COORDINATES, Coordinates, coordinates_for
from scoresolve.solvers.adaptive.drift import BoundedDrift, CallLimit, unmoved
from scoresolve.solvers.adaptive.path import Event, Path, Record
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lift, row_norm
from scoresolve.solvers.integrator import GaussianFlow, Integrator, RowDrift, Solution

__all__ = ["Adaptive", "Trial"]

_LEAST_ERROR: Final = 1e-16
_LARGE: Final = 1e15
_LEAST_PAST: Final = 1e-4
_MIN_FACTOR, _MAX_FACTOR, _NONFINITE_FACTOR = 0.2, 10.0, 0.1
_ASK_AGAIN: Final = 100
_LEAST_TRY: Final = 1e-8


class _Noisy(Exception):
    """The drift answers the same question differently."""


_REASONS: Final[dict[type[BaseException], Status]] = {
    CallLimit: Status.CALL_LIMIT,
    _Noisy: Status.NOISY,
}


class Trial(NamedTuple):
    """What a trial step found.

    Attributes:
        y: the states [b, *event] at the end of the step.
        slope: dy/du there.
        errors: distances of two answers, [n, b, *event], the first of which decides.
        memory: what the rows keep if the step is accepted.
        factors: on the errors, [n, b] or fewer.
    """

    y: Tensor
    slope: Tensor
    errors: Tensor
    memory: tuple[Any, ...] = ()
    factors: Numbers | float = 1.0


class Adaptive(Integrator):
    r"""A solver of the probability flow whose steps follow its error, sample by sample.

    No row's numbers depend on the other rows, apart from what the drift itself does. A finished
    row leaves the batch, and the next waiting one takes its place: the first slopes of as many as
    the batch holds are asked for in one call, ahead, so that every call is full as long as samples
    wait. A row ends with

    - `Status.OK` at `t_end`, `Status.EVENT` where the event happened;
    - `Status.NONFINITE` if the slope is not finite or the event NaN at the start, or at every step
      down to 1e-8 of the interval: a trial step that meets such a value is shrunk by 10 and tried
      again;
    - `Status.STEP_LIMIT` after `max_steps`, or if the tolerance asks for a step of a few ulp;
    - `Status.NOISY` if the drift answers the same question differently, as with dropout on: some
      rows that made many steps are asked twice. It ends all rows;
    - `Status.CALL_LIMIT` or `Status.INTERRUPTED` (from the keyboard), which end all rows.

    The state is carried in its own dtype, but at least in float32, and the times in float64 on
    the host. The relative tolerance is at least `ROUNDING` ulp of the dtype of `x`, and a warning
    says so. Each attempted step waits for the device once, to fetch the error norms. Gradients
    flow if they are enabled; step sizes count as constants.

    Args:
        rtol, atol: tolerances per element, at least 0; in units of the data's own size where the
            coordinates have them.
        max_steps: attempted steps per row, at least 1.
        max_calls: calls of the drift, at least 1.
        first_step: length of the first step, above 0; None chooses it.
        safety: factor on the proposed step, in (0, 1).
        control: P, I and D of the controller, each in [-1, 1], I above 0; the method's own if
            omitted.
        coordinates: "time", "scaled" or "log_snr", see `scoresolve.solvers.adaptive.coordinates`.
        coupled: whether all rows make one step, whose error is the mean square of theirs. A
            sample then depends on its neighbours; one that alone meets a NaN ends there.
        save_at: times at which to keep the states, in the direction of time, a sequence or a
            tensor [S]; no further calls.
        dense: whether to keep the path, so that it can be evaluated at any time.
        event: a function (x [b, *event], t [b]) -> [b]; a row ends where it changes its sign or,
            if it is bool, its truth. It is looked at where steps end, and followed to the place
            from there, so a change and back within one step is not seen. A step to where it is
            NaN is tried again, shorter.

    Raises:
        ArgumentError: an argument is out of its range.
    """

    refills = True
    usual_coordinates: str | None = "time"
    possible_coordinates: tuple[str, ...] = COORDINATES
    usual_control: tuple[float, float, float] = (0.0, 1.0, 0.0)
    longest: float = math.inf

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
        control: tuple[float, float, float] | None = None,
        coordinates: str | None = None,
        coupled: bool = False,
        save_at: Sequence[float] | Tensor = (),
        dense: bool = False,
        event: Event | None = None,
    ) -> None:
        self.rtol, self.atol = (
            real_number("rtol", rtol, least=0),
            real_number("atol", atol, least=0),
        )
        self.max_steps = whole_number("max_steps", max_steps)
        self.max_calls = whole_number("max_calls", max_calls)
        self.first_step = None if first_step is None else real_number("first_step", first_step, 0)
        self.safety = real_number("safety", safety, above=0, most=1)
        shares = self.usual_control if control is None else control
        if not isinstance(shares, Sequence) or len(shares) != 3 or isinstance(shares, str):
            raise ArgumentError(f"control = {control!r}: give P, I and D")
        p, i, d = (real_number("control", v, least=-1, most=1) for v in shares)
        if i <= 0:
            raise ArgumentError(f"control = {control!r}: give an I above 0")
        if isinstance(save_at, Tensor) and save_at.ndim == 1:
            save_at = save_at.tolist()
        if not isinstance(save_at, Sequence) or isinstance(save_at, str):
            raise ArgumentError(f"save_at = {save_at!r}: give a sequence of times")
        if event is not None and not callable(event):
            raise ArgumentError(f"event = {event!r}: give a function of x and t")
        if self.safety == 1:
            raise ArgumentError("safety = 1: give a factor below 1")
        if coordinates is not None:
            known_name("coordinates", coordinates, COORDINATES)
        if coordinates not in (None, *self.possible_coordinates):
            raise ArgumentError(
                f"coordinates = {coordinates!r}: {type(self).__name__} is written in coordinates "
                "of its own, leave them out"
            )
        self.control, self.coupled = (p, i, d), coupled
        self.coordinates = coordinates or self.usual_coordinates
        self.dense, self.event = dense, event
        self.save_at = tuple(real_number("save_at", t) for t in save_at)

    def way(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None,
        noise: NoiseSource | None,
        flow: GaussianFlow | None,
    ) -> Coordinates:
        """The problem in the solver's coordinates."""
        if flow is None and self.coordinates == self.usual_coordinates == "log_snr":
            raise ArgumentError(
                f"{self.name!r} steps in log-SNR, which only the flow of samples of a Gaussian "
                "process has, not another process, nor a flow with a density beside it: take "
                "'dopri5' or 'adams'"
            )
        return coordinates_for(self.coordinates, drift, flow, x, t_start, t_end, self.max_calls)

    @abstractmethod
    def trial(self, way: Coordinates, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        """A trial step of every row to `u` [b], by `h` [b] (with its sign)."""

    def memory(self, way: Coordinates, rows: Rows) -> tuple[Any, ...]:
        """What rows keep before their first step."""
        return ()

    def judge(self, rows: Rows, errors: Numbers) -> Numbers:
        """The errors that decide, from the norms [n, b] of those of the trial."""
        return errors

    def first_steps(self, way: Coordinates, rows: Rows) -> Numbers:
        """Lengths of the first steps [b]: a hundredth of what turns the state around."""
        both = torch.stack((rows.y, rows.slope))
        d0, d1 = self.norms(way, both, rows.y.abs(), rows.u).clip(max=_LARGE)
        turn = d0.clip(min=1.0) / d1.clip(min=1 / _LARGE**2)
        lengths: Numbers = (0.01 * turn).clip(max=way.length / 10)
        return lengths

    def resize(self, rows: Rows, errors: Numbers, accept: Numbers) -> tuple[Numbers, Rows]:
        """Factors on the steps [b] for errors [n, b], and the rows with what the method changes."""
        p, i, d = self.control
        q, error, (one, two) = self.order, errors[0], rows.past
        sound = np.where(np.isfinite(error), error, 1.0).clip(min=_LEAST_ERROR)
        factor = self.safety * sound ** (-(p + i + d) / q)
        grown = factor * (one ** ((p + 2 * d) / q) * two ** (-d / q))
        past = np.where(accept, (error.clip(min=_LEAST_PAST), one), rows.past)
        return np.where(accept, grown, factor).clip(min=_MIN_FACTOR), rows._replace(past=past)

    def settle(self, h: Numbers) -> Numbers:
        """The lengths of the next steps [b], where the control asks for `h`."""
        return h

    def solve(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None = None,
        noise: NoiseSource | None = None,
        *,
        flow: GaussianFlow | None = None,
        width: int | None = None,
    ) -> Solution:
        """Integrate dx = drift(x, t) dt, and + diffusion(t) dw if it is stochastic."""
        if flow is not None:
            self.check_direction(t_start, t_end)
        if t_start == t_end or not x.numel():
            BoundedDrift(drift, x, t_start, t_end, self.max_calls)
            return unmoved(x, t_end, len(self.save_at), self.dense)
        way = self.way(drift, x, t_start, t_end, diffusion, noise, flow)
        self._warn_of_rounding(x.dtype)
        y = way.start_of(x.to(way.inside.state_dtype))
        record = Record(way, y, self.save_at, self.dense, self.event)
        batch = y.shape[0]
        width = min(width or batch, batch)
        waiting, ended = _start_rows(y, way.start), list[Rows]()
        rows = ready = waiting.part(slice(0))
        asked_again = _ASK_AGAIN
        while True:
            done = (rows.status != Status.OK) | (rows.u == way.end)
            if done.any():
                ended.append(rows.take(done.nonzero()[0]).bare())
                rows = rows.take((~done).nonzero()[0])
            free = 0 if self.coupled and len(rows.place) else width - len(rows.place)
            try:
                if free and len(ready.place):
                    begun = self._begin(way, record, ready.part(slice(free)))
                    rows, ready = Rows.join([rows, begun]), ready.part(slice(free, None))
                elif free and len(waiting.place):
                    guests = waiting.part(slice(width))
                    slope = way.slope(guests.y, guests.u, guests.place)
                    ready, waiting = guests._replace(slope=slope), waiting.part(slice(width, None))
                elif len(rows.place):
                    rows = self._step(way, record, rows)
                    way.drift.tell_of_many_calls(partial(_progress, way, rows))
                    if (rows.accepted + 4 * rows.rejected >= asked_again).any():
                        asked_again *= 2
                        self._ask_again(way, rows)
                else:
                    break
            except (CallLimit, _Noisy, KeyboardInterrupt) as reason:
                why = _REASONS.get(type(reason), Status.INTERRUPTED)
                ended += [part.bare().stop(why, way.end) for part in (rows, ready, waiting)]
                break
        last = Rows.join(ended)
        last = last.take(last.place.argsort())
        t = torch.from_numpy(way.time(last.u)).to(x.device, widest(x.device))
        host = (last.status, last.accepted, last.rejected)
        status, accepted, rejected = (torch.from_numpy(part).to(x.device) for part in host)
        return Solution(
            way.state(last.y, last.u).to(x.dtype),
            t,
            status,
            way.drift.calls,
            accepted,
            rejected,
            way.drift.evaluations.to(x.device),
            record.saved.to(x.dtype) if self.save_at else None,
            Path(record) if self.dense else None,
        )

    def _warn_of_rounding(self, dtype: torch.dtype) -> None:
        least = self.ROUNDING * torch.finfo(dtype).eps
        if max(self.rtol, self.atol) < least:
            warnings.warn(
                f"rtol = {self.rtol:g} and atol = {self.atol:g} are below what {dtype} resolves: "
                f"below {least:.1e} more steps buy nothing, give a float64 state",
                ModelWarning,
                stacklevel=3,
            )

    def _begin(self, way: Coordinates, record: Record, rows: Rows) -> Rows:
        """Rows that know their slopes, ready for a step; those with no finite slope have failed."""
        rows = rows._replace(memory=self.memory(way, rows), before=record.begin(rows))
        status = row_status(rows.y).maximum(row_status(rows.slope)).cpu().numpy()
        for value in rows.before[3:]:
            status = np.where(np.isnan(value), int(Status.NONFINITE), status)
        h = self._first(way, rows)
        if self.coupled and (status == Status.OK).any():
            h = np.full_like(h, h[status == Status.OK].min())
        return rows._replace(h=h, status=status)

    def _first(self, way: Coordinates, rows: Rows) -> Numbers:
        if self.first_step is not None:
            return np.full_like(rows.u, min(self.first_step, way.length))
        return self.first_steps(way, rows).clip(min=way.least_step)

    def _step(self, way: Coordinates, record: Record, rows: Rows) -> Rows:
        """One trial step of every row."""
        if self.coupled:
            return self._step_together(way, record, rows)
        u, h = self._ahead(way, rows)
        trial = self.trial(way, rows, u, way.sign * h)
        errors, value = self._errors(way, record, rows, u, trial)
        accept = errors[0] <= 1
        before = record.see(rows, u, trial.y, trial.slope, value, accept)
        new = rows._replace(y=trial.y, slope=trial.slope, memory=trial.memory, before=before)
        new = new.revert(rows, (~accept).nonzero()[0])
        return record.stop(self._control(way, new, h, u, errors, accept))

    def _step_together(self, way: Coordinates, record: Record, rows: Rows) -> Rows:
        """One trial step of all rows, whose numbers are the same; one not finite alone has failed.

        Numbers are kept once for all: [1] where those of rows apart are [b].
        """
        common = rows.common()
        u, h = self._ahead(way, common)
        trial = self.trial(way, common, u, way.sign * h)
        errors, value = self._errors(way, record, common, u, trial)
        finite = np.isfinite(errors[0])
        lost = (~finite).nonzero()[0] if finite.any() else np.arange(0)
        errors = np.sqrt(np.square(errors[:, finite] if len(lost) else errors).mean(1))[:, None]
        accept = errors[0] <= 1
        moved = accept.repeat(len(rows.place))
        moved[lost] = False
        every = u.repeat(len(rows.place))
        before = record.see(rows, every, trial.y, trial.slope, value, moved)
        new = common._replace(y=trial.y, slope=trial.slope, memory=trial.memory, before=before)
        new = new if accept[0] else new.revert(common, np.arange(len(rows.place)))
        new = record.stop(self._control(way, new, h, u, errors, accept).spread())
        if len(lost):
            failed = rows.take(lost)
            status = np.full_like(failed.status, int(Status.NONFINITE))
            failed = failed._replace(status=status, rejected=failed.rejected + 1)
            new = Rows.join([new.take(finite.nonzero()[0]), failed])
        return new

    def _ahead(self, way: Coordinates, rows: Rows) -> tuple[Numbers, Numbers]:
        """To where the next step goes, and how far that is."""
        left, longest = np.abs(way.end - rows.u), np.minimum(rows.h, self.longest)
        last = 1.01 * longest >= left
        h = np.where(last, left, longest)
        return np.where(last, way.end, rows.u + way.sign * h), h

    @torch.no_grad()
    def _errors(
        self, way: Coordinates, record: Record, rows: Rows, u: Numbers, trial: Trial
    ) -> tuple[Numbers, Numbers]:
        """The errors [n, b] of a trial step to `u` that decide, and the event's value there."""
        tall = rows.y.abs().maximum(trial.y.abs())
        tall = tall.add(trial.y + trial.slope, alpha=0)  # NaN where one is not finite
        norms = self.norms(way, trial.errors, tall, u)
        value = record.value(trial.y, u)
        errors = np.minimum(np.abs(trial.factors) * norms, _LARGE)
        errors[np.isnan(errors + value)] = math.inf
        return self.judge(rows, errors), value

    def _control(
        self,
        way: Coordinates,
        rows: Rows,
        h: Numbers,
        u: Numbers,
        errors: Numbers,
        accept: Numbers,
    ) -> Rows:
        """The rows' places, next steps and statuses after trial steps `h` with their errors."""
        finite = np.isfinite(errors[0])
        factor, rows = self.resize(rows, errors, accept)
        h = self.settle(h * np.where(finite, np.minimum(factor, rows.growth), _NONFINITE_FACTOR))
        accepted, rejected = rows.accepted + accept, rows.rejected + ~accept
        u = np.where(accept, u, rows.u)
        hopeless = max(_LEAST_TRY * way.length, way.least_step)
        least = np.where(finite, way.least_step, hopeless)
        failed = np.where(finite, int(Status.STEP_LIMIT), int(Status.NONFINITE))
        spent = int(Status.STEP_LIMIT) * (accepted + rejected >= self.max_steps)
        status = np.where(h < least, failed, spent)
        status[u == way.end] = int(Status.OK)
        return rows._replace(
            u=u,
            h=h,
            growth=np.where(accept, _MAX_FACTOR, 1.0),
            status=status,
            accepted=accepted,
            rejected=rejected,
        )

    def _ask_again(self, way: Coordinates, rows: Rows) -> None:
        """Raise `_Noisy` if the drift does not answer the same question the same way twice."""
        some = rows.take((-rows.rejected).argsort(kind="stable")[:8])
        one, two = (way.slope(some.y, some.u, some.place) for _ in range(2))
        if bool((one - two).abs().max() > 1e3 * torch.finfo(one.dtype).eps * one.abs().max()):
            warnings.warn(
                "the model gives another answer when asked the same again, so no step size meets "
                "the tolerance: call net.eval(), or take a fixed-grid solver",
                ModelWarning,
                stacklevel=4,
            )
            raise _Noisy

    @torch.no_grad()
    def norms(self, way: Coordinates, errors: Tensor, tall: Tensor, u: Numbers) -> Numbers:
        """Root mean squares [n, b] of errors [n, b, *event] of states as tall as `tall` >= 0."""
        rtol = max(self.rtol, self.ROUNDING * torch.finfo(way.inside.dtype).eps)
        unit, least = way.unit(u), torch.finfo(tall.dtype).tiny
        floor = np.maximum(self.atol / (np.ones(1) if unit is None else unit), least)
        return row_norm(errors / (tall * rtol + lift(floor, tall)))


def _progress(way: Coordinates, rows: Rows, place: int) -> str:
    """How far the row `place` of the caller's batch has come."""
    u = rows.u[rows.place == place]
    t = f"t = {float(way.time(u)[0]):.6g}" if len(u) else "its end"
    return f"{t} on the way to {float(way.time(np.array([way.end]))[0]):.6g}"


def _start_rows(y: Tensor, start: float) -> Rows:
    """Rows at the start, that know no slope yet."""
    u = np.full(y.shape[0], start)
    past, none = np.full((2, len(u)), _LEAST_PAST), np.zeros(len(u), np.int64)
    growth = np.full_like(u, _MAX_FACTOR)
    return Rows(np.arange(len(u)), u, 0 * u, past, growth, none, none, none, y, y)
