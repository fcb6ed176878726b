"""`verify_model` tells how far a network is from a score field, and in what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.model_check import QUANTITIES, Estimate, ModelVerification, verify_model
from scoresolve.model_check.derivatives import (
    Denoised,
    Level,
    fokker_planck_residual,
    jacobian_parts,
)
from scoresolve.model_check.filters import LinearFilter, _Half
from scoresolve.model_check.verification import _correlation
from scoresolve.models import Model, as_model
from scoresolve.sde import GaussianSDE

MIXTURE = ss.targets.random_mixture(3, 5)
DATA = MIXTURE.sample(400)
PROCESSES = [ss.VP(), ss.EDM(), ss.RectifiedFlow(), ss.CosineVP()]
ROUNDING = 1e-11
SDE = ss.VP()
EXACT = MIXTURE.score_model(SDE)


def measured(found: ModelVerification, name: str) -> list[float]:
    return [getattr(row, name).value for row in found.levels]


def failed(found: ModelVerification) -> set[str]:
    return {finding.quantity for finding in found.findings if not finding.ok}


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_an_exact_score_is_one_to_rounding(sde: GaussianSDE) -> None:
    found = verify_model(MIXTURE.score_model(sde), sde, DATA, law=MIXTURE, levels=5, points=24)
    assert found.ok, found
    assert max(measured(found, "fokker_planck")) < ROUNDING
    assert max(measured(found, "curl")) < ROUNDING
    assert measured(found, "exact") == pytest.approx([1.0] * 5, abs=ROUNDING)
    assert measured(found, "negative") == [0.0] * 5
    for row in found.levels:
        assert row.calibration is not None and row.correlation is not None
        low, high = row.calibration.bounds(4.5)
        assert low <= 1 <= high
        low, high = row.correlation.bounds(4.5)
        assert low <= 0 <= high


def test_the_residual_is_that_of_the_equation_of_the_score() -> None:
    """ds/dt - grad(-div f - f.s + g^2/2 (div s + |s|^2)), of a gradient field that is wrong."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        return 1.05 * EXACT(x, 1.1 * t)

    def right_side(point: Tensor, t: Tensor) -> Tensor:
        def potential(point: Tensor) -> Tensor:
            s = score(point[None], t)[0]
            jacobian = torch.func.jacfwd(lambda p: score(p[None], t)[0])(point)
            rate, g = SDE.drift_rate(t), SDE.diffusion(t)
            return -(rate * point) @ s + g**2 / 2 * (jacobian.trace() + s @ s)

        return torch.func.grad(potential)(point)

    t = torch.tensor(0.3, dtype=torch.float64)
    level = Level.at(SDE, 0.3)
    x = level.alpha * DATA[:4] + level.sigma * DATA[4:8]
    per_time = torch.func.jvp(lambda u: score(x, u), (t,), (torch.ones_like(t),))[1]
    expected = per_time - torch.stack([right_side(point, t) for point in x])
    expected = expected * level.alpha * level.k**2 * level.time_rate
    denoised = Denoised(as_model(score, SDE), x, level, {})
    basis = torch.eye(3, dtype=x.dtype)[:, None].expand(3, 4, 3)
    square, _ = fokker_planck_residual(denoised, basis, exact=True)
    torch.testing.assert_close(square, expected.square().sum(1), rtol=1e-9, atol=0)
    right = Denoised(EXACT, x, level, {})
    assert float(fokker_planck_residual(right, basis, exact=True)[0].max()) < ROUNDING**2


def test_a_rotation_that_keeps_the_law_is_seen_by_the_curl_alone() -> None:
    """A field A x of a Gaussian is free of divergence, normal to the score, and constant in k."""
    turn, c = torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64), 1e-4
    law, edm = ss.targets.gaussian([0.0, 0.0], 1.0), ss.EDM()
    exact = law.score_model(edm)
    found = verify_model(
        lambda x, t: exact(x, t) + c * x @ turn, edm, law.sample(400), law=law, levels=4
    )
    assert failed(found) == {"curl"}, found
    assert found.worst.quantity == "curl"
    for row in found.levels:
        k2 = math.exp(-row.log_snr)
        gain = 1 / (1 + k2)
        assert row.curl is not None
        assert row.curl.value == pytest.approx(2 * c * k2 / math.hypot(gain, c * k2), rel=1e-6)


