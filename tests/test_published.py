"""Published samplers against plain loops written from the papers: what both parts share.

A `Problem` has the schedule of a process written down once more,

    x_t = alpha x_0 + sigma eps,  lam = log(alpha/sigma),  sigma' = sigma/alpha,

and the exact predictions of a Gaussian mixture, x0 = E[x_0 | x_t] and eps = (x - alpha x0)/sigma.
The references see nothing else of the library. The deterministic samplers are in
`test_published_ode`, the stochastic ones in `test_published_sde`; here is what holds for every
solver of the registry at the edges: float32, one step, a last step to sigma = 0, any event shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from strategies import generator, normal
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import GridError
from scoresolve.models import Model, from_eps, from_x0
from scoresolve.noise import NoiseSource, Philox, Purpose, Times
from scoresolve.plans import Call, Combine, Draw, Plan
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import REGISTRY, Solver, get_solver

__all__ = [
    "GAUSSIAN",
    "MIXTURE",
    "PROBLEMS",
    "STARTS",
    "Data",
    "Problem",
    "Table",
    "grid",
    "integral",
    "polynomial_weights",
    "same",
]

F64 = torch.float64


@dataclass(frozen=True)
class Data:
    """sum_k weights_k N(means_k, diag variances_k): [K], [K, D], [K, D]."""

    weights: Tensor
    means: Tensor
    variances: Tensor


MIXTURE = Data(
    torch.tensor([0.35, 0.65], dtype=F64),
    torch.tensor([[-1.0, 0.6], [0.8, -0.2]], dtype=F64),
    torch.tensor([[0.3, 0.5], [0.6, 0.2]], dtype=F64),
)
GAUSSIAN = Data(
    torch.ones(1, dtype=F64),
    torch.tensor([[0.7, -0.4]], dtype=F64),
    torch.tensor([[0.3, 1.6]], dtype=F64),
)
STARTS = torch.tensor([[-1.2, 0.3], [0.4, -0.9], [0.1, 0.2], [1.5, 1.1]], dtype=F64)


@dataclass(frozen=True)
class Problem:
    """A schedule and a data law.

    Attributes:
        sde: the library's process, for the plan under test only.
        alpha, sigma: the schedule.
        rates: their time derivatives.
        time: the time at which lam has a given value.
        ends: first and last time of the test's grids.
    """

    sde: GaussianSDE
    alpha: Callable[[float], float]
    sigma: Callable[[float], float]
    rates: Callable[[float], tuple[float, float]]
    time: Callable[[float], float]
    ends: tuple[float, float]
    data: Data = MIXTURE

    def lam(self, t: float) -> float:
        return math.log(self.alpha(t) / self.sigma(t))

    def rho(self, t: float) -> float:
        """sigma' = sigma/alpha."""
        return self.sigma(t) / self.alpha(t)

    def _components(self, x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        alpha, data = self.alpha(t), self.data
        variance = alpha**2 * data.variances + self.sigma(t) ** 2
        away = x[:, None] - alpha * data.means
        logs = data.weights.log() - (away**2 / variance + variance.log()).sum(-1) / 2
        return logs.softmax(1)[..., None], variance, away

    def x0(self, x: Tensor, t: float) -> Tensor:
        """E[x_0 | x_t = x] for `x` [B, D]."""
        weights, variance, away = self._components(x, t)
        gain = self.alpha(t) * self.data.variances / variance
        return (weights * (self.data.means + gain * away)).sum(1)

    def eps(self, x: Tensor, t: float) -> Tensor:
        """E[eps | x_t = x] for `x` [B, D]."""
        weights, variance, away = self._components(x, t)
        return self.sigma(t) * (weights * away / variance).sum(1)

    @property
    def model(self) -> Model:
        """What the library is given: the exact eps."""
        return from_eps(lambda x, t: self.eps(x, float(t[0])), self.sde)


def _vp_alpha(t: float) -> float:
    return math.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)


def _vp_sigma(t: float) -> float:
    return math.sqrt(-math.expm1(-(0.1 * t + 19.9 * t**2 / 2)))


def _vp_rates(t: float) -> tuple[float, float]:
    half = (0.1 + 19.9 * t) / 2
    return -half * _vp_alpha(t), half * _vp_alpha(t) ** 2 / _vp_sigma(t)


