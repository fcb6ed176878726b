"""Bounds against closed forms: Gaussian chains, mixtures, masses by distribution functions.

Rows of one data point with noises of their own are the Monte Carlo sample: a mean over n of them is
held against its expectation within five standard errors.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import generator, mixtures, normal, processes, seeds
from torch import Tensor
from torch.distributions import Normal

import scoresolve as ss
from scoresolve.bounds import (
    TimeProposal,
    bits_per_dim,
    continuous_bound,
    dequantised_log_prob,
    fit_times,
    ito_bound,
    ito_log_density,
    variational_bound,
)
from scoresolve.errors import ArgumentError, GridError, ShapeError, UnknownNameError
from scoresolve.sde import GaussianSDE, linear_betas
from scoresolve.transitions import GaussianChain

VARIANCES = ("posterior", "beta")


def agree(found: Tensor, expected: Tensor | float, spare: float = 1e-9) -> None:
    """The mean of `found` over its first axis is `expected`, within five standard errors."""
    error = found.std(0) / math.sqrt(len(found)) + spare
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())


def rows(value: Tensor, count: int) -> Tensor:
    return value.expand(count, *value.shape)


def mixture(case) -> ss.GaussianMixture:
    return ss.GaussianMixture(case.weights, case.means, case.variances)


def chain(steps: int = 12) -> ss.DiscreteVP:
    return ss.DiscreteVP.from_betas(linear_betas(steps, 0.02, 0.5))


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_terms_are_those_of_ddpm(variance):
    betas = linear_betas(12, 0.02, 0.5)
    bars = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1), bars[:-1]])
    x, slope = torch.tensor([0.7, -1.2, 0.4]).double(), 0.6

    model = ss.from_eps(lambda x, t: slope * x, chain())
    bound = variational_bound(model, chain(), rows(x, 4000), variance=variance)

    # E|eps - slope x_t|^2 for x_t = sqrt(bar) x + sqrt(1 - bar) eps
    noise = (1 - slope * (1 - bars).sqrt()).square() * 3 + slope**2 * bars * x.square().sum()
    tilde = (1 - before) / (1 - bars) * betas
    var = tilde if variance == "posterior" else betas
    squares = betas**2 / (2 * var * (1 - betas) * (1 - bars)) * noise
    apart = 3 * (tilde / var - 1 - (tilde / var).log()) / 2
    assert bound.terms is not None
    agree(bound.terms, (squares + apart)[1:])
    agree(bound.reconstruction, reconstruction(betas[0], noise[0]))
    prior = bars[-1] * x.square().sum() / 2 - 3 / 2 * (bars[-1] + (1 - bars[-1]).log())
    torch.testing.assert_close(bound.prior, rows(prior, 4000))
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(1) + bound.reconstruction)
    torch.testing.assert_close(bound.bits_per_dim, bound.total / (3 * math.log(2)))
    assert bound.nfe == 12


def reconstruction(beta: Tensor, noise: Tensor) -> Tensor:
    """-E log N(x; x0(x_1), beta) in 3-D, where x - x0 = sqrt(beta/(1 - beta)) error."""
    return noise / (2 * (1 - beta)) + 3 / 2 * (2 * math.pi * beta).log()


@settings(max_examples=10)
@example(spread=0.05, guess=-3.0, count=9)
@given(spread=st.floats(1e-3, 10), guess=st.floats(-3, 3), count=st.integers(2, 40))
def test_the_discretised_decoder_gives_masses_that_sum_to_one(spread, guess, count):
    levels = torch.linspace(-1, 1, count, dtype=torch.float64)
    model = ss.from_x0(lambda x, t: torch.full_like(x, guess), chain())
    bound = variational_bound(
        model, chain(), levels[:, None], levels=levels, decoder_std=spread, terms=1
    )
    assert abs(float((-bound.reconstruction).exp().sum()) - 1) < 1e-9
    law = Normal(*torch.tensor([guess, spread], dtype=torch.float64))
    half = 1 / (count - 1)
    inner = law.cdf(levels[1:-1] + half) - law.cdf(levels[1:-1] - half)
    ends = law.cdf(levels[:1] + half), 1 - law.cdf(levels[-1:] - half)
    masses = torch.cat([ends[0], inner, ends[1]])
    torch.testing.assert_close((-bound.reconstruction).exp(), masses, rtol=1e-6, atol=1e-12)
    mirror = ss.from_x0(lambda x, t: torch.full_like(x, -guess), chain())
    other = variational_bound(
        mirror, chain(), levels[:, None], levels=levels, decoder_std=spread, terms=1
    )
    torch.testing.assert_close(other.reconstruction.flip(0), bound.reconstruction)
    assert bool(bound.reconstruction.isfinite().all())


@pytest.mark.parametrize("steps", [2, 12])
def test_with_the_larger_variance_the_bound_is_tight_for_standard_normal_data(steps):
    sde, x = chain(steps), torch.tensor([0.3, -1.7]).double()
    model = ss.targets.gaussian(torch.zeros(2).double(), 1.0).score_model(sde)
    bound = variational_bound(model, sde, rows(x, 20000), variance="beta")
    agree(bound.total, -Normal(0.0, 1.0).log_prob(x).sum())


def test_with_the_smaller_variance_the_chain_of_a_point_costs_nothing():
    x = torch.tensor([[0.5, -0.2]]).double()
    model = ss.from_x0(lambda y, t: x.expand_as(y), chain())
    bound = variational_bound(model, chain(), x, draws=2)
    assert float(bound.diffusion) == 0.0 and float(bound.standard_error) == 0.0
    assert float(variational_bound(model, chain(), x, variance="beta").diffusion) > 0.1


def test_the_bound_of_a_mixture_is_a_bound_and_tightens_with_the_grid():
    target, sde = ss.targets.random_mixture(2, components=3), ss.VP()
    x = target.sample(400)
    model, truth = target.score_model(sde), target.log_prob(x)
    gaps = [variational_bound(model, sde, x, steps=n, draws=4).total + truth for n in (15, 60, 240)]
    means = [float(gap.mean()) for gap in gaps]
    errors = [float(gap.std()) / 20 for gap in gaps]
    assert all(mean > -5 * error for mean, error in zip(means, errors, strict=True))
    assert means[0] > 2.5 * means[1] > 6 * (means[2] - 5 * errors[2])


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_few_random_terms_have_the_mean_of_all(variance):
    sde, x = chain(), torch.tensor([0.7, -1.2, 0.4]).double()
    model = ss.from_eps(lambda x, t: 0.5 * x, sde)
    few = variational_bound(model, sde, rows(x, 20000), terms=3, variance=variance)
    every = variational_bound(model, sde, rows(x, 20000), variance=variance, seed=1)
    assert few.terms is None and few.nfe == 4
    difference = few.diffusion - every.diffusion
    agree(difference, 0.0)


def gaussian_divergence(sde: GaussianSDE, x: Tensor, v: Tensor, t: float) -> Tensor:
    """E log q(x_t|x)/q(x_t) for data N(0, v), by closed form, elementwise summed."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    whole = alpha**2 * v + sigma**2
    square = alpha**2 * x.square() + sigma**2
    return (square / whole - 1 - (sigma**2 / whole).log()).sum(-1) / 2


