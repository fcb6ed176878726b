"""Published deterministic samplers: the loop of each paper against the library's plan.

All solve the probability flow, in x' = x/alpha and sigma' or in x/sigma and lam,

    dx' = eps dsigma',    d(x/sigma) = x0 d(exp lam),

and differ in where they call the network and in which variable they interpolate. Multistep methods
are compared with their graded start, as published: the first steps take the past there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from test_published import GAUSSIAN, PROBLEMS, STARTS, Problem, grid, polynomial_weights, same
from torch import Tensor

import scoresolve as ss
from scoresolve.plans import Combine
from scoresolve.sde import VP
from scoresolve.solvers import (
    DEIS,
    AdamsBashforth,
    DPMSolverPP,
    ExponentialAdams,
    Solver,
    UniPC,
)

Times = Sequence[float]
Reference = Callable[[Problem, Tensor, Times], Tensor]
Step = Callable[[Problem, Tensor, float, float], Tensor]


def one_step(step: Step) -> Reference:
    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        for t, s in itertools.pairwise(times):
            x = step(p, x, t, s)
        return x

    return loop


def ddim(p: Problem, x: Tensor, t: float, s: float, eps: Tensor) -> Tensor:
    """x'_s = x'_t + (sigma'_s - sigma'_t) eps, in x (Song et al. 2020, eq. 13)."""
    return p.alpha(s) * (x / p.alpha(t) + (p.rho(s) - p.rho(t)) * eps)


def phi(k: int, z: float) -> float:
    """phi_0 = e^z, phi_{k+1} = (phi_k - 1/k!)/z: as the integral over (0, 1) of its definition."""
    if k == 0:
        return math.exp(z)
    return sum(
        polynomial_weights(
            [0.0], 0.0, 1.0, lambda u: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1)
        )
    )


# --- DPM-Solver and DPM-Solver++ -----------------------------------------------------------------


def dpm_solver_2(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Lu et al. 2022 (2206.00927), algorithm 1 (r1 = 1/2)."""
    h = p.lam(s) - p.lam(t)
    r = p.time(p.lam(t) + h / 2)
    u = p.alpha(r) / p.alpha(t) * x - p.sigma(r) * math.expm1(h / 2) * p.eps(x, t)
    return p.alpha(s) / p.alpha(t) * x - p.sigma(s) * math.expm1(h) * p.eps(u, r)


