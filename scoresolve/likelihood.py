r"""Exact likelihood of data under the probability flow dx/dt = v(x, t).

Along the flow log p_t changes by -div v, so data x_0 that the flow takes to the latent x_T has

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt.

State and integral are solved as one state [B, D + K]: K = 1 column for the exact divergence, or
one for each Hutchinson probe, whose spread then tells the standard error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from scoresolve.divergence import exact_divergence, hutchinson, walsh_signs
from scoresolve.driving import (
    Engine,
    Given,
    IntegratorEngine,
    PlanEngine,
    Samples,
    drive,
    failure,
    split_cond,
    warn_of_dropout,
)
from scoresolve.errors import (
    ArgumentError,
    GridError,
    ModelWarning,
    ShapeError,
    Status,
    UnknownNameError,
    whole_number,
)
from scoresolve.grid import Grid, as_grid
from scoresolve.models import Model, as_model, check_output, combine, conversion
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.plans import Call, Combine, Mark, Plan, check_state
from scoresolve.sampling import Times, grid_for, plan, refuse
from scoresolve.sde import (
    EDM,
    SDE,
    VE,
    VP,
    CosineVP,
    GaussianSDE,
    RectifiedFlow,
    SubVP,
    TimeLike,
    as_time,
)
from scoresolve.solvers import REGISTRY, Integrator, Solver, get_solver

__all__ = ["DEFAULT_NFE", "DEFAULT_PROBES", "EXACT_UP_TO", "Likelihood", "log_likelihood"]

EXACT_UP_TO: Final = 64
DEFAULT_PROBES: Final = 8
DEFAULT_NFE: Final = 100
_TRACES: Final = ("auto", "exact", "hutchinson")


@dataclass(frozen=True)
class Likelihood:
    """What `log_likelihood` returns; a failed sample has NaN where a number would mislead.

    Attributes:
        log_prob: log-density of each sample in nats, [B], at least float32.
        standard_error: that of `log_prob` by the random probes, [B]: 0 with the exact trace,
            NaN with a single probe, which cannot tell its error.
        latent: where the flow takes the samples, [B, *event].
        status: one `Status` per sample, [B] int64.
        nfe: network calls per chunk of the batch.
        forwards: network evaluations of each sample, [B] int64; a sample that an adaptive solver
            has finished takes no further part in the calls.
        products: vector-Jacobian products of each sample, [B] int64.
        bin_width: width of the bins of dequantised data; None for plain data.
    """

    log_prob: Tensor
    standard_error: Tensor
    latent: Tensor
    status: Tensor
    nfe: int
    forwards: Tensor
    products: Tensor
    bin_width: float | None = None

    @property
    def ok(self) -> Tensor:
        """Which samples are good, [B] bool."""
        return self.status == int(Status.OK)

    @property
    def dimension(self) -> int:
        """D, the number of event elements."""
        return math.prod(self.latent.shape[1:])

    @property
    def bits_per_dim(self) -> Tensor:
        """-log_prob / (D log 2), less log2(bin_width) for dequantised data, [B].

        For dequantised data its mean is an upper bound on the bits per element of the model of
        the discrete data.

        Source:
            Theis, van den Oord and Bethge 2016 (1511.01844), section 3.1.
        """
        bits = -self.log_prob / (self.dimension * math.log(2))
        return bits if self.bin_width is None else bits - math.log2(self.bin_width)


def log_likelihood(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    x: Tensor,
    *,
    solver: str | Solver | Integrator = "dopri5",
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    trace: str = "auto",
    probes: int = DEFAULT_PROBES,
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

    An adaptive solver gives each sample its own steps and holds its probes fixed, as changing ones
    would look like a rough field to it. A fixed-grid solver must step in x itself ("..._flow");
    it turns each probe by the next row of a Walsh matrix at every call, so that the errors average
    out along the path. At equal cost that is up to ten times as accurate: prefer it, for example
    `solver="ab3_flow", nfe=100`, when the trace is not exact.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`, differentiable in x.
        sde: the process, a Gaussian one. A model of another Gaussian process is matched by log-SNR.
        x: data, [B, *event], floating point; it is not written into.
        solver: a deterministic adaptive solver, or a fixed-grid solver in flow form.
        steps: number of grid steps; or
        nfe: at most so many network calls (if neither is given, 100); or
        grid: a `Grid` or increasing times. A name of `GRIDS` goes with `steps` or `nfe`; omitted
            it is "karras" for `VE` and `EDM`, else "quadratic". All three for fixed grids only.
        t_start: time of the data. If omitted `sde.t_min`, but at most 1e-5 T for `VP`, `SubVP`,
            `CosineVP` and `RectifiedFlow`, where the noise of t_min = 1e-3 would blur the density.
        t_end: time of the latent, T if omitted. The law there is taken to be the prior, its
            standard deviation scaled by sigma(t_end) / sigma(T).
        trace: "exact", "hutchinson", or "auto": exact up to 64 event elements, where its cost of D
            products a call buys an error that probes would need thousands of to match.
        probes: number K >= 1 of Rademacher probes, with the Hutchinson trace.
        seed: seed of the counter-based noise; sample i gets the same whatever the batch or chunk.
        noise: a noise source, a `torch.Generator`, or a callable, instead of `seed`.
        chunk: samples to work on at a time; all if omitted.
        dequantise: width > 0 of the bins of discrete data, whose lower edges `x` holds; the
            density is then that at x + width * u with u uniform.
        progress: show a progress bar (only on a terminal).
        raise_on_failure: raise `SolveError` if any sample failed.
        **cond: passed on to the model; tensors whose first axis is B follow their samples.

    Returns:
        A `Likelihood`.

    Raises:
        ArgumentError: the process has no prior, the solver draws noise or is not in flow form, or
            a number is out of range.
        ShapeError, GridError, UnknownNameError: as for `sample`; also for times that decrease.
        SolveError: a sample failed and `raise_on_failure` is set.

    Source:
        Song et al. 2021 (2011.13456), section 4.3 and appendix D.2, eq. 39; Chen et al. 2018
        (1806.07366), eq. 8; Grathwohl et al. 2019 (1810.01367), section 3.1.
    """
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(
            f"{sde} has no prior, so the density of a latent is unknown: give a Gaussian process"
        )
    check_state(x)
    if not x.numel():
        raise ShapeError(f"x of shape {tuple(x.shape)} is empty: give at least one sample")
    count = _probe_count(trace, probes, math.prod(x.shape[1:]))
    resolved = get_solver(solver)
    if resolved.stochastic:
        raise ArgumentError(
            f"{resolved.name!r} draws noise: a likelihood needs a deterministic solver"
        )
    if dequantise is not None and not 0 < dequantise < math.inf:
        raise ArgumentError(f"dequantise = {dequantise}: give the width of a bin, above 0")
    source = as_noise(noise, seed)
    engine = _engine(resolved, sde, steps, nfe, grid, t_start, t_end)
    warn_of_dropout(score)
    with torch.inference_mode(False), torch.no_grad():
        width = dequantise or 0.0
        data = x + width * source.uniform(x, 0, Purpose.DEQUANTISE) if width else x
        flow = _JointFlow(as_model(score, sde), sde, data, count, engine.plan is not None, cond)
        start, rows = Given(flow.join(data)), torch.arange(x.shape[0], device=x.device)
        run = drive(_Chunks(engine), flow, start, source, chunk, progress, False, {"rows": rows})
        result = _result(run, flow, sde, engine.times[-1], dequantise)
    if raise_on_failure and not bool(result.ok.all()):
        raise failure(result, result.status)
    return result


