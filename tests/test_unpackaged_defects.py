"""Defects of published code that is in no package: each restated, shown, and absent here.

The restatements are loops of our own around the published arithmetic, in float64.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from exact_errors import F64, HALVED, INSIDE, Run, errors, model_of, our, slope, variance_of
from numpy.polynomial import Polynomial
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import SolveError, Status
from scoresolve.noise import Philox
from scoresolve.sde import EDM, VP
from scoresolve.solvers import SASolver

# --- UniPC ---------------------------------------------------------------------------------------


def combined(p: Sequence[float], a: Tensor, d: Sequence[Tensor]) -> Tensor:
    """sum_k p_k sum_i a_ki d_i."""
    weights = torch.tensor(p, dtype=F64) @ a
    return sum((w * term for w, term in zip(weights, d, strict=True)), torch.zeros((), dtype=F64))


def unipc_vary_coeff(complete: bool, order: int = 3) -> Run:
    """The official "vary_coeff" update on x0, with D_i = (m_i - m_0)/r_i, D_K = m_s - m_0, and

        x_s = sigma_s/sigma_t x_t - alpha_s (e^-h - 1) m_0 - alpha_s sum_k p_k sum_i A_ki D_i,

    A the inverse of r_i^(k-1)/k! and p_k = p_(k-1)/(-h) - 1/k!, p_0 = e^-h - 1. The published
    corrector leaves out k = K, and all terms of D_K but one, in which the indices do not agree.
    """

    def run(times: Sequence[float], x: Tensor, noise: Any, model: ss.Model | None = None) -> Tensor:
        sde, model = VP(), model or model_of(VP())
        lam = {t: float(sde.log_snr(t)) / 2 for t in times}
        past = [(lam[times[0]], model.predict("x0", x, times[0]))]
        for t, s in itertools.pairwise(times):
            (now, m), h = past[0], lam[s] - lam[t]
            r = [(node - now) / h for node, _ in past[1:order]] + [1.0]
            last, p = len(r), [math.expm1(-h)]
            for k in range(len(r)):
                p.append(p[-1] / -h - 1 / math.factorial(k + 1))
            powers = [[ri**k / math.factorial(k + 1) for k in range(last)] for ri in r]
            c = torch.tensor(powers, dtype=F64)
            d = [(old - m) / ri for (_, old), ri in zip(past[1:order], r, strict=False)]
            a, alpha = torch.linalg.inv(c), float(sde.alpha(s))
            base = float(sde.sigma(s) / sde.sigma(t)) * x - alpha * p[0] * m
            x = base - alpha * combined(p[1:-1], torch.linalg.inv(c[:-1, :-1]), d)
            if s == times[-1]:
                break
            ahead = model.predict("x0", x, s)
            d.append(ahead - m)
            if complete:
                x = base - alpha * combined(p[1:], a, d)
            else:
                x = base - alpha * combined(p[1:-1], a[:-1, :-1], d[:-1])
                x = x - alpha * p[last] * a[max(last - 2, 0), -1] * d[-1]
            past = [(lam[s], ahead), *past][:order]
        return x

    return run


def test_unipc_vary_coeff_has_order_one_as_its_corrector_sum_is_incomplete() -> None:
    """With the whole sum it is the exact polynomial in log-SNR, as SA-Solver without noise has it;
    our UniPC has the whole sum, and a start that keeps its order 4.
    """
    found = errors(unipc_vary_coeff(complete=False), VP(), HALVED, ends=INSIDE)
    assert slope(found, HALVED) == pytest.approx(1.0, abs=0.1)
    x, times = torch.ones(1, 1, dtype=F64), ss.make_grid("log_snr", VP(), 8, *INSIDE).times
    ours = ss.plan(SASolver(tau=0.0), VP(), times).run(model_of(VP()), x)
    mended = unipc_vary_coeff(complete=True)(times, x, None)
    torch.testing.assert_close(ours, mended, rtol=1e-10, atol=0.0)
    assert slope(errors(our("uni_pc", VP()), VP(), HALVED, ends=INSIDE), HALVED) > 3.8


# --- diff-sampler --------------------------------------------------------------------------------


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals of the Lagrange polynomials of `nodes`, from their monomials."""
    weights = []
    for node in nodes:
        factors = (Polynomial([-other, 1.0]) for other in nodes if other != node)
        product = math.prod(factors, start=Polynomial([1.0]))
        whole = product.integ()
        weights.append(float((whole(end) - whole(start)) / product(node)))
    return weights


