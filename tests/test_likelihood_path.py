"""The default likelihood: nodes, weights and probes against closed forms, and its errors' errors.

A mixture's own log-density is the truth. Root mean squares are over samples; each bound leaves a
third of room over what was measured when it was set.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    PROCESSES,
    BenesSDE,
    OwnVP,
    Well,
    benes_log_density,
    dtypes,
    event_shapes,
    generator,
    normal,
    wells,
)
from torch import Tensor

from scoresolve.digits import load_digits, load_network, to_unit
from scoresolve.errors import ArgumentError, GridError, ModelWarning, ShapeError, Status
from scoresolve.likelihood import Likelihood, log_likelihood, sample_with_log_prob
from scoresolve.likelihood.nodes import allocate, lagrange_weights, place_nodes
from scoresolve.likelihood.path import block_count
from scoresolve.metrics import class_mixture
from scoresolve.models import Model, NetworkModel, from_denoiser, scale_of_data
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow, TimeLike, as_time
from scoresolve.solvers import DormandPrince
from scoresolve.targets import GaussianMixture, LowRank, gaussian, random_mixture, ring


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def low_rank_mixture(size: int, components: int, rank: int, std: float, rest: float) -> Any:
    rng = generator(size)
    means = 0.7 * std * normal(rng, components, size)
    factor = 0.7 * std / math.sqrt(rank) * normal(rng, components, size, rank)
    variances = torch.full((components,), rest**2, dtype=torch.float64)
    return GaussianMixture(torch.ones(components), means, LowRank(factor, variances))


CASES = {
    "ring 2-D": (ring, 256, 0.01, 205),
    "digits 64-D": (class_mixture, 192, 0.45, 215),
    "ten 64-D": (lambda: random_mixture(64, 10, seed=7), 192, 0.65, 225),
    "uneven 32-D": (lambda: random_mixture(32, 5, 5, spread=0.5, stds=(0.05, 0.5)), 192, 0.6, 225),
    "low rank 256-D": (lambda: low_rank_mixture(256, 5, 16, 0.5, 0.05), 128, 1.9, 240),
    "low rank 3072-D": (lambda: low_rank_mixture(3072, 1, 8, 0.5, 0.2), 8, 2.5, 300),
}


@functools.cache
def default(case: str) -> tuple[GaussianMixture, Tensor, Likelihood]:
    """A mixture, samples of it and their likelihood by the default call on VP."""
    make, rows, _, _ = CASES[case]
    mix: GaussianMixture = make()
    x = mix.sample(rows, seed=5)
    return mix, x, log_likelihood(mix.score_model(VP()), VP(), x)


# Nodes and weights


@given(ratio=st.floats(0.2, 4.0), c=st.floats(0.1, 10.0))
def test_quadrature_gives_the_log_ratio_of_two_gaussians(ratio: float, c: float) -> None:
    """int (s^2/(s^2 + k^2) - c^2/(c^2 + k^2)) dlog k = log(s/c), from 0 to infinity."""
    for sde in (VP(), EDM(), RectifiedFlow()):
        nodes = place_nodes(sde, c, 60, 1e-5 if sde.T == 1 else sde.t_min, sde.T)
        s = c * ratio
        values = s**2 / (s**2 + nodes.k**2) - c**2 / (c**2 + nodes.k**2)
        tail = values[-1] / 2
        assert abs(nodes.weights @ values + tail - math.log(ratio)) < 2e-3
        assert abs(nodes.coarse @ values + tail - math.log(ratio)) < 3e-2
        assert (nodes.coarse[1:-1:2] == 0).all()


@given(degree=st.integers(0, 4), start=st.floats(-1, 1), end=st.floats(-1, 1))
def test_lagrange_weights_are_exact_for_polynomials(degree: int, start: float, end: float) -> None:
    nodes = np.array([-0.7, -0.2, 0.3, 0.5, 1.0])[: degree + 1]
    exact = (end ** (degree + 1) - start ** (degree + 1)) / (degree + 1)
    assert abs(lagrange_weights(nodes, start, end) @ nodes**degree - exact) < 1e-12


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 500))
def test_allocated_counts_fit_the_budget_and_follow_the_density(
    density: list[float], total: int
) -> None:
    counts = allocate(np.array(density), total)
    assert counts.sum() == max(total, len(density)) and counts.min() >= 1
    for i, j in zip(range(len(density)), range(1, len(density)), strict=False):
        if density[i] > density[j]:
            assert counts[i] >= counts[j]


# Accuracy


@pytest.mark.parametrize("case", CASES)
def test_the_default_meets_its_accuracy_at_its_cost(case: str) -> None:
    mix, x, found = default(case)
    _, _, bound, cost = CASES[case]
    assert bool(found.ok.all()) and found.x is not None and torch.equal(found.x, x)
    assert rms(found.log_prob - mix.log_prob(x)) < bound
    assert float(found.cost.mean()) < cost


@pytest.mark.parametrize("case", ["digits 64-D", "ten 64-D", "low rank 256-D"])
def test_two_thirds_of_the_errors_lie_within_one_standard_error(case: str) -> None:
    mix, x, found = default(case)
    inside = ((found.log_prob - mix.log_prob(x)).abs() < found.standard_error).double().mean()
    # Normal errors: 68.3 %, give or take 3 binomial deviations over the rows.
    expected = math.erf(math.sqrt(0.5))
    assert abs(float(inside) - expected) < 3 * math.sqrt(expected * (1 - expected) / len(x))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 10, 16, 64])
def test_the_standard_error_is_right_in_any_dimension(size: int) -> None:
    mix, sde, rows = random_mixture(size, 3, spread=1.0), VP(), 1000
    x = mix.sample(rows)
    found = log_likelihood(mix.score_model(sde), sde, x, trace="hutchinson")
    z = ((found.log_prob - mix.log_prob(x)) / found.standard_error).abs()
    # 68.3 %, give or take 3 binomial deviations. Signs give the square of the error a heavier tail
    # than a normal law's, so that fewer than 95 % lie within two.
    expected = math.erf(math.sqrt(0.5))
    bound = 3 * math.sqrt(expected * (1 - expected) / rows)
    assert abs(float((z < 1).double().mean()) - expected) < bound
    assert float((z < 2).double().mean()) > 0.89


def test_probes_are_for_dimensions_where_they_save_something() -> None:
    sde, most = VP(), 0
    for size in (4, 6, 9, 10):
        mix = random_mixture(size, 3, spread=1.0)
        x, model = mix.sample(128), mix.score_model(sde)
        found = log_likelihood(model, sde, x)
        if bool((found.standard_error == 0).all()):
            most, truth = size, mix.log_prob(x)
            probed = log_likelihood(model, sde, x, trace="hutchinson")
            assert rms(found.log_prob - truth) < rms(probed.log_prob - truth) / 4
            assert float(found.cost.mean()) < 220
    assert most == 9  # 20 nodes at the default cost


@pytest.mark.parametrize("size", [1, 2, 3, 9, 11, 12, 64])
def test_blocks_are_no_more_than_give_the_error_64_products_of_signs(size: int) -> None:
    pairs, rows = size * (size - 1) // 2, 40
    blocks = block_count(size, rows)
    assert blocks == rows or blocks * pairs >= 64
    assert blocks == 1 or (blocks - 1) * pairs < 64
    assert block_count(size, 1) == 1


def test_more_cost_buys_accuracy() -> None:
    mix, x, found = default("digits 64-D")
    more = log_likelihood(mix.score_model(VP()), VP(), x, cost=460)
    truth = mix.log_prob(x)
    assert rms(more.log_prob - truth) < min(0.2, 0.6 * rms(found.log_prob - truth))
    assert float(more.cost.mean()) < 475


def test_the_pilot_saves_probes_where_data_are_uneven() -> None:
    mix, sde = random_mixture(32, 5, 5, spread=0.5, stds=(0.01, 0.5)), VP()
    x, model = mix.sample(96), mix.score_model(sde)

    def blind(y: Tensor, t: Tensor, own: Tensor) -> Tensor:
        return model(y, t)

    blind.data_scale = model.data_scale  # type: ignore[attr-defined]
    aware = log_likelihood(model, sde, x, seed=1).standard_error
    # Conditions of their own for the rows rule the pilot out.
    even = log_likelihood(blind, sde, x, seed=1, own=torch.zeros(len(x))).standard_error
    assert rms(aware) < 0.95 * rms(even)


@settings(max_examples=20)
@given(
    sde=st.one_of(*(PROCESSES[n] for n in ("VP", "SubVP", "CosineVP", "EDM", "RectifiedFlow"))),
    event=event_shapes(),
    dtype=dtypes(),
    trace=st.sampled_from(["exact", "hutchinson"]),
)
def test_gaussian_data_of_any_shape_and_dtype_on_any_process(
    sde: GaussianSDE, event: tuple[int, ...], dtype: torch.dtype, trace: str
) -> None:
    assume(float(sde.log_snr(sde.T)) < -5)  # a process that ends in noise
    rng, size = generator(1), math.prod(event)
    mean, variance = normal(rng, 1, *event)[0] / 2, normal(rng, 1, *event)[0].div(2).exp()
    mix = gaussian(mean, variance)
    x = (mean + variance.sqrt() * normal(rng, 3, *event)).to(dtype)
    found = log_likelihood(mix.score_model(sde), sde, x, trace=trace)
    assert found.log_prob.dtype == dtype and found.latent.shape == x.shape
    assert found.latent.dtype == dtype and found.standard_error.shape == (3,)
    torch.testing.assert_close(
        found.log_prob.double(), mix.log_prob(x.double()), rtol=0.01, atol=0.05 + 0.01 * size
    )
    # The latent is a draw from the marginal at T.
    radius = (sde.alpha(sde.T) ** 2 * variance + sde.sigma(sde.T) ** 2).sqrt()
    expected = sde.alpha(sde.T) * mean + radius * (x.double() - mean) / variance.sqrt()
    torch.testing.assert_close(
        found.latent.double(), expected, rtol=0.02, atol=0.02 * float(sde.sigma(sde.T))
    )
    assert found.log_det is not None
    torch.testing.assert_close(
        found.log_det.double(),
        (radius / variance.sqrt()).log().sum().expand(3),
        rtol=0.01,
        atol=0.05 + 0.01 * size,
    )


class _Perturbed(Model):
    """A score 3 % off, in a pattern of its own."""

    def __init__(self, model: Model) -> None:
        self.model, self.sde, self.data_scale = model, model.sde, model.data_scale

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        size = x.shape[1]
        phase = torch.arange(size, dtype=x.dtype)
        exact = self.model.predict(prediction, x, t)
        return exact * (1 + 0.03 * torch.sin(x.roll(1, 1) + phase))


def test_a_perturbed_score_gets_the_likelihood_of_its_own_flow() -> None:
    mix, sde = random_mixture(24, 4, spread=1.0), VP()
    home = mix.score_model(sde)
    model = NetworkModel(lambda x, t: _Perturbed(home)(x, t), sde, "score")
    model.data_scale = home.data_scale
    x = mix.sample(48)
    long = log_likelihood(model, sde, x, trace="exact", solver=DormandPrince(1e-7, 1e-7))
    found = log_likelihood(model, sde, x)
    assert rms(long.log_prob - mix.log_prob(x)) > 0.6  # the perturbation matters
    # What is left is what probes and nodes leave, and that this model's own law at T is no prior.
    assert rms(found.log_prob - long.log_prob) < 0.5
    exact = log_likelihood(model, sde, x, trace="exact", nfe=64)
    assert rms(exact.log_prob - long.log_prob) < 0.25


def test_the_digits_network_agrees_with_a_long_exact_run() -> None:
    model = from_denoiser(load_network(dtype=torch.float64))
    x = to_unit(load_digits("test").levels[:3]).double()
    long = log_likelihood(model, VP(), x, trace="exact", nfe=40)
    found = log_likelihood(model, VP(), x, seed=2)
    z = (found.log_prob - long.log_prob) / found.standard_error
    assert bool((z.abs() < 4).all()) and rms(found.log_prob - long.log_prob) < 1.0


# Errors by their source


def test_an_exact_trace_has_no_standard_error_and_knows_its_other_errors() -> None:
    mix, sde = random_mixture(6, 3, spread=1.0), VP()
    x, model = mix.sample(128), mix.score_model(sde)
    truth = mix.log_prob(x)
    for nodes in (20, 40):
        found = log_likelihood(model, sde, x, trace="exact", nfe=nodes)
        budget = found.budget
        assert budget is not None and bool((found.standard_error == 0).all())
        assert torch.equal(budget.probes, found.standard_error)
        claimed = budget.path + budget.quadrature
        within = ((found.log_prob - truth).abs() < claimed + 1e-4).double().mean()
        assert float(within) > 0.9


def test_the_correction_at_the_data_end_is_of_first_order() -> None:
    """Starting late blurs the density to first order; the result has an error of second."""
    mix, sde = random_mixture(8, 1, spread=0.3, stds=(0.1, 0.4)), VP()
    x, model = mix.sample(64), mix.score_model(sde)
    errors, sizes = [], []
    for t in (1e-3, 2e-3):
        found = log_likelihood(model, sde, x, trace="exact", nfe=160, t_start=t)
        errors.append(rms(found.log_prob - mix.log_prob(x)))
        assert found.budget is not None
        sizes.append(float(found.budget.data_end.mean()))
        blurred = mix.marginal(sde, t).log_prob(x) - mix.log_prob(x)
        assert errors[-1] < rms(blurred) / 10
    assert 1.7 < sizes[1] / sizes[0] < 2.4  # sigma^2 is linear in t


def test_a_late_end_is_made_up_for_by_the_law_that_the_model_has_there() -> None:
    sde = EDM()
    mix = random_mixture(3, 3, spread=1.0)
    x = mix.sample(64) + 1.5  # a mean that a centred prior does not know
    moved = GaussianMixture(mix.weights, mix.means + 1.5, mix.covariances)
    model, truth = moved.score_model(sde), moved.log_prob(x)
    found = log_likelihood(model, sde, x, t_end=8.0, trace="exact", nfe=96)
    centred = log_likelihood(model, sde, x, t_end=8.0, solver="dopri5")
    error = found.log_prob - truth
    assert rms(error) < 0.01 < 0.2 < rms(centred.log_prob - truth)


def test_the_trace_beyond_a_late_end_is_counted() -> None:
    sde, mix = EDM(), gaussian(torch.zeros(3, dtype=torch.float64), 1.0)
    exact = mix.score_model(sde)
    model = NetworkModel(lambda x, t: exact(x, t), sde, "score")
    model.data_scale = scale_of_data(1.5, 3)  # not the data's own, so that there is a rest
    x = mix.sample(16)
    found = log_likelihood(model, sde, x, t_end=8.0, trace="exact", nfe=96)
    assert found.budget is not None
    error = float((found.log_prob - mix.log_prob(x)).abs().max())
    assert error < float(found.budget.prior.min()) / 2  # the end of the path has errors too


@pytest.mark.parametrize(
    ("sde", "t_end"), [(VP(), 0.5), (EDM(), 2.0), (RectifiedFlow(), 0.7)], ids=str
)
def test_the_determinant_is_that_of_the_map_to_any_time(sde: GaussianSDE, t_end: float) -> None:
    mix = random_mixture(3, 3, spread=1.0)
    x, model = mix.sample(64) + 0.5, mix.score_model(sde)
    found = log_likelihood(model, sde, x, t_end=t_end, trace="exact", nfe=96)
    assert found.log_det is not None
    # What a determinant is: p_0(x) / p_t(latent), both in closed form.
    ratio = mix.log_prob(x) - mix.marginal(sde, t_end).log_prob(found.latent)
    assert rms(found.log_det - ratio) < 0.01


# Rows


def test_rows_that_need_more_nodes_get_them_and_nobody_else() -> None:
    mix, sde = ring(), VP()
    x, model = mix.sample(256, seed=1), mix.score_model(sde)
    found = log_likelihood(model, sde, x, trace="exact", nfe=24)
    more = found.forwards > 24
    assert 0 < int(more.sum()) < 64
    alone = log_likelihood(model, sde, x[~more], trace="exact", nfe=24)
    torch.testing.assert_close(alone.log_prob, found.log_prob[~more], rtol=1e-9, atol=1e-9)
    assert float((found.log_prob - mix.log_prob(x)).abs().max()) < 0.5


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_no_row_depends_on_the_batch_even_if_taken_up_again(trace: str) -> None:
    mix, sde = ring(), VP()
    x, model = mix.sample(128, seed=1), mix.score_model(sde)
    options: dict[str, Any] = {"trace": trace, "nfe": 14}
    whole = log_likelihood(model, sde, x, seed=3, **options)
    assert bool((whole.forwards > 14).any())
    split = log_likelihood(model, sde, x, seed=3, chunk=50, **options)
    part = log_likelihood(model, sde, x[11:29], noise=Philox(3, first_sample=11), **options)
    for other, rows in ((split, slice(None)), (part, slice(11, 29))):
        for name in ("log_prob", "standard_error", "latent", "forwards", "products"):
            expected = getattr(whole, name)[rows]
            torch.testing.assert_close(getattr(other, name), expected, rtol=1e-8, atol=1e-8)


def test_a_scale_that_conditions_hide_is_asked_for() -> None:
    sde, mix = VP(), gaussian(torch.zeros(16, dtype=torch.float64), 25.0)
    x, model, label = mix.sample(32), mix.score_model(VP()), torch.zeros(32)

    def score(y: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return model(y, t)

    with pytest.warns(ModelWarning, match="set data_scale"):
        assumed = log_likelihood(score, sde, x, label=label)
    error = (assumed.log_prob - mix.log_prob(x)).abs()
    assert rms(error) > 0.1 and bool((error < 2 * assumed.standard_error).all())
    score.data_scale = scale_of_data(5.0, 16)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        found = log_likelihood(score, sde, x, label=label)
    assert rms(found.log_prob - mix.log_prob(x)) < 1e-3


# Samples with their density


@pytest.mark.parametrize("sde", [VP(), EDM(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
def test_samples_come_with_their_log_density(sde: GaussianSDE) -> None:
    mix = random_mixture(2, 3, spread=1.0)
    options: dict[str, Any] = {"seed": 4, "dtype": torch.float64}
    drawn = sample_with_log_prob(mix.score_model(sde), sde, (256, 2), **options)
    assert drawn.x is not None and bool(drawn.ok.all())
    truth = mix.log_prob(drawn.x)
    assert float((drawn.log_prob - truth).abs().median()) < 2e-3
    assert rms(drawn.log_prob - truth) < 0.05
    assert drawn.log_det is not None
    at_noise = mix.marginal(sde, sde.T).log_prob(drawn.latent)
    assert rms(drawn.log_det - (truth - at_noise)) < 0.05
    again = log_likelihood(mix.score_model(sde), sde, drawn.x)
    assert float((again.latent - drawn.latent).abs().median()) < 2e-3 * sde.prior_std
    parts = sample_with_log_prob(mix.score_model(sde), sde, (256, 2), chunk=100, **options)
    assert parts.x is not None
    torch.testing.assert_close(parts.x, drawn.x)
    # E[-log p] of draws from p is the entropy; compare with the mixture's own draws.
    own = mix.log_prob(mix.sample(4096))
    gap = float(drawn.log_prob.mean() - own.mean())
    assert abs(gap) < 4 * float(own.std()) * math.sqrt(1 / 256 + 1 / 4096)


def test_the_way_to_data_is_the_way_to_noise_backwards() -> None:
    sde, mix = EDM(), random_mixture(2, 3, spread=1.0)
    model = mix.score_model(sde)
    options: dict[str, Any] = {"trace": "exact", "nfe": 120}
    drawn = sample_with_log_prob(model, sde, (64, 2), dtype=torch.float64, **options)
    assert drawn.x is not None
    again = log_likelihood(model, sde, drawn.x, **options)
    assert float((again.latent - drawn.latent).abs().median()) < 1e-6 * sde.prior_std
    # From sigma = 0.1 on, the noise that is left is removed to first order.
    late = sample_with_log_prob(model, sde, (64, 2), dtype=torch.float64, t_end=0.1, **options)
    assert late.x is not None
    assert float((late.x - drawn.x).abs().median()) < 1e-3


# Any process


TIGHT = DormandPrince(1e-8, 1e-8)


def test_a_nonlinear_drift_has_a_likelihood_with_the_prior_that_is_given() -> None:
    sde = BenesSDE()
    weights, starts = torch.tensor([0.4, 0.6]).double(), torch.tensor([[0.3], [-0.8]]).double()
    density = functools.partial(benes_log_density, sde, weights, starts)

    def score(x: Tensor, t: TimeLike) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            total = density(leaf, as_time(t).expand(len(x)).to(x)).sum()
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        return gradient

    def law(y: Tensor) -> Tensor:
        return density(y, torch.full((len(y),), sde.T).double())

    x, early = normal(generator(0), 16, 1), torch.full((16,), 0.2).double()
    found = log_likelihood(score, sde, x, t_start=0.2, prior=law, solver=TIGHT)
    torch.testing.assert_close(found.log_prob, density(x, early), rtol=0, atol=1e-6)
    drawn = sample_with_log_prob(score, sde, x=x, t_end=0.2, prior=law, solver=TIGHT)
    assert drawn.x is not None and drawn.log_det is not None
    expected = density(drawn.x, early)
    torch.testing.assert_close(drawn.log_prob, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.log_det, expected - law(x), rtol=0, atol=1e-6)
    with pytest.raises(ArgumentError, match="prior="):
        log_likelihood(score, sde, x)
    with pytest.raises(ShapeError, match="Independent"):
        law = torch.distributions.Normal(0.0, 1.0)
        log_likelihood(score, sde, x, t_start=0.2, prior=law, solver=DormandPrince(1e-2, 1e-2))


@pytest.mark.parametrize("solver", [TIGHT, "rk4_flow"], ids=["adaptive", "fixed"])
def test_drift_and_diffusion_alone_give_the_numbers_of_the_process(solver: Any) -> None:
    mix = random_mixture(2, 3, spread=1.0)
    score = mix.score_model(VP())
    z = normal(generator(2), 24, 2)
    prior = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2).double(), 1.0), 1
    )
    options: dict[str, Any] = {"solver": solver, "nfe": None if solver is TIGHT else 200}

    def bare(x: Tensor, t: Tensor) -> Tensor:
        return score(x, t)

    drawn = sample_with_log_prob(bare, OwnVP(), x=z, prior=prior, chunk=7, **options)
    known = sample_with_log_prob(score, VP(), x=z, t_end=1e-3, **options)
    assert drawn.x is not None and drawn.log_det is not None and known.x is not None
    bound = {"rtol": 0, "atol": 1e-6 if solver is TIGHT else 1e-9}
    for name in ("x", "latent", "log_prob", "log_det", "standard_error"):
        torch.testing.assert_close(getattr(drawn, name), getattr(known, name), **bound)
    assert torch.equal(drawn.latent, z) and bool(drawn.ok.all())
    exact = mix.marginal(VP(), 1e-3).log_prob(drawn.x) - mix.marginal(VP(), 1.0).log_prob(z)
    close = {"rtol": 0, "atol": 1e-6 if solver is TIGHT else 1e-3}
    torch.testing.assert_close(drawn.log_det, exact, **close)
    torch.testing.assert_close(drawn.log_prob, exact + prior.log_prob(z), **close)
    back = log_likelihood(bare, OwnVP(), drawn.x, prior=prior, **options)
    again = log_likelihood(score, VP(), drawn.x, t_start=1e-3, **options)
    for name in ("latent", "log_prob", "log_det"):
        torch.testing.assert_close(getattr(back, name), getattr(again, name), **bound)
        torch.testing.assert_close(getattr(back, name), getattr(drawn, name), **close)


@pytest.mark.parametrize("well", wells(), ids=["overdamped", "underdamped"])
def test_langevin_dynamics_carry_a_density_from_one_end_to_the_other(well: Well) -> None:
    x = normal(generator(3), 12, len(well.start), 3)
    for solver in (TIGHT, "auto"):
        found = log_likelihood(
            well.score, well.sde, x, prior=lambda y: well.log_prob(y, 0.6), solver=solver
        )
        expected = well.log_prob(x, 0.0).detach()
        atol = 1e-6 if solver is TIGHT else 0.02
        torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=atol)
        drawn = sample_with_log_prob(
            well.score, well.sde, x=x, prior=lambda y: well.log_prob(y, 0.6), solver=solver
        )
        assert drawn.x is not None and not drawn.log_prob.requires_grad
        expected = well.log_prob(drawn.x, 0.0).detach()
        torch.testing.assert_close(drawn.log_prob, expected, rtol=0, atol=atol)


def test_probes_of_samples_are_unbiased_and_know_their_error() -> None:
    mix, rows = random_mixture(8, 3, spread=1.0), 256
    score, z = mix.score_model(VP()), normal(generator(2), rows, 8)

    def bare(x: Tensor, t: Tensor) -> Tensor:
        return score(x, t)

    def drawn(**options: Any) -> Likelihood:
        grid = torch.linspace(1, 1e-3**0.5, 41).double().square()
        return sample_with_log_prob(
            bare,
            OwnVP(),
            x=z,
            prior=lambda y: -y.square().sum(1) / 2,
            grid=grid,
            solver="rk4_flow",
            **options,
        )

    exact, count = drawn(trace="exact"), 16
    found = drawn(trace="hutchinson", probes=count, seed=3)
    assert torch.equal(found.latent, z) and exact.x is not None
    torch.testing.assert_close(found.x, exact.x)
    error = (found.log_prob - exact.log_prob) / found.standard_error
    n = count - 1  # Student's t, whose square has the mean n / (n - 2)
    spread = math.sqrt(2 * n**2 * (n - 1) / ((n - 2) ** 2 * (n - 4)) / rows)
    assert abs(float(error.square().mean()) - n / (n - 2)) < 4 * spread
    assert abs(float(error.mean())) < 4 * math.sqrt(n / (n - 2) / rows)
    split = drawn(trace="hutchinson", probes=count, seed=3, chunk=100)
    torch.testing.assert_close(split.log_prob, found.log_prob)


def test_a_gaussian_process_draws_its_start_for_any_solver() -> None:
    for sde, t_start in ((EDM(), 40.0), (VP(), 1.0)):
        mix = random_mixture(2, 3, spread=1.0)
        model = mix.score_model(sde)
        options: dict[str, Any] = {"seed": 4, "t_start": t_start, "t_end": sde.t_min}
        drawn = sample_with_log_prob(
            model, sde, (64, 2), solver=TIGHT, dtype=torch.float64, **options
        )
        std = sde.prior_std * float(sde.sigma(t_start) / sde.sigma(sde.T))
        z = Philox(4).normal(torch.empty(64, 2).double(), 0, Purpose.START)
        torch.testing.assert_close(drawn.latent, std * z)
        given = sample_with_log_prob(model, sde, x=std * z, solver=TIGHT, **options)
        torch.testing.assert_close(given.log_prob, drawn.log_prob)
        assert drawn.x is not None
        ratio = mix.marginal(sde, sde.t_min).log_prob(drawn.x)
        ratio = ratio - mix.marginal(sde, t_start).log_prob(drawn.latent)
        normal_law = -z.square().sum(1) / 2 - 2 * math.log(std) - math.log(2 * math.pi)
        torch.testing.assert_close(drawn.log_prob, ratio + normal_law, rtol=0, atol=1e-5)


def test_a_start_that_is_no_number_leaves_its_neighbours_untouched() -> None:
    score, z = random_mixture(2, 2).score_model(VP()), normal(generator(5), 3, 2)
    prior = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2).double(), 1.0), 1
    )
    whole = sample_with_log_prob(score, VP(), x=z, prior=prior)
    z[1] = torch.nan
    found = sample_with_log_prob(score, VP(), x=z, prior=prior)
    assert found.ok.tolist() == [True, False, True] and bool(found.log_prob[1].isnan())
    torch.testing.assert_close(found.log_prob[::2], whole.log_prob[::2])


def test_conditions_follow_the_samples_that_are_drawn() -> None:
    mix, shift = random_mixture(2, 2), torch.arange(7).double()[:, None]
    score, z = mix.score_model(VP()), normal(generator(5), 7, 2)

    def moved(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return score(x - VP().alpha(t)[:, None] * shift, t)

    def law(y: Tensor) -> Tensor:
        return -y.square().sum(1) / 2

    found = sample_with_log_prob(moved, OwnVP(), x=z, prior=law, solver=TIGHT, chunk=3, shift=shift)
    start = z - VP().alpha(1.0) * shift
    plain = sample_with_log_prob(score, VP(), x=start, prior=law, t_end=1e-3, solver=TIGHT)
    assert found.x is not None and plain.x is not None
    expected = plain.x + VP().alpha(1e-3) * shift
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_det, plain.log_det, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ArgumentError, "no prior to draw from: give the start x=", {"shape": (2, 3)}),
        (ArgumentError, "give the start x=", {"shape": (2, 3), "prior": torch.sum}),
        (ArgumentError, "give the start x=", {"sde": VP(), "shape": (2, 3), "prior": torch.sum}),
        (ArgumentError, "prior=", {"x": torch.zeros(2, 3)}),
        (ArgumentError, "prior is float", {"x": torch.zeros(2, 3), "prior": 1.0}),
        (ArgumentError, "either shape=", {}),
        (ArgumentError, "not both", {"shape": (2, 3), "x": torch.zeros(2, 3)}),
        (ArgumentError, "x= has its own", {"x": torch.zeros(2, 3), "dtype": torch.float32}),
        (ShapeError, "Independent", {"x": torch.zeros(2, 3), "prior": torch.square}),
        (ShapeError, "at least one", {"x": torch.zeros(0, 3), "prior": torch.sum}),
        (GridError, "give decreasing", {"sde": VP(), "shape": (2, 3), "t_start": 0.1, "t_end": 1}),
        (
            GridError,
            "give decreasing",
            {"x": torch.zeros(2, 3), "prior": torch.sum, "grid": (0.1, 1), "solver": "ab3_flow"},
        ),
        (ArgumentError, "steps= does not", {"sde": VP(), "shape": (2, 3), "steps": 4}),
        (ArgumentError, "cost= does not", {"x": torch.zeros(2, 3), "prior": torch.sum, "cost": 99}),
        (
            ArgumentError,
            "draws noise",
            {"x": torch.zeros(2, 3), "prior": torch.sum, "solver": "euler_maruyama"},
        ),
    ],
)
def test_samples_with_a_density_need_a_law_to_start_from(
    kind: type[Exception], message: str, options: dict[str, Any]
) -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises(kind, match=message):
        sample_with_log_prob(score, **{"sde": OwnVP(), **options})


# Ways to differentiate


def test_a_network_under_no_grad_is_differentiated_forward() -> None:
    mix, sde = random_mixture(3, 2, spread=1.0), VP()
    model, x = mix.score_model(sde), mix.sample(5)

    @torch.no_grad()
    def guarded(y: Tensor, t: Tensor) -> Tensor:
        return model(y, t)

    guarded.data_scale = model.data_scale  # type: ignore[attr-defined]
    expected = log_likelihood(model, sde, x, solver="ab3_flow", nfe=20).log_prob
    found = log_likelihood(guarded, sde, x, solver="ab3_flow", nfe=20).log_prob
    torch.testing.assert_close(found, expected)
    assert torch.equal(log_likelihood(guarded, sde, x).status, torch.full((5,), int(Status.OK)))