def _vp_time(lam: float) -> float:
    lost = math.log1p(math.exp(-2 * lam))  # = -2 log alpha
    return 2 * lost / (0.1 + math.sqrt(0.01 + 2 * 19.9 * lost))


PROBLEMS = {
    "VP": Problem(VP(), _vp_alpha, _vp_sigma, _vp_rates, _vp_time, (0.7, 0.01)),
    "EDM": Problem(
        EDM(),
        lambda t: 1.0,
        lambda t: t,
        lambda t: (0.0, 1.0),
        lambda lam: math.exp(-lam),
        (6.0, 0.03),
    ),
    "RectifiedFlow": Problem(
        RectifiedFlow(),
        lambda t: 1 - t,
        lambda t: t,
        lambda t: (-1.0, 1.0),
        lambda lam: 1 / (1 + math.exp(lam)),
        (0.85, 0.03),
    ),
}


def grid(problem: Problem, steps: int) -> tuple[float, ...]:
    """Times that are uneven in t, lam and sigma', and smooth under refinement."""
    first, last = problem.ends
    top, bottom = problem.lam(first), problem.lam(last)
    u = [(i / steps + 0.1 * math.sin(2.5 * i / steps)) for i in range(steps + 1)]
    inner = [problem.time(top + (bottom - top) * v / u[-1]) for v in u[1:-1]]
    return (first, *inner, last)


LEGENDRE = list(zip(*(v.tolist() for v in np.polynomial.legendre.leggauss(40)), strict=True))


def integral(function: Callable[[float], float], start: float, end: float) -> float:
    """By Gauss-Legendre with 40 points, exact to rounding for what is integrated here."""
    middle, half = (start + end) / 2, (end - start) / 2
    return half * math.fsum(w * function(middle + half * u) for u, w in LEGENDRE)


def polynomial_weights(
    nodes: Sequence[float], start: float, end: float, kernel: Callable[[float], float]
) -> list[float]:
    """Weights of int_start^end kernel(u) q(u) du, q the polynomial through values at `nodes`."""

    def basis(j: int, u: float) -> float:
        others = [n for i, n in enumerate(nodes) if i != j]
        return math.prod((u - n) / (nodes[j] - n) for n in others)

    return [
        integral(lambda u, j=j: kernel(u) * basis(j, u), start, end)  # type: ignore[misc]
        for j in range(len(nodes))
    ]


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal relative to the largest element."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


class Table(NoiseSource):
    """Draw `k`, counted from the first that is asked, is row `k` of a table [draws, B, D]."""

    def __init__(self, rows: Tensor) -> None:
        self.rows_of_draws, self.used = rows, 0
        self.first: int | None = None

    def normal(
        self,
        like: Tensor,
        draw: int,
        purpose: Purpose = Purpose.SOLVER,
        times: Times | None = None,
    ) -> Tensor:
        self.first = draw if self.first is None else self.first
        number = draw - self.first
        self.used = max(self.used, number + 1)
        return self.rows_of_draws[number].to(like.dtype, copy=True)


# --- every solver, at the edges ------------------------------------------------------------------

FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
every_solver = pytest.mark.parametrize("name", FIXED)
every_process = pytest.mark.parametrize("process", PROBLEMS)


def weights_of(call: Call) -> tuple[float, float]:
    """u and w of the prediction called for, m = u x + w x0, by eps = (x - alpha x0)/sigma."""
    assert call.point is not None
    alpha, sigma, alpha_dot, sigma_dot = map(float, call.point)
    on_x0, on_eps = {
        "x0": (1.0, 0.0),
        "eps": (0.0, 1.0),
        "score": (0.0, -1 / sigma),
        "v": (-sigma, alpha),
        "flow": (alpha_dot, sigma_dot),
    }[call.prediction]
    return on_eps / sigma, on_x0 - on_eps * alpha / sigma


