r"""Exact likelihood of data under the probability flow dx/dt = v(x, t), and samples with theirs.

Along the flow log p_t changes by -div v, so data x_0 that the flow takes to the latent x_T has

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.conditions import split_cond
from scoresolve.divergence import Differentiator
from scoresolve.driving import (
    Engine,
    Given,
    Samples,
    check_call,
    device_of,
    drive,
    failure,
    settle,
    warn_of_dropout,
)
from scoresolve.errors import (
    ArgumentError,
    ModelWarning,
    ShapeError,
    check_transforms,
    checked_place,
    known_name,
    real_number,
    whole_number,
    yes_or_no,
)
from scoresolve.grid import Grid
from scoresolve.likelihood.engine import (
    COLUMNS,
    Budget,
    PathEngine,
    data_std,
    fly_pilot,
    scale_hidden,
)
from scoresolve.likelihood.joint import (
    JointFlow,
    check_direction,
    joint_engine,
    solve_joint,
)
from scoresolve.likelihood.path import Field
from scoresolve.likelihood.result import ErrorBudget, Likelihood
from scoresolve.models import Model, as_model
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.plans import check_state
from scoresolve.sampling import HIDDEN, Times, checked_shape, warn_of_law
from scoresolve.sde import (
    SDE,
    VP,
    CosineVP,
    GaussianSDE,
    Prior,
    RectifiedFlow,
    SubVP,
    check_prior,
    check_process,
    prior_scale,
)
from scoresolve.solvers import Integrator, Solver, get_solver
from scoresolve.tuning import data_at_start

__all__ = [
    "DEFAULT_COST",
    "DEFAULT_PROBES",
    "EXACT_UP_TO",
    "LEAST_COST",
    "log_likelihood",
    "sample_with_log_prob",
]

DEFAULT_COST: Final = 200
LEAST_COST: Final = 64
MOST_COST: Final = 100_000
MOST_NODES: Final = 2500
"""Of the first pass; rows that need more get up to sixteen times as many."""
MOST_PROBES: Final = 10_000
_REMOVED: Final = 0.02
"""Nats for each element that "auto" removes of noise at a given time without a warning; the error
then was 0.006 or less on Gaussians of 4 and 64 elements and on the ring (VP, EDM)."""
NAMED_CALLS: Final = 5000
"""Calls after which an adaptive solver given by its name gives up; it takes some hundred."""
DEFAULT_PROBES: Final = 8
EXACT_UP_TO: Final = 64
"""Event elements up to which a solver chosen by hand gets the exact trace."""

_EXACT_NODES: Final = 40  # that the exact trace gets if asked for, whatever the budget
_FEW_NODES: Final = 20  # the path's error with so many is below that of probes at the same cost
_TRACES: Final = ("auto", "exact", "hutchinson")


def log_likelihood(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    x: Tensor,
    *,
    solver: str | Solver | Integrator = "auto",
    cost: int | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    trace: str = "auto",
    probes: int | None = None,
    mode: str = "auto",
    prior: Prior | None = None,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    chunk: int | None = None,
    dequantise: float | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Likelihood:
    r"""Log-density of data under the model's probability flow.

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt along dx/dt = v.

    The default, for Gaussian processes, spends a budget of network evaluations and products with
    the Jacobian per sample: all rows share nodes, at each of which the path takes one evaluation
    and the trace some products, more where the trace is uncertain; the integral is taken from no
    noise to noise alone, so neither end has an error of first order. Rows that need more nodes
    than the others get them. Any deterministic solver that steps in x can be named instead.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`, differentiable in x.
        sde: the process. A model of another Gaussian process is matched by log-SNR. One
            that has no prior of its own, being given by drift and diffusion, needs `prior`.
        x: data, [B, *event], floating point; it is not written into.
        solver: "auto", a deterministic adaptive solver, or a fixed-grid solver in flow form. An
            adaptive solver given by name gives up after 5000 calls, by `Status.CALL_LIMIT`; make
            one with `max_calls` of its own for more.
        cost: with "auto", about how many evaluations and products each sample may cost, from 64
            to 100000; 200 if omitted.
        steps: number of grid steps of a fixed-grid solver; or
        nfe: nodes of "auto", from 4 to 2500, or at most so many network calls of a fixed-grid
            solver (if neither is given, 100); or
        grid: a `Grid` or increasing times, for a fixed-grid solver. A name of `GRIDS` goes with
            `steps` or `nfe`; omitted it is "karras" for `VE` and `EDM`, else "quadratic".
        t_start: time of the data; what is told is the density of this time, but with "auto" that of
            data without noise, from which noise of `t_start` is removed to first order, with a
            warning where that is too much. If omitted `sde.t_min`, but at most 1e-5 T for `VP`,
            `SubVP`, `CosineVP` and `RectifiedFlow`, where the noise of t_min = 1e-3 would blur
            the density.
        t_end: time of the latent, T if omitted.
        trace: "exact", "hutchinson", or "auto": exact if `cost` has room for it at 20 nodes
            (with a solver chosen by hand, up to 64 event elements).
        probes: Rademacher probes a call, on average, with the Hutchinson trace; "auto" chooses
            (and takes two at least); else 8; at most 10000.
        mode: how to differentiate the network, one of `divergence.MODES`.
        prior: the law at `t_end`, a distribution or a log-density over [B, *event], instead of the
            process's own; "auto" is then "dopri5", whose result has no `budget`.
        seed: seed of the counter-based noise; sample i gets the same whatever the batch or chunk.
        noise: a noise source, a `torch.Generator`, or a callable, instead of `seed`.
        chunk: samples to work on at a time; all if omitted.
        dequantise: width > 0 of the bins of discrete data, whose lower edges `x` holds; the
            density is then that at x + width * u with u uniform.
        progress: show a progress bar (only on a terminal).
        raise_on_failure: raise `SolveError` if any sample failed.
        **cond: passed on to the model; tensors whose first axis is B follow their samples.

    Returns:
        A `Likelihood`. Rows that the most nodes are too few for, as those that pass a pole of the
        score, have `Status.STEP_LIMIT`.

    Raises:
        ArgumentError: there is no prior, the solver draws noise or is not in flow form, a
            number is out of range or does not go with the solver, or the model's output depends
            on x but has no gradient.
        ShapeError, GridError, UnknownNameError: as for `sample`; also for times that decrease.
        SolveError: a sample failed and `raise_on_failure` is set.

    Source:
        Song et al. 2021 (2011.13456), section 4.3 and appendix D.2, eq. 39; Chen et al. 2018
        (1806.07366), eq. 8; Grathwohl et al. 2019 (1810.01367), section 3.1. Nodes, quadrature
        and probes of the default are this package's.
    """
    check_transforms("log_likelihood")
    check_process(sde)
    check_prior(sde, prior)
    _check_data(x)
    check_process(sde, x)
    check_call(score, cond, log_likelihood)
    size = math.prod(x.shape[1:])
    if dequantise is not None:
        dequantise = real_number("dequantise", dequantise, above=0)
    _check_grid(grid, steps, nfe, t_start, t_end)
    yes_or_no("progress", progress)
    yes_or_no("raise_on_failure", raise_on_failure)
    task = _Task(
        as_model(score, sde),
        sde,
        (_time(t_start, _data_time(sde)), _time(t_end, sde.T)),
        True,
        trace,
        None if probes is None else whole_number("probes", probes, 1, MOST_PROBES),
        Differentiator(mode),
        as_noise(noise, seed),
        None if chunk is None else whole_number("chunk", chunk),
        progress,
        cond,
    )
    own = isinstance(sde, GaussianSDE) and prior is None
    way = task.way(size, solver, own, cost, steps, nfe, grid)
    warn_of_dropout(score)
    with torch.inference_mode(False), torch.no_grad():
        width = dequantise or 0.0
        data = x + width * task.source.uniform(x, 0, Purpose.DEQUANTISE) if width else x.clone()
        task = task.settled(Given(data))
        result = task.solve(way, data, prior)
    _tell_of_late_data(result, "t_start", t_start, size)
    if own and isinstance(sde, GaussianSDE) and t_end is not None:
        _tell_of_early_noise(sde, t_end)
    result = replace(result, bin_width=dequantise)
    return _finish(result, raise_on_failure)


def sample_with_log_prob(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    prior: Prior | None = None,
    solver: str | Solver | Integrator = "auto",
    cost: int | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    trace: str = "auto",
    probes: int | None = None,
    mode: str = "auto",
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Likelihood:
    """Draw samples and their log-densities in one pass from noise to data.

    Args:
        score, sde, solver, cost, steps, nfe, trace: as in `log_likelihood`; and so are
        probes, mode, seed, noise, chunk, progress, raise_on_failure, cond: see there.
        shape: [B, *event], to start from the prior of the process; or
        x: the states at `t_start`, [B, *event]; it is not written into. "auto" is then "dopri5".
        prior: the law that `x` was drawn from, a distribution or a log-density over [B, *event];
            the process's own if omitted.
        grid: a `Grid` or decreasing times, or a name, for a fixed-grid solver.
        t_start, t_end: times of noise and data; T and the data's time of `log_likelihood` if
            omitted.
        dtype, device: of the samples, with `shape`; the default dtype and the network's device.

    Returns:
        A `Likelihood`: the samples are `.x`, their starts `.latent`.

    Raises:
        ArgumentError: as for `log_likelihood`; also for a process that has no prior to draw from,
            without `x`.
        ShapeError, GridError, UnknownNameError, SolveError: as for `log_likelihood`; also for
            times that increase.
    """
    check_transforms("sample_with_log_prob")
    check_process(sde)
    check_call(score, cond, sample_with_log_prob)
    if (shape is None) == (x is None):
        raise ArgumentError(
            "give either shape=[B, *event] or a start x="
            if x is None
            else "give either shape=[B, *event] or a start x=, not both"
        )
    if x is None and (prior is not None or not sde.has_prior):
        law = f"{sde} has no prior to draw from" if prior is None else "a prior= is not drawn from"
        raise ArgumentError(f"{law}: give the start x=, and as prior= the law that it comes from")
    if x is not None and (dtype is not None or device is not None):
        raise ArgumentError("dtype= and device= go with shape=: x= has its own")
    check_prior(sde, prior)
    if x is None:
        sizes = checked_shape(shape)
        dtype, device = checked_place(dtype, device)
    else:
        _check_data(x)
        sizes = tuple(x.shape)
    _check_grid(grid, steps, nfe, t_start, t_end)
    yes_or_no("progress", progress)
    yes_or_no("raise_on_failure", raise_on_failure)
    task = _Task(
        as_model(score, sde),
        sde,
        (_time(t_end, _data_time(sde)), _time(t_start, sde.T)),
        False,
        trace,
        None if probes is None else whole_number("probes", probes, 1, MOST_PROBES),
        Differentiator(mode),
        as_noise(noise, seed),
        None if chunk is None else whole_number("chunk", chunk),
        progress,
        cond,
    )
    own = isinstance(sde, GaussianSDE) and x is None
    way = task.way(math.prod(sizes[1:]), solver, own, cost, steps, nfe, grid)
    warn_of_dropout(score)
    factory: dict[str, Any] = {
        "dtype": dtype,
        "device": device_of(score) if device is None else device,
    }
    with torch.inference_mode(False), torch.no_grad():
        if x is None:
            start = task.source.normal(torch.empty(sizes, **factory), 0, Purpose.START)
            if isinstance(way, Engine):
                start = sde.from_normals(start)
                if isinstance(sde, GaussianSDE):
                    start = start * prior_scale(sde, way.times[0])
        else:
            start = x.clone()
        task = task.settled(Given(start))
        result = task.solve(way, start, prior)
        if x is None and isinstance(way, Engine) and isinstance(sde, GaussianSDE):
            result = _told_of_data(task, sde, result, way.times)
    _tell_of_late_data(result, "t_end", t_end, math.prod(sizes[1:]))
    return _finish(result, raise_on_failure)


def _tell_of_late_data(result: Likelihood, name: str, t: float | None, size: int) -> None:
    """Warn where the shared nodes were to remove too much noise from data at a given `t`."""
    if t is None or result.budget is None:
        return
    removed = float(result.budget.data_end.median()) / size
    if not removed <= _REMOVED:
        warnings.warn(
            f"{name} = {t:g} is no time of data without noise, of which 'auto' gives the density: "
            f"it made up for {removed:.2g} nats for each element. For the density at {t:g} name "
            "a solver, such as 'dopri5'",
            ModelWarning,
            stacklevel=3,
        )


def _tell_of_early_noise(sde: GaussianSDE, t: float) -> None:
    """Warn where the law at a given end of the way is not that of noise alone."""
    snr = math.exp(float(sde.log_snr(t)))
    if snr > HIDDEN:
        warnings.warn(
            f"the law at t_end = {t:g} is taken to be noise alone, but {sde} still holds the data "
            f"there (alpha^2/sigma^2 = {snr:.2g}): leave out t_end=, or give the law as prior=",
            ModelWarning,
            stacklevel=3,
        )


def _told_of_data(
    task: _Task, sde: GaussianSDE, drawn: Likelihood, times: tuple[float, ...]
) -> Likelihood:
    """`drawn` from the prior at the first of `times`; warns if data are left there.

    The shared nodes need no such look, as they begin where no data are left.
    """
    first, batch, ends = slice(0, task.chunk), len(drawn.latent), (times[0], times[-1])
    assert drawn.x is not None
    mismatch, asked = data_at_start(
        task.model,
        sde,
        ends,
        drawn.x[drawn.ok],
        lambda: (drawn.latent[first], split_cond(task.cond, first, batch)),
    )
    if mismatch is not None:
        warn_of_law(sde, ends[0], mismatch, stacklevel=4)
    return replace(drawn, nfe=drawn.nfe + bool(asked), shared=drawn.shared + asked)


def _check_data(x: Tensor) -> None:
    check_state(x)
    if x.shape[0] == 0:
        raise ShapeError("x holds no samples: give at least one")


def _budget(size: int, cost: int | None, nfe: int | None, trace: str, probes: int | None) -> Budget:
    """Nodes and products of a sample of `size` elements."""
    total = whole_number("cost", DEFAULT_COST if cost is None else cost, LEAST_COST, MOST_COST)
    nodes = None if nfe is None else whole_number("nfe", nfe, 4, MOST_NODES)
    a_call = probes
    if probes is not None and (nodes or total) * probes > MOST_COST:
        raise ArgumentError(
            f"probes = {probes}: at {nodes or total} evaluations that is more than {MOST_COST} "
            "products a sample: give fewer"
        )
    if nodes is not None and a_call is None:
        a_call = DEFAULT_PROBES if cost is None else max(1, round(total / nodes) - 1)
    room = total // (1 + size)
    affordable = room >= _FEW_NODES if nodes is None else size <= (a_call or 0)
    if trace == "exact":
        return Budget(nodes or min(max(room, _EXACT_NODES), MOST_NODES), None, total)
    if trace == "auto" and affordable:
        return Budget(nodes or min(room, MOST_NODES), None, total)
    if a_call is None:
        return Budget(None, 0, total)
    nodes = nodes or min(max(16, total // (1 + a_call)), MOST_NODES)
    return Budget(nodes, nodes * a_call, total)


def _check_grid(
    grid: str | Times | None,
    steps: int | None,
    nfe: int | None,
    t_start: float | None,
    t_end: float | None,
) -> None:
    for name, time in {"t_start": t_start, "t_end": t_end}.items():
        if time is not None:
            real_number(name, time)
    if grid is not None and not isinstance(grid, str):
        given = {"steps": steps, "nfe": nfe, "t_start": t_start, "t_end": t_end}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ArgumentError(f"an explicit grid fixes the times: leave out {extra[0]}=")


@dataclass(frozen=True)
class _Task:
    """One pass along the flow and what it needs, whichever way it is solved.

    Attributes:
        ends: times of data and noise.
        to_noise: the direction.
    """

    model: Model
    sde: SDE
    ends: tuple[float, float]
    to_noise: bool
    trace: str
    probes: int | None
    differentiator: Differentiator
    source: NoiseSource
    chunk: int | None
    progress: bool
    cond: dict[str, Any]

    def settled(self, start: Given) -> _Task:
        """The same pass with the conditions told apart that each sample has and that all share."""
        return replace(self, cond=settle(self.cond, self.model, start, self.ends[1]))

    def way(
        self,
        size: int,
        solver: str | Solver | Integrator,
        own_prior: bool,
        cost: int | None,
        steps: int | None,
        nfe: int | None,
        grid: str | Times | None,
    ) -> Budget | Engine:
        """A budget for the shared nodes, or the engine of a solver that steps in x.

        The nodes run from no noise to noise alone, so that the law there must be the process's
        own.
        """
        known_name("trace", self.trace, _TRACES)
        first, last = self.ends if self.to_noise else self.ends[::-1]
        if solver == "auto" and own_prior:
            for name, value in {"steps": steps, "grid": grid}.items():
                if value is not None:
                    raise ArgumentError(f"{name}= does not go with 'auto': give cost= or nfe=")
            budget = _budget(size, cost, nfe, self.trace, self.probes)
            check_direction(Grid((first, last)), self.sde, self.to_noise)
            return budget
        resolved = get_solver("dopri5" if solver == "auto" else solver)
        if isinstance(resolved, Integrator) and isinstance(solver, str):
            resolved.max_calls = min(resolved.max_calls, NAMED_CALLS)
        if cost is not None:
            raise ArgumentError(f"cost= does not go with {resolved.name!r}: leave it out")
        return joint_engine(resolved, self.sde, first, last, steps, nfe, grid, self.to_noise)

    def solve(self, way: Budget | Engine, x: Tensor, prior: Prior | None) -> Likelihood:
        """The likelihood of data `x`, or of what comes of the noise `x`."""
        if isinstance(way, Engine):
            size = math.prod(x.shape[1:])
            exact = self.trace == "exact" or (self.trace == "auto" and size <= EXACT_UP_TO)
            count = 0 if exact else self.probes or DEFAULT_PROBES
            turning = way.plan is not None
            flow = JointFlow(
                self.model, self.sde, x, count, turning, self.cond, self.differentiator
            )
            return solve_joint(
                way, flow, self.sde, x, prior, self.to_noise, self.source, self.chunk, self.progress
            )
        assert isinstance(self.sde, GaussianSDE)
        engine, shared = _path_engine(
            self.model, self.sde, x, self.ends, way, self.differentiator, self.to_noise, self.cond
        )
        rows = {"rows": torch.arange(len(x), device=x.device)}
        run = drive(
            engine, self.model, Given(x), self.source, self.chunk, self.progress, False, rows
        )
        return _path_result(run, engine, self.model, x, shared, self.to_noise)


def _path_engine(
    model: Model,
    sde: GaussianSDE,
    x: Tensor,
    ends: tuple[float, float],
    budget: Budget,
    differentiator: Differentiator,
    to_noise: bool,
    cond: dict[str, Any],
) -> tuple[PathEngine, tuple[int, int]]:
    """The engine; the evaluations and the calls that it took to fit it to the model."""
    c, shared = data_std(model, sde, x, cond)
    calls = int(shared > 0)
    pilot = None
    if budget.products is not None:
        pilot = fly_pilot(model, sde, c, ends, x, cond, differentiator)
        if pilot is not None:
            shared, calls = shared + pilot.spent, calls + pilot.calls
    field = Field(model, sde, cond, len(x), differentiator, x.device)
    single = x.dtype != torch.float64
    return PathEngine(field, c, ends, budget, pilot, single, to_noise), (shared, calls)


def _path_result(
    run: Samples,
    engine: PathEngine,
    model: Model,
    x: Tensor,
    shared: tuple[int, int],
    to_noise: bool,
) -> Likelihood:
    """The result of `PathEngine` runs that began at `x`, data or standard normal noise.

    `shared` are the evaluations and calls made before.
    """
    size = math.prod(x.shape[1:])
    state, columns = run.x[:, : -len(COLUMNS)], run.x[:, -len(COLUMNS) :]
    columns = torch.where(run.ok[:, None], columns, torch.nan)
    found = dict(zip(COLUMNS, columns.unbind(1), strict=True))
    latent, data = state[:, -size:].to(x.dtype).reshape(x.shape), x
    if not to_noise:
        data = state[:, :size].to(x.dtype).reshape(x.shape)
    error = found["probes"]
    if scale_hidden(model, engine.field.cond):
        error = torch.hypot(error, found["path"])  # nodes that lie badly may outweigh probes
    return Likelihood(
        log_prob=found["log_prob"],
        standard_error=error,
        latent=latent,
        status=run.status,
        nfe=run.nfe + shared[1],
        forwards=engine.field.forwards,
        products=engine.field.products,
        x=data,
        log_det=found["log_det"],
        budget=ErrorBudget(*(found[name] for name in COLUMNS[2:])),
        shared=shared[0],
    )


def _finish(result: Likelihood, raise_on_failure: bool) -> Likelihood:
    if raise_on_failure and not bool(result.ok.all()):
        raise failure(result, result.status)
    return result


def _time(given: float | None, own: float) -> float:
    return own if given is None else float(given)


def _data_time(sde: SDE) -> float:
    if isinstance(sde, VP | SubVP | CosineVP | RectifiedFlow):
        return min(sde.t_min, 1e-5 * sde.T)
    return sde.t_min
