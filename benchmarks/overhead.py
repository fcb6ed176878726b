"""Overhead of the plan executor against the in-place loop one would write by hand.

Both run the same coefficients on the same tensors with a model that returns one of three fixed
tensors in turn, so that what is timed is everything but the network. Repeats are interleaved and
medians compared.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.models import NetworkModel
from scoresolve.plans import Plan, model_time
from scoresolve.plans.stages import Call, Combine
from scoresolve.solvers import AdamsBashforth, ScaledAdams, Solver, UniPC, get_solver

__all__ = ["SHAPES", "SOLVERS", "measure"]

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (4096, 2))
SOLVERS: dict[str, Solver] = {
    "euler": get_solver("euler"),
    "dpmpp_2m": get_solver("dpmpp_2m"),
    "ab3_v": AdamsBashforth(3, "v", start="graded"),
    "uni_pc": UniPC(start="graded"),
    "auto": ScaledAdams(),
}
"""One call a step each, so that a loop by hand is what anyone would write."""


def _model(outputs: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    turn = itertools.cycle(outputs)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return next(turn)

    return model


def _hand_written(plan: Plan, outputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The loop of a method with one call a step: in place, the past outputs in a list."""
    calls = [stage for stage in plan.stages if isinstance(stage, Call)]
    made = [call.out for call in calls]
    states = [call.x for call in calls]
    steps: list[tuple[float, list[tuple[int, float]], list[tuple[int, float]]]] = []
    for number, stage in enumerate(s for s in plan.stages if isinstance(s, Combine)):
        terms = dict(stage.terms)
        own = terms.pop(states[number])
        past_m = [(made.index(r) - number, c) for r, c in terms.items() if r in made]
        past_x = [(states.index(r) - number, c) for r, c in terms.items() if r in states]
        steps.append((own, past_m[::-1], past_x))
    times = [call.t for call in calls]
    keeps_states = any(past_x for _, _, past_x in steps)
    depth = max(-age for _, past_m, _ in steps for age, _ in past_m) + 1

    def run(x: Tensor) -> Tensor:
        x, model = x.clone(), _model(outputs)
        known: list[Tensor] = []
        visited: list[Tensor] = []
        for (own, past_m, past_x), t in zip(steps, model_time(times, x).unbind(), strict=True):
            known = [*known[-depth + 1 :], model(x, t)] if depth > 1 else [model(x, t)]
            if keeps_states:
                visited = [*visited[-depth:], x]
                x = x * own
            else:
                x.mul_(own)
            for age, c in past_m:
                x.add_(known[age - 1], alpha=c)
            for age, c in past_x:
                x.add_(visited[age - 1], alpha=c)
        return x

    return run


def measure(
    steps: int = 50, repeats: int = 200, threads: int = 1, device: str = "cpu"
) -> list[dict[str, object]]:
    """Microseconds per step of executor and hand-written loop, and their ratio.

    Args:
        steps: steps of the plan.
        repeats: interleaved repeats of which the median is taken.
        threads: torch threads.
        device: where the tensors are; on a GPU a run counts until the device is done.

    Returns:
        One row per solver and shape: `solver`, `shape`, `plan_us`, `hand_us`, `ratio`, `error`
        (relative difference of the two results).
    """
    torch.set_num_threads(threads)
    sde = ss.VP()
    rows: list[dict[str, object]] = []
    for name, solver in SOLVERS.items():
        plan = ss.plan(solver, sde, ss.make_grid("cosine", sde, steps))
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(0)
            x, *outputs = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
            runs = {
                "plan": lambda plan=plan, x=x, outputs=outputs, p=solver.predicts: plan.run(
                    NetworkModel(_model(outputs), sde, p), x
                )
            }
            hand = _hand_written(plan, outputs)
            runs["hand"] = lambda hand=hand, x=x: hand(x)
            by_plan, hand_made = runs["plan"](), runs["hand"]()
            error = float((by_plan - hand_made).norm() / hand_made.norm())
            taken: dict[str, list[float]] = {way: [] for way in runs}
            for _ in range(repeats):
                for way, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    taken[way].append((time.perf_counter() - begin) / steps * 1e6)
            plan_us, hand_us = (statistics.median(taken[way]) for way in ("plan", "hand"))
            rows.append(
                {
                    "solver": name,
                    "shape": list(shape),
                    "plan_us": round(plan_us, 2),
                    "hand_us": round(hand_us, 2),
                    "ratio": round(plan_us / hand_us, 3),
                    "error": error,
                }
            )
    return rows