@settings(max_examples=25)
@given(sde=processes(), seed=seeds(), low=st.floats(0.02, 0.3), high=st.floats(0.5, 0.98))
def test_the_continuous_integral_of_the_exact_score_is_that_of_each_sample(sde, seed, low, high):
    rng = generator(seed)
    x, v = normal(rng, 3), torch.exp(normal(rng, 3))
    model = ss.targets.gaussian(torch.zeros(3).double(), v).score_model(sde)
    ends = {"t_start": low * sde.T, "t_end": high * sde.T}
    bound = continuous_bound(model, sde, rows(x, 1500), nodes=4, draws=1, seed=seed, **ends)
    expected = [gaussian_divergence(sde, x, v, t) for t in ends.values()]
    agree(bound.diffusion, expected[0] - expected[1], 1e-6)


@settings(max_examples=8)
@given(case=mixtures(), seed=seeds())
def test_the_continuous_bound_of_an_exact_score_is_tight_but_for_its_ends(case, seed):
    sde, target, n = ss.VP(), mixture(case), 4000
    x = target.sample(1, seed=seed)[0]
    ends = {"t_start": 0.05, "t_end": 0.5}
    bound = continuous_bound(
        target.score_model(sde), sde, rows(x, n), nodes=4, draws=1, seed=seed, **ends
    )
    # the gap: decoder against the posterior q(x|x_1), prior against the marginal q(x_T)
    z = normal(generator(seed), n, case.dim)
    first, last = (sde.marginal(rows(x, n), t) for t in ends.values())
    y, std = first[0] + first[1] * z, float(first[1])
    posterior = Normal(first[0], std).log_prob(y).sum(1) + target.log_prob(x[None])
    posterior = posterior - target.marginal(sde, ends["t_start"]).log_prob(y)
    alpha = float(sde.alpha(ends["t_start"]))
    decoder = Normal(y / alpha, std / alpha).log_prob(x).sum(1)
    y = last[0] + last[1] * z
    prior = Normal(0.0, sde.prior_std).log_prob(y).sum(1)
    gap = posterior - decoder + target.marginal(sde, ends["t_end"]).log_prob(y) - prior
    agree(bound.total + target.log_prob(x[None]) - gap, 0.0)


