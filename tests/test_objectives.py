"""Training objectives: the exact score is where their gradient vanishes, and closed forms.

A model is the exact one plus features times a parameter of its own for each sample, so that one
backward pass gives the gradient of every sample; a mean of n gradients is held against its
expectation within 4.5 of its own standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from strategies import generator, normal
from torch import Tensor

import scoresolve as ss
from scoresolve import objectives
from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.kernels import HMC, MALA, ParallelTempering
from scoresolve.models import PREDICTIONS, NetworkModel
from scoresolve.noise import Philox
from scoresolve.objectives import (
    LogNormalTimes,
    LogUniformTimes,
    TimeLaw,
    UniformTimes,
    contrastive_divergence,
    denoising_loss,
    denoising_score_matching,
    implicit_score_matching,
    negatives,
    sliced_score_matching,
)
from scoresolve.sde import GaussianSDE

F64 = torch.float64
FEATURES = 3
N = 8000
mix = ss.targets.random_mixture(2, components=3, seed=1)
processes = pytest.mark.parametrize(
    "sde", [ss.VP(), ss.EDM(0.02, 10.0), ss.CosineVP(), ss.VE(0.05, 10.0)], ids=str
)


def features(x: Tensor) -> Tensor:
    """Smooth vector fields of `x` [B, 2], [B, FEATURES, 2]."""
    return torch.stack([x.sin(), x.flip(1).cos(), torch.tanh(x.sum(1, keepdim=True) * x)], 1)


def own(count: int, value: float = 0.0) -> Tensor:
    """A parameter for each sample, [B, FEATURES]."""
    return torch.full((count, FEATURES), value, dtype=F64, requires_grad=True)


def off(theta: Tensor, x: Tensor) -> Tensor:
    return (theta[..., None] * features(x)).sum(1)


def deviations(loss: Tensor, theta: Tensor) -> Tensor:
    """The mean gradient in units of its standard error, for each parameter."""
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    return gradient.mean(0).abs() / (gradient.std(0) / math.sqrt(len(gradient)))


def vanishes_at_the_truth_alone(loss: Callable[[Tensor], Tensor], count: int = N) -> None:
    zero, wrong = own(count), own(count, 0.4)
    at_truth, elsewhere = (deviations(loss(theta), theta) for theta in (zero, wrong))
    assert bool((at_truth < 4.5).all()), at_truth
    assert bool((elsewhere > 9).all()), elsewhere


# The laws of times


def laws(sde: GaussianSDE) -> list[TimeLaw]:
    return [
        UniformTimes(sde),
        LogUniformTimes(sde),
        LogNormalTimes(sde),
        LogNormalTimes(sde, -1.0, 1.0, 0.3 * sde.T, 0.7 * sde.T),
    ]


@processes
@pytest.mark.parametrize("number", range(4))
def test_the_density_of_a_law_is_that_of_its_quantiles(sde: GaussianSDE, number: int) -> None:
    law = laws(sde)[number]
    u = torch.linspace(0.01, 0.99, 99, dtype=F64).requires_grad_()
    t = law.at(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(law.density(t.detach()) * slope, torch.ones(99, dtype=F64))
    ends = law.at(torch.tensor([1e-15, 1 - 1e-15], dtype=F64)).tolist()
    assert ends == pytest.approx([law.low, law.high], rel=1e-6)
    drawn = law.draw(Philox(3), torch.empty(4000, 1), draw=2)
    quarters = law.at(torch.tensor([0.25, 0.5, 0.75], dtype=F64))
    shares = (drawn[:, None] < quarters).double().mean(0)
    assert float((shares - torch.tensor([0.25, 0.5, 0.75])).abs().max()) < 4.5 * 0.5 / 4000**0.5


def test_edm_times_have_its_log_normal() -> None:
    law = LogNormalTimes(ss.EDM(1e-9, 1e9))
    z = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    torch.testing.assert_close(law.at(torch.special.ndtr(z)).log(), -1.2 + 1.2 * z)


@processes
def test_even_in_log_k_is_the_likelihood_proposal(sde: GaussianSDE) -> None:
    """Its density is proportional to g^2/sigma^2, as Song et al. 2021 propose."""
    law, t = LogUniformTimes(sde), LogNormalTimes(sde).at(torch.rand(20, dtype=F64))
    ratio = law.density(t) / (sde.diffusion(t) / sde.sigma(t)) ** 2
    torch.testing.assert_close(ratio, ratio[:1].expand(20))


def test_even_times_fill_the_law_and_keep_its_mean() -> None:
    law, like = UniformTimes(ss.VP(), 0.0), torch.empty(64, 1)
    drawn = torch.stack([law.draw(Philox(0), like, draw, even=True) for draw in range(200)])
    gaps = drawn.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 64))
    plain = torch.stack([law.draw(Philox(0), like, draw) for draw in range(200)])
    means, others = (t.square().mean(1) for t in (drawn, plain))
    assert abs(float(means.mean()) - 1 / 3) < 4.5 * float(means.std()) / math.sqrt(200)
    assert float(means.var()) < 0.02 * float(others.var())


# Denoising score matching


def noisy_model(prediction: str, sde: GaussianSDE, theta: Tensor) -> ss.Model:
    """The exact prediction of the mixture plus features."""
    exact = mix.score_model(sde)
    return NetworkModel(
        lambda x, t: exact.predict(prediction, x, t) + off(theta, x), sde, prediction
    )


@pytest.mark.parametrize("weighting", objectives.WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_score_minimises_every_weighting(weighting: str, prediction: str) -> None:
    sde = ss.VP(t_min=0.1)
    x0 = mix.sample(N, seed=5)
    vanishes_at_the_truth_alone(
        lambda theta: denoising_score_matching(
            noisy_model(prediction, sde, theta), sde, x0, weighting=weighting, seed=2
        )
    )


@processes
@pytest.mark.parametrize("number", range(3))
def test_the_exact_score_minimises_with_every_proposal(sde: GaussianSDE, number: int) -> None:
    x0 = mix.sample(N, seed=6)
    law = laws(sde)[number]
    vanishes_at_the_truth_alone(
        lambda theta: denoising_score_matching(
            noisy_model("eps", sde, theta), sde, x0, times=LogNormalTimes(sde), proposal=law, seed=4
        )
    )


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda a, s, g: torch.ones_like(a),
    "x0": lambda a, s, g: (s / a) ** 2,
    "v": lambda a, s, g: (a + s**2 / a) ** 2,
    "flow": lambda a, s, g: (g**2 / (2 * s)) ** 2,
    "likelihood": lambda a, s, g: g**2 / (2 * s**2),
    "edm": lambda a, s, g: ((s / a) ** 2 + 0.3**2) / 0.3**2,
}


@processes
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_each_weighting_is_its_multiple_of_the_error_of_eps(
    sde: GaussianSDE, weighting: str
) -> None:
    x0, eps = normal(generator(0), 2, 6, 2)
    t = LogUniformTimes(sde).at(torch.linspace(0.1, 0.9, 6, dtype=F64))
    model = ss.from_eps(lambda x, t: x.sin(), sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    error = (alpha[:, None] * x0 + sigma[:, None] * eps).sin() - eps
    expected = WEIGHTS[weighting](alpha, sigma, sde.diffusion(t)) * error.square().mean(1)
    found = denoising_loss(model, x0, t, eps, weighting, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert objectives.WEIGHTINGS.keys() == WEIGHTS.keys()


def test_a_weighting_of_ones_own_weighs_the_error_of_eps() -> None:
    sde, (x0, eps) = ss.VP(), normal(generator(1), 2, 5, 2)
    t = torch.linspace(0.2, 0.9, 5, dtype=F64)
    model = ss.from_x0(lambda x, t: x.cos(), sde)
    plain = denoising_loss(model, x0, t, eps)
    own_weight = denoising_loss(model, x0, t, eps, lambda t: t**2)
    torch.testing.assert_close(own_weight, t**2 * plain)


def test_the_denoising_gradient_of_a_linear_model_is_the_closed_form() -> None:
    """eps = theta x: d/dtheta E|theta x - eps|^2 = 2 theta (alpha^2 v + sigma^2) - 2 sigma."""
    sde, v, n = ss.VP(), 0.7, 40_000
    x0, eps = math.sqrt(v) * normal(generator(2), n, 1), normal(generator(3), n, 1)
    for time, theta in ((0.1, 0.3), (0.5, -0.4), (0.9, 1.2)):
        slope = torch.full((n, 1), theta, dtype=F64, requires_grad=True)
        model = ss.from_eps(lambda x, t, slope=slope: slope * x, sde)
        loss = denoising_loss(model, x0, torch.full((n,), time, dtype=F64), eps)
        (gradient,) = torch.autograd.grad(loss.sum(), slope)
        alpha, sigma = float(sde.alpha(time)), float(sde.sigma(time))
        expected = 2 * theta * (alpha**2 * v + sigma**2) - 2 * sigma
        error = float(gradient.std()) / math.sqrt(n)
        assert abs(float(gradient.mean()) - expected) < 4.5 * error


def test_a_proposal_keeps_the_mean_and_the_likelihood_proposal_lowers_the_variance() -> None:
    sde, n = ss.VP(t_min=1e-4), 20_000
    x0, model = mix.sample(n, seed=7), mix.score_model(sde)
    found = [
        denoising_score_matching(model, sde, x0, weighting="likelihood", proposal=law, seed=1)
        for law in (UniformTimes(sde), LogUniformTimes(sde), LogNormalTimes(sde, -2.0, 3.0))
    ]
    uniform, likelihood, other = found
    for loss in (likelihood, other):
        error = math.hypot(float(uniform.std()), float(loss.std())) / math.sqrt(n)
        assert abs(float(loss.mean() - uniform.mean())) < 4.5 * error
    assert float(likelihood.var()) < 0.1 * float(uniform.var())


def test_times_outside_the_objective_count_for_nothing() -> None:
    sde, n = ss.VP(), 20_000
    x0, model = mix.sample(n, seed=8), mix.score_model(sde)
    times = UniformTimes(sde, 0.3, 0.6)
    direct = denoising_score_matching(model, sde, x0, times=times, seed=1)
    wide = denoising_score_matching(model, sde, x0, times=times, proposal=UniformTimes(sde), seed=2)
    assert 0.6 < float((wide == 0).double().mean()) < 0.8
    error = math.hypot(float(direct.std()), float(wide.std())) / math.sqrt(n)
    assert abs(float(direct.mean() - wide.mean())) < 4.5 * error


def test_the_likelihood_weighting_integrates_to_the_divergence_of_the_model() -> None:
    """D (T - t_min) times its excess over the truth is int g^2/2 E|score - truth|^2 dt."""
    sde, n = ss.VP(t_min=0.05), 200_000
    data = ss.targets.gaussian(torch.zeros(1, dtype=F64), 0.5)
    x0, law = data.sample(n, seed=3), LogUniformTimes(sde)
    wrong = ss.as_model(lambda x, t: -x, sde)
    parts = [
        denoising_score_matching(model, sde, x0, weighting="likelihood", proposal=law, seed=5)
        for model in (wrong, data.score_model(sde))
    ]
    excess = (sde.T - sde.t_min) * (parts[0] - parts[1])
    t = torch.linspace(sde.t_min, sde.T, 4001, dtype=F64)
    variance = sde.alpha(t) ** 2 * 0.5 + sde.sigma(t) ** 2
    rate = sde.diffusion(t) ** 2 / 2 * (1 - 1 / variance) ** 2 * variance
    error = float(excess.std()) / math.sqrt(n)
    assert abs(float(excess.mean()) - float(torch.trapezoid(rate, t))) < 4.5 * error


def test_the_seed_of_the_data_may_be_that_of_the_objective() -> None:
    """Times are independent of the place, and so of the component, that a sample came from."""
    sde, n = ss.VP(), 20_000
    for draw in (0, 1):
        t = UniformTimes(sde).draw(Philox(0), torch.empty(n, 2), draw)
        x0 = mix.sample(n, seed=0)
        correlations = torch.corrcoef(torch.stack([t, x0[:, 0], x0[:, 1]]))[0, 1:]
        assert float(correlations.abs().max()) < 4.5 / math.sqrt(n)


def test_a_sample_of_a_draw_does_not_know_its_batch() -> None:
    sde, x0 = ss.VP(), mix.sample(9).float()
    model = ss.from_eps(lambda x, t: x.sin() + t[:, None], sde)
    whole = denoising_score_matching(model, sde, x0, seed=1, draw=4)
    assert whole.dtype == torch.float32
    assert torch.equal(denoising_score_matching(model, sde, x0[:4], seed=1, draw=4), whole[:4])
    assert not torch.equal(denoising_score_matching(model, sde, x0, seed=1, draw=5), whole)
    source = [torch.Generator().manual_seed(2) for _ in range(2)]
    first, second = (denoising_score_matching(model, sde, x0, noise=noise) for noise in source)
    assert torch.equal(first, second)


# Implicit and sliced score matching


def exact_score(theta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: mix.score(x) + off(theta, x)


MATCHING: dict[str, Callable[..., Tensor]] = {
    "exact trace": implicit_score_matching,
    "Hutchinson": lambda score, x: implicit_score_matching(score, x, probes=2),
    "sliced": lambda score, x: sliced_score_matching(score, x, probes=2, reduce_variance=False),
    "sliced, reduced": sliced_score_matching,
}


@pytest.mark.parametrize("name", MATCHING)
def test_the_exact_score_minimises_what_knows_no_noise(name: str) -> None:
    x = mix.sample(N, seed=9)
    vanishes_at_the_truth_alone(lambda theta: MATCHING[name](exact_score(theta), x))


@pytest.mark.parametrize("name", MATCHING)
def test_each_is_its_formula_for_a_linear_score(name: str) -> None:
    """s = -A x: tr J = -tr A, v^T J v = -v^T A v."""
    a = torch.tensor([[1.3, 0.4], [-0.2, 0.6]], dtype=F64, requires_grad=True)
    x = normal(generator(4), 5, 2)
    found = MATCHING[name](lambda y: -y @ a.mT, x)
    if name == "exact trace":
        expected = -a.trace() + (x @ a.mT).square().sum(1) / 2
    else:
        count = 1 if name == "sliced, reduced" else 2
        total = torch.zeros(5, dtype=F64)
        for k in range(count):
            v = Philox(0).signs(x, k)
            sliced = ((x @ a.mT) * v).sum(1) ** 2
            square = sliced if name == "sliced" else (x @ a.mT).square().sum(1)
            total = total - ((v @ a.mT) * v).sum(1) + square / 2
        expected = total / count
    torch.testing.assert_close(found, expected / 2)
    ours, theirs = (torch.autograd.grad(value.sum(), a)[0] for value in (found, expected / 2))
    torch.testing.assert_close(ours, theirs)


def test_all_have_one_mean_that_differs_from_the_fisher_divergence_by_a_constant() -> None:
    x, n = mix.sample(40_000, seed=10), 40_000
    truth = mix.score(x)
    constant = -truth.square().sum(1) / 4
    for name, objective in MATCHING.items():
        theta = torch.full((n, FEATURES), 0.3, dtype=F64)
        with torch.no_grad():
            loss = objective(exact_score(theta), x)
        gap = loss - off(theta, x).square().sum(1) / 4 - constant
        assert abs(float(gap.mean())) < 4.5 * float(gap.std()) / math.sqrt(n), name
        assert not loss.requires_grad


def test_reduced_variance_is_less() -> None:
    x = mix.sample(4000, seed=11)
    with torch.no_grad():
        plain, reduced = (
            sliced_score_matching(mix.score, x, reduce_variance=flag) for flag in (False, True)
        )
        exact = implicit_score_matching(mix.score, x)
    assert float((reduced - exact).var()) < 0.8 * float((plain - exact).var())


def test_a_score_that_does_not_depend_on_x_has_no_trace() -> None:
    bias = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    x = torch.zeros(3, 2, dtype=F64)
    loss = implicit_score_matching(lambda y: bias.expand_as(y), x)
    torch.testing.assert_close(loss, bias.square().sum().expand(3) / 4)
    constant = implicit_score_matching(torch.ones_like, x)
    torch.testing.assert_close(constant, torch.full((3,), 0.5, dtype=F64))


# Contrastive divergence


def potential(theta: Tensor) -> Callable[[Tensor], Tensor]:
    """The mixture's energy and features whose expectations tell densities apart."""

    def energy(x: Tensor) -> Tensor:
        parts = torch.stack([x[:, 0].sin(), x[:, 1].cos(), torch.tanh(x.sum(1))], 1)
        return -mix.log_prob(x) + (theta * parts).sum(1)

    return energy


