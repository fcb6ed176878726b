"""Every adaptive solver on one loop: exact flows, orders, rows that come and go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptive import Recorder, column, decay, density, own_rate, poisoned, rows, state, trees
from torch import Tensor, nn

import scoresolve as ss
from scoresolve.errors import ArgumentError, ModelWarning, ScoresolveError, Status
from scoresolve.models import Model
from scoresolve.sde import GaussianSDE
from scoresolve.solvers.adaptive import (
    BOGACKI_SHAMPINE,
    DOP853,
    DORMAND_PRINCE,
    TSITOURAS,
    Adaptive,
    AdaptiveAdams,
    BogackiShampine,
    DormandPrince,
    DormandPrince853,
    Tableau,
    Tsitouras,
)
from scoresolve.solvers.registry import REGISTRY

PAIRS = {"bosh3": BogackiShampine, "dopri5": DormandPrince, "tsit5": Tsitouras}
PAIRS |= {"dop853": DormandPrince853}
CALLS = {"bosh3": 3, "dopri5": 6, "tsit5": 6, "dop853": 12}
SOLVERS: dict[str, type[Adaptive]] = {"adams": AdaptiveAdams, **PAIRS}
TWO = [AdaptiveAdams, DormandPrince]
ADAPTIVE = sorted(
    name
    for name, row in REGISTRY.items()
    if isinstance(solver := row(), Adaptive) and not solver.stochastic
)
ON_THE_WAY = [name for name in SOLVERS if name != "dop853"]  # whose steps outrun degree 5
WAYS: list[tuple[str, str | None]] = [
    *((name, way) for name in SOLVERS for way in ("time", "scaled")),
    *((name, None) for name in ADAPTIVE if name not in SOLVERS),
]
MIXTURE = ss.GaussianMixture([0.3, 0.5, 0.2], [[-2.0], [0.5], [1.5]], [[0.04], [0.3], [0.01]])


class Watched:
    """A network x0(x, t) of exactly rounded operations that remembers what it was asked."""

    data_scale = 1.0

    def __init__(self, function: Callable[..., Tensor] | None = None) -> None:
        self.sizes, self.times = list[int](), list[Tensor]()
        self.function = function or (lambda x, t: x * x * x / (4 + x * x * x * x))

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.sizes.append(len(x))
        self.times.append(t.detach().double().clone())
        return self.function(x, t, **cond)


def gaussian_net(sde: GaussianSDE, variance: float) -> Model:
    """The exact v = alpha eps - sigma x0 of data N(0, variance)."""

    def v(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t.double()), sde.sigma(t.double())
        share = alpha * sigma * (1 - variance) / (alpha**2 * variance + sigma**2)
        return column(share, x).to(x) * x

    return ss.from_v(v, sde)


def spread(sde: GaussianSDE, variance: float, t: float) -> float:
    return math.sqrt(float(sde.alpha(t)) ** 2 * variance + float(sde.sigma(t)) ** 2)


def quantile(target: ss.GaussianMixture, sde: GaussianSDE, x: Tensor, t: float) -> Tensor:
    """P(x_t <= x) [B] for a mixture on the line, which the probability flow preserves."""
    mean = float(sde.alpha(t)) * target.means[:, 0]
    variance = float(sde.alpha(t)) ** 2 * target.covariances.reshape(-1) + float(sde.sigma(t)) ** 2
    return torch.special.ndtr((x - mean) / variance.sqrt()) @ target.weights


def decayed(x: Tensor, t: float) -> Tensor:
    return x * math.exp(-t - t * t / 2)


def same(a: Any, b: Any, index: Any = slice(None)) -> None:
    for name in ("x", "status", "t", "accepted", "rejected"):
        assert torch.equal(getattr(a, name)[index], getattr(b, name)), name


# Order conditions


def tree_defect(tableau: Tableau, tree: tuple, weights: list[float], target: float) -> float:
    def stages(tree: tuple) -> list[float]:
        below = [stages(branch) for branch in tree]
        sums = [
            [sum(w * v for w, v in zip(row, phi, strict=False)) for row in tableau.a]
            for phi in below
        ]
        return [math.prod(part[i] for part in sums) for i in range(len(tableau.a))]

    return abs(sum(w * v for w, v in zip(weights, stages(tree), strict=False)) - target)


@pytest.mark.parametrize(
    ("tableau", "order", "estimates"),
    [
        (BOGACKI_SHAMPINE, 3, (2,)),
        (DORMAND_PRINCE, 5, (4,)),
        (TSITOURAS, 5, (4,)),
        (DOP853, 8, (5, 3)),
    ],
)
def test_pairs_satisfy_every_order_condition_and_no_more(
    tableau: Tableau, order: int, estimates: tuple[int, ...]
) -> None:
    weights = list(tableau.a[-1])
    assert tableau.order == order and tableau.c[0] == 0 and tableau.c[-1] == 1
    assert len(tableau.a) == len(tableau.c) and len(tableau.e) == len(estimates)
    for c, row in zip(tableau.c, tableau.a, strict=True):
        assert sum(row) == pytest.approx(c, abs=2e-14)
    for n in range(1, order + 1):
        for tree in trees(n):
            assert tree_defect(tableau, tree, weights, 1 / density(tree)) < 1e-13
    assert max(tree_defect(tableau, t, weights, 1 / density(t)) for t in trees(order + 1)) > 1e-6
    for error, embedded in zip(tableau.e, estimates, strict=True):
        for n in range(1, embedded + 1):
            assert max(tree_defect(tableau, tree, list(error), 0.0) for tree in trees(n)) < 1e-13
        left = max(tree_defect(tableau, tree, list(error), 0.0) for tree in trees(embedded + 1))
        assert left > 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_the_last_stage_is_the_first_one_of_the_next_step(name: str) -> None:
    drift = Recorder(decay)
    solution = PAIRS[name](1e-5, 1e-5).solve(drift, state(3, 2), 0.0, 2.0)
    attempts = (solution.accepted + solution.rejected).max()
    assert solution.nfe == len(drift.sizes) == 1 + CALLS[name] * attempts


def pendulum(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    """x = (a, a'): a'' = -a^3, which keeps a'^2/2 + a^4/4, forced by time in a way that cancels."""
    return torch.stack((x[:, 1], -(x[:, 0] ** 3)), 1)


def steps_and_errors(solver: Callable[[float], Adaptive], tolerances: tuple[float, ...]) -> Tensor:
    """Mean attempts and greatest error of `pendulum` at each tolerance, [n, 2]."""
    x = torch.tensor([[1.0, 0.0], [0.5, 0.9], [-1.2, 0.3]], dtype=torch.float64)
    exact = DormandPrince853(1e-13, 1e-13).solve(pendulum, x, 0.0, 4.0).x
    found = []
    for tolerance in tolerances:
        solution = solver(tolerance).solve(pendulum, x, 0.0, 4.0)
        assert (solution.status == Status.OK).all()
        found.append([solution.accepted.double().mean(), (solution.x - exact).abs().max()])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "tolerances"),
    [
        ("bosh3", (1e-4, 1e-7)),
        ("dopri5", (1e-5, 1e-10)),
        ("tsit5", (1e-5, 1e-10)),
        ("dop853", (1e-6, 1e-12)),
    ],
)
def test_error_falls_with_the_promised_power_of_work(
    name: str, tolerances: tuple[float, ...]
) -> None:
    (few, coarse), (many, fine) = steps_and_errors(lambda tol: PAIRS[name](tol, tol), tolerances)
    power = math.log(coarse / fine) / math.log(many / few)
    assert power > 0.8 * PAIRS[name].order  # the error of Tsitouras falls even faster here


@pytest.mark.parametrize(
    ("order", "tolerances"),
    [
        (1, (1e-2, 1e-4)),
        (2, (1e-3, 1e-6)),
        (3, (1e-4, 1e-7)),
        (4, (1e-5, 1e-8)),
        (5, (1e-6, 1e-10)),
    ],
)
def test_adams_work_grows_with_the_root_of_its_order_plus_one(
    order: int, tolerances: tuple[float, float]
) -> None:
    table = steps_and_errors(lambda tol: AdaptiveAdams(tol, tol, order=order), tolerances)
    (few, coarse), (many, fine) = table
    power = math.log(tolerances[0] / tolerances[1]) / math.log(many / few)
    assert power == pytest.approx(order + 1, rel=0.2)
    assert fine < coarse * (many / few) ** -(order + 0.4)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_adams_costs_one_call_per_attempted_step_and_one(order: int) -> None:
    net, sde = Watched(), ss.VP()
    found = ss.sample(
        ss.from_x0(net, sde), sde, x=state(3, 2), solver=AdaptiveAdams(1e-3, 1e-3, order=order)
    )
    attempts = found.accepted + found.rejected
    assert found.calls == len(net.sizes) == found.nfe == 1 + attempts.max()
    assert found.rows == sum(net.sizes) == (1 + attempts).sum()


# Exact probability flows


@pytest.mark.parametrize(("name", "coordinates"), WAYS)
def test_every_adaptive_solver_follows_the_flow_of_gaussian_data_both_ways(
    name: str, coordinates: str | None
) -> None:
    kind, variance, x = type(REGISTRY[name]()), 0.3, state(2, 1)
    solver = kind(1e-5, 1e-5, coordinates=coordinates, max_calls=1000)
    last = 1.0 if coordinates == "scaled" else 0.99
    first = 0.0 if coordinates == "scaled" else 1e-3
    processes: list[tuple[GaussianSDE, float, float]] = [
        (ss.VP(), 1.0, 1e-3),
        (ss.EDM(), 80.0, 2 * first),
        (ss.RectifiedFlow(), last, first),
        (ss.CosineVP(), 0.9946, 1e-3),
    ]
    for sde, far, near in processes:
        model = gaussian_net(sde, variance)
        ratio = spread(sde, variance, near) / spread(sde, variance, far)
        start = x * spread(sde, variance, far)
        data = ss.sample(model, sde, x=start, solver=solver, t_start=far, t_end=near)
        assert data.ok.all() and (data.t == near).all(), sde
        torch.testing.assert_close(data.x, ratio * start, rtol=2e-3, atol=2e-3)
        noise = ss.encode(model, sde, data.x, solver=solver, t_start=near, t_end=far)
        assert noise.ok.all(), sde
        scale = spread(sde, variance, far)
        torch.testing.assert_close(noise.x / scale, start / scale, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("name", "coordinates"), WAYS)
def test_every_adaptive_solver_keeps_the_quantiles_of_a_mixture(
    name: str, coordinates: str | None
) -> None:
    solver = type(REGISTRY[name]())(1e-4, 1e-4, coordinates=coordinates)
    for sde in (ss.EDM(), ss.CosineVP()):
        x = torch.tensor([[-1.7], [-0.3], [0.2], [1.1]], dtype=torch.float64)
        x = x * spread(sde, 1.0, sde.T)
        found = ss.sample(MIXTURE.score_model(sde), sde, x=x, solver=solver)
        assert found.ok.all(), sde
        before = quantile(MIXTURE, sde, x, sde.T)
        after = quantile(MIXTURE, sde, found.x, sde.t_min)
        torch.testing.assert_close(after, before, rtol=0, atol=5e-3)


def test_flow_without_data_at_the_start_works_from_a_velocity_too() -> None:
    sde, variance, x = ss.RectifiedFlow(), 0.3, state(4, 2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = column(t, x)
        return x * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)

    model = ss.from_flow(velocity, sde)
    found = ss.sample(model, sde, x=x, solver=AdaptiveAdams(1e-7, 1e-7), t_start=1.0, t_end=0.0)
    torch.testing.assert_close(found.x, math.sqrt(variance) * x, rtol=1e-5, atol=1e-5)


def test_adams_steps_in_time_where_the_process_is_not_gaussian() -> None:
    target = ss.GaussianMixture([1.0], [[0.0]], 1.0)
    sde, model = ss.Langevin(target.score, T=2.0), lambda x, t: -x / (1 + column(t, x))
    x = state(4, 1)
    found = ss.sample(model, sde, x=x, solver="adams", t_start=2.0, t_end=0.0)
    # dx/dt = -x + x/(1 + t)
    exact = x * math.exp(2.0) / 3
    assert found.ok.all()
    torch.testing.assert_close(found.x, exact, rtol=1e-2, atol=1e-2)


# Rows that come and go


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=4)
@given(width=st.integers(1, 19), cut=st.integers(1, 16))
def test_samples_are_the_same_to_the_last_bit_for_any_chunk_and_split(
    solver_class: type[Adaptive], dtype: torch.dtype, width: int, cut: int
) -> None:
    sde, x = ss.VP(), state(17, 3).to(dtype)
    x = x * column(torch.logspace(-1, 1, 17), x).to(dtype)
    bias = torch.linspace(-1, 1, 17).to(dtype)

    def run(part: slice, chunk: int | None = None) -> ss.Samples:
        net = Watched(lambda x, t, c: (x + column(c, x)) / (2 + x * x))
        solver = solver_class(1e-3, 1e-3)
        model = ss.from_x0(net, sde)
        return ss.sample(model, sde, x=x[part], solver=solver, chunk=chunk, c=bias[part])

    whole = run(slice(None))
    same(whole, run(slice(None), width))
    same(whole, run(slice(cut)), slice(cut))
    same(whole, run(slice(cut, None)), slice(cut, None))


@pytest.mark.parametrize(
    "name", [*CALLS, "adams", "dpm_solver_23", "adaptive_sde", "gotta_go_fast"]
)
@pytest.mark.parametrize(("batch", "width"), [(40, 8), (43, 8), (5, 2)])
def test_the_network_sees_full_batches_as_long_as_samples_wait(
    name: str, batch: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scoresolve.solvers.adaptive.loop._ASK_AGAIN", 10**9)
    net, sde, x = Watched(), ss.VP(), state(batch, 2)
    x = x * column(torch.logspace(-2, 1, batch), x)
    tolerance = 1e-3 if name in SOLVERS else 0.05
    solver = type(REGISTRY[name]())(tolerance, tolerance)
    found = ss.sample(ss.from_x0(net, sde), sde, x=x, solver=solver, chunk=width)
    step = {"dpm_solver_23": 3, "gotta_go_fast": 2, **CALLS}.get(name, 1)
    cost = step * (found.accepted + found.rejected) + 1
    assert found.rows == sum(net.sizes) == cost.sum() and max(net.sizes) == width
    assert found.calls == len(net.sizes) and found.nfe == cost.max()
    full = net.sizes.count(width)
    assert full >= (cost.sum() - width * cost.max()) / width  # after the last came in, few do
    while_waiting = net.sizes[: len(net.sizes) - net.sizes[::-1].index(width)]
    # The first slopes of the rest may be a call of their own.
    assert [size for size in while_waiting if size < width] in ([], [batch % width])


@pytest.mark.parametrize("solver_class", TWO)
def test_coupled_rows_make_one_step(solver_class: type[Adaptive]) -> None:
    rates = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    x = torch.stack((torch.ones_like(rates), rates), 1)
    drift = Recorder(own_rate)
    solution = solver_class(1e-6, 1e-6, coupled=True).solve(drift, x, 0.0, 1.0)
    assert all((t == t[0]).all() for t in drift.times) and set(drift.sizes) == {3}
    assert (solution.status == Status.OK).all() and len(set(solution.accepted.tolist())) == 1
    torch.testing.assert_close(solution.x[:, 0], (-rates).exp(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver_class", TWO)
def test_coupled_rows_have_saved_states_a_path_and_events_of_their_own(
    solver_class: type[Adaptive],
) -> None:
    x = state(5, 2).abs() + 0.5
    x[3] += 5
    options: dict[str, Any] = {"coupled": True, "save_at": (0.25, 0.7), "dense": True}
    level = 2.0
    solver = solver_class(1e-8, 1e-8, event=lambda x, t: x[:, 0] - level, **options)
    solution = solver.solve(decay, x, 0.0, 1.0)
    crossing = (1 + 2 * (x[:, 0] / level).log()).sqrt() - 1  # NaN if below from the start
    met = (crossing > 0) & (crossing < 1)
    assert met.any() and not met.all()
    assert (solution.status == torch.where(met, Status.EVENT, Status.OK)).all()
    reached = crossing.where(met, 1.0)
    torch.testing.assert_close(solution.t, reached, rtol=0, atol=1e-6)
    exact = torch.stack([decayed(row, float(t)) for row, t in zip(x, reached, strict=True)])
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-6)
    assert solution.saved is not None and solution.path is not None
    for t, saved in zip((0.25, 0.7), solution.saved, strict=True):
        there = reached >= t
        torch.testing.assert_close(saved[there], decayed(x[there], t), rtol=0, atol=1e-6)
        assert saved[~there].isnan().all()
        torch.testing.assert_close(solution.path(t)[there], saved[there], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver_class", TWO)
def test_a_coupled_row_that_fails_in_a_step_with_an_event_is_not_taken_for_another(
    solver_class: type[Adaptive],
) -> None:
    x = torch.linspace(2, 5, 40, dtype=torch.float64)[:, None].repeat(1, 2)
    x[0] = 9.0
    drift = poisoned(decay, lambda x, t, *_: (t > 0.4) & (x[:, 0] > 5))
    solver = solver_class(1e-6, 1e-6, coupled=True, event=lambda x, t: x[:, 0] - 2.0)
    solution = solver.solve(drift, x, 0.0, 1.5)
    assert solution.status.tolist() == [Status.NONFINITE] + 39 * [Status.EVENT]
    crossing = (1 + 2 * (x[1:, 0] / 2).log()).sqrt() - 1
    torch.testing.assert_close(solution.t[1:], crossing, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver_class", TWO)
def test_a_bad_row_leaves_its_coupled_neighbours_unharmed(solver_class: type[Adaptive]) -> None:
    x, solver = state(4, 3), solver_class(1e-7, 1e-7, coupled=True)
    x[1] = math.nan
    x[2] = x[2].abs() + 7
    drift = poisoned(decay, lambda x, t, *_: (t > 0.618) & (x[:, 0] > 2))
    solution = solver.solve(drift, x, 0.0, 1.0)
    assert solution.status.tolist() == [0, Status.NONFINITE, Status.NONFINITE, 0]
    torch.testing.assert_close(solution.x[[0, 3]], decayed(x[[0, 3]], 1.0), rtol=1e-5, atol=1e-5)
    alone = solver.solve(decay, x[1:2], 0.0, 1.0)
    assert alone.status.tolist() == [Status.NONFINITE]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("width", [None, 2])
def test_a_row_that_meets_nan_or_explodes_ends_alone(name: str, width: int | None) -> None:
    x = torch.tensor([0.1, math.nan, 2.0, 0.2, 50.0, -0.3], dtype=torch.float64)[:, None]
    solver = SOLVERS[name](1e-4, 1e-4, max_steps=400)

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return x * x * x * x * x

    solution = solver.solve(drift, x, 0.0, 1.0, width=width)
    good = torch.tensor([0, 3, 5])
    assert (solution.status[good] == Status.OK).all()
    assert solution.status[1] == Status.NONFINITE
    assert set(solution.status[[2, 4]].tolist()) <= {Status.NONFINITE, Status.STEP_LIMIT}
    assert solution.t[2].item() == pytest.approx(2.0**-6, rel=1e-2)
    same(solution, solver.solve(drift, x[good], 0.0, 1.0), good)
    exact = (x[good] ** -4 - 4) ** -0.25 * x[good].sign()
    torch.testing.assert_close(solution.x[good], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_slope_that_is_not_finite_at_a_last_time_of_zero_is_told_soon(name: str) -> None:
    drift = poisoned(decay, lambda x, t, *_: t == 0)
    solution = SOLVERS[name](1e-4, 1e-4).solve(drift, state(2, 2), 1.0, 0.0)
    attempts = solution.accepted + solution.rejected
    assert (solution.status == Status.NONFINITE).all() and bool((attempts < 400).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_does_not_move_while_time_stands_still(name: str) -> None:
    x = rows(2.0)
    solution = SOLVERS[name](1e-5, 1e-5).solve(lambda x, *_: x**5, x, 0.0, 1.0)
    assert solution.status != Status.OK and solution.nfe < 1500
    assert solution.x.item() < 1e4  # x = 1e4 is 2.5e-17 before the end, less than an ulp of it


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=4)
@given(limit=st.integers(1, 90), width=st.sampled_from([None, 1, 2]))
def test_limit_on_calls_is_never_passed_and_waiting_rows_are_told(
    name: str, limit: int, width: int | None
) -> None:
    drift, x = Recorder(decay), state(5, 2)
    solver = SOLVERS[name](1e-6, 1e-6, max_calls=limit)
    solution = solver.solve(drift, x, 0.0, 1.0, width=width)
    assert solution.nfe == len(drift.sizes) <= limit
    assert solution.evaluations.sum() == sum(drift.sizes)
    done = solution.status == Status.OK
    assert (solution.status[~done] == Status.CALL_LIMIT).all()
    assert (solution.t[done] == 1).all() and (solution.t[~done] < 1).all()
    t = solution.t[:, None]
    torch.testing.assert_close(solution.x, x * torch.exp(-t - t * t / 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver_class", TWO)
def test_limit_on_steps_ends_rows_that_had_to_wait_too(solver_class: type[Adaptive]) -> None:
    rates = torch.tensor([1.0, 1000.0, 1.0, 1000.0], dtype=torch.float64)
    x = torch.stack((torch.ones_like(rates), rates), 1)
    solver = solver_class(1e-4, 1e-4, max_steps=90)
    solution = solver.solve(own_rate, x, 0.0, 1.0, width=1)
    assert solution.status.tolist() == [0, Status.STEP_LIMIT] * 2
    assert (solution.accepted + solution.rejected)[[1, 3]].tolist() == [90, 90]


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize("when", [1, 3, 9])
def test_the_keyboard_hands_back_what_is_done(solver_class: type[Adaptive], when: int) -> None:
    net, sde, x = Watched(), ss.VP(), state(6, 2)
    plain = net.function

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        if len(net.sizes) == when:
            raise KeyboardInterrupt
        return plain(x, t)

    net.function = interrupted
    model, solver = ss.from_x0(net, sde), solver_class(1e-4, 1e-4)
    if when == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = ss.sample(model, sde, x=x, solver=solver, chunk=2)
            except KeyboardInterrupt:
                return
            assert (found.status == Status.INTERRUPTED).all() and torch.equal(found.x, x)
            return
    found = ss.sample(model, sde, x=x, solver=solver, chunk=2)
    assert found.x.shape == x.shape and len(net.sizes) == when
    assert set(found.status.tolist()) <= {Status.OK, Status.INTERRUPTED}
    assert (found.status[-2:] == Status.INTERRUPTED).all()
    torch.testing.assert_close(found.x[-2:], x[-2:])


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    coordinates=st.sampled_from(["time", "scaled", "log_snr"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    ends=st.sampled_from([(0.99, 0.01), (0.01, 0.99), (0.3, 0.30001), (0.7, 1e-3)]),
    first_step=st.sampled_from([None, 1e3, 1e-3]),
)
def test_the_network_is_never_asked_outside_the_interval(
    name: str,
    coordinates: str,
    dtype: torch.dtype,
    ends: tuple[float, float],
    first_step: float | None,
) -> None:
    net = Watched()
    for sde in (ss.VP(), ss.RectifiedFlow()):
        model = ss.from_x0(net, sde)
        kind = type(REGISTRY[name]())
        solver = kind(0.1, 0.1, coordinates=coordinates, first_step=first_step)
        found = ss.sample(
            model, sde, x=state(3, 2).to(dtype), solver=solver, t_start=ends[0], t_end=ends[1]
        )
        assert found.ok.all() and found.x.dtype == dtype
    low, high = torch.cat(net.times).aminmax()
    assert min(ends) <= low and high <= max(ends)


@pytest.mark.parametrize(
    ("dtype", "below", "above"),
    [(torch.float16, 1e-3, 1e-1), (torch.bfloat16, 1e-2, 0.3), (torch.float32, 1e-8, 1e-4)],
)
@pytest.mark.parametrize("solver_class", TWO)
def test_a_tolerance_below_rounding_is_told(
    solver_class: type[Adaptive], dtype: torch.dtype, below: float, above: float
) -> None:
    x = state(2, 2).to(dtype)
    with pytest.warns(ModelWarning, match="resolves"):
        solution = solver_class(below, below).solve(decay, x, 0.0, 1.0)
    assert (solution.status == Status.OK).all() and solution.nfe < 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver_class(above, above).solve(decay, x, 0.0, 1.0)


# Dropout


class Dropping(nn.Module):
    """A network of two layers with dropout between them."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(5, 64), nn.SiLU(), nn.Dropout(rate), nn.Linear(64, 4), nn.Dropout(rate)
        ).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x, column(t, x)], 1))


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
@pytest.mark.parametrize("rate", [0.1])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.filterwarnings("ignore:the network has dropout")
def test_dropout_is_recognised(
    solver_class: type[Adaptive], tolerance: float, rate: float, chunk: int | None
) -> None:
    sde = ss.VP()
    model = ss.from_eps(Dropping(rate).train(), sde)
    torch.manual_seed(1)
    solver = solver_class(tolerance, tolerance, max_calls=800)
    with pytest.warns(ModelWarning, match=r"net\.eval"):
        found = ss.sample(model, sde, x=state(6, 4), solver=solver, chunk=chunk)
    assert (found.status == Status.NOISY).all()
    assert found.calls < 800