def dpm_solver_3(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Lu et al. 2022 (2206.00927), algorithm 2 (r1 = 1/3, r2 = 2/3)."""
    r1, r2 = 1 / 3, 2 / 3
    h = p.lam(s) - p.lam(t)
    s1, s2 = p.time(p.lam(t) + r1 * h), p.time(p.lam(t) + r2 * h)
    e0 = p.eps(x, t)
    u1 = p.alpha(s1) / p.alpha(t) * x - p.sigma(s1) * math.expm1(r1 * h) * e0
    d1 = p.eps(u1, s1) - e0
    u2 = (
        p.alpha(s2) / p.alpha(t) * x
        - p.sigma(s2) * math.expm1(r2 * h) * e0
        - p.sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    )
    d2 = p.eps(u2, s2) - e0
    return (
        p.alpha(s) / p.alpha(t) * x
        - p.sigma(s) * math.expm1(h) * e0
        - p.sigma(s) / r2 * (math.expm1(h) / h - 1) * d2
    )


def dpmpp_2s(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Lu et al. 2022 (2211.01095), algorithm 1 (r = 1/2)."""
    h = p.lam(s) - p.lam(t)
    r = p.time(p.lam(t) + h / 2)
    u = p.sigma(r) / p.sigma(t) * x - p.alpha(r) * math.expm1(-h / 2) * p.x0(x, t)
    return p.sigma(s) / p.sigma(t) * x - p.alpha(s) * math.expm1(-h) * p.x0(u, r)


def dpmpp_3s(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Lu et al. 2022 (2211.01095), the authors' single-step update of order 3."""
    r1, r2 = 1 / 3, 2 / 3
    h = p.lam(s) - p.lam(t)
    s1, s2 = p.time(p.lam(t) + r1 * h), p.time(p.lam(t) + r2 * h)
    m0 = p.x0(x, t)
    u1 = p.sigma(s1) / p.sigma(t) * x - p.alpha(s1) * math.expm1(-r1 * h) * m0
    m1 = p.x0(u1, s1)
    u2 = (
        p.sigma(s2) / p.sigma(t) * x
        - p.alpha(s2) * math.expm1(-r2 * h) * m0
        + p.alpha(s2) * r2 / r1 * (math.expm1(-r2 * h) / (r2 * h) + 1) * (m1 - m0)
    )
    m2 = p.x0(u2, s2)
    return (
        p.sigma(s) / p.sigma(t) * x
        - p.alpha(s) * math.expm1(-h) * m0
        + p.alpha(s) / r2 * (math.expm1(-h) / h + 1) * (m2 - m0)
    )


def dpmpp_2m(p: Problem, x: Tensor, times: Times) -> Tensor:
    """Lu et al. 2022 (2211.01095), algorithm 2."""
    past: list[tuple[float, Tensor]] = []
    for t, s in itertools.pairwise(times):
        h, m = p.lam(s) - p.lam(t), p.x0(x, t)
        d = m
        if past:
            r = (p.lam(t) - past[-1][0]) / h
            d = (1 + 1 / (2 * r)) * m - 1 / (2 * r) * past[-1][1]
        x = p.sigma(s) / p.sigma(t) * x - p.alpha(s) * math.expm1(-h) * d
        past.append((p.lam(t), m))
    return x


def dpmpp_3m(published: bool) -> Reference:
    """The Taylor form of the authors' code: graded start, D1 and D2 at the present node.

    D2 is half the second derivative, so its term is 2 phi_3; `published` has phi_3, which is not
    exact for parabolas and leaves order 2. The library takes 2 phi_3, and for its second step the
    line through two predictions.
    """

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            h, m = p.lam(s) - p.lam(t), p.x0(x, t)
            phi1 = math.expm1(-h)
            phi2 = phi1 / h + 1
            phi3 = phi2 / h - 0.5
            x = p.sigma(s) / p.sigma(t) * x - p.alpha(s) * phi1 * m
            if past:
                r0 = (p.lam(t) - past[-1][0]) / h
                d10 = (m - past[-1][1]) / r0
                if len(past) == 1:
                    x = x + p.alpha(s) * (-phi1 / 2 if published else phi2) * d10
                else:
                    r1 = (past[-1][0] - past[-2][0]) / h
                    d11 = (past[-1][1] - past[-2][1]) / r1
                    d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
                    d2 = (d10 - d11) / (r0 + r1)
                    x = x + p.alpha(s) * (phi2 * d1 - (1 if published else 2) * phi3 * d2)
            past.append((p.lam(t), m))
        return x

    return loop


# --- Adams-Bashforth in several variables --------------------------------------------------------


def eab(order: int) -> Reference:
    """x_s / sigma_s = x_t / sigma_t + int e^lam x0 dlam, x0 a polynomial in lam."""

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            past = [(p.lam(t), p.x0(x, t)), *past][:order]
            w = polynomial_weights([n for n, _ in past], p.lam(t), p.lam(s), math.exp)
            total = sum((c * m for c, (_, m) in zip(w, past, strict=True)), 0 * x)
            x = p.sigma(s) * (x / p.sigma(t) + total)
        return x

    return loop


def deis_tab(order: int) -> Reference:
    """Zhang and Chen 2022 (2204.13902), tAB: eps a polynomial in t.

    x_s = alpha_s/alpha_t x + sum_j C_j eps_j, C_j = int_t^s alpha_s (sigma/alpha)' l_j dtau; the
    integral is taken in sigma', where it is int alpha_s l_j(t(sigma')) dsigma'.
    """

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            past = [(t, p.eps(x, t)), *past][:order]
            nodes = [n for n, _ in past]
            total = 0 * x
            for j, (node, e) in enumerate(past):
                others = nodes[:j] + nodes[j + 1 :]

                def kernel(lam: float, node: float = node, others: list[float] = others) -> float:
                    tau = p.time(lam)
                    return -math.exp(-lam) * math.prod((tau - n) / (node - n) for n in others)

                total = total + sum(polynomial_weights([0.0], p.lam(t), p.lam(s), kernel)) * e
            x = p.alpha(s) * (x / p.alpha(t) + total)
        return x

    return loop


def deis_rhoab(order: int) -> Reference:
    """Zhang and Chen 2022 (2204.13902), rho-AB: x' = x/alpha, eps a polynomial in sigma'.

    The same as the linear multistep sampler of k-diffusion.
    """

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            past = [(p.rho(t), p.eps(x, t)), *past][:order]
            w = polynomial_weights([n for n, _ in past], p.rho(t), p.rho(s), lambda _: 1.0)
            total = sum((c * e for c, (_, e) in zip(w, past, strict=True)), 0 * x)
            x = p.alpha(s) * (x / p.alpha(t) + total)
        return x

    return loop


ADAMS = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def combined(past: list[Tensor]) -> Tensor:
    return sum((c * e for c, e in zip(ADAMS[len(past)], past, strict=True)), 0 * past[0])


def ipndm(order: int) -> Reference:
    """Zhang and Chen 2022 (2204.13902), iPNDM: constant weights, graded start."""

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        past: list[Tensor] = []
        for t, s in itertools.pairwise(times):
            past = [p.eps(x, t), *past][:order]
            x = ddim(p, x, t, s, combined(past))
        return x

    return loop


def pndm(p: Problem, x: Tensor, times: Times) -> Tensor:
    """Liu et al. 2022 (2202.09778), F-PNDM: three pseudo Runge-Kutta steps first."""
    past: list[Tensor] = []
    for t, s in itertools.pairwise(times):
        e1 = p.eps(x, t)
        past = [e1, *past][:4]
        if len(past) == 4:
            e = combined(past)
        else:
            middle = (t + s) / 2
            e2 = p.eps(ddim(p, x, t, middle, e1), middle)
            e3 = p.eps(ddim(p, x, t, middle, e2), middle)
            e4 = p.eps(ddim(p, x, t, s, e3), s)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        x = ddim(p, x, t, s, e)
    return x


def plms(p: Problem, x: Tensor, times: Times) -> Tensor:
    """Rombach et al. 2022's sampler: pseudo improved Euler first, then constant weights."""
    past: list[Tensor] = []
    for t, s in itertools.pairwise(times):
        past = [p.eps(x, t), *past][:4]
        e = combined(past)
        if len(past) == 1:
            e = (past[0] + p.eps(ddim(p, x, t, s, past[0]), s)) / 2
        x = ddim(p, x, t, s, e)
    return x


def dpm_2(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """k-diffusion: midpoint of log sigma', Euler in sigma'."""
    middle = p.time((p.lam(t) + p.lam(s)) / 2)
    u = ddim(p, x, t, middle, p.eps(x, t))
    return ddim(p, x, t, s, p.eps(u, middle))


def gradient_estimation(p: Problem, x: Tensor, times: Times) -> Tensor:
    """Permenter and Yuan 2023 (2306.04848): gamma eps + (1 - gamma) eps_old."""
    old: Tensor | None = None
    for t, s in itertools.pairwise(times):
        e = p.eps(x, t)
        x = ddim(p, x, t, s, e if old is None else 2 * e - old)
        old = e
    return x


# --- UniPC ---------------------------------------------------------------------------------------


def uni_pc(
    scale: Callable[[float], float], order: int = 3, correct: bool = True, data: bool = True
) -> Reference:
    """Zhao et al. 2023 (2302.04867), UniP and UniC with the authors' graded start.

    With r_i = (lam_i - lam_t)/h, D_i = m_i - m_t, z = -h for x0 and h for eps, and B = `scale(z)`:

        sum_i rho_i r_i^(k-1) = z phi_{k+1}(z) k!/B,   x_s = ddim - c B sum_i rho_i D_i/r_i,

    c = alpha_s for x0 and sigma_s for eps; an unknown alone is 1/2. The corrector has the node 1
    beside the predictor's, and its model call at the predicted state is the next step's.
    """

    def solve(r: list[float], z: float) -> Tensor:
        if len(r) == 1:
            return torch.tensor([0.5], dtype=torch.float64)
        rows = torch.tensor([[v**k for v in r] for k in range(len(r))], dtype=torch.float64)
        b = [z * phi(k + 1, z) * math.factorial(k) / scale(z) for k in range(1, len(r) + 1)]
        return torch.linalg.solve(rows, torch.tensor(b, dtype=torch.float64))

    def loop(p: Problem, x: Tensor, times: Times) -> Tensor:
        predict = p.x0 if data else p.eps
        past = [(p.lam(times[0]), predict(x, times[0]))]
        for t, s in itertools.pairwise(times):
            h, now = p.lam(s) - p.lam(t), past[0][1]
            z = -h if data else h
            kept = p.sigma(s) / p.sigma(t) if data else p.alpha(s) / p.alpha(t)
            c = p.alpha(s) if data else p.sigma(s)
            base = kept * x - c * math.expm1(z) * now
            r = [(lam - p.lam(t)) / h for lam, _ in past[1:]]
            d = [(m - now) / v for v, (_, m) in zip(r, past[1:], strict=True)]
            step = 0 * x
            if r:
                step = sum((w * v for w, v in zip(solve(r, z), d, strict=True)), step)
            x = base - c * scale(z) * step
            if s == times[-1]:
                break
            m = predict(x, s)
            if correct:
                weights = solve([*r, 1.0], z)
                step = sum((w * v for w, v in zip(weights, [*d, m - now], strict=True)), 0 * x)
                x = base - c * scale(z) * step
            past = [(p.lam(s), m), *past][:order]
        return x

    return loop


# --- RES -----------------------------------------------------------------------------------------


def res_2s(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Zhang et al. 2023 (2308.02157), two stages (c2 = 1/2)."""
    h, c2 = p.lam(s) - p.lam(t), 1 / 2
    r = p.time(p.lam(t) + c2 * h)
    m0 = p.x0(x, t)
    u = p.sigma(r) / p.sigma(t) * x + p.alpha(r) * c2 * h * phi(1, -c2 * h) * m0
    b2 = phi(2, -h) / c2
    b1 = phi(1, -h) - b2
    return p.sigma(s) / p.sigma(t) * x + p.alpha(s) * h * (b1 * m0 + b2 * p.x0(u, r))


def res_3s(p: Problem, x: Tensor, t: float, s: float) -> Tensor:
    """Zhang et al. 2023 (2308.02157), three stages (c2 = 1/2, c3 = 1); gamma from Hochbruck and
    Ostermann 2005: 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)."""
    h, c2, c3 = p.lam(s) - p.lam(t), 1 / 2, 1.0
    gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))
    r = p.time(p.lam(t) + c2 * h)
    a32 = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
    a31 = c3 * phi(1, -c3 * h) - a32
    b3 = phi(2, -h) / (gamma * c2 + c3)
    b2 = gamma * b3
    b1 = phi(1, -h) - b2 - b3
    m1 = p.x0(x, t)
    u2 = p.sigma(r) / p.sigma(t) * x + p.alpha(r) * c2 * h * phi(1, -c2 * h) * m1
    m2 = p.x0(u2, r)
    u3 = p.sigma(s) / p.sigma(t) * x + p.alpha(s) * h * (a31 * m1 + a32 * m2)
    m3 = p.x0(u3, s)
    return p.sigma(s) / p.sigma(t) * x + p.alpha(s) * h * (b1 * m1 + b2 * m2 + b3 * m3)


def dpm_fast(p: Problem, x: Tensor, times: Times) -> Tensor:
    """Lu et al. 2022 (2206.00927), DPM-Solver-fast for 3k + 2 calls: 2 in the last step."""
    for t, s in itertools.pairwise(times):
        x = (dpm_solver_2 if s == times[-1] else dpm_solver_3)(p, x, t, s)
    return x


def identity(z: float) -> float:
    return z


GRADED = "graded"
CASES: dict[str, tuple[str | Solver, Reference, int]] = {
    "dpm_solver_2": ("dpm_solver_2", one_step(dpm_solver_2), 2),
    "dpm_solver_3": ("dpm_solver_3", one_step(dpm_solver_3), 3),
    "dpm_fast": ("dpm_fast", dpm_fast, 3),
    "dpm_2": ("dpm_2", one_step(dpm_2), 2),
    "dpmpp_2s": ("dpmpp_2s", one_step(dpmpp_2s), 2),
    "dpmpp_3s": ("dpmpp_3s", one_step(dpmpp_3s), 3),
    "dpmpp_2m": (DPMSolverPP(2, start=GRADED), dpmpp_2m, 2),
    "dpmpp_3m": (DPMSolverPP(3, start=GRADED), dpmpp_3m(published=False), 2),
    **{f"deis_tab{k}": (DEIS(k, "time", start=GRADED), deis_tab(k), 2) for k in (2, 3, 4)},
    **{f"deis_rhoab{k}": (DEIS(k, "sigma", start=GRADED), deis_rhoab(k), 2) for k in (2, 3, 4)},
    **{f"eab{k}": (ExponentialAdams(k, start=GRADED), eab(k), 2) for k in (2, 3, 4)},
    "ipndm_2": ("ipndm_2", ipndm(2), 2),
    "ipndm_3": ("ipndm_3", ipndm(3), 2),
    "ipndm": ("ipndm", ipndm(4), 2),
    "ipndm_v": (AdamsBashforth(4, start=GRADED), deis_rhoab(4), 2),
    "lms": (AdamsBashforth(4, start=GRADED), deis_rhoab(4), 2),
    "pndm": ("pndm", pndm, 2),
    "plms": ("plms", plms, 2),
    "uni_p": (UniPC(3, correct=False, start=GRADED), uni_pc(identity, correct=False), 2),
    "uni_pc_1": (UniPC(1, start=GRADED), uni_pc(identity, 1), 1),
    "uni_pc_2": (UniPC(2, start=GRADED), uni_pc(identity, 2), 2),
    "uni_pc": (UniPC(3, start=GRADED), uni_pc(identity), 3),
    "uni_pc_4": (UniPC(4, start=GRADED), uni_pc(identity, 4), 3),
    "uni_pc_bh2": (UniPC(3, "bh2", start=GRADED), uni_pc(math.expm1), 3),
    "uni_pc_eps": (UniPC(3, form="eps", start=GRADED), uni_pc(identity, data=False), 3),
    "res_2s": ("res_2s", one_step(res_2s), 2),
    "res_3s": ("res_3s", one_step(res_3s), 3),
    "res_2m": (ExponentialAdams(2, start=GRADED), eab(2), 2),
    "res_3m": (ExponentialAdams(3, start=GRADED), eab(3), 2),
    "gradient_estimation": ("gradient_estimation", gradient_estimation, 1),
}
"""Name in the registry, the library's solver as published, the paper's loop, the loop's order."""


@pytest.mark.parametrize("process", PROBLEMS)
@pytest.mark.parametrize("name", CASES)
def test_a_solver_is_the_loop_of_its_paper(name: str, process: str) -> None:
    p, (solver, reference, _) = PROBLEMS[process], CASES[name]
    for steps in (1, 2, 3, 8):
        times = grid(p, steps)
        x = p.sigma(times[0]) * STARTS
        same(ss.plan(solver, p.sde, times).run(p.model, x), reference(p, x, times))


@pytest.mark.parametrize("name", CASES)
def test_the_solver_of_the_name_differs_in_its_start_only(name: str) -> None:
    """The last of eight steps has the same coefficients, whatever start the default takes."""
    p, solver = PROBLEMS["VP"], CASES[name][0]
    times = grid(p, 8)
    last = []
    for candidate in (name, solver):
        stages = ss.plan(candidate, p.sde, times).stages
        combine = [stage for stage in stages if isinstance(stage, Combine)][-1]
        last.append([c for _, c in combine.terms])
    assert last[0] == pytest.approx(last[1], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_loop_of_the_paper_converges_in_its_order(name: str) -> None:
    """Gaussian data has the flow x_s - alpha_s mu = (x_t - alpha_t mu) sqrt(V_s/V_t)."""
    _, reference, order = CASES[name]
    p = replace(PROBLEMS["RectifiedFlow"], data=GAUSSIAN, ends=(0.75, 0.2))
    (t, s), mean = p.ends, GAUSSIAN.means
    spread = [(p.alpha(u) ** 2 * GAUSSIAN.variances + p.sigma(u) ** 2).sqrt() for u in p.ends]
    exact = p.alpha(s) * mean + (STARTS - p.alpha(t) * mean) * spread[1] / spread[0]
    errors = [
        float((reference(p, STARTS, grid(p, steps)) - exact).square().mean().sqrt())
        for steps in (32, 128)
    ]
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.25, errors


def test_the_published_3m_misses_a_parabola_in_lam_and_the_mended_one_does_not() -> None:
    """x_s/sigma_s = x_t/sigma_t + int e^lam x0 dlam with x0 = lam^2, on the third step."""

    class Parabola(Problem):
        def x0(self, x: Tensor, t: float) -> Tensor:
            return torch.full_like(x, self.lam(t) ** 2)

    base = PROBLEMS["VP"]
    p = Parabola(**{f.name: getattr(base, f.name) for f in fields(base)})
    times = grid(p, 3)
    top, bottom = p.lam(times[2]), p.lam(times[3])
    antiderivative = [math.exp(v) * (v**2 - 2 * v + 2) for v in (top, bottom)]

    def missed(loop: Reference) -> float:
        before, after = loop(p, STARTS, times[:3]), loop(p, STARTS, times)
        exact = before / p.sigma(times[2]) + antiderivative[1] - antiderivative[0]
        return float((after - p.sigma(times[3]) * exact).abs().max())

    assert missed(dpmpp_3m(published=False)) < 1e-12 and missed(eab(3)) < 1e-12
    assert missed(dpmpp_3m(published=True)) > 1e-2


def edm_heun(denoiser: Callable[[Tensor, float], Tensor], x: Tensor, levels: Times) -> Tensor:
    """Karras et al. 2022 (2206.00364), algorithm 1: no correction where the step ends at 0."""
    for high, low in itertools.pairwise(levels):
        d = (x - denoiser(x, high)) / high
        euler = x + (low - high) * d
        if low == 0:
            return euler
        x = x + (low - high) * (d / 2 + (euler - denoiser(euler, low)) / (2 * low))
    return x


@pytest.mark.parametrize("name", ["heun", "edm_heun", "heun_v", "heun_flow"])
@pytest.mark.parametrize("process", PROBLEMS)
def test_heun_to_sigma_zero_is_algorithm_1_of_edm(name: str, process: str) -> None:
    """In sigma' = sigma/alpha and x/alpha; in v and flow form the last step alone."""
    p, calls = PROBLEMS[process], list[float]()

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return p.x0(x, float(t[0]))

    times = (*grid(p, 9), 0.0) if "heun_" not in name else (p.ends[1], 0.0)
    x = p.sigma(times[0]) * STARTS
    network = ss.from_denoiser(net) if process == "EDM" else ss.from_x0(net, p.sde)
    out = ss.plan(name, p.sde, times).run(network, x)
    assert len(calls) == 2 * (len(times) - 1) - 1 and min(calls) > 0

    def denoiser(y: Tensor, level: float) -> Tensor:
        t = p.time(-math.log(level))
        return p.x0(p.alpha(t) * y, t)

    levels = [*(p.rho(t) for t in times[:-1]), 0.0]
    same(out, edm_heun(denoiser, x / p.alpha(times[0]), levels))


@pytest.mark.parametrize("nfe", range(2, 13))
def test_dpm_fast_spends_its_budget_to_the_last_call_on_orders_three_and_two(nfe: int) -> None:
    solver = ss.solvers.DPMSolverFast(nfe)
    orders = solver.orders(0)
    assert sum(orders) == nfe and set(orders) <= {2, 3} and orders.count(2) <= 2
    assert ss.plan("dpm_fast", VP(), ss.make_grid("log_snr", VP(), 4)).nfe == 11
    assert ss.plan(solver, VP(), ss.make_grid("log_snr", VP(), len(orders))).nfe == nfe
