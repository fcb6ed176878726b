"""The Gaussian diffusion chain, held against Bayes' rule, dense recursions and its limit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, normal
from torch import Tensor

import scoresolve as ss
from scoresolve.chains import DiffusionChain
from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.sde import (
    constant_betas,
    cosine_betas,
    forgetting_betas,
    linear_betas,
    sampled_betas,
    scaled_linear_betas,
)
from scoresolve.targets.linear_gaussian import Moments, condition, log_density

F64 = torch.float64
BETAS = {
    "constant": constant_betas(20, 0.15),
    "linear": linear_betas(20, 0.005, 0.6),
    "scaled linear": scaled_linear_betas(20, 0.01, 0.4),
    "cosine": cosine_betas(20),
    "forgetting": forgetting_betas(20),
    "sampled": sampled_betas(ss.VP(), 40),
}
VARIANCES = ("posterior", "beta")
every_schedule = pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)


def close(found: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=F64).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# The noise rates


def test_each_schedule_has_its_published_alpha_bar() -> None:
    t = torch.arange(1, 21, dtype=F64)
    angle = torch.cos((torch.arange(21, dtype=F64) / 20 + 0.008) / 1.008 * math.pi / 2) ** 2
    close(DiffusionChain(BETAS["constant"]).alpha_bars, 0.85**t)
    close(DiffusionChain(BETAS["forgetting"]).alpha_bars, 1 - t / 20)
    close(DiffusionChain(BETAS["cosine"]).alpha_bars[:-1], (angle / angle[0])[1:-1])
    assert float(BETAS["cosine"][-1]) == 0.999
    assert [chain.alpha_bar(t) for chain in [DiffusionChain([0.5, 0.2])] for t in range(3)] == [
        1.0,
        0.5,
        0.4,
    ]
    vp, h = ss.VP(0.1, 20.0), 1 / 40
    close(sampled_betas(vp, 40), h * (0.1 + 19.9 * h * torch.arange(1, 41, dtype=F64)))


def test_rates_out_of_range_are_refused() -> None:
    with pytest.raises(ArgumentError, match="below 1"):
        constant_betas(3, 1.0)
    with pytest.raises(ArgumentError, match="give more steps"):
        sampled_betas(ss.VP(0.1, 20.0), 15)
    for make in (constant_betas, linear_betas, cosine_betas, forgetting_betas):
        with pytest.raises(ArgumentError, match="steps = 0"):
            make(0)


# The chain forwards


@every_schedule
def test_one_step_kernels_compose_to_the_marginal(betas: Tensor) -> None:
    chain, x0 = DiffusionChain(betas), torch.tensor([[1.7, -0.4]], dtype=F64)
    mean, variance = x0, torch.zeros((), dtype=F64)
    for t in range(1, chain.T + 1):
        scale = chain.step(torch.ones(1, 1, dtype=F64), t)[0].squeeze()
        mean, std = chain.step(mean, t)
        variance = scale**2 * variance + std**2
        found, spread = chain.marginal(x0, t)
        close(found, mean)
        close(spread**2, variance)
        close(variance, 1 - chain.alpha_bar(t))


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8))
def test_the_posterior_is_bayes_rule(rates: list[float]) -> None:
    """x_t = sqrt(1 - beta_t) x_{t-1} + noise measures x_{t-1}, whose prior is q(x_{t-1} | x_0)."""
    chain, (x, x0) = DiffusionChain(rates), normal(generator(len(rates)), 2, 1, 3)
    identity = torch.eye(3, dtype=F64)
    for t, beta in enumerate(rates, start=1):
        before, std = chain.marginal(x0, t - 1)
        prior = Moments(before[0], std**2 * identity)
        exact = condition(prior, math.sqrt(1 - beta) * identity, beta * identity, x[0])
        mean, std = chain.posterior(x, x0, t)
        close(mean[0], exact.mean, 1e-10)
        close(std**2 * identity, exact.covariance, 1e-10)


@every_schedule
def test_the_posterior_density_is_the_quotient_of_densities(betas: Tensor) -> None:
    chain, x0 = DiffusionChain(betas), torch.full((7, 1), 0.8, dtype=F64)
    x, before = torch.full((7, 1), -0.3, dtype=F64), torch.linspace(-2, 2, 7, dtype=F64)[:, None]

    def density(value: Tensor, law: tuple[Tensor, Tensor]) -> Tensor:
        return log_density(value, law[0], law[1].square().expand(7, 1, 1))

    for t in (2, 5, chain.T):
        joint = density(before, chain.marginal(x0, t - 1)) + density(x, chain.step(before, t))
        quotient = joint - density(x, chain.marginal(x0, t))
        close(density(before, chain.posterior(x, x0, t)), quotient, 1e-9)


def test_forward_paths_have_the_joint_law_of_the_chain() -> None:
    n, x0 = 20_000, 1.3
    chain = DiffusionChain(linear_betas(6, 0.05, 0.5))
    path = torch.stack(list(chain.forward(torch.full((n, 1), x0, dtype=F64), seed=1)))[..., 0]
    assert bool((path[0] == x0).all())
    for t, (mean, variance) in enumerate(zip(path[1:].mean(1), path[1:].var(1), strict=True), 1):
        bar = chain.alpha_bar(t)
        assert abs(float(mean) - math.sqrt(bar) * x0) <= 4.5 * math.sqrt((1 - bar) / n)
        assert abs(float(variance) - (1 - bar)) <= 4.5 * (1 - bar) * math.sqrt(2 / n)
    for s, t in itertools.combinations(range(1, 7), 2):
        correlation = float(torch.corrcoef(path[[s, t]])[0, 1])
        bar_s, bar_t = chain.alpha_bar(s), chain.alpha_bar(t)
        expected = math.sqrt(bar_t / bar_s * (1 - bar_s) / (1 - bar_t))
        assert abs(math.atanh(correlation) - math.atanh(expected)) <= 4.5 / math.sqrt(n)


# The chain backwards


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_a_reverse_step_is_that_of_ddpm_whatever_the_model_predicts(
    name: str, variance: str
) -> None:
    """mu = (x - beta/sqrt(1 - alpha_bar) eps)/sqrt(1 - beta)."""
    chain = DiffusionChain(BETAS[name])
    exact = ss.targets.random_mixture(2, components=3).score_model(chain.sde)
    models = [
        ss.from_eps(lambda x, t: exact.predict("eps", x, t), chain.sde),
        ss.from_x0(lambda x, t: exact.predict("x0", x, t), chain.sde),
        ss.from_v(lambda x, t: exact.predict("v", x, t), chain.sde),
        ss.from_discrete(lambda x, k: exact.predict("eps", x, k + 1), chain.alpha_bars),
        lambda x, t: exact(x, t),
    ]
    x = normal(generator(0), 4, 2)
    for t in (1, 2, 11, chain.T):
        beta, bar = float(chain.betas[t - 1]), chain.alpha_bar(t)
        eps = exact.predict("eps", x, float(t))
        mean = (x - beta / math.sqrt(1 - bar) * eps) / math.sqrt(1 - beta)
        tilde = (1 - chain.alpha_bar(t - 1)) / (1 - bar) * beta
        for model in models:
            found, std = chain.reverse(model, x, t, variance)
            close(found, mean, 1e-9)
            close(std, math.sqrt(tilde if variance == "posterior" else beta), 1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
@every_schedule
def test_the_law_of_the_reverse_chain_is_the_dense_recursion(betas: Tensor, variance: str) -> None:
    """Of Gaussian data in two dimensions, whose predictions are affine in x_t."""
    chain = DiffusionChain(betas)
    data = Moments(
        torch.tensor([0.7, -1.1], dtype=F64), torch.tensor([[0.9, 0.5], [0.5, 0.4]], dtype=F64)
    )
    identity = torch.eye(2, dtype=F64)
    mean, covariance, before = torch.zeros(2, dtype=F64), identity, 1.0
    for t in range(chain.T, 0, -1):
        beta, bar, before = float(betas[t - 1]), chain.alpha_bar(t), chain.alpha_bar(t - 1)
        root = math.sqrt(bar)
        x0 = condition(data, root * identity, (1 - bar) * identity, mean)
        clean, noisy = math.sqrt(before) * beta, math.sqrt(1 - beta) * (1 - before)
        mean = (clean * x0.mean + noisy * mean) / (1 - bar)
        slope = (clean * x0.gain + noisy * identity) / (1 - bar)
        fresh = beta if variance == "beta" else (1 - before) / (1 - bar) * beta
        covariance = slope @ covariance @ slope.mT + (fresh if t > 1 else 0) * identity
    law = chain.plan(variance).law(*data)
    close(law.mean, mean)
    close(law.covariance, covariance)


@every_schedule
def test_each_variance_is_exact_for_the_data_it_is_right_for(betas: Tensor) -> None:
    """A point with "posterior"; N(0, I) with "beta", up to the prediction of x_0 at the end."""
    chain = DiffusionChain(betas)
    point = chain.plan("posterior").law([1.5], [0.0], start="marginal")
    close(point.mean, 1.5)
    close(point.covariance, 0.0)
    close(chain.plan("beta").law([0.0], [1.0]).covariance, chain.alpha_bar(1))


@pytest.mark.parametrize("variance", VARIANCES)
def test_plan_reverse_steps_and_transitions_are_one_chain(variance: str) -> None:
    chain = DiffusionChain(BETAS["linear"])
    model = ss.targets.random_mixture(2, components=3).score_model(chain.sde)
    x, plan = normal(generator(2), 3, 2), chain.plan(variance)
    assert plan.nfe == chain.T and plan.denoised
    for step in ss.GaussianChain(plan).steps:
        mean, std = chain.reverse(model, x, round(step.t), variance)
        close(step.mean(model, x), mean, 1e-10)
        close(std, step.std, 1e-10)
    last, _ = chain.reverse(model, x, 1, variance)
    close(last, model.predict("x0", x, 1.0), 1e-10)


def test_sample_is_the_verb_with_the_chains_times_and_does_not_know_its_batch() -> None:
    chain = DiffusionChain(BETAS["cosine"])
    model = ss.from_x0(lambda x, t: x.tanh(), chain.sde)
    x = chain.sample(model, (5, 3), "beta", seed=4)
    grid = ss.Grid(tuple(range(chain.T, 0, -1)), denoise=True)
    options = {"solver": "ddpm_forward", "grid": grid, "seed": 4, "dtype": F64}
    assert torch.equal(x, ss.sample(model, chain.sde, shape=(5, 3), **options).x)
    assert torch.equal(chain.sample(model, (2, 3), "beta", seed=4), x[:2])
    assert not torch.equal(chain.sample(model, (5, 3), "beta", seed=5), x)


def test_the_bound_of_a_chain_that_forgets_everything_is_tight_for_standard_normal_data() -> None:
    chain, x = DiffusionChain(BETAS["forgetting"]), torch.tensor([0.3, -1.7], dtype=F64)
    model = ss.targets.gaussian(torch.zeros(2, dtype=F64), 1.0).score_model(chain.sde)
    bound = ss.variational_bound(model, chain.sde, x.expand(4000, 2), variance="beta")
    assert float(bound.prior.abs().max()) == 0 and bound.nfe == chain.T
    exact = float(x.square().sum()) / 2 + math.log(2 * math.pi)
    error = float(bound.total.std()) / math.sqrt(4000)
    assert abs(float(bound.total.mean()) - exact) < 5 * error


# No signal left at the end


def test_alpha_squared_falls_evenly_where_all_signal_fades() -> None:
    sde = DiffusionChain(forgetting_betas(4)).sde
    t = torch.tensor([0.5, 2.0, 3.25, 3.5, 3.9], dtype=F64).requires_grad_()
    close(sde.alpha(t[2:].detach()).square(), torch.tensor([0.75, 0.5, 0.1], dtype=F64) / 4)
    close(sde.beta(t[2:].detach()), 1 / (4 - t[2:].detach()))
    for found, level in ((sde.alpha_dot, sde.alpha), (sde.sigma_dot, sde.sigma)):
        (slope,) = torch.autograd.grad(level(t).sum(), t)
        close(found(t.detach()), slope, 1e-10)
    close(sde.time_from_log_snr(sde.log_snr(t.detach())), t.detach())
    assert float(sde.time_from_log_snr(-math.inf)) == 4
    assert float(sde.alpha(4.0)) == 0 and float(sde.sigma(4.0)) == 1
    assert float(sde.sigma_dot(4.0)) == pytest.approx(1 / 8)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "auto"])
def test_solvers_start_where_no_signal_is_left(solver: str) -> None:
    chain = DiffusionChain(forgetting_betas(50))
    mix = ss.targets.gaussian(torch.tensor([2.0, -1.0], dtype=F64), 0.5)
    exact = mix.score_model(chain.sde)
    model = ss.from_v(lambda x, t: exact.predict("v", x, t), chain.sde)
    out = ss.sample(model, chain.sde, shape=(2000, 2), solver=solver, steps=30, dtype=F64)
    assert bool((out.status == 0).all())
    assert float((out.x.mean(0) - mix.mean).abs().max()) < 0.1


# The limit


def slope(errors: list[float]) -> list[float]:
    """Orders of errors whose number of steps doubles each time."""
    return [float(order) for order in -np.diff(np.log2(errors))]


def test_the_chain_tends_to_the_vp_sde_at_first_order() -> None:
    """Its marginals, its reverse drift and noise, and the law of its reverse chain."""
    vp, s, x = ss.VP(0.1, 20.0), 0.5, torch.tensor([[0.4], [-1.3]], dtype=F64)
    data = ss.targets.gaussian(torch.tensor([0.6], dtype=F64), 0.3)
    drift = -vp.reverse_drift(x, s, data.score_model(vp))
    errors: dict[str, list[float]] = {"marginal": [], "drift": [], "noise": [], "law": []}
    for steps in (200, 400, 800, 1600, 3200):
        chain = DiffusionChain.near(vp, steps)
        t = round(s * steps)
        errors["marginal"].append(abs(chain.alpha_bar(t) - float(vp.alpha(s) ** 2)))
        mean, std = chain.reverse(data.score_model(chain.sde), x, t)
        errors["drift"].append(float(((mean - x) * steps - drift).abs().max()))
        errors["noise"].append(abs(float(std**2) * steps - float(vp.beta(s))))
        sampled = chain.plan("posterior").law([0.6], [0.3], start="marginal")
        errors["law"].append(abs(float(sampled.covariance) - 0.3))
    for what, found in errors.items():
        assert slope(found) == pytest.approx([1.0] * 4, abs=0.1), (what, found)
        assert slope(found)[-1] == pytest.approx(1, abs=0.05), (what, found)


# Bad input


def test_bad_input_is_refused() -> None:
    chain, x = DiffusionChain([0.1, 0.2]), torch.zeros(1, 1, dtype=F64)
    for betas in ([], [0.0, 0.1], [1.0, 0.1], [0.1, 1.1], [math.nan]):
        with pytest.raises(ArgumentError, match="betas must lie"):
            DiffusionChain(betas)
    for call in (chain.step, chain.marginal):
        with pytest.raises(ArgumentError, match="t = 3"):
            call(x, 3)
    for t in (0, 3, 1.5):
        with pytest.raises(ArgumentError, match="t = "):
            chain.posterior(x, x, t)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="t = "):
            chain.reverse(torch.zeros_like, x, t)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="variance 'betta'"):
        chain.plan("betta")
    with pytest.raises(UnknownNameError, match="variance"):
        chain.reverse(torch.zeros_like, x, 1, "forward")


def test_half_precision_paths_are_those_of_float32() -> None:
    """sqrt(1 - 1e-3) is 1 in bfloat16: 2000 such steps would end with the variance 2, not 1."""
    chain, x0 = DiffusionChain([1e-3] * 2000), torch.zeros(200, 4)
    *_, low = chain.forward(x0.bfloat16())
    *_, full = chain.forward(x0)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=2**-8, atol=0)


def test_states_that_would_be_cut_or_broadcast_are_refused() -> None:
    chain, x = DiffusionChain([0.1, 0.2]), torch.ones(3, 2)
    for call in (
        lambda: list(chain.forward(x.long())),
        lambda: chain.step(x.long(), 1),
        lambda: chain.marginal(x.long(), 1),
        lambda: chain.posterior(x, x[:1], 1),
        lambda: chain.reverse(lambda x, t: -x, x.long(), 1),
    ):
        with pytest.raises((ArgumentError, ShapeError)):
            call()
