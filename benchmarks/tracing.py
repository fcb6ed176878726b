"""How long it takes to trace a plan of many steps and to push a Gaussian law through it."""

from __future__ import annotations

import statistics
import time

import torch

import scoresolve as ss

__all__ = ["measure"]


def measure(
    solvers: tuple[str, ...] = ("dpmpp_2m", "ddpm", "rk4", "ab4_v"),
    steps: int = 1000,
    dimension: int = 64,
    repeats: int = 3,
) -> list[dict[str, object]]:
    """Seconds to trace and to compute the law with full covariance, medians.

    Args:
        solvers: fixed-grid solvers by name.
        steps: steps of the plan.
        dimension: D of the Gaussian data.
        repeats: repeats of which the median is taken.

    Returns:
        One row per solver: `solver`, `steps`, `nfe`, `trace_s`, `law_s`.
    """
    sde = ss.VP()
    grid = ss.make_grid("cosine", sde, steps)
    root = torch.randn(
        dimension, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    covariance, mean = root @ root.T / dimension, torch.zeros(dimension)
    rows: list[dict[str, object]] = []
    for solver in solvers:
        traces, laws = [], []
        for _ in range(repeats):
            begin = time.perf_counter()
            plan = ss.plan(solver, sde, grid)
            middle = time.perf_counter()
            plan.law(mean, covariance).covariance.sum()
            traces.append(middle - begin)
            laws.append(time.perf_counter() - middle)
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "nfe": plan.nfe,
                "trace_s": round(statistics.median(traces), 3),
                "law_s": round(statistics.median(laws), 3),
            }
        )
    return rows
