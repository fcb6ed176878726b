"""Gaussians under linear maps, held against SciPy and dense linear algebra in information form."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, normal, seeds
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.targets.linear_gaussian import (
    Moments,
    condition,
    conditional,
    joint,
    log_density,
    marginal,
    tweedie,
)

SIZES = st.tuples(seeds(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


class Case:
    """K Gaussians on D dimensions and one noisy measurement of M numbers."""

    def __init__(self, seed: int, k: int, d: int, m: int) -> None:
        rng = generator(seed)
        self.prior = Moments(normal(rng, k, d), self.covariances(rng, k, d))
        self.operator, self.noise = normal(rng, m, d), self.covariances(rng, 1, m)[0]
        self.y, self.x = normal(rng, m), normal(rng, k, d)

    @staticmethod
    def covariances(rng: torch.Generator, k: int, d: int) -> Tensor:
        root = normal(rng, k, d, d) / d**0.5
        return root @ root.mT + 0.1 * torch.eye(d)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def reference(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance) of each component, by SciPy."""
    rows = zip(x.numpy(), mean.numpy(), covariance.numpy(), strict=True)
    return torch.tensor([scipy.stats.multivariate_normal.logpdf(*row) for row in rows]).double()


@settings(max_examples=30)
@given(SIZES)
def test_the_log_density_is_that_of_scipy(size: tuple[int, int, int, int]) -> None:
    case = Case(*size)
    close(log_density(case.x, *case.prior), reference(case.x, *case.prior), 1e-11)


@settings(max_examples=30)
@given(SIZES)
def test_the_joint_is_the_image_of_independent_data_and_noise(
    size: tuple[int, int, int, int],
) -> None:
    """(x, y) = [[I, 0], [A, I]] (x, n)."""
    case, (_, k, d, m) = Case(*size), size
    block = torch.eye(d + m, dtype=torch.float64)
    block[d:, :d] = case.operator
    inner = torch.zeros(k, d + m, d + m, dtype=torch.float64)
    inner[:, :d, :d], inner[:, d:, d:] = case.prior.covariance, case.noise
    mean = torch.cat([case.prior.mean, torch.zeros(k, m, dtype=torch.float64)], 1)
    law = joint(case.prior, case.operator, case.noise)
    close(law.mean, mean @ block.mT, 1e-12)
    close(law.covariance, block @ inner @ block.mT, 1e-12)
    measured = marginal(case.prior, case.operator, case.noise)
    close(measured.mean, law.mean[:, d:], 0)
    close(measured.covariance, law.covariance[:, d:, d:], 0)


@settings(max_examples=30)
@given(SIZES)
def test_the_gain_gives_the_posterior_of_the_information_form(
    size: tuple[int, int, int, int],
) -> None:
    """Precision P^-1 + A^T R^-1 A, and precision-weighted mean P^-1 m + A^T R^-1 y."""
    case = Case(*size)
    found = condition(case.prior, case.operator, case.noise, case.y)
    precision = case.prior.covariance.inverse()
    weighted = case.operator.mT @ case.noise.inverse()
    covariance = (precision + weighted @ case.operator).inverse()
    information = (precision @ case.prior.mean[..., None])[..., 0] + weighted @ case.y
    close(found.covariance, covariance)
    close(found.mean, (covariance @ information[..., None])[..., 0])
    close(found.gain, covariance @ weighted)
    law = marginal(case.prior, case.operator, case.noise)
    close(found.log_evidence, reference(case.y.expand_as(law.mean), *law))


@settings(max_examples=30)
@given(SIZES)
def test_bayes_rule_holds_at_every_point(size: tuple[int, int, int, int]) -> None:
    """log p(x) + log p(y | x) = log p(y) + log p(x | y), where p(x | y) is also that of `joint`."""
    case, (_, k, d, m) = Case(*size), size
    found = condition(case.prior, case.operator, case.noise, case.y)
    likelihood = log_density(
        case.y.expand(k, m), case.x @ case.operator.mT, case.noise.expand(k, m, m)
    )
    left = log_density(case.x, *case.prior) + likelihood
    right = found.log_evidence + log_density(case.x, found.mean, found.covariance)
    close(left, right, 1e-8)
    law = joint(case.prior, case.operator, case.noise)
    close(log_density(torch.cat([case.x, case.y.expand(k, m)], 1), *law), left, 1e-8)
    rest = conditional(law, torch.arange(d, d + m), case.y)
    close(rest.mean, found.mean)
    close(rest.covariance, found.covariance)


