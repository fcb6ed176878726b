"""The processes, proved from their definitions rather than from their code.

Densities obey d_t p + div(f p) - g^2/2 lap p = 0; divided by p, with l = log p,

    d_t l + div f + f . grad l - g^2/2 (lap l + |grad l|^2) = 0,

and the same holds with noise -eta^2 g^2 for the reverse drift and 0 for the probability flow.
Schedules are compared with 50-digit arithmetic, posteriors with Bayes' rule.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from strategies import (
    PROCESSES,
    BenesSDE,
    DiagonalMixture,
    OwnGaussian,
    benes_log_density,
    dtypes,
    event_shapes,
    fractions,
    generator,
    mixtures,
    normal,
    seeds,
    times,
)
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.sde import (
    EDM,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    SubVP,
    UnderdampedLangevin,
    as_time,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)

ROWS = 3
RESIDUAL = 1e-9
every_kind = pytest.mark.parametrize("kind", PROCESSES)
closed_forms = pytest.mark.parametrize("kind", [k for k in PROCESSES if k != "OwnGaussian"])
continuous = pytest.mark.parametrize("kind", [k for k in PROCESSES if k != "DiscreteVP"])
etas = st.floats(0, 2)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value.sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True
    )


def jacobian_diagonal(vector: Tensor, x: Tensor) -> Tensor:
    columns = [gradient(vector[:, d], x)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(columns, dim=1)


def fokker_planck_residual(
    log_density: Callable[[Tensor, Tensor], Tensor],
    drift: Callable[[Tensor, Tensor], Tensor],
    squared_noise: Tensor,
    x: Tensor,
    t: Tensor,
) -> float:
    """Largest residual over rows, relative to the sum of its terms' sizes; x [B, D], t [B]."""
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    slope, rate = gradient(log_density(x, t), x, t)
    f = drift(x, t)
    parts = [
        rate[:, None],
        jacobian_diagonal(f, x),
        f * slope,
        -squared_noise / 2 * jacobian_diagonal(slope, x),
        -squared_noise / 2 * slope**2,
    ]
    terms = torch.cat(parts, dim=1).detach()
    size = terms.abs().sum(1)
    return float((terms.sum(1).abs() / torch.where(size > 0, size, 1)).max())


def test_the_residual_itself_tells_a_wrong_drift() -> None:
    sde, t = VP(), torch.full((1,), 0.5, dtype=torch.float64)
    mixture = DiagonalMixture(*(torch.ones(s, dtype=torch.float64) for s in (1, (1, 1), (1, 1))))
    x, noise = f64(0.3).reshape(1, 1), sde.diffusion(t)[:, None] ** 2

    def residual(scale: float) -> float:
        return fokker_planck_residual(
            lambda x, t: mixture.log_prob(sde, x, t),
            lambda x, t: scale * sde.drift(x, t),
            noise,
            x,
            t,
        )

    assert residual(1.0) < RESIDUAL < 1e-4 < residual(1.001)


# --- densities ---------------------------------------------------------------------------------


@every_kind
@settings(max_examples=8)
@given(data=st.data(), mixture=mixtures(), seed=seeds(), eta=etas)
def test_marginals_satisfy_fokker_planck_forwards_backwards_and_as_a_flow(
    kind: str, data: st.DataObject, mixture: DiagonalMixture, seed: int, eta: float
) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, ROWS))
    x = mixture.sample(sde, t, generator(seed))
    g2 = sde.diffusion(t)[:, None] ** 2

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        return mixture.log_prob(sde, x, t)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return mixture.score(sde, x, t)

    def reverse(x: Tensor, t: Tensor) -> Tensor:
        return sde.reverse_drift(x, t, score, eta=eta)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return sde.probability_flow_drift(x, t, score)

    assert fokker_planck_residual(log_density, sde.drift, g2, x, t) < RESIDUAL
    assert fokker_planck_residual(log_density, reverse, -(eta**2) * g2, x, t) < RESIDUAL
    assert fokker_planck_residual(log_density, flow, 0 * g2, x, t) < RESIDUAL


@settings(max_examples=15)
@given(data=st.data(), growth=st.floats(0, 3), seed=seeds(), eta=etas)
def test_a_nonlinear_process_of_the_user_satisfies_fokker_planck(
    data: st.DataObject, growth: float, seed: int, eta: float
) -> None:
    sde, rng = BenesSDE(growth), generator(seed)
    t = data.draw(times(sde, ROWS))
    starts, x = normal(rng, 2, 2), 2 * normal(rng, ROWS, 2)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    g2 = sde.diffusion(t)[:, None] ** 2

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        return benes_log_density(sde, weights, starts, x, t)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return gradient(log_density(x, t), x)[0]

    def reverse(x: Tensor, t: Tensor) -> Tensor:
        return sde.reverse_drift(x, t, score, eta=eta)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return sde.probability_flow_drift(x, t, score)

    assert fokker_planck_residual(log_density, sde.drift, g2, x, t) < RESIDUAL
    assert fokker_planck_residual(log_density, reverse, -(eta**2) * g2, x, t) < RESIDUAL
    assert fokker_planck_residual(log_density, flow, 0 * g2, x, t) < RESIDUAL


