"""States between the steps of an adaptive solver, and events."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptive import decay, rows, state
from test_adaptive_engine import ON_THE_WAY, SOLVERS, TWO, WAYS, decayed, gaussian_net, same, spread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scoresolve as ss
from scoresolve.errors import ArgumentError, Status
from scoresolve.noise import Philox
from scoresolve.solvers.adaptive import (
    Adaptive,
    AdaptiveAdams,
)
from scoresolve.solvers.registry import REGISTRY


@pytest.mark.parametrize("name", ON_THE_WAY)
@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("width", [None, 2])
def test_states_on_the_way_are_as_good_as_the_end_and_cost_nothing(
    name: str, ends: tuple[float, float], width: int | None
) -> None:
    x, tolerance = state(4, 3), 1e-5
    times = torch.linspace(*ends, 11, dtype=torch.float64).tolist()
    plain = SOLVERS[name](tolerance, tolerance).solve(decay, x, *ends, width=width)
    solver = SOLVERS[name](tolerance, tolerance, save_at=times, dense=True)
    solution = solver.solve(decay, x, *ends, width=width)
    same(solution, plain)
    assert solution.nfe == plain.nfe
    start = ends[0]
    for t, saved in zip(times, solution.saved, strict=True):
        exact = decayed(x, t) / math.exp(-start - start * start / 2)
        bound = 100 * tolerance * max(1.0, float(exact.abs().max()))
        assert (saved - exact).abs().max() < bound, t
        torch.testing.assert_close(solution.path(t), saved, rtol=1e-10, atol=1e-10)
    assert torch.equal(solution.saved[0], x)
    torch.testing.assert_close(solution.saved[-1], solution.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "coordinates"), [way for way in WAYS if way[0] != "dop853"])
def test_saved_states_lie_on_the_exact_flow(name: str, coordinates: str | None) -> None:
    sde, variance, x = ss.VP(), 0.4, state(3, 2)
    times, kind = (1.0, 0.9, 0.5, 0.11, 0.01, 1e-3), type(REGISTRY[name]())
    solver = kind(1e-5, 1e-5, coordinates=coordinates, save_at=times, dense=True)
    found = ss.sample(gaussian_net(sde, variance), sde, x=x, solver=solver)
    for t, saved in zip(times, found.saved, strict=True):
        exact = x * spread(sde, variance, t) / spread(sde, variance, 1.0)
        torch.testing.assert_close(saved, exact, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.path(t), exact, rtol=0, atol=1e-3)
    with pytest.raises(ArgumentError, match="outside"):
        found.path(1.5)


@pytest.mark.parametrize("name", ON_THE_WAY)
@settings(max_examples=2)
@given(
    levels=st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3),
    backward=st.booleans(),
    width=st.sampled_from([None, 2]),
)
def test_each_row_ends_where_its_own_event_happens(
    name: str, levels: list[float], backward: bool, width: int | None
) -> None:
    ends = (1.5, 0.0) if backward else (0.0, 1.5)
    x = rows(1.0, -1.0, 3.0)
    wanted = torch.tensor(levels, dtype=torch.float64) * x[:, 0]
    fraction = {round(v, 12): w for v, w in zip(x[:, 0].tolist(), wanted.tolist(), strict=True)}
    start = ends[0]
    # y carries its own level in the second element
    y = torch.stack((x[:, 0], torch.tensor(list(fraction.values()), dtype=torch.float64)), 1)
    if backward:
        y[:, 0] *= math.exp(-start - start * start / 2)

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return torch.stack((-x[:, 0] * (1 + t), 0 * x[:, 1]), 1)

    solver = SOLVERS[name](
        1e-6, 1e-6, event=lambda x, t: x[:, 0] - x[:, 1], save_at=(start, ends[1]), dense=True
    )
    solution = solver.solve(drift, y, *ends, width=width)
    when = -1 + torch.sqrt(1 - 2 * torch.tensor(levels, dtype=torch.float64).log())
    met = when < 1.5
    assert (solution.status == torch.where(met, int(Status.EVENT), 0)).all()
    torch.testing.assert_close(solution.t[met], when[met], rtol=0, atol=1e-4)
    torch.testing.assert_close(solution.x[met, 0], wanted[met], rtol=0, atol=1e-5)
    assert solution.saved[1].isnan().any(1).equal(met)
    assert torch.equal(solution.saved[0], y)
    late = max(ends[1], 1e-9) if backward else ends[1]
    assert solution.path(late).isnan().any(1).equal(met)


@pytest.mark.parametrize("solver_class", TWO)
def test_nothing_is_known_of_a_row_right_after_its_event(solver_class: type[Adaptive]) -> None:
    x = state(3, 2)
    solver = solver_class(1e-6, 1e-6, dense=True, save_at=(0.2, 0.31), event=lambda x, t: t - 0.3)
    solution = solver.solve(decay, x, 0.0, 1.0)
    torch.testing.assert_close(solution.t, torch.full_like(solution.t, 0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.saved[0], decayed(x, 0.2), rtol=0, atol=1e-4)
    assert solution.saved[1].isnan().all()
    torch.testing.assert_close(solution.path(0.299), decayed(x, 0.299), rtol=0, atol=1e-4)
    assert solution.path(0.31).isnan().all()


def test_an_event_counts_as_success() -> None:
    sde, x = ss.VP(), rows(0.5, -1.5, 1.2)
    solver = AdaptiveAdams(event=lambda x, t: t - 0.4)
    found = ss.sample(gaussian_net(sde, 0.5), sde, x=x, solver=solver, raise_on_failure=True)
    assert found.ok.all() and (found.status == Status.EVENT).all()
    exact = x * spread(sde, 0.5, 0.4) / spread(sde, 0.5, 1.0)
    torch.testing.assert_close(found.x, exact, rtol=0, atol=3e-3)


@pytest.mark.parametrize("solver_class", TWO)
@pytest.mark.parametrize("holds_late", [True, False])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_a_condition_ends_a_row_where_its_truth_changes(
    solver_class: type[Adaptive], holds_late: bool, ends: tuple[float, float]
) -> None:
    solver = solver_class(1e-6, 1e-6, event=lambda x, t: (t > 0.37) == holds_late)
    solution = solver.solve(decay, state(3, 2), *ends)
    assert (solution.status == Status.EVENT).all()
    torch.testing.assert_close(solution.t, torch.full_like(solution.t, 0.37), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver_class", TWO)
def test_a_row_ends_where_its_event_is_nan(solver_class: type[Adaptive]) -> None:
    x, wall = state(4, 2), 0.618
    x[:, 1] = torch.tensor([-1.0, 1.0, 1.0, 0.0])  # 0 / 0 from the start; log(-1) from the wall on

    def event(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, 1] > 0, (wall - t).log() + 99, x[:, 1] / x[:, 1])

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return torch.stack((-x[:, 0] * (1 + t), 0 * x[:, 1]), 1)

    solution = solver_class(1e-5, 1e-5, event=event).solve(drift, x, 0.0, 1.0)
    assert solution.status.tolist() == [0, *[Status.NONFINITE] * 3]
    assert solution.t[3] == 0 and torch.equal(solution.x[3], x[3])
    torch.testing.assert_close(
        solution.t[1:3], torch.full((2,), wall, dtype=torch.float64), rtol=0, atol=1e-6
    )
    factor = torch.exp(-solution.t - solution.t**2 / 2)
    torch.testing.assert_close(solution.x[:, 0], factor * x[:, 0], rtol=0, atol=1e-4)


def test_times_to_save_at_may_be_a_tensor() -> None:
    times = torch.linspace(1.0, 0.1, 4)  # of float32, whose 0.1 is not that of float64
    sde, x = ss.VP(), state(3, 2)
    found, listed = (
        ss.sample(gaussian_net(sde, 0.5), sde, x=x, solver=AdaptiveAdams(save_at=at), t_end=0.1)
        for at in (times, times.tolist())
    )
    assert torch.equal(found.saved, listed.saved) and not found.saved.isnan().any()
    up = ss.encode(
        gaussian_net(sde, 0.5), sde, x, solver=AdaptiveAdams(save_at=(0.1 - 1e-8,)), t_start=0.1
    )
    assert torch.equal(up.saved[0], x)
    with pytest.raises(ArgumentError, match="save_at"):
        AdaptiveAdams(save_at=times - 1e-5).solve(decay, x, 1.0, 0.1)


class Copied(TorchDispatchMode):
    """Counts the elements that operations return."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(v.numel() for v in tree_leaves(out) if isinstance(v, Tensor))
        return out


