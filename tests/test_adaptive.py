"""Dormand-Prince: its tableau, its accuracy, and that every row goes its own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, Status
from scoresolve.solvers.adaptive import DORMAND_PRINCE, DormandPrince
from scoresolve.solvers.integrator import Solution

BETA_MIN, BETA_MAX = 0.1, 20.0


class Recorder:
    """A drift that remembers the times and the batch sizes it was asked for."""

    def __init__(self, drift: Callable[..., Tensor]) -> None:
        self.drift, self.times, self.sizes = drift, list[Tensor](), list[int]()

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert t.shape == rows.shape == x.shape[:1]
        self.times.append(t.detach().clone())
        self.sizes.append(len(x))
        return self.drift(x, t, rows)


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def state(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decay(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    """x' = -(1 + t) x, solved by x0 exp(-t - t^2 / 2); exactly rounded operations only."""
    return -x * (1 + column(t, x))


def own_rate(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    """x = (value, rate): value' = -rate value."""
    return torch.stack((-x[:, 0] * x[:, 1], 0 * x[:, 1]), 1)


def logistic(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    return x * (1 - x)


def vp_variance(t: float, data_variance: float) -> float:
    alpha_squared = math.exp(-(BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2))
    return data_variance * alpha_squared + 1 - alpha_squared


def gaussian_flow(data_variance: float) -> Callable[..., Tensor]:
    """Probability flow of the linear-beta VP process for data N(0, data_variance)."""

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        t = column(t, x)
        beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
        alpha_squared = torch.exp(-(BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2))
        score = -x / (data_variance * alpha_squared + 1 - alpha_squared)
        return -beta / 2 * x - beta / 2 * score

    return drift


def poisoned(drift: Callable[..., Tensor], bad: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`drift`, but NaN in the rows where `bad(x, t)` [b] holds."""
    return lambda x, t, *_: drift(x, t).masked_fill(column(bad(x, t), x), math.nan)


def same_bits(a: Solution, b: Solution, index: Tensor) -> None:
    """Rows `index` of `a` are the rows of `b`, to the last bit."""
    for name in ("x", "t", "status", "accepted", "rejected"):
        assert torch.equal(getattr(a, name)[index], getattr(b, name)), name


def trees(order: int) -> list[tuple]:
    """Rooted trees with `order` nodes, each the sorted tuple of the trees below its root."""
    if order == 1:
        return [()]
    found = set()
    for first in range(1, order):
        for branch, rest in product(trees(first), trees(order - first)):
            found.add(tuple(sorted((*rest, branch))))
    return sorted(found)


def nodes(tree: tuple) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: tuple) -> int:
    return nodes(tree) * math.prod(map(density, tree))


def stage_weights(tree: tuple) -> list[float]:
    a = DORMAND_PRINCE.a
    below = [stage_weights(branch) for branch in tree]
    return [
        math.prod(sum(w * v for w, v in zip(row, phi, strict=False)) for phi in below) for row in a
    ]


def defect(tree: tuple, weights: list[float]) -> float:
    total = sum(w * v for w, v in zip(weights, stage_weights(tree), strict=True))
    return abs(total - 1 / density(tree))


def test_tableau_satisfies_every_order_condition() -> None:
    b = [*DORMAND_PRINCE.a[-1], 0.0]
    embedded = [w - e for w, e in zip(b, DORMAND_PRINCE.e[0], strict=True)]
    assert [len(trees(order)) for order in range(1, 6)] == [1, 1, 2, 4, 9]
    for order in range(1, 6):
        assert max(defect(tree, b) for tree in trees(order)) < 1e-15
    for order in range(1, 5):
        assert max(defect(tree, embedded) for tree in trees(order)) < 1e-15
    assert max(defect(tree, b) for tree in trees(6)) > 1e-4
    assert max(defect(tree, embedded) for tree in trees(5)) > 1e-4
    for c, row in zip(DORMAND_PRINCE.c, DORMAND_PRINCE.a, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)


@settings(max_examples=12)
@given(
    variance=st.floats(0.05, 20),
    ends=st.sampled_from([(1.0, 1e-3), (1e-3, 1.0), (0.3, 0.7), (1.0, 0.0)]),
)
def test_gaussian_flow_scales_by_the_ratio_of_standard_deviations(
    variance: float, ends: tuple[float, float]
) -> None:
    x = state(5, 3)
    solution = DormandPrince(1e-9, 1e-9).solve(gaussian_flow(variance), x, *ends)
    ratio = math.sqrt(vp_variance(ends[1], variance) / vp_variance(ends[0], variance))
    torch.testing.assert_close(solution.x, ratio * x, rtol=2e-7, atol=2e-7)
    assert (solution.status == Status.OK).all()
    assert (solution.t == ends[1]).all()


def test_error_falls_in_proportion_to_the_tolerance() -> None:
    x = torch.linspace(0.01, 2, 40, dtype=torch.float64)[:, None]
    exact = x / (x + (1 - x) * math.exp(-5))
    tolerances = [10.0**-k for k in range(4, 12)]
    errors = []
    for tolerance in tolerances:
        solution = DormandPrince(tolerance, tolerance).solve(logistic, x, 0.0, 5.0)
        errors.append((solution.x - exact).square().mean().sqrt().item())
        assert errors[-1] < 10 * tolerance
    span = math.log(tolerances[0] / tolerances[-1])
    assert 0.9 < math.log(errors[0] / errors[-1]) / span < 1.1


def test_work_grows_with_the_fifth_root_of_the_tolerance() -> None:
    x = state(4, 3)
    coarse, fine = (DormandPrince(tol, tol).solve(decay, x, 0.0, 3.0) for tol in (1e-6, 1e-11))
    growth = fine.accepted.double().mean() / coarse.accepted.double().mean()
    assert 8 < growth < 12  # (10^5)^(1/5) = 10


def test_step_size_settles_at_the_set_point_of_the_controller() -> None:
    drift = Recorder(lambda x, t, *_: -x)
    DormandPrince(1e-6, 0.0).solve(drift, rows(1.0), 0.0, 20.0)
    ends = torch.cat(drift.times[7::6])
    h, k = (ends[-3] - ends[-4]).item(), [-1.0]
    for row in DORMAND_PRINCE.a[1:]:
        k.append(-1 - h * sum(a * v for a, v in zip(row, k, strict=True)))
    error = abs(h * sum(e * v for e, v in zip(DORMAND_PRINCE.e[0], k, strict=True))) / 1e-6
    # 1 = safety err^(3/4 beta - 1/5) err^beta
    assert error == pytest.approx(0.9 ** (1 / (1 / 5 - 1.75 * 0.04)), rel=1e-2)


def test_going_there_and_back_is_the_identity() -> None:
    x = state(6, 4)
    solver = DormandPrince(1e-10, 1e-10)
    there = solver.solve(gaussian_flow(0.5), x, 0.01, 1.0)
    back = solver.solve(gaussian_flow(0.5), there.x, 1.0, 0.01)
    torch.testing.assert_close(back.x, x, rtol=1e-7, atol=1e-7)


@given(
    index=st.lists(st.integers(0, 39), min_size=1, max_size=13),
    event=st.sampled_from([(), (1,), (7,), (3, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_row_does_not_depend_on_its_batch_to_the_last_bit(
    index: list[int], event: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = state(40, *event)
    x = (x * column(torch.logspace(-2, 2, 40), x)).to(dtype)
    chosen = torch.tensor(index)
    solver = DormandPrince(1e-6, 1e-8)

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return column(t, x) - x * x * x / (1 + x * x)

    same_bits(solver.solve(drift, x, 0.0, 4.0), solver.solve(drift, x[chosen], 0.0, 4.0), chosen)


def test_a_long_row_does_not_depend_on_its_batch_to_the_last_bit() -> None:
    # Long enough for a library to split the sum of one row over threads, but not those of twelve.
    # Stopped on the way, a row shows its steps in its time.
    x, solver = state(12, 40_001).float(), DormandPrince(1e-6, 1e-6, max_steps=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = solver.solve(decay, x, 0.0, 1.0)
        for i in range(6):
            same_bits(whole, solver.solve(decay, x[i : i + 1], 0.0, 1.0), torch.tensor([i]))
    finally:
        torch.set_num_threads(threads)


def test_the_error_norm_is_a_mean_over_the_event() -> None:
    once = DormandPrince().solve(logistic, rows(0.1, 0.7), 0.0, 5.0)
    often = DormandPrince().solve(logistic, rows(0.1, 0.7).expand(2, 64), 0.0, 5.0)
    assert torch.equal(often.x, once.x.expand(2, 64))
    assert torch.equal(often.accepted, once.accepted)


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoresolve.solvers.adaptive.loop._ASK_AGAIN", 10**9)
    rates = torch.logspace(0, 3, 9, dtype=torch.float64)
    x = torch.stack((torch.ones_like(rates), rates), 1)
    drift = Recorder(own_rate)
    solution = DormandPrince().solve(drift, x, 0.0, 2.0)
    calls = 1 + 6 * (solution.accepted + solution.rejected)
    assert drift.sizes == sorted(drift.sizes, reverse=True)
    assert len(set(drift.sizes)) > 3
    assert sum(drift.sizes) == calls.sum()
    assert solution.nfe == len(drift.sizes) == calls.max()


def test_the_drift_is_told_which_samples_it_sees() -> None:
    rates = torch.logspace(0, 3, 9, dtype=torch.float64)
    ones = torch.ones_like(rates)
    solver = DormandPrince()
    by_row = solver.solve(lambda x, t, rows: -rates[rows] * x, ones, 0.0, 2.0)
    by_state = solver.solve(own_rate, torch.stack((ones, rates), 1), 0.0, 2.0)
    assert by_row.nfe > 1000
    torch.testing.assert_close(by_row.x, by_state.x[:, 0], rtol=0, atol=1e-4)


def test_stiff_and_mild_rows_share_a_batch() -> None:
    rates = torch.tensor([1e-3, 1.0, 30.0, 3000.0], dtype=torch.float64)
    x = torch.stack((torch.ones_like(rates), rates), 1)
    solution = DormandPrince(1e-7, 1e-7).solve(own_rate, x, 0.0, 1.0)
    assert (solution.status == Status.OK).all()
    torch.testing.assert_close(solution.x[:, 0], (-rates).exp(), rtol=0, atol=1e-6)
    assert 10 * solution.accepted[1] < solution.accepted[3]


@given(
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    ends=st.sampled_from(
        [(1.0, 0.0), (0.1, 0.3), (80.0, 0.002), (1e-3, 1.0), (-0.7, 0.1), (1.0, 1.0 + 1e-6)]
    ),
    first_step=st.sampled_from([None, 1e-3, 1e3]),
)
def test_drift_is_never_called_outside_the_interval(
    dtype: torch.dtype, ends: tuple[float, float], first_step: float | None
) -> None:
    drift = Recorder(lambda x, t, *_: -x / (3 + column(t, x).to(x.dtype)))
    x = state(4, 3).to(dtype)
    solution = DormandPrince(1e-4, 1e-4, first_step=first_step).solve(drift, x, *ends)
    times = torch.stack([t.double().aminmax()[k] for t in drift.times for k in (0, 1)])
    assert min(ends) <= times.min() and times.max() <= max(ends)
    assert (solution.status == Status.OK).all() and (solution.t == ends[1]).all()
    exact = x.double() * (3 + ends[0]) / (3 + ends[1])
    bound = max(2e-2 if dtype is torch.float16 else 0, 2e-3)
    torch.testing.assert_close(solution.x.double(), exact, rtol=bound, atol=bound)


def test_first_step_is_of_the_given_size() -> None:
    drift = Recorder(decay)
    DormandPrince(first_step=0.125).solve(drift, state(2, 3), 1.0, 0.0)
    assert (drift.times[1] == 1 - 0.125 / 5).all()


def test_the_step_after_a_rejection_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoresolve.solvers.adaptive.loop._ASK_AGAIN", 10**9)
    drift = Recorder(poisoned(lambda x, t, *_: -50 * x, lambda x, t, *_: (x < 0).any(1)))
    solution = DormandPrince(1e-2, 1e-2, first_step=1.0).solve(drift, rows(1.0), 0.0, 1.0)
    stages = torch.cat(drift.times[1:]).reshape(-1, 6)
    h = (stages[:, 5] - stages[:, 0]) * 5 / 4
    rejected = (stages[1:, 5] - h[1:] - stages[:-1, 5]).abs() > 1e-9
    assert rejected.sum() == solution.rejected > 0
    after = rejected[:-1].nonzero().flatten() + 2
    assert (h[after] <= h[after - 1] * (1 + 1e-9)).all()


def test_a_row_that_starts_without_a_finite_drift_fails_alone() -> None:
    x = state(5, 3)
    x[1, 0] = math.nan
    x[3] = 100.0
    drift = Recorder(poisoned(decay, lambda x, t, *_: x[:, 0] == 100))
    solver = DormandPrince()
    solution, good = solver.solve(drift, x, 0.0, 1.0), torch.tensor([0, 2, 4])
    assert solution.status.tolist() == [0, Status.NONFINITE, 0, Status.NONFINITE, 0]
    assert torch.equal(solution.x[[1, 3]].nan_to_num(), x[[1, 3]].nan_to_num())
    assert solution.t.tolist() == [1, 0, 1, 0, 1]
    assert drift.sizes[:2] == [5, 3]
    same_bits(solution, solver.solve(decay, x[good], 0.0, 1.0), good)


def test_a_row_that_meets_nan_on_its_way_keeps_its_last_accepted_state() -> None:
    x, wall = state(5, 3), 0.6180
    x[2] = x[2].abs() + 7
    drift = poisoned(decay, lambda x, t, *_: (t > wall) & (x[:, 0].abs() > 2))
    solver = DormandPrince(1e-8, 1e-8)
    solution, good = solver.solve(drift, x, 0.0, 1.0), torch.tensor([0, 1, 3, 4])
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0, 0]
    t = solution.t[2].item()
    assert wall - 1e-6 < t <= wall
    exact = x[2] * math.exp(-t - t**2 / 2)
    torch.testing.assert_close(solution.x[2], exact, rtol=1e-6, atol=0)
    same_bits(solution, solver.solve(decay, x[good], 0.0, 1.0), good)


def test_a_trial_step_into_nan_is_tried_again_with_a_smaller_one() -> None:
    drift = poisoned(lambda x, t, *_: -50 * x, lambda x, t, *_: (x < 0).any(1))
    x = rows(1.0, 2.0)
    solution = DormandPrince(1e-6, 1e-10, first_step=1.0).solve(drift, x, 0.0, 0.2)
    assert (solution.status == Status.OK).all() and (solution.rejected > 0).all()
    torch.testing.assert_close(solution.x, x * math.exp(-10), rtol=1e-4, atol=0)


@pytest.mark.parametrize("power", [2, 3, 9])
def test_an_exploding_row_ends_and_leaves_its_neighbours_alone(power: int) -> None:
    x, solver = rows(0.1, 2.0, 0.2), DormandPrince()

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return math.prod([x] * power)

    solution, good = solver.solve(drift, x, 0.0, 1.0), torch.tensor([0, 2])
    assert solution.status[1] in (Status.STEP_LIMIT, Status.NONFINITE)
    blow_up = 2.0 ** (1 - power) / (power - 1)
    assert solution.t[1].item() == pytest.approx(blow_up, rel=1e-4)
    assert solution.x[1].isfinite() and solution.x[1] > 10
    same_bits(solution, solver.solve(drift, x[good], 0.0, 1.0), good)


def test_step_limit_stops_the_rows_that_need_more() -> None:
    rates = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    x = torch.stack((torch.ones_like(rates), rates), 1)
    solution = DormandPrince(max_steps=50).solve(own_rate, x, 0.0, 1.0)
    assert solution.status.tolist() == [Status.OK, Status.STEP_LIMIT]
    assert solution.accepted[1] + solution.rejected[1] == 50
    t = solution.t[1].item()
    assert 0 < t < 1
    assert solution.x[1, 0].item() == pytest.approx(math.exp(-1000 * t), abs=1e-4)


def test_a_row_that_arrives_with_its_last_step_is_not_over_the_limit() -> None:
    free = DormandPrince().solve(decay, state(1, 3), 0.0, 1.0)
    steps = int(free.accepted + free.rejected)
    for allowed, status in ((steps, Status.OK), (steps - 1, Status.STEP_LIMIT)):
        limited = DormandPrince(max_steps=allowed).solve(decay, state(1, 3), 0.0, 1.0)
        assert limited.status.tolist() == [status]


@given(max_calls=st.integers(1, 60))
def test_call_limit_is_never_passed_and_keeps_what_was_reached(max_calls: int) -> None:
    x = state(4, 3)
    drift = Recorder(decay)
    solution = DormandPrince(1e-8, 1e-8, max_calls=max_calls).solve(drift, x, 0.0, 1.0)
    assert solution.nfe == len(drift.sizes) <= max_calls
    assert (solution.status == Status.CALL_LIMIT).all()
    t = solution.t[:, None]
    torch.testing.assert_close(solution.x, x * torch.exp(-t - t**2 / 2), rtol=1e-6, atol=1e-6)
    assert (solution.accepted == 0).all() or (t > 0).all()


def test_an_interrupt_hands_back_what_is_done() -> None:
    calls = 0

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return decay(x, t)

    x = state(3, 2)
    solution = DormandPrince(1e-8, 1e-8).solve(drift, x, 0.0, 1.0)
    assert (solution.status == Status.INTERRUPTED).all()
    t = solution.t[:, None]
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(solution.x, x * torch.exp(-t - t**2 / 2), rtol=1e-6, atol=1e-6)


def test_an_interval_of_no_length_costs_nothing() -> None:
    x = state(3, 2)
    x[1] = math.inf
    drift = Recorder(decay)
    solution = DormandPrince().solve(drift, x, 0.5, 0.5)
    assert torch.equal(solution.x, x) and solution.x is not x
    assert solution.nfe == len(drift.sizes) == 0
    assert solution.t.tolist() == [0.5] * 3
    assert solution.status.tolist() == [0, Status.NONFINITE, 0]


def test_an_empty_batch_costs_nothing() -> None:
    solution = DormandPrince().solve(decay, torch.empty(0, 3), 0.0, 1.0)
    assert solution.x.shape == (0, 3) and solution.nfe == 0 and solution.status.shape == (0,)


def test_a_tolerance_below_rounding_does_not_loop() -> None:
    x = state(8, 5).float()
    solution = DormandPrince(0.0, 0.0).solve(decay, x, 0.0, 1.0)
    assert (solution.status == Status.OK).all() and solution.nfe < 200
    torch.testing.assert_close(solution.x, x * math.exp(-1.5), rtol=1e-5, atol=0)


def test_a_state_of_zeros_with_no_absolute_tolerance_stays() -> None:
    solution = DormandPrince(atol=0.0).solve(decay, torch.zeros(2, 3), 0.0, 1.0)
    assert (solution.status == Status.OK).all() and (solution.x == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_state_is_carried_in_float32(dtype: torch.dtype) -> None:
    x, seen = state(6, 5).to(dtype), set()

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        seen.add((x.dtype, t.dtype))
        return decay(x, t.to(x.dtype))

    solution = DormandPrince().solve(drift, x, 0.0, 1.0)
    assert seen == {(dtype, torch.float32)} and solution.x.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(solution.x, x * math.exp(-1.5), rtol=4 * eps, atol=eps)


def test_the_callers_state_is_not_written_into() -> None:
    x = state(3, 2)
    before = x.clone()
    DormandPrince().solve(lambda x, t, *_: x, x, 0.0, 1.0)
    assert torch.equal(x, before)


def test_gradients_flow_where_they_are_enabled() -> None:
    x = state(3, 2).requires_grad_()
    solver = DormandPrince(1e-9, 1e-9)
    (gradient,) = torch.autograd.grad(solver.solve(decay, x, 0.0, 1.0).x.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, math.exp(-1.5)), rtol=1e-7, atol=0)
    with torch.no_grad():
        assert not solver.solve(decay, x, 0.0, 1.0).x.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        {"rtol": -1e-3},
        {"atol": math.nan},
        {"max_steps": 0},
        {"max_calls": 0},
        {"first_step": 0.0},
        {"safety": 1.0},
        {"control": (0.2, 0.0, 0.0)},
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        DormandPrince(**arguments)


def test_bad_input_is_refused_before_it_spreads() -> None:
    solver = DormandPrince()
    with pytest.raises(ShapeError, match="one value per element"):
        solver.solve(lambda x, t, *_: x[:, :1], state(4, 3), 0.0, 1.0)
    with pytest.raises(ArgumentError, match="floating-point"):
        solver.solve(decay, torch.ones(4, 3, dtype=torch.int64), 0.0, 1.0)
    with pytest.raises(ArgumentError, match="not finite"):
        solver.solve(decay, state(4, 3), 0.0, math.nan)


def test_an_exception_of_the_drift_reaches_the_caller() -> None:
    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DormandPrince().solve(drift, state(4, 3), 0.0, 1.0)