def test_conditions_reach_the_score() -> None:
    sde, x, seen = VP(), torch.ones(2, 3, dtype=torch.float64), []

    def score(x: Tensor, t: Tensor, **cond: object) -> Tensor:
        seen.append(cond)
        return -x

    sde.reverse_drift(x, 0.5, score, label=3)
    sde.probability_flow_drift(x, 0.5, score, label=4)
    assert seen == [{"label": 3}, {"label": 4}]


# --- transitions -------------------------------------------------------------------------------


@every_kind
@given(data=st.data())
def test_transitions_compose(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    r, s, t = data.draw(times(sde, 3)).sort().values
    a_rs, b_rs = sde.transition(r, s)
    a_st, b_st = sde.transition(s, t)
    a_rt, b_rt = sde.transition(r, t)
    close(a_rt, a_st * a_rs)
    noise = (a_st * b_rs) ** 2 + b_st**2
    close(b_rt**2, noise, rtol=1e-10, atol=1e-13 * float(sde.sigma(t)) ** 2)


@every_kind
@given(data=st.data())
def test_transitions_carry_marginals_to_marginals(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    s, t = data.draw(times(sde, 2)).sort().values
    a, b = sde.transition(s, t)
    close(a * sde.alpha(s), sde.alpha(t))
    close(a**2 * sde.sigma(s) ** 2 + b**2, sde.sigma(t) ** 2)


@every_kind
@given(data=st.data())
def test_a_transition_from_the_data_is_the_marginal(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, ROWS))
    a, b = sde.transition(0.0, t)
    close(a, sde.alpha(t) / sde.alpha(0.0))
    start = sde.sigma(0.0)
    close(b, (sde.sigma(t) ** 2 - (a * start) ** 2).sqrt(), rtol=1e-9)
    assert (float(start) == 0) == (kind != "VE")  # as published, VE starts at sigma_min


@every_kind
@given(data=st.data(), u=st.floats(0, 0.98))
def test_a_transition_over_no_time_is_the_identity(
    kind: str, data: st.DataObject, u: float
) -> None:
    sde = data.draw(PROCESSES[kind])
    for t in (u * sde.T, 0.0):
        a, b = sde.transition(t, t)
        assert float(a) == 1
        assert float(b) == 0


@every_kind
@given(data=st.data(), seed=seeds())
def test_the_posterior_is_bayes_rule(kind: str, data: st.DataObject, seed: int) -> None:
    sde, rng = data.draw(PROCESSES[kind]), generator(seed)
    u, part = data.draw(fractions(0.02)), data.draw(st.floats(0.01, 0.9))
    t = sde.T * torch.tensor([u, 0.7 * u], dtype=torch.float64)
    s = part * t
    x_t, x_0 = normal(rng, 2, 4), normal(rng, 2, 4)
    mean, std = sde.posterior(x_t, x_0, s, t)

    alpha_s, sigma_s = sde.alpha(s)[:, None], sde.sigma(s)[:, None]
    a = sde.alpha(t)[:, None] / alpha_s
    likelihood = a**2 / (sde.sigma(t)[:, None] ** 2 - a**2 * sigma_s**2)
    prior = sigma_s**-2
    expected = (likelihood * x_t / a + prior * alpha_s * x_0) / (likelihood + prior)
    close(mean, expected, rtol=1e-9, atol=1e-9)
    close(std.expand(2, 4), (likelihood + prior).rsqrt().expand(2, 4), rtol=1e-9)


@pytest.mark.parametrize("kind", [k for k in PROCESSES if k != "VE"])
@given(data=st.data(), u=fractions())
def test_the_posterior_at_the_data_is_the_data(kind: str, data: st.DataObject, u: float) -> None:
    sde = data.draw(PROCESSES[kind])
    x_t, x_0 = normal(generator(0), 2, 3), normal(generator(1), 2, 3)
    mean, std = sde.posterior(x_t, x_0, 0.0, u * sde.T)
    close(mean, x_0)
    assert float(std.abs().max()) == 0


@every_kind
@given(data=st.data())
def test_one_of_two_times_may_be_shared_by_all_rows(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, 2, low=0.5))
    s = data.draw(times(sde, 2, high=0.4))
    x_t, x_0 = normal(generator(0), 2, 2), normal(generator(1), 2, 2)
    for mixed, whole in (((s[0], t), (s[0].expand(2), t)), ((s, t[0]), (s, t[0].expand(2)))):
        for actual, expected in zip(
            sde.posterior(x_t, x_0, *mixed), sde.posterior(x_t, x_0, *whole), strict=True
        ):
            close(actual.expand(2, 2), expected.expand(2, 2))


