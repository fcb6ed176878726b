"""Published stochastic samplers: the loop of each paper against the library's plan.

With k = sigma' = sigma/alpha and x' = x/alpha, every process of the family with noise level eta,

    dx' = (1 + eta^2) eps dk + eta sqrt(d(k^2)) noise,    downward in k,

has the same marginals. Both sides are given the same normals, in the order of the sub-intervals
that they drive; the loops are weighed by their exact law for Gaussian data, where x_s is affine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import pytest
import torch
from strategies import generator, normal
from test_published import (
    GAUSSIAN,
    PROBLEMS,
    STARTS,
    Problem,
    Table,
    grid,
    integral,
    polynomial_weights,
    same,
)
from torch import Tensor

import scoresolve as ss
from scoresolve.models import from_eps, from_x0
from scoresolve.solvers import GDDIM, SEEDS, Churn, Restart, SASolver, Solver

Times = Sequence[float]
Draws = Iterator[Tensor]
Reference = Callable[[Problem, Tensor, Times, Draws], Tensor]
Step = Callable[[Problem, Tensor, float, float, Draws], Tensor]


def one_step(step: Step) -> Reference:
    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        for t, s in itertools.pairwise(times):
            x = step(p, x, t, s, z)
        return x

    return loop


# --- ancestral -----------------------------------------------------------------------------------


def split(p: Problem, t: float, s: float) -> tuple[float, float]:
    """sigma_down and sigma_up of k-diffusion in sigma' = sigma/alpha, eta = 1."""
    high, low = p.rho(t), p.rho(s)
    up = math.sqrt(low**2 * (high**2 - low**2) / high**2)
    return math.sqrt(low**2 - up**2), up