def diff_sampler_rhoab(order: int, mended: bool = False) -> Run:
    """The rhoAB-DEIS of diff-sampler: x_s = x_t + sum_j w_j eps_j, w_j = int_t^s l_j dsigma.

    Its weights, worked out ahead of its loop, are for min(i, order) nodes beside that of step i,
    while the loop has min(i, order - 1) past eps for them: one node too many from i = order on.
    There are formulas for up to four nodes; for five the weights of the step before stay.

    Source:
        github.com/zju-pi/diff-sampler: `get_deis_coeff_list` and `deis_sampler`.
    """

    def run(times: Sequence[float], x: Tensor, noise: Any, model: ss.Model | None = None) -> Tensor:
        model, past, weights = model or model_of(EDM()), list[Tensor](), list[float]()
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            past = [model.predict("eps", x, t), *past][:order]
            count = 1 + min(i, order - 1 if mended else order)
            if count <= 4:
                weights = lagrange_integrals(times[i + 1 - count : i + 1][::-1], t, s)
            for weight, eps in zip(weights, past, strict=True):
                x = x + weight * eps
        return x

    return run


@pytest.mark.parametrize("order", [2, 3])
def test_diff_sampler_rhoab_of_order_two_or_three_fails_in_the_first_step_beyond_its_start(
    order: int,
) -> None:
    name, run = f"deis_rhoab{order}", diff_sampler_rhoab(order)
    start, further = (ss.make_grid("log_snr", EDM(), n).times for n in (order, order + 1))
    assert math.isfinite(variance_of(run, EDM(), start))
    with pytest.raises(ValueError, match="shorter"):
        variance_of(run, EDM(), further)
    assert math.isfinite(variance_of(our(name, EDM()), EDM(), further))


