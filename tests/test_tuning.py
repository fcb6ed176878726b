"""The scale of the data, as measured by a few calls of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import scoresolve as ss
import scoresolve.digits
from scoresolve.errors import ArgumentError
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, RectifiedFlow
from scoresolve.targets import gaussian, random_mixture, ring

PROCESSES = [VP(), EDM(), VE(), RectifiedFlow(), CosineVP()]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_the_measured_scale_is_that_of_the_mixture(sde: GaussianSDE) -> None:
    """64 pairs in 16 and 32 dimensions: 5 %, four times (rows * D)^(-1/2) with effective D 4."""
    for mixture in (random_mixture(16, 4, seed=1, spread=1.0), random_mixture(32, 6, seed=2)):
        model = mixture.score_model(sde)
        found = ss.measure_scale(model, sde, mixture.event_shape, rows=512, dtype=torch.float64)
        assert found == pytest.approx(model.data_scale, rel=0.1)


def test_a_gaussian_is_measured_exactly_but_for_the_sample_of_z() -> None:
    model = gaussian(torch.full((256,), 5.0), 4.0 * torch.ones(256)).score_model(EDM())
    found = ss.measure_scale(model, EDM(), (256,), dtype=torch.float64)
    assert found == pytest.approx(model.data_scale, rel=0.03)  # (2/(64 * 256))^(1/2) = .011


def test_the_level_is_raised_until_it_is_far_above_the_data() -> None:
    for std, count in ((0.3, 1), (1.5, 2), (6.0, 3)):
        levels = list[float]()
        model = gaussian(torch.zeros(64), std**2 * torch.ones(64)).score_model(EDM())

        def score(x: Tensor, t: Tensor, model=model, levels=levels) -> Tensor:  # type: ignore[no-untyped-def]
            levels.append(float(t[0]) if t.ndim else float(t))
            return model(x, t)

        ss.measure_scale(score, EDM(), (64,))
        assert levels == pytest.approx([4.0, 16.0, 64.0][:count])


def test_a_slightly_wrong_noise_prediction_does_not_spoil_it() -> None:
    """A relative error of .2 % is .03 in variance at k = 4, and would be 8 at k = 64."""
    exact = gaussian(torch.zeros(64), 0.25 * torch.ones(64)).score_model(VP())
    network = ss.from_eps(lambda x, t: 0.998 * exact.predict("eps", x, t), VP())
    found = ss.measure_scale(network, VP(), (64,))
    assert found == pytest.approx(exact.data_scale, rel=0.1)


def test_calls_are_made_on_pairs_of_opposite_states() -> None:
    calls = list[Tensor]()

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.clone())
        return ring().score_model(VP())(x, t)

    ss.measure_scale(score, VP(), (2,), rows=8)
    assert calls and all(len(x) == 16 and torch.equal(x[:8], -x[8:]) for x in calls)


def test_the_trained_network_knows_its_data() -> None:
    network = ss.digits.load_network()
    found = ss.measure_scale(ss.from_denoiser(network), EDM(), (1, 8, 8))
    assert found == pytest.approx(network.data_scale, rel=0.1)


def test_a_model_that_is_no_denoiser_up_there_is_told() -> None:
    with pytest.raises(ArgumentError, match="check_model"):
        ss.measure_scale(ss.from_x0(lambda x, t: -x, VP()), VP(), (4,))