def euler_ancestral(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """k-diffusion: Euler in sigma' down, then noise up."""
    down, up = split(p, t, s)
    y = x / p.alpha(t)
    y = y + (down - p.rho(t)) * p.eps(x, t) + up * next(z)
    return p.alpha(s) * y


def dpm_2_ancestral(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """k-diffusion: midpoint of log sigma' down, then noise up."""
    down, up = split(p, t, s)
    middle = math.sqrt(p.rho(t) * down)
    r = p.time(-math.log(middle))
    y = x / p.alpha(t)
    u = y + (middle - p.rho(t)) * p.eps(x, t)
    y = y + (down - p.rho(t)) * p.eps(p.alpha(r) * u, r) + up * next(z)
    return p.alpha(s) * y


def dpmpp_2s_ancestral(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """k-diffusion: DPM-Solver++ (2S) down, then noise up."""
    down, up = split(p, t, s)
    h = math.log(p.rho(t) / down)
    r = p.time(p.lam(t) + h / 2)
    y = x / p.alpha(t)
    u = p.rho(r) / p.rho(t) * y - math.expm1(-h / 2) * p.x0(x, t)
    y = down / p.rho(t) * y - math.expm1(-h) * p.x0(p.alpha(r) * u, r) + up * next(z)
    return p.alpha(s) * y


def posterior(p: Problem, t: float, s: float) -> tuple[float, float, float]:
    """Weights of x_t and x0 in the mean of q(x_s | x_t, x0), and its variance (Ho et al. 2020)."""
    a = p.alpha(t) / p.alpha(s)
    beta = p.sigma(t) ** 2 - a**2 * p.sigma(s) ** 2
    on_x = a * p.sigma(s) ** 2 / p.sigma(t) ** 2
    return on_x, p.alpha(s) * beta / p.sigma(t) ** 2, beta * p.sigma(s) ** 2 / p.sigma(t) ** 2


def ddpm(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Ho et al. 2020 (2006.11239), eq. 7."""
    on_x, on_x0, variance = posterior(p, t, s)
    return on_x * x + on_x0 * p.x0(x, t) + math.sqrt(variance) * next(z)


def ddpm_forward(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Ho et al. 2020 (2006.11239), section 3.2: the variance of x_t | x_s."""
    on_x, on_x0, _ = posterior(p, t, s)
    beta = p.sigma(t) ** 2 - (p.alpha(t) / p.alpha(s) * p.sigma(s)) ** 2
    return on_x * x + on_x0 * p.x0(x, t) + math.sqrt(beta) * next(z)


def gddim(eta: float = 1.0) -> Step:
    """Zhang et al. 2022 (2206.05564), for a scalar process.

    F + (1 + eta^2)/2 G^2 Sigma^-1 has the transition alpha_s/alpha_t (sigma'_s/sigma'_t)^(1+eta^2);
    eps is multiplied by its difference to that of F, times sigma_t.
    """

    def step(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
        plain = p.alpha(s) / p.alpha(t)
        ratio = p.rho(s) / p.rho(t)
        damped = plain * ratio ** (1 + eta**2)
        std = p.sigma(s) * math.sqrt(1 - ratio ** (2 * eta**2))
        return plain * x + (damped - plain) * p.sigma(t) * p.eps(x, t) + std * next(z)

    return step


# --- SDE-DPM-Solver++ ----------------------------------------------------------------------------


def dpmpp_sde(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """k-diffusion's 2S on the SDE (r = 1/2, eta = 1), with the noise of one exact path.

    The noise of x_s is that of the first half carried on, exp(-h) alpha ratio, and a fresh one.
    """
    h = p.lam(s) - p.lam(t)
    r = p.time(p.lam(t) + h / 2)
    first = p.sigma(r) * math.sqrt(-math.expm1(-h)) * next(z)
    second = p.sigma(s) * math.sqrt(-math.expm1(-h)) * next(z)
    u = (
        p.sigma(r) / p.sigma(t) * math.exp(-h / 2) * x
        - p.alpha(r) * math.expm1(-h) * p.x0(x, t)
        + first
    )
    return (
        p.sigma(s) / p.sigma(t) * math.exp(-h) * x
        - p.alpha(s) * math.expm1(-2 * h) * p.x0(u, r)
        + p.sigma(s) / p.sigma(r) * math.exp(-h / 2) * first
        + second
    )


def dpmpp_2m_sde(kind: str) -> Reference:
    """k-diffusion, eta = 1; midpoint is SDE-DPM-Solver++ (2M) of Lu et al. 2022 (2211.01095)."""

    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            h, m = p.lam(s) - p.lam(t), p.x0(x, t)
            x = p.sigma(s) / p.sigma(t) * math.exp(-h) * x - p.alpha(s) * math.expm1(-2 * h) * m
            if past:
                d = (m - past[-1][1]) / ((p.lam(t) - past[-1][0]) / h)
                factor = (
                    -math.expm1(-2 * h) / 2
                    if kind == "midpoint"
                    else -math.expm1(-2 * h) / (-2 * h) + 1
                )
                x = x + p.alpha(s) * factor * d
            x = x + p.sigma(s) * math.sqrt(-math.expm1(-2 * h)) * next(z)
            past.append((p.lam(t), m))
        return x

    return loop


def dpmpp_3m_sde_of_k_diffusion(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
    """eta = 1. D2 is half the second derivative, so exactness for parabolas would need 2 phi_3."""
    past: list[tuple[float, Tensor]] = []
    for t, s in itertools.pairwise(times):
        h, m = p.lam(s) - p.lam(t), p.x0(x, t)
        q = 2 * h
        phi2 = math.expm1(-q) / q + 1
        phi3 = phi2 / q - 0.5
        x = p.sigma(s) / p.sigma(t) * math.exp(-h) * x - p.alpha(s) * math.expm1(-q) * m
        if past:
            r0 = (p.lam(t) - past[-1][0]) / h
            d10 = (m - past[-1][1]) / r0
            if len(past) == 1:
                x = x + p.alpha(s) * phi2 * d10
            else:
                r1 = (past[-1][0] - past[-2][0]) / h
                d11 = (past[-1][1] - past[-2][1]) / r1
                d1 = d10 + (d10 - d11) * r0 / (r0 + r1)
                d2 = (d10 - d11) / (r0 + r1)
                x = x + p.alpha(s) * (phi2 * d1 - phi3 * d2)
        x = x + p.sigma(s) * math.sqrt(-math.expm1(-2 * h)) * next(z)
        past.append((p.lam(t), m))
    return x


def dpmpp_3m_sde(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
    """The library's: the parabola in sigma' = sigma/alpha, dy = x0 d(1/sigma'^2)."""
    past: list[tuple[float, Tensor]] = []
    for t, s in itertools.pairwise(times):
        high, low = p.rho(t), p.rho(s)
        past = [(high, p.x0(x, t)), *past][:3]
        y = (low / high) ** 2 * x / p.alpha(t)
        for node, m in past:
            others = [k for k, _ in past if k != node]

            def density(u: float, node: float = node, others: list[float] = others) -> float:
                return (
                    -2
                    * math.exp(-2 * u)
                    * math.prod((math.exp(u) - k) / (node - k) for k in others)
                )

            y = y + low**2 * integral(density, math.log(high), math.log(low)) * m
        x = p.alpha(s) * (y + low * math.sqrt(1 - (low / high) ** 2) * next(z))
    return x


def seeds_1_eps(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Gonzalez et al. 2023 (2305.14267), SEEDS-1 on eps."""
    h = p.lam(s) - p.lam(t)
    return (
        p.alpha(s) / p.alpha(t) * x
        - 2 * p.sigma(s) * math.expm1(h) * p.eps(x, t)
        + p.sigma(s) * math.sqrt(math.expm1(2 * h)) * next(z)
    )


def seeds_2_eps(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Gonzalez et al. 2023 (2305.14267), SEEDS-2 on eps."""
    h = p.lam(s) - p.lam(t)
    r = p.time(p.lam(t) + h / 2)
    z1, z2 = next(z), next(z)
    u = (
        p.alpha(r) / p.alpha(t) * x
        - 2 * p.sigma(r) * math.expm1(h / 2) * p.eps(x, t)
        + p.sigma(r) * math.sqrt(math.expm1(h)) * z1
    )
    return (
        p.alpha(s) / p.alpha(t) * x
        - 2 * p.sigma(s) * math.expm1(h) * p.eps(u, r)
        + p.sigma(s) * math.sqrt(math.exp(2 * h) - math.exp(h)) * z1
        + p.sigma(s) * math.sqrt(math.expm1(h)) * z2
    )


def seeds_3_eps(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Gonzalez et al. 2023 (2305.14267), SEEDS-3 on eps (r1 = 1/3, r2 = 2/3)."""
    h, r1, r2 = p.lam(s) - p.lam(t), 1 / 3, 2 / 3
    t1, t2 = p.time(p.lam(t) + r1 * h), p.time(p.lam(t) + r2 * h)
    z1, z2, z3 = next(z), next(z), next(z)
    e0 = p.eps(x, t)
    u1 = (
        p.alpha(t1) / p.alpha(t) * x
        - 2 * p.sigma(t1) * math.expm1(r1 * h) * e0
        + p.sigma(t1) * math.sqrt(math.expm1(2 * r1 * h)) * z1
    )
    d1 = p.eps(u1, t1) - e0
    u2 = (
        p.alpha(t2) / p.alpha(t) * x
        - 2 * p.sigma(t2) * math.expm1(r2 * h) * e0
        - 2 * p.sigma(t2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        + p.sigma(t2) * math.sqrt(math.exp(2 * r2 * h) - math.exp(2 * r1 * h)) * z1
        + p.sigma(t2) * math.sqrt(math.expm1(2 * r1 * h)) * z2
    )
    d2 = p.eps(u2, t2) - e0
    return (
        p.alpha(s) / p.alpha(t) * x
        - 2 * p.sigma(s) * math.expm1(h) * e0
        - 2 * p.sigma(s) / r2 * (math.expm1(h) / h - 1) * d2
        + p.sigma(s) * math.sqrt(math.exp(2 * h) - math.exp(2 * r2 * h)) * z1
        + p.sigma(s) * math.sqrt(math.exp(2 * r2 * h) - math.exp(2 * r1 * h)) * z2
        + p.sigma(s) * math.sqrt(math.expm1(2 * r1 * h)) * z3
    )


def seeds_3(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """SEEDS-3 on x0, as in ComfyUI with eta = 1 (r1 = 1/3, r2 = 2/3); its SEEDS-2 is `dpmpp_sde`.

    The noise of a node, in units of sigma there, is that of the last node carried on, and fresh.
    """
    h, r1, r2 = p.lam(s) - p.lam(t), 1 / 3, 2 / 3
    t1, t2 = p.time(p.lam(t) + r1 * h), p.time(p.lam(t) + r2 * h)

    def after(r: float, end: float, m: Tensor, noise: Tensor) -> Tensor:
        kept = p.sigma(end) / p.sigma(t) * math.exp(-r * h) * x
        return kept - p.alpha(end) * math.expm1(-2 * r * h) * m + p.sigma(end) * noise

    def carried(noise: Tensor) -> Tensor:
        return math.exp(-h / 3) * noise + math.sqrt(-math.expm1(-2 * h / 3)) * next(z)

    def line(r: float) -> float:
        return (math.expm1(-2 * r * h) + 2 * r * h) / (2 * r * h)

    n1 = carried(torch.zeros_like(x))
    n2 = carried(n1)
    n3 = carried(n2)
    m0 = p.x0(x, t)
    d1 = p.x0(after(r1, t1, m0, n1), t1) - m0
    d2 = p.x0(after(r2, t2, m0, n2) + p.alpha(t2) * r2 / r1 * line(r2) * d1, t2) - m0
    return after(1.0, s, m0, n3) + p.alpha(s) / r2 * line(1.0) * d2


# --- SA-Solver -----------------------------------------------------------------------------------


def sa_solver(order: int = 3, corrector: int = 4, tau: float = 1.0) -> Reference:
    """Xue et al. 2023 (2309.05019), algorithm 1; both sums share their noise.

    The authors' start: as many nodes as there are, 3 and 4 in their default.
    """

    def weights(p: Problem, nodes: list[float], t: float, s: float) -> list[float]:
        q = 1 + tau**2
        scale = q * p.sigma(s) * math.exp(-(tau**2) * p.lam(s))
        integrals = polynomial_weights(nodes, p.lam(t), p.lam(s), lambda lam: math.exp(q * lam))
        return [scale * w for w in integrals]

    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        past = [(p.lam(times[0]), p.x0(x, times[0]))]
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            h = p.lam(s) - p.lam(t)
            base = p.sigma(s) / p.sigma(t) * math.exp(-(tau**2) * h) * x
            base = base + p.sigma(s) * math.sqrt(-math.expm1(-2 * tau**2 * h)) * next(z)
            known = past[:order]
            w = weights(p, [lam for lam, _ in known], t, s)
            predicted = base + sum((c * m for c, (_, m) in zip(w, known, strict=True)), 0 * x)
            if i == len(times) - 2:
                return predicted
            past = [(p.lam(s), p.x0(predicted, s)), *past]
            known = past[:corrector]
            w = weights(p, [lam for lam, _ in known], t, s)
            x = base + sum((c * m for c, (_, m) in zip(w, known, strict=True)), 0 * x)
        return x

    return loop


# --- ER-SDE --------------------------------------------------------------------------------------


def scale_of_the_authors(k: float) -> float:
    return k * (math.exp(k**0.3) + 10)


def er_sde(order: int, published: bool = False) -> Reference:
    """Cui et al. 2023 (2309.06169): Taylor terms in sigma' with exact integrals.

    The first derivative is that of the parabola; `published` takes the backward difference for it,
    which below order 3 is the same.
    """

    scale = scale_of_the_authors

    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        past: list[tuple[float, Tensor]] = []
        for t, s in itertools.pairwise(times):
            high, low = p.rho(t), p.rho(s)
            past = [(high, p.x0(x, t)), *past][:order]
            ratio = scale(low) / scale(high)
            y = ratio * x / p.alpha(t) + (1 - ratio) * past[0][1]

            def moment(power: int, high: float = high, low: float = low) -> float:
                def density(log_k: float) -> float:
                    k = math.exp(log_k)
                    return k * (k - high) ** power / scale(k)

                return scale(low) * integral(density, math.log(low), math.log(high))

            if len(past) > 1:
                (k0, m0), (k1, m1) = past[:2]
                slope = (m0 - m1) / (k0 - k1)
                if len(past) > 2:
                    k2, m2 = past[2]
                    bend = 2 * (slope - (m1 - m2) / (k1 - k2)) / (k0 - k2)
                    if not published:
                        slope = slope + (k0 - k1) * bend / 2
                    y = y + ((low - high) ** 2 / 2 + moment(1)) * bend
                y = y + (low - high + moment(0)) * slope
            y = y + math.sqrt(low**2 - (high * ratio) ** 2) * next(z)
            x = p.alpha(s) * y
        return x

    return loop


# --- noise up and down ---------------------------------------------------------------------------


def heun(p: Problem, y: Tensor, high: float, low: float) -> Tensor:
    """Karras et al. 2022, algorithm 1, on y = x/alpha between levels of sigma'."""
    t, s = p.time(-math.log(high)), p.time(-math.log(low))
    d = p.eps(p.alpha(t) * y, t)
    ahead = p.eps(p.alpha(s) * (y + (low - high) * d), s)
    return y + (low - high) * (d + ahead) / 2


def edm_churn(
    churn: float = 40.0, low: float = 0.05, high: float = 50.0, inflation: float = 1.0
) -> Reference:
    """Karras et al. 2022 (2206.00364), algorithm 2, never above the first level of the grid."""

    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        y = x / p.alpha(times[0])
        for t, s in itertools.pairwise(times):
            k = p.rho(t)
            gamma = min(churn / (len(times) - 1), math.sqrt(2) - 1) if low <= k <= high else 0.0
            raised = min(k * (1 + gamma), p.rho(times[0]))
            if raised > k:
                y = y + inflation * math.sqrt(raised**2 - k**2) * next(z)
            y = heun(p, y, raised, p.rho(s))
        return p.alpha(times[-1]) * y

    return loop


def restart(low: float = 0.3, high: float = 1.0, repeats: int = 2) -> Reference:
    """Xu et al. 2023 (2306.14878): one interval, on the grid's own levels."""

    def loop(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
        levels = [p.rho(t) for t in times]
        bottom = min((k for k in levels if k >= low), default=math.inf)
        top = max((k for k in levels if k <= high), default=0.0)
        inside = [k for k in levels if bottom <= k <= top]
        y = x / p.alpha(times[0])
        for start, end in itertools.pairwise(levels):
            y = heun(p, y, start, end)
            if end != bottom or bottom >= top:
                continue
            for _ in range(repeats):
                y = y + math.sqrt(top**2 - bottom**2) * next(z)
                for a, b in itertools.pairwise(inside):
                    y = heun(p, y, a, b)
        return p.alpha(times[-1]) * y

    return loop


def repaint(p: Problem, x: Tensor, times: Times, z: Draws) -> Tensor:
    """Lugmayr et al. 2022 (2201.09865), algorithm 1 without a mask: each DDPM step ten times,
    but for the last.
    """
    for t, s in itertools.pairwise(times):
        for turn in range(1 if s == times[-1] else 10):
            if turn:
                a = p.alpha(t) / p.alpha(s)
                x = a * x + math.sqrt(p.sigma(t) ** 2 - (a * p.sigma(s)) ** 2) * next(z)
            x = ddpm(p, x, t, s, z)
    return x


def consistency(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Song et al. 2023 (2303.01469), algorithm 1."""
    return p.alpha(s) * p.x0(x, t) + p.sigma(s) * next(z)


# --- strong order 1.5 ----------------------------------------------------------------------------


def additive(shift: float, node: float, weight: float, levy: float) -> Step:
    """Two stages with W and H for y = alpha x/sigma^2: dy = x0 dtau + dB, tau = alpha^2/sigma^2."""

    def step(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
        start, end = p.rho(t) ** -2, p.rho(s) ** -2
        h = end - start
        w = math.sqrt(h) * next(z)
        area = math.sqrt(h / 12) * next(z)
        r = p.time(math.log(start + node * h) / 2)

        def slope(y: Tensor, at: float) -> Tensor:
            return p.x0(p.sigma(at) ** 2 / p.alpha(at) * y, at)

        y = p.alpha(t) / p.sigma(t) ** 2 * x
        first = slope(y + shift * area, t)
        second = slope(y + node * (h * first + w) + levy * area, r)
        y = y + h * ((1 - weight) * first + weight * second) + w
        return p.sigma(s) ** 2 / p.alpha(s) * y

    return step


def flow_sde(p: Problem, x: Tensor, t: float, s: float, z: Draws) -> Tensor:
    """Ma et al. 2024 (2401.08740): Euler-Maruyama on u - w^2/2 score, w^2 = g^2 alpha^2/r^2."""
    alpha_dot, sigma_dot = p.rates(t)
    alpha, sigma, eps = p.alpha(t), p.sigma(t), p.eps(x, t)
    g_square = 2 * sigma * (sigma_dot - alpha_dot / alpha * sigma) if alpha else math.inf
    w = math.sqrt(g_square * alpha**2 / (alpha**2 + sigma**2)) if alpha else 0.0
    drift = alpha_dot * p.x0(x, t) + sigma_dot * eps + w**2 / 2 * eps / p.sigma(t)
    return x + (s - t) * drift + w * math.sqrt(t - s) * next(z)


sra1 = additive(0.0, 3 / 4, 2 / 3, 3 / 2)
"""Roessler 2010: stage y + 3/4 h f + 3/2 I_(1,0)/h with I_(1,0)/h = W/2 + H."""
shark = additive(1.0, 5 / 6, 3 / 5, 1.0)
"""Foster, dos Reis and Strange 2023 (2210.17543), eq. 6.1."""


CASES: dict[str, tuple[str | Solver, Reference, float | None]] = {
    "ddpm": ("ddpm", one_step(ddpm), 1),
    "ddpm_forward": ("ddpm_forward", one_step(ddpm_forward), 1),
    "gddim": ("gddim", one_step(gddim(1.0)), 1),
    "gddim_less": (GDDIM(0.6), one_step(gddim(0.6)), 1),
    "euler_ancestral": ("euler_ancestral", one_step(euler_ancestral), 1),
    "dpm_2_ancestral": ("dpm_2_ancestral", one_step(dpm_2_ancestral), 1),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", one_step(dpmpp_2s_ancestral), 1),
    "dpmpp_sde": ("dpmpp_sde", one_step(dpmpp_sde), 2),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", dpmpp_2m_sde("midpoint"), 2),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde_heun", dpmpp_2m_sde("heun"), 2),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", dpmpp_3m_sde, 2),
    "seeds_1": (SEEDS(1), one_step(ddpm), 1),
    "seeds_2": (SEEDS(2), one_step(dpmpp_sde), 2),
    "seeds_2 by name": ("seeds_2", one_step(dpmpp_sde), 2),
    "seeds_3": ("seeds_3", one_step(seeds_3), 2),
    "seeds_1_eps": (SEEDS(1, "eps"), one_step(seeds_1_eps), 1),
    "seeds_2_eps": (SEEDS(2, "eps"), one_step(seeds_2_eps), 2),
    "seeds_3_eps": (SEEDS(3, "eps"), one_step(seeds_3_eps), 2),
    **{f"sa_solver_{k}": (f"sa_solver_{k}", sa_solver(k, k + 1), min(k, 2)) for k in (1, 2, 3)},
    "sa_solver_even": (SASolver(3, corrector=3), sa_solver(3, 3), 2),
    "sa_solver_less": (SASolver(3, tau=0.4), sa_solver(3, 4, 0.4), 2),
    "er_sde_1": ("er_sde_1", er_sde(1), 1),
    "er_sde_2": ("er_sde_2", er_sde(2), 2),
    "er_sde_3": ("er_sde_3", er_sde(3), 2),
    "sra1": ("sra1", one_step(sra1), 2),
    "shark": ("shark", one_step(shark), 2),
    "flow_sde": ("flow_sde", one_step(flow_sde), 1),
    "edm_churn": ("edm_churn", edm_churn(), None),
    "edm_churn_of_imagenet": (Churn(40, 0.05, 50, 1.003), edm_churn(inflation=1.003), None),
    "edm_churn_part": (Churn(2.0, 0.2, 2.0), edm_churn(2.0, 0.2, 2.0), 2),
    "restart": ("restart", restart(), 2),
    "restart_wide": (Restart(0.1, 3.0, 3), restart(0.1, 3.0, 3), 2),
    "repaint": ("repaint", repaint, 1),
    "consistency": ("consistency", one_step(consistency), None),
}
"""A title, the library's solver, the paper's loop and its weak order, if it converges in one."""


class Counted:
    """Rows of a table in turn."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.used = rows, 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Tensor:
        self.used += 1
        return self.rows[self.used - 1]


@pytest.mark.parametrize("process", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_a_solver_is_the_loop_of_its_paper_on_the_same_normals(case: str, process: str) -> None:
    p, (solver, reference, _) = PROBLEMS[process], CASES[case]
    rows = torch.stack([normal(generator(k), *STARTS.shape) for k in range(160)])
    for steps in (1, 2, 3, 8):
        times = grid(p, steps)
        x = p.sigma(times[0]) * STARTS
        given, taken = Table(rows), Counted(rows)
        same(ss.plan(solver, p.sde, times).run(p.model, x, given), reference(p, x, times, taken))
        assert given.used == taken.used


def law(p: Problem, reference: Reference, times: Times, draws: int) -> tuple[Tensor, Tensor]:
    """Offset [D] and coefficients [1 + draws, D] of start and normals, for Gaussian data."""
    unit = torch.eye(draws + 2, dtype=torch.float64)[:, :, None].expand(
        -1, -1, p.data.means.shape[1]
    )
    out = reference(p, unit[:, 1], times, iter(unit[:, 2:].unbind(1)))
    return out[0], out[1:] - out[0]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] is not None])
def test_the_loop_of_the_paper_converges_weakly_in_its_order(case: str) -> None:
    """From the law of x_t, mean and covariance must tend to those of x_s; from N(0, 1) as well."""
    _, reference, order = CASES[case]
    assert order is not None
    p = replace(PROBLEMS["RectifiedFlow"], data=GAUSSIAN, ends=(0.75, 0.2))
    (t, s), mean = p.ends, GAUSSIAN.means[0]
    start, end = (p.alpha(u) ** 2 * GAUSSIAN.variances[0] + p.sigma(u) ** 2 for u in p.ends)
    errors = []
    for steps in (24, 96):
        offset, coefficients = law(p, reference, grid(p, steps), 20 * steps)
        found = offset + coefficients[0] * p.alpha(t) * mean
        spread = coefficients[0] ** 2 * start + coefficients[1:].square().sum(0)
        errors.append(
            float((spread / end - 1).abs().max() + (found - p.alpha(s) * mean).abs().max())
        )
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.3, errors


def test_the_noises_of_one_step_are_those_of_one_path() -> None:
    """In SEEDS and SDE-DPM-Solver++ 2S: covariance of the noise at a node and at the end.

    The reverse SDE's noise in x' has independent increments after division by sigma'^2 (x0 form)
    or as it is (eps form), of variance d(1/sigma'^2) and d(sigma'^2). (k-diffusion takes a path in
    sigma' itself, which agrees with these for small steps only.)
    """
    p = replace(PROBLEMS["EDM"], data=GAUSSIAN)
    t, s = 2.0, 0.5
    two, three = (t * math.sqrt(s / t),), (t * (s / t) ** (1 / 3), t * (s / t) ** (2 / 3))
    nodes: list[tuple[str | Solver, str, tuple[float, ...]]] = [
        ("dpmpp_sde", "x0", two),
        ("seeds_3", "x0", three),
        (SEEDS(2, "eps"), "eps", two),
        (SEEDS(3, "eps"), "eps", three),
    ]
    for solver, prediction, inner in nodes:
        seen: list[Tensor] = []

        def blind(x: Tensor, at: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return torch.zeros_like(x)

        draws = len(inner) + 1
        unit = torch.eye(draws, dtype=torch.float64)[..., None]
        predict = from_x0 if prediction == "x0" else from_eps
        plan = ss.plan(solver, p.sde, (t, s))
        end = plan.run(
            predict(blind, p.sde), torch.zeros(draws, 1, dtype=torch.float64), Table(unit)
        )
        noises = torch.cat([*seen[1:], end], dim=1)
        levels = [*inner, s]
        for (i, a), (j, b) in itertools.product(enumerate(levels), repeat=2):
            high = max(a, b)
            if prediction == "x0":
                expected = a**2 * b**2 * (high**-2 - t**-2)
            else:
                expected = t**2 - high**2
            assert float(noises[:, i] @ noises[:, j]) == pytest.approx(expected, rel=1e-12)


class SquaredLam(Problem):
    def x0(self, x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, self.lam(t) ** 2)


class SquaredRho(Problem):
    def x0(self, x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, self.rho(t) ** 2)


def third_step(kind: type[Problem], reference: Reference) -> tuple[Problem, Tensor, Tensor]:
    """State before and after the third step, without noise."""
    base = PROBLEMS["VP"]
    p = kind(**{f.name: getattr(base, f.name) for f in fields(base)})
    times, silence = grid(p, 3), torch.zeros(3, *STARTS.shape, dtype=torch.float64)
    before, after = (reference(p, STARTS, times[:n], iter(silence)) for n in (3, 4))
    return p, before, after


def test_the_published_3m_misses_a_parabola_in_lam() -> None:
    """y = exp(lam) x/sigma obeys dy = 2 exp(2 lam) x0 dlam; x0 = lam^2."""
    p, before, after = third_step(SquaredLam, dpmpp_3m_sde_of_k_diffusion)
    t, s = grid(p, 3)[2:]
    start, end = (math.exp(2 * v) * (v**2 - v + 1 / 2) for v in (p.lam(t), p.lam(s)))
    y = before * math.exp(p.lam(t)) / p.sigma(t) + end - start
    assert float((after - y * p.sigma(s) * math.exp(-p.lam(s))).abs().max()) > 1e-2


def test_ours_is_exact_for_a_parabola_in_sigma() -> None:
    """x0 = sigma'^2 and dy = x0 d(1/sigma'^2) move y by -2 log(sigma'_s/sigma'_t)."""
    p, before, after = third_step(SquaredRho, dpmpp_3m_sde)
    t, s = grid(p, 3)[2:]
    y = before / (p.alpha(t) * p.rho(t) ** 2) - 2 * math.log(p.rho(s) / p.rho(t))
    assert float((after - y * p.alpha(s) * p.rho(s) ** 2).abs().max()) < 1e-12


@pytest.mark.parametrize("published", [True, False])
def test_the_published_er_sde_3_misses_a_parabola_in_sigma_and_the_mended_one_does_not(
    published: bool,
) -> None:
    """y = x'/phi obeys dy = x0 d(1/phi); x0 = k^2, by parts with dk = k dlog k."""
    p, before, after = third_step(SquaredRho, er_sde(3, published))
    phi = scale_of_the_authors
    high, low = (p.rho(t) for t in grid(p, 3)[2:])
    moved = low**2 / phi(low) - high**2 / phi(high)
    moved += integral(
        lambda v: 2 * math.exp(2 * v) / phi(math.exp(v)), math.log(low), math.log(high)
    )
    y = before / p.alpha(grid(p, 3)[2]) / phi(high) + moved
    error = float((after - y * phi(low) * p.alpha(grid(p, 3)[3])).abs().max())
    assert error > 1e-2 if published else error < 1e-12


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_the_lower_level_of_an_ancestral_step_does_not_cancel(name: str) -> None:
    """For eta = 1, k_down is k_s^2/k_t: the call in the middle, at sqrt(k_t k_down), is at k_s."""
    for low in (1e-3, 1e-9):
        calls = [
            s.t for s in ss.plan(name, PROBLEMS["EDM"].sde, (2.0, low)).stages if s.kind == "call"
        ]
        assert calls == pytest.approx([2.0, low], rel=1e-12)
