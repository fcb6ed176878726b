"""State and integral of the divergence as one state [B, D + C], for a solver chosen by hand.

    d/dt (x, l) = (v, div v),    log p_0(x_0) = log p_T(x_T) + l(T)

Towards data l runs from 0 at T, and -l(0) is what is added. C = 1 column for the exact divergence;
K Hutchinson probes have one for each element of z (J^T z), whose spread over the probes then tells
the standard error. Any process and any deterministic solver will do that steps in x itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scoresolve.conditions import split_cond
from scoresolve.divergence import (
    Differentiator,
    exact_divergence,
    hutchinson,
    velocity_parts,
    walsh_signs,
)
from scoresolve.driving import (
    Engine,
    Given,
    IntegratorEngine,
    Part,
    PlanEngine,
    drive,
)
from scoresolve.errors import ArgumentError, GridError, Status, check_output, whole_number
from scoresolve.grid import Grid, as_grid
from scoresolve.likelihood.result import Likelihood
from scoresolve.models import Model
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.plans import Call, Combine, Mark, Plan
from scoresolve.sampling import Times, grid_for, plan, refuse
from scoresolve.sde import EDM, SDE, VE, Prior, TimeLike, expand, log_prior
from scoresolve.solvers import REGISTRY, Integrator, Solver

__all__ = [
    "DEFAULT_NFE",
    "JointEngine",
    "JointFlow",
    "check_direction",
    "joint_engine",
    "solve_joint",
]

DEFAULT_NFE = 100
MOST_STEPS = 10**6


class JointFlow(Model):
    """The velocity of joint states [b, D + C], x and C integrals, as a model of "flow".

    Its one condition is `rows` [b], the places of the states in the batch: solvers drop samples
    that have arrived, and each has conditions and probes of its own.

    Attributes:
        forwards: network evaluations of each sample so far, [B] int64.
        alike: whether all probes of a sample are one but for their signs, so that they cannot tell
            its error, [B] bool; never in one dimension, where there is none.
    """

    sde = None

    def __init__(
        self,
        model: Model,
        sde: SDE,
        x: Tensor,
        probes: int,
        turning: bool,
        cond: dict[str, Any],
        differentiator: Differentiator,
    ) -> None:
        self.process, self.cond, self.turning = sde, cond, turning
        self.model, self.differentiator = model, differentiator
        self.batch, self.event, self.dtype = x.shape[0], x.shape[1:], x.dtype
        self.size, self.probe_count = math.prod(self.event), probes
        self.columns = self.size * probes or 1
        self.forwards = torch.zeros(self.batch, dtype=torch.int64, device=x.device)
        self.alike = torch.zeros(self.batch, dtype=torch.bool, device=x.device)

    def join(self, x: Tensor) -> Tensor:
        """The joint state of data [B, *event] before any step, at least float32."""
        flat = x.reshape(self.batch, self.size).to(torch.promote_types(x.dtype, torch.float32))
        return torch.cat([flat, flat.new_zeros(self.batch, self.columns)], 1)

    def latent(self, state: Tensor) -> Tensor:
        """x [b, *event] of joint states, as the network gets it."""
        return state[:, : self.size].to(self.dtype).reshape(-1, *self.event)

    def begin(self, state: Tensor, source: NoiseSource, rows: Tensor) -> None:
        """Take up the chunk `state` of the batch's `rows`, which draw from `source`."""
        x = self.latent(state)
        draws = [source.signs(x, draw, Purpose.PROBE) for draw in range(self.probe_count)]
        self.probes = probes = torch.stack(draws) if draws else None
        if probes is not None:  # probes that differ by a sign alone take the same products
            signs = (probes * probes[0]).reshape(len(draws), len(x), self.size)
            self.alike[rows] = (signs == signs[:, :, :1]).all(2).all(0) & (self.size > 1)
        self.first, self.calls = rows[:1], 0

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        """d/dt of the joint state `x` at `t` [b]; `prediction` is "flow"."""
        state, rows = self.latent(x), cond["rows"]
        held = split_cond(self.cond, rows, self.batch)
        self.forwards[rows] += 1

        u, w, network = velocity_parts(self.model, self.process, state, t, self.differentiator)

        def field(y: Tensor) -> Tensor:
            m: Tensor = network(y, t, **held)
            check_output(m, y)
            return m

        if self.probes is None:
            m, divergence = exact_divergence(field, state, self.differentiator)
            columns = self.size * u[:, None] + w[:, None] * divergence[:, None]
        else:
            probes = self.probes[:, rows - self.first]
            if self.turning:
                probes = probes * walsh_signs(self.calls, self.size, state).reshape(self.event)
            m, terms = hutchinson(field, state, probes, self.differentiator)
            columns = (u[:, None] + w[:, None] * terms).movedim(0, 1).reshape(len(x), self.columns)
        v = expand(u, state, u) * state + expand(w, state, w) * m
        self.calls += 1
        flat = v.reshape(len(x), self.size)
        return torch.cat([flat.to(x.dtype), columns.to(x.dtype)], 1)


class _InTime(IntegratorEngine):
    """Hands a solver the drift alone: a joint state has no clean data and noise of its own."""

    def _flow(self, model: Model, cond: dict[str, Any], batch: int) -> None:
        return None


class JointEngine(Engine):
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
    ) -> Part:
        assert isinstance(model, JointFlow)
        model.begin(x, source, cond["rows"])
        return self.engine.solve(model, x, source, bar, cond)


