"""A stochastic sampler as a Markov chain with known transition densities.

Where every step of a plan is x_s = mean(x_t) + std z with one draw z ~ N(0, I), added last, the
path x_T, ..., x_0 has the density p(x_T) prod_k N(x_s; mean_k(x_t), std_k^2 I). Policy gradients
need its factors while sampling, and again for stored paths under changed parameters:

    log p(x_s | x_t) = -|x_s - mean|^2 / (2 std^2) - D log std - (D / 2) log 2 pi.

Steps are cut out of the plan at its marks, so what is evaluated is what `Plan.run` samples.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.models import Model
from scoresolve.noise import NoiseSource
from scoresolve.plans import Call, Combine, Custom, Draw, Drift, Mark, Plan, Stage, check_state

__all__ = ["GaussianChain", "GaussianStep", "Rollout"]


@dataclass(frozen=True)
class GaussianStep:
    """One transition x_s ~ N(mean(x_t), std^2 I).

    Attributes:
        t, s: ends of the step.
        std: standard deviation of every element, > 0.
        draw: number of the draw in the plan's noise.
        plan: the step without its noise, which gives the mean.
    """

    t: float
    s: float
    std: float
    draw: int
    plan: Plan

    def mean(self, model: Model | Callable[..., Tensor], x: Tensor, **cond: Any) -> Tensor:
        """E[x_s | x_t = x] for x [B, *event], differentiable in `x` and the network."""
        return self.plan.run(model, x, **cond)

    def log_prob(
        self, model: Model | Callable[..., Tensor], x: Tensor, x_next: Tensor, **cond: Any
    ) -> Tensor:
        """log p(x_s = x_next | x_t = x), [B] in float64.

        Args:
            model: as in `Plan.run`.
            x, x_next: states [B, *event].
            **cond: passed on to the model.
        """
        return self.density(x_next, self.mean(model, x, **cond))

    def density(self, x: Tensor, mean: Tensor) -> Tensor:
        """log N(x; mean, std^2 I), [B] in float64: its ratios are taken, and it grows with D."""
        if x.shape != mean.shape:
            raise ShapeError(
                f"the next state has shape {tuple(x.shape)}, the state {tuple(mean.shape)}: give "
                "two states of one shape"
            )
        z = ((x.double() - mean.double()) / self.std).reshape(x.shape[0], -1)
        constant = math.log(self.std) + math.log(2 * math.pi) / 2
        return -z.square().sum(1) / 2 - z.shape[1] * constant


@dataclass(frozen=True)
class Rollout:
    """Sampled paths with their densities; S is the number of steps.

    Attributes:
        states: x at every time of the grid, [S + 1, B, *event].
        means: of every transition, [S, B, *event].
        stds: of every transition, [S] numbers.
        log_prob: of every transition, [S, B] in float64; the density of the start is not in it.
        x: result of the plan, [B, *event]: the last state, or the x0 of the final jump to
            sigma = 0, which is a function of it and adds no density.
    """

    states: Tensor
    means: Tensor
    stds: tuple[float, ...]
    log_prob: Tensor
    x: Tensor


class GaussianChain:
    """A plan whose every step is one Gaussian transition.

    Args:
        plan: of a solver that adds one draw at the end of each step, and looks at no earlier step:
            "ddpm", "ddim" with eta > 0, "euler_maruyama", "reverse_diffusion", ...

    Attributes:
        plan: the plan.
        steps: its transitions, a `GaussianStep` each.

    Raises:
        ArgumentError: a step adds no noise or draws several times, uses its noise before its
            end, depends on earlier steps, or is not linear; the message names it.

    Source:
        Black et al. 2023 (2305.13301), section 4.3 (DDPO): the chain as a decision process.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        uses = Counter(register for stage in plan.stages for register in _reads(stage))
        steps: list[GaussianStep] = []
        part: list[Stage] = []
        state = 0
        for stage in plan.stages:
            if isinstance(stage, Mark):
                steps.append(_transition(plan, len(steps), part, state, stage.x, uses))
                part, state = [], stage.x
            else:
                part.append(stage)
        self.steps: tuple[GaussianStep, ...] = tuple(steps)
        self._tail = _cut(plan, len(steps), part, state, plan.output)

    @torch.no_grad()
    def rollout(
        self,
        model: Model | Callable[..., Tensor],
        x: Tensor,
        noise: NoiseSource,
        **cond: Any,
    ) -> Rollout:
        """Sample paths, as `Plan.run` does with the same noise, and keep every transition.

        No graph is kept: for gradients call `log_prob` on `Rollout.states`.

        Args:
            model: a `Model` of the plan's process, or a callable `score(x, t, **cond)`.
            x: states at the first time, [B, *event].
            noise: source of randomness, as `Philox(seed)`.
            **cond: passed on to the model.

        Returns:
            A `Rollout`.
        """
        check_state(x)
        states, means, log_probs = [x], [], []
        for step in self.steps:
            mean = step.mean(model, states[-1], **cond)
            z = noise.normal(mean, step.draw, times=(step.t, step.s))
            states.append(mean + step.std * z)
            means.append(mean)
            log_probs.append(step.density(states[-1], mean))
        result = self._tail.run(model, states[-1], **cond)
        stds = tuple(step.std for step in self.steps)
        return Rollout(
            torch.stack(states), torch.stack(means), stds, torch.stack(log_probs), result
        )

    def log_prob(self, model: Model | Callable[..., Tensor], states: Tensor, **cond: Any) -> Tensor:
        """log p(x_s | x_t) of every step of stored paths, differentiable in the network.

        Summed over the first axis and added to the log-density of the start, it is the joint
        density of the path. One network call a step; `steps[k].log_prob` does a single one.

        Args:
            model: as in `rollout`, usually with other parameters.
            states: [S + 1, B, *event], as `Rollout.states`.
            **cond: passed on to the model.

        Returns:
            [S, B] in float64.

        Raises:
            ShapeError: `states` does not hold one state for each time of the grid.
        """
        if states.ndim < 2 or len(states) != len(self.steps) + 1:
            raise ShapeError(
                f"states of shape {tuple(states.shape)} for a chain of {len(self.steps)} steps: "
                f"give ({len(self.steps) + 1}, B, *event)"
            )
        pairs = zip(self.steps, itertools.pairwise(states), strict=True)
        return torch.stack([step.log_prob(model, *pair, **cond) for step, pair in pairs])


