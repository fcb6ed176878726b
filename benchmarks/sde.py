"""Stochastic solvers against calls: the law of their samples, ours and the peers', on one noise.

    gap             mean log p(y) - E_p log p, p the exact law at t_min, in nats; 0 is perfect
    variance_error  largest |variance / exact - 1| on Gaussian data of variances 1/4, 1, 9/4
    distance        sliced Wasserstein-2 of the samples to exact ones; `floor` is that of two exact
                    sets of this size, below which nothing can be told apart

A sampler is linear in its start and its normals when the score is affine, so the second is exact
for any library: run on basis vectors, it returns its own coefficients. The n-th fresh normal of a
run is the same for all, and the normal of a whole step after that of its first part continues the
same Brownian path.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.absent import absent
from benchmarks.conditioning import sliced_wasserstein
from benchmarks.nfe import Counted
from scoresolve.metrics import class_mixture
from scoresolve.models import Model
from scoresolve.noise import CallableNoise
from scoresolve.peers import PEERS, Noise
from scoresolve.sde import VP, GaussianSDE
from scoresolve.targets import GaussianMixture, ring

__all__ = [
    "CASES",
    "OURS",
    "continued",
    "in_order",
    "measure",
    "samplers",
    "steps_within",
    "variance_error",
]

VARIANCES = (0.25, 1.0, 2.25)
OURS = (
    "ddpm",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "sa_solver",
    "er_sde",
    "seeds_3",
    "stochastic_heun",
)
SELDOM = ("euler_maruyama", "weak_rk3", "edm_churn")
"""Ours that the small setting leaves out."""
DECISIVE = (
    "k-diffusion euler_ancestral",
    "k-diffusion dpmpp_sde",
    "k-diffusion dpmpp_2m_sde",
    "k-diffusion dpmpp_3m_sde",
    "diffusers sa_solver",
    "azula ito",
)
"""The peers of the small setting: those in common use."""

CASES: dict[str, Callable[[], GaussianMixture]] = {
    "ring 2-D, VP": ring,
    "digits 64-D, VP": class_mixture,
}

Sampler = Callable[[Model, GaussianSDE, Sequence[float], Tensor, Noise], Tensor]


def _ours(name: str) -> Sampler:
    def run(
        model: Model, sde: GaussianSDE, times: Sequence[float], x: Tensor, noise: Noise
    ) -> Tensor:
        return ss.plan(name, sde, times).run(model, x, CallableNoise(noise))

    return run


def samplers(full: bool = False) -> dict[str, Sampler]:
    """Ours, and the stochastic peers that are installed; says which libraries are not."""
    chosen = {
        name: peer
        for name, peer in PEERS.items()
        if peer.stochastic and not peer.repeats and (full or name in DECISIVE)
    }
    chosen = {name: peer for name, peer in chosen.items() if peer.process in (None, VP)}
    missing = absent(peer.library for peer in chosen.values())
    ours = {f"scoresolve {name}": _ours(name) for name in (*OURS, *SELDOM * full)}
    theirs = {name: peer.run for name, peer in chosen.items() if peer.library not in missing}
    return ours | theirs


def continued(fresh: Iterator[Tensor], sde: GaussianSDE) -> Noise:
    """Normals in the order they are asked for, but those of one Brownian path where steps overlap.

    After a draw for (t, m) one for (t, s), m between, is sqrt(a) z_1 + sqrt(b) z_2 over its length,
    z_2 fresh, with a and b the parts of the step in the clock of the reverse SDE, SNR.
    """
    last: list[tuple[float, float, Tensor]] = []

    def snr(t: float) -> float:
        return float(sde.log_snr(torch.tensor(t, dtype=torch.float64)).exp())

    def noise(x: Tensor, t: float, s: float) -> Tensor:
        z = next(fresh).to(x)
        if last and last[0][0] == t and last[0][1] > s:
            _, middle, first = last.pop()
            a, b = snr(middle) - snr(t), snr(s) - snr(middle)
            return (math.sqrt(a) * first + math.sqrt(b) * z) / math.sqrt(a + b)
        last[:] = [(t, s, z)] if math.isfinite(t) and t != s else []
        return z

    return noise


def in_order(like: Tensor, sde: GaussianSDE, seed: int) -> Noise:
    """The counter-based normals of a seed, draw after draw, for the samples of `like`."""
    source = ss.Philox(seed)
    return continued((source.normal(like, number) for number in itertools.count()), sde)


@functools.cache
def variance_error(sampler: Sampler, sde: GaussianSDE, times: tuple[float, ...]) -> float:
    """Largest relative error of a variance on Gaussian data, exact, with the prior at the start.

    Args:
        sampler: linear in its start and its normals when the score is affine.
        sde: the process.
        times: the grid.
    """
    data = torch.tensor(VARIANCES, dtype=torch.float64)
    model = ss.targets.gaussian(torch.zeros(len(data)), data).score_model(sde)

    def responses(count: int) -> tuple[Tensor, int]:
        """Output to the start alone and to each of `count` normals alone, and the normals used."""
        used = 0

        def basis() -> Iterator[Tensor]:
            nonlocal used
            while True:
                z = torch.zeros(1 + count, len(data), dtype=torch.float64)
                used += 1
                if used <= count:
                    z[used] = 1.0
                yield z

        x = torch.zeros(1 + count, len(data), dtype=torch.float64)
        x[0] = sde.prior_std
        return sampler(model, sde, times, x, continued(basis(), sde)), used

    _, count = responses(0)
    found = responses(count)[0].square().sum(0)
    exact = sde.alpha(times[-1]) ** 2 * data + sde.sigma(times[-1]) ** 2
    return float((found / exact - 1).abs().max())


@functools.cache
def steps_within(sampler: Sampler, sde: GaussianSDE, grid: str, budget: int) -> int | None:
    """Steps that a budget of calls allows, found by running the sampler on one sample."""
    model, x = ss.targets.gaussian([0.0], 1.0).score_model(sde), torch.ones(1, 1).double()
    steps = budget
    while steps:
        counted = Counted(model)
        times = ss.make_grid(grid, sde, steps).times
        try:
            sampler(counted, sde, times, x, in_order(x, sde, 0))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
            return None  # too few steps for this method
        if counted.calls <= budget:
            return steps
        steps = min(steps - 1, steps * budget // counted.calls)
    return None


def measure(full: bool = False) -> list[dict[str, object]]:
    """Three distances of each sampler's law from the exact one, at several budgets.

    Args:
        full: all stochastic peers, three grids, 16,384 samples and seven budgets, instead of the
            peers in common use on the grid of Karras, 512 samples and three.

    Returns:
        Rows with `case`, `sampler`, `grid`, `budget`, `calls`, `gap` and its standard error
        `gap_error`, `variance_error`, `distance`, `floor`.
    """
    torch.set_num_threads(1)
    grids = ("karras", "log_snr", "flow") if full else ("karras",)
    budgets = (5, 10, 20, 30, 50, 100, 200) if full else (10, 20, 50)
    count, sde = 16384 if full else 512, VP()
    levels = 100_000 if full else 20_000
    every = samplers(full)
    rows: list[dict[str, object]] = []
    for case, make in CASES.items():
        mixture = make()
        law, model = mixture.marginal(sde, sde.t_min), mixture.score_model(sde)
        level = law.log_prob(law.sample(levels, seed=10))
        exact = law.sample(count, seed=11).flatten(1)
        floor = sliced_wasserstein(law.sample(count, seed=12).flatten(1), exact)
        like = torch.empty(count, *mixture.event_shape, dtype=torch.float64)
        x = sde.prior_std * ss.Philox(0).normal(like, 0, ss.noise.Purpose.START)
        for name, sampler in every.items():
            for grid in grids:
                for budget in budgets:
                    steps = steps_within(sampler, sde, grid, budget)
                    if steps is None:
                        continue
                    times, counted = ss.make_grid(grid, sde, steps).times, Counted(model)
                    with torch.no_grad():
                        y = sampler(counted, sde, times, x, in_order(x, sde, 1))
                    gain = law.log_prob(y)
                    error = math.hypot(
                        float(gain.std()) / math.sqrt(count), float(level.std()) / math.sqrt(levels)
                    )
                    rows.append(
                        {
                            "case": case,
                            "sampler": name,
                            "grid": grid,
                            "budget": budget,
                            "calls": counted.calls,
                            "gap": _short(float(gain.mean() - level.mean())),
                            "gap_error": _short(error),
                            "variance_error": _short(variance_error(sampler, sde, times)),
                            "distance": _short(sliced_wasserstein(y.flatten(1), exact)),
                            "floor": _short(floor),
                        }
                    )
    return rows


def _short(value: float) -> float:
    return float(f"{value:.3g}")