def test_a_noise_level_ten_percent_off_is_seen_by_the_fokker_planck_equation_alone() -> None:
    """D(y, 1.1 k) costs a percent of the error, and is no denoiser of anything."""
    edm = ss.EDM()
    exact = MIXTURE.score_model(edm)
    wrong = ss.from_denoiser(lambda x, sigma: exact.predict("x0", x, 1.1 * sigma))
    found = verify_model(wrong, edm, DATA, law=MIXTURE, levels=6)
    assert failed(found) == {"fokker_planck"}, found
    assert max(measured(found, "curl")) < ROUNDING
    assert max(measured(found, "exact")) < 1.02


def test_a_time_ten_percent_off_is_a_gradient_field_still() -> None:
    found = verify_model(lambda x, t: EXACT(x, 1.1 * t), SDE, DATA, law=MIXTURE, levels=6)
    assert failed(found) == set(QUANTITIES) - {"curl"}, found


def test_a_score_scaled_by_a_twentieth_is_a_gradient_field_still() -> None:
    found = verify_model(lambda x, t: 1.05 * EXACT(x, t), SDE, DATA, levels=6, points=64)
    assert failed(found) == set(QUANTITIES) - {"curl"}, found
    # at much noise Cov = (sigma^2/alpha) dx0/dx is about 1 - 1.05, times sigma^2/alpha^2
    assert measured(found, "negative")[-1] == 1.0
    assert math.isnan(measured(found, "calibration")[-1])
    # the square of the correlation is what the right scale would save
    last = found.levels[-1]
    assert last.correlation is not None
    k2 = math.exp(-last.log_snr)
    variance = float(DATA.var(0).mean())
    saved = 0.05**2 * k2 / variance
    assert last.correlation.value == pytest.approx(-math.sqrt(saved / (1 + saved)), rel=0.25)


def test_an_overconfident_denoiser_has_another_law_and_is_a_score_still() -> None:
    narrow = ss.GaussianMixture(MIXTURE.weights, MIXTURE.means, 0.5 * MIXTURE.covariances)
    found = verify_model(narrow.score_model(SDE), SDE, DATA, levels=6, points=64)
    assert failed(found) == {"denoising", "calibration"}, found
    assert max(measured(found, "calibration")) > 1.3
    assert max(measured(found, "fokker_planck")) < ROUNDING
    assert max(measured(found, "curl")) < ROUNDING