@continuous
@settings(max_examples=6)
@given(data=st.data())
def test_integrated_moments_are_the_transition(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    s, t = data.draw(times(sde, 2, low=0.02, high=0.95)).sort().values.tolist()
    one = torch.ones(1, dtype=torch.float64)

    def moments(time: float, state: np.ndarray) -> list[float]:
        rate, g = float(sde.drift(one, time)), float(sde.diffusion(time))
        return [rate * state[0], 2 * rate * state[1] + g**2]

    solved = solve_ivp(moments, (s, t), [1.0, 0.0], method="DOP853", rtol=1e-11, atol=1e-13)
    mean, variance = solved.y[:, -1]
    a, b = sde.transition(s, t)
    scale = float(sde.sigma(t)) ** 2
    assert mean == pytest.approx(float(sde.alpha(t) / sde.alpha(s)), rel=1e-9, abs=1e-11)
    assert mean == pytest.approx(float(a), rel=1e-9, abs=1e-11)
    assert variance == pytest.approx(float(b) ** 2, rel=1e-9, abs=1e-10 * scale)


# --- schedules ---------------------------------------------------------------------------------

Real = Callable[[mpmath.mpf], mpmath.mpf]
mp = mpmath.mp.clone()
mp.dps = 50


def _linear(sde: VP | SubVP) -> Real:
    low, high = mp.mpf(sde.beta_min), mp.mpf(sde.beta_max)
    return lambda t: low * t + (high - low) * t**2 / 2


def _vp(sde: VP) -> tuple[Real, Real]:
    integral = _linear(sde)
    return lambda t: mp.exp(-integral(t) / 2), lambda t: mp.sqrt(1 - mp.exp(-integral(t)))


def _sub_vp(sde: SubVP) -> tuple[Real, Real]:
    integral = _linear(sde)
    return lambda t: mp.exp(-integral(t) / 2), lambda t: 1 - mp.exp(-integral(t))


def _cosine(sde: CosineVP) -> tuple[Real, Real]:
    s = mp.mpf(sde.s)

    def alpha(t: mpmath.mpf) -> mpmath.mpf:
        return mp.cos((t + s) / (1 + s) * mp.pi / 2) / mp.cos(s / (1 + s) * mp.pi / 2)

    return alpha, lambda t: mp.sqrt(1 - alpha(t) ** 2)


def _ve(sde: VE) -> tuple[Real, Real]:
    low, high = mp.mpf(sde.sigma_min), mp.mpf(sde.sigma_max)
    return lambda t: mp.mpf(1), lambda t: low * (high / low) ** t


def _discrete(sde: DiscreteVP) -> tuple[Real, Real]:
    logs = [mp.mpf(0), *(mp.log(mp.mpf(v)) / 2 for v in sde.alphas_cumprod)]

    def alpha(t: mpmath.mpf) -> mpmath.mpf:
        n = min(max(int(mp.ceil(t)), 1), len(logs) - 1)
        return mp.exp(logs[n - 1] + (t - n + 1) * (logs[n] - logs[n - 1]))

    return alpha, lambda t: mp.sqrt(1 - alpha(t) ** 2)


def _own(sde: OwnGaussian) -> tuple[Real, Real]:
    rate, scale = mp.mpf(sde.rate), mp.mpf(sde.scale)
    return lambda t: mp.exp(-rate * t), lambda t: scale * mp.sqrt(t * (1 + t))


DEFINITIONS: dict[str, Callable[..., tuple[Real, Real]]] = {
    "VP": _vp,
    "SubVP": _sub_vp,
    "CosineVP": _cosine,
    "VE": _ve,
    "EDM": lambda sde: (lambda t: mp.mpf(1), lambda t: t),
    "RectifiedFlow": lambda sde: (lambda t: 1 - t, lambda t: t),
    "DiscreteVP": _discrete,
    "OwnGaussian": _own,
}


@every_kind
@pytest.mark.parametrize("u", [1e-8, 1e-4, 0.031, 0.517, 1 - 1e-4, 1 - 1e-9])
@settings(max_examples=6)
@given(data=st.data())
def test_schedules_equal_their_definitions_in_exact_arithmetic(
    kind: str, u: float, data: st.DataObject
) -> None:
    sde = data.draw(PROCESSES[kind])
    alpha, sigma = DEFINITIONS[kind](sde)
    t = u * sde.T
    time = mp.mpf(t)
    rate = mp.diff(alpha, time) / alpha(time)
    expected = {
        "alpha": alpha(time),
        "sigma": sigma(time),
        "log_sigma": mp.log(sigma(time)),
        "alpha_dot": mp.diff(alpha, time),
        "sigma_dot": mp.diff(sigma, time),
        "drift_rate": rate,
        "diffusion": mp.sqrt(2 * sigma(time) * (mp.diff(sigma, time) - rate * sigma(time))),
    }
    for name, value in expected.items():
        actual = float(getattr(sde, name)(t))
        assert actual == pytest.approx(float(value), rel=1e-11, abs=1e-14), name
    log_alpha, log_snr = mp.log(alpha(time)), 2 * mp.log(alpha(time) / sigma(time))
    assert float(sde.log_alpha(t)) == pytest.approx(float(log_alpha), rel=1e-11, abs=1e-14)
    assert float(sde.log_snr(t)) == pytest.approx(float(log_snr), rel=1e-12, abs=1e-12)


@every_kind
@given(data=st.data())
def test_closed_form_derivatives_agree_with_autodiff(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, ROWS))
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    alpha_dot, sigma_dot = GaussianSDE.alpha_dot(sde, t), GaussianSDE.sigma_dot(sde, t)
    rate = alpha_dot / alpha
    # autodiff of expm1 subtracts from one: its error is absolute
    close(sde.alpha_dot(t), alpha_dot, rtol=1e-11, atol=1e-12)
    close(sde.sigma_dot(t), sigma_dot, rtol=1e-11, atol=1e-12)
    close(sde.drift_rate(t), rate, rtol=1e-11)
    close(sde.diffusion(t) ** 2, 2 * sigma * (sigma_dot - rate * sigma), rtol=1e-11, atol=1e-12)
    for name, value in zip(("alpha", "sigma", "alpha_dot", "sigma_dot"), sde.point(t), strict=True):
        close(torch.as_tensor(value), getattr(sde, name)(t))
    close(sde.log_alpha(t), alpha.log(), atol=1e-13)
    close(sde.log_sigma(t), sigma.log(), atol=1e-13)


