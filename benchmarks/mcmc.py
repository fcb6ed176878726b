"""What Markov chain kernels cost beside their score calls, and what a score call buys.

Cost: a run of 1,000 chains against as many calls of the mixture's score alone, on the states where
the run ended, interleaved. Yield: bulk effective samples per score evaluation, by ArviZ, against
BlackJAX's kernel of the same name with the same step size, starts and number of draws.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.kernels import BAOAB, HMC, MALA, ULA, Kernel
from scoresolve.metrics import class_mixture

__all__ = ["TARGETS", "measure", "measure_yield"]


def _spread(seed: int, components: int = 8) -> Tensor:
    return torch.randn(components, 64, generator=torch.Generator().manual_seed(seed))


TARGETS: dict[str, Callable[[], ss.GaussianMixture]] = {
    "digits, full": class_mixture,
    "8 diagonal": lambda: ss.GaussianMixture(torch.ones(8), _spread(0), 0.5 + _spread(1).abs()),
    "8 isotropic": lambda: ss.GaussianMixture(torch.ones(8), _spread(0), 1.0),
}
"""Mixtures in 64 dimensions, from the dearest score to the cheapest."""

KERNELS: Mapping[str, Kernel] = {
    "ula": ULA(1e-3),
    "mala": MALA(1e-3),
    "baoab": BAOAB(0.03),
    "hmc, 10 leapfrogs": HMC(0.03, 10),
}


def measure(
    chains: int = 1000, steps: int = 30, repeats: int = 3, threads: int = 1
) -> list[dict[str, object]]:
    """Time of a step of all chains, of the score calls in it, and their ratio.

    Args:
        chains: in the batch, float32.
        steps: score evaluations of a repeat, about.
        repeats: interleaved, of which the median is taken.
        threads: torch threads.

    Returns:
        One row per target and kernel: `target`, `kernel`, `evaluations`, the milliseconds `run_ms`
        and `score_ms` that one of all chains takes, and their `ratio`.
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    for target, make in TARGETS.items():
        mixture = make().to(torch.float32)
        x = mixture.sample(chains)
        for name, kernel in KERNELS.items():
            count = max(1, steps // kernel.evaluations)
            taken: dict[str, list[float]] = {"run": [], "score": []}
            for _ in range(repeats + 1):  # the first warms up
                begin = time.perf_counter()
                out = ss.run_chains(mixture, x=x, kernel=kernel, steps=count)
                middle = time.perf_counter()
                for _ in range(out.calls):
                    mixture.score(out.x)
                taken["run"].append((middle - begin) / out.calls * 1e3)
                taken["score"].append((time.perf_counter() - middle) / out.calls * 1e3)
            run, score = (statistics.median(taken[way][1:]) for way in ("run", "score"))
            rows.append(
                {
                    "target": target,
                    "kernel": name,
                    "evaluations": out.calls,
                    "run_ms": round(run, 3),
                    "score_ms": round(score, 3),
                    "ratio": round(run / score, 3),
                }
            )
    return rows


def measure_yield(
    chains: int = 64, draws: int = 400, warmup: int = 400, seeds: int = 3
) -> list[dict[str, object]]:
    """Bulk ESS per 1,000 score evaluations, the median coordinate, here and in BlackJAX.

    Args:
        chains, draws: of every run, from exact samples of the digits mixture.
        warmup: steps in which the step size is adapted here; BlackJAX then gets their mean.
        seeds: runs of which the mean is taken.

    Returns:
        One row per kernel: `kernel`, `step_size`, `ours`, `ours_worst` (the least coordinate),
        `blackjax`, `blackjax_worst`, `ratio` of the medians; BlackJAX's are "not installed" without
        it (extra `bench`).
    """
    mixture = class_mixture()
    x = mixture.sample(chains).flatten(1)
    flat = ss.GaussianMixture(mixture.weights, mixture.means.flatten(1), mixture.covariances)
    rows: list[dict[str, object]] = []
    for name, kernel in {"mala": MALA(1e-3), "hmc": HMC(0.02, 10)}.items():
        tuned = ss.run_chains(flat, x=x, kernel=kernel, steps=1, warmup=warmup, keep=False)
        step = float(tuned.step_size.mean())
        fixed: Kernel = MALA(step) if name == "mala" else HMC(step, 10)
        ours, theirs = [], []
        for seed in range(seeds):
            out = ss.run_chains(flat, x=x, kernel=fixed, steps=draws, seed=seed)
            assert out.samples is not None
            ours.append(_yield(out.samples.numpy(), fixed.evaluations))
            if importlib.util.find_spec("blackjax") is not None:
                samples = _blackjax(flat, name, step, x, draws, seed)
                theirs.append(_yield(samples, fixed.evaluations))
        middle, worst = np.mean(ours, 0)
        row: dict[str, object] = {
            "kernel": name,
            "step_size": f"{step:.3g}",
            "ours": round(middle, 2),
            "ours_worst": round(worst, 2),
        }
        if theirs:
            other, other_worst = np.mean(theirs, 0)
            row |= {
                "blackjax": round(other, 2),
                "blackjax_worst": round(other_worst, 2),
                "ratio": round(middle / other, 3),
            }
        else:
            row |= {"blackjax": "not installed", "blackjax_worst": "", "ratio": ""}
        rows.append(row)
    return rows


def _yield(samples: np.ndarray[Any, Any], evaluations: int) -> tuple[float, float]:
    """Median and least bulk ESS of a coordinate per 1,000 evaluations; samples [S, B, D]."""
    found = ss.diagnose(torch.as_tensor(np.array(samples))).ess_bulk
    spent = samples.shape[0] * samples.shape[1] * evaluations / 1000
    return float(found.median()) / spent, float(found.min()) / spent


def _blackjax(
    mixture: ss.GaussianMixture, name: str, step: float, x: Tensor, draws: int, seed: int
) -> np.ndarray[Any, Any]:
    """Samples [S, B, D] of BlackJAX's kernel on the same mixture from the same starts."""
    import blackjax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    weights, means = jnp.asarray(mixture.weights), jnp.asarray(mixture.means)
    precisions = jnp.asarray(torch.linalg.inv(mixture.covariances))
    log_dets = jnp.asarray(torch.linalg.slogdet(mixture.covariances).logabsdet)

    def log_density(place: Any) -> Any:
        distance = place - means
        quadratic = jnp.einsum("ki,kij,kj->k", distance, precisions, distance)
        return jax.scipy.special.logsumexp(jnp.log(weights) - (quadratic + log_dets) / 2)

    if name == "mala":
        algorithm = blackjax.mala(log_density, step)
    else:
        mass = jnp.ones(x.shape[1])
        algorithm = blackjax.hmc(log_density, step, mass, 10)

    def advance(states: Any, key: Any) -> Any:
        states, _ = jax.vmap(algorithm.step)(jax.random.split(key, len(x)), states)
        return states, states.position

    start = jax.vmap(algorithm.init)(jnp.asarray(x))
    keys = jax.random.split(jax.random.key(seed), draws)
    _, positions = jax.jit(lambda s: jax.lax.scan(advance, s, keys))(start)
    return np.asarray(positions)
