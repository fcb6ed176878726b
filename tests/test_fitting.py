"""Grids fitted to a model: better on starts they have not seen, never worse where it is checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, SolveError
from scoresolve.fitting import _bent, _Runs
from scoresolve.solvers import AdaptiveAdams

SDES = [ss.VP(), ss.EDM(), ss.RectifiedFlow()]


def starts(sde: ss.GaussianSDE, *shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sde.prior_std * torch.randn(shape, generator=generator, dtype=torch.float64)


def median_error(score: Any, sde: ss.GaussianSDE, x: Tensor, **how: Any) -> float:
    exact = ss.sample(score, sde, x=x, solver=AdaptiveAdams(1e-8, 1e-8)).x
    miss = ss.sample(score, sde, x=x, **how).x - exact
    return float(miss.flatten(1).square().mean(1).sqrt().median())


@pytest.mark.parametrize(
    ("solver", "sde", "nfe", "factor"),
    [
        ("auto", ss.VP(), 5, 0.4),
        ("auto", ss.EDM(), 10, 0.7),
        ("dpmpp_2m", ss.VP(), 10, 0.7),
        ("ddim", ss.RectifiedFlow(), 12, 1.0),
        ("heun", ss.EDM(), 12, 0.7),
    ],
)
def test_a_fitted_grid_is_better_on_starts_it_has_not_seen(
    solver: str, sde: ss.GaussianSDE, nfe: int, factor: float
) -> None:
    score = ss.targets.ring().score_model(sde)
    fit = ss.fit_grid(score, sde, shape=(60, 2), solver=solver, nfe=nfe)
    x = starts(sde, 64, 2)
    before = median_error(score, sde, x, solver=solver, nfe=nfe)
    after = median_error(score, sde, x, solver=fit.solver, grid=fit.grid)
    assert after < factor * before
    assert ss.plan(fit.solver, sde, fit.grid).nfe <= nfe
    assert fit.rms * fit.median < fit.first_rms * fit.first_median


@settings(max_examples=60)
@given(
    name=st.sampled_from(["uniform", "flow", "scaled", "karras", "cosine"]),
    sde=st.sampled_from([ss.VP(), ss.EDM()]),
    steps=st.integers(2, 40),
    bend=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    backward=st.booleans(),
)
def test_a_bent_grid_is_a_grid(
    name: str, sde: ss.GaussianSDE, steps: int, bend: list[float], backward: bool
) -> None:
    ends = (sde.t_min, sde.T) if backward else (sde.T, sde.t_min)
    first = ss.make_grid(name, sde, steps, *ends)
    count = min(steps - 1, 6)
    bent = _bent(first, np.array(bend[:count]))
    bent.check(sde)
    assert (bent.times[0], bent.times[-1]) == ends and bent.steps == steps
    straight = _bent(first, np.zeros(count))
    assert straight.times == pytest.approx(first.times, rel=1e-9, abs=1e-12)


def test_a_longer_bend_makes_the_step_longer() -> None:
    first = ss.make_grid("uniform", ss.VP(), 4, 1.0, 0.2)
    bent = _bent(first, np.array([math.log(2.0), 0.0, 0.0]))
    sizes = -np.diff(bent.times)
    assert sizes == pytest.approx(0.8 * np.array([2, 1, 1, 1]) / 5)


def test_a_grid_that_cannot_be_bettered_is_kept() -> None:
    """The flow of N(0, I) under VP does not move, so no grid has an error."""
    sde = ss.VP()
    fit = ss.fit_grid(lambda x, t: -x, sde, shape=(12, 2), solver="euler_flow", steps=3)
    assert fit.grid == ss.sampling.grid_for(ss.get_solver("euler_flow"), sde, steps=3)
    assert fit.rms == fit.first_rms < 1e-5


def test_folding_keeps_the_norm_of_long_rows_on_average() -> None:
    sde, size = ss.VP(), 5000
    x = starts(sde, 30, 1).repeat(1, size)  # errors alike, which would add up without signs
    first = ss.make_grid("flow", sde, 3)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x / (0.2 + 0.8 * t[:, None])

    runs = _Runs(ss.as_model(score, sde), sde, ss.get_solver("euler"), x, first, 1e-6, None, {})
    misses = runs.misses(first, slice(None))
    y = ss.sample(score, sde, x=x, solver="euler", grid=first).x
    exact = (y - runs.images).square().mean(1).sqrt().numpy()
    assert misses.shape == (30, 1024)
    # one row is off by (2/1024)^(1/2) of its square, half of that of its norm
    assert np.abs(runs.errors(first, slice(None)) / exact - 1).max() < 5 * 0.5 * (2 / 1024) ** 0.5


def test_a_fit_is_reproducible_and_knows_no_chunks() -> None:
    sde = ss.VP()
    score = ss.targets.ring().score_model(sde)
    one, two = (ss.fit_grid(score, sde, shape=(24, 2), nfe=6, chunk=c) for c in (None, 7))
    assert one.grid.times == pytest.approx(two.grid.times, rel=1e-6)


def test_every_evaluation_is_counted() -> None:
    sde, seen = ss.VP(), 0
    exact = ss.targets.ring().score_model(sde)

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x)
        return exact(x, t)

    fit = ss.fit_grid(score, sde, shape=(18, 2), solver="ddim", nfe=5)
    assert fit.evaluations == seen


def test_the_scale_is_asked_and_stays_with_the_solver() -> None:
    sde = ss.VP()
    exact = ss.targets.ring().score_model(sde)
    fit = ss.fit_grid(lambda x, t: exact(x, t), sde, shape=(12, 2), nfe=5)
    assert fit.solver.name == f"auto(scale={ss.measure_scale(exact, sde, (2,)):.3g})"
    assert ss.plan(fit.solver, sde, fit.grid).nfe == 5


def test_the_scale_is_asked_with_the_conditions() -> None:
    sde = ss.VP()
    exact = ss.targets.ring().score_model(sde)
    fit = ss.fit_grid(lambda x, t, sign: sign * exact(x, t), sde, shape=(12, 2), nfe=5, sign=1.0)
    assert fit.solver.name == f"auto(scale={ss.measure_scale(exact, sde, (2,)):.3g})"


def test_a_solver_that_plans_for_a_budget_gets_it() -> None:
    sde = ss.VP()
    score = ss.targets.ring().score_model(sde)
    fit = ss.fit_grid(score, sde, shape=(12, 2), solver="dpm_fast", nfe=9)
    usual = ss.sample(score, sde, shape=(1, 2), solver="dpm_fast", nfe=9)
    assert len(fit.grid.times) == len(usual.times)
    assert ss.plan(fit.solver, sde, fit.grid).nfe == usual.nfe == 9


def test_starts_that_are_lost_are_left_out_and_conditions_follow_theirs() -> None:
    sde, x = ss.VP(), starts(ss.VP(), 24, 2)
    lost = torch.arange(24) % 6 == 1
    shift = torch.linspace(-1, 1, 24, dtype=torch.float64)[:, None]

    def score(x: Tensor, t: Tensor, shift: Tensor, lost: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        score = -(x - alpha * shift) / (0.04 * alpha**2 + sigma**2)
        return torch.where(lost[:, None], torch.nan, score)

    fit = ss.fit_grid(score, sde, x=x, solver="ddim", nfe=5, shift=shift, lost=lost)
    assert 0 < fit.median < fit.first_median < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "ddpm"}, "draws noise"),
        ({"solver": "dopri5"}, "at run time"),
        ({"shape": (5, 2)}, "at least 12"),
        ({"x": torch.zeros(20, 2)}, "not both"),
        ({"shape": None}, "not both"),
        ({"steps": 3, "nfe": 4}, "one budget"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ss.fit_grid(lambda x, t: -x, ss.VP(), **{"shape": (20, 2), **options})


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(SolveError, match="20 NONFINITE"):
        ss.fit_grid(lambda x, t: x * torch.nan, ss.VP(), shape=(20, 2), solver="ddim", nfe=4)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_images_in_float32_are_fitted_too(sde: ss.GaussianSDE) -> None:
    target = ss.targets.random_mixture(12, components=3)
    score, x = target.score_model(sde), starts(sde, 18, 12).float()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return score.predict("x0", x.flatten(1).double(), t.double()).reshape(x.shape).float()

    x = x.reshape(18, 3, 2, 2)
    fit = ss.fit_grid(ss.from_x0(network, sde), sde, x=x, solver="ab2_v", nfe=6, tolerance=1e-4)
    assert fit.median <= fit.first_median and len(fit.grid.times) == 7