@pytest.mark.parametrize(
    ("kernel", "moves"), [("mala", 1), ("mala", 4), (HMC(0.3, leapfrogs=3), 1)]
)
def test_the_exact_energy_minimises_contrastive_divergence(kernel: str | HMC, moves: int) -> None:
    x = mix.sample(4 * N, seed=12)

    def loss(theta: Tensor) -> Tensor:
        size = 0.3 if isinstance(kernel, str) else None
        return contrastive_divergence(
            potential(theta), x, kernel=kernel, moves=moves, step_size=size, seed=1
        )

    at_truth, wrong = own(4 * N), own(4 * N, 1.0)
    assert bool((deviations(loss(at_truth), at_truth) < 4.5).all())
    assert bool((deviations(loss(wrong), wrong) > 6).any())


def test_adjusted_chains_leave_the_density_and_unadjusted_ones_do_not() -> None:
    """Of N(0, 1) with step size 1/2: x' = x/2 + z has the variance 5/4."""
    x = normal(generator(5), 40_000, 1)
    for kernel, variance in (("mala", 1.0), ("ula", 1.25)):
        moved = negatives(lambda y: y.square().sum(1) / 2, x, kernel=kernel, step_size=0.5, seed=2)
        error = variance * math.sqrt(2 / len(x))
        assert abs(float(moved.var()) - variance) < 4.5 * error
        assert (moved != x).double().mean() > 0.8


