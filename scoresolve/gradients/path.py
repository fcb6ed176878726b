r"""Backward passes through a plan, which differ in what they keep.

    direct      autograd through every stage: all calls
    checkpoint  some steps recomputed at a time: a few states for each segment
    reverse     x_t found from x_s by solving step(x_t) = x_s, step by step: one call
    adjoint     along dx/dt = v(x, t), from the end back to the start, with a = dL/dx,
                da/dt = -(dv/dx)^T a,   dL/dtheta = -int a^T (dv/dtheta) dt: one call

The first three differentiate what the plan computes, the last the flow that it approximates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoresolve.divergence import full_precision
from scoresolve.errors import ArgumentError, SolveError, check_output, known_name, whole_number
from scoresolve.grid import Grid
from scoresolve.models import Model, conversion
from scoresolve.noise import Philox
from scoresolve.plans import (
    Call,
    Combine,
    Custom,
    Draw,
    Drift,
    Mark,
    Stage,
    model_time,
    trace,
)
from scoresolve.sde import SDE
from scoresolve.solvers import Solver

__all__ = ["MODES", "Path"]

# A round that shrinks what is missing by less than 0.85 gets nowhere within these.
_ROUNDS: Final = 200
MODES: Final = ("direct", "checkpoint", "reverse", "adjoint")


class Path:
    """A solver's plan with its model and noise, in parts where that is asked for.

    Args:
        solver: a fixed-grid solver.
        sde: the process.
        grid: its times.
        model: a model of the process, or of "flow" alone.
        noise: source of randomness, addressed, so that a draw can be repeated.
        cond: passed on to the model.
    """

    def __init__(
        self,
        solver: Solver,
        sde: SDE,
        grid: Grid,
        model: Model,
        noise: Philox,
        cond: dict[str, Any],
    ) -> None:
        self.solver, self.sde, self.model = solver, sde, model
        self.noise, self.cond = noise, cond
        self.plan = trace(solver, sde, grid.times, grid.denoise)

    def solve(self, x: Tensor, mode: str, segment: int | None, refine: int) -> Tensor:
        known_name("mode", mode, MODES)
        for name, value, its in (("segment", segment, "checkpoint"), ("refine", refine, "adjoint")):
            if value is not None and whole_number(name, value) != 1 and mode != its:
                raise ArgumentError(f"{name} = {value} means nothing to {mode!r}: leave it out")
        if mode == "direct" or not torch.is_grad_enabled():
            start = (
                x.clone() if x.requires_grad and x.is_leaf else x
            )  # nobody may write into a leaf
            return self.plan.run(self.model, start, self.noise, in_place=False, **self.cond)
        for name, value in self.cond.items():
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                raise ArgumentError(
                    f"{name}= is the result of a computation that {mode!r} cannot reach: give a "
                    "leaf tensor, or take mode='direct'"
                )
        if mode == "checkpoint":
            root = max(1, round(self.plan.steps**0.5))
            return self.recomputed(x, whole_number("segment", root if segment is None else segment))
        if self.plan.stochastic:
            raise ArgumentError(
                f"{self.plan.solver!r} draws noise, and {mode!r} needs a deterministic solver: "
                "take one, or mode='checkpoint'"
            )
        return self.without_memory(x, mode, whole_number("refine", refine, 1, 10**4))

    def advance(self, stages: Iterable[Stage], held: dict[int, Tensor]) -> None:
        """Run `stages` on the registers `held`, which they add to."""
        like = next(iter(held.values()))
        for stage in stages:
            if isinstance(stage, Call):
                held[stage.out] = self.call(stage, held[stage.x]).to(like.dtype)
            elif isinstance(stage, Combine):
                (first, scale), *rest = stage.terms
                y = held[first] * scale
                for register, c in rest:
                    y = y.add(held[register], alpha=c)
                held[stage.out] = y
            elif isinstance(stage, Draw):
                held[stage.out] = stage(self.noise, like)
            elif isinstance(stage, Custom):
                held[stage.out] = stage.kernel(
                    held[stage.x], stage.t, self.predict, self.noise, stage.draw
                )
            elif isinstance(stage, Drift):
                assert self.model.sde is not None
                held[stage.out] = self.model.sde.drift(held[stage.x], model_time(stage.t, like))

    def call(self, stage: Call, x: Tensor) -> Tensor:
        """What the executor makes of a call, from the model's own prediction."""
        if stage.point is None:
            return self.predict(stage.prediction, x, stage.t)
        source, function = self.model.bind(stage.prediction)
        m: Tensor = function(x, model_time(stage.t, x), **self.cond)
        check_output(m, x)
        u, w = (float(c) for c in conversion(source, stage.prediction, stage.point))
        return w * m if u == 0 else (w * m).add(x, alpha=u)

    def predict(self, prediction: str, x: Tensor, t: float) -> Tensor:
        return self.model.predict(prediction, x, model_time(t, x), **self.cond)

    def parts(self, length: int) -> list[_Part]:
        """The stages, `length` steps at a time, those after the last step in a part of their own.

        Each part keeps the registers that a later one reads.
        """
        groups: list[list[Stage]] = [[]]
        marks = 0
        for stage in self.plan.stages:
            groups[-1].append(stage)
            marks += isinstance(stage, Mark)
            if isinstance(stage, Mark) and (marks % length == 0 or marks == self.plan.steps):
                groups.append([])
        needed, parts = {self.plan.output}, list[_Part]()
        for group in reversed(groups):
            parts.insert(0, _Part(group, sorted(needed)))
            needed |= {register for stage in group for register in _reads(stage)}
            needed -= {stage.out for stage in group if not isinstance(stage, Mark)}
        return parts

    def run_part(self, part: _Part, names: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
        """The registers that `part` keeps, from the registers `names` with `values`."""
        held = dict(zip(names, values, strict=True))
        self.advance(part.stages, held)
        return [held[register] for register in part.keeps]

    def recomputed(self, x: Tensor, length: int) -> Tensor:
        """The plan's result, whose backward pass runs `length` steps again at a time."""
        held = {0: x}
        for part in self.parts(length):
            names = list(held)
            run = partial(self.run_part, part, names)
            values, leaves = _without_graph(run, held.values())
            found = _Recomputed.apply(run, values, len(names), *held.values(), *leaves)  # type: ignore[no-untyped-call]
            held = dict(zip(part.keeps, found, strict=True))
        return held[self.plan.output]

    def without_memory(self, x: Tensor, mode: str, refine: int) -> Tensor:
        """The plan's result, whose backward pass finds the path again from its end."""
        *path, tail = self.parts(1)
        reading = max(len(part.keeps) for part in (path if mode == "reverse" else path[-1:]))
        if reading > 1:
            what = "a step" if mode == "reverse" else "the last call"
            raise ArgumentError(
                f"{what} of {self.plan.solver!r} reads more than the state, which {mode!r} does "
                "not keep: take a solver of one step and no denoising call that looks back, or "
                "mode='checkpoint'"
            )
        held, leaves = {0: x}, dict[int, Tensor]()
        steps: list[_Step] = []
        for part, (t, s) in zip(path, itertools.pairwise(self.plan.times), strict=True):
            run = partial(self.run_part, part, list(held))
            values, found = _without_graph(run, held.values())
            leaves |= {id(leaf): leaf for leaf in found}
            held = dict(zip(part.keeps, values, strict=True))
            if mode == "reverse":
                back = trace(self.solver, self.sde, (s, t))
                steps.append(_Step(run, partial(back.run, self.model, **self.cond), s))
        (end,) = held.values()
        backward: Any = partial(_undo, steps)
        if mode == "adjoint":
            inner = [
                t + (s - t) * i / refine
                for t, s in itertools.pairwise(self.plan.times)
                for i in range(refine)
            ]
            backward = partial(
                _integrate, partial(self.predict, "flow"), [*inner, self.plan.times[-1]]
            )
        state: Tensor = _FromEnd.apply(backward, end, x, *leaves.values())  # type: ignore[no-untyped-call]
        return self.run_part(tail, path[-1].keeps, [state])[0]


class _Part(NamedTuple):
    stages: list[Stage]
    keeps: list[int]


def _without_graph(
    run: Callable[[Sequence[Tensor]], list[Tensor]], inputs: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` makes of `inputs`, and the other leaves that this depends on; no graph is kept."""
    with torch.enable_grad():
        starts = [value.detach().requires_grad_() for value in inputs]
        results = run([start.clone() for start in starts])  # nobody may write into a leaf
    pending, seen, found = [result.grad_fn for result in results], set[Any](), list[Tensor]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is start for start in starts):
            found.append(leaf)
        pending += [parent for parent, _ in node.next_functions]
    return [result.detach() for result in results], found


class _Recomputed(torch.autograd.Function):
    """Values that are known, with a backward pass that runs them once more."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Sequence[Tensor]], list[Tensor]],
        values: list[Tensor],
        count: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*inputs)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, leaves = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.enable_grad():
            starts = [value.detach().requires_grad_() for value in inputs]
            results = ctx.run([start.clone() for start in starts])
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]
        with full_precision(starts[0]):
            products = torch.autograd.grad(
                [result for result, _ in pairs],
                [*starts, *leaves],
                [gradient for _, gradient in pairs],
                materialize_grads=True,
            )
        return None, None, None, *products


class _FromEnd(torch.autograd.Function):
    """The end of a path that is known, with a backward pass that starts from it."""

    @staticmethod
    def forward(ctx: Any, backward: Any, end: Tensor, x: Tensor, *leaves: Tensor) -> Tensor:
        ctx.from_end = backward
        ctx.save_for_backward(end, *leaves)
        return end.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        end, *leaves = ctx.saved_tensors
        return None, None, *ctx.from_end(end, gradient, leaves)


def _products(
    run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The value of `run` at `x`, and `gradient` times its Jacobian to `x` and the leaves."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        value = run(at.clone())
    with full_precision(x):
        found = torch.autograd.grad(value, [at, *leaves], gradient, materialize_grads=True)
    return value.detach(), list(found)


def _integrate(
    flow: Callable[[Tensor, float], Tensor],
    times: Sequence[float],
    end: Tensor,
    gradient: Tensor,
    leaves: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients at the start, to the state and the leaves, by the adjoint equation."""
    state = [end, gradient, *(torch.zeros_like(leaf) for leaf in leaves)]

    def slope(y: Sequence[Tensor], t: float) -> list[Tensor]:
        v, products = _products(lambda x: flow(x, t), y[0], y[1], leaves)
        return [v, *(-product for product in products)]

    for t, s in itertools.pairwise(reversed(times)):
        state = _runge_kutta(slope, state, t, s)
    return state[1:]


class _Step(NamedTuple):
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    back: Callable[[Tensor], Tensor]
    s: float


def _undo(
    steps: Sequence[_Step], end: Tensor, gradient: Tensor, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients at the start, to the state and the leaves, by undoing step after step."""
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for step in reversed(steps):
        end = _undone(step, end)
        _, (gradient, *products) = _products(lambda x: step.run([x])[0], end, gradient, leaves)  # noqa: B023
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    return [gradient, *totals]


@torch.no_grad()
def _undone(step: _Step, end: Tensor) -> Tensor:
    """The state that `step` leads to `end`.

    The solver's own step in the other direction, R, nearly undoes the step S; what S(R(y)) misses
    is added to y until nothing is missing. It shrinks by O(h^2) each time.
    """
    y, x, size = end, end, math.inf
    enough = torch.finfo(end.dtype).eps ** 0.75 * (1 + float(end.abs().max()))
    for _ in range(_ROUNDS):
        x = step.back(y)
        missing = end - step.run([x])[0]
        size = float(missing.abs().max())
        if size <= enough:
            return x
        if not math.isfinite(size):
            break
        y = y + missing
    raise SolveError(
        f"the step to t = {step.s:g} cannot be undone: {size:.1e} is missing; take a finer grid, "
        "or mode='checkpoint'",
        x,
    )


def _runge_kutta(
    slope: Callable[[Sequence[Tensor], float], list[Tensor]],
    y: list[Tensor],
    t: float,
    s: float,
) -> list[Tensor]:
    """One classical step of order 4 from `t` to `s`, for a list of tensors."""
    h, total = s - t, list(y)
    k: list[Tensor] = []
    for reach, weight in ((0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6)):
        # The slope depends on state and adjoint alone, the first two.
        at = [a.add(b, alpha=reach * h) for a, b in zip(y[:2], k, strict=False)] if k else y
        k = slope(at, t + reach * h)
        total = [a.add(b, alpha=weight * h) for a, b in zip(total, k, strict=True)]
    return total


def _reads(stage: Stage) -> list[int]:
    if isinstance(stage, Combine):
        return [register for register, _ in stage.terms]
    return [] if isinstance(stage, Draw | Mark) else [stage.x]