@every_kind
@settings(max_examples=10)
@given(data=st.data())
def test_log_snr_decreases(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    t = torch.linspace(0, sde.T, 200, dtype=torch.float64)
    assert bool((sde.log_snr(t).diff() < 0).all())


@every_kind
@given(data=st.data())
def test_time_from_log_snr_inverts_log_snr(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    near_the_data = torch.tensor([1e-6, 1e-3], dtype=torch.float64) * sde.T
    t = torch.cat([data.draw(times(sde, ROWS, high=0.9999)), near_the_data])
    close(sde.time_from_log_snr(sde.log_snr(t)), t, rtol=1e-9, atol=1e-12 * sde.T)


@pytest.mark.parametrize(
    "sde",
    [
        VP(),
        VP(0.0, 20.0),
        SubVP(),
        EDM(),
        RectifiedFlow(),
        OwnGaussian(),
        DiscreteVP.from_betas(linear_betas(10)),
    ],
)
def test_the_inverse_keeps_its_digits_near_the_data(sde: GaussianSDE) -> None:
    t = sde.T * torch.tensor([1e-12, 1e-8, 1e-4], dtype=torch.float64)
    close(sde.time_from_log_snr(sde.log_snr(t)), t, rtol=1e-12)


@pytest.mark.parametrize(
    "sde",
    [VP(0.1, 80.0), SubVP(0.1, 80.0), DiscreteVP.from_betas([0.9] * 16)],
)
def test_the_inverse_keeps_its_digits_deep_in_the_noise(sde: GaussianSDE) -> None:
    t = sde.T * torch.linspace(0.6, 1.0, 50, dtype=torch.float64)
    assert float(sde.log_snr(t[-1])) < -35
    close(sde.time_from_log_snr(sde.log_snr(t)), t, rtol=1e-13)


@closed_forms
@given(data=st.data())
def test_closed_form_inverses_agree_with_bisection(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    log_snr = sde.log_snr(data.draw(times(sde, ROWS)))
    bisected = GaussianSDE.time_from_log_snr(sde, log_snr)
    close(sde.time_from_log_snr(log_snr), bisected, rtol=1e-10, atol=1e-12 * sde.T)
    close(sde.time_from_log_snr(log_snr.reshape(-1, 1)), bisected[:, None], atol=1e-12 * sde.T)


@every_kind
@given(data=st.data())
def test_an_infinite_log_snr_has_a_time(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    clean, noise = (float(sde.time_from_log_snr(f64(end))) for end in (math.inf, -math.inf))
    assert clean <= 1e-12 * sde.T
    assert noise >= (1 - 1e-12) * sde.T


@given(st.floats(0.1, 60))
def test_zero_beta_min_keeps_every_inverse_finite(beta_max: float) -> None:
    for sde in (VP(0.0, beta_max), SubVP(0.0, beta_max)):
        t = torch.tensor([1e-6, 0.1, 0.5, 1.0], dtype=torch.float64)
        close(sde.time_from_log_snr(sde.log_snr(t)), t, rtol=1e-8)
        assert 0 <= float(sde.time_from_log_snr(math.inf)) < 1e-12, sde


# --- the integer chain ---------------------------------------------------------------------------


@given(st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12), seeds())
def test_the_discrete_chain_is_met_at_integers(betas: list[float], seed: int) -> None:
    sde = DiscreteVP.from_betas(betas)
    alpha, variance = 1.0, 0.0
    x_t, x_0 = normal(generator(seed), 1, 3), normal(generator(seed + 1), 1, 3)
    assert len(betas) == sde.T
    for n, beta in enumerate(betas, start=1):
        bar_before, bar = alpha**2, alpha**2 * (1 - beta)
        alpha, variance = math.sqrt(1 - beta) * alpha, (1 - beta) * variance + beta
        close(sde.alpha(n), f64(alpha))
        close(sde.sigma(n), f64(math.sqrt(variance)))
        a, b = sde.transition(n - 1, n)
        close(a, f64(math.sqrt(1 - beta)))
        close(b, f64(math.sqrt(beta)), rtol=1e-10)
        mean, std = sde.posterior(x_t, x_0, n - 1, n)
        clean = math.sqrt(bar_before) * beta / (1 - bar)
        noisy = math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar)
        close(mean, clean * x_0 + noisy * x_t, rtol=1e-9, atol=1e-9)
        close(std.squeeze(), f64(math.sqrt((1 - bar_before) / (1 - bar) * beta)), rtol=1e-9)


@given(st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12), st.floats(0, 1), st.data())
def test_log_alpha_is_linear_between_integers(
    betas: list[float], part: float, data: st.DataObject
) -> None:
    sde = DiscreteVP.from_betas(betas)
    n = data.draw(st.integers(1, len(betas)))
    left, right = sde.log_alpha(n - 1), sde.log_alpha(n)
    close(sde.log_alpha(n - 1 + part), (1 - part) * left + part * right, atol=1e-13)


def test_beta_schedules_are_the_published_ones() -> None:
    for steps in (1, 2, 10, 1000):
        assert all(b(steps).shape == (steps,) for b in (linear_betas, scaled_linear_betas))
        assert cosine_betas(steps).shape == (steps,)
    linear, scaled = linear_betas(), scaled_linear_betas()
    i = torch.arange(1000, dtype=torch.float64)
    close(linear, 1e-4 + i * (0.02 - 1e-4) / 999)
    close(scaled, (math.sqrt(0.00085) + i * (math.sqrt(0.012) - math.sqrt(0.00085)) / 999) ** 2)
    bar = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2)
    product = (1 - cosine_betas()).cumprod(0)
    close(product[:-1], (bar**2 / bar[0] ** 2)[1:-1], rtol=1e-10)
    assert float(cosine_betas()[-1]) == 0.999