def test_chains_that_are_often_refused_leave_the_density_too() -> None:
    """Half of all moves of N(0, 1) with step size 2 stay where they were, with their old force."""
    x = normal(generator(8), 40_000, 1)
    moved = negatives(lambda y: y.square().sum(1) / 2, x, moves=8, step_size=2.0, seed=5)
    for power, moment, variance in ((2, 1.0, 2.0), (4, 3.0, 96.0)):
        gap = float(moved.pow(power).mean()) - moment
        assert abs(gap) < 4.5 * math.sqrt(variance / len(x))


def test_the_contrastive_gradient_of_a_gaussian_energy_is_the_closed_form() -> None:
    """theta x^2/2, one move: (E x^2 - (1 - delta theta)^2 E x^2 - 2 delta)/2."""
    n, v, theta, delta = 40_000, 0.6, 1.4, 0.2
    x = math.sqrt(v) * normal(generator(6), n, 1)
    slope = torch.full((n,), theta, dtype=F64, requires_grad=True)
    loss = contrastive_divergence(
        lambda y: slope * y[:, 0] ** 2 / 2, x, kernel="ula", step_size=delta, seed=3
    )
    (gradient,) = torch.autograd.grad(loss.sum(), slope)
    expected = (v - (1 - delta * theta) ** 2 * v - 2 * delta) / 2
    assert abs(float(gradient.mean()) - expected) < 4.5 * float(gradient.std()) / math.sqrt(n)


