"""Diagnostics of chains, held against ArviZ, against closed forms, and against chains that fail."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ScoresolveError, ShapeError

F64 = torch.float64
GAUSSIAN = ss.GaussianMixture([1.0], [[0.0] * 3], [[1.0, 0.5, 2.0]])


def autoregressive(rho: float, draws: int, chains: int, seed: int = 0) -> Tensor:
    """x' = rho x + sqrt(1 - rho^2) z from its stationary law, [draws, chains, 1]."""
    z = torch.randn(draws, chains, generator=torch.Generator().manual_seed(seed), dtype=F64)
    rows = [z[0]]
    for row in z[1:]:
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * row)
    return torch.stack(rows)[..., None]


def test_every_number_is_that_of_arviz() -> None:
    stats = pytest.importorskip("arviz_stats.base").array_stats
    chains = ss.run_chains(GAUSSIAN, x=GAUSSIAN.sample(6), kernel="mala", steps=200)
    found = ss.diagnose(chains)
    assert chains.samples is not None and chains.acceptance is not None
    for i in range(3):
        draws = chains.samples[:, :, i].mT.numpy()  # [chain, draw]
        assert float(found.ess_bulk[i]) == pytest.approx(stats.ess(draws, method="bulk"))
        tail = [stats.ess(draws, method="quantile", prob=p) for p in (0.05, 0.95)]
        assert float(found.ess_tail[i]) == pytest.approx(min(map(float, tail)))
        assert float(found.rhat[i]) == pytest.approx(stats.rhat(draws, method="rank"))
        time = draws.size / stats.ess(draws, method="mean")
        assert float(found.autocorrelation_time[i]) == pytest.approx(float(time))
    assert (found.chains, found.draws) == (6, 200)
    assert found.acceptance == pytest.approx(float(chains.acceptance.mean()))
    assert found.evaluations == 6 * chains.nfe
    assert "6 chains of 200 draws" in str(found) and "acceptance" in str(found)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_is_the_closed_form(rho: float) -> None:
    found = ss.diagnose(autoregressive(rho, 2000, 20))
    exact = (1 + rho) / (1 - rho)
    assert float(found.autocorrelation_time[0]) == pytest.approx(exact, rel=0.1)
    assert float(found.ess_bulk[0]) == pytest.approx(40_000 / exact, rel=0.1)
    assert float(found.rhat[0]) < 1.02


def test_rhat_sees_chains_that_disagree_in_place_or_in_width_or_drift() -> None:
    good = autoregressive(0.3, 500, 4)
    apart, wide, drifting = good.clone(), good.clone(), good.clone()
    apart[:, 0] += 2
    wide[:, 0] *= 4
    drifting += torch.linspace(0, 3, 500, dtype=F64)[:, None, None]
    assert float(ss.diagnose(good).rhat[0]) < 1.01
    for bad in (apart, wide, drifting):
        assert float(ss.diagnose(bad).rhat[0]) > 1.05


def test_event_shapes_and_chains_that_failed() -> None:
    samples = torch.cat([autoregressive(0.2, 50, 5, seed) for seed in range(4)], 2)
    whole = ss.diagnose(samples)
    square = ss.diagnose(samples.reshape(50, 5, 2, 2))
    assert torch.equal(square.ess_bulk, whole.ess_bulk.reshape(2, 2))
    assert ss.diagnose(samples[..., 0]).rhat.shape == ()
    broken = torch.cat([samples, torch.full_like(samples[:, :1], torch.nan)], 1)
    assert torch.equal(ss.diagnose(broken).ess_bulk, whole.ess_bulk)
    assert ss.diagnose(broken).chains == 5


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="keep=True"):
        ss.diagnose(ss.run_chains(GAUSSIAN, x=GAUSSIAN.sample(2), steps=5, keep=False))
    with pytest.raises(ShapeError, match="S >= 4"):
        ss.diagnose(torch.zeros(3, 4, 1))
    with pytest.raises(ShapeError, match="S >= 4"):
        ss.diagnose(torch.zeros(8))
    with pytest.raises(ArgumentError, match="not finite"):
        ss.diagnose(torch.full((8, 2, 1), torch.nan))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(ScoresolveError, match="mcmc"):
        ss.diagnose(torch.zeros(8, 2, 1))


def test_failed_chains_are_left_out() -> None:
    inside = ss.from_energy(
        lambda x, t: torch.where(x[:, 0].abs() < 1, 0.0, torch.inf) + 0 * x[:, 0]
    )
    x = torch.tensor([[0.0], [0.1], [9e9], [0.2]], dtype=torch.float64)
    chains = ss.run_chains(inside, x=x, kernel="mala", step_size=0.1, steps=40)
    assert chains.ok.tolist() == [True, True, False, True]
    assert ss.diagnose(chains).chains == 3