def test_the_chain_tends_to_the_sde_at_first_order() -> None:
    sde = VP(0.1, 20.0)
    worst = []
    for steps in (500, 1000, 2000):
        chain = DiscreteVP.from_betas(linear_betas(steps, 0.1 / steps, 20.0 / steps))
        n = torch.arange(1, steps + 1, dtype=torch.float64)
        worst.append(float((chain.log_alpha(n) - sde.log_alpha(n / steps)).abs().max()))
    assert worst[1] < 0.05
    ratios = [worst[0] / worst[1], worst[1] / worst[2]]
    assert ratios == pytest.approx([2.0, 2.0], rel=0.03)


# --- the prior -----------------------------------------------------------------------------------


@every_kind
@settings(max_examples=12)
@given(data=st.data(), event=event_shapes(), seed=seeds())
def test_the_prior_is_a_centred_gaussian(
    kind: str, data: st.DataObject, event: tuple[int, ...], seed: int
) -> None:
    sde = data.draw(PROCESSES[kind])
    prior = sde.prior((5, *event), dtype=torch.float64)
    std = sde.prior_std
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = prior.sample()
    assert x.shape == (5, *event) and x.dtype == torch.float64
    squared = (x / std).reshape(5, -1) ** 2
    expected = -(squared + 2 * math.log(std) + math.log(2 * math.pi)).sum(1) / 2
    close(prior.log_prob(x), expected)
    assert sde.prior((2, *event)).sample().dtype == torch.float32


