"""Weak order 3: conditions, exact laws, and moments of a mixture by quadrature.

In x0 form with eta = 1 the reverse SDE is dy = f dtau + dB with f = x0. A smooth moment of one step
is a sum over forests of f-nodes whose noises are paired: the solution has int prod min(s, s'), a
Runge-Kutta method sum prod C_ij, where C_ij h is the covariance of the noises of stages i and j.
With b_i the covariance with the noise of the step itself there are fifteen up to order 3.

For one nonlinear problem the moments follow without sampling: with u_n = g and

    u_{k-1}(x) = E u_k(step(x, z, z')),

a Gauss-Hermite rule in (z, z') and a spline in x, E g(x_n) = E u_0(x_0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from torch import Tensor

from scoresolve.grid import make_grid
from scoresolve.noise import as_noise
from scoresolve.plans import trace
from scoresolve.sde import EDM, VP, GaussianSDE
from scoresolve.solvers import SRA1, Solver, WeakRungeKutta
from scoresolve.targets import GaussianMixture

F64 = torch.float64
Array = NDArray[np.float64]
Tableau = tuple[Array, Array, Array, Array]

OURS = WeakRungeKutta()

AN3D1 = (
    (1 / 6, -0.005430430675258792, 2 / 3, 0.1720970973419255),
    ((), (1.0,), (3 / 8, 1 / 8), (-0.4526683126055039, -0.4842227708685013, 1.9368910834740051)),
    (-0.0184454049632397, 0.8017012756521233, 0.5092227024816198, 0.9758794209767762),
    (-0.1866426386543421, -0.8575745885712401, -0.4723392695015512, 0.3060354860326548),
)
"""Debrabant 2010 (BIT 50): another tableau of weak order 3, of deterministic order 4."""


def tableau(
    weights: Sequence[float],
    rows: Sequence[Sequence[float]],
    first: Sequence[float],
    second: Sequence[float],
) -> Tableau:
    a = np.array([[*row, *[0.0] * (4 - len(row))] for row in rows])
    return np.array(weights), a, np.array(first), np.array(second)


def ours() -> Tableau:
    return tableau(OURS.weights, OURS.rows, OURS.nodes, OURS.bridges)


def conditions(of: Tableau) -> dict[str, float]:
    """What each condition of weak order 3 leaves; brackets are children of a node."""
    w, a, b, second = of
    c, cov = a.sum(1), np.outer(b, b) + np.outer(second, second)
    variance = np.diag(cov)
    found = {
        "f": (w.sum(), 1),
        "f[f]": (w @ c, 1 / 2),
        "f[f,f]": (w @ c**2, 1 / 3),
        "f[f[f]]": (w @ a @ c, 1 / 6),
        "f[1,1]": (w @ variance, 1 / 2),
        "f[1], 1": (w @ b, 1 / 2),
        "f[f[1,1]]": (w @ a @ variance, 1 / 6),
        "f[f,1,1]": (w @ (c * variance), 1 / 3),
        "f[f[1],1]": (w @ (a * cov).sum(1), 1 / 6),
        "f[f,1], 1": (w @ (c * b), 1 / 3),
        "f[f[1]], 1": (w @ a @ b, 1 / 6),
        "f[1], f[1]": (w @ cov @ w, 1 / 3),
        "f[1,1,2,2]": (w @ variance**2, 1 / 3),
        "f[1,1,2], 2": (w @ (variance * b), 1 / 3),
        "f[1,2], 1, 2": (w @ b**2, 1 / 3),
    }
    return {forest: float(value - exact) for forest, (value, exact) in found.items()}


@pytest.mark.parametrize("of", [ours(), tableau(*AN3D1)], ids=["ours", "AN3D1"])
def test_tableau_satisfies_the_conditions_of_weak_order_3(of: Tableau) -> None:
    assert max(map(abs, conditions(of).values())) < 1e-15


def test_stage_noise_has_the_law_of_the_brownian_motion_at_its_time() -> None:
    w, a, chords, bridges = ours()
    nodes = a.sum(1)
    assert np.allclose(nodes, chords, rtol=0, atol=1e-15)
    assert np.allclose(chords**2 + bridges**2, nodes, rtol=0, atol=1e-15)
    assert w @ bridges == pytest.approx(1 / math.sqrt(12), abs=1e-15)
    assert (w > 0).all() and (nodes >= 0).all() and (nodes <= 1).all()


# --- Gaussian data -------------------------------------------------------------------------------


VARIANCES = torch.tensor([0.05, 0.4, 2.0], dtype=F64)


def errors_given_start(solver: Solver, sde: GaussianSDE, steps: int) -> Array:
    """Relative errors of the derivative by x_t and of the variance of x_s given x_t.

    For data of variance v the exact law is y_s = y_t (1 + v tau_s)/(1 + v tau_t) + noise.
    """
    ends = sde.time_from_log_snr(torch.tensor([-2.0, 3.0], dtype=F64))
    tau, scale = sde.log_snr(ends).exp(), sde.sigma(ends) ** 2 / sde.alpha(ends)
    times = make_grid("log_snr", sde, steps, *ends.tolist()).times
    law = trace(solver, sde, times).law(0.7, VARIANCES, "marginal")
    gain = scale[1] / scale[0] * (1 + VARIANCES * tau[1]) / (1 + VARIANCES * tau[0])
    variance = law.target_variance - gain**2 * law.start_variance
    errors = torch.stack([law.gain / gain - 1, law.noise_variance / variance - 1])
    return errors.abs().amax(1).numpy()


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=["VP", "EDM"])
def test_given_the_start_the_mean_is_exact_and_the_variance_of_order_3(sde: GaussianSDE) -> None:
    """Along the exact mean x0 is constant, so that any Runge-Kutta method follows it."""
    errors = [errors_given_start(OURS, sde, n) for n in (64, 128, 256)]
    assert max(mean for mean, _ in errors) < 1e-13
    for (_, coarse), (_, fine) in itertools.pairwise(errors):
        assert 2.8 < math.log2(coarse / fine) < 3.2, errors


@pytest.mark.parametrize(
    "broken",
    [
        {"bridges": (0.0, 0.0, 0.0, 0.0)},
        {"bridges": tuple(map(abs, OURS.bridges))},
        {"weights": (OURS.weights[0], *OURS.weights[2:0:-1], OURS.weights[3])},
    ],
    ids=["no second normal", "no opposite noise", "weights exchanged"],
)
def test_wrong_noise_is_of_lower_order(broken: dict[str, tuple[float, ...]]) -> None:
    wrong = type("Wrong", (WeakRungeKutta,), broken)()
    (_, coarse), (_, fine) = (errors_given_start(wrong, VP(), n) for n in (64, 128))
    assert math.log2(coarse / fine) < 2.2


# --- a mixture -----------------------------------------------------------------------------------

WEIGHTS, MEANS, SPREADS = (0.4, 0.6), (-1.0, 1.0), (0.1, 0.2)
MIXTURE = GaussianMixture(
    WEIGHTS, torch.tensor(MEANS, dtype=F64)[:, None], torch.tensor(SPREADS, dtype=F64)[:, None]
)
MOMENTS: tuple[Callable[[Array], Array], ...] = (
    lambda x: x,
    lambda x: x**2,
    lambda x: x**4,
    np.cos,
)


def order(coarse: Array, fine: Array) -> Array:
    return np.log2(np.abs(coarse / fine))


def expectation(sde: GaussianSDE, t: float, g: Callable[[Array], Array]) -> Array:
    """E g(x_t) for data of the mixture."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    z, weights = hermegauss(60)
    total = np.zeros(len(MOMENTS))
    for weight, mean, variance in zip(WEIGHTS, MEANS, SPREADS, strict=True):
        x = alpha * mean + math.sqrt(alpha**2 * variance + sigma**2) * z
        total = total + weight * (weights / weights.sum()) @ g(x)
    return total