@pytest.mark.parametrize("solver_class", TWO)
@settings(max_examples=4)
@given(
    stds=st.lists(st.sampled_from([1e-3, 0.03, 1.0]), min_size=2, max_size=2),
    tolerance=st.sampled_from([1e-3, 1e-5]),
    coordinates=st.sampled_from(["time", "scaled"]),
)
def test_a_stiff_target_is_never_taken_for_dropout(
    solver_class: type[Adaptive], stds: list[float], tolerance: float, coordinates: str
) -> None:
    sde = ss.VP()
    target = ss.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], torch.tensor(stds).double()[:, None])
    solver = solver_class(tolerance, tolerance, coordinates=coordinates, max_calls=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        found = ss.sample(target.score_model(sde), sde, x=rows(-1.0, 0.01, 2.0), solver=solver)
    assert not (found.status == Status.NOISY).any()


# Gradients


@pytest.mark.parametrize("coordinates", ["scaled", "log_snr"])
@pytest.mark.parametrize("name", ["adams", "dopri5"])
def test_gradients_agree_with_finite_differences(name: str, coordinates: str | None) -> None:
    sde, theta = ss.VP(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start, step = rows(0.3, -1.1), 1e-2
    solver = SOLVERS[name](1e-6, 1e-6, coordinates=coordinates, save_at=(0.5,))

    def ends(x: Tensor, theta: Tensor, gradients: bool = False) -> Tensor:
        model = ss.from_x0(lambda x, t: theta * torch.tanh(x), sde)
        found = ss.sample(model, sde, x=x, solver=solver, t_end=0.1, gradients=gradients)
        assert found.x.requires_grad == gradients
        return torch.cat([found.x.flatten(), found.saved.flatten()])

    x = start.clone().requires_grad_()
    by_x, by_theta = torch.autograd.grad(ends(x, theta, True).sum(), (x, theta))
    value = theta.detach()
    up, down = ends(start, value + step), ends(start, value - step)
    assert by_theta.item() == pytest.approx(((up - down).sum() / (2 * step)).item(), rel=1e-3)
    moved = (ends(start + step, value) - ends(start - step, value)) / (2 * step)
    torch.testing.assert_close(by_x.flatten(), moved.reshape(2, 2).sum(0), rtol=1e-3, atol=1e-4)


# What cannot be right


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"coordinates": "x"}, "coordinates"),
        ({"coordinates": ""}, "coordinates"),
        ({"control": (0.2, 0.3)}, "control"),
        ({"control": ()}, "control"),
        ({"control": 0.5}, "control"),
        ({"save_at": (0.2, 0.5)}, "save_at"),
        ({"save_at": (1.5,)}, "save_at"),
        ({"save_at": (math.nan,)}, "save_at"),
        ({"save_at": 0.5}, "save_at"),
        ({"save_at": ("a",)}, "save_at"),
        ({"event": lambda x, t: x}, "event"),
        ({"event": 3}, "event"),
        ({"event": lambda x, t: 0.5}, "event returned 0.5"),
        ({"event": lambda x, t: None}, "event returned None"),
        ({"event": lambda x, t: 1j * t}, "real number"),
        ({"save_at": torch.tensor([[0.5]])}, "save_at"),
        ({"save_at": torch.tensor(0.5)}, "save_at"),
        ({"save_at": torch.tensor([0.2, 0.5])}, "in order"),
        ({"safety": 1.0}, "safety"),
        ({"max_calls": 0}, "max_calls"),
    ],
)
def test_a_bad_option_is_named_before_any_call(
    solver_class: type[Adaptive], options: dict[str, Any], named: str
) -> None:
    net, sde = Watched(), ss.VP()
    with pytest.raises(ScoresolveError, match=named):
        ss.sample(ss.from_x0(net, sde), sde, x=state(2, 3), solver=solver_class(**options))
    assert not net.sizes


