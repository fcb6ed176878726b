"""Chains through a sequence of densities: down noise levels, up inverse temperatures.

annealed Langevin     p_t of a process at falling noise levels, with steps in units of sigma_t;
simulated annealing   pi_beta proportional to q(x) exp(beta f(x)) at rising beta;
annealed importance   q^(1 - beta) p^beta from beta = 0 to 1, with the weights

    log w = sum_n (beta_n - beta_{n-1}) (log p - log q)(x_{n-1}),    E w = Z_p / Z_q.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from scoresolve.conditions import settled, split_cond
from scoresolve.driving import failure, in_chunks, rejoined, warn_of_dropout
from scoresolve.errors import (
    ArgumentError,
    GridError,
    ShapeError,
    Status,
    check_output,
    real_number,
    row_status,
    whole_number,
)
from scoresolve.kernels import (
    HMC,
    ULA,
    ChainNoise,
    ChainState,
    Geometric,
    Kernel,
    Target,
    Tilted,
    as_target,
    get_kernel,
)
from scoresolve.kernels.base import (
    MOST_STEPS,
    chain_status,
    check_chains,
    checked_step,
    without_gradients,
)
from scoresolve.kernels.target import Density, Evaluate, column
from scoresolve.models import Model
from scoresolve.noise import NoiseSource, as_noise
from scoresolve.precision import doubled, host
from scoresolve.sde import GaussianSDE

__all__ = [
    "Annealed",
    "ImportanceEstimate",
    "annealed_importance",
    "annealed_langevin",
    "simulated_annealing",
]

Noise = NoiseSource | torch.Generator | Callable[..., Tensor] | None
_PILOT = 10  # moves of the pilot chains at every beta


@dataclass(frozen=True)
class Annealed:
    """What `annealed_langevin` and `simulated_annealing` return.

    Attributes:
        x: final states, [B, *event].
        value: f of them, [B], of simulated annealing.
        acceptance: mean acceptance probability at every level, [N, B]; None if not adjusted.
        status: one `Status` per chain, [B] int64.
        nfe: evaluations of the score of one chain, the most of any, counted where the model is
            called.
        calls: calls of the model, for all chunks together.
    """

    x: Tensor
    value: Tensor | None
    acceptance: Tensor | None
    status: Tensor
    nfe: int
    calls: int

    @property
    def ok(self) -> Tensor:
        """Which chains are good, [B] bool."""
        return self.status == int(Status.OK)


@dataclass(frozen=True)
class ImportanceEstimate:
    """What `annealed_importance` returns.

    Attributes:
        log_z: log of the mean weight of the good chains, which estimates log(Z_p / Z_q). The
            mean weight is unbiased; its logarithm is low by about half of the square of its error.
        standard_error: of `log_z`, to first order, from the spread of the weights.
        effective_size: (sum w)^2 / sum w^2, of at most B chains. Below some tens of it the
            error is not to be trusted either.
        log_weights: [B] float64, on the host where the device of `x` has none.
        x: final states, [B, *event]; with their weights they stand for p.
        step_sizes: factors on the kernel's step size at every beta but the first, [N] float64.
        acceptance, status, nfe: as in `Annealed`.
        calls: calls of both densities, for all chunks and the pilot together.
    """

    log_z: float
    standard_error: float
    effective_size: float
    log_weights: Tensor
    x: Tensor
    step_sizes: Tensor
    acceptance: Tensor
    status: Tensor
    nfe: int
    calls: int

    def __str__(self) -> str:
        return (
            f"log Z        {self.log_z:.4f} +- {self.standard_error:.4f}\n"
            f"effective    {self.effective_size:.0f} of {len(self.x)} chains\n"
            f"acceptance   {float(self.acceptance.mean(1).min()):.3f} at least at any beta\n"
            f"nfe          {self.nfe}"
        )


def annealed_langevin(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    times: Sequence[float] | Tensor,
    *,
    x: Tensor,
    kernel: str | Kernel | None = None,
    steps: int = 100,
    nodes: int = 3,
    seed: int = 0,
    noise: Noise = None,
    chunk: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Annealed:
    """Langevin dynamics on p_t at falling noise levels, each from where the last one ended.

    Args:
        score: the score model of `sde`, which is asked at the `times` alone.
        sde: a Gaussian process.
        times: the levels, falling in (0, T]; of a `VE` a geometric sequence of sigma.
        x: starts, [B, *event], such as `sde.prior(shape)`.
        kernel: its step size is in units of sigma_t to the power that it scales with. If omitted
            `ULA(0.1)`, which is the epsilon = 2e-5 at sigma = 0.01 of the paper.
        steps: steps at every level, >= 1.
        nodes: of the integral along the proposal, for an adjusted kernel.
        seed, noise, chunk, progress, raise_on_failure, **cond: as in `run_chains`.

    Returns:
        `Annealed`.

    Raises:
        GridError: the times do not fall within (0, T].
        ArgumentError, ShapeError: another argument cannot be used.
        SolveError: a chain failed and `raise_on_failure` is set.

    Source:
        Song and Ermon 2019 (1907.05600), algorithm 1; its step alpha_i is 2 h.
    """
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"noise levels are those of a Gaussian process, not of {sde}")
    chosen = ULA(0.1) if kernel is None else _single(get_kernel(kernel))
    levels = _numbers("times", times)
    inside = bool(levels) and levels[-1] > 0 and levels[0] <= sde.T
    if not inside or any(not a > b for a, b in itertools.pairwise(levels)):
        raise GridError(f"times = {levels}: give times that fall within (0, {sde.T:g}]")
    units = [float(sde.sigma(t)) ** chosen.power for t in levels]

    def make(conditions: _Conditions, rows: Tensor) -> _Levels:
        return _NoiseLevels(
            chosen, [_target_of_rows(score, t, nodes, conditions, rows) for t in levels]
        )

    warn_of_dropout(score)
    source = as_noise(noise, seed)
    cond = _settled(score, levels[-1], nodes, x, cond)
    out, _ = _anneal(chosen, make, units, steps, x, source, chunk, progress, raise_on_failure, cond)
    return out


def simulated_annealing(
    f: Density,
    betas: Sequence[float] | Tensor,
    *,
    x: Tensor,
    base: Density | None = None,
    kernel: str | Kernel | None = None,
    steps: int = 1,
    step_sizes: Sequence[float] | Tensor | None = None,
    t: float | None = None,
    nodes: int = 3,
    seed: int = 0,
    noise: Noise = None,
    chunk: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
    **cond: Any,
) -> Annealed:
    """Chains on pi_beta proportional to q(x) exp(beta f(x)), each beta from where the last ended.

    With f = log p_t of a score model and beta far above 1 they end near the modes of p_t.

    Args:
        f: what is tilted towards, in the place of a log-density: `from_energy(lambda x, t: -f(x))`,
            a mixture, any model, or a callable `score(x, t, **cond)` that is its gradient.
        betas: inverse temperatures, [N], finite.
        x: starts, [B, *event], float32 or float64.
        base: q, a density or a score of its own, without conditions; a constant if omitted.
        kernel: `HMC()` if omitted.
        steps: steps at every beta, >= 1.
        step_sizes: factors on the kernel's step size, one for each beta, [N].
        t: fixed time of f where it is a model; its process's `t_min` if omitted.
        nodes: of the integral along the proposal where f or q is known by its gradient alone.
        seed, noise, chunk, progress, raise_on_failure: as in `run_chains`.
        **cond: to f; a tensor whose first axis is B is split along with `x`.

    Returns:
        `Annealed`; without `value` where f or q is known by its gradient alone.

    Raises:
        ArgumentError, ShapeError: an argument cannot be used.
        SolveError: a chain failed and `raise_on_failure` is set.

    Source:
        Kirkpatrick, Gelatt, Vecchi 1983, "Optimization by simulated annealing", Science 220.
    """
    chosen = HMC() if kernel is None else _single(get_kernel(kernel))
    levels, units = _tilted_units(betas, step_sizes)
    prior = None if base is None else as_target(base)

    def make(conditions: _Conditions, rows: Tensor) -> _Levels:
        tilt = _target_of_rows(f, t, nodes, conditions, rows)
        if tilt.density and (prior is None or prior.density):
            return _Temperatures(chosen, Tilted(prior, tilt), levels)
        return _NoiseLevels(chosen, [_steeper(prior, tilt, beta) for beta in levels])

    warn_of_dropout(f)
    source = as_noise(noise, seed)
    cond = _settled(f, t, nodes, x, cond)
    out, _ = _anneal(chosen, make, units, steps, x, source, chunk, progress, raise_on_failure, cond)
    return out


def annealed_importance(
    target: Density,
    base: Density,
    betas: Sequence[float] | Tensor,
    *,
    x: Tensor,
    kernel: str | Kernel | None = None,
    steps: int = 1,
    step_sizes: Sequence[float] | Tensor | None = None,
    pilot: Tensor | None = None,
    seed: int = 0,
    noise: Noise = None,
    chunk: int | None = None,
    progress: bool = False,
    raise_on_failure: bool = False,
) -> ImportanceEstimate:
    """Annealed importance sampling: log(Z_p / Z_q) from chains along q^(1 - beta) p^beta.

        log w = sum_n (beta_n - beta_{n-1}) (log p - log q)(x_{n-1}),

    where x_0 ~ q, and x_n is made of x_{n-1} by a kernel that leaves pi_{beta_n} invariant. The
    step sizes are fixed beforehand, because weights of a kernel that learns on the way are biased;
    chains of a pilot, which have no part in the estimate, may find them.

    Args:
        target: p up to a constant: an energy, a mixture, or a model with `log_prob_and_score`.
        base: q, likewise; a normalised one, such as a `GaussianMixture`, has Z_q = 1.
        betas: rising from 0 to 1, [N + 1].
        x: exact samples of q, [B, *event], float32 or float64; at least 2.
        kernel: an adjusted kernel; `HMC()` if omitted.
        steps: steps at every beta, >= 1.
        step_sizes: factors on the kernel's step size, one for each beta but the first, [N].
        pilot: exact samples of q other than `x`, [P, *event] in its dtype. Chains from them adapt
            the factors to the kernel's acceptance in ten moves at every beta, with numbers that
            no other chain gets, log h <- log h + (a - acceptance) / sqrt(move) with their mean a.
        seed, noise, chunk, progress, raise_on_failure: as in `run_chains`. The noise of chains is
            not that of `GaussianMixture.sample`, so both may have one seed.

    Returns:
        `ImportanceEstimate`.

    Raises:
        ArgumentError, ShapeError: an argument cannot be used, or p or q has a score alone.
        SolveError: a chain failed and `raise_on_failure` is set.

    Source:
        Neal 2001, "Annealed importance sampling", Statistics and Computing 11 (physics/9803008).
    """
    chosen = HMC() if kernel is None else _single(get_kernel(kernel))
    if not chosen.adjusted:
        raise ArgumentError(
            f"{chosen.name!r} does not leave the densities invariant, which would bias log Z: "
            "give an adjusted kernel, such as MALA or HMC"
        )
    family = Geometric(as_target(base), as_target(target))
    rising = _numbers("betas", betas)
    increasing = all(a < b for a, b in itertools.pairwise(rising))
    if not (len(rising) > 1 and rising[0] == 0 and rising[-1] == 1 and increasing):
        raise ArgumentError(f"betas = {rising}: give two or more that rise from 0 to 1")
    check_chains(x)
    if len(x) < 2:
        raise ArgumentError(f"{len(x)} chains have no standard error: give two or more")
    levels, units = _tilted_units(rising[1:], step_sizes)
    source, spent = as_noise(noise, seed), 0
    if pilot is not None:
        check_chains(pilot)
        if pilot.shape[1:] != x.shape[1:] or pilot.dtype != x.dtype or not len(pilot):
            raise ShapeError(
                f"pilot is {tuple(pilot.shape)} in {pilot.dtype} for x {tuple(x.shape)} in "
                f"{x.dtype}: give other samples of the base, [P, *event]"
            )
        tried = _Temperatures(chosen, family, levels)
        first = (
            len(units)
            * whole_number("steps", steps, most=MOST_STEPS // len(units))
            * chosen.evaluations
        )
        units = _adapted(chosen, tried, units, pilot, ChainNoise(source, first))
        spent = tried.calls
    out, log_weights = _anneal(
        chosen,
        lambda *_: _Temperatures(chosen, family, levels),
        units,
        steps,
        x,
        source,
        chunk,
        progress,
        False,
        {},
    )
    assert log_weights is not None and out.acceptance is not None
    # where the density of p is 0 a chain has the weight 0, and is as good as any
    stuck = (out.status == Status.NONFINITE) & (row_status(out.x) == Status.OK)
    none = (log_weights == -math.inf).to(stuck.device)
    status = torch.where(stuck & none, int(Status.OK), out.status)
    good = log_weights[(status == Status.OK).to(log_weights.device)]
    n = len(good)
    log_z = float(good.logsumexp(0)) - math.log(n) if n else math.nan
    relative = (good - log_z).exp()
    estimate = ImportanceEstimate(
        log_z=log_z,
        standard_error=float(relative.std() / math.sqrt(n)) if n > 1 else math.nan,
        effective_size=float(relative.sum() ** 2 / relative.square().sum()),
        log_weights=log_weights,
        x=out.x,
        step_sizes=torch.tensor(units, dtype=torch.float64, device="cpu"),
        acceptance=out.acceptance,
        status=status,
        nfe=out.nfe,
        calls=out.calls + spent,
    )
    if raise_on_failure and not bool((status == Status.OK).all()):
        raise failure(estimate, status)
    return estimate


_Conditions = Callable[[Tensor], dict[str, Any]]
"""From the numbers of samples of the batch to their conditions."""


def _settled(
    score: Density, t: float | None, nodes: int, x: Tensor, cond: dict[str, Any]
) -> dict[str, Any]:
    """The conditions with a mark wherever the score alone can tell, as it is at time `t`."""

    def answer(i: int, one: dict[str, Any]) -> Tensor:
        state = x[i : i + 1].clone()
        found = as_target(score, t, nodes, **one).evaluate(state)[1]
        check_output(found, state)
        return found

    if not cond:
        return cond
    check_chains(x)
    return settled(cond, len(x), answer)


def _target_of_rows(
    score: Density, t: float | None, nodes: int, conditions: _Conditions, rows: Tensor
) -> Target:
    """The target of the samples `rows` of the batch, which may be asked for some of them."""
    held = conditions(rows)
    target = as_target(score, t, nodes, **held)
    if held:
        target.of_rows = lambda some: (
            as_target(score, t, nodes, **conditions(rows[some.cpu()])).evaluate
        )
    return target


def _steeper(base: Target | None, tilt: Target, beta: float) -> Target:
    """q exp(beta f) by its score alone."""

    def of(evaluate: Evaluate) -> Evaluate:
        def sloped(x: Tensor) -> tuple[None, Tensor]:
            slope = beta * evaluate(x)[1]
            return None, slope if base is None else slope + base.evaluate(x)[1]

        return sloped

    target = Target(of(tilt.evaluate), False, tilt.nodes)
    rows = tilt.of_rows
    if rows is not None:
        target.of_rows = lambda some: of(rows(some))
    return target


class _Levels(ABC):
    """The sequence of densities that one chunk of chains goes through."""

    @abstractmethod
    def enter(
        self, level: int, state: ChainState | None, x: Tensor, noise: ChainNoise
    ) -> tuple[Target, ChainState]:
        """The target of a level, and the state there; None stands for the start at `x`."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """Evaluations so far."""

    @property
    def evaluations(self) -> int:
        """Those of them that were made for all chains."""
        return self.calls

    log_weights: Tensor | None = None


class _NoiseLevels(_Levels):
    def __init__(self, kernel: Kernel, targets: list[Target]) -> None:
        self.kernel, self.targets = kernel, targets

    def enter(
        self, level: int, state: ChainState | None, x: Tensor, noise: ChainNoise
    ) -> tuple[Target, ChainState]:
        target = self.targets[level]
        return target, self.kernel.start(x if state is None else state.point.x, target, noise)

    @property
    def calls(self) -> int:
        return sum(target.calls for target in self.targets)

    @property
    def evaluations(self) -> int:
        return self.calls - sum(target.partial for target in self.targets)


class _Temperatures(_Levels):
    def __init__(self, kernel: Kernel, family: Tilted, betas: list[float]) -> None:
        self.kernel, self.family, self.betas = kernel, family, betas
        self._before = family.calls

    def enter(
        self, level: int, state: ChainState | None, x: Tensor, noise: ChainNoise
    ) -> tuple[Target, ChainState]:
        before = self.betas[level - 1] if level else 0.0
        beta, member = self.betas[level], self.family.at(self.betas[level])
        if state is None:
            state = self.kernel.start(x, self.family.at(0.0), noise)
        f = state.point.tilt
        assert f is not None
        gain = (beta - before) * doubled(f)
        self.log_weights = gain if self.log_weights is None else self.log_weights + gain
        return member, state._replace(point=member.moved(state.point, before))

    @property
    def calls(self) -> int:
        return self.family.calls - self._before


class _Part(NamedTuple):
    """What became of one chunk."""

    x: Tensor
    value: Tensor | None
    log_weights: Tensor | None
    acceptance: Tensor | None
    status: Tensor
    calls: int
    nfe: int


def _numbers(name: str, values: object) -> list[float]:
    """`values` as floats; raises `ArgumentError` where they are none."""
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError
        return host(values).flatten().tolist()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ArgumentError(f"{name} = {values!r}: give real numbers") from error


def _single(kernel: Kernel) -> Kernel:
    """`kernel` if its chains hold one state each; else raises."""
    if kernel.copies > 1:
        raise ArgumentError(f"{kernel.name!r} has temperatures of its own: give its kernel")
    return kernel


def _tilted_units(
    betas: Sequence[float] | Tensor, step_sizes: Sequence[float] | Tensor | None
) -> tuple[list[float], list[float]]:
    """The betas and the factors on the step size, checked."""
    levels = [real_number("beta", beta) for beta in _numbers("betas", betas)]
    if not levels:
        raise ArgumentError("betas are empty: give one or more")
    if step_sizes is None:
        return levels, [1.0] * len(levels)
    factors = torch.tensor(_numbers("step_sizes", step_sizes), dtype=torch.float64, device="cpu")
    if factors.shape != (len(levels),):
        raise ShapeError(
            f"step_sizes of shape {tuple(factors.shape)}: give {len(levels)}, one for each beta"
        )
    checked_step(factors)
    return levels, factors.tolist()


@without_gradients()
def _adapted(
    kernel: Kernel, levels: _Levels, units: list[float], x: Tensor, noise: ChainNoise
) -> list[float]:
    """The units, each times the factor at which chains from `x` meet the kernel's acceptance."""
    assert kernel.target_acceptance is not None
    h = column(kernel.step_sizes(len(x), slice(None), x), x)
    state: ChainState | None = None
    found, log_factor = list[float](), 0.0
    for level, unit in enumerate(units):
        target, state = levels.enter(level, state, x, noise)
        for move in range(_PILOT):
            state = kernel.step(state, target, noise, unit * math.exp(log_factor) * h)
            assert state.acceptance is not None
            excess = float(state.acceptance.mean()) - kernel.target_acceptance
            log_factor += excess / math.sqrt(move + 1)
        found.append(unit * math.exp(log_factor))
    return found


