"""Mixtures of Gaussians against torch.distributions, autograd and quadrature."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import OwnGaussian, generator, normal, processes, seeds
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from scoresolve.errors import ArgumentError, ScoresolveError, ShapeError, UnknownNameError
from scoresolve.models import PREDICTIONS, Model, conversion
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, Langevin, RectifiedFlow, SubVP
from scoresolve.targets import GaussianMixture, LowRank, gaussian, random_mixture, ring

SIZES = st.tuples(seeds(), st.integers(1, 4), st.integers(1, 4))
U = st.floats(0.03, 0.97)


def _full(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    root = normal(rng, k, d, d) / d**0.5
    matrices = root @ root.mT + 0.05 * torch.eye(d)
    return matrices, matrices


def _diagonal(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    variances = (0.7 * normal(rng, k, d) - 1).exp()
    return variances, variances.diag_embed()


def _isotropic(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    variances = (0.7 * normal(rng, k) - 1).exp()
    return variances, variances[:, None, None] * torch.eye(d)


def _number(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    return 0.4, 0.4 * torch.eye(d, dtype=torch.float64).expand(k, d, d)


def _low_rank(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    factor, (variances, dense) = normal(rng, k, d, 2), _diagonal(rng, k, d)
    return LowRank(factor, variances), factor @ factor.mT + dense


def _low_rank_isotropic(rng: torch.Generator, k: int, d: int) -> tuple[Any, Tensor]:
    factor, (variances, dense) = normal(rng, k, d, 1), _isotropic(rng, k, d)
    return LowRank(factor, variances), factor @ factor.mT + dense


KINDS: dict[str, Callable[[torch.Generator, int, int], tuple[Any, Tensor]]] = {
    "full": _full,
    "diagonal": _diagonal,
    "isotropic": _isotropic,
    "number": _number,
    "low_rank": _low_rank,
    "low_rank_isotropic": _low_rank_isotropic,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Case:
    """A random mixture of one kind, six points, and the same law as explicit [K, D, D] matrices."""

    def __init__(self, kind: str, sizes: tuple[int, int, int]) -> None:
        seed, k, d = sizes
        rng = generator(seed)
        self.weights = torch.rand(k, generator=rng, dtype=torch.float64) + 0.1
        self.means = 1.5 * normal(rng, k, d)
        given_covariances, self.matrices = KINDS[kind](rng, k, d)
        self.mix = GaussianMixture(self.weights, self.means, given_covariances)
        self.x = 2 * normal(rng, 6, d)

    def law(self, alpha: Tensor, sigma: Tensor) -> MixtureSameFamily:
        """The law of alpha x0 + sigma eps; with times [B], one law a row."""
        alpha, sigma = alpha[..., None, None], sigma[..., None, None, None]
        noise = sigma**2 * torch.eye(self.means.shape[1])
        covariances = alpha[..., None] ** 2 * self.matrices + noise
        parts = MultivariateNormal(alpha * self.means, covariances)
        return MixtureSameFamily(Categorical(self.weights.expand(parts.batch_shape)), parts)

    def at(self, sde: GaussianSDE, t: Tensor) -> MixtureSameFamily:
        return self.law(sde.alpha(t), sde.sigma(t))


def gradient(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(log_prob(leaf).sum(), leaf)[0]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def row_times(sde: GaussianSDE, u: float) -> Tensor:
    """Six different times, u T among them."""
    return sde.T * (0.02 + 0.95 * ((u + torch.arange(6, dtype=torch.float64) / 6) % 1))


ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


# densities and scores


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES)
def test_log_prob_and_score_match_torch_distributions(kind, sizes):
    case = Case(kind, sizes)
    reference = case.law(ONE, ZERO)
    close(case.mix.log_prob(case.x), reference.log_prob(case.x))
    close(case.mix.score(case.x), gradient(reference.log_prob, case.x), 1e-8, 1e-8)


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES, sde=processes(), u=U)
def test_marginal_is_the_law_of_the_process(kind, sizes, sde, u):
    case = Case(kind, sizes)
    t = torch.tensor(u * sde.T, dtype=torch.float64)
    marginal, reference = case.mix.marginal(sde, t), case.at(sde, t)
    x = case.x * float(sde.alpha(t) + sde.sigma(t))
    close(marginal.log_prob(x), reference.log_prob(x), 1e-8)
    close(case.mix.score_model(sde).log_prob(x, t), reference.log_prob(x), 1e-8)
    parts = reference.component_distribution
    close(marginal.means, parts.loc)
    close(marginal.covariances, parts.covariance_matrix, 1e-8)
    close(marginal.score(x), case.mix.score_model(sde)(x, t), 1e-8, 1e-8)


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES, sde=processes(), u=U)
def test_score_at_one_time_a_row_is_the_gradient_of_log_density(kind, sizes, sde, u):
    case = Case(kind, sizes)
    t = row_times(sde, u)
    x = case.x * (sde.alpha(t) + sde.sigma(t))[:, None]
    model, reference = case.mix.score_model(sde), case.at(sde, t)
    close(model.log_prob(x, t), reference.log_prob(x), 1e-8)
    close(model(x, t), gradient(reference.log_prob, x), 1e-7, 1e-7)


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES, sde=processes(), u=U)
def test_divergence_is_the_trace_of_the_jacobian_of_the_score(kind, sizes, sde, u):
    case = Case(kind, sizes)
    t = row_times(sde, u)
    model = case.mix.score_model(sde)
    x = case.x * (sde.alpha(t) + sde.sigma(t))[:, None]
    jacobian = torch.autograd.functional.jacobian(lambda y: model(y, t).sum(0), x)
    trace = jacobian.diagonal(dim1=0, dim2=2).sum(-1)
    scale = 1e-8 * (1 + float(trace.abs().max()))
    close(model.divergence(x, t), trace, 1e-8, scale)
    one = model.divergence(x, t[0])
    close(one[:1], trace[:1], 1e-8, scale)


def test_score_model_satisfies_the_fokker_planck_equation():
    case, sde = Case("full", (3, 3, 2)), VP()
    model = case.mix.score_model(sde)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    rate = torch.func.jvp(lambda s: model.log_prob(case.x, s), (t,), (torch.ones_like(t),))[1]
    score, g2 = model(case.x, t), sde.diffusion(t) ** 2
    drift = sde.drift_rate(t)
    flux = drift * (2 + (case.x * score).sum(1))
    close(rate, -flux + g2 / 2 * (model.divergence(case.x, t) + score.square().sum(1)))


# predictions


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES, sde=processes(), u=U)
def test_every_prediction_agrees_with_its_conversion_from_the_score(kind, sizes, sde, u):
    case = Case(kind, sizes)
    model, t = case.mix.score_model(sde), row_times(sde, u)
    alpha, sigma = (value[:, None] for value in (sde.alpha(t), sde.sigma(t)))
    x = case.x * (alpha + sigma)
    score = gradient(case.at(sde, t).log_prob, x)
    at = sde.point(t[:, None])
    for prediction in PREDICTIONS:
        a, b = conversion("score", prediction, at)
        expected = a * x + b * score
        # the conversion loses digits where the prediction is a difference of larger terms
        size = float((torch.as_tensor(a) * x).abs().max() + (b * score).abs().max())
        close(model.predict(prediction, x, t), expected, 1e-8, 1e-9 * (1 + size))


@every_kind
def test_bound_function_is_the_prediction_itself(kind):
    case = Case(kind, (0, 3, 3))
    model = case.mix.score_model(VP())
    for prediction in PREDICTIONS:
        name, function = model.bind(prediction)
        assert name == prediction
        assert torch.equal(function(case.x, 0.3), model.predict(prediction, case.x, 0.3))


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES)
def test_predictions_are_exact_where_only_noise_is_left(kind, sizes):
    case = Case(kind, sizes)
    model = case.mix.score_model(RectifiedFlow())
    mean = (case.weights / case.weights.sum()) @ case.means
    expected = {"x0": mean.expand_as(case.x), "eps": case.x, "score": -case.x}
    expected |= {"flow": case.x - mean, "v": -expected["x0"]}
    for prediction, value in expected.items():
        close(model.predict(prediction, case.x, 1.0), value, 1e-12, 1e-12)


@every_kind
@pytest.mark.parametrize("sde", [VP(), SubVP(), CosineVP(), RectifiedFlow(), EDM()], ids=repr)
def test_predictions_are_exact_where_no_noise_is_left(kind, sde):
    case = Case(kind, (5, 3, 3))
    model = case.mix.score_model(sde)
    score = gradient(case.law(ONE, ZERO).log_prob, case.x)
    expected = {"x0": case.x, "eps": torch.zeros_like(case.x), "score": score}
    expected["v"] = torch.zeros_like(case.x)
    expected["flow"] = sde.probability_flow_drift(case.x, 0.0, lambda *_: score)
    for prediction, value in expected.items():
        for t in (0.0, torch.zeros(6, dtype=torch.float64)):
            close(model.predict(prediction, case.x, t), value)


@given(sizes=SIZES, u=U)
def test_model_moves_to_another_process_as_the_general_transport_does(sizes, u):
    case, there = Case("full", sizes), VP()
    for here in (EDM(), RectifiedFlow(), OwnGaussian()):
        model = case.mix.score_model(there)
        moved, general = model.on(here), Model.on(model, here)
        t = there.time_from_log_snr(there.log_snr(torch.tensor(u, dtype=torch.float64)))
        t = here.time_from_log_snr(there.log_snr(t))
        assert moved.sde is here
        close(moved(case.x, t), general(case.x, t), 1e-6, 1e-6)


# posterior


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES, sde=processes(), u=U)
def test_posterior_covariance_is_the_second_order_of_tweedie(kind, sizes, sde, u):
    case = Case(kind, sizes)
    model, t = case.mix.score_model(sde), row_times(sde, u)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = case.x * (alpha + sigma)[:, None]
    mean, covariance = model.posterior(x, t)
    close(mean, model.predict("x0", x, t))
    jacobian = torch.autograd.functional.jacobian(lambda y: model.predict("x0", y, t).sum(0), x)
    expected = (sigma**2 / alpha)[:, None, None] * jacobian.movedim(1, 0)
    close(covariance, expected, 1e-7, 1e-8)
    scalar = case.mix.posterior(sde, x, t[2])
    close(scalar.covariance[2], expected[2], 1e-7, 1e-8)
    close(scalar.mean[2], mean[2])


def test_posterior_is_the_prior_at_pure_noise_and_a_point_at_none():
    case = Case("full", (1, 3, 2))
    noise = case.mix.posterior(RectifiedFlow(), case.x, 1.0)
    close(noise.mean, case.mix.mean.expand_as(case.x))
    close(noise.covariance, case.mix.covariance.expand(6, 2, 2))
    data = case.mix.posterior(RectifiedFlow(), case.x, 0.0)
    close(data.mean, case.x)
    close(data.covariance, torch.zeros(6, 2, 2, dtype=torch.float64))


def test_conditioning_matches_quadrature_on_a_grid():
    case = Case("full", (11, 3, 2))
    operator = torch.tensor([[1.0, -0.7]], dtype=torch.float64)
    y, std = torch.tensor([0.4], dtype=torch.float64), 0.5
    posterior = case.mix.condition(operator, y, std)
    axis = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    log_joint = case.law(ONE, ZERO).log_prob(points) - (points @ operator[0] - y) ** 2 / (
        2 * std**2
    )
    area = (axis[1] - axis[0]) ** 2
    log_evidence = log_joint.logsumexp(0) + area.log()
    near = log_joint > log_joint.max() - 30
    close(posterior.log_prob(points[near]), (log_joint - log_evidence)[near], 1e-8, 1e-8)


@every_kind
def test_two_measurements_in_turn_are_one_joint_measurement(kind):
    case = Case(kind, (2, 3, 3))
    rng = generator(0)
    operator, y = normal(rng, 2, 3), normal(rng, 2)
    joint = case.mix.condition(operator, y, 0.3)
    turns = case.mix.condition(operator[:1], y[:1], 0.3).condition(operator[1:], y[1:], 0.3)
    close(joint.weights, turns.weights)
    close(joint.means, turns.means)
    close(joint.covariances, turns.covariances)


def test_measurement_without_noise_is_met_exactly():
    case = Case("full", (2, 3, 3))
    operator = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    posterior = case.mix.condition(operator, torch.tensor([0.7]), 0.0)
    x = posterior.sample(50)
    close(x @ operator[0], torch.full((50,), 0.7).double(), 1e-6, 1e-6)
    with pytest.raises(ArgumentError, match="no density"):
        posterior.log_prob(x)


# moments and samples


@every_kind
@settings(max_examples=8)
@given(sizes=SIZES)
def test_moments_are_those_of_the_components(kind, sizes):
    case = Case(kind, sizes)
    weights = case.weights / case.weights.sum()
    second = case.matrices + case.means[:, :, None] * case.means[:, None, :]
    mean = weights @ case.means
    close(case.mix.mean, mean)
    expected = torch.einsum("k,kij->ij", weights, second) - torch.outer(mean, mean)
    close(case.mix.covariance, expected)
    close(case.mix.covariances, case.matrices.contiguous())


@every_kind
def test_samples_have_the_moments_and_the_distribution_of_the_mixture(kind):
    case, n = Case(kind, (7, 3, 3)), 20_000
    x = case.mix.sample(n, seed=3)
    deviation = x - case.mix.mean
    error = deviation.mean(0) / (case.mix.covariance.diagonal() / n).sqrt()
    products = deviation[:, :, None] * deviation[:, None, :]
    spread = (products.mean(0) - case.mix.covariance) / (products.std(0) / n**0.5)
    # 3 + 9 standard normals in six kinds: beyond 4.5 with probability 5e-4
    assert float(error.abs().max()) < 4.5
    assert float(spread.abs().max()) < 4.5
    direction = torch.tensor([0.6, -0.3, 0.74], dtype=torch.float64)
    centres = case.means @ direction
    widths = torch.einsum("i,kij,j->k", direction, case.matrices, direction).sqrt()
    weights = case.weights / case.weights.sum()

    def cumulative(v):
        standard = (torch.as_tensor(v)[:, None] - centres) / widths
        return (torch.special.ndtr(standard) @ weights).numpy()

    assert scipy.stats.kstest((x @ direction).numpy(), cumulative).pvalue > 1e-4


@every_kind
def test_samples_do_not_depend_on_how_they_are_batched(kind):
    mix = Case(kind, (7, 3, 3)).mix
    whole = mix.sample(11, seed=5)
    parts = [mix.sample(4, seed=5), mix.sample(7, seed=5, first_sample=4)]
    close(torch.cat(parts), whole, 0, 1e-14)
    close(mix.to(torch.float32).sample(11, seed=5).double(), whole, 0, 1e-5)
    assert not torch.equal(mix.sample(11, seed=6), whole)


# rows and their batch


SPLITS = [(0, 1), (7, 14), (13, 130), (1, 300)]


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, 3, 5), (3, 10, 16)])
@every_kind
def test_a_row_has_the_same_bits_in_any_batch(kind, sizes, dtype):
    mix = Case(kind, sizes).mix.to(dtype)
    x = (2 * normal(generator(9), 300, sizes[2])).to(dtype)
    times = torch.linspace(0.1, 0.9, 300, dtype=torch.float64)
    for sde in (VP(), EDM()):
        model = mix.score_model(sde)
        for t in (0.3 * sde.T, times * sde.T, torch.tensor(0.3 * sde.T).expand(300)):

            def read(part: slice, model: Any = model, t: Any = t) -> list[Tensor]:
                rows, time = x[part], t[part] if isinstance(t, Tensor) else t
                found = [model.predict(name, rows, time) for name in ("score", "x0")]
                found += [model.log_prob(rows, time), model.divergence(rows, time)]
                return [*found, mix.log_prob(rows), mix.score(rows)]

            whole = read(slice(None))
            for first, last in SPLITS:
                for one, other in zip(whole, read(slice(first, last)), strict=True):
                    assert torch.equal(one[first:last], other)


@pytest.mark.arithmetic
def test_a_sum_that_threads_share_is_the_same_for_a_row_alone():
    data = GaussianMixture.from_data(normal(generator(0), 2**15, 2))
    model, x = data.score_model(VP()), normal(generator(1), 3, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(model(x, 0.5)[:1], model(x[:1], 0.5))
        assert torch.equal(model.log_prob(x, 0.5)[:1], model.log_prob(x[:1], 0.5))
    finally:
        torch.set_num_threads(threads)


@every_kind
@pytest.mark.parametrize("axes", [1, 3])
def test_a_column_of_times_is_one_time_a_row(kind, axes):
    case = Case(kind, (0, 3, 3))
    model, t = case.mix.score_model(RectifiedFlow()), torch.linspace(0.1, 0.9, 6).double()
    column = t.reshape(6, *(1,) * axes)
    assert torch.equal(model.predict("x0", case.x, column), model.predict("x0", case.x, t))
    assert torch.equal(model.log_prob(case.x, column), model.log_prob(case.x, t))


@pytest.mark.arithmetic
def test_samples_do_not_hang_on_the_choice_of_eigenvectors(monkeypatch):
    matrices = Case("full", (0, 3, 4)).matrices
    mean = torch.zeros(3, 4, dtype=torch.float64)
    honest = GaussianMixture(torch.ones(3), mean, matrices).sample(50)
    eigh = torch.linalg.eigh

    def mirrored(a: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(a)
        return values, vectors * torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", mirrored)
    close(GaussianMixture(torch.ones(3), mean, matrices).sample(50), honest, 0, 1e-12)


# where it runs


@every_kind
def test_autocast_takes_no_digit(kind):
    mix = Case(kind, (0, 3, 8)).mix.to(torch.float32)
    x = (2 * normal(generator(1), 6, 8)).float()
    model, operator = mix.score_model(VP()), torch.eye(8)[:2]

    def read() -> list[Tensor]:
        measured = mix.condition(operator, torch.zeros(2), 0.5)
        found = [mix.sample(5), mix.covariance, mix.log_prob(x), measured.means]
        return [*found, model(x, 0.3), model.posterior(x, 0.3).covariance]

    outside = read()
    with torch.autocast("cpu", torch.bfloat16):
        inside = read()
    assert all(map(torch.equal, outside, inside))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_targets_are_made_under_any_default_dtype_and_on_the_meta_device(dtype):
    def made() -> list[GaussianMixture]:
        return [ring(), random_mixture(3), gaussian([0.0, 1.0], [[2.0, 0.5], [0.5, 1.0]])]

    expected, before = made(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        found = made()
        drawn = [(mix.sample(3), mix.score(mix.means), mix.covariances) for mix in found]
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for mix, other, values in zip(expected, found, drawn, strict=True):
        assert other.means.device.type == "cpu" and other.means.dtype == torch.float64
        assert torch.equal(values[0], mix.sample(3)) and torch.equal(values[2], mix.covariances)


@every_kind
def test_copies_and_pickles_say_the_same(kind):
    case = Case(kind, (0, 3, 3))
    model = case.mix.score_model(VP())
    model(case.x.float(), 0.3)  # leaves a cast behind
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(case.x, 0.3), model(case.x, 0.3))
    twin = pickle.loads(pickle.dumps(case.mix))
    assert torch.equal(twin.sample(3), case.mix.sample(3))


# kinds, dtypes, shapes


@settings(max_examples=10)
@given(seed=seeds(), sde=processes(), u=U)
def test_kinds_agree_where_they_say_the_same(seed, sde, u):
    rng = generator(seed)
    weights, means = torch.rand(3, generator=rng).double() + 0.1, normal(rng, 3, 4)
    variance = torch.rand(3, generator=rng).double() + 0.1
    wide = variance[:, None].expand(3, 4)
    factor = torch.zeros(3, 4, 2, dtype=torch.float64)
    same = [variance, wide, wide.diag_embed(), LowRank(factor, variance), LowRank(factor, wide)]
    t = row_times(sde, u)
    x = 2 * normal(rng, 6, 4) * (sde.alpha(t) + sde.sigma(t))[:, None]
    first, *others = [GaussianMixture(weights, means, each).score_model(sde) for each in same]
    for other in others:
        close(other.log_prob(x, t), first.log_prob(x, t), 1e-8)
        close(other.divergence(x, t), first.divergence(x, t), 1e-8, 1e-7)
        close(other.posterior(x, t).covariance, first.posterior(x, t).covariance, 1e-8)
        for prediction in PREDICTIONS:
            a, b = other.predict(prediction, x, t), first.predict(prediction, x, t)
            close(a, b, 1e-8, 1e-8)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_follows_float64(kind, dtype):
    case = Case(kind, (9, 3, 4))
    model, x = case.mix.score_model(VP()), case.x.to(dtype)
    eps = torch.finfo(dtype).eps
    for t in (0.5, torch.linspace(0.2, 0.9, 6)):
        for prediction in PREDICTIONS:
            exact = model.predict(prediction, x.double(), t)
            close(model.predict(prediction, x, t).double(), exact, 20 * eps, 1e-5 + eps)
            assert model.predict(prediction, x, t).dtype == dtype
        assert model.log_prob(x, t).dtype == model.divergence(x, t).dtype == dtype
        assert model.posterior(x, t).covariance.dtype == dtype


@every_kind
def test_time_that_is_one_number_in_any_form_gives_the_same_bits(kind):
    case = Case(kind, (9, 3, 4))
    model, t = case.mix.score_model(EDM()), torch.tensor(0.7, dtype=torch.float64)
    one = model(case.x, t)
    assert torch.equal(model(case.x, 0.7), one)
    assert torch.equal(model(case.x, t.expand(6)), one)
    close(model(case.x, t.repeat(6)), one, 1e-12, 1e-12)


@every_kind
def test_events_of_any_shape_are_flat_vectors(kind):
    case, t = Case(kind, (4, 3, 4)), 0.4
    arguments = KINDS[kind](generator(4), 3, 4)[0]
    flat = GaussianMixture(case.weights, case.means, arguments)
    shaped = GaussianMixture(case.weights, case.means.reshape(3, 1, 2, 2), arguments)
    x = case.x.reshape(6, 1, 2, 2)
    assert shaped.event_shape == (1, 2, 2)
    assert shaped.sample(5).shape == (5, 1, 2, 2)
    assert shaped.mean.shape == (1, 2, 2)
    assert shaped.means.shape == (3, 1, 2, 2)
    close(shaped.score(x), flat.score(case.x).reshape(6, 1, 2, 2))
    model, moments = shaped.score_model(VP()), shaped.posterior(VP(), x, t)
    close(model(x, t).flatten(1), flat.score_model(VP())(case.x, t))
    assert moments.mean.shape == x.shape
    assert moments.covariance.shape == (6, 4, 4)


def test_scalar_events_and_empty_batches_have_no_special_case():
    mix = GaussianMixture([1, 3], [-1, 2], [0.5, 0.25])
    x = mix.sample(4)
    assert x.shape == mix.score(x).shape == mix.log_prob(x).shape == (4,)
    assert mix.score_model(VP())(x, 0.3).shape == (4,)
    assert mix.sample(0).shape == (0,)
    empty = torch.empty(0, 2, dtype=torch.float64)
    model = ring().score_model(VP())
    assert model(empty, 0.3).shape == (0, 2)
    assert model(empty, torch.empty(0)).shape == (0, 2)


@every_kind
def test_model_works_under_torch_func(kind):
    case = Case(kind, (9, 3, 4))
    model = case.mix.score_model(VP())
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)

    def one(x: Tensor, time: Tensor) -> Tensor:
        return model(x[None], time)[0]

    close(torch.func.vmap(one)(case.x, t), model(case.x, t))
    jacobians = torch.func.vmap(torch.func.jacrev(one))(case.x, t)
    forward = torch.func.vmap(torch.func.jacfwd(one))(case.x, t)
    close(jacobians, forward)
    close(jacobians, jacobians.mT)
    close(jacobians.diagonal(dim1=1, dim2=2).sum(1), model.divergence(case.x, t))
    tangent = normal(generator(1), 6, 4)
    directional = torch.func.jvp(lambda x: model(x, t), (case.x,), (tangent,))[1]
    close(directional, (jacobians @ tangent[..., None])[..., 0])


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().size() // out.element_size())
        return out


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_light_kinds_form_no_square_matrices(kind):
    k, d, b = 3, 400, 256
    case = Case(kind, (0, k, d))
    model, x = case.mix.score_model(VP()), 2 * normal(generator(0), b, d)
    for t in (0.5, torch.linspace(0.1, 0.9, b)):
        with _Largest() as largest:
            model.predict("x0", x, t)
            model.divergence(x, t)
            model.log_prob(x, t)
        assert largest.elements <= k * d * b


def test_image_sized_low_rank_mixture_is_evaluated_in_float32():
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(64, 3, 32, 32, generator=rng)
    factor = torch.randn(64, 3072, 4, generator=rng) / 4
    mix = GaussianMixture(torch.ones(64), means, LowRank(factor, torch.full((64,), 0.01)))
    x = mix.sample(4)
    assert x.dtype == torch.float32
    denoised = mix.score_model(VP()).predict("x0", x, 0.01)
    assert denoised.shape == (4, 3, 32, 32)
    assert float((denoised - x).square().mean().sqrt()) < 0.2


# precision


def test_isotropic_distances_keep_their_digits_far_from_the_origin():
    rng = generator(0)
    means = 1000 + normal(rng, 5, 3)
    x = means + 1e-3 * normal(rng, 5, 3)
    iso = GaussianMixture(torch.ones(5), means, 1e-6)
    full = GaussianMixture(torch.ones(5), means, 1e-6 * torch.eye(3).double().expand(5, 3, 3))
    close(iso.log_prob(x), full.log_prob(x), 1e-7, 1e-7)
    close(iso.score(x), full.score(x), 1e-7, 1e-4)
    single = x.float()
    close(iso.log_prob(single).double(), iso.log_prob(single.double()), 1e-6, 0)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_flat_components_have_a_score_down_to_little_noise(kind):
    rng = generator(3)
    factor = normal(rng, 2, 3, 1)
    spread = torch.tensor([[0.0, 0.3, 1.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    flat = {
        "full": (factor @ factor.mT, factor @ factor.mT),
        "diagonal": (spread, spread.diag_embed()),
        "low_rank": (LowRank(factor, torch.zeros(2).double()), factor @ factor.mT),
    }[kind]
    case = Case("full", (3, 2, 3))
    case.mix, case.matrices = GaussianMixture(case.weights, case.means, flat[0]), flat[1]
    sde = EDM()
    for t in (1.0, 0.1, 0.01):
        x = case.means.repeat(3, 1) + t * normal(rng, 6, 3)
        reference = case.at(sde, torch.tensor(t, dtype=torch.float64))
        score = gradient(reference.log_prob, x)
        close(case.mix.score_model(sde)(x, t), score, 1e-6, 1e-6 / t)
        close(case.mix.marginal(sde, t).log_prob(x), reference.log_prob(x), 1e-6)


# data, fitting, named targets


@given(seed=seeds(), sigma=st.floats(0.02, 20.0))
def test_denoiser_of_points_is_their_softmax_average(seed, sigma):
    rng = generator(seed)
    points, x = normal(rng, 7, 2, 2), normal(rng, 6, 2, 2)
    model = GaussianMixture.from_data(points).score_model(EDM())
    distance = (x[:, None] - points).square().sum((2, 3))
    weights = (-distance / (2 * sigma**2)).softmax(1)
    expected = torch.einsum("bk,kij->bij", weights, points)
    close(model.predict("x0", x, sigma), expected, 1e-8, 1e-8)
    close(model.predict("eps", x, sigma), (x - expected) / sigma, 1e-8, 1e-8)


def test_point_masses_have_no_density_until_noise_is_added():
    mix = GaussianMixture.from_data(torch.eye(3))
    x = torch.zeros(2, 3, dtype=torch.float64)
    for call in (mix.log_prob, mix.score):
        with pytest.raises(ArgumentError, match=r"no density: use marginal"):
            call(x)
    with pytest.raises(ArgumentError, match="adds no noise"):
        mix.score_model(EDM())(x, 0.0)
    assert bool(torch.isfinite(mix.marginal(EDM(), 0.1).log_prob(x)).all())
    assert bool(torch.isfinite(mix.score_model(VE())(x, 0.0)).all())
    close(mix.sample(20).sum(1), torch.ones(20))


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_fit_recovers_the_mixture_that_made_the_data(kind):
    truth = GaussianMixture([0.3, 0.7], [[[-3.0, 0.0]], [[3.0, 1.0]]], [0.25, 0.5])
    data = truth.sample(4000, seed=1)
    fitted = GaussianMixture.fit(data, 2, kind=kind)
    order = fitted.means[:, 0, 0].argsort()
    # standard errors: sqrt(0.21 / 4000), 0.7 / sqrt(2800), 0.5 sqrt(2 / 2800)
    close(fitted.weights[order], truth.weights, 0, 5 * 0.0073)
    close(fitted.means[order], truth.means, 0, 5 * 0.0135)
    close(fitted.covariances[order], truth.covariances, 0, 5 * 0.0134)
    again = GaussianMixture.fit(data, 2, kind=kind)
    assert torch.equal(again.means, fitted.means)


def test_fit_says_how_to_get_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ScoresolveError, match=r"pip install 'scoresolve\[fit\]'"):
        GaussianMixture.fit(torch.randn(9, 2), 2)


def test_ring_lies_on_its_circle():
    mix = ring(components=5, radius=2.0, std=0.3)
    close(mix.means.norm(dim=1), torch.full((5,), 2.0).double())
    close(mix.mean, torch.zeros(2).double())
    close(mix.covariance, (0.3**2 + 2.0**2 / 2) * torch.eye(2).double())


def test_random_mixture_is_a_function_of_its_seed_within_its_range():
    mix = random_mixture(4, components=3, seed=8, stds=(0.2, 0.6))
    assert torch.equal(mix.means, random_mixture(4, components=3, seed=8).means)
    assert not torch.equal(mix.means, random_mixture(4, components=3, seed=9).means)
    assert torch.equal(mix.means, random_mixture(4, components=5, seed=8).means[:3])
    stds = torch.linalg.eigvalsh(mix.covariances).sqrt()
    assert 0.2 <= float(stds.min()) < float(stds.max()) <= 0.6


def test_gaussian_is_a_mixture_of_one():
    covariance = torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64)
    x = normal(generator(0), 4, 2)
    reference = MultivariateNormal(torch.tensor([1.0, 2.0]).double(), covariance)
    close(gaussian([1.0, 2.0], covariance).log_prob(x), reference.log_prob(x))
    for spread in (0.5, [0.5, 0.5], LowRank(torch.zeros(1, 2, 1), torch.tensor([0.5]))):
        expected = -((x - 1).square().sum(1) + 2 * math.log(math.pi)) / 1.0
        close(gaussian([1, 1], spread).log_prob(x), expected + math.log(math.pi))


def test_integers_become_float64_and_float32_is_kept():
    assert GaussianMixture([1, 1], [[0, 0], [1, 1]], [1, 2]).means.dtype == torch.float64
    single = GaussianMixture([1, 1], torch.zeros(2, 2), [1, 2])
    assert single.covariance.dtype == single.sample(2).dtype == torch.float32
    assert single.to(torch.float64).means.dtype == torch.float64
    assert "2 Isotropic on (2,)" in repr(single)


# bad input

TWO, EYES = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
SKEW = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
NEGATIVE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 1, 1], TWO, 1.0), ShapeError, r"weights of shape \(3,\) for 2 means"),
        (([1, -1], TWO, 1.0), ArgumentError, "smallest weight is -1"),
        (([1, 0], TWO, 1.0), ArgumentError, "smallest weight is 0"),
        (([1, math.nan], TWO, 1.0), ArgumentError, "weights hold values that are not finite"),
        (([1, 1], TWO / 0, 1.0), ArgumentError, "means hold values that are not finite"),
        (([1, 1], TWO.half(), 1.0), ArgumentError, "float32 or float64"),
        (([1, 1], TWO * 1j, 1.0), ArgumentError, "give real numbers"),
        (([], torch.zeros(0, 3), 1.0), ShapeError, r"give \[K, \*event\]"),
        (([1, 1], TWO, torch.ones(3, 3)), ShapeError, r"covariances of shape \(3, 3\)"),
        (([1, 1], TWO, [1.0, -0.5]), ArgumentError, "a variance is -0.5"),
        (([1, 1], TWO, EYES * math.inf), ArgumentError, "covariances hold values"),
        (([1, math.nan], TWO, 1.0), ArgumentError, "weights hold values"),
        (([1, 1], torch.ones(2, 0), 1.0), ShapeError, r"give \[K, \*event\]"),
        (([1, 1], torch.eye(2).to_sparse(), 1.0), ArgumentError, "give a dense tensor"),
        (([1, 1], torch.ones(2, 3, device="meta"), 1.0), ArgumentError, "on the meta device"),
        (([1, 1], [[0.0], [1.0, 2.0]], 1.0), ArgumentError, "means are no array of numbers"),
        (([1, 1], TWO, "diagonal"), ArgumentError, "covariances are no array of numbers"),
        (([1], [[0, 0]], SKEW[None]), ArgumentError, "covariance 0 differs from its transpose"),
        (([1], [[0, 0]], NEGATIVE[None]), ArgumentError, "covariance 0 has the eigenvalue -1"),
        (
            ([1, 1], TWO, LowRank(torch.zeros(2, 4, 1), torch.ones(2))),
            ShapeError,
            r"give \(2, 3, R\)",
        ),
    ],
)
def test_bad_mixtures_are_refused_with_the_reason(arguments, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.score(torch.zeros(2, 3)), ShapeError, r"x of shape \(2, 3\).*give \(B, 2\)"),
        (lambda m: m.score(torch.zeros(2)), ShapeError, r"give \(B, 2\)"),
        (lambda m: m.score(torch.zeros(2, 2).int()), ArgumentError, "x is torch.int32"),
        (lambda m: m.score(torch.zeros(2, 2) * 1j), ArgumentError, "complex64"),
        (lambda m: m.marginal(VP(), torch.zeros(2)), ShapeError, "one time"),
        (lambda m: m.score_model(Langevin(m.score)), ArgumentError, "Gaussian process"),
        (lambda m: _model(m)(torch.zeros(3, 2), torch.zeros(2)), ShapeError, "one for each row"),
        (lambda m: _model(m)(torch.zeros(3, 2), torch.zeros(3, 2)), ShapeError, "one time"),
        (lambda m: _model(m)(torch.zeros(3, 2), 0.5, label=1), ArgumentError, "got label"),
        (
            lambda m: _model(m).predict("noise", torch.zeros(3, 2), 0.5),
            UnknownNameError,
            "unknown prediction 'noise'",
        ),
        (lambda m: m.condition(torch.eye(3), torch.zeros(3), 0.1), ShapeError, "for D = 2"),
        (lambda m: m.condition(torch.eye(2), torch.zeros(3), 0.1), ShapeError, r"\[M\]"),
        (lambda m: m.condition(torch.eye(2), torch.zeros(2), -1), ArgumentError, "noise_std = -1"),
        (
            lambda m: m.condition(torch.ones(2, 2), torch.zeros(2), 0.0),
            ArgumentError,
            "without variance",
        ),
        (lambda m: GaussianMixture.from_data(torch.eye(2), -1.0), ArgumentError, "std = -1"),
        (lambda m: GaussianMixture.fit(torch.eye(2), 2, kind="tied"), ArgumentError, "'spherical'"),
        (lambda m: GaussianMixture.fit(torch.eye(2), 3), ArgumentError, "components = 3"),
        (lambda m: LowRank(torch.ones(2, 3), torch.ones(2)), ShapeError, r"\[K, D, R\]"),
        (lambda m: LowRank(torch.ones(2, 3, 1), torch.ones(3)), ShapeError, r"give \(2,\)"),
        (lambda m: LowRank(torch.ones(2, 3, 1), -torch.ones(2)), ArgumentError, "holds -1"),
        (lambda m: LowRank([[[1.0]]], torch.ones(1)), ArgumentError, "factor is list"),
        (lambda m: LowRank(torch.ones(1, 1, 1), torch.ones(1).int()), ArgumentError, "int32"),
        (lambda m: ring(0), ArgumentError, "components = 0"),
        (lambda m: random_mixture(2, stds=(1.0, 0.5)), ArgumentError, "low <= high"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(call, error, message):
    with pytest.raises(error, match=message):
        call(ring())


def _model(mix: GaussianMixture) -> Model:
    return mix.score_model(VP())


def test_a_time_that_is_a_dual_number_has_a_tangent() -> None:
    """A single number is taken for a float where nothing is lost, as a tangent would be."""
    model = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], 0.2).score_model(VP())
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    t, h = torch.tensor(0.4, dtype=torch.float64), 1e-5
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        tangent = forward_ad.unpack_dual(model.predict("x0", x, dual)).tangent
    expected = (model.predict("x0", x, t + h) - model.predict("x0", x, t - h)) / (2 * h)
    torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-8)
