"""Time and memory of a run against batch, dimension and steps.

One of the three grows while the others stay; the network is one multiplication, so that what is
measured is the run. `time_ratio` is the time over that of the same run at the first size; the slope
between neighbours is d log / d log size, so 1 is linear and 0 is free. Memory is the most that
torch holds during a run beyond its input, counted tensor by tensor. Times are medians of
interleaved repeats.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.absent import absent
from benchmarks.counting import Counting
from scoresolve.peers import installed, k_sampling

__all__ = ["AXES", "measure"]

AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000),
    "dimension": (2, 10, 100, 1_000, 10_000, 100_000),
    "steps": (1, 10, 100, 1_000, 10_000),
}
SMALL: dict[str, tuple[int, ...]] = {
    "batch": (1, 100, 10_000, 100_000),
    "dimension": (2, 100, 10_000),
    "steps": (1, 10, 100, 1_000),
}
FIXED = {"batch": 16, "dimension": 2, "steps": 10}
RUNS = ("scoresolve dpmpp_2m", "scoresolve auto", "scoresolve ddpm", "k-diffusion dpmpp_2m")


def _network(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def _run(name: str, batch: int, dimension: int, steps: int) -> Callable[[], Tensor] | None:
    """What is timed: a run on a plan that is traced already, or a peer's function."""
    x = torch.randn(batch, dimension, generator=torch.Generator().manual_seed(0))
    sde = ss.VP()
    library, method = name.split()
    if library == "scoresolve":
        plan = ss.plan(method, sde, ss.make_grid("cosine", sde, steps))
        model = ss.from_eps(_network, sde)
        return lambda: plan.run(model, x, ss.Philox(0))
    if not installed(library):
        return None
    times = torch.tensor(ss.make_grid("cosine", sde, steps).times, dtype=torch.float64)
    levels = (-sde.log_snr(times) / 2).exp().float()
    sample = getattr(k_sampling(), f"sample_{method}")
    return lambda: sample(lambda y, k: 0.1 * y, x, levels, disable=True)  # type: ignore[no-any-return]


def measure(full: bool = False) -> list[dict[str, object]]:
    """Time, memory and their slopes, for ours and k-diffusion's loop of the same method.

    Args:
        full: every size and nine repeats, instead of some and two.

    Returns:
        Rows with `axis`, `size`, `run`, `ms`, `time_ratio` to the first size, `time_slope`,
        `memory_mb`, `states` (memory over that of the state) and `memory_slope`; slopes are against
        the size before.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    absent(["k-diffusion"])
    for axis, sizes in (AXES if full else SMALL).items():
        first: dict[str, float] = {}
        before: dict[str, tuple[int, float, float]] = {}
        for size in sizes:
            options = {**FIXED, axis: size}
            runs = {name: run for name in RUNS if (run := _run(name, **options)) is not None}
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(10 if full else 3):  # the first warms up
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    taken[name].append((time.perf_counter() - begin) * 1e3)
            state = 4 * options["batch"] * options["dimension"]
            for name, run in runs.items():
                ms = statistics.median(taken[name][1:])
                with torch.no_grad(), Counting() as counting:
                    run()
                memory = float(counting.peak)
                first.setdefault(name, ms)
                slopes: list[object] = ["", ""]
                if name in before:
                    past, *values = before[name]
                    slopes = [
                        round(math.log(value / last) / math.log(size / past), 2)
                        for value, last in zip((ms, memory), values, strict=True)
                    ]
                before[name] = (size, ms, memory)
                rows.append(
                    {
                        "axis": axis,
                        "size": size,
                        "run": name,
                        "ms": float(f"{ms:.3g}"),
                        "time_ratio": float(f"{ms / first[name]:.3g}"),
                        "time_slope": slopes[0],
                        "memory_mb": float(f"{memory / 2**20:.3g}"),
                        "states": round(memory / state, 1),
                        "memory_slope": slopes[1],
                    }
                )
    return rows