@without_gradients()
def _solve(
    kernel: Kernel,
    levels: _Levels,
    units: list[float],
    steps: int,
    x: Tensor,
    h: Tensor,
    source: NoiseSource,
    bar: tqdm[object],
) -> _Part:
    """One chunk through all levels, with steps `h` times the unit of the level."""
    noise, h, x = ChainNoise(source), column(h, x), x.clone(memory_format=torch.contiguous_format)
    acceptance = x.new_zeros(len(units), len(x))
    failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    alone = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    state: ChainState | None = None
    interrupted = False
    try:
        for level, unit in enumerate(units):
            target, state = levels.enter(level, state, x, noise)
            if not kernel.adjusted:
                failed |= chain_status(state.point, failed) != 0
                target.watch(failed)
            for _ in range(steps):
                state = kernel.step(state, target, noise, unit * h)
                if state.extra is not None:
                    alone += state.extra
                if state.acceptance is not None:
                    acceptance[level] += state.acceptance / steps
                bar.update()
    except KeyboardInterrupt:
        if state is None:
            raise
        interrupted = True
    assert state is not None
    point = state.point
    status = chain_status(point, failed)
    return _Part(
        x=point.x.clone(),
        value=point.tilt,
        log_weights=levels.log_weights,
        acceptance=acceptance if kernel.adjusted else None,
        status=torch.full_like(status, int(Status.INTERRUPTED)) if interrupted else status,
        calls=levels.calls,
        nfe=levels.evaluations + int(alone.amax() if len(alone) else 0),
    )