@every_kind
@given(data=st.data())
def test_the_prior_std_is_one_or_the_noise_at_the_end(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    if kind in ("VP", "SubVP", "CosineVP", "DiscreteVP", "RectifiedFlow"):
        assert sde.prior_std == 1
    else:
        assert sde.prior_std == pytest.approx(float(sde.sigma(sde.T)), rel=1e-12)


def test_the_published_priors() -> None:
    assert VE(sigma_max=50.0).prior_std == pytest.approx(50.0)
    assert EDM(sigma_max=80.0).prior_std == 80
    assert EDM(0.01, 3.0).T == 3 and EDM(0.01, 3.0).t_min == 0.01


@every_kind
@settings(max_examples=5)
@given(data=st.data(), seed=seeds())
def test_prior_samples_have_the_prior_variance(kind: str, data: st.DataObject, seed: int) -> None:
    sde, n = data.draw(PROCESSES[kind]), 4000
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = sde.prior((n, 1), dtype=torch.float64).sample() / sde.prior_std
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / n)


# --- Langevin ------------------------------------------------------------------------------------

AT_REST = EDM()


def target(mixture: DiagonalMixture) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """log p and score of the mixture itself, without a process."""
    return (lambda q: mixture.log_prob(AT_REST, q, 0.0), lambda q: mixture.score(AT_REST, q, 0.0))


@settings(max_examples=12)
@given(mixture=mixtures(), g=st.floats(0.1, 3), seed=seeds(), eta=etas)
def test_langevin_leaves_its_target_invariant(
    mixture: DiagonalMixture, g: float, seed: int, eta: float
) -> None:
    log_prob, score = target(mixture)
    sde = Langevin(score, g=g)
    x, t = 2 * normal(generator(seed), ROWS, mixture.dim), torch.rand(ROWS, dtype=torch.float64)
    g2 = sde.diffusion(t)[:, None] ** 2

    def reverse(x: Tensor, t: Tensor) -> Tensor:
        return sde.reverse_drift(x, t, lambda x, t: score(x), eta=eta)

    close(g2, torch.full((ROWS, 1), g**2, dtype=torch.float64))
    assert fokker_planck_residual(lambda x, t: log_prob(x), sde.drift, g2, x, t) < RESIDUAL
    assert (
        fokker_planck_residual(lambda x, t: log_prob(x), reverse, -(eta**2) * g2, x, t) < RESIDUAL
    )
    at_rest = sde.probability_flow_drift(x, t, lambda x, t: score(x))
    assert float((at_rest / sde.drift(x, t)).abs().max()) < 1e-14


def test_default_langevin_is_the_score_with_root_two_noise() -> None:
    x = normal(generator(0), 4, 2)
    sde = Langevin(lambda x: -x)
    close(sde.drift(x, 0.0), -x)
    close(sde.diffusion(0.0), f64(math.sqrt(2)))


@settings(max_examples=12)
@given(
    mixture=mixtures(),
    friction=st.floats(0.1, 5),
    mass=st.floats(0.1, 5),
    seed=seeds(),
    eta=etas,
)
def test_underdamped_langevin_leaves_position_and_momentum_invariant(
    mixture: DiagonalMixture, friction: float, mass: float, seed: int, eta: float
) -> None:
    log_prob, score = target(mixture)
    sde = UnderdampedLangevin(score, friction=friction, mass=mass)
    rng, shape = generator(seed), (ROWS, 2, mixture.dim)
    x, t = 2 * normal(rng, *shape), torch.rand(ROWS, generator=rng, dtype=torch.float64)
    noise = sde.diffusion(t)
    assert noise.shape == (ROWS, 2)
    close(noise[:, 0], torch.zeros(ROWS, dtype=torch.float64))
    g2 = (noise**2)[..., None].expand(shape).flatten(1)

    def log_density(flat: Tensor, t: Tensor) -> Tensor:
        q, p = flat.reshape(-1, *shape[1:]).unbind(1)
        return log_prob(q) - (p**2).sum(1) / (2 * mass)

    def flat(drift: Callable[..., Tensor], **kwargs: object) -> Callable[..., Tensor]:
        return lambda x, t: drift(x.reshape(-1, *shape[1:]), t, **kwargs).flatten(1)

    def stationary(x: Tensor, t: Tensor) -> Tensor:
        return sde.stationary_score(x)

    leaf = x.flatten(1).requires_grad_()
    close(
        sde.stationary_score(x),
        gradient(log_density(leaf, t), leaf)[0].reshape(shape).detach(),
        atol=1e-12,
    )
    reverse = flat(sde.reverse_drift, score=stationary, eta=eta)
    assert fokker_planck_residual(log_density, flat(sde.drift), g2, x.flatten(1), t) < RESIDUAL
    assert fokker_planck_residual(log_density, reverse, -(eta**2) * g2, x.flatten(1), t) < RESIDUAL