def test_diff_sampler_rhoab_of_order_four_diverges_the_faster_the_more_steps() -> None:
    """Each step from the fifth on has the weights of the fourth, 1e36 times too much at 160."""
    found = errors(diff_sampler_rhoab(4), EDM(), HALVED)
    assert found[0] > 1e20 and found[1] > 1e20 * found[0] and found[2] > 1e10 * found[1]
    ours = errors(our("deis_rhoab4", EDM()), EDM(), HALVED)
    assert ours[0] < 0.01 and ours[2] < ours[1] < ours[0]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_our_rhoab_is_the_one_with_as_many_nodes_as_slopes_and_has_its_order(order: int) -> None:
    name, x = f"deis_rhoab{order}", torch.ones(1, 1, dtype=F64)
    times = ss.make_grid("karras", EDM(), 10).times
    ours = our(name, EDM())(times, x, None)
    theirs = diff_sampler_rhoab(order, mended=True)(times, x, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
    assert slope(errors(our(name, EDM()), EDM(), HALVED, ends=(2.0, 0.1)), HALVED) > order - 0.2


# --- score_sde -----------------------------------------------------------------------------------


def score_sde(kind: str, steps: int) -> Tensor:
    """One sample by the VP predictors of score_sde at N times, beta from .1/N to 20/N.

    ancestral            x <- (x + beta score)/sqrt(1 - beta) + sqrt(beta) z,
    reverse diffusion    x <- (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z.
    """
    model, x = model_of(VP()), torch.ones(1, 1, dtype=F64)
    betas = torch.linspace(0.1 / steps, 20.0 / steps, steps, dtype=F64)
    for i, t in enumerate(torch.linspace(1.0, 1e-3, steps, dtype=F64)):
        beta = betas[int(t * (steps - 1))]
        score, z = model(x, t), Philox(0).normal(x, i)
        if kind == "ancestral":
            x = (x + beta * score) / (1 - beta).sqrt()
        else:
            x = (2 - (1 - beta).sqrt()) * x + beta * score
        x = x + beta.sqrt() * z
    return x


@pytest.mark.parametrize(
    ("kind", "ours"), [("ancestral", "ddpm"), ("reverse diffusion", "reverse_diffusion")]
)
def test_score_sde_is_not_a_number_where_beta_max_is_more_than_the_steps(
    kind: str, ours: str
) -> None:
    """beta_max = 20: its 1 - beta is below 0 for N < 20, and 0 at N = 20."""
    for steps in range(2, 21):
        if steps < 20 or kind == "ancestral":
            assert not math.isfinite(score_sde(kind, steps))
        times = ss.make_grid("uniform", VP(), steps).times
        assert math.isfinite(variance_of(our(ours, VP()), VP(), times))
        for solver in (ours, "pc"):
            out = ss.sample(model_of(VP()), VP(), shape=(4, 1), solver=solver, grid=times)
            assert bool(out.ok.all())
    assert math.isfinite(score_sde(kind, 30))


def score_sde_likelihood(score: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """Log-density by score_sde under VP, and whether SciPy says that its solver arrived.

    All rows and the integrals of their divergences, by one Rademacher probe, are one vector, which
    SciPy's RK45 takes from 1e-5 to T at tolerances of 1e-5. The log-density is that of the prior
    at the last states in its answer, plus the last integrals: nobody asks whether they are of T.

    Source:
        github.com/yang-song/score_sde_pytorch: `likelihood.get_likelihood_fn`.
    """
    sde, rows, probe = VP(), len(x), Philox(0).signs(x, 0)

    def field(t: float, y: Any) -> Any:
        state = torch.from_numpy(y[:-rows]).reshape(x.shape).requires_grad_()
        drift = -float(sde.beta(t)) / 2 * (state + score(state, torch.full((rows,), t, dtype=F64)))
        (product,) = torch.autograd.grad((drift * probe).sum(), state)
        divergence = (product * probe).sum(1)
        return torch.cat([drift.detach().flatten(), divergence]).numpy()

    start = torch.cat([x.flatten(), torch.zeros(rows, dtype=F64)]).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about what is not a number
        solution = solve_ivp(field, (1e-5, sde.T), start, method="RK45", rtol=1e-5, atol=1e-5)
    last = torch.from_numpy(solution.y[:, -1].copy())
    prior = sde.prior(tuple(x.shape), dtype=F64).log_prob(last[:-rows].reshape(x.shape))
    return prior + last[-rows:], bool(solution.success)


@pytest.mark.parametrize(
    ("flaw", "status", "solvers"),
    [
        (
            lambda t: torch.where(t > 0.3, math.nan, 0.0),
            Status.NONFINITE,
            ("auto", "ab3_flow", "dopri5", "adams"),
        ),
        (lambda t: 0.02 / (0.3 - t).abs(), Status.STEP_LIMIT, ("dopri5", "adams")),
    ],
    ids=["not a number", "stiff"],
)
def test_score_sde_likelihood_takes_where_its_solver_gave_up_for_the_end(
    flaw: Callable[[Tensor], Tensor], status: Status, solvers: Sequence[str]
) -> None:
    """The second of two rows meets a flaw at t = 0.3; the first then stops there too, 2 nats off.

    On a good model they agree.
    """
    target = ss.targets.gaussian(torch.zeros(32, dtype=F64), 0.25)
    x = target.sample(2, seed=1).abs()
    x[0] *= -1
    model = target.score_model(VP())

    def flawed(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t) - torch.where(x[:, :1] > 0, flaw(t)[:, None], 0.0) * x

    exact = target.log_prob(x)
    good, arrived = score_sde_likelihood(model, x)
    assert arrived
    torch.testing.assert_close(good, exact, rtol=0.0, atol=1e-3)
    bad, arrived = score_sde_likelihood(flawed, x)
    assert not arrived
    assert bool(bad.isfinite().all()) and bool(((bad - exact).abs() > 1.0).all())
    for solver in solvers:
        ours = ss.log_likelihood(flawed, VP(), x, solver=solver)
        assert ours.status.tolist() == [Status.OK, status]
        assert float(ours.log_prob[0]) == pytest.approx(float(exact[0]), abs=0.01)
        assert math.isnan(ours.log_prob[1]) and math.isnan(ours.bits_per_dim[1])
    with pytest.raises(SolveError, match=f"1 of 2 samples failed .1 {status.name}"):
        ss.log_likelihood(flawed, VP(), x, solver="adams", raise_on_failure=True)
