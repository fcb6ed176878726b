"""The one executor of all plans.

Stages become instructions over a few slots: a register's slot is freed at its last use, and a
`Combine` whose first register dies there and belongs to the plan is done in place,

    y <- c_0 y + c_1 x_1    in one pass (a rank-one update),    y <- y + c_k x_k    for the rest.

Before writing into y the executor makes sure that nobody else holds it or its storage: the
caller, a callback, or a model that keeps its inputs or returns them. A model that returns one
static buffer at every call is noticed at its second call, and its outputs are copied.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, GridError, ShapeError, check_output, is_transformed
from scoresolve.models import Model, conversion
from scoresolve.noise import NoiseSource
from scoresolve.plans.stages import Call, Combine, Custom, Draw, Drift, Mark, Stage
from scoresolve.precision import host

__all__ = ["Program", "StepReport", "check_state", "model_time"]


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after a step.

    Attributes:
        step: number of the finished step, from 0.
        steps: steps of the plan.
        t: the time reached.
        x: the state there, [B, *event]; it may be kept, it will not be written into.
    """

    step: int
    steps: int
    t: float
    x: Tensor


def check_state(x: Tensor) -> None:
    """Raise unless `x` is a batch [B, *event] of numbers that a solver can compute with.

    Raises:
        ArgumentError: it is no tensor, not real floating point of 16 to 64 bits, sparse, or meta.
        ShapeError: it has no batch axis, or samples without elements.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"the state is {kind}: give a real floating-point tensor")
    if x.dtype not in _STATES:
        raise ArgumentError(f"the state is {x.dtype}: give float16, bfloat16, float32 or float64")
    if x.layout is not torch.strided:
        raise ArgumentError(f"the state has layout {x.layout}: give a dense tensor, x.to_dense()")
    if x.device.type == "meta":
        raise ArgumentError(
            "the state is on the meta device, which holds no numbers: give one on another"
        )
    if x.ndim < 1:
        raise ShapeError("the state has no batch axis: give a tensor [B, *event]")
    if 0 in x.shape[1:]:
        raise ShapeError(
            f"the state has shape {tuple(x.shape)}, so no elements: give samples that have some"
        )


def model_time(t: float | Sequence[float], x: Tensor) -> Tensor:
    """`t` as the model gets it: [B] (or [len(t), B]) without copies, at least float32."""
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    times = host(t).to(device=x.device, dtype=dtype)
    return times[..., None].expand(*times.shape, x.shape[0])


class _Instruction(NamedTuple):
    op: int
    out: int  # slot written
    source: int  # first slot read
    detail: Any  # what the operation needs beside its slots
    freed: tuple[int, ...]  # slots that nobody reads any more


_STATES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CALL, _COMBINE, _MARK, _OTHER = range(4)
_LARGE = 1 << 14  # elements from which one pass over memory is worth two views


def _inputs(stage: Stage) -> list[int]:
    if isinstance(stage, Combine):
        return [register for register, _ in stage.terms]
    return [] if isinstance(stage, Draw) else [stage.x]


def _fuse(instructions: list[_Instruction]) -> list[_Instruction]:
    """Join every call with the combination that follows it, which saves a turn of the loop."""
    fused: list[_Instruction] = []
    for this in instructions:
        last = fused[-1] if fused else None
        alone = last is not None and last.op == _CALL and last.detail[1] is None
        if last is not None and alone and this.op == _COMBINE:
            call, _ = last.detail
            freed = tuple(slot for slot in last.freed if slot != this.out) + this.freed
            fused[-1] = _Instruction(_CALL, last.out, last.source, (call, this), freed)
        else:
            fused.append(this)
    return fused


def _reached(instructions: list[_Instruction]) -> list[tuple[int, Mark] | None]:
    """For each call the slot that holds the state of the last step before it, if one still does."""
    found: list[tuple[int, Mark] | None] = []
    last: tuple[int, Mark] | None = None
    for this in instructions:
        if this.op == _CALL:
            found.append(last)
        if this.op == _MARK:
            last = this.source, this.detail
        elif last is not None and this.out == last[0]:
            last = None
        if last is not None and last[0] in this.freed:
            last = None
    return found


def _count_alone() -> tuple[int, int]:
    """What Python's and torch's counters show for a tensor in one list and one local name."""
    alone = [torch.empty(1, device="cpu")]
    y = alone[0]
    return sys.getrefcount(y), torch._C._storage_Use_Count(y.untyped_storage()._cdata)


_ALONE = _count_alone()


class Program:
    """The instructions of a plan.

    Args:
        stages: the plan's stages.
        output: register that holds the result.
    """

    def __init__(self, stages: Sequence[Stage], output: int) -> None:
        self.calls = [stage for stage in stages if isinstance(stage, Call)]
        self.call_times = [call.t for call in self.calls]
        self.predictions = list(dict.fromkeys(call.prediction for call in self.calls))
        self.gaussian = all(call.point is not None for call in self.calls)
        self.steps = sum(isinstance(stage, Mark) for stage in stages)
        self.instructions: list[_Instruction] = []
        self.scales: list[float] = []  # of the first term of each combination
        last_use = {r: i for i, stage in enumerate(stages) for r in _inputs(stage)}
        last_use[output] = len(stages)
        slot_of, free, owned = {0: 0}, list[int](), set[int]()
        self.slots = 1
        call_number, outputs_used_until, self.keeps_outputs = 0, -1, False
        for i, stage in enumerate(stages):
            read = _inputs(stage)
            dying = [r for r in dict.fromkeys(read) if last_use[r] == i]
            target = None
            op = _OTHER
            detail: Any = stage
            if isinstance(stage, Call):
                self.keeps_outputs |= outputs_used_until >= i
                op, detail, call_number = _CALL, (call_number, None), call_number + 1
                outputs_used_until = max(outputs_used_until, last_use.get(stage.out, -1))
            elif isinstance(stage, Mark):
                op = _MARK
            elif isinstance(stage, Combine):
                target = next((r for r in dying if r in owned), None)
                self.scales.append(dict(stage.terms)[read[0] if target is None else target])
                first = read[0] if target is None else target
                rest = [(slot_of[r], c) for r, c in stage.terms if r != first]
                op = _COMBINE
                detail = (target is not None, slot_of[first], len(self.scales) - 1, rest)
            source = slot_of[read[0]] if read else 0
            freed = [slot_of[r] for r in dying if r != target]
            out = 0
            if not isinstance(stage, Mark):
                if target is not None:
                    out = slot_of[target]
                elif free:
                    out = free.pop()
                else:
                    out, self.slots = self.slots, self.slots + 1
                slot_of[stage.out] = out
                if isinstance(stage, Combine | Draw):
                    owned.add(stage.out)
                if stage.out not in last_use:
                    freed.append(out)
            free.extend(freed)
            self.instructions.append(_Instruction(op, out, source, detail, tuple(freed)))
        self.reached = _reached(self.instructions)
        self.output = slot_of[output]
        self.output_is_owned = output in owned
        self.silent = _fuse([i for i in self.instructions if i.op != _MARK or i.freed])
        self._kept: tuple[object, Tensor, Sequence[Tensor]] | None = None
        self._kept_scales: dict[torch.dtype, Sequence[Tensor]] = {}
        self.conversions: dict[tuple[str, ...], list[tuple[float, float] | None]] = {}

    def _bind(
        self, model: Model, x: Tensor, cond: dict[str, object]
    ) -> list[tuple[Callable[..., Tensor], Tensor, tuple[float, float] | None]]:
        """For each call: the function, its time [B], and (u, w) if u x + w m has to be formed."""
        bound = {name: model.bind(name) for name in self.predictions}
        sources = tuple(source for source, _ in bound.values())
        if sources not in self.conversions:
            pairs = {name: source for name, (source, _) in bound.items()}
            self.conversions[sources] = [_conversion(pairs[c.prediction], c) for c in self.calls]
        functions = {
            name: function if self.gaussian else partial(model.predict, name)
            for name, (_, function) in bound.items()
        }
        if cond:
            functions = {name: partial(call, **cond) for name, call in functions.items()}
        called = [functions[call.prediction] for call in self.calls]
        return list(zip(called, self._times(x), self.conversions[sources], strict=True))

    def _scale_tensors(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """`scales` as tensors [], by which torch multiplies three times faster than by floats."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        if wide not in self._kept_scales:
            with torch.inference_mode(False):
                self._kept_scales[wide] = host(self.scales).to(wide).unbind()
        return self._kept_scales[wide]

    def _times(self, x: Tensor) -> Sequence[Tensor]:
        """The calls' times, [B] each; kept for the next run unless a model wrote into them."""
        key = (x.shape[0], x.dtype, x.device)
        kept = self._kept  # one read, as other threads may run this plan on other shapes
        if kept is None or kept[0] != key or kept[1]._version != 0:
            with torch.inference_mode(False):
                table = model_time(self.call_times, x)
                kept = self._kept = key, table, table.unbind()
        return kept[2]

    def run(
        self,
        model: Model,
        x: Tensor,
        noise: NoiseSource | None = None,
        callback: Callable[[StepReport], object] | None = None,
        in_place: bool = True,
        cond: dict[str, object] | None = None,
    ) -> Tensor:
        """Execute on `x`; see `Plan.run`."""
        check_state(x)
        cond = cond or {}
        calls = self._bind(model, x, cond)
        slots: list[Any] = [None] * self.slots
        slots[0] = x
        size, dtype, shape = x.numel(), x.dtype, x.shape
        if in_place and is_transformed(x):
            in_place = False  # its storage cannot be looked at
        large = size >= _LARGE
        one = torch.ones(1, dtype=dtype, device=x.device) if large else None
        scales = self._scale_tensors(dtype)
        graph, reuses_memory = torch.is_grad_enabled(), False
        watches = self.keeps_outputs and in_place
        holders, storage_uses = sys.getrefcount, torch._C._storage_Use_Count
        for op, out, source, detail, freed in (
            self.silent if callback is None else self.instructions
        ):
            if op == _CALL:
                number, combine = detail
                function, time, converted = calls[number]
                y = slots[source]
                try:
                    m = function(y, time)
                except KeyboardInterrupt as stop:
                    if (mark := self.reached[number]) is not None:
                        slot, ended = mark
                        stop.reached = StepReport(  # type: ignore[attr-defined]
                            ended.step, self.steps, ended.t, slots[slot]
                        )
                    raise
                except Exception as error:
                    error.add_note(f"at call {number + 1} of the {len(calls)} of this plan")
                    raise
                if number < 2:
                    check_output(m, y)
                    if watches and number == 0:
                        first_output, m = m, m.clone()
                    elif watches:
                        reuses_memory = m.data_ptr() == first_output.data_ptr()
                        del first_output
                elif not isinstance(m, Tensor) or m.shape != shape:
                    check_output(m, y)
                if reuses_memory:
                    m = m.clone()
                if m.dtype is not dtype:
                    check_output(m, y)
                    m = m.to(dtype)
                if graph and m.requires_grad:
                    in_place = False
                if converted is not None:
                    u, w = converted
                    m = m * w if u == 0.0 else (m * w).add(y, alpha=u)
                slots[out] = m
                del m
                if combine is not None:
                    op, out, _, detail, _ = combine
            if op == _COMBINE:
                owned, first, scaled, rest = detail
                y = slots[first]
                if (
                    owned
                    and in_place
                    and holders(y) == _ALONE[0]
                    and storage_uses(y.untyped_storage()._cdata) == _ALONE[1]
                ):
                    if large and rest and y.is_contiguous():
                        (register, c), *rest = rest
                        y.view(-1, 1).addr_(
                            slots[register].reshape(-1), one, beta=self.scales[scaled], alpha=c
                        )
                    else:
                        y.mul_(scales[scaled])
                else:
                    y = y * scales[scaled]
                if in_place:
                    for register, c in rest:
                        y.add_(slots[register], alpha=c)
                else:
                    for register, c in rest:
                        y = y.add(slots[register], alpha=c)
                slots[out] = y
            elif op == _MARK:
                if callback is not None:
                    callback(StepReport(detail.step, self.steps, detail.t, slots[source]))
            elif op == _OTHER:
                slots[out] = _special(detail, slots[source], model, noise, x, cond)
            for slot in freed:
                slots[slot] = None
        result: Tensor = slots[self.output]
        return result if self.output_is_owned else result.clone()