@given(friction=st.floats(0.1, 5), mass=st.floats(0.1, 5), event=event_shapes(), eta=etas)
def test_underdamped_langevin_reverses_the_momentum_noise_only(
    friction: float, mass: float, event: tuple[int, ...], eta: float
) -> None:
    sde = UnderdampedLangevin(torch.sin, friction=friction, mass=mass)
    rng = generator(0)
    q, p, s_q, s_p = (normal(rng, 4, *event) for _ in range(4))
    x, score = sde.join(q, p), sde.join(s_q, s_p)
    assert x.shape == (4, 2, *event)
    for part, expected in zip(sde.split(x), (q, p), strict=True):
        close(part, expected)
    kick = (1 + eta**2) / 2 * 2 * friction * mass * s_p
    expected = sde.join(p / mass, torch.sin(q) - friction * p - kick)
    for t in (0.3, f64(0.3), torch.linspace(0, 1, 4, dtype=torch.float64)):
        close(sde.reverse_drift(x, t, lambda *_: score, eta=eta), expected, atol=1e-12)
        close(sde.diffusion(t)[..., 1], torch.full_like(as_time(t), (2 * friction * mass) ** 0.5))
    hamiltonian = sde.probability_flow_drift(x, 0.0, lambda x, t: sde.stationary_score(x))
    close(hamiltonian, sde.join(p / mass, torch.sin(q)), atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_a_state_without_two_parts_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="stacked"):
        UnderdampedLangevin(torch.sin).split(torch.zeros(shape))


# --- shapes and dtypes ---------------------------------------------------------------------------

ON_TIMES = (
    *("alpha", "sigma", "log_alpha", "log_sigma", "log_snr"),
    *("alpha_dot", "sigma_dot", "drift_rate", "diffusion"),
)


@every_kind
@settings(max_examples=12)
@given(data=st.data(), event=event_shapes(), dtype=dtypes(), time_dtype=dtypes())
def test_any_event_shape_time_shape_and_dtype(
    kind: str,
    data: st.DataObject,
    event: tuple[int, ...],
    dtype: torch.dtype,
    time_dtype: torch.dtype,
) -> None:
    sde = data.draw(PROCESSES[kind])
    rows = data.draw(times(sde, ROWS, low=0.1, high=0.9)).to(time_dtype)
    x = normal(generator(0), ROWS, *event).to(dtype)
    for t in (float(rows[0]), rows[0], rows):
        shape = t.shape if isinstance(t, Tensor) else ()
        expected = t.dtype if isinstance(t, Tensor) else torch.float64
        for name in ON_TIMES:
            value = getattr(sde, name)(t)
            assert value.shape == shape and value.dtype == expected, name
        inverse = sde.time_from_log_snr(sde.log_snr(t))
        assert inverse.shape == shape and inverse.dtype == expected
        states = [
            sde.drift(x, t),
            sde.reverse_drift(x, t, lambda x, t: -x),
            sde.probability_flow_drift(x, t, lambda x, t: -x),
            sde.marginal(x, t)[0],
            sde.posterior(x, x, t / 2, t)[0],
        ]
        assert all(state.shape == x.shape and state.dtype == dtype for state in states)
        for _, std in (sde.marginal(x, t), sde.posterior(x, x, t / 2, t)):
            assert (std * x).shape == x.shape and std.dtype == dtype


@every_kind
@settings(max_examples=12)
@given(data=st.data(), event=event_shapes())
def test_a_time_per_row_is_row_by_row_the_scalar_time(
    kind: str, data: st.DataObject, event: tuple[int, ...]
) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, ROWS))
    x, y = normal(generator(0), ROWS, *event), normal(generator(1), ROWS, *event)
    calls: list[Callable[..., Tensor]] = [
        lambda x, y, t: sde.drift(x, t),
        lambda x, y, t: sde.reverse_drift(x, t, lambda x, _: x.sin(), eta=0.7),
        lambda x, y, t: sde.marginal(x, t)[0],
        lambda x, y, t: sde.marginal(x, t)[1] * torch.ones_like(x),
        lambda x, y, t: sde.posterior(x, y, t / 3, t)[0],
        lambda x, y, t: sde.posterior(x, y, t / 3, t)[1] * torch.ones_like(x),
    ]
    for call in calls:
        rows = [call(x[i : i + 1], y[i : i + 1], t[i]) for i in range(ROWS)]
        close(call(x, y, t), torch.cat(rows), atol=1e-14)
        pythonic = [call(x[i : i + 1], y[i : i + 1], float(t[i])) for i in range(ROWS)]
        close(torch.cat(rows), torch.cat(pythonic), atol=1e-14)


