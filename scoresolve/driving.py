"""The driver behind every verb: chunks, engines, statuses.

A start (given or drawn from the prior) is split into chunks; an engine (a plan or an integrator)
solves each; the parts are joined with one status per sample, whatever happened on the way.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoresolve.conditions import part_of, settled, split_cond, unmarked
from scoresolve.errors import (
    ArgumentError,
    ModelWarning,
    SolveError,
    Status,
    check_output,
    is_transformed,
    row_status,
    whole_number,
)
from scoresolve.models import Model, NetworkModel
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.plans import Call, Mark, Plan, StepReport, check_state, model_time
from scoresolve.precision import host
from scoresolve.sde import SDE, GaussianSDE
from scoresolve.solvers import GaussianFlow, Integrator, Solution

__all__ = [
    "Engine",
    "Given",
    "IntegratorEngine",
    "PlanEngine",
    "Prior",
    "Samples",
    "check_call",
    "device_of",
    "drive",
    "failure",
    "settle",
    "warn_of_dropout",
]


_OTHER_NAMES: Final = {
    "t_stop": "t_end",
    "t_final": "t_end",
    "t_begin": "t_start",
    "t_init": "t_start",
    "n_steps": "steps",
    "num_steps": "steps",
    "num_inference_steps": "steps",
    "batch_size": "shape",
    "sampler": "solver",
    "method": "solver",
    "schedule": "grid",
    "scheduler": "grid",
    "timesteps": "grid",
    "sigmas": "grid",
    "generator": "seed",
    "random_state": "seed",
    "chunk_size": "chunk",
    "x_T": "x",
    "burn_in": "warmup",
    "thinning": "thin",
}
"""Names that others have for arguments of the verbs, too unlike to be found by likeness."""

_MISSPELT: Final = 0.75
"""Likeness from which a name is taken for another one misspelt: "sed" and "stepz" are, "scale" is
not like "shape" (0.6)."""


@dataclass(frozen=True)
class Samples:
    """What `sample` and `encode` return.

    Attributes:
        x: final states, [B, *event].
        status: one `Status` per sample, [B] int64.
        nfe: network evaluations of a sample, the most of any, counted where the model is called.
        times: the time grid, empty for a solver that chooses its own.
        plan: the plan that ran, None for a solver that has none.
        calls: calls of the network, for all chunks together.
        rows: samples evaluated in them, all calls together.
        t, accepted, rejected: of an adaptive solver the time reached, and the steps taken and
            refused, [B]; of an interrupted plan the time reached, where `x` may go on from.
        saved: states at its times to save at, [S, B, *event].
        path: of a dense adaptive solver, `path(t)` is the state [B, *event] at time t.
    """

    x: Tensor
    status: Tensor
    nfe: int
    times: tuple[float, ...]
    plan: Plan | None
    calls: int = 0
    rows: int = 0
    t: Tensor | None = None
    accepted: Tensor | None = None
    rejected: Tensor | None = None
    saved: Tensor | None = None
    path: Callable[[float], Tensor] | None = None

    @property
    def ok(self) -> Tensor:
        """Which samples are good, [B] bool: they arrived, or their event happened."""
        return (self.status == int(Status.OK)) | (self.status == int(Status.EVENT))


class Given:
    """A start that the caller gave."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.batch = x, x.shape[0]

    def rows(self, part: slice) -> Tensor:
        return self.x[part]