def test_an_error_of_the_model_adds_its_weighted_square():
    target, sde, off = ss.targets.random_mixture(2, components=3), ss.VP(), 0.4
    exact, x = target.score_model(sde), target.sample(20000)
    wrong = ss.from_x0(lambda x, t: exact.predict("x0", x, t) + off, sde)
    bounds = [
        continuous_bound(model, sde, x, nodes=4, draws=1, t_start=0.1, t_end=0.9).diffusion
        for model in (wrong, exact)
    ]
    snr = [float(sde.log_snr(t).exp()) for t in (0.1, 0.9)]
    agree(bounds[0] - bounds[1], 2 * off**2 / 2 * (snr[0] - snr[1]))


def test_every_proposal_gives_the_same_bound_and_a_fitted_one_less_variance():
    target, sde = ss.targets.random_mixture(4, components=3), ss.VP()
    model, x = target.score_model(sde), rows(target.sample(1)[0], 3000)
    even = continuous_bound(model, sde, x, nodes=2, draws=1)
    fitted = fit_times(model, sde, target.sample(64, seed=1))
    edges = fitted.edges
    odd = TimeProposal((edges[0], edges[-1] / 3, edges[-1]), (0.7, 0.3))
    found = [
        continuous_bound(model, sde, x, times=times, nodes=2, draws=1, seed=1, stratified=even_too)
        for times, even_too in ((fitted, True), (odd, True), (None, False))
    ]
    for other in found:
        agree(other.diffusion - even.diffusion, 0.0)
    assert found[0].diffusion.var() < 0.8 * found[2].diffusion.var()


def test_spreading_times_and_lengths_lowers_the_variance():
    sde, target = ss.VP(), ss.targets.gaussian(torch.zeros(16).double(), 1.0)
    model, x = target.score_model(sde), rows(target.sample(1)[0], 500)

    def variance(nodes: int, draws: int, stratified: bool) -> float:
        bound = continuous_bound(
            model, sde, x, nodes=nodes, draws=draws, stratified=stratified, seed=nodes
        )
        torch.testing.assert_close(
            bound.standard_error.square().mean(), bound.total.var(), rtol=0.3, atol=0
        )
        return float(bound.total.var())

    # a variance of 500 rows is known to 6 %
    assert variance(16, 4, True) < 0.5 * variance(16, 4, False)