def _conversion(source: str, call: Call) -> tuple[float, float] | None:
    """u and w that turn the model's own prediction into the call's; None where they are 0, 1."""
    if call.point is None:
        return None
    u, w = (float(c) for c in conversion(source, call.prediction, call.point))
    if not (math.isfinite(u) and math.isfinite(w)):
        raise GridError(
            f"{call.prediction} cannot be had from {source} at t = {call.t:g}, where alpha = "
            f"{call.point.alpha:g} and sigma = {call.point.sigma:g}: move that end of the "
            "grid inside, or use a solver or a network of another prediction"
        )
    return None if (u, w) == (0.0, 1.0) else (u, w)


def _special(
    stage: Draw | Drift | Custom,
    source: Tensor,
    model: Model,
    noise: NoiseSource | None,
    x: Tensor,
    cond: dict[str, object],
) -> Tensor:
    """The stages that are rare or dear: noise, a nonlinear drift, a custom kernel."""
    if isinstance(stage, Drift):
        if model.sde is None:
            raise ArgumentError("this plan needs the process's drift: give a model of the process")
        return model.sde.drift(source, model_time(stage.t, x))
    if noise is None:
        raise ArgumentError("this plan draws noise: give a noise source, such as Philox(seed)")
    if isinstance(stage, Draw):
        return stage(noise, x)

    def predict(prediction: str, state: Tensor, t: float) -> Tensor:
        return model.predict(prediction, state, model_time(t, x), **cond)

    return stage.kernel(source, stage.t, predict, noise, stage.draw)