class _JointFlow(Model):
    """The velocity of joint states [b, D + K], x and K integrals, as a model of "flow".

    Its one condition is `rows` [b], the places of the states in the batch: solvers drop samples
    that have arrived, and each has conditions and probes of its own.

    Attributes:
        forwards: network evaluations of each sample so far, [B] int64.
    """

    sde = None

    def __init__(
        self,
        model: Model,
        sde: GaussianSDE,
        x: Tensor,
        probes: int,
        turning: bool,
        cond: dict[str, Any],
    ) -> None:
        self.process, self.cond, self.turning = sde, cond, turning
        self.prediction, self.network = model.bind("flow")
        self.batch, self.event, self.dtype = x.shape[0], x.shape[1:], x.dtype
        self.size, self.probe_count = math.prod(self.event), probes
        self.forwards = torch.zeros(self.batch, dtype=torch.int64, device=x.device)

    def join(self, x: Tensor) -> Tensor:
        """The joint state of data [B, *event] before any step, at least float32."""
        flat = x.reshape(self.batch, self.size).to(torch.promote_types(x.dtype, torch.float32))
        return torch.cat([flat, flat.new_zeros(self.batch, max(1, self.probe_count))], 1)

    def latent(self, state: Tensor) -> Tensor:
        """x [b, *event] of joint states, as the network gets it."""
        return state[:, : self.size].to(self.dtype).reshape(-1, *self.event)

    def begin(self, state: Tensor, source: NoiseSource, rows: Tensor) -> None:
        """Take up the chunk `state` of the batch's `rows`, which draw from `source`."""
        x = self.latent(state)
        draws = [source.signs(x, draw, Purpose.PROBE) for draw in range(self.probe_count)]
        self.probes = torch.stack(draws) if draws else None
        self.first, self.calls = rows[:1], 0

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        """d/dt of the joint state `x` at `t` [b]; `prediction` is "flow"."""
        state, rows = self.latent(x), cond["rows"]
        held = split_cond(self.cond, rows, self.batch)
        self.forwards[rows] += 1

        def velocity(y: Tensor) -> Tensor:
            m = self.network(y, t, **held)
            check_output(m, y)
            if not m.requires_grad:
                warnings.warn(
                    "the model's output has no gradient with respect to x, so its divergence "
                    "counts as 0: if the network detaches or runs under torch.no_grad, undo that",
                    ModelWarning,
                    stacklevel=2,
                )
            time = as_time(t, y)
            u, w = conversion(self.prediction, "flow", self.process.point(time))
            return combine(u, y, w, m, time)

        if self.probes is None:
            v, divergence = exact_divergence(velocity, state)
            columns = divergence[:, None]
        else:
            probes = self.probes[:, rows - self.first]
            if self.turning:
                probes = probes * walsh_signs(self.calls, self.size, state).reshape(self.event)
            v, columns = hutchinson(velocity, state, probes)
        self.calls += 1
        flat = v.reshape(len(x), self.size)
        return torch.cat([flat.to(x.dtype), columns.to(x.dtype)], 1)


