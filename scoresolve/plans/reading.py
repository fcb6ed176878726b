"""Reading a saved plan: everything that a traced plan promises is asked before it may run.

Registers are written once and before they are read, calls lie in the grid's interval, coefficients
are finite, and step i ends at time i + 1 of the grid.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from scoresolve.errors import ArgumentError, short
from scoresolve.models import PREDICTIONS
from scoresolve.plans.stages import Call, Combine, Draw, Drift, Mark, Stage
from scoresolve.sde import SchedulePoint

__all__ = ["VERSION", "read"]

VERSION = 1
_KINDS: dict[str, type[Any]] = {cls.kind: cls for cls in (Call, Draw, Combine, Drift, Mark)}
_KEYS = {
    "call": ("out", "x", "t", "prediction", "point"),
    "draw": ("out", "index", "t", "s", "area"),
    "combine": ("out", "terms"),
    "drift": ("out", "x", "t"),
    "mark": ("x", "step", "t"),
}
_PLAN = ("solver", "process", "times", "denoised", "start", "end", "prior_std", "stages", "output")


class _Fault(Exception):
    """What is wrong with the text."""


def read(text: str) -> dict[str, Any]:
    """The fields of the plan that `Plan.to_json` wrote.

    Raises:
        ArgumentError: `text` is not such a plan; the message says what is wrong, and where.
    """
    try:
        if not isinstance(text, str):
            raise _Fault(f"it is {type(text).__name__}, give the text")
        return _plan(json.loads(text, object_pairs_hook=_once))
    except _Fault as fault:
        raise ArgumentError(f"this is not a plan written by to_json: {fault}") from None
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"this is not a plan written by to_json: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise _Fault("a key stands twice in one object")
    return entry


def _keys(where: str, entry: Any, expected: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _Fault(f"{where} is {short(entry)}, not an object")
    if missing := [key for key in expected if key not in entry]:
        raise _Fault(f"{where} has no {missing[0]!r}")
    if unknown := [key for key in entry if key not in expected]:
        raise _Fault(f"{where} has the unknown key {unknown[0]!r}")
    return entry


def _plan(data: Any) -> dict[str, Any]:
    version = data.pop("version", VERSION) if isinstance(data, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise _Fault(f"it is of version {short(version)}, this reads version {VERSION}")
    entry = _keys("the plan", data, _PLAN)
    for key in ("solver", "process"):
        if not isinstance(entry[key], str):
            raise _Fault(f"{key} is {short(entry[key])}, not text")
    denoised = _flag("denoised", entry["denoised"])
    times = tuple(_number("a time", t) for t in _items("times", entry["times"]))
    if len(times) < (1 if denoised else 2):
        raise _Fault(f"it has {len(times)} times, which make no step")
    steps = [s - t for t, s in itertools.pairwise(times)]
    if not (all(h < 0 for h in steps) or all(h > 0 for h in steps)):
        raise _Fault("its times are not strictly monotone")
    start, end = (_point(key, entry[key]) for key in ("start", "end"))
    std = entry["prior_std"]
    if len({each is None for each in (start, end, std)}) > 1:
        raise _Fault("of start, end and prior_std some are null and some are not")
    if std is not None and (std := _number("prior_std", std)) <= 0:
        raise _Fault(f"prior_std is {std:g}, not positive")
    stages = _stages(_items("stages", entry["stages"]), times, start is not None)
    output = _register("output", entry["output"])
    if output not in {0} | {stage.out for stage in stages if not isinstance(stage, Mark)}:
        raise _Fault(f"the result is register {output}, which nothing writes")
    return {
        "solver": entry["solver"],
        "process": entry["process"],
        "times": times,
        "denoised": denoised,
        "start": start,
        "end": end,
        "prior_std": std,
        "stages": stages,
        "output": output,
    }


def _stages(entries: list[Any], times: tuple[float, ...], gaussian: bool) -> tuple[Stage, ...]:
    written, drawn, ended = {0}, set[int](), 0
    stages: list[Stage] = []
    for i, entry in enumerate(entries):
        where = f"stage {i}"
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise _Fault(f"{where} is of the unknown kind {short(kind)}")
        _keys(where, entry, ("kind", *_KEYS[kind]))
        stage = _stage(where, kind, entry)
        times_of = [getattr(stage, name) for name in ("t", "s") if hasattr(stage, name)]
        if any(not min(times) <= t <= max(times) for t in times_of):
            raise _Fault(f"{where} is at a time outside the grid's interval")
        read = [stage.x] if isinstance(stage, Call | Drift | Mark) else []
        read = [r for r, _ in stage.terms] if isinstance(stage, Combine) else read
        if unread := [r for r in read if r not in written]:
            raise _Fault(f"{where} reads register {unread[0]} before anything is written there")
        if len(set(read)) < len(read):
            raise _Fault(f"{where} reads a register twice")
        if isinstance(stage, Mark):
            if (stage.step, stage.t) != (ended, times[min(ended + 1, len(times) - 1)]):
                raise _Fault(f"{where} ends step {stage.step} out of order or off the grid")
            ended += 1
        elif stage.out in written:
            raise _Fault(f"{where} writes register {stage.out}, which has been written")
        else:
            written.add(stage.out)
        if isinstance(stage, Draw):
            if stage.index in drawn:
                raise _Fault(f"{where} draws noise {stage.index} again")
            drawn.add(stage.index)
        if isinstance(stage, Call) and (stage.point is not None) != gaussian:
            raise _Fault(f"{where} and the start disagree on whether the process is Gaussian")
        stages.append(stage)
    if ended != len(times) - 1:
        raise _Fault(f"{ended} steps end in it, and its times make {len(times) - 1}")
    return tuple(stages)


def _stage(where: str, kind: str, entry: dict[str, Any]) -> Stage:
    values: dict[str, Any] = {}
    for key in _KEYS[kind]:
        value, name = entry[key], f"{key} of {where}"
        if key in ("out", "x", "index", "step"):
            values[key] = _register(name, value)
        elif key in ("t", "s"):
            values[key] = _number(name, value)
        elif key == "area":
            values[key] = _flag(name, value)
        elif key == "point":
            values[key] = _point(name, value)
        elif key == "prediction":
            if value not in PREDICTIONS:
                raise _Fault(f"{name} is {short(value)}, none of {', '.join(PREDICTIONS)}")
            values[key] = value
        else:
            values[key] = tuple(_term(name, term) for term in _items(name, value))
            if not values[key]:
                raise _Fault(f"{name} are none")
    stage: Stage = _KINDS[kind](**values)
    return stage


def _term(name: str, term: Any) -> tuple[int, float]:
    if not isinstance(term, list) or len(term) != 2:
        raise _Fault(f"{name} hold {short(term)}, not a register and its coefficient")
    return _register(name, term[0]), _number(name, term[1])


def _items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Fault(f"{name} is {short(value)}, not a list")
    return value


def _register(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise _Fault(f"{name} is {short(value)}, not a whole number of at least 0")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Fault(f"{name} is {short(value)}, not true or false")
    return value


def _number(name: str, value: Any, finite: bool = True) -> float:
    if type(value) not in (int, float):
        raise _Fault(f"{name} is {short(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        raise _Fault(f"{name} is too large a number") from None
    if finite and not math.isfinite(number):
        raise _Fault(f"{name} is {number}, not a finite number")
    return number


def _point(name: str, value: Any) -> SchedulePoint | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4:
        raise _Fault(f"{name} is {short(value)}, not alpha, sigma and their two derivatives")
    alpha, sigma = (_number(name, level) for level in value[:2])
    if alpha < 0 or sigma < 0:
        raise _Fault(f"{name} has a negative alpha or sigma")
    # derivatives may be infinite at the ends, as that of sigma = sqrt(t) at 0
    return SchedulePoint(alpha, sigma, *(_number(name, rate, finite=False) for rate in value[2:]))