def test_probes_estimate_what_the_basis_gives() -> None:
    """Many draws of three probes at one point: the mean over them has no bias."""
    mixture, draws, level = ss.targets.random_mixture(4, 4, spread=1.0), 4000, Level.at(SDE, 0.4)
    exact = mixture.score_model(SDE)
    turn = torch.zeros(4, 4, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 0.3, -0.3
    model = as_model(lambda x, t: exact(x, 1.2 * t) + x @ turn, SDE)
    x = level.alpha * mixture.sample(2)[1:] + 0.5 * level.sigma
    basis = torch.eye(4, dtype=x.dtype)[:, None]
    truth, products = fokker_planck_residual(Denoised(model, x, level, {}), basis, exact=True)
    parts = jacobian_parts(products, basis, exact=True)
    many = x.expand(draws, 4)
    probes = torch.stack([ss.Philox(0).signs(many, draw) for draw in range(3)])
    square, products = fokker_planck_residual(Denoised(model, many, level, {}), probes, exact=False)
    for found, value in zip(
        (square, *jacobian_parts(products, probes, exact=False)), (truth, *parts), strict=True
    ):
        error = 4.5 * float(found.std()) / math.sqrt(draws)
        assert error < 0.15 * float(value)
        assert float(found.mean()) == pytest.approx(float(value), abs=error)


def test_probes_of_an_exact_score_leave_no_residual_beyond_their_errors() -> None:
    mixture = ss.targets.random_mixture(20, 4, spread=1.0)
    found = verify_model(mixture.score_model(SDE), SDE, mixture.sample(48), levels=3)
    assert found.probes == 8
    assert found.ok, found
    for row in found.levels:
        assert row.fokker_planck is not None
        assert row.fokker_planck.bounds(4.5)[0] < ROUNDING


def test_the_linear_filter_is_that_of_the_covariance() -> None:
    law = ss.targets.gaussian([1.0, -2.0, 0.0], [[4.0, 1.9, 0], [1.9, 1.0, 0], [0, 0, 0.2]])
    data, k = law.sample(4000), 0.7
    y = data + k * ss.Philox(5).normal(data, 0)
    error = LinearFilter(data).errors(data, y, k)
    covariance = law.covariance
    exact = k**2 * (covariance @ torch.linalg.inv(covariance + k**2 * torch.eye(3))).trace()
    assert float(error.mean()) == pytest.approx(
        float(exact), abs=4.5 * float(error.std()) / math.sqrt(4000)
    )


def test_the_covariance_is_shrunk_as_ledoit_and_wolf_say() -> None:
    from sklearn.covariance import ledoit_wolf

    rows = ss.targets.random_mixture(12, 3).sample(30)
    half = _Half(rows)
    along = half.axes.mT @ torch.diag(half.variances - half.rest) @ half.axes
    found = along + half.rest * torch.eye(12, dtype=rows.dtype)
    torch.testing.assert_close(found, torch.from_numpy(ledoit_wolf(rows.numpy())[0]))


def test_a_correlation_of_one_has_no_error() -> None:
    found = _correlation(DATA, 2 * DATA)
    assert found.value == pytest.approx(1.0)
    assert found.standard_error < ROUNDING


def test_a_posterior_without_spread_has_no_negative_variances() -> None:
    """Between points of the data rounding alone is left of it."""
    points = ss.GaussianMixture.from_data(DATA[:20])
    found = verify_model(
        points.score_model(SDE),
        SDE,
        DATA[:20],
        law=points,
        levels=(12.0, 3.0),
        quantities=("calibration",),
    )
    assert measured(found, "negative") == [0.0, 0.0]


def test_the_linear_filter_of_few_points_is_no_worse_than_one_variance_for_all() -> None:
    data, k = ss.targets.gaussian([0.0] * 64, 1.0).sample(24), 0.5
    y = data + k * ss.Philox(5).normal(data, 0)
    error = LinearFilter(data).errors(data, y, k).mean() / 64
    assert float(error) == pytest.approx(k**2 / (1 + k**2), rel=0.15)


def test_a_gaussian_is_denoised_as_by_a_linear_filter() -> None:
    law = ss.targets.gaussian([0.0, 1.0], [[2.0, 0.5], [0.5, 1.0]])
    found = verify_model(
        law.score_model(SDE), SDE, law.sample(400), quantities=("denoising",), levels=4
    )
    assert measured(found, "linear") == pytest.approx([1.0] * 4, abs=0.02)


def test_a_denoiser_an_eighth_worse_than_a_linear_filter_is_told() -> None:
    """A ripple across x0 is uncorrelated with everything, so it adds its square to the error."""
    law, data = (
        ss.targets.gaussian([0.0, 0.0], 1.0),
        ss.targets.gaussian([0.0, 0.0], 1.0).sample(2000),
    )
    exact = law.score_model(SDE)

    def rippled(share: float) -> ModelVerification:
        def network(x: Tensor, t: Tensor) -> Tensor:
            rate = (1 + SDE.log_snr(t).exp()) ** -0.5
            return exact.predict("x0", x, t) + (2 * share) ** 0.5 * rate[:, None] * (60 * x).sin()

        model = ss.from_x0(network, SDE)
        return verify_model(model, SDE, data, quantities=("denoising",), levels=(0.0,))

    assert rippled(0.02).ok
    found = rippled(0.12)
    assert measured(found, "linear") == pytest.approx([1.12], abs=0.03)
    assert "worse than a linear filter" in found.worst.verdict


def test_the_root_of_an_average_has_the_bounds_of_its_square() -> None:
    square, error = 0.04, 0.03
    root = Estimate(0.2, math.sqrt(square + error) - 0.2, rooted=True)
    assert root.bounds(1.0) == pytest.approx((math.sqrt(0.01), math.sqrt(0.07)))
    assert root.bounds(3.0) == pytest.approx((0.0, math.sqrt(0.13)))


def test_results_do_not_depend_on_chunks_or_on_later_data() -> None:
    asked = {"levels": 2, "points": 8}
    whole = verify_model(EXACT, SDE, DATA[:40], **asked)
    split = verify_model(EXACT, SDE, DATA[:40], chunk=7, **asked)
    for row, other in zip(whole.levels, split.levels, strict=True):
        assert row.calibration is not None and other.calibration is not None
        assert row.calibration.value == pytest.approx(other.calibration.value, rel=1e-12)
    more = verify_model(EXACT, SDE, DATA[:60], levels=[r.log_snr for r in whole.levels], points=8)
    assert measured(more, "curl") == pytest.approx(measured(whole, "curl"), abs=ROUNDING)
    assert more.levels[0].linear != whole.levels[0].linear


def test_a_model_of_another_process_is_asked_in_its_own() -> None:
    denoiser = MIXTURE.score_model(ss.EDM())
    asked = {"levels": (2.0, -1.0), "points": 16}
    here, there = (verify_model(denoiser, sde, DATA, **asked) for sde in (SDE, ss.EDM()))
    assert measured(here, "fokker_planck") == pytest.approx([0, 0], abs=ROUNDING)
    assert measured(here, "linear") == pytest.approx(measured(there, "linear"), rel=1e-9)
    narrow = ss.EDM(sigma_min=0.5, sigma_max=2.0)
    inside = verify_model(MIXTURE.score_model(narrow), SDE, DATA, levels=3, points=8)
    reached = [row.log_snr for row in inside.levels]
    assert -2 * math.log(2) - 1e-9 < min(reached) < max(reached) < 2 * math.log(2) + 1e-9
    assert here.levels[0].t == pytest.approx(float(SDE.time_from_log_snr(2.0)))


def test_a_score_that_is_itself_a_gradient_is_verified() -> None:
    def energy(x: Tensor, t: Tensor) -> Tensor:
        return -EXACT.log_prob(x, t)

    found = verify_model(ss.from_energy(energy), SDE, DATA, levels=3, points=8)
    assert max(measured(found, "fokker_planck")) < ROUNDING


def test_a_standard_gaussian_needs_no_time() -> None:
    data = ss.targets.gaussian([0.0, 0.0], 1.0).sample(200)
    found = verify_model(lambda x, t: -x, SDE, data, levels=4)
    assert found.ok, found
    assert max(measured(found, "fokker_planck")) < ROUNDING


def test_calls_are_counted() -> None:
    rows = 0

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return EXACT(x, t)

    found = verify_model(network, SDE, DATA[:50], levels=3, points=20, chunk=16)
    assert found.evaluations == rows == 3 * 50 + 2
    assert found.products == 3 * (20 * (2 * 3 + 3) + 30 * 2)
    assert (found.points, found.derivative_points, found.probes) == (50, 20, None)


def test_conditions_are_split_with_the_data() -> None:
    label = torch.arange(40) % 2

    def network(x: Tensor, t: Tensor, label: Tensor, scale: float) -> Tensor:
        assert len(label) == len(x)
        return scale * EXACT(x, t) * torch.where(label == 0, 1.0, 1.0)[:, None]

    found = verify_model(
        network, SDE, DATA[:40], levels=2, points=8, chunk=5, label=label, scale=1.0
    )
    assert max(measured(found, "fokker_planck")) < ROUNDING


def without_graph(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return EXACT.predict("eps", x, t)


def test_a_network_without_derivatives_is_told_and_its_denoising_measured() -> None:
    model = ss.from_eps(without_graph, SDE)
    with pytest.raises(ArgumentError, match="no gradient in x"):
        verify_model(model, SDE, DATA, levels=2)
    found = verify_model(model, SDE, DATA, levels=2, law=MIXTURE, quantities=("denoising",))
    assert found.ok
    assert measured(found, "exact") == pytest.approx([1.0, 1.0], abs=ROUNDING)
    assert (found.products, found.derivative_points) == (0, 0)


def test_a_network_of_rounded_timesteps_has_no_fokker_planck_residual() -> None:
    alphas_cumprod = (1 - ss.sde.linear_betas(1000)).cumprod(0)
    chain = ss.DiscreteVP(alphas_cumprod)
    exact = MIXTURE.score_model(chain)
    model = ss.from_discrete(
        lambda x, step: exact.predict("eps", x, step.double() + 1), alphas_cumprod, quantize=True
    )
    with pytest.raises(ArgumentError, match="no derivative in its time"):
        verify_model(model, chain, DATA, levels=2)
    rest = ("denoising", "calibration", "curl")
    assert verify_model(model, chain, DATA, levels=2, points=8, quantities=rest).ok


def test_a_network_that_fails_does_not_pass() -> None:
    broken: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x * math.nan  # noqa: E731
    found = verify_model(broken, SDE, DATA, levels=2, points=8)
    assert failed(found) == set(QUANTITIES)
    assert json.loads(found.to_json())["levels"][0]["curl"]["value"] is None


def test_the_result_prints_and_is_data() -> None:
    found = verify_model(EXACT, SDE, DATA, levels=2, points=8)
    table = str(found)
    assert "VP(beta_min=0.1" in table.splitlines()[0] and table.splitlines()[0].endswith("OK")
    assert sum("[ok]" in line for line in table.splitlines()) == 4
    stored = json.loads(found.to_json())
    assert stored["ok"] is True
    assert stored["levels"][1]["log_snr"] == found.levels[1].log_snr
    assert found.of("curl") is not None
    assert replace(found, findings=()).of("curl") is None
    assert verify_model(EXACT, SDE, DATA, levels=2, points=8) == found


def test_bad_input_is_refused() -> None:
    def refused(message: str, kind: type[Exception] = ArgumentError, **changed: object) -> None:
        given = {"score": EXACT, "sde": SDE, "data": DATA, **changed}
        with pytest.raises(kind, match=message):
            verify_model(**given)  # type: ignore[arg-type]

    refused("not Gaussian", sde=ss.Langevin(lambda x: -x), score=lambda x, t: -x)
    refused("floating-point", data=torch.ones(20, 3, dtype=torch.int64))
    refused("floating-point", data=DATA[:, 0])
    refused("too little", data=DATA[:15])
    refused("one point", data=torch.ones(20, 3, dtype=torch.float64))
    refused("not finite", data=torch.cat([DATA, DATA[:1] * math.nan]))
    refused("curl", quantities=("curls",), kind=UnknownNameError)
    refused("empty", quantities=())
    refused("empty", levels=())
    refused("probes", probes=1)
    refused("events", law=ss.targets.ring(), kind=ShapeError)
    refused("callable", score=3)
    refused("ndarray", data=DATA.numpy())
    refused("GaussianMixture", law="ring")
    refused("sequence of names", quantities="curl")
    refused("NoneType", score=lambda x, t: None, kind=ShapeError)


def test_the_model_itself_is_accepted() -> None:
    assert isinstance(EXACT, Model)
    assert verify_model(EXACT, SDE, DATA, levels=(0.0,), quantities=("denoising",)).ok