class _Chunks(Engine):
    """An engine that gives a joint flow the noise of each chunk before solving it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps, self.times, self.plan = engine.steps, engine.times, engine.plan

    def solve(
        self,
        model: Model,
        x: Tensor,
        source: NoiseSource,
        bar: tqdm[object],
        cond: dict[str, Any],
    ) -> tuple[Tensor, Tensor, int]:
        assert isinstance(model, _JointFlow)
        model.begin(x, source, cond["rows"])
        return self.engine.solve(model, x, source, bar, cond)


def _result(
    run: Samples,
    flow: _JointFlow,
    sde: GaussianSDE,
    t_end: float,
    bin_width: float | None,
) -> Likelihood:
    flat, columns = run.x[:, : flow.size], run.x[:, flow.size :]
    scale = float(sde.sigma(t_end) / sde.sigma(sde.T))
    prior = sde.prior((flow.batch, flow.size), dtype=flat.dtype, device=flat.device)
    at = torch.where(run.ok[:, None], flat / scale, 0)
    log_prob = prior.log_prob(at) - flow.size * math.log(scale) + columns.mean(1)
    if flow.probe_count == 0:
        error = torch.zeros_like(log_prob)
    elif flow.probe_count == 1:
        error = torch.full_like(log_prob, torch.nan)
    else:
        error = columns.std(1) / math.sqrt(flow.probe_count)
    return Likelihood(
        log_prob=torch.where(run.ok, log_prob, torch.nan),
        standard_error=torch.where(run.ok, error, torch.nan),
        latent=flow.latent(run.x),
        status=run.status,
        nfe=run.nfe,
        forwards=flow.forwards,
        products=flow.forwards * (flow.probe_count or flow.size),
        bin_width=bin_width,
    )


def _probe_count(trace: str, probes: int, dimension: int) -> int:
    """The number of probes; 0 for the exact trace."""
    if trace not in _TRACES:
        raise UnknownNameError("trace", trace, _TRACES)
    count = whole_number("probes", probes)
    return 0 if trace == "exact" or (trace == "auto" and dimension <= EXACT_UP_TO) else count


def _data_time(sde: GaussianSDE) -> float:
    if isinstance(sde, VP | SubVP | CosineVP | RectifiedFlow):
        return min(sde.t_min, 1e-5 * sde.T)
    return sde.t_min


def _engine(
    solver: Solver | Integrator,
    sde: GaussianSDE,
    steps: int | None,
    nfe: int | None,
    grid: str | Times | None,
    t_start: float | None,
    t_end: float | None,
) -> Engine:
    """What solves the flow, over `times` from data to noise."""
    start, end = _data_time(sde) if t_start is None else t_start, sde.T if t_end is None else t_end
    if isinstance(solver, Integrator):
        refuse(solver, steps=steps, nfe=nfe, grid=grid)
        times = Grid((start, end))
    elif grid is None or isinstance(grid, str):
        name = grid or ("karras" if isinstance(sde, VE | EDM) else "quadratic")
        calls = DEFAULT_NFE if steps is None and nfe is None else nfe
        times = grid_for(solver, sde, grid=name, steps=steps, nfe=calls, t_start=start, t_end=end)
    else:
        given = {"steps": steps, "nfe": nfe, "t_start": t_start, "t_end": t_end}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ArgumentError(f"an explicit grid fixes the times: leave out {extra[0]}=")
        times = as_grid(grid, False)
    times.check(sde)
    start, end = times.times[0], times.times[-1]
    if start > end:
        raise GridError(
            f"the times fall from {start:g} to {end:g}: a likelihood follows data to noise, "
            "give increasing times"
        )
    if isinstance(solver, Integrator):
        engine: Engine = IntegratorEngine(solver, sde, (start, end), False)
        engine.times = times.times
        return engine
    return PlanEngine(_flow_plan(solver, sde, times), None, False)


def _flow_plan(solver: Solver, sde: GaussianSDE, grid: Grid) -> Plan:
    """The solver's plan, if it is x' = x + sum b_k m_k with velocities m_k alone."""
    traced = plan(solver, sde, grid)
    share, fits = {0: 1.0}, True
    for stage in traced.stages:
        if isinstance(stage, Call):
            share[stage.out] = 0.0
            fits &= stage.prediction == "flow" and abs(share[stage.x] - 1) < 1e-9
        elif isinstance(stage, Combine):
            share[stage.out] = sum(c * share[register] for register, c in stage.terms)
        else:
            fits &= isinstance(stage, Mark)
    if not fits or abs(share[traced.output] - 1) > 1e-9:
        known = [n for n, make in REGISTRY.items() if getattr(make(), "predicts", "") == "flow"]
        raise ArgumentError(
            f"{solver.name!r} does not step in x itself, so it cannot carry the divergence: take "
            f"an adaptive solver such as 'dopri5', or one of {', '.join(map(repr, known))}"
        )
    return traced