class Prior:
    """A start drawn from the prior, row by row, so that only a chunk exists at a time.

    Inside the process, at `t_start` below T, it is the noise of that time alone.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sde: SDE,
        source: NoiseSource,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if not sde.has_prior:
            raise ArgumentError(f"{sde} has no prior: give the start x=")
        self.shape, self.batch, self.source, self.sde = shape, shape[0], source, sde
        self.dtype, self.device = dtype or torch.get_default_dtype(), device
        self.t_start = sde.T

    def begin_at(self, t: float) -> None:
        """Draw the start at time `t`."""
        if t != self.sde.T and not isinstance(self.sde, GaussianSDE):
            raise ArgumentError(
                f"the law of {self.sde} at t_start = {t:g} is not known: give the start x="
            )
        self.t_start = t

    def rows(self, part: slice) -> Tensor:
        count = len(range(*part.indices(self.batch)))
        like = torch.empty((count, *self.shape[1:]), dtype=self.dtype, device=self.device)
        check_state(like)
        z = self.source.rows(part).normal(like, 0, Purpose.START)
        if isinstance(self.sde, GaussianSDE) and self.t_start != self.sde.T:
            return z.mul_(self.sde.start_std(self.t_start))
        return self.sde.from_normals(z)


class Part(NamedTuple):
    """What an engine made of one chunk: states, statuses, network calls, and those per sample."""

    x: Tensor
    status: Tensor
    calls: int
    evaluations: Tensor
    solution: Solution | None = None
    t: float | None = None  # where a plan was interrupted


class Engine(ABC):
    """How one chunk is solved."""

    steps: int
    times: tuple[float, ...] = ()
    plan: Plan | None = None
    t_start: float

    @abstractmethod
    def solve(
        self,
        model: Model,
        x: Tensor,
        source: NoiseSource,
        bar: tqdm[object],
        cond: dict[str, Any],
    ) -> Part:
        """Solve from `x`; `bar` is updated once a step, `cond` goes to the model."""


class PlanEngine(Engine):
    def __init__(
        self, plan: Plan, callback: Callable[[StepReport], object] | None, compile: bool
    ) -> None:
        if compile and callback is not None:
            raise ArgumentError("a compiled plan has no steps to report: leave out callback=")
        self.plan, self.callback, self.compile = plan, callback, compile
        self.compiled: Callable[..., Tensor] | None = None
        self.steps, self.times, self.t_start = plan.steps, plan.times, plan.times[0]

    def solve(
        self,
        model: Model,
        x: Tensor,
        source: NoiseSource,
        bar: tqdm[object],
        cond: dict[str, Any],
    ) -> Part:
        assert self.plan is not None
        cond = unmarked(cond)
        calls = torch.full(x.shape[:1], self.plan.nfe, device=x.device)
        if self.compile:
            if self.compiled is None:
                self.compiled = self.plan.compile(model)
            result = self.compiled(x, source, **cond)
            return Part(result, row_status(result), self.plan.nfe, calls)

        def report(step: StepReport) -> None:
            bar.update()
            if self.callback is not None:
                self.callback(step)

        watched = self.callback is not None or not bar.disable
        try:
            result = self.plan.run(model, x, source, report if watched else None, **cond)
        except KeyboardInterrupt as stop:
            reached: StepReport | None = getattr(stop, "reached", None)
            if reached is None:
                raise
            return self._interrupted(reached)
        return Part(result, row_status(result), self.plan.nfe, calls)

    def _interrupted(self, reached: StepReport) -> Part:
        """The states at the end of the last whole step; the calls are those up to there."""
        assert self.plan is not None
        stages = iter(self.plan.stages)
        before = itertools.takewhile(
            lambda stage: not (isinstance(stage, Mark) and stage.step == reached.step), stages
        )
        made = sum(isinstance(stage, Call) for stage in before)
        x = reached.x.clone()
        status = torch.full(x.shape[:1], int(Status.INTERRUPTED), device=x.device)
        return Part(x, status, made, torch.full_like(status, made), t=reached.t)


class IntegratorEngine(Engine):
    steps = 1

    def __init__(
        self,
        solver: Integrator,
        sde: SDE,
        ends: tuple[float, float],
        denoise: bool,
        width: int | None = None,
    ) -> None:
        if denoise and not isinstance(sde, GaussianSDE):
            raise ArgumentError(f"denoise= needs sigma(t), which {sde} does not have: leave it out")
        solver.check_direction(*ends)
        if solver.sde is not None and solver.sde != sde:
            raise ArgumentError(f"{solver.name!r} was made for {solver.sde}, not for {sde}")
        self.solver, self.sde, self.ends, self.denoise = solver, sde, ends, denoise
        self.width, self.t_start = width, ends[0]

    def solve(
        self,
        model: Model,
        x: Tensor,
        source: NoiseSource,
        bar: tqdm[object],
        cond: dict[str, Any],
    ) -> Part:
        if self.ends[0] != self.sde.T:
            source = source.started(self.ends[0])

        def drift(state: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            held = split_cond(cond, rows, x.shape[0])
            if self.solver.stochastic:
                velocity = self.sde.reverse_drift(state, t, model, **held)
            else:
                velocity = model.predict("flow", state, t, **held)
            check_output(velocity, state)
            return velocity

        solver = copy(self.solver)
        if self.denoise:  # leave calls for it
            last = math.ceil(x.shape[0] / self.width) if self.width else 1
            solver.max_calls = max(solver.max_calls - last, 1)
        found = solver.solve(
            drift,
            x,
            *self.ends,
            diffusion=self.sde.diffusion,
            noise=source,
            flow=self._flow(model, cond, x.shape[0]),
            width=self.width,
        )
        part = Part(found.x, found.status, found.nfe, found.evaluations, found)
        bar.update()
        return self._denoised(model, part, cond) if self.denoise else part

    def _flow(self, model: Model, cond: dict[str, Any], batch: int) -> GaussianFlow | None:
        if not isinstance(self.sde, GaussianSDE):
            return None
        prediction, function = model.bind("v")

        def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return function(x, t, **split_cond(cond, rows, batch))

        return GaussianFlow(self.sde, model.data_scale or 1.0, prediction, predict)

    def _denoised(self, model: Model, part: Part, cond: dict[str, Any]) -> Part:
        """The samples that arrived, after a last call to sigma = 0.

        Those that the limit on calls or an interrupt leaves out keep their states and are told.
        """
        x, status, calls, evaluations, solution, _ = part
        batch, why = x.shape[0], Status.CALL_LIMIT
        left = (status == int(Status.OK)).nonzero().flatten()
        try:
            while len(left) and calls < self.solver.max_calls:
                rows = left[: self.width]
                t = torch.full_like(rows, self.ends[1], dtype=x.dtype)
                clean = model.predict("x0", x[rows], t, **split_cond(cond, rows, batch))
                x, calls = x.index_copy(0, rows, clean), calls + 1
                status = status.index_copy(0, rows, row_status(clean))
                evaluations = evaluations.index_add(0, rows, torch.ones_like(rows))
                left = left[len(rows) :]
        except KeyboardInterrupt:
            why = Status.INTERRUPTED
        return Part(x, status.index_fill(0, left, int(why)), calls, evaluations, solution)


class _Told(Protocol):
    """A part of a result, with one `Status` per sample."""

    @property
    def status(self) -> Tensor: ...


Told = TypeVar("Told", bound=_Told)


def in_chunks(
    solve: Callable[[slice, tqdm[object]], Told],
    batch: int,
    chunk: int | None,
    steps: int,
    progress: bool,
) -> list[Told]:
    """What `solve` makes of the rows of each chunk; an interrupt keeps what is done.

    Args:
        solve: from the rows of a chunk and the bar, which it moves on.
        batch: samples, >= 0; of none there is one empty chunk.
        chunk: samples at a time; all if omitted.
        steps: of the bar, for each chunk.
        progress: whether the bar is shown.

    Raises:
        KeyboardInterrupt: nothing is done yet.
    """
    size = max(1, batch if chunk is None else min(whole_number("chunk", chunk), batch))
    starts, parts = range(0, max(batch, 1), size), list[Told]()
    with tqdm(total=steps * len(starts), disable=None if progress else True, unit="step") as bar:
        try:
            for begin in starts:
                parts.append(solve(slice(begin, begin + size), bar))
                if _interrupted(parts[-1].status):
                    break
        except KeyboardInterrupt:
            if not parts:
                raise
    return parts


def _interrupted(status: Tensor) -> bool:
    if is_transformed(status):
        return False  # under a transform of torch.func no value can be looked at
    return bool((status == int(Status.INTERRUPTED)).any())


def rejoined(pieces: Sequence[Tensor], batch: int, dim: int = 0, fill: int = 0) -> Tensor:
    """The chunks along `dim`; where samples were left out NaN, or `fill` among integers."""
    whole = pieces[0] if len(pieces) == 1 else torch.cat([*pieces], dim)
    short = list(whole.shape)
    short[dim] = batch - short[dim]
    left = torch.nan if whole.is_floating_point() else fill
    return torch.cat([whole, whole.new_full(short, left)], dim) if short[dim] else whole


def drive(
    engine: Engine,
    model: Model,
    start: Given | Prior,
    source: NoiseSource,
    chunk: int | None,
    progress: bool,
    raise_on_failure: bool,
    cond: dict[str, Any],
    spent: int = 0,
) -> Samples:
    """Solve every chunk and join the results; see `sampling.sample` for the arguments.

    `cond` are settled where the batch is split (see `settle`); `spent` are the calls made before,
    which count.
    """
    batch = start.batch

    def solve(part: slice, bar: tqdm[object]) -> Part:
        split = part_of(cond, part, batch)
        return engine.solve(model, start.rows(part), source.rows(part), bar, split)

    parts = in_chunks(solve, batch, chunk, engine.steps, progress)
    status = rejoined([part.status for part in parts], batch, fill=int(Status.INTERRUPTED))
    evaluations = rejoined([spent + part.evaluations for part in parts], batch)
    solutions = [part.solution for part in parts if part.solution is not None]
    result = Samples(
        rejoined([part.x for part in parts], batch),
        status,
        int(evaluations.max()) if batch else spent + max(part.calls for part in parts),
        engine.times,
        engine.plan,
        calls=spent + sum(part.calls for part in parts),
        rows=int(evaluations.sum()),
        **(_joined(solutions, batch) or _stopped(parts, engine.times, batch)),
    )
    if raise_on_failure and not bool(result.ok.all()):
        raise failure(result, status)
    return result


def _joined(solutions: list[Solution], batch: int) -> dict[str, Any]:
    """What adaptive solvers tell beside the samples, for the chunks together."""
    if not solutions:
        return {}
    saved = [one.saved for one in solutions if one.saved is not None]
    return {
        "t": rejoined([one.t for one in solutions], batch),
        "accepted": rejoined([one.accepted for one in solutions], batch),
        "rejected": rejoined([one.rejected for one in solutions], batch),
        "saved": rejoined(saved, batch, 1) if saved else None,
        "path": solutions[0].path if len(solutions) == 1 else None,
    }


def settle(cond: dict[str, Any], model: Model, start: Given | Prior, t: float) -> dict[str, Any]:
    """The conditions with a mark wherever the model alone can tell, see `conditions.settled`.

    The model is asked at three samples, at time `t` and where data and noise weigh the same, as at
    an end of the process a condition may not show. These calls are not counted, as no sample comes
    of them.
    """
    times, sde = [t], model.sde
    if isinstance(sde, GaussianSDE):
        even = sde.time_from_log_snr(host(0.0))
        times.append(float(even.clamp(sde.t_min, sde.T)))

    def answer(i: int, one: dict[str, Any]) -> Tensor:
        x, found = start.rows(slice(i, i + 1)), list[Tensor]()
        for time in times:
            found.append(model.bind("score")[1](x, model_time(time, x), **one))
            check_output(found[-1], x)
        return torch.cat(found)

    with torch.no_grad():
        return settled(cond, start.batch, answer) if cond else cond


def check_call(
    score: object, cond: dict[str, Any], verb: Callable[..., Any], stacklevel: int = 3
) -> None:
    """Look at the conditions that a verb hands on, before the first call of the model.

    Raises:
        ArgumentError: the network does not take them. A misspelt argument of the verb ends here,
            and one that a network with `**kwargs` would swallow is warned of.
    """
    own = [name for name in inspect.signature(verb).parameters if name != "cond"]
    taken = _parameters(score)
    explicit = [] if taken is None else [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
    doubts = {
        name: near[0]
        for name in cond
        if name not in explicit
        and (
            near := [other for other in (_OTHER_NAMES.get(name),) if other in own]
            or difflib.get_close_matches(name, own, 1, _MISSPELT)
        )
    }
    hint = "".join(f"; did you mean {near}= for {name}=?" for name, near in doubts.items())
    if taken is not None:
        try:
            inspect.Signature(taken).bind(None, None, **cond)
        except TypeError as error:
            given = "".join(f", {name}=..." for name in cond)
            raise ArgumentError(
                f"the network cannot be called as net(x, t{given}): {error}{hint}"
            ) from error
    if doubts:
        warnings.warn(
            f"{', '.join(doubts)} is no argument here and goes to the model{hint}",
            ModelWarning,
            stacklevel=stacklevel,
        )


def _parameters(score: object) -> list[inspect.Parameter] | None:
    """The parameters of the network behind `score`, None where they cannot be known."""
    net = score
    if isinstance(score, Model):
        if not isinstance(score, NetworkModel):
            return None
        net = score.net
    try:
        signature = inspect.signature(net.forward if isinstance(net, nn.Module) else net)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return list(signature.parameters.values())


def _stopped(parts: list[Part], times: tuple[float, ...], batch: int) -> dict[str, Any]:
    """The times that an interrupted plan has reached."""
    if all(part.t is None for part in parts):
        return {}
    ends = [torch.full(p.status.shape, times[-1] if p.t is None else p.t) for p in parts]
    return {"t": rejoined(ends, batch)}


def failure(result: object, status: Tensor) -> SolveError:
    """The exception for a `result` some of whose samples failed, by their `status` [B]."""
    counts = {
        Status(code).name: int((status == code).sum())
        for code in sorted(set(status.tolist()))
        if code not in (Status.OK, Status.EVENT)
    }
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    return SolveError(
        f"{sum(counts.values())} of {status.numel()} samples failed ({listed}): see "
        "`result.status` of this exception; good rows keep their values",
        result,
    )


def _network(score: object) -> nn.Module | None:
    while isinstance(score, Model) and not isinstance(score, NetworkModel):
        score = getattr(score, "model", None)  # what a model made of a model is made of
    net = score.net if isinstance(score, NetworkModel) else score
    return net if isinstance(net, nn.Module) else None


def device_of(score: object) -> torch.device | None:
    net = _network(score)
    parameter = next(net.parameters(), None) if net is not None else None
    return None if parameter is None else parameter.device


def warn_of_dropout(score: object) -> None:
    net = _network(score)
    noisy = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if net is not None and any(m.training for m in net.modules() if isinstance(m, noisy)):
        warnings.warn(
            "the network has dropout or batch norm in train mode, so its output depends on chance "
            "or on the batch: call net.eval() first",
            ModelWarning,
            stacklevel=3,
        )