def _transition(
    plan: Plan, k: int, stages: Sequence[Stage], start: int, end: int, uses: Counter[int]
) -> GaussianStep:
    """Step `k` of the plan, from register `start` to register `end`, as a transition."""
    name = f"step {k} of {plan.solver!r}"
    if any(isinstance(stage, Custom) for stage in stages):
        raise ArgumentError(f"{name} holds a kernel that is not linear: its law is not Gaussian")
    t, s = plan.times[k : k + 2]
    draws = [stage for stage in stages if isinstance(stage, Draw)]
    if not any(uses[draw.out] for draw in draws):
        raise ArgumentError(
            f"{name} adds no noise from t = {t:g} to {s:g}, and a transition density needs some: "
            "take a solver such as 'ddpm', or move that end of the grid inside if noise ends there"
        )
    if len(draws) > 1:
        raise ArgumentError(
            f"{name} draws noise {len(draws)} times, and a transition density needs one draw a "
            "step: take a solver such as 'ddpm' or 'euler_maruyama'"
        )
    (draw,) = draws
    final = next((s for s in stages if isinstance(s, Combine) and s.out == end), None)
    std = dict(final.terms).get(draw.out, 0.0) if final is not None else 0.0
    if final is None or std == 0.0 or uses[draw.out] > 1:
        raise ArgumentError(
            f"{name} uses its noise before its end, so that x_s given x_t is no Gaussian around a "
            "known mean: take a solver that adds its noise last, such as 'ddpm'"
        )
    quiet = replace(final, terms=tuple(term for term in final.terms if term[0] != draw.out))
    kept = [quiet if stage is final else stage for stage in stages if stage is not draw]
    return GaussianStep(t, s, abs(std), draw.index, _cut(plan, k, kept, start, end))


def _cut(plan: Plan, k: int, stages: Sequence[Stage], start: int, end: int) -> Plan:
    """The plan of `stages` alone, from register `start` (0 in the result) to `end`."""
    names = {start: 0}
    result: list[Stage] = []
    for stage in stages:
        if not all(register in names for register in _reads(stage)):
            raise ArgumentError(
                f"step {k} of {plan.solver!r} looks at earlier steps, so x_s depends on more than "
                "x_t: take a solver of one step, such as 'ddpm'"
            )
        if isinstance(stage, Combine):
            terms = tuple((names[register], c) for register, c in stage.terms)
            stage = replace(stage, terms=terms)
        elif isinstance(stage, Call | Drift | Custom):
            stage = replace(stage, x=names[stage.x])
        if not isinstance(stage, Mark):
            names[stage.out] = len(names)
            stage = replace(stage, out=names[stage.out])
        result.append(stage)
    times = plan.times[k : k + 2]
    points = {s.t: s.point for s in plan.stages if isinstance(s, Call)}
    points |= {plan.times[0]: plan.start, plan.times[-1]: plan.end}
    return replace(
        plan,
        times=times,
        denoised=plan.denoised and k == plan.steps,
        start=points.get(times[0]),
        end=points.get(times[-1]),
        stages=tuple(result),
        output=names[end],
    )


def _reads(stage: Stage) -> list[int]:
    if isinstance(stage, Combine):
        return [register for register, _ in stage.terms]
    return [] if isinstance(stage, Draw | Mark) else [stage.x]