@pytest.mark.parametrize("order", [0, 6, 2.5, True])
def test_an_order_that_adams_does_not_have_is_named(order: Any) -> None:
    with pytest.raises(ArgumentError, match="order"):
        AdaptiveAdams(order=order)


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize("coordinates", ["scaled", "log_snr"])
def test_coordinates_of_a_schedule_need_one(solver_class: type[Adaptive], coordinates: str) -> None:
    net, sde = Watched(), ss.Langevin(lambda x: -x)
    solver = solver_class(coordinates=coordinates)
    with pytest.raises(ArgumentError, match=r"Gaussian process.*'time'"):
        ss.sample(net, sde, x=state(2, 3), solver=solver, t_start=1.0, t_end=0.0)
    assert not net.sizes


SINGULAR = ["dpm_solver_12", "dpm_solver_23", "adaptive_sde", "gotta_go_fast"]


@pytest.mark.parametrize(
    "solver", [*SINGULAR, *(kind(coordinates="log_snr") for kind in TWO)], ids=str
)
def test_a_singular_end_is_named_with_one_that_works(solver: str | Adaptive) -> None:
    net, sde = Watched(), ss.RectifiedFlow()
    model, x = ss.from_x0(net, sde), state(2, 3)
    with pytest.raises(ArgumentError, match=r"log-SNR is -inf at t_start = 1,.*t_start=0\.999,"):
        ss.sample(model, sde, x=x, solver=solver)
    with pytest.raises(ArgumentError, match=r"log-SNR is inf at t_end = 0,.*t_end=0\.0005,"):
        ss.sample(model, sde, x=x, solver=solver, t_start=0.5, t_end=0.0)
    assert not net.sizes
    assert ss.sample(model, sde, x=x, solver=solver, t_start=0.999, t_end=5e-4).ok.all()


