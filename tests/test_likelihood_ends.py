"""The ends of the default likelihood: far data, processes that leave data at T, and the budget.

Densities of mixtures are known; the errors that the budget claims must cover those there are.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, normal
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ModelWarning
from scoresolve.likelihood import Likelihood, log_likelihood, sample_with_log_prob
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, RectifiedFlow, SubVP
from scoresolve.targets import GaussianMixture, gaussian, random_mixture
from scoresolve.tuning import PriorMismatch, measure_scale_and_mismatch, prior_mismatch

SHORT = [VE(0.01, 1.0), VE(0.01, 5.0), EDM(sigma_max=10.0), VP(beta_max=5.0)]


def named(sde: GaussianSDE) -> str:
    return str(sde).partition(", T=")[0]


def claimed(found: Likelihood) -> Tensor:
    """What the budget says that a row may be off: all of its parts, and four standard errors."""
    budget = found.budget
    assert budget is not None
    return budget.path + budget.quadrature + budget.data_end + budget.prior + 4 * budget.probes


@functools.cache
def far(size: int, mean: float) -> tuple[GaussianMixture, Tensor]:
    mix = random_mixture(size, 3, spread=1.0)
    mix = GaussianMixture(mix.weights, mix.means + mean, mix.covariances)
    return mix, mix.sample(24, seed=3)


# Far data


@pytest.mark.parametrize("sde", [EDM(), VE(), VP(), RectifiedFlow()], ids=named)
@pytest.mark.parametrize("mean", [10.0, 100.0])
@pytest.mark.parametrize("size", [1, 2])
def test_data_far_from_zero_are_as_exact_as_centred_ones(
    sde: GaussianSDE, mean: float, size: int
) -> None:
    mix, x = far(size, mean)
    found = log_likelihood(mix.score_model(sde), sde, x, trace="exact", nfe=48)
    error = (found.log_prob - mix.log_prob(x)).abs()
    assert bool(found.ok.all()) and float(error.max()) < 0.02
    assert bool((error < claimed(found) + 1e-6).all())
    plain = log_likelihood(lambda x, t: mix.score_model(sde)(x, t), sde, x, trace="exact", nfe=48)
    error = (plain.log_prob - mix.log_prob(x)).abs()
    assert float(error.max()) < 0.02 and bool((error < claimed(plain) + 1e-6).all())


def test_far_data_of_many_dimensions_have_the_error_of_the_probes_alone() -> None:
    mix, x = far(16, 100.0)
    found = log_likelihood(mix.score_model(EDM()), EDM(), x)
    centred, y = far(16, 0.0)
    near = log_likelihood(centred.score_model(EDM()), EDM(), y)
    torch.testing.assert_close(found.log_prob, near.log_prob, rtol=0, atol=0.05)


def test_samples_far_from_zero_have_their_density() -> None:
    mix, sde = far(2, 10.0)[0], EDM()
    drawn = sample_with_log_prob(mix.score_model(sde), sde, (64, 2), dtype=torch.float64)
    assert drawn.x is not None
    error = (drawn.log_prob - mix.log_prob(drawn.x)).abs()
    assert float(error.median()) < 0.01
    assert float((error < claimed(drawn)).double().mean()) > 0.95


# Data left at T


@pytest.mark.parametrize("sde", SHORT, ids=named)
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_a_gaussian_that_T_does_not_drown_is_exact(sde: GaussianSDE, std: float) -> None:
    """The law at T is told by the model's own score and trace there."""
    mix = gaussian([0.0] * 16, std**2)
    model, x = mix.score_model(sde), mix.sample(16)
    found = log_likelihood(lambda x, t: model(x, t), sde, x)
    assert float((found.log_prob - mix.log_prob(x)).abs().max()) < 2e-3


@pytest.mark.parametrize("sde", SHORT, ids=named)
@pytest.mark.parametrize("case", ["moved", "uneven", "ring", "mixture"])
def test_what_is_left_of_other_data_is_in_the_budget(sde: GaussianSDE, case: str) -> None:
    mix = {
        "moved": gaussian([3.0] * 8, 1.0),
        "uneven": gaussian([0.0] * 16, torch.linspace(0.2, 3, 16).double() ** 2),
        "ring": ss.targets.ring(),
        "mixture": random_mixture(8, 3, spread=1.0),
    }[case]
    model, x = mix.score_model(sde), mix.sample(48, seed=3)
    found = log_likelihood(model, sde, x)
    error = (found.log_prob - mix.log_prob(x)).abs()
    assert float((error < claimed(found) + 1e-6).double().mean()) > 0.9