def _anneal(
    kernel: Kernel,
    make: Callable[[_Conditions, Tensor], _Levels],
    units: list[float],
    steps: int,
    x: Tensor,
    source: NoiseSource,
    chunk: int | None,
    progress: bool,
    raise_on_failure: bool,
    cond: dict[str, Any],
) -> tuple[Annealed, Tensor | None]:
    """All chunks, and their log-weights; `make` gives a chunk its levels."""
    check_chains(x)
    batch, steps = len(x), whole_number("steps", steps, most=MOST_STEPS // len(units))
    numbers = torch.arange(batch, device="cpu")

    def conditions(index: Tensor) -> dict[str, Any]:
        return split_cond(cond, index, batch)

    def solve(rows: slice, bar: tqdm[object]) -> _Part:
        levels, h = make(conditions, numbers[rows]), kernel.step_sizes(batch, rows, x[rows])
        return _solve(kernel, levels, units, steps, x[rows], h, source.rows(rows), bar)

    parts = in_chunks(solve, batch, chunk, len(units) * steps, progress)

    def join(name: str, dim: int = 0) -> Any:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else rejoined(pieces, batch, dim, int(Status.INTERRUPTED))

    result = Annealed(
        x=join("x"),
        value=join("value"),
        acceptance=join("acceptance", 1),
        status=join("status"),
        nfe=max(part.nfe for part in parts),
        calls=sum(part.calls for part in parts),
    )
    if raise_on_failure and not bool(result.ok.all()):
        raise failure(result, result.status)
    return result, join("log_weights")
