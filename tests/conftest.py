"""What every test shares: reproducible hypothesis runs and one thread per worker.

`derandomize=True` draws the same examples in each run, so a failure is always seen again.
"""

from __future__ import annotations

import functools
import gc
import os


@functools.cache
def prepare() -> None:
    """Once in each process that runs tests: the one that hands them out needs neither library."""
    import torch
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "scoresolve",
        derandomize=True,
        deadline=None,
        max_examples=16,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("scoresolve")
    # The workers of pytest-xdist share the cores; .ci/run asks for more in one of its lanes.
    torch.set_num_threads(int(os.environ.get("SCORESOLVE_TEST_THREADS", "1")))


def pytest_collectstart() -> None:
    prepare()
    gc.set_threshold(50_000, 20, 50)  # thousands of tests live all along, and need no second look


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
