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

__all__ = ["SHAPES", "SOLVERS", "measure"]

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (4096, 2))
SOLVERS = ("euler", "dpmpp_2m")


def _model(outputs: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    turn = itertools.cycle(outputs)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return next(turn)

    return model


def _hand_written_euler(plan: Plan, outputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    combines = [stage for stage in plan.stages if isinstance(stage, Combine)]
    coefficients = [(stage.terms[0][1], stage.terms[1][1]) for stage in combines]
    times = [stage.t for stage in plan.stages if isinstance(stage, Call)]

    def run(x: Tensor) -> Tensor:
        x, model = x.clone(), _model(outputs)
        for (a, b), t in zip(coefficients, model_time(times, x).unbind(), strict=True):
            m = model(x, t)
            x.mul_(a).add_(m, alpha=b)
        return x

    return run


def _hand_written_2m(plan: Plan, outputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    coefficients = []
    for stage in plan.stages:
        if isinstance(stage, Combine):
            a, b, *c = (c for _, c in stage.terms)
            coefficients.append((a, b, c[0] if c else 0.0))
    times = [stage.t for stage in plan.stages if isinstance(stage, Call)]

    def run(x: Tensor) -> Tensor:
        x, model, previous = x.clone(), _model(outputs), None
        for (a, b, c), t in zip(coefficients, model_time(times, x).unbind(), strict=True):
            m = model(x, t)
            x.mul_(a).add_(m, alpha=b)
            if previous is not None:
                x.add_(previous, alpha=c)
            previous = m
        return x

    return run


def measure(steps: int = 50, repeats: int = 200, threads: int = 1) -> list[dict[str, object]]:
    """Microseconds per step of executor and hand-written loop, and their ratio.

    Args:
        steps: steps of the plan.
        repeats: interleaved repeats of which the median is taken.
        threads: torch threads.

    Returns:
        One row per solver and shape: `solver`, `shape`, `plan_us`, `hand_us`, `ratio`, `error`
        (relative difference of the two results).
    """
    torch.set_num_threads(threads)
    sde = ss.VP()
    rows: list[dict[str, object]] = []
    for solver in SOLVERS:
        plan = ss.plan(solver, sde, ss.make_grid("cosine", sde, steps))
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(0)
            x, *outputs = (torch.randn(shape, generator=generator) for _ in range(4))
            prediction = "eps" if solver == "euler" else "x0"
            by_hand = _hand_written_euler if solver == "euler" else _hand_written_2m
            runs = {
                "plan": lambda plan=plan, x=x, outputs=outputs, p=prediction: plan.run(
                    NetworkModel(_model(outputs), sde, p), x
                )
            }
            hand = by_hand(plan, outputs)
            runs["hand"] = lambda hand=hand, x=x: hand(x)
            by_plan, hand_made = runs["plan"](), runs["hand"]()
            error = float((by_plan - hand_made).norm() / hand_made.norm())
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    taken[name].append((time.perf_counter() - begin) / steps * 1e6)
            plan_us, hand_us = (statistics.median(taken[name]) for name in ("plan", "hand"))
            rows.append(
                {
                    "solver": solver,
                    "shape": list(shape),
                    "plan_us": round(plan_us, 2),
                    "hand_us": round(hand_us, 2),
                    "ratio": round(plan_us / hand_us, 3),
                    "error": error,
                }
            )
    return rows