def test_data_on_levels_costs_the_entropy_of_its_law():
    sde, levels = ss.VP(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    target = ss.GaussianMixture.from_data(levels[:, None], 0.0)
    x, n = levels[[1, 3]], 4000
    bound = continuous_bound(
        target.score_model(sde),
        sde,
        rows(x[:1], n),
        nodes=8,
        draws=1,
        levels=levels,
        t_start=0.05,
    )
    assert float(bound.reconstruction.mean()) > 0.05  # the noise hides the level at times
    gap = 0.5e-3  # of the prior, at most alpha(T)^2 E x^2 / (2 prior_std^2)
    agree(bound.total, math.log(5), gap)
    late = continuous_bound(target.score_model(sde), sde, rows(x[:1], 10), levels=levels)
    assert float(late.reconstruction.abs().max()) < 1e-9


def test_the_bounds_of_a_sample_do_not_depend_on_its_batch():
    target, sde = ss.targets.random_mixture(3), ss.VP()
    model, x = target.score_model(sde), target.sample(6)
    part = ss.Philox(7, 2)
    for estimate in (
        lambda y, noise: variational_bound(model, sde, y, steps=5, terms=2, noise=noise).total,
        lambda y, noise: continuous_bound(model, sde, y, nodes=4, draws=2, noise=noise).total,
        lambda y, noise: ito_bound(model, sde, y, steps=5, noise=noise).log_prob,
        lambda y, noise: dequantised_log_prob(target.log_prob, y, 0.1, noise=noise).log_prob,
    ):
        torch.testing.assert_close(estimate(x, ss.Philox(7))[2:], estimate(x[2:], part))


def test_along_a_sampled_path_the_estimator_follows_the_density():
    target, sde = ss.targets.random_mixture(2, components=3), ss.VP()
    model = target.score_model(sde)
    errors = []
    for steps in (50, 200, 800):
        times = ss.make_grid("log_snr", sde, steps, 0.999, 0.01).times
        plan = ss.plan("ddpm_forward", sde, times)
        start = target.marginal(sde, times[0]).sample(200, seed=1)
        states = GaussianChain(plan).rollout(model, start, ss.Philox(2)).states
        truth = torch.stack(
            [target.marginal(sde, t).log_prob(x) for t, x in zip(times, states, strict=True)]
        )
        found = ito_log_density(model, sde, states, times, log_prob=truth[0])
        back = ito_log_density(model, sde, states.flip(0), times[::-1], log_prob=truth[0])
        torch.testing.assert_close(back.flip(0), found)
        errors.append(float((found - truth)[-1].square().mean().sqrt()))
    # the error of a path has variance 1/steps; 200 paths know its root to 5 %
    assert all(1.6 < a / b < 2.5 for a, b in itertools.pairwise(errors))
    # var(z^T H z h / 2) summed over the steps, with h H = I dlog SNR at high SNR, bounds it
    spread = float(sde.log_snr(0.01) - sde.log_snr(0.999))
    assert errors[-1] < 1.1 * spread * (2 / (2 * 800)) ** 0.5


@settings(max_examples=10)
@given(mean=st.floats(-1, 1), v=st.floats(0.5, 2), x=st.floats(-1.5, 1.5), seed=seeds())
def test_the_weights_of_the_paths_are_unbiased_for_the_density_of_the_chain(mean, v, x, seed):
    sde, n = ss.VP(), 20000
    times = (0.2, 0.25, 0.3, 0.35, 0.4)
    target = ss.targets.gaussian(torch.tensor([mean]).double(), v)
    data = torch.full((n, 1), x, dtype=torch.float64)
    bound = ito_bound(target.score_model(sde), sde, data, grid=times, draws=1, seed=seed)
    # the chain y' = y + h s(y) + sqrt(h) z on Gaussian data, started from the prior
    alpha, k2 = (float(sde.alpha(0.4)), [float((-sde.log_snr(t)).exp()) for t in times])
    centre, spread = 0.0, (sde.prior_std / alpha) ** 2
    for before, after in itertools.pairwise(reversed(k2)):
        gain = (before - after) / (v + before)
        centre, spread = (
            centre + gain * (mean - centre),
            (1 - gain) ** 2 * spread + before - after,
        )
    first = float(sde.alpha(0.2))
    density = Normal(first * centre, first * spread**0.5).log_prob(torch.tensor(x).double())
    agree((bound.paths[0] - density).exp(), 1.0)
    assert float(bound.paths.mean()) < float(density) + 5 * float(bound.paths.std()) / n**0.5


def test_the_bound_along_noised_paths_tightens_with_steps_and_with_paths():
    target, sde = ss.targets.random_mixture(2, components=3), ss.VP()
    model, x = target.score_model(sde), target.sample(300)
    truth = target.marginal(sde, sde.t_min).log_prob(x)
    few = ito_bound(model, sde, x, steps=50, draws=16)
    many = ito_bound(model, sde, x, steps=200, draws=4)
    gaps = [truth - few.log_prob, truth - many.log_prob, truth - few.importance_weighted]
    errors = [float(gap.std()) / 300**0.5 for gap in gaps]
    assert float(gaps[1].mean()) > -5 * errors[1]
    assert float(gaps[0].mean()) > 2.5 * float(gaps[1].mean()) - 5 * errors[1]
    assert float(gaps[2].mean()) < 0.6 * float(gaps[0].mean())
    assert few.nfe == 16 * 50
    torch.testing.assert_close(few.bits_per_dim, -few.log_prob / (2 * math.log(2)))


def line() -> tuple[ss.GaussianMixture, Tensor, float]:
    """A mixture in the plane, lower edges of bins, and their width."""
    target = ss.GaussianMixture(
        torch.tensor([0.4, 0.6]).double(),
        torch.tensor([[-0.5, 0.2], [0.4, -0.3]]).double(),
        torch.tensor([[0.04, 0.09], [0.02, 0.05]]).double(),
    )
    width = 0.5
    return target, ((target.sample(20) / width).floor() * width), width


def test_weighted_dequantisation_rises_to_the_exact_mass():
    target, x, width = line()
    laws = Normal(target.means, target.covariances.diagonal(dim1=1, dim2=2).sqrt())
    sides = laws.cdf(x[:, None] + width) - laws.cdf(x[:, None])
    exact = (target.weights * sides.prod(2)).sum(1).log()
    n = 500
    gaps = []
    for draws in (1, 4, 16, 64):
        data = x.repeat(n, 1)
        found = dequantised_log_prob(target.log_prob, data, width, draws=draws, seed=draws)
        gaps.append((exact - found.log_prob.reshape(n, 20).mean(0)).mean())
        error = found.log_prob.reshape(n, 20).std(0).square().mean().sqrt()
        if draws == 64:
            mean = found.standard_error.square().mean().sqrt()
            torch.testing.assert_close(mean, error, rtol=0.1, atol=0)
    assert all(a > 2 * b > 0 for a, b in itertools.pairwise(map(float, gaps)))
    assert float(gaps[-1]) < 0.03
    one = dequantised_log_prob(target.log_prob, x, width)
    assert bool(one.standard_error.isnan().all())
    torch.testing.assert_close(one.bits_per_dim, bits_per_dim(one.log_densities[0], 2, width))


def test_dequantisation_takes_the_result_of_a_likelihood():
    target, x, width = line()
    sde = ss.VP()
    found = dequantised_log_prob(
        lambda y: ss.log_likelihood(target.score_model(sde), sde, y), x[:4], width, draws=2
    )
    exact = dequantised_log_prob(target.log_prob, x[:4], width, draws=2)
    torch.testing.assert_close(found.log_prob, exact.log_prob, rtol=0, atol=3e-3)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_error_of_probes_counts_in_a_dequantised_mass(fresh):
    target, sde, width, rows = ss.targets.random_mixture(16, 3, spread=1.0), ss.VP(), 0.02, 300
    model = target.score_model(sde)
    x = (target.sample(rows) / width).floor() * width

    def density(y, noise=None):
        return ss.log_likelihood(model, sde, y, cost=64, noise=noise)

    given = density if fresh else lambda y: density(y)
    found = dequantised_log_prob(given, x, width, draws=6, seed=1)
    exact = dequantised_log_prob(target.log_prob, x, width, draws=6, seed=1)
    error = (found.log_prob - exact.log_prob).abs()
    assert float(exact.standard_error.mean()) < float(found.standard_error.mean()) / 3
    # 68 %, less a little for Student's t of 5 degrees of freedom; three binomial deviations.
    within = float((error < found.standard_error).double().mean())
    assert abs(within - (0.64 if fresh else 0.68)) < 3 * math.sqrt(0.68 * 0.32 / rows)
    if fresh:  # a sample's noise is its own, whatever the batch
        part = dequantised_log_prob(
            density, x[5:9], width, draws=6, noise=ss.Philox(1, first_sample=5)
        )
        torch.testing.assert_close(part.log_prob, found.log_prob[5:9])


@pytest.mark.parametrize("shape", [(), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_event_shape_and_dtype_will_do(shape, dtype):
    sde = ss.EDM()
    model = ss.from_denoiser(lambda x, s: x / (1 + s.reshape(-1, *(1,) * (x.ndim - 1)) ** 2), sde)
    x = normal(generator(0), 3, *shape).to(dtype)
    bounds = (
        variational_bound(model, sde, x, steps=4).total,
        continuous_bound(model, sde, x, nodes=3, draws=2).total,
        ito_bound(model, sde, x, steps=4).log_prob,
        dequantised_log_prob(lambda y: -y.reshape(3, -1).square().sum(1), x, 0.1, draws=2).log_prob,
    )
    assert all(bound.shape == (3,) and bool(bound.isfinite().all()) for bound in bounds)


def test_bad_input_is_refused():
    sde, x = ss.VP(), torch.zeros(2, 2).double()
    model = ss.targets.ring().score_model(sde)
    levels = torch.linspace(-1, 1, 4)
    for error, call in (
        (UnknownNameError, lambda: variational_bound(model, sde, x, variance="learned")),
        (ArgumentError, lambda: variational_bound(model, sde, x, levels=levels)),
        (ShapeError, lambda: variational_bound(model, sde, x, levels=levels.flip(0))),
        (ArgumentError, lambda: variational_bound(model, sde, x, terms=101)),
        (ArgumentError, lambda: variational_bound(model, sde, x, steps=3, grid=[0.1, 0.2])),
        (GridError, lambda: variational_bound(model, sde, x, grid=[0.0, 0.2])),
        (GridError, lambda: continuous_bound(model, sde, x, t_start=0.0)),
        (GridError, lambda: continuous_bound(model, sde, x, t_start=0.5, t_end=0.4)),
        (ArgumentError, lambda: continuous_bound(model, sde, x, times=TimeProposal((0, 1), (1,)))),
        (ArgumentError, lambda: TimeProposal((0.0, 1.0), (0.5,))),
        (ArgumentError, lambda: TimeProposal((1.0, 0.0), (1.0,))),
        (ArgumentError, lambda: ito_bound(model, ss.Langevin(lambda x: -x), x)),
        (GridError, lambda: ito_bound(model, sde, x, grid=[0.9, 0.1])),
        (ShapeError, lambda: ito_log_density(model, sde, x[None], [0.9, 0.1])),
        (ShapeError, lambda: dequantised_log_prob(lambda y: y, x, 0.1)),
        (ArgumentError, lambda: dequantised_log_prob(lambda y: y, x, 0.0)),
    ):
        with pytest.raises(error):
            call()
