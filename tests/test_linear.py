"""Processes with matrix coefficients: exact transitions, exact scores of mixtures, and samplers.

The exact law of a sampler on Gaussian data comes from feeding it unit vectors for the start and for
every draw, since its score is linear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError, Status
from scoresolve.noise import CallableNoise
from scoresolve.sde import CriticallyDampedLangevin, LinearSDE, UnderdampedLangevin
from scoresolve.solvers import SSCS, TorchSDE

F64 = torch.float64
CLD = CriticallyDampedLangevin()
THREE = LinearSDE(
    [[-0.3, 1.0, 0.0], [-1.0, -0.5, 0.8], [0.2, -0.8, -1.5]],
    [0.1, 0.4, 1.2],
    [0.0, 0.3, 1.0],
    beta_min=0.5,
    beta_max=3.0,
    T=2.0,
)
MIXTURE = ss.GaussianMixture(
    [0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]
)


def by_ode(sde: LinearSDE, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Phi and Q of 0 to t from dPhi = beta A Phi and dQ = beta (A Q + Q A^T + G G^T)."""
    a, gg = sde.matrix.numpy(), np.diag(sde.noise.numpy() ** 2)
    m = len(a)

    def slope(time: float, flat: np.ndarray) -> np.ndarray:
        phi, q = flat.reshape(2, m, m)
        beta = float(sde.beta(time))
        return beta * np.concatenate([(a @ phi).ravel(), (a @ q + q @ a.T + gg).ravel()])

    begin = np.concatenate([np.eye(m).ravel(), np.zeros(m * m)])
    end = solve_ivp(slope, (0, t), begin, method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    return end.reshape(2, m, m)[0], end.reshape(2, m, m)[1]


@pytest.mark.parametrize("sde", [CLD, THREE])
@pytest.mark.parametrize("share", [1e-3, 0.1, 1.0])
def test_transition_solves_the_equations_of_mean_and_covariance(
    sde: LinearSDE, share: float
) -> None:
    for found, exact in zip(
        sde.transition(0.0, share * sde.T), by_ode(sde, share * sde.T), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sde", [CLD, THREE])
def test_kernel_holds_what_is_left_of_the_start_of_the_other_parts(sde: LinearSDE) -> None:
    t = 0.2 * sde.T
    phi, q = by_ode(sde, t)
    exact = phi @ np.diag(sde.start_std.numpy() ** 2) @ phi.T + q
    share, covariance = sde.kernel(t)
    np.testing.assert_allclose(share.numpy(), phi[:, 0], rtol=1e-9)
    np.testing.assert_allclose(covariance.numpy(), exact, rtol=1e-9)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([CLD, THREE]),
)
def test_transitions_compose_and_rest_in_the_stationary_law(
    one: float, two: float, sde: LinearSDE
) -> None:
    s, t = sorted((one * sde.T, two * sde.T))
    (phi, q), (early, q_early) = sde.transition(s, t), sde.transition(0.0, s)
    whole, q_whole = sde.transition(0.0, t)
    torch.testing.assert_close(phi @ early, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(phi @ q_early @ phi.mT + q, q_whole, rtol=1e-10, atol=1e-12)
    rest = phi @ sde.stationary @ phi.mT + q
    torch.testing.assert_close(rest, sde.stationary, rtol=1e-10, atol=1e-12)
    assert sde.time(float(sde.clock(t))) == pytest.approx(t, abs=1e-12)


def test_critically_damped_is_the_underdamped_equation_of_a_harmonic_well() -> None:
    x = torch.randn(5, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    mass, beta = CLD.mass, float(CLD.beta(0.3))
    plain = UnderdampedLangevin(lambda q: -q, friction=2 / math.sqrt(mass), mass=mass)
    torch.testing.assert_close(CLD.drift(x, 0.3), beta * plain.drift(x, 0.3))
    torch.testing.assert_close(CLD.diffusion(0.3), beta**0.5 * plain.diffusion(0.3).to(F64))
    torch.testing.assert_close(CLD.stationary, torch.diag(torch.tensor([1.0, mass], dtype=F64)))


@pytest.mark.parametrize("sde", [CLD, THREE])
def test_the_density_is_that_of_the_mixture_of_all_parts(sde: LinearSDE) -> None:
    t, m = 0.37 * sde.T, sde.parts
    phi, rest = sde.kernel(t)
    big = ss.GaussianMixture(
        MIXTURE.weights,
        torch.einsum("m,kd->kmd", phi, MIXTURE.means).flatten(1),
        torch.stack(
            [
                torch.kron(phi[:, None] * phi, each) + torch.kron(rest, torch.eye(2, dtype=F64))
                for each in MIXTURE.covariances
            ]
        ),
    )
    x = big.sample(20, seed=1)
    model = MIXTURE.score_model(sde)
    torch.testing.assert_close(model.log_prob(x.reshape(20, m, 2), t), big.log_prob(x))
    torch.testing.assert_close(model(x.reshape(20, m, 2), t).flatten(1), big.score(x))
    times = torch.linspace(0.1, 1, 20, dtype=F64) * sde.T
    rows = torch.stack([model(x[i : i + 1].reshape(1, m, 2), times[i])[0] for i in range(20)])
    torch.testing.assert_close(model(x.reshape(20, m, 2), times), rows)


@pytest.mark.arithmetic
@pytest.mark.parametrize("sde", [CLD, THREE])
def test_a_row_does_not_hang_on_its_batch(sde: LinearSDE) -> None:
    """To the bit at one time; at a time a row, to the rounding of the process's own transitions."""
    x = ss.Philox(0).normal(torch.empty(130, sde.parts, 5, dtype=torch.float64), 0)
    model = ss.targets.random_mixture(5, 3).score_model(sde)
    times = torch.linspace(0.1, 0.9, 130, dtype=torch.float64) * sde.T
    score, timed = model(x, 0.3), model(x, times)
    for part in (slice(0, 1), slice(7, 14), slice(1, 130)):
        assert torch.equal(model(x[part], 0.3), score[part])
        assert torch.equal(model.log_prob(x[part], 0.3), model.log_prob(x, 0.3)[part])
        torch.testing.assert_close(model(x[part], times[part]), timed[part], rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x, times[:, None, None]), timed)


def test_the_density_obeys_the_fokker_planck_equation() -> None:
    model, t, h = MIXTURE.score_model(CLD), 0.2, 1e-4
    u = torch.randn(6, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    change = (model.log_prob(u, t + h) - model.log_prob(u, t - h)) / (2 * h)
    score, g2 = model(u, t), CLD.diffusion(t).square()[:, None]
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: model(v[None], t)[0].flatten()))(u)
    laplace = (jacobian.reshape(6, 4, 4).diagonal(dim1=1, dim2=2).reshape(6, 2, 2) * g2).sum((1, 2))
    trace = 2 * float(CLD.beta(t) * CLD.matrix.trace())
    drift = (CLD.drift(u, t) * score).sum((1, 2))
    expected = -trace - drift + (laplace + (g2 * score.square()).sum((1, 2))) / 2
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


def data_variance(run: Callable[[Tensor, CallableNoise], Tensor], draws: int) -> float:
    """Exact variance of the data part of what a sampler with a linear score makes."""
    size = 2 * (draws + 1)
    units = torch.eye(size, dtype=F64).reshape(size, draws + 1, 2, 1)
    numbers = itertools.count(1)
    noise = CallableNoise(lambda *_: units[:, next(numbers)])
    out = run(units[:, 0] * torch.tensor([1.0, math.sqrt(CLD.mass)], dtype=F64)[:, None], noise)
    return float(out[:, 0, 0].square().sum())


def test_sscs_converges_with_its_order_and_beats_euler() -> None:
    variance = 0.25
    model = ss.targets.gaussian([0.0], [variance]).score_model(CLD)
    phi, rest = CLD.kernel(CLD.t_min)
    exact = float(phi[0] ** 2 * variance + rest[0, 0])

    def error(solver: ss.solvers.Integrator, draws: int) -> float:
        found = data_variance(
            lambda x, noise: ss.sample(model, CLD, x=x, solver=solver, noise=noise).x, draws
        )
        return abs(found - exact)

    errors = [error(SSCS(CLD, n), n + 1) for n in (20, 40, 80, 160)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > 0.9, errors
    assert errors[1] < error(TorchSDE("euler", steps=40), 40)


def test_both_reverse_equations_return_to_the_data() -> None:
    model, n = MIXTURE.score_model(CLD), 1500
    solvers = (SSCS(CLD, 120), ss.solvers.DormandPrince(1e-4, 1e-4), TorchSDE("euler", steps=400))
    for solver in solvers:
        out = ss.sample(model, CLD, shape=(n, 2, 2), solver=solver, seed=0, dtype=F64)
        assert out.ok.all()
        deviation = (out.x[:, 0] - MIXTURE.mean) / (MIXTURE.covariance.diagonal() / n).sqrt()
        assert float(deviation.mean(0).abs().max()) < 4.5
        spread = out.x[:, 0].T.cov() - MIXTURE.covariance
        assert float(spread.abs().max()) < 4 * math.sqrt(2 / n) * float(MIXTURE.covariance.max())


def test_likelihood_of_all_parts_is_exact() -> None:
    model = MIXTURE.score_model(CLD)
    x0, v0 = MIXTURE.sample(8, seed=3), torch.randn(8, 2, dtype=F64, generator=torch.manual_seed(0))
    u = torch.stack([x0, 0.1 * v0], 1)
    found = ss.log_likelihood(model, CLD, u, t_start=CLD.t_min)
    torch.testing.assert_close(found.log_prob, model.log_prob(u, CLD.t_min), rtol=0, atol=5e-3)


def test_a_call_limit_and_a_poisoned_row_are_told() -> None:
    model = MIXTURE.score_model(CLD)
    x = torch.randn(3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    x[1, 0, 0] = math.nan
    out = ss.sample(lambda u, t: u * 0 - u, CLD, x=x, solver=SSCS(CLD, 10), seed=0)
    assert out.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    alone = ss.sample(lambda u, t: -u, CLD, x=x[:1], solver=SSCS(CLD, 10), seed=0)
    assert torch.equal(alone.x, out.x[:1])
    limited = SSCS(CLD, 10)
    limited.max_calls = 4
    short = ss.sample(model, CLD, x=x[:1], solver=limited, seed=0)
    assert short.status.tolist() == [Status.CALL_LIMIT]
    assert float(short.t) > 0.5


def test_long_and_stiff_transitions_keep_their_digits() -> None:
    sde = LinearSDE([[0, 1.0], [-1, -10.0]], [0, 20**0.5], [0, 1.0], beta_min=4, beta_max=4)
    phi, q = sde.transition(0.0, 1.0)
    rest = sde.stationary - phi @ sde.stationary @ phi.mT
    torch.testing.assert_close(q, rest, rtol=1e-11, atol=1e-12)
    assert torch.isfinite(MIXTURE.score_model(sde).log_prob(torch.zeros(1, 2, 2), 1.0)).all()


def test_density_of_samples_that_are_drawn_from_the_prior() -> None:
    model = MIXTURE.score_model(CLD)
    drawn = ss.sample_with_log_prob(model, CLD, (16, 2, 2), dtype=F64, solver="dopri5")
    exact = model.log_prob(drawn.x, CLD.t_min)
    torch.testing.assert_close(drawn.log_prob, exact, rtol=0, atol=5e-3)


def test_a_splitting_of_another_process_is_refused() -> None:
    other, again = CriticallyDampedLangevin(beta=20.0), CriticallyDampedLangevin()
    model, shape = MIXTURE.score_model(CLD), (2, 2, 2)
    with pytest.raises(ArgumentError, match="was made for"):
        ss.sample(model, CLD, shape=shape, solver=SSCS(other, 10))
    assert again == CLD
    assert hash(again) == hash(CLD)
    assert ss.sample(model, CLD, shape=shape, solver=SSCS(again, 10)).ok.all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LinearSDE([[1.0]], [1.0], [0.0]), "stationary"),
        (lambda: LinearSDE([[-1.0, 0.0]], [1.0], [0.0]), "m rows"),
        (lambda: LinearSDE([[-1.0]], [-1.0], [0.0]), "at least 0"),
        (lambda: LinearSDE([[-1.0]], [1.0], [0.5]), "start_std"),
        (lambda: LinearSDE([[-1.0]], [0.0], [0.0]), "reach"),
        (lambda: LinearSDE([[-1.0]], [1.0], [0.0], beta_min=0.0), "beta_min"),
        (lambda: LinearSDE([[-1.0]], [1.0], [0.0], t_min=2.0), "t_min"),
        (lambda: CriticallyDampedLangevin(mass=-1.0), "mass"),
        (lambda: SSCS(ss.VP()), "LinearSDE"),
        (lambda: SSCS(CLD, 0), "steps"),
    ],
)
def test_bad_numbers_are_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        make()


def test_a_state_without_its_parts_is_refused() -> None:
    with pytest.raises(ShapeError, match="stacked"):
        CLD.drift(torch.zeros(4, 3), 0.5)
    with pytest.raises(ShapeError, match="states are"):
        MIXTURE.score_model(CLD)(torch.zeros(4, 2, 3), 0.5)
