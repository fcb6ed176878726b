"""Markov chains on a score model: one verb for every kernel.

Chains are rows of x [B, *event]; each has its own numbers, step size, acceptance and status, and
nothing of its neighbours: where the score of a row does not depend on its batch to the last bit,
neither does the chain. The step sizes of an adjusted kernel are adapted in a warm-up and then stay
as they are, because a kernel that learns has no invariant law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scoresolve.conditions import settled, split_cond
from scoresolve.driving import check_call, failure, in_chunks, rejoined, warn_of_dropout
from scoresolve.errors import ArgumentError, Status, check_output, whole_number, yes_or_no
from scoresolve.kernels import (
    ChainNoise,
    ChainState,
    DualAveraging,
    Kernel,
    ParallelTempering,
    Target,
    as_target,
    get_kernel,
)
from scoresolve.kernels.base import MOST_STEPS, chain_status, check_chains, without_gradients
from scoresolve.kernels.target import Density, column, factor_of
from scoresolve.noise import NoiseSource, as_noise

__all__ = ["Chains", "run_chains"]


@dataclass(frozen=True)
class Chains:
    """What `run_chains` returns.

    Attributes:
        x: final states, [B, *event].
        samples: states after every `thin` steps past the warm-up, [S, B, *event]; None if not kept.
        log_prob: log pi of `x` up to a constant, [B], where it is known.
        acceptance: mean acceptance probability after the warm-up, [B], or [B, R] of the replicas
            of parallel tempering; None for a kernel that is not adjusted.
        acceptance_error: mean bound of the error of the changes of log pi, likewise, where they
            were integrated from the score, 0 counted for a decision that it could not turn: to
            this extent the invariant law is not pi.
        step_size: of every chain after the warm-up, shaped as `acceptance`.
        swap_rates: mean acceptance of exchanges between neighbours, [B, R - 1].
        status: one `Status` per chain, [B] int64.
        nfe: evaluations of the score of one chain, the most of any, its replicas together, counted
            where the model is called.
        calls: calls of the model, for all chunks together.
    """

    x: Tensor
    samples: Tensor | None
    log_prob: Tensor | None
    acceptance: Tensor | None
    acceptance_error: Tensor | None
    step_size: Tensor
    swap_rates: Tensor | None
    status: Tensor
    nfe: int
    calls: int

    @property
    def ok(self) -> Tensor:
        """Which chains are good, [B] bool."""
        return self.status == int(Status.OK)


def run_chains(
    score: Density,
    *,
    x: Tensor,
    kernel: str | Kernel = "mala",
    steps: int = 1000,
    warmup: int = 0,
    keep: bool = True,
    thin: int = 1,
    step_size: float | Tensor | None = None,
    covariance: Tensor | None = None,
    t: float | None = None,
    nodes: int = 3,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    chunk: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Chains:
    """Run a Markov chain from every row of `x`.

    Args:
        score: the target: a `GaussianMixture`, `from_energy(fn)`, any model or callable
            `score(x, t, **cond)`, or a `Target` such as `Tilted`.
        x: starts, [B, *event], float32 or float64.
        kernel: a name of `KERNELS` or a kernel made of its class.
        steps: steps after the warm-up, >= 1, at most 2^30.
        warmup: steps before, >= 0, at most 2^30, which are not kept; an adjusted kernel adapts the
            step size of each chain in them, but for the last quarter or the last 50, which forget
            what the adapting did to the law.
        keep: whether states are kept; a batch of B chains needs memory for `steps / thin` of it.
        thin: keep the state after every so many steps, >= 1.
        step_size: of a kernel given by name, a number or [B].
        covariance: about that of the target, [D, D], or variances [*event]. Noise and momenta
            then have this covariance and its inverse; step sizes are in units of it.
        t: fixed time of a model; its process's `t_min` if omitted.
        nodes: of the integral along the proposal where only a score is known, before it is
            refined for the chains that need it, whose rows the model then gets alone if it takes
            a part of the batch; at most 100.
        seed: in [0, 2^64); chain b of a seed has the same numbers in every batch.
        noise: a source, a generator or a callable instead of `seed`.
        chunk: chains that run at a time; all if omitted.
        progress: show a bar.
        raise_on_failure: raise `SolveError` if a chain fails.
        **cond: to the model; a tensor whose first axis is B is split along with `x`.

    Returns:
        `Chains`.

    Raises:
        ArgumentError, ShapeError, UnknownNameError: before the first call of the model, an
            argument cannot be used.
        SolveError: a chain failed and `raise_on_failure` is set.

    >>> import torch, scoresolve as ss
    >>> ring = ss.targets.ring()
    >>> chains = ss.run_chains(ring, x=ring.sample(100), kernel="mala", steps=50, warmup=50)
    >>> chains.samples.shape, chains.nfe
    (torch.Size([50, 100, 2]), 101)
    """
    if cond:
        check_call(score, cond, run_chains)
    check_chains(x)
    chosen = get_kernel(kernel, step_size)
    steps = whole_number("steps", steps, most=MOST_STEPS)
    warmup = whole_number("warmup", warmup, least=0, most=MOST_STEPS)
    thin = whole_number("thin", thin, most=steps)
    batch, rows = len(x), torch.arange(len(x), device="cpu")
    factor, source = factor_of(covariance, x), as_noise(noise, seed)
    warn_of_dropout(score)
    run = _Run(chosen, steps, warmup, thin if yes_or_no("keep", keep) else None)

    def answer(i: int, one: dict[str, Any]) -> Tensor:
        state = x[i : i + 1].clone()
        found = as_target(score, t, nodes, **one).evaluate(state)[1]
        check_output(found, state)
        return found

    cond = settled(cond, batch, answer) if cond else cond

    def solve(part: slice, bar: tqdm[object]) -> Chains:
        # the conditions of a chain are those of all its replicas
        every = rows[part].repeat_interleave(chosen.copies)

        def made(index: Tensor) -> Target:
            return as_target(score, t, nodes, **split_cond(cond, index, batch))

        target = made(every).scaled(factor)
        if cond:
            target.of_rows = lambda some: made(every[some.cpu()]).evaluate
        return run(target, x[part], batch, part, source.rows(part), bar)

    result = _joined(in_chunks(solve, batch, chunk, steps + warmup, progress), batch)
    if raise_on_failure and not bool(result.ok.all()):
        raise failure(result, result.status)
    return result


SETTLING = 50
"""Steps at the end of a warm-up, a quarter of it at most, that run with the adapted step size.
While the step of a chain follows its states the target is not invariant: the variance of a mixture
was 8 % too small at the end, however long the warm-up and though it began with exact samples."""


@dataclass(frozen=True)
class _Run:
    """One chunk from start to end."""

    kernel: Kernel
    steps: int
    warmup: int
    thin: int | None

    @without_gradients()
    def __call__(
        self,
        target: Target,
        x: Tensor,
        batch: int,
        part: slice,
        source: NoiseSource,
        bar: tqdm[object],
    ) -> Chains:
        kernel, rungs = self.kernel, self.kernel.copies
        h, x = kernel.step_sizes(batch, part, x), x.clone(memory_format=torch.contiguous_format)
        failed = torch.zeros(len(x) * rungs, dtype=torch.bool, device=x.device)
        bound = kernel.bind(target, x)
        if not kernel.adjusted:
            bound.watch(failed)
        before, alone = bound.calls, torch.zeros(len(h), dtype=torch.int64, device=x.device)
        noise = ChainNoise(source, copies=rungs)
        count = self.steps // self.thin if self.thin else 0
        samples = _room(x, count)
        total, error = torch.zeros_like(h), torch.zeros_like(h)
        done, interrupted = 0, False
        tuner = DualAveraging(h, kernel.target_acceptance or 0.0)
        adapting = self.warmup - min(self.warmup // 4, SETTLING)
        state = kernel.start(target.coordinates(x), bound, noise)
        wide = column(h, state.point.x)
        try:
            for step in range(self.warmup):
                state = kernel.step(state, bound, noise, wide)
                bar.update()
                if state.extra is not None:
                    alone += state.extra
                if state.acceptance is not None and step < adapting:
                    tuner.update(state.acceptance)
                    h = tuner.step_size if step + 1 < adapting else tuner.average
                    wide = column(h, state.point.x)
            state = state._replace(
                rounds=0, swaps=None if state.swaps is None else torch.zeros_like(state.swaps)
            )
            for done in range(1, self.steps + 1):
                state = kernel.step(state, bound, noise, wide)
                bar.update()
                if state.acceptance is not None:
                    total += state.acceptance
                if state.error is not None:
                    error += state.error
                if state.extra is not None:
                    alone += state.extra
                if self.thin and done % self.thin == 0:
                    samples[done // self.thin - 1] = target.place(state.point.x[::rungs])
        except KeyboardInterrupt:
            interrupted, done = True, max(done - 1, 0)
            samples[done // (self.thin or 1) :] = torch.nan
        return self._result(
            target,
            state,
            samples,
            h,
            total / max(done, 1),
            error / max(done, 1),
            chain_status(state.point, failed),
            interrupted,
            bound.calls - before,
            bound.calls - before - bound.partial + int(alone.amax() if len(alone) else 0),
        )

    def _result(
        self,
        target: Target,
        state: ChainState,
        samples: Tensor,
        h: Tensor,
        acceptance: Tensor,
        error: Tensor,
        status: Tensor,
        interrupted: bool,
        calls: int,
        evaluations: int,
    ) -> Chains:
        kernel, point, rungs = self.kernel, state.point, self.kernel.copies
        x = target.place(point.x[::rungs])
        status = status[::rungs]
        if interrupted:
            status = torch.full_like(status, int(Status.INTERRUPTED))

        def by_chain(values: Tensor) -> Tensor:
            return values.view(-1, rungs) if rungs > 1 else values

        return Chains(
            x=x.clone(),
            samples=samples if self.thin else None,
            log_prob=None if point.log_prob is None else point.log_prob[::rungs],
            acceptance=by_chain(acceptance) if kernel.adjusted else None,
            acceptance_error=by_chain(error) if state.error is not None else None,
            step_size=by_chain(h),
            swap_rates=kernel.swap_rates(state) if isinstance(kernel, ParallelTempering) else None,
            status=status,
            nfe=evaluations * rungs,
            calls=calls,
        )


def _room(x: Tensor, count: int) -> Tensor:
    """Memory for `count` states of all chains."""
    try:
        return x.new_empty((count, *x.shape))
    except RuntimeError as error:
        size = count * x.numel() * x.element_size() / 2**30
        raise ArgumentError(
            f"{count} states of {len(x)} chains need {size:.3g} GiB, which there are not: give "
            "thin=, or keep=False"
        ) from error


def _joined(parts: list[Chains], batch: int) -> Chains:
    """The chunks as one result; chains that an interrupt left out are NaN and say so."""

    def rows(name: str, dim: int = 0, fill: int = 0) -> Any:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else rejoined(pieces, batch, dim, fill)

    return Chains(
        x=rows("x"),
        samples=rows("samples", 1),
        log_prob=rows("log_prob"),
        acceptance=rows("acceptance"),
        acceptance_error=rows("acceptance_error"),
        step_size=rows("step_size"),
        swap_rates=rows("swap_rates"),
        status=rows("status", fill=int(Status.INTERRUPTED)),
        nfe=max(part.nfe for part in parts),
        calls=sum(part.calls for part in parts),
    )