def test_known_coordinates_may_come_in_any_order_or_as_a_mask() -> None:
    law, values = Case(3, 2, 5, 1).prior, torch.tensor([0.3, -1.0]).double()
    first = conditional(law, torch.tensor([4, 1]), values)
    mask = torch.tensor([False, True, False, False, True])
    second = conditional(law, mask, values.flip(0))
    close(first.mean, second.mean, 1e-12)
    close(first.covariance, second.covariance, 1e-12)
    inner, cross = (
        law.covariance[:, [4, 1]][:, :, [4, 1]],
        law.covariance[:, [0, 2, 3]][:, :, [4, 1]],
    )
    schur = law.covariance[:, [0, 2, 3]][:, :, [0, 2, 3]] - cross @ inner.inverse() @ cross.mT
    close(first.covariance, schur, 1e-10)


def test_josephs_form_stays_semidefinite_where_the_short_form_does_not() -> None:
    """A coordinate known to 1 is measured to 1e-9: the variance left is 1e-18."""
    prior = Moments(torch.zeros(2).double(), torch.tensor([[1.0, 0.999], [0.999, 1.0]]).double())
    operator, noise = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[1e-18]]).double()
    found = condition(prior, operator, noise, torch.ones(1).double())
    close(found.covariance, found.covariance.mT, 1e-16)
    left = operator @ found.covariance @ operator.mT
    assert 0 <= float(left) < 1e-17
    short = prior.covariance - found.gain @ operator @ prior.covariance
    assert abs(float(operator @ short @ operator.mT)) > 1e-17


@settings(max_examples=30)
@given(seeds(), st.integers(1, 4))
def test_tweedie_of_a_gaussian_signal_is_its_posterior(seed: int, m: int) -> None:
    case = Case(seed, 3, m, m)
    identity, noise = torch.eye(m, dtype=torch.float64), case.noise
    exact = condition(case.prior, identity, noise, case.y)
    precision = (case.prior.covariance + noise).inverse()
    score = -(precision @ (case.y - case.prior.mean)[..., None])[..., 0]
    found = tweedie(case.y.expand(3, m), score, -precision, noise)
    close(found.mean, exact.mean)
    close(found.covariance, exact.covariance)


def test_tweedie_of_a_mixture_is_its_posterior() -> None:
    """u = alpha x_0 is the signal of x_t; score and Jacobian are those of its marginal."""
    mix, sde = ss.targets.random_mixture(2, components=3), ss.VP()
    t, x = torch.tensor(0.4).double(), normal(generator(0), 5, 2)
    law, alpha, variance = mix.marginal(sde, t), sde.alpha(t), sde.sigma(t) ** 2
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: law.score(row[None])[0]))(x)
    found = tweedie(x, law.score(x), jacobian, variance * torch.eye(2).double())
    exact = mix.posterior(sde, x, t)
    close(found.mean / alpha, exact.mean)
    close(found.covariance / alpha**2, exact.covariance)


def test_evidence_of_a_mixture_normalises_its_posterior() -> None:
    """p(x | y) = p(x) p(y | x) / p(y), where p(y) is the law of the measurement."""
    case, mix = Case(7, 1, 3, 2), ss.targets.random_mixture(3, components=4)
    x, std = normal(generator(1), 9, 3), 0.6
    noise = std**2 * torch.eye(2).double().expand(9, 2, 2)
    likelihood = log_density(case.y.expand(9, 2), x @ case.operator.mT, noise)
    evidence = mix.measured(case.operator, std).log_prob(case.y[None])
    posterior = mix.condition(case.operator, case.y, std).log_prob(x)
    close(posterior, mix.log_prob(x) + likelihood - evidence)


def test_bad_input_is_refused() -> None:
    case = Case(0, 2, 3, 1)
    twice = case.operator.expand(2, 3)
    with pytest.raises(ArgumentError, match="without variance"):
        condition(case.prior, twice, torch.zeros(2, 2).double(), torch.zeros(2).double())
    with pytest.raises(ArgumentError, match="without variance"):
        log_density(case.x, case.prior.mean, torch.zeros_like(case.prior.covariance))
    with pytest.raises(ShapeError, match="one shape"):
        tweedie(case.x, case.y, case.prior.covariance, case.noise)
    with pytest.raises(ShapeError, match="for D = 2"):
        ss.targets.ring().measured(torch.eye(3), 0.1)


@pytest.mark.parametrize(
    ("operator", "noise", "y"),
    [((2, 2), (2, 2), (1,)), ((2, 2), (1, 1), (2,)), ((2, 3), (2, 2), (2,)), ((2,), (2, 2), (2,))],
)
def test_shapes_that_would_broadcast_are_refused(operator, noise, y) -> None:
    prior = Moments(torch.zeros(2), torch.eye(2))
    with pytest.raises(ShapeError):
        a = torch.eye(*operator) if len(operator) == 2 else torch.ones(operator)
        condition(prior, a, torch.eye(*noise), torch.ones(y))