FROM = {"x0": ss.from_x0, "eps": ss.from_eps, "flow": ss.from_flow}
BLIND = [
    ("x0", "adams", "t_end"),
    ("x0", "dopri5", "t_end"),
    ("x0", "torchdiffeq_dopri5", "t_end"),
    ("eps", "adams", "t_start"),
    ("eps", "bosh3", "t_start"),
]


@pytest.mark.parametrize(("prediction", "solver", "end"), BLIND)
def test_an_end_at_which_the_prediction_does_not_tell_the_slope_is_named(
    prediction: str, solver: str, end: str
) -> None:
    net, sde = Watched(), ss.RectifiedFlow()
    model, ends = FROM[prediction](net, sde), {"t_start": 1.0, "t_end": 0.0}
    ends["t_start" if end == "t_end" else "t_end"] = 0.5  # the other one is not at fault
    near = {"t_end": 5e-4, "t_start": 0.9995}[end]
    with pytest.raises(ArgumentError, match=rf"'{prediction}' .* {end} = .*give {end}={near}"):
        ss.sample(model, sde, x=state(2, 3), solver=solver, **ends)
    assert not net.sizes
    assert ss.sample(model, sde, x=state(2, 3), solver=solver, **{**ends, end: near}).ok.all()


@pytest.mark.parametrize(("sde", "near"), [(ss.EDM(), 0.002), (ss.VP(), 0.001)], ids=repr)
def test_the_time_to_end_at_instead_is_near(sde: ss.GaussianSDE, near: float) -> None:
    for solver in ("dopri5", "dpm_adaptive"):
        with pytest.raises(ArgumentError, match=f"give t_end={near},"):
            ss.sample(ss.from_x0(Watched(), sde), sde, x=state(2, 3), solver=solver, t_end=0.0)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
