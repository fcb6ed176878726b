"""The scale of the data, as measured by one call of the model."""

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


def test_one_call_is_made_on_pairs_of_opposite_states() -> None:
    calls = list[Tensor]()

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.clone())
        return ring().score_model(VP())(x, t)

    ss.measure_scale(score, VP(), (2,), rows=8)
    (x,) = calls
    assert len(x) == 16 and torch.equal(x[:8], -x[8:])


def test_the_trained_network_knows_its_data() -> None:
    network = ss.digits.load_network()
    found = ss.measure_scale(ss.from_denoiser(network), EDM(), (1, 8, 8))
    assert found == pytest.approx(network.data_scale, rel=0.1)


def test_a_model_that_is_no_denoiser_up_there_is_told() -> None:
    with pytest.raises(ArgumentError, match="check_model"):
        ss.measure_scale(ss.from_x0(lambda x, t: -x, VP()), VP(), (4,))