def test_many_moves_carry_data_to_the_density_of_the_energy() -> None:
    target, n = ss.targets.gaussian(torch.tensor([1.0, -0.5], dtype=F64), 0.5), 4000
    x = torch.full((n, 2), 3.0, dtype=F64)
    moved = negatives(lambda y: -target.log_prob(y), x, moves=40, step_size=0.3, seed=4)
    error = math.sqrt(0.5 / n)
    assert float((moved.mean(0) - target.mean).abs().max()) < 4.5 * error
    assert float((moved.var(0) - 0.5).abs().max()) < 4.5 * math.sqrt(2 / n) * 0.5
    assert not moved.requires_grad


def test_chains_do_not_know_their_batch() -> None:
    x = normal(generator(7), 9, 2)
    whole = negatives(
        lambda y: y.square().square().sum(1), x, moves=3, step_size=0.3, seed=1, draw=2
    )
    part = negatives(
        lambda y: y.square().square().sum(1), x[:4], moves=3, step_size=0.3, seed=1, draw=2
    )
    other = negatives(
        lambda y: y.square().square().sum(1), x, moves=3, step_size=0.3, seed=1, draw=3
    )
    assert torch.equal(whole[:4], part) and not torch.equal(whole, other)


# Bad input


def test_bad_input_is_refused() -> None:
    sde, x0 = ss.VP(), torch.zeros(3, 2, dtype=F64)
    model, t = ss.from_eps(lambda x, t: x, sde), torch.full((3,), 0.5, dtype=F64)
    with pytest.raises(UnknownNameError, match="did you mean 'eps'"):
        denoising_score_matching(model, sde, x0, weighting="epss")
    with pytest.raises(ArgumentError, match="the proposal covers"):
        denoising_score_matching(model, sde, x0, proposal=UniformTimes(sde, 0.1))
    with pytest.raises(ArgumentError, match="data_std = 0"):
        denoising_loss(model, x0, t, x0, "edm", 0.0)
    for bad in ((x0, t[:2], x0), (x0, t, x0[:2])):
        with pytest.raises(ShapeError, match="give \\[B\\]"):
            denoising_loss(model, *bad)
    with pytest.raises(ArgumentError, match="Gaussian process"):
        denoising_loss(ss.from_energy(lambda x, t: x.sum(1)), x0, t, x0)
    with pytest.raises(ShapeError, match="one value per element"):
        denoising_score_matching(lambda x, t: x[:, :1], sde, x0)
    with pytest.raises(ArgumentError, match="Gaussian process"):
        UniformTimes(ss.Langevin(torch.sin))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="interval within"):
        UniformTimes(sde, 0.5, 1.5)
    with pytest.raises(ArgumentError, match="neither sigma nor alpha"):
        LogUniformTimes(ss.RectifiedFlow())
    with pytest.raises(ArgumentError, match="std = 0"):
        LogNormalTimes(sde, std=0.0)
    with pytest.raises(ShapeError, match="one value per element"):
        implicit_score_matching(lambda x: x.sum(1), x0)
    with pytest.raises(ArgumentError, match="probes = 0"):
        sliced_score_matching(torch.sin, x0, probes=0)
    with pytest.raises(ShapeError, match="one energy per sample"):
        contrastive_divergence(lambda x: x, x0)
    with pytest.raises(ArgumentError, match="step_size = 0"):
        contrastive_divergence(lambda x: x.sum(1), x0, step_size=0.0)


