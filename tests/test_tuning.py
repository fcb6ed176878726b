"""The scale of the data, as measured by a few calls of the model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresolve as ss
import scoresolve.digits
from scoresolve.errors import ArgumentError, ModelWarning
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, RectifiedFlow
from scoresolve.targets import gaussian, random_mixture, ring

PROCESSES = [VP(), EDM(), VE(), RectifiedFlow(), CosineVP()]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_the_measured_scale_is_that_of_the_mixture(sde: GaussianSDE) -> None:
    """64 pairs in 16 and 32 dimensions: 5 %, four times (rows * D)^(-1/2) with effective D 4."""
    for mixture in (random_mixture(16, 4, seed=1, spread=1.0), random_mixture(32, 6, seed=2)):
        model = mixture.score_model(sde)
        found = ss.measure_scale(model, sde, mixture.event_shape, pairs=512, dtype=torch.float64)
        assert found == pytest.approx(model.data_scale, rel=0.1)


def test_a_gaussian_is_measured_exactly_but_for_the_sample_of_z() -> None:
    model = gaussian(torch.full((256,), 5.0), 4.0 * torch.ones(256)).score_model(EDM())
    found = ss.measure_scale(model, EDM(), (256,), dtype=torch.float64)
    assert found == pytest.approx(model.data_scale, rel=0.03)  # (2/(64 * 256))^(1/2) = .011


@pytest.mark.parametrize("std", [0.3, 1.5, 6.0])
def test_one_call_serves_data_of_any_scale(std: float) -> None:
    levels = list[Tensor]()
    model = gaussian(torch.zeros(64), std**2 * torch.ones(64)).score_model(EDM())

    def score(x: Tensor, t: Tensor) -> Tensor:
        levels.append(t)
        return model(x, t)

    found = ss.measure_scale(score, EDM(), (64,), dtype=torch.float64)
    assert len(levels) == 1 and levels[0].unique().tolist() == pytest.approx([4.0, 16.0, 64.0])
    assert found == pytest.approx(model.data_scale, rel=0.05)  # (2/(64 * 64))^(1/2) = .022


def test_a_slightly_wrong_noise_prediction_does_not_spoil_it() -> None:
    """A relative error of .2 % is .03 in variance at k = 4, and would be 8 at k = 64."""
    exact = gaussian(torch.zeros(64), 0.25 * torch.ones(64)).score_model(VP())
    network = ss.from_eps(lambda x, t: 0.998 * exact.predict("eps", x, t), VP())
    found = ss.measure_scale(network, VP(), (64,))
    assert found == pytest.approx(exact.data_scale, rel=0.1)


def test_the_states_are_pairs_of_opposite_ones() -> None:
    calls = list[Tensor]()

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.clone())
        return ring().score_model(VP())(x, t)

    ss.measure_scale(score, VP(), (2,), pairs=8)
    pairs = calls[0].reshape(3, 2, 8, 2)
    assert len(calls) == 1 and torch.equal(pairs[:, 0], -pairs[:, 1])


def test_the_default_spends_one_call_on_a_scale_it_is_not_told() -> None:
    exact = gaussian(torch.zeros(64), 9 * torch.ones(64)).score_model(EDM())
    calls = list[int]()

    def score(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        return exact(x, t)

    def run(**options: Any) -> ss.Samples:
        calls.clear()
        return ss.sample(score, EDM(), shape=(5, 64), **options)

    out = run(nfe=10, chunk=2)
    assert (out.nfe, out.plan.nfe, len(calls)) == (10, 9, 1 + 3 * 9)  # type: ignore[union-attr]
    assert "scale=8" in out.plan.solver or "scale=9" in out.plan.solver  # type: ignore[union-attr]
    for left_alone in ({"nfe": 5}, {"steps": 10}, {"nfe": 10, "label": torch.arange(5)}):
        assert run(**left_alone).plan.solver == "auto"  # type: ignore[union-attr]


def test_a_model_whose_scale_cannot_be_measured_is_still_sampled() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        if len(x) != 3:
            raise RuntimeError("compiled for three rows")
        return -x

    with pytest.warns(ModelWarning, match="data_scale"):
        out = ss.sample(score, VP(), shape=(3, 4), nfe=8)
    assert out.plan.solver == "auto" and bool(out.ok.all())  # type: ignore[union-attr]


def test_the_trained_network_knows_its_data() -> None:
    network = ss.digits.load_network()
    found = ss.measure_scale(ss.from_denoiser(network), EDM(), (1, 8, 8))
    assert found == pytest.approx(network.data_scale, rel=0.1)


def test_a_model_that_is_no_denoiser_up_there_is_told() -> None:
    with pytest.raises(ArgumentError, match="check_model"):
        ss.measure_scale(ss.from_x0(lambda x, t: -x, VP()), VP(), (4,))


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.RectifiedFlow()], ids=str)
def test_a_denoiser_is_not_taken_for_a_consistency_model(sde: ss.GaussianSDE) -> None:
    data = ss.targets.gaussian([1.0, -1.0], 0.25).score_model(sde)
    mixture = ss.targets.ring().score_model(sde)

    def told(net: Any, **options: Any) -> list[str]:
        options = {"shape": (64, 2), "steps": 3, "grid": "cosine", "denoise": True} | options
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ss.sample(ss.from_x0(net, sde), sde, solver="consistency", **options)
        return [str(each.message) for each in found]

    def gaussian(x: Tensor, t: Tensor) -> Tensor:  # where the flow of N(m, 1/4) ends
        alpha, sigma = (f(t).to(x)[:, None] for f in (sde.alpha, sde.sigma))
        mean = torch.tensor([1.0, -1.0]).to(x)
        return mean + (x - alpha * mean) / (alpha**2 + 4 * sigma**2).sqrt()

    def ring(x: Tensor, t: Tensor) -> Tensor:
        start = min(float(t[0]), sde.T)
        if start <= sde.t_min:
            return x
        return ss.sample(mixture, sde, x=x, solver="dpmpp_2m", nfe=20, t_start=start).x

    for model in (data, mixture):
        for options in ({}, {"chunk": 5}, {"dtype": torch.float64}):
            (text,) = told(lambda x, t, m=model: m.predict("x0", x, t), **options)
            assert "ordinary denoiser" in text
    for right in (gaussian, ring):
        for count in (1, 16, 64):
            for seed in range(3):
                assert told(right, shape=(count, 2), seed=seed) == []