@every_kind
@given(data=st.data(), u=fractions())
def test_a_time_that_is_a_view_is_a_time(kind: str, data: st.DataObject, u: float) -> None:
    sde = data.draw(PROCESSES[kind])
    t = f64(u * sde.T)
    for name in ON_TIMES:
        close(getattr(sde, name)(t.expand(ROWS)), getattr(sde, name)(t).expand(ROWS))


@every_kind
@given(data=st.data(), seed=seeds())
def test_the_marginal_is_alpha_x0_and_sigma(kind: str, data: st.DataObject, seed: int) -> None:
    sde, x0 = data.draw(PROCESSES[kind]), normal(generator(seed), ROWS, 2, 3)
    t = data.draw(times(sde, ROWS))
    mean, std = sde.marginal(x0, t)
    for i in range(ROWS):
        close(mean[i], float(sde.alpha(t[i])) * x0[i])
        close(std[i].expand(2, 3), sde.sigma(t[i]).expand(2, 3))


def test_integer_times_are_times() -> None:
    sde = DiscreteVP.from_betas(linear_betas(10))
    for t in (torch.tensor(3), torch.tensor([3, 3])):
        close(sde.alpha(t), sde.alpha(3.0).expand(t.shape))


@every_kind
@given(data=st.data())
def test_equal_parameters_make_equal_hashable_processes(kind: str, data: st.DataObject) -> None:
    sde = data.draw(PROCESSES[kind])
    again = copy.deepcopy(sde)
    assert again == sde and hash(again) == hash(sde)


# --- bad parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(beta_min=2.0, beta_max=1.0),
        lambda: VP(beta_min=-0.1),
        lambda: VP(beta_min=0.0, beta_max=0.0),
        lambda: VP(beta_min=math.nan),
        lambda: SubVP(beta_min=2.0, beta_max=1.0),
        lambda: SubVP(beta_max=-1.0),
        lambda: CosineVP(s=0.0),
        lambda: CosineVP(T=1.0),
        lambda: CosineVP(T=0.0),
        lambda: VE(sigma_min=0.0),
        lambda: VE(sigma_min=2.0, sigma_max=1.0),
        lambda: EDM(sigma_min=-1.0),
        lambda: EDM(sigma_min=1.0, sigma_max=1.0),
        lambda: RectifiedFlow(T=1.5),
        lambda: Langevin(torch.sin, g=0.0),
        lambda: Langevin(torch.sin, g=math.nan),
        lambda: UnderdampedLangevin(torch.sin, friction=0.0),
        lambda: UnderdampedLangevin(torch.sin, mass=-1.0),
        lambda: DiscreteVP([]),
        lambda: DiscreteVP([0.9, 0.9]),
        lambda: DiscreteVP([0.5, 0.6]),
        lambda: DiscreteVP([0.5, 0.0, 0.0]),
        lambda: DiscreteVP([1.0, 0.5]),
        lambda: DiscreteVP([math.nan]),
        lambda: DiscreteVP.from_betas([0.0, 0.1]),
        lambda: DiscreteVP.from_betas([0.1, 1.0, 0.1]),
        lambda: DiscreteVP.from_betas([-0.1]),
    ],
)
def test_parameters_without_a_process_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError):
        make()


@pytest.mark.parametrize("t", [0.4, torch.tensor(0.4, dtype=torch.float64)], ids=["float", "[]"])
def test_drifts_hand_a_network_one_time_for_each_sample(t: float | torch.Tensor) -> None:
    seen: list[torch.Size] = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.shape)
        return -x * t[:, None]

    x = torch.ones(3, 2, dtype=torch.float64)
    for drift in (VP().reverse_drift, VP().probability_flow_drift):
        each = torch.full((3,), 0.4, dtype=torch.float64)
        torch.testing.assert_close(drift(x, t, net), drift(x, each, net))
    assert set(seen) == {torch.Size([3])}


@pytest.mark.parametrize("wrong", [None, "0.5", [None, 0.5], [0.1, "0.2"], object()])
def test_a_time_that_is_no_number_is_refused(wrong: object) -> None:
    """NumPy makes NaN of None and 0.5 of a text."""
    for verb in (VP().alpha, EDM().sigma, RectifiedFlow().log_snr):
        with pytest.raises(ArgumentError, match="the time is"):
            verb(wrong)  # type: ignore[arg-type]