def test_the_cost_of_saved_states_is_linear_in_their_number() -> None:
    def copied(saves: int) -> int:
        times = torch.linspace(0, 1, saves, dtype=torch.float64)
        with Copied() as count:
            AdaptiveAdams(save_at=times).solve(decay, state(8, 512), 0.0, 1.0)
        return count.total

    few, some, many = (copied(n) for n in (20, 40, 80))
    assert many - some < 2.2 * (some - few)  # 2 if linear, 4 if every save copies the others


@pytest.mark.parametrize("name", ["dpm_solver_12", "dpm_solver_23"])
@pytest.mark.parametrize(
    ("sde", "share"), [(ss.VP(), 1.0), (ss.EDM(), 1.0), (ss.RectifiedFlow(), 0.99)], ids=repr
)
def test_an_exponential_pair_does_not_leap_over_the_data(
    name: str, sde: ss.sde.GaussianSDE, share: float
) -> None:
    """At its defaults, on one Gaussian and on narrow modes: within 7 % of a standard deviation."""
    narrow = ss.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[0.01], [0.01]])
    for target, std in ((ss.targets.gaussian([0.7], 0.25), 0.5), (narrow, 0.1)):
        score = target.score_model(sde)
        x = sde.start_std(share * sde.T) * Philox(3).normal(
            torch.empty(400, 1, dtype=torch.float64), 0
        )
        ends = {"x": x, "t_start": share * sde.T}
        found, exact = (ss.sample(score, sde, solver=s, **ends).x for s in (name, "adams"))
        near = (found - exact).abs() < 1  # not the few that fall to the other mode
        assert float(near.double().mean()) > 0.99
        assert float((found - exact)[near].square().mean().sqrt()) < 0.07 * std