@settings(max_examples=12)
@given(
    sde=st.sampled_from([VP(), SubVP(), CosineVP(), VE(), EDM(), RectifiedFlow(), *SHORT]),
    size=st.sampled_from([1, 2, 5]),
    mean=st.sampled_from([0.0, 3.0, 30.0]),
    std=st.sampled_from([0.3, 1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    late=st.booleans(),
    shifted=st.booleans(),
)
def test_the_budget_covers_the_error_of_a_gaussian(
    sde: GaussianSDE,
    size: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
    late: bool,
    shifted: bool,
) -> None:
    rng = generator(size)
    variances = (std * (0.5 + torch.rand(size, generator=rng, dtype=torch.float64))) ** 2
    mix = gaussian([mean] * size, variances)
    home = mix.score_model(sde)
    own = normal(rng, 4, size) if shifted else torch.zeros(4, size).double()
    x = (mix.sample(4, seed=1) + own).to(dtype)

    def score(x: Tensor, t: Tensor, own: Tensor) -> Tensor:
        return home(x - sde.alpha(t).to(x)[:, None] * own, t)

    score.data_scale = home.data_scale  # type: ignore[attr-defined]
    t_end = float(sde.time_from_log_snr(torch.tensor(-6.0).double())) if late else None
    if t_end is not None and t_end >= sde.T:
        t_end = None
    found = log_likelihood(score, sde, x, t_end=t_end, own=own.to(dtype))
    error = (found.log_prob.double() - mix.log_prob(x.double() - own)).abs()
    # In float32 a far state at sigma/alpha << its mean is rounded: eps times mean/sigma, squared.
    rounding = 1e-5 if dtype == torch.float64 else 0.02 * size * (1 + mean)
    assert bool((error < claimed(found).double() + rounding).all())


# The mismatch by itself


@pytest.mark.parametrize("sde", [*SHORT, VP(), EDM(), RectifiedFlow()], ids=named)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.0, 2.0), (3.0, 2.0)])
def test_the_mismatch_of_a_gaussian_is_that_of_its_law_at_T(
    sde: GaussianSDE, mean: float, std: float
) -> None:
    mix = gaussian([mean] * 16, std**2)
    model = mix.score_model(sde)
    calls = list[int]()

    def score(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x, t)

    options: dict[str, Any] = {"dtype": torch.float64}
    if isinstance(sde, RectifiedFlow):  # no score has an x0 where alpha vanishes
        home: Any = ss.from_x0(lambda x, t: model.predict("x0", x, t), sde)
        found = prior_mismatch(home, sde, (16,), **options)
    else:
        found = prior_mismatch(score, sde, (16,), **options)
        assert len(calls) == 1
    alpha, sigma = float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
    law = (alpha**2 * std**2 + sigma**2) ** 0.5 / sde.prior_std
    assert found.std == pytest.approx(law, rel=1e-6)
    assert found.mean == pytest.approx(alpha * mean / sde.prior_std, rel=1e-6, abs=2e-2 * alpha)
    assert found.per_element >= 0
    scale, also = measure_scale_and_mismatch(home if not calls else score, sde, (16,), **options)
    assert scale == pytest.approx(model.data_scale, rel=0.05)
    assert also.std == pytest.approx(found.std, rel=1e-6)
    assert also.mean == pytest.approx(found.mean, rel=1e-6, abs=1e-9)


def test_the_mismatch_tells_where_samples_would_be_off() -> None:
    def of(sde: GaussianSDE, std: float) -> bool:
        mix = gaussian([0.0] * 16, std**2)
        return prior_mismatch(mix.score_model(sde), sde, (16,), dtype=torch.float64).matters

    assert of(VE(0.01, 1.0), 2.0) and of(VE(0.01, 5.0), 2.0) and of(VP(beta_max=5.0), 2.0)
    assert not of(EDM(), 0.5) and not of(VP(), 2.0) and not of(VE(), 2.0)
    assert PriorMismatch(0.0, float("nan"), 3).per_element == float("inf")


def test_no_event_and_too_many_pairs_are_refused() -> None:
    with pytest.raises(ss.errors.ShapeError, match="give the sizes of a sample"):
        ss.measure_scale(lambda x, t: -x, VP(), (0,))
    with pytest.raises(ss.errors.ArgumentError, match="pairs = 1000000000"):
        ss.measure_scale(lambda x, t: -x, VP(), (2,), pairs=10**9)


def test_an_error_of_the_model_passes_the_measurement() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise ss.errors.ArgumentError("the model's own complaint")

    for verb in (
        lambda: ss.sample(broken, VP(), shape=(2, 3), nfe=10),
        lambda: log_likelihood(broken, VP(), torch.zeros(2, 3)),
    ):
        with pytest.raises(ss.errors.ArgumentError, match="own complaint"):
            verb()


@pytest.mark.parametrize(
    ("sde", "early", "late"), [(VP(), 0.01, 0.3), (EDM(), 0.05, 0.8)], ids=repr
)
def test_a_late_time_of_data_is_told_and_a_named_solver_gives_its_density(
    sde: GaussianSDE, early: float, late: float
) -> None:
    target = gaussian([0.7] * 4, 0.25)
    model, law = target.score_model(sde), target.marginal(sde, late)
    x = law.sample(32)
    with pytest.warns(ModelWarning, match=f"t_start = {late:g} is no time of data without noise"):
        log_likelihood(model, sde, x, t_start=late)
    with pytest.warns(ModelWarning, match=f"t_end = {late:g} is no time of data without noise"):
        sample_with_log_prob(model, sde, (32, 4), dtype=torch.float64, t_end=late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_likelihood(model, sde, target.sample(32), t_start=early)
        found = log_likelihood(model, sde, x, t_start=late, solver="dopri5")
    assert float((found.log_prob - law.log_prob(x)).abs().max()) < 0.05


@pytest.mark.parametrize("solver", ["auto", "dopri5"])
def test_a_way_that_ends_where_data_show_is_told(solver: str) -> None:
    model, x = gaussian([0.7] * 4, 0.25).score_model(VE()), torch.zeros(4, 4)
    with pytest.warns(ModelWarning, match=r"t_end = 0.5 .* still holds the data"):
        log_likelihood(model, VE(), x, t_end=0.5, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_likelihood(model, VE(), x, t_end=VE().T, solver=solver)