def moment_errors(solver: Solver, sde: GaussianSDE, n: int) -> Array:
    """Errors of the four moments after n equal steps in log-SNR from -2 to 3."""
    times = sde.time_from_log_snr(torch.linspace(-2.0, 3.0, n + 1, dtype=F64)).tolist()
    score = MIXTURE.score_model(sde)
    z, weights = hermegauss(10)
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x = np.linspace(-7.0, 7.0, 281)
    first, second = (
        torch.from_numpy(np.tile(v.ravel(), len(x)))[:, None] for v in np.meshgrid(z, z)
    )
    states = torch.from_numpy(np.repeat(x, len(weights)))[:, None]

    def draw(x: Tensor, t: float, s: float) -> Tensor:
        return second if t == s else first

    def moments(x: Array) -> Array:
        return np.stack([g(x) for g in MOMENTS], axis=-1)

    values = moments(x)
    for t, s in reversed(list(itertools.pairwise(times))):
        after = make_interp_spline(x, values, k=7)
        out = trace(solver, sde, [t, s]).run(score, states, as_noise(draw))[:, 0].numpy()
        values = np.einsum("xzg,z->xg", after(out).reshape(len(x), -1, len(MOMENTS)), weights)
    before = make_interp_spline(x, values, k=7)
    return expectation(sde, times[0], before) - expectation(sde, times[-1], moments)


def test_moments_of_a_mixture_converge_with_order_3() -> None:
    assert (order(*(moment_errors(OURS, VP(), n) for n in (64, 128))) > 2.8).all()


def test_on_a_mixture_a_method_of_order_2_is_worse_for_the_same_calls() -> None:
    errors = [moment_errors(SRA1(), VP(), n) for n in (16, 32)]
    assert (np.abs(order(*errors) - 2) < 0.2).all()
    for steps, error in zip((8, 16), errors, strict=True):
        assert (np.abs(moment_errors(OURS, VP(), steps)) < np.abs(error) / 3).all()


# --- one path ------------------------------------------------------------------------------------