def rounding_bound(plan: Plan, x: Tensor, noise: Philox) -> tuple[Tensor, Tensor]:
    """Result for x0 = tanh(x), and sum_i |d result/d y_i| sum_k |c_ik y_k| over its registers y_i.

    Each register is rounded with a relative error of a few eps in the terms that are summed up in
    it, and to first order its error reaches the result by the derivative: the sum times a few eps
    bounds the error of the result. Rows and elements must not mix.
    """
    values, sizes = {0: x.clone().requires_grad_()}, {0: x.abs()}
    for stage in plan.stages:
        terms: list[Tensor]
        if isinstance(stage, Combine):
            terms = [c * values[register] for register, c in stage.terms]
        elif isinstance(stage, Draw):
            terms = [noise.normal(x, stage.index).requires_grad_()]
        elif isinstance(stage, Call):
            u, w = weights_of(stage)
            terms = [u * values[stage.x], w * values[stage.x].tanh()]
        else:
            continue
        values[stage.out] = sum(terms, torch.zeros_like(x))
        sizes[stage.out] = sum((term.detach().abs() for term in terms), torch.zeros_like(x))
    result = values[plan.output]
    gains = torch.autograd.grad(result.sum(), list(values.values()), allow_unused=True)
    bound = sum(
        (g.abs() * sizes[r] for r, g in zip(values, gains, strict=True) if g is not None),
        torch.zeros_like(x),
    )
    return result.detach(), bound


@every_process
@pytest.mark.parametrize("name", FIXED)
def test_float32_differs_from_float64_by_rounding_only(name: str, process: str) -> None:
    p = PROBLEMS[process]
    times = grid(p, 8)
    x = (p.sigma(times[0]) * STARTS).float()
    model = from_x0(lambda x, t: x.tanh(), p.sde)
    plan = ss.plan(name, p.sde, times)
    exact, bound = rounding_bound(plan, x.double(), Philox(0))
    same(plan.run(model, x.double(), Philox(0)), exact, 1e-11)
    single = plan.run(model, x, Philox(0))
    assert single.dtype == torch.float32
    error = (single.double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * bound).all(), error / bound


@every_process
@every_solver
def test_one_short_step_is_exact_to_second_order(name: str, process: str) -> None:
    """The local error of a method of order one or more is O(h^2), start-up included."""
    solver, p = get_solver(name), PROBLEMS[process]
    assert isinstance(solver, Solver)
    if solver.order is None:
        return
    t = p.time(0.3)
    errors = []
    for h in (0.04, 0.02):
        law = ss.plan(solver, p.sde, (t, p.time(0.3 + h))).law(
            GAUSSIAN.means[0], GAUSSIAN.variances[0], "marginal"
        )
        errors.append(
            law.mean_error + (law.variance_error if solver.stochastic else law.path_error)
        )
    assert errors[1] < 0.3 * errors[0] + 1e-12 and errors[1] < 1e-2


@every_process
@every_solver
def test_a_last_step_to_sigma_zero_is_the_limit_or_the_predicted_x0(
    name: str, process: str
) -> None:
    """Methods whose last step has a limit take it, the others end at the x0 of their last call."""
    p = PROBLEMS[process]
    start = grid(p, 5)
    x = p.sigma(start[0]) * STARTS
    calls: list[tuple[Tensor, float]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x.clone(), float(t[0])))
        return p.eps(x, float(t[0]))

    try:
        result = ss.plan(name, p.sde, (*start, 0.0)).run(from_eps(net, p.sde), x, Philox(0))
    except GridError as error:
        assert name.endswith(("_x0", "_flow")) or name == "stochastic_heun"
        assert "move that end of the grid inside" in str(error)
        return
    assert result.isfinite().all()
    last_x, last_t = calls[-1]
    jump = last_t > 0 and torch.allclose(result, p.x0(last_x, last_t), rtol=1e-12, atol=1e-12)
    if not jump and not name.startswith("pc"):
        near = ss.plan(name, p.sde, (*start, p.time(22.0))).run(p.model, x, Philox(0))
        same(result, near, 1e-8)


@every_solver
@pytest.mark.parametrize("event", [(), (1,), (3, 1, 2)])
def test_any_event_shape_gives_the_same_numbers(name: str, event: tuple[int, ...]) -> None:
    p, rows = PROBLEMS["VP"], 4
    plan = ss.plan(name, p.sde, grid(p, 4))
    model = from_x0(lambda x, t: x.tanh(), p.sde)
    x = normal(generator(0), rows, *event)
    flat = plan.run(model, x.reshape(rows, -1), Philox(1))
    shaped = plan.run(model, x, Philox(1))
    assert shaped.shape == x.shape
    same(shaped.reshape(rows, -1), flat, 1e-13)