@pytest.mark.parametrize("solver", ["adams", "dopri5", "torchdiffeq_dopri5"])
def test_ends_without_noise_are_reached_where_the_slope_is_known(
    prediction: str, solver: str
) -> None:
    mix = ss.targets.gaussian([10.0], 0.25)
    for sde in (ss.EDM(), ss.RectifiedFlow()):
        exact = mix.score_model(sde)
        model = FROM[prediction](lambda x, t, m=exact: m.predict(prediction, x, t), sde)
        t = 0.9 * sde.T
        x = float(sde.alpha(t)) * 10 + torch.zeros(1, 1, dtype=torch.float64)
        found = ss.sample(model, sde, x=x, solver=solver, t_start=t, t_end=0.0)
        assert found.ok.all()
        torch.testing.assert_close(found.x, torch.full_like(x, 10.0), rtol=1e-3, atol=0)


def test_a_likelihood_of_a_solver_in_log_snr_names_others() -> None:
    mix = ss.targets.gaussian([0.7], 0.25)
    with pytest.raises(ArgumentError, match=r"'dpm_solver_23' steps in log_snr.*'dopri5'"):
        ss.log_likelihood(mix.score_model(ss.VP()), ss.VP(), mix.sample(2), solver="dpm_adaptive")


@pytest.mark.parametrize("name", [*SOLVERS, "torchdiffeq_dopri5"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_whose_drift_is_lost_half_way_is_told_whatever_the_steps(
    name: str, bad: float
) -> None:
    kind = type(REGISTRY[name]())
    solvers = [kind(rtol=1e-3, atol=1e-3)]
    if issubclass(kind, Adaptive):
        solvers.append(kind(1e-3, 1e-3, coupled=True))

    def drift(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return decay(x, t).masked_fill(column((rows == 2) & (t < 0.5), x), bad)

    for solver in solvers:
        for dtype in (torch.float64, torch.float32):
            found = solver.solve(drift, state(4, 2).to(dtype), 1.0, 0.0)
            assert found.status.tolist() == [0, 0, Status.NONFINITE, 0]
            assert 0.5 - 1e-6 < float(found.t[2]) < 1 and found.x.isfinite().all()


@pytest.mark.parametrize("name", ["dopri5", "torchdiffeq_dopri5"])
def test_a_run_that_goes_on_for_long_is_told(name: str) -> None:
    solver: Any = ss.get_solver(name)
    solver.max_calls = 3_100

    def jumping(x: Tensor, t: Tensor, *_: Any) -> Tensor:
        return torch.where((x * 1e5).sin() > 0, 1.0, -1.0).to(x)

    with pytest.warns(ModelWarning, match=r"sample \d was in 3,000 calls and has come to t = "):
        found = solver.solve(jumping, state(2, 2), 1.0, 0.0)
    assert (found.status == Status.CALL_LIMIT).any() and found.nfe <= 3_100


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("coordinates", ["time", "scaled"])
def test_a_solver_in_its_own_coordinates_takes_no_others(name: str, coordinates: str) -> None:
    with pytest.raises(ArgumentError, match="coordinates of its own, leave"):
        type(REGISTRY[name]())(coordinates=coordinates)


# The last call to sigma = 0


@pytest.mark.parametrize("chunk", [None, 3])
def test_only_samples_that_arrived_are_denoised_and_within_the_limit(chunk: int | None) -> None:
    net, sde, x = Watched(), ss.VP(), state(7, 2)
    x = x * column(torch.logspace(-2, 1, 7), x)

    def run(limit: int, denoise: bool) -> ss.Samples:
        net.sizes.clear()
        solver, model = AdaptiveAdams(max_calls=limit), ss.from_x0(net, sde)
        found = ss.sample(model, sde, x=x, solver=solver, denoise=denoise, chunk=chunk)
        assert len(net.sizes) == found.calls <= limit and sum(net.sizes) == found.rows
        return found

    last = 1 if chunk is None else 3
    plain = run(10_000, False)
    for limit in (1, 5, last + 1, plain.calls - 2, plain.calls, plain.calls + last, 10_000):
        found, before = run(limit, True), run(max(limit - last, 1), False)
        assert torch.equal(found.status, before.status)
        assert torch.equal(found.x[~found.ok], before.x[~found.ok])
        at = torch.full((int(found.ok.sum()),), sde.t_min, dtype=torch.float64)
        assert torch.equal(found.x[found.ok], net.function(before.x[found.ok], at))
        if not found.ok.any():
            assert found.calls == before.calls
    assert found.ok.all() and found.calls == plain.calls + last


def test_an_interrupted_last_call_hands_back_what_is_done() -> None:
    net, sde, x = Watched(), ss.VP(), state(7, 2)
    solver, plain = AdaptiveAdams(), net.function
    before = ss.sample(ss.from_x0(net, sde), sde, x=x, solver=solver, chunk=3)
    when, calls = before.calls + 2, len(net.sizes)

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        if len(net.sizes) == calls + when:
            raise KeyboardInterrupt
        return plain(x, t)

    net.function = interrupted
    found = ss.sample(ss.from_x0(net, sde), sde, x=x, solver=solver, chunk=3, denoise=True)
    assert found.status.tolist() == [0] * 3 + [Status.INTERRUPTED] * 4
    assert torch.equal(found.x[3:], before.x[3:]) and not torch.equal(found.x[:3], before.x[:3])


def test_an_empty_batch_is_not_denoised() -> None:
    net, sde = Watched(), ss.VP()
    found = ss.sample(ss.from_x0(net, sde), sde, x=state(0, 2), solver="adams", denoise=True)
    assert found.calls == 0 and not net.sizes and found.x.shape == (0, 2)


def test_states_are_kept_even_if_there_is_nothing_to_do() -> None:
    solver, x = DormandPrince(save_at=(0.5,), dense=True), state(3, 2)
    still = solver.solve(decay, x, 0.5, 0.5)
    assert torch.equal(still.saved[0], x) and torch.equal(still.path(0.5), x)
    empty = solver.solve(decay, x[:0], 0.0, 1.0)
    assert empty.saved.shape == (1, 0, 2)
