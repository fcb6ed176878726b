"""`check_model` tells what a network really predicts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError
from scoresolve.model_check import check_model
from scoresolve.models import PREDICTIONS, NetworkModel
from scoresolve.sde import GaussianSDE

MIXTURE = ss.targets.ring()
DATA = MIXTURE.sample(64)
PROCESSES = [ss.VP(), ss.SubVP(), ss.CosineVP(), ss.VE(), ss.EDM(), ss.RectifiedFlow()]


def exact(prediction: str, sde: GaussianSDE) -> Callable[[Tensor, Tensor], Tensor]:
    model = MIXTURE.score_model(sde)
    return lambda x, t: model.predict(prediction, x, t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_an_exact_network_is_what_it_was_declared_to_be(sde: GaussianSDE, prediction: str) -> None:
    report = check_model(NetworkModel(exact(prediction, sde), sde, prediction), sde, DATA)
    assert report.ok, report
    assert report.best == report.declared


@pytest.mark.parametrize("real", PREDICTIONS)
@pytest.mark.parametrize("declared", PREDICTIONS)
def test_every_mixed_up_prediction_is_recognised(declared: str, real: str) -> None:
    sde = ss.VP()
    report = check_model(NetworkModel(exact(real, sde), sde, declared), sde, DATA)
    assert report.ok == (declared == real)
    assert (report.best.prediction, report.best.sign, report.best.time) == (real, 1, "t")


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_a_reversed_sign_is_recognised(sde: GaussianSDE) -> None:
    score = MIXTURE.score_model(sde)
    report = check_model(lambda x, t: -score(x, t), sde, DATA)
    assert not report.ok
    assert "sign is reversed" in report.verdict


def test_a_scaled_time_is_recognised() -> None:
    sde = ss.VP()
    eps = exact("eps", sde)
    report = check_model(ss.from_eps(lambda x, t: eps(x, t / 1000), sde), sde, DATA)
    assert not report.ok
    assert report.best.time == "1000 t"


def test_a_flow_of_the_opposite_convention_is_recognised() -> None:
    sde = ss.RectifiedFlow()
    flow = exact("flow", sde)
    report = check_model(ss.from_flow(lambda x, t: -flow(x, 1 - t), sde), sde, DATA)
    assert (report.best.prediction, report.best.sign, report.best.time) == ("flow", -1, "T - t")


def test_a_network_that_does_not_denoise_is_called_untrained() -> None:
    report = check_model(ss.from_eps(lambda x, t: torch.sin(7 * x), ss.VP()), ss.VP(), DATA)
    assert not report.ok
    assert "untrained" in report.verdict


def test_conditioning_reaches_the_network() -> None:
    sde, seen = ss.VP(), []
    eps = exact("eps", sde)

    def network(x: Tensor, t: Tensor, label: int) -> Tensor:
        seen.append(label)
        return eps(x, t)

    assert check_model(ss.from_eps(network, sde), sde, DATA, label=3).ok
    assert set(seen) == {3}


def test_bad_input_is_refused() -> None:
    score = MIXTURE.score_model(ss.VP())
    with pytest.raises(ArgumentError, match="two floating-point data points"):
        check_model(score, ss.VP(), DATA[:1])
    with pytest.raises(ArgumentError, match="not Gaussian"):
        check_model(lambda x, t: -x, ss.Langevin(lambda x: -x), DATA)  # type: ignore[arg-type]


BAD = {
    "not finite at t": lambda m, x, t: torch.where(t[:, None] > 0.3, torch.nan, m),
    "denoises as declared": lambda m, x, t: (m, x.zero_())[0],
}


@pytest.mark.parametrize("verdict", BAD)
def test_networks_that_break_or_write_into_their_input_get_the_right_verdict(verdict: str) -> None:
    sde = ss.VP()
    eps = exact("eps", sde)
    network = ss.from_eps(lambda x, t: BAD[verdict](eps(x.clone(), t), x, t), sde)
    report = check_model(network, sde, DATA)
    assert verdict in report.verdict and report.ok == (verdict == "denoises as declared")


def test_a_model_of_another_process_is_read_in_its_own() -> None:
    for real in ("x0", "eps"):
        network = ss.from_denoiser(exact(real, ss.EDM()))
        report = check_model(network, ss.VP(), DATA)
        assert report.declared.prediction == "x0" and report.ok == (real == "x0")
        assert report.best.prediction == real
        assert all(0 < t < 1 for t, _ in report.levels)


def test_half_precision_is_no_error_of_the_network() -> None:
    """Far data, on which the arithmetic of bfloat16 is off by more than the noise at the ends."""
    sde, seen = ss.VP(), set[torch.dtype]()
    law = ss.GaussianMixture([1.0], torch.full((1, 2), 4.0), 0.5)
    score = law.score_model(sde)

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.add(t.dtype)
        return score.predict("eps", x.double(), t.double()).to(x)

    data = law.sample(64).bfloat16()
    assert check_model(ss.from_eps(network, sde), sde, data).ok
    assert seen == {torch.float32}


def test_what_a_network_raises_keeps_its_type_and_says_where() -> None:
    sde = ss.VP()
    eps = exact("eps", sde)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return eps(x, t) if float(t[0].detach()) < 0.3 else {}[0]

    for check in (ss.check_model, ss.verify_model):
        with pytest.raises(KeyError) as caught:
            check(ss.from_eps(network, sde), sde, DATA)
        assert "level" in " ".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("data", "levels"),
    [(DATA * torch.nan, 8), (DATA[:1].expand(9, 2), 8), (DATA.tolist(), 8), (DATA, 0)],
)
def test_data_and_levels_that_tell_nothing_are_refused(data: Tensor, levels: int) -> None:
    with pytest.raises(ArgumentError):
        check_model(exact("score", ss.VP()), ss.VP(), data, levels=levels)