def solve_joint(
    engine: Engine,
    flow: JointFlow,
    sde: SDE,
    x: Tensor,
    prior: Prior | None,
    to_noise: bool,
    source: NoiseSource,
    chunk: int | None,
    progress: bool,
) -> Likelihood:
    """The likelihood of data `x` that the flow takes to noise, or of what it makes of noise `x`.

    Args:
        engine: solves the joint flow, in the direction of its times.
        flow: a joint flow of states like `x`.
        sde: the process.
        x: [B, *event].
        prior: the law at the noisy end; if omitted the process's own, see `log_prior`.
        to_noise: the direction.
        source: the probes.
        chunk, progress: as for `drive`.

    Raises:
        ArgumentError, ShapeError: as for `log_prior`.
    """
    start, rows = flow.join(x), torch.arange(flow.batch, device=x.device)

    def density(state: Tensor, good: Tensor) -> Tensor:
        latent = torch.where(good[:, None], state[:, : flow.size], 0).reshape(-1, *flow.event)
        return log_prior(sde, latent, engine.times[-1 if to_noise else 0], prior)

    known = None if to_noise else density(start, start.isfinite().all(1))
    run = drive(
        JointEngine(engine), flow, Given(start), source, chunk, progress, False, {"rows": rows}
    )
    columns, end = run.x[:, flow.size :], flow.latent(run.x)
    integrals = columns.reshape(flow.batch, max(1, flow.probe_count), -1)
    log_det = integrals.sum(2).mean(1) * (1 if to_noise else -1)
    if known is None:
        known = density(run.x, run.ok)
    error = torch.zeros_like(log_det)
    if flow.probe_count:
        error = probe_error(integrals) if flow.probe_count > 1 else error
        error = torch.where(flow.alike, torch.nan, error)
    log_prob = known + log_det  # of a latent beyond all bounds it is -inf
    ok = run.ok & log_prob.isfinite()
    return Likelihood(
        log_prob=torch.where(ok, log_prob, torch.nan),
        standard_error=torch.where(ok, error, torch.nan),
        latent=end if to_noise else x,
        status=torch.where(run.ok & ~ok, int(Status.NONFINITE), run.status),
        nfe=run.nfe,
        forwards=flow.forwards,
        products=flow.forwards * (flow.probe_count or flow.size),
        x=x if to_noise else end,
        log_det=torch.where(ok, log_det, torch.nan),
    )


def joint_engine(
    solver: Solver | Integrator,
    sde: SDE,
    start: float,
    end: float,
    steps: int | None,
    nfe: int | None,
    grid: str | Times | None,
    to_noise: bool = True,
) -> Engine:
    """What solves the joint flow from `start` to `end`.

    Raises:
        ArgumentError: the solver draws noise or does not step in x itself, or a budget does not
            go with it.
        GridError: times of the other direction, or that leave the process.
    """
    if solver.stochastic:
        raise ArgumentError(
            f"{solver.name!r} draws noise: a likelihood needs a deterministic solver"
        )
    for name, value in {"steps": steps, "nfe": nfe}.items():
        if value is not None:
            whole_number(name, value, 1, MOST_STEPS)
    if isinstance(solver, Integrator):
        refuse(solver, steps=steps, nfe=nfe, grid=grid)
        if not {None, "time"} & {getattr(solver, "coordinates", None)}:
            raise ArgumentError(
                f"{solver.name!r} steps in {solver.coordinates} coordinates, not in x itself, so "  # type: ignore[attr-defined]
                "it cannot carry the divergence: take another adaptive solver, such as 'dopri5'"
            )
        times = Grid((start, end))
    elif grid is None or isinstance(grid, str):
        name = grid or ("karras" if isinstance(sde, VE | EDM) else "quadratic")
        calls = DEFAULT_NFE if steps is None and nfe is None else nfe
        times = grid_for(solver, sde, grid=name, steps=steps, nfe=calls, t_start=start, t_end=end)
    else:
        times = as_grid(grid, False)
    check_direction(times, sde, to_noise)
    if isinstance(solver, Integrator):
        engine: Engine = _InTime(solver, sde, (start, end), False)
        engine.times = times.times
        return engine
    return PlanEngine(_flow_plan(solver, sde, times), None, False)


def check_direction(times: Grid, sde: SDE, to_noise: bool) -> None:
    """Raise `GridError` unless the times lie inside the process and increase to noise."""
    times.check(sde)
    start, end = times.times[0], times.times[-1]
    if to_noise and start > end:
        raise GridError(
            f"the times fall from {start:g} to {end:g}: a likelihood follows data to noise, "
            "give increasing times"
        )
    if not to_noise and start < end:
        raise GridError(
            f"the times rise from {start:g} to {end:g}: samples are drawn from noise to data, "
            "give decreasing times"
        )


def _flow_plan(solver: Solver, sde: SDE, grid: Grid) -> Plan:
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


def probe_error(integrals: Tensor) -> Tensor:
    """Standard error [B] of the mean over K > 1 probes of sums over elements.

    An element z_i (J^T z)_i has the diagonal for mean, and noise sum_j J_ij z_i z_j over j != i. If
    J is symmetric, as of a score, j has the same noise by that pair, so that the variance of the
    sum is 2 sum_i var_i; else it is at most that. Elements share pairs two by two, and a square of
    a variance with m = K - 1 degrees of freedom is too large by 1 + 2/m, so that there are

        n = (K + 1)/2 (sum var)^2 / sum var^2

    of them in all. Student's t of n has two thirds within 1 + 1/(2n) + 1/(3n^2), to 1 %.

    Args:
        integrals: of the elements along the path, [B, K, D].

    Source:
        Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    count = integrals.shape[1]
    variances = integrals.var(1)
    total = variances.sum(1)
    tiny = torch.finfo(total.dtype).tiny
    few = 2 / (count + 1) * (variances / total.clamp(min=tiny)[:, None]).square().sum(1)
    few = few.clamp(max=1)
    return (2 * total / count).sqrt() * (1 + few / 2 + few.square() / 3)
