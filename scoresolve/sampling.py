"""The verbs that move states: plan, sample, encode.

    sample   noise at t_start -> data at t_end (optionally a last call to sigma = 0)
    encode   data at t_start = t_min -> noise at t_end = T, by the probability flow

Both run the same driver (`scoresolve.driving`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresolve.conditions import may_differ, split_cond, unmarked
from scoresolve.driving import (
    Engine,
    Given,
    IntegratorEngine,
    PlanEngine,
    Prior,
    Samples,
    check_call,
    device_of,
    drive,
    settle,
    warn_of_dropout,
)
from scoresolve.errors import (
    ArgumentError,
    GridError,
    ModelWarning,
    ScoresolveError,
    ShapeError,
    check_transforms,
    checked_place,
    is_transformed,
    whole_number,
    yes_or_no,
)
from scoresolve.grid import INTEGER_GRIDS, Grid, as_grid, make_grid
from scoresolve.models import Model, as_model
from scoresolve.noise import NoiseSource, as_noise
from scoresolve.plans import Plan, StepReport, check_state, trace
from scoresolve.sde import SDE, GaussianSDE, check_process
from scoresolve.solvers import Consistency, Integrator, Solver, get_solver
from scoresolve.tuning import FirstAnswers, PriorMismatch, data_at_start, scale_within

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "HIDDEN",
    "checked_place",
    "checked_shape",
    "encode",
    "grid_for",
    "plan",
    "refuse",
    "sample",
    "warn_of_law",
]

DEFAULT_SOLVER = "auto"
DEFAULT_NFE = 30
MOST_NFE = 10**6
"""Calls of a fixed-grid run: the plan of so many takes minutes to make and gigabytes to hold."""

_MOST_ELEMENTS = 2**48  # more than any machine's memory holds, and less than overflows a size

HIDDEN = 0.01  # signal-to-noise ratio below which data of unit variance move no std by 0.5 %

_OF_SAMPLE_ALONE = ("seed", "noise", "shape", "dtype", "device", "denoise")

Times = Grid | Sequence[float] | Tensor


def plan(
    solver: str | Solver,
    sde: SDE,
    grid: Times,
    denoise: bool | None = None,
) -> Plan:
    """Trace a fixed-grid solver over a time grid.

    Args:
        solver: a name of the registry or a `Solver`.
        sde: the process.
        grid: a `Grid`, or strictly monotone times.
        denoise: whether a last call jumps to sigma = 0; the grid's own rule if omitted.

    Returns:
        A `Plan`: `.nfe`, `.law(mean, covariance)`, `.run(model, x, noise)`, `print(plan)`.

    Raises:
        UnknownNameError: no such solver.
        GridError: the grid is not monotone, leaves the interval, or meets a singular coefficient.
        ArgumentError: the solver chooses its own steps, so it has no plan.
    """
    resolved = get_solver(solver)
    if isinstance(resolved, Integrator):
        raise ArgumentError(f"{resolved.name!r} chooses its steps at run time: it has no plan")
    checked = as_grid(grid, denoise)
    checked.check(sde)
    return trace(resolved, sde, checked.times, checked.denoise)


def grid_for(
    solver: Solver,
    sde: SDE,
    *,
    grid: str | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool | None = None,
) -> Grid:
    """The grid that `sample` would use: `steps` steps, or as many as `nfe` calls allow.

    Args:
        solver: a fixed-grid solver.
        sde: the process.
        grid: one of `GRIDS`; the one that suits the solver if omitted.
        steps, nfe: the budget, one of them; 30 calls if neither is given.
        t_start, t_end, denoise: as in `make_grid`.

    Returns:
        The `Grid`.

    Raises:
        ArgumentError: both budgets are given, or one is not a positive whole number.
        GridError: a single step already costs more than `nfe`.
    """
    if steps is not None and nfe is not None:
        raise ArgumentError(f"steps = {steps} and nfe = {nfe}: give one budget, not both")

    upward = t_start is not None and t_end is not None and t_start < t_end

    def make(n: int) -> Grid:
        if grid in INTEGER_GRIDS and upward and (t_start, t_end) == (sde.t_min, sde.T):
            down = make_grid(grid, sde, n, denoise=False)
            return Grid(down.times[::-1], bool(denoise), down.name)
        if grid is None:
            return solver.make_grid(sde, n, t_start, t_end, denoise)
        return make_grid(grid, sde, n, t_start, t_end, denoise)

    if steps is not None:
        return make(steps)
    if (fixed := solver.steps_for_budget()) is not None:
        return make(fixed)
    budget = _checked_nfe(nfe)

    @cache
    def cost(n: int) -> int:
        times = make(n)
        return trace(solver, sde, times.times, times.denoise).nfe

    if cost(1) > budget:
        raise GridError(f"{solver.name!r} needs {cost(1)} calls for one step, nfe = {budget}")
    low, high = 1, budget + 1  # cost(low) <= budget < cost(high), as a step costs a call
    guess = _steps_at(budget, cost(1), cost(2))  # right for most solvers, whose cost is affine
    for n in (guess, guess + 1):
        if low < n < high:
            low, high = (n, high) if cost(n) <= budget else (low, n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return make(low)


def sample(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    *,
    shape: Sequence[int] | None = None,
    x: Tensor | None = None,
    solver: str | Solver | Integrator = DEFAULT_SOLVER,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool | None = None,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    chunk: int | None = None,
    callback: Callable[[StepReport], object] | None = None,
    progress: bool = False,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    gradients: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Samples:
    """Draw samples from a score model.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`; x [B, *event], t [B].
        sde: the process. A model of another Gaussian process is matched by log-SNR.
        shape: [B, *event] to start from the prior; or
        x: the state at `t_start`, [B, *event], floating point; it is not written into.
        solver: a name of the registry (`scoresolve solvers` lists them) or a solver object.
        steps: number of grid steps; or
        nfe: at most so many network calls (if neither is given, 30), of which `auto` spends one
            on the scale of the data unless the model knows it; or
        grid: a `Grid` or explicit times. A name of `GRIDS` goes with `steps` or `nfe`.
        t_start, t_end: first and last time; the process's T and t_min if omitted.
        denoise: whether a last call jumps to sigma = 0.
        seed: seed of the counter-based noise; sample i is the same whatever the batch or chunk.
        noise: a noise source, a `torch.Generator`, or a callable `noise(x, t, s)` instead of
            `seed`.
        chunk: samples to work on at a time; all if omitted. An adaptive solver keeps so many in
            the batch, and the next ones enter as others arrive.
        callback: called with a `StepReport` after every step.
        progress: show a progress bar (only on a terminal).
        compile: compile the whole plan with `torch.compile`.
        dtype, device: of the state, with `shape`; the default dtype and the network's device.
        gradients: let gradients flow through the solver, to `x` and to the network.
        raise_on_failure: raise `SolveError` if any sample failed.
        **cond: passed on to the model; tensors whose first axis is B are split with the batch.

    Returns:
        `Samples`. A keyboard interrupt hands back what is done, the rest marked INTERRUPTED. With
        `shape`, samples so far or wide that the prior would not hide them are held against the
        model's first answer, and a `ModelWarning` says what was found. (A compiled plan and an
        adaptive solver ask for it again, by a call counted in `calls` but not in `nfe`.)

    Raises:
        ArgumentError, ShapeError, GridError, UnknownNameError: before the first model call
            where that is possible.
        SolveError: a sample failed and `raise_on_failure` is set.
    """
    resolved = get_solver(solver)
    batched = isinstance(x, Tensor) and is_transformed(x)
    whole = batched and chunk is None and not raise_on_failure
    check_transforms("sample", mapped=whole and isinstance(resolved, Solver))
    check_process(sde)
    model = as_model(score, sde)
    check_call(score, cond, sample)
    warn_of_dropout(score)
    if (shape is None) == (x is None):
        raise ArgumentError(
            "give either shape=[B, *event] or a start x="
            if x is None
            else "give either shape=[B, *event] or a start x=, not both"
        )
    source = as_noise(noise, seed)
    denoise = None if denoise is None else yes_or_no("denoise", denoise)
    given_times = None if grid is None or isinstance(grid, str) else as_grid(grid, denoise)
    _check_times(t_start, t_end)
    switches = {"progress": progress, "compile": compile, "gradients": gradients}
    for name, switch in {**switches, "raise_on_failure": raise_on_failure}.items():
        yes_or_no(name, switch)
    if x is None:
        dtype, device = checked_place(dtype, device_of(score) if device is None else device)
        start: Given | Prior = Prior(checked_shape(shape), sde, source, dtype, device)
    else:
        check_state(x)
        if dtype is not None or device is not None:
            raise ArgumentError("dtype= and device= go with shape=: x= has its own")
        check_process(sde, x)
        start = Given(x)
    if chunk is not None:
        whole_number("chunk", chunk)
    if callback is not None and not callable(callback):
        raise ArgumentError(f"callback = {callback!r}: give a callable that takes a StepReport")
    spent, mismatch, width = 0, None, None
    if isinstance(resolved, Solver):
        if nfe is not None:
            nfe = _checked_nfe(nfe)
        named = grid if isinstance(grid, str) else None

        def engine_for(solver: Solver, nfe: int | None) -> PlanEngine:
            solver = solver if nfe is None else solver.budgeted(nfe - bool(denoise))
            times = given_times or grid_for(
                solver,
                sde,
                grid=named,
                steps=steps,
                nfe=nfe,
                t_start=t_start,
                t_end=t_end,
                denoise=denoise,
            )
            return PlanEngine(plan(solver, sde, times), callback, compile)

        if given_times is not None:
            given = {"steps": steps, "nfe": nfe, "t_start": t_start, "t_end": t_end}
            if extra := [name for name, value in given.items() if value is not None]:
                raise ArgumentError(f"an explicit grid fixes the times: leave out {extra[0]}=")
        engine: Engine = engine_for(resolved.scaled(model.data_scale), nfe)
        free = given_times is None and steps is None
        if resolved.wants_scale and free and isinstance(sde, GaussianSDE):
            budget = DEFAULT_NFE if nfe is None else nfe
            scale, mismatch, spent = scale_within(budget, model, sde, start.rows(slice(0)), cond)
            engine = engine_for(resolved.scaled(scale), budget - spent) if spent else engine
    else:
        refuse(resolved, steps=steps, nfe=nfe, grid=grid, callback=callback, compile=compile)
        ends = (sde.T if t_start is None else t_start, sde.t_min if t_end is None else t_end)
        Grid(ends).check(sde)
        width, chunk = (chunk, None) if resolved.refills else (None, chunk)
        engine = IntegratorEngine(resolved, sde, ends, bool(denoise), width)
    told = mismatch is not None
    if isinstance(start, Prior):
        start.begin_at(engine.t_start)
        told |= _warn_of_signal(sde, engine.t_start, mismatch)
    whole = isinstance(engine, PlanEngine) and (chunk is None or chunk >= start.batch)
    cond = unmarked(cond) if whole else settle(cond, model, start, engine.t_start)
    runs, answers = model, None
    looked = isinstance(resolved, Consistency) or (isinstance(start, Prior) and not told)
    if looked and isinstance(sde, GaussianSDE) and engine.plan and not (compile or batched):
        runs = answers = FirstAnswers(model, engine.plan, not may_differ(cond))
    with torch.set_grad_enabled(gradients):
        found = drive(engine, runs, start, source, chunk, progress, raise_on_failure, cond, spent)
    share = None
    if answers is not None and isinstance(resolved, Consistency):
        share = answers.collapsed(found.x[found.ok])
    if share is not None:
        warnings.warn(
            f"the first answers of the model, at t = {engine.t_start:g}, have {share:.2g} of the "
            f"variance of the samples, so it is an ordinary denoiser: {resolved.name!r} needs a "
            "consistency model, whose answers to noise are samples; take another solver",
            ModelWarning,
            stacklevel=2,
        )
    seen = not told and not is_transformed(found.x)
    if isinstance(start, Prior) and isinstance(sde, GaussianSDE) and seen:
        prior, first = start, slice(0, chunk or width or start.batch)
        last = engine.ends[1] if isinstance(engine, IntegratorEngine) else engine.times[-1]
        mismatch, asked = data_at_start(
            model,
            sde,
            (engine.t_start, last),
            found.x[found.ok],
            lambda: (prior.rows(first), split_cond(cond, first, prior.batch)),
            answers,
        )
        found = replace(found, calls=found.calls + bool(asked), rows=found.rows + asked)
        if mismatch is not None:
            warn_of_law(sde, engine.t_start, mismatch)
    return found


def encode(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    x: Tensor,
    *,
    solver: str | Solver | Integrator = "adams",
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    chunk: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Samples:
    """Map data to noise along the probability flow; `sample(..., x=encode(...).x)` maps it back.

    Args:
        score, sde, solver, steps, nfe, grid, chunk, progress, raise_on_failure, cond: as in
            `sample`; the solver must be deterministic.
        x: data, [B, *event], floating point.
        t_start, t_end: first and last time; the process's t_min and T if omitted.

    Returns:
        `Samples` whose `.x` is the latent at `t_end`.

    Raises:
        ArgumentError: the solver is stochastic, or as in `sample`.
        GridError: the times do not rise.
    """
    resolved = get_solver(solver)
    if resolved.stochastic:
        raise ArgumentError(f"{resolved.name!r} draws noise: encoding needs a deterministic solver")
    check_process(sde)
    _check_times(t_start, t_end)
    check_transforms("encode", mapped=isinstance(resolved, Solver))
    foreign = [name for name in _OF_SAMPLE_ALONE if name in cond]
    if foreign:
        raise ArgumentError(f"encode has no {foreign[0]}=: it draws nothing and ends at t_end")
    if grid is None or isinstance(grid, str):
        if grid in INTEGER_GRIDS and (t_start is not None or t_end is not None):
            raise GridError(
                f"the grid {grid!r} is fixed by the chain: leave out t_start= and t_end="
            )
        t_start = sde.t_min if t_start is None else t_start
        t_end = sde.T if t_end is None else t_end
        rises = t_start < t_end
    else:
        grid = as_grid(grid)
        rises = grid.times[0] < grid.times[-1]
    if not rises:
        raise GridError("encoding goes from data to noise: give times that rise")
    return sample(
        score,
        sde,
        x=x,
        solver=resolved,
        steps=steps,
        nfe=nfe,
        grid=grid,
        t_start=t_start,
        t_end=t_end,
        chunk=chunk,
        progress=progress,
        raise_on_failure=raise_on_failure,
        **cond,
    )


def _warn_of_signal(sde: SDE, t: float, mismatch: PriorMismatch | None) -> bool:
    """Tell that a start without data in it is not the law of the process at `t`; whether it is."""
    if not isinstance(sde, GaussianSDE):
        return False
    snr = math.exp(float(sde.log_snr(t)))
    if t == sde.T and mismatch is not None:
        shows = mismatch.matters
    else:
        shows, mismatch = snr > HIDDEN, None
    if shows:
        warn_of_law(sde, t, mismatch or f"alpha^2/sigma^2 = {snr:.2g}", stacklevel=4)
    return shows


def warn_of_law(sde: SDE, t: float, why: PriorMismatch | str, stacklevel: int = 3) -> None:
    """Tell that samples started as noise alone at `t`, where the process still holds the data."""
    if isinstance(why, PriorMismatch):
        why = (
            f"with the model's data a mean of {why.mean:.3g} and a standard deviation of "
            f"{why.std:.3g} times that of the noise"
        )
    warnings.warn(
        f"the start at t = {t:g} is drawn as noise alone, but {sde} still holds the data there "
        f"({why}), so samples follow another law: give x=, data noised to that time, or a "
        "process that drowns them",
        ModelWarning,
        stacklevel=stacklevel,
    )


def _steps_at(budget: int, one: int, two: int) -> int:
    """Steps of a budget, if a first step costs `one` and each other `two - one` calls."""
    return 1 + (budget - one) // max(1, two - one)


def _check_times(t_start: object, t_end: object) -> None:
    for name, time in {"t_start": t_start, "t_end": t_end}.items():
        try:
            if isinstance(time, str | bool):
                raise TypeError
            float(0.0 if time is None else time)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{name} = {time!r}: give a number") from error


def _checked_nfe(nfe: int | None) -> int:
    calls = DEFAULT_NFE if nfe is None else whole_number("nfe", nfe)
    if calls > MOST_NFE:
        raise ArgumentError(f"nfe = {nfe}: give at most {MOST_NFE:,} calls")
    return calls


def checked_shape(shape: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes [B, *event] of a state; raises `ShapeError` for anything else."""
    listed = shape.tolist() if isinstance(shape, Tensor | np.ndarray) else shape
    try:
        if isinstance(listed, str | bytes):
            raise TypeError
        sizes = tuple(whole_number("size", size) for size in listed or ())
    except (ScoresolveError, TypeError) as error:
        raise ShapeError(f"shape = {shape}: give positive whole numbers [B, *event]") from error
    if not sizes:
        raise ShapeError("shape is empty: give [B, *event]")
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise ShapeError(f"shape = {shape}: a state of so many elements fits into no memory")
    return sizes


def refuse(solver: Integrator, **given: object) -> None:
    """Raise for every argument that is `given` but has no meaning with an integrator."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ArgumentError(
                f"{name}= does not go with {solver.name!r}, which chooses its own steps: set its "
                "tolerances, or take a fixed-grid solver"
            )