def test_negatives_of_replicas_are_one_for_each_start() -> None:
    x = torch.zeros(5, 2, dtype=torch.float64)
    kernel = ParallelTempering(MALA(0.1), [1.0, 0.5])
    assert negatives(lambda y: y.square().sum(1), x, kernel=kernel, moves=3).shape == x.shape


def test_integers_have_no_score() -> None:
    with pytest.raises(ArgumentError):
        implicit_score_matching(lambda x: -x, torch.zeros(3, 2, dtype=torch.int64))


# What comes in other forms


def overwriting(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which leaves zeros in its input."""

    def function(x: Tensor) -> Tensor:
        found = value(x.clone())
        x.mul_(0)
        return found

    return function


def test_networks_that_write_into_their_input_change_nothing() -> None:
    x = normal(generator(0), 6, 2)
    score, energy = lambda y: -y.sin(), lambda y: y.cos().sum(1)
    kept = x.clone()
    for objective, function in (
        (implicit_score_matching, score),
        (sliced_score_matching, score),
        (contrastive_divergence, energy),
    ):
        expected = objective(function, x, seed=3)
        torch.testing.assert_close(objective(overwriting(function), x, seed=3), expected)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("law", laws(ss.EDM(0.02, 10.0)), ids=lambda law: type(law).__name__)
def test_times_are_drawn_in_the_precision_of_the_state_and_at_least_float32(law: TimeLaw) -> None:
    exact = law.draw(Philox(1), torch.empty(50, 2, dtype=F64), even=True)
    assert exact.dtype is F64
    for dtype in (torch.float32, torch.bfloat16):
        drawn = law.draw(Philox(1), torch.empty(50, 2, dtype=dtype), even=True)
        assert drawn.dtype is torch.float32
        torch.testing.assert_close(drawn.double(), exact, rtol=1e-4, atol=1e-6)
    assert law.draw(Philox(1), torch.empty(0, 2), even=True).shape == (0,)


VP, X0 = ss.VP(), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: denoising_score_matching(None, VP, X0), ArgumentError, "score is None"),
        (lambda: denoising_score_matching(torch.neg, None, X0), ArgumentError, "None has no"),
        (lambda: matched(times=LogNormalTimes(ss.EDM())), ArgumentError, "times of EDM"),
        (lambda: matched(proposal=UniformTimes(ss.CosineVP())), ArgumentError, "times of Cos"),
        (lambda: matched(times="uniform"), ArgumentError, "give a TimeLaw"),
        (lambda: matched(weighting=3.0), ArgumentError, "weighting is float"),
        (lambda: matched(weighting=lambda t: t[:, None]), ShapeError, r"give \[B\]"),
        (lambda: matched(X0.long()), ArgumentError, "int64"),
        (lambda: matched(X0 + 0j), ArgumentError, "complex"),
        (lambda: LogNormalTimes(VP, mean=60.0), ArgumentError, "give a mean within"),
        (lambda: UniformTimes(VP, "0.1"), ArgumentError, "low = '0.1'"),
        (lambda: UniformTimes(VP, math.nan), ArgumentError, "low = nan"),
        (lambda: negatives(torch.sum, X0.long()), ArgumentError, "int64"),
    ],
)
def test_what_cannot_be_an_objective_is_refused(
    build: Callable[..., object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def matched(x0: Tensor = X0, **options: object) -> Tensor:
    return denoising_score_matching(lambda x, t: -x, VP, x0, **options)
