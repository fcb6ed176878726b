"""Adaptive solvers of the reverse SDE, and the geometric Brownian path that drives them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, GridError, Status
from scoresolve.models import Model
from scoresolve.noise import BrownianPath, Philox
from scoresolve.sde import GaussianSDE, expand
from scoresolve.solvers import AdaptiveSDE, GottaGoFast
from scoresolve.solvers.adaptive import Adaptive
from scoresolve.solvers.adaptive.rows import lift
from scoresolve.solvers.integrator import GaussianFlow

F64 = torch.float64
SOLVERS: list[type[Adaptive]] = [AdaptiveSDE, GottaGoFast]
SCALES = [(1e-9, 1.0), (1e-4, 3e5), (2.0, 2.5), (1e-4, 1e10)]


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=F64)


def start(sde: GaussianSDE, *shape: int, variance: float = 1.0) -> Tensor:
    """Exact samples of x_T for data N(0, variance)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    return spread(sde, variance, sde.T) * x


def spread(sde: GaussianSDE, variance: float, t: float) -> float:
    return math.hypot(float(sde.alpha(t)) * math.sqrt(variance), float(sde.sigma(t)))


def gaussian_model(sde: GaussianSDE, variance: float) -> Model:
    """The posterior mean alpha v/(alpha^2 v + sigma^2) x of data N(0, v)."""

    def x0(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t.double()), sde.sigma(t.double())
        return expand(alpha * variance / (alpha**2 * variance + sigma**2), x, t) * x

    x0.data_scale = math.sqrt(variance)  # type: ignore[attr-defined]
    return ss.from_x0(x0, sde)


def snr_path(sde: GaussianSDE, seed: int) -> BrownianPath:
    """The path of tau = alpha^2/sigma^2 that `adaptive_sde` reads."""
    ends = (float(sde.log_snr(t).exp()) for t in (sde.T, sde.t_min))
    return BrownianPath(Philox(seed), *ends, geometric=True)


def integral(
    path: BrownianPath, x: Tensor, times: Tensor, weight: Callable[[Tensor], Tensor]
) -> Tensor:
    """The integral of weight(s) dW(s) along `times`, for each sample of x."""
    samples, steps = len(x), len(times)
    each = torch.arange(samples).repeat_interleave(steps)
    like = empty(len(each), *x.shape[1:])
    w = path.rows(each).increment(like, float(times[0]), times.repeat(samples))
    dw = w.reshape(samples, steps, *x.shape[1:]).diff(dim=1)
    middle = (weight(times[1:]) + weight(times[:-1])) / 2
    return (middle[:, None] * dw).sum(1)


def exact_from_snr(sde: GaussianSDE, v: float, x: Tensor, seed: int, end: float) -> Tensor:
    """z = tau x/alpha of d(z) = v z/(1 + v tau) dtau + dB at t = end, by variation of constants."""
    path, last = snr_path(sde, seed), float(sde.log_snr(end).exp())
    tau = torch.logspace(math.log10(path.t0), math.log10(last), 1001, dtype=F64)
    tau = tau.clamp(path.t0, last)
    z = path.t0 * x / float(sde.alpha(sde.T)) / (1 + v * path.t0)
    z = (1 + v * last) * (z + integral(path, x, tau, lambda s: 1 / (1 + v * s)))
    return float(sde.alpha(end)) * z / last


def exact_from_time(sde: ss.EDM, v: float, x: Tensor, seed: int, end: float) -> Tensor:
    """x at `end` of dx = 2t x/(v + t^2) dt + sqrt(2t) dW, from T down, as above."""
    path = BrownianPath(Philox(seed), sde.t_min, sde.T)
    t = sde.T * torch.linspace(1, (end / sde.T) ** 0.25, 2001, dtype=F64) ** 4
    t[-1] = end
    whole = integral(path, x, t, lambda s: (2 * s).sqrt() / (v + s * s))
    return (v + end**2) * (x / (v + sde.T**2) + whole)


# The path


def test_early_times_of_a_geometric_path_are_resolved_relative_to_themselves() -> None:
    n, ends = 2**14, (1e-9, 1e3)
    t = torch.logspace(-9, 2.9, n, dtype=F64)
    like, s = empty(n, 4), t * (1 + 1e-5)
    z = BrownianPath(Philox(2), *ends, geometric=True)(like, t, s)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())
    early = slice(0, n // 4)
    plain = BrownianPath(Philox(2), *ends)(like, t, s)[early]
    assert abs(float(plain.square().mean()) - 1) > 0.5


@given(st.sampled_from(SCALES), st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_a_geometric_path_does_not_depend_on_the_steps_that_read_it(
    ends: tuple[float, float], shares: list[float]
) -> None:
    path, like = BrownianPath(Philox(1), *ends, geometric=True), empty(3, 2)
    length = math.log(ends[1] / ends[0])
    inner = [min(max(ends[0] * math.exp(u * length), ends[0]), ends[1]) for u in shares]
    whole = path.increment(like, *ends)
    parts = sum(path.increment(like, *step) for step in pairwise([ends[0], *inner, ends[1]]))
    atol = 1e-11 * math.sqrt(ends[1])
    torch.testing.assert_close(parts, whole, rtol=0, atol=atol)
    back = path.increment(like, inner[0], ends[0])
    assert torch.equal(back, -path.increment(like, ends[0], inner[0]))
    first = Philox(1).normal(empty(3, 2, 2), 0, ss.noise.Purpose.BROWNIAN)[..., 0]
    expected = math.sqrt(ends[1] - ends[0]) * first
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0)
    for t in ends:
        assert torch.equal(path.increment(like, t, t), torch.zeros(3, 2, dtype=F64))


@given(st.integers(1, 37), st.integers(1, 5), st.sampled_from([torch.float32, F64]))
def test_rows_of_a_geometric_path_do_not_know_their_batch(
    n: int, width: int, dtype: torch.dtype
) -> None:
    path, like = BrownianPath(Philox(7, 5), 1e-4, 3e5, geometric=True), empty(n, width).to(dtype)
    share = torch.rand(2, n, generator=torch.Generator().manual_seed(n), dtype=F64)
    t, s = 1e-4 * (share * math.log(3e9)).exp()
    whole = path.increment(like, t, s)
    for index in (slice(n // 2, None), torch.tensor([n - 1, 0])):
        part = path.rows(index).increment(like[index], t[index], s[index])
        assert torch.equal(part, whole[index])


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_a_geometric_path_needs_a_positive_start(ends: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="give 0 < t0 < t1"):
        BrownianPath(Philox(0), *ends, geometric=True)


# The law does not depend on the steps


@settings(max_examples=30)
@given(
    sde=st.sampled_from([ss.VP(), ss.EDM(), ss.CosineVP()]),
    first_step=st.sampled_from([None, 1e-3, 0.07, 3.0]),
    longest=st.sampled_from([0.2, 0.9, 5.0]),
    refused=st.sets(st.integers(1, 12), max_size=4),
)
def test_one_point_of_data_is_reached_along_the_path_whatever_the_steps(
    sde: GaussianSDE, first_step: float | None, longest: float, refused: set[int]
) -> None:
    calls, spoilt, point = 0, 0, torch.tensor([0.7, -2.0], dtype=F64)

    def x0(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls, spoilt
        calls += 1
        row = torch.arange(len(x)) % 2 == calls % 2
        row &= calls - 1 in refused
        spoilt += int(row.sum())
        return (0 * x + point).masked_fill(row[:, None], math.nan)

    solver = AdaptiveSDE(first_step=first_step)
    solver.longest = longest
    x = start(sde, 4, 2)
    found = ss.sample(ss.from_x0(x0, sde), sde, x=x, solver=solver, seed=3)
    assert found.ok.all()
    path = snr_path(sde, 3)
    b = path.increment(x, path.t0, path.t1)
    z = path.t0 * x / float(sde.alpha(sde.T)) + (path.t1 - path.t0) * point + b
    exact = float(sde.alpha(sde.t_min)) * z / path.t1
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-9)
    assert found.rejected.sum() >= spoilt


class Wary:
    """Refuses a step for the size of its noise alone."""

    def trial(self, way: Any, rows: Any, u: Any, h: Any) -> Any:
        trial = super().trial(way, rows, u, h)  # type: ignore[misc]
        kept = way.snr(rows.u) / way.snr(u) if hasattr(way, "snr") else np.ones_like(u)
        return trial._replace(errors=(trial.y - lift(kept, rows.y) * rows.y)[None])


class Forgetful(Wary):
    """Draws fresh noise at every attempt, as a solver without a tree does."""

    def way(self, *args: Any) -> Any:
        way, generator = super().way(*args), torch.Generator().manual_seed(1)  # type: ignore[misc]

        def fresh(rows: Any, t: Any, s: Any) -> Tensor:
            z = torch.randn(rows.y.shape, generator=generator, dtype=F64)
            return lift(np.sqrt(np.abs(s - t)), z) * z

        if hasattr(way, "snr"):
            way.increment = lambda rows, u: fresh(rows, way.snr(rows.u), way.snr(u))
        else:
            way.kick = lambda rows, u: (fresh(rows, rows.u, u),) * 2
        return way


def pure_noise(kind: type[Adaptive], habit: type) -> tuple[Tensor, Tensor]:
    """Normalised ends of paths with no data to move them, and what W says of them."""
    n, solver = 500, type("Habit", (habit, kind), {})(0.0, 0.3)
    noise = Philox(4)
    if kind is GottaGoFast:
        x, path = torch.zeros(n, 1, dtype=F64), BrownianPath(noise, 0.0, 1.0)
        found = solver.solve(lambda x, t, rows: 0 * x, x, 1.0, 0.0, torch.ones_like, noise)
        ends = found.x, path.increment(x, 1.0, 0.0)
    else:
        sde = ss.EDM()
        flow, path = GaussianFlow(sde, 1e-3, "x0", lambda x, *_: 0 * x), snr_path(sde, 4)
        x = start(sde, n, 1, variance=0.0)
        found = solver.solve(lambda *_: x, x, sde.T, sde.t_min, noise=noise, flow=flow)
        exact = (path.t0 * x + path.increment(x, path.t0, path.t1)) / path.t1
        ends = found.x / sde.t_min, exact / sde.t_min
    assert (found.status == Status.OK).all()
    assert found.rejected.sum() > 0.2 * found.accepted.sum()
    return ends


@pytest.mark.parametrize("kind", SOLVERS)
def test_only_a_path_that_is_read_again_keeps_the_variance_of_the_noise(
    kind: type[Adaptive],
) -> None:
    ours, exact = pure_noise(kind, Wary)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)
    forgetful, _ = pure_noise(kind, Forgetful)
    error = math.sqrt(2 / len(ours))
    assert abs(float(ours.square().mean()) - 1) < 4 * error
    assert float(forgetful.square().mean()) - 1 < -8 * error


# Convergence


def run(
    kind: type[Adaptive], tolerance: float, sde: GaussianSDE, v: float, x: Tensor, **options: Any
) -> ss.Samples:
    solver = kind(tolerance, tolerance, **options)
    found = ss.sample(gaussian_model(sde, v), sde, x=x, solver=solver, seed=8)
    assert found.ok.all()
    return found


CASES = [
    (AdaptiveSDE, ss.VP(), 0.05),
    (AdaptiveSDE, ss.VP(), 9.0),
    (AdaptiveSDE, ss.EDM(), 1.0),
    (GottaGoFast, ss.EDM(), 1.0),
]


@pytest.mark.parametrize(("kind", "sde", "v"), CASES)
def test_samples_of_one_seed_approach_the_exact_solution_with_order_one_all_the_way(
    kind: type[Adaptive], sde: Any, v: float
) -> None:
    x, times = start(sde, 24, 2, variance=v), (0.01 * sde.T, sde.t_min)
    solve = exact_from_snr if kind is AdaptiveSDE else exact_from_time
    exact = [solve(sde, v, x, 8, t) for t in times]
    unit, found = [spread(sde, v, t) for t in times], []
    for tolerance in (0.02, 0.004) if kind is GottaGoFast else (0.01, 0.002):
        got = run(kind, tolerance, sde, v, x, save_at=times)
        errors = (got.saved - torch.stack(exact)).square().mean((1, 2)).sqrt()
        found.append((float(got.accepted.double().mean()), errors / torch.tensor(unit)))
        torch.testing.assert_close(got.saved[-1], got.x, rtol=1e-12, atol=1e-12)
    (few, coarse), (many, fine) = found
    # Of 24 rows the order is known to 0.1, and other roundings make it another draw.
    assert ((coarse / fine).log() / math.log(many / few)).min() > 0.7


# Along the path


@pytest.mark.parametrize("kind", SOLVERS)
def test_the_path_between_the_steps_is_the_brownian_one(kind: type[Adaptive]) -> None:
    share = torch.linspace(0, 1, 150, dtype=F64)
    if kind is GottaGoFast:
        x, noise = empty(3, 2).fill_(1.0), Philox(4)
        path, times = BrownianPath(noise, 0.0, 1.0), 1 - share
        solver = kind(0.1, 0.1, save_at=times, dense=True)
        found = solver.solve(lambda x, t, rows: 0 * x, x, 1.0, 0.0, torch.ones_like, noise)
        exact = [x + path.increment(x, 1.0, float(t)) for t in times]
    else:
        sde, point = ss.VP(), torch.tensor([0.7, -2.0], dtype=F64)
        x, path = start(sde, 3, 2), snr_path(sde, 4)
        tau = (path.t0 * (share * math.log(path.t1 / path.t0)).exp()).clamp(path.t0, path.t1)
        times = sde.time_from_log_snr(tau.log()).clamp(sde.t_min, sde.T)
        solver, model = kind(save_at=times, dense=True), ss.from_x0(lambda x, t: 0 * x + point, sde)
        found = ss.sample(model, sde, x=x, solver=solver, seed=4)
        z, tau = path.t0 * x / float(sde.alpha(sde.T)), sde.log_snr(times).exp()
        tau = tau.clamp(path.t0, path.t1)
        b = [path.increment(x, path.t0, float(s)) for s in tau]
        exact = [
            float(sde.alpha(t)) * (z + (float(s) - path.t0) * point + w) / float(s)
            for t, s, w in zip(times, tau, b, strict=True)
        ]
    assert found.accepted.max() < 75  # half of the times lie between two points
    torch.testing.assert_close(found.saved, torch.stack(exact), rtol=0, atol=1e-6)
    for t, saved in zip(times.tolist(), found.saved, strict=True):
        torch.testing.assert_close(found.path(t), saved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SOLVERS)
def test_looking_at_the_path_changes_nothing_and_costs_no_call(kind: type[Adaptive]) -> None:
    sde, v = ss.EDM(), 1.0
    x = start(sde, 6, 2)
    plain = run(kind, 0.05, sde, v, x)
    seen = run(kind, 0.05, sde, v, x, save_at=(40.0, 1.0), dense=True, event=lambda x, t: 0 * t - 1)
    for name in ("x", "accepted", "rejected", "status"):
        assert torch.equal(getattr(plain, name), getattr(seen, name))
    assert plain.calls == seen.calls


@pytest.mark.parametrize("kind", SOLVERS)
def test_an_event_of_the_sde_is_a_crossing_of_its_path(kind: type[Adaptive]) -> None:
    sde, v, level = ss.EDM(), 1.0, 0.4
    x = start(sde, 6, 1)
    plain = run(kind, 0.05, sde, v, x, dense=True)
    met = run(kind, 0.05, sde, v, x, event=lambda x, t: x[:, 0] - level)
    ended = met.status == Status.EVENT
    assert ended.any() and torch.equal(met.x[~ended], plain.x[~ended])
    assert ended[(x[:, 0] - level).sign() != (plain.x[:, 0] - level).sign()].all()
    assert plain.path is not None and met.t is not None
    for row in ended.nonzero().flatten().tolist():
        t = float(met.t[row])
        assert abs(float(met.x[row, 0]) - level) < 1e-3
        torch.testing.assert_close(plain.path(t)[row], met.x[row], rtol=0, atol=1e-3)


@pytest.mark.arithmetic
@pytest.mark.parametrize("kind", SOLVERS)
def test_coupled_rows_of_the_sde_make_one_step_under_the_control_given(
    kind: type[Adaptive],
) -> None:
    sde, x = ss.EDM(), start(ss.EDM(), 6, 2)
    together = run(kind, 0.05, sde, 1.0, x, coupled=True)
    assert len(set(together.accepted.tolist())) == len(set(together.rejected.tolist())) == 1
    slow = run(kind, 0.05, sde, 1.0, x, coupled=True, control=(0.0, 0.1, 0.0))
    # either count may meet by chance, both would be the same control
    assert ((slow.accepted != together.accepted) | (slow.rejected != together.rejected)).all()


# What rounding may do


CURVED = ss.GaussianMixture(
    [1.0, 2.0],
    [[-1.0, 0.0], [11.5, 10.5]],
    torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[0.4, -0.2], [-0.2, 0.8]]], dtype=F64),
)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=repr)
def test_a_sample_is_the_same_to_rounding_in_any_chunk(
    kind: type[Adaptive], sde: GaussianSDE
) -> None:
    model, solver = CURVED.score_model(sde), kind(0.1, 0.1)
    for dtype in (F64, torch.float32):
        options: dict[str, Any] = {"solver": solver, "dtype": dtype, "seed": 3, "shape": (8, 2)}
        whole, parts = (ss.sample(model, sde, chunk=n, **options) for n in (None, 5))
        assert torch.equal(whole.accepted, parts.accepted)
        assert torch.equal(whole.rejected, parts.rejected)
        # the state starts at prior_std, and a step adds an ulp or two
        bound = 50 * torch.finfo(dtype).eps * (sde.prior_std + 10)
        torch.testing.assert_close(whole.x, parts.x, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_rounding_of_the_model_stays_one(kind: type[Adaptive]) -> None:
    """Noise in the last digits, as another batch, machine or network library makes it."""
    sde, x = ss.VP(), start(ss.VP(), 8, 2)
    exact, z = CURVED.score_model(sde), torch.Generator().manual_seed(1)

    def end(size: float) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return exact(x, t) * (1 + size * torch.randn(x.shape, generator=z, dtype=F64))

        model.data_scale = 1.0  # type: ignore[attr-defined]
        return ss.sample(model, sde, x=x, solver=kind(0.1, 0.1), seed=1).x

    assert (end(1e-12) - end(0.0)).abs().max() < 1e-9


@given(st.floats(1e-8, 1e3), st.sampled_from([0.2, 0.5, 0.999, 1.0, 1.7, 10.0]))
def test_steps_settle_on_a_rung_that_is_no_longer(h: float, factor: float) -> None:
    solver = AdaptiveSDE()
    (rung,) = solver.settle(np.array([h]))
    assert h / 2**0.125 * (1 - 1e-8) < rung <= h * (1 + 1e-8)
    # a rung stays what it is, and after a rejection the step is shorter
    (same, moved) = solver.settle(np.array([rung, rung * factor]))
    assert same == rung and (moved < rung) == (factor < 1)


# What is refused, and what can be kept


@pytest.mark.parametrize(
    "name", ["adaptive_sde", "gotta_go_fast", "torchsde_euler", "torchsde_srk"]
)
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=repr)
def test_the_reverse_sde_does_not_go_up(name: str, sde: GaussianSDE) -> None:
    calls, x = [], torch.ones(2, 2, dtype=F64)
    with pytest.raises(GridError, match=r"runs the reverse SDE.*up from t = 0\.2 to 0\.9"):
        ss.sample(lambda x, t: calls.append(1) or -x, sde, x=x, solver=name, t_start=0.2, t_end=0.9)
    assert not calls


@pytest.mark.parametrize("kind", [*SOLVERS, ss.solvers.AdaptiveAdams, ss.solvers.DormandPrince])
def test_a_dense_result_can_be_kept_without_its_model(kind: type[Adaptive]) -> None:
    sde = ss.EDM()

    def score(x: Tensor, t: Tensor) -> Tensor:  # a local function, as a notebook has them
        return expand(-1 / (1 + t * t), x, t) * x

    x, solver = start(sde, 3, 2), kind(dense=True, save_at=(20.0, 1.0))
    found = ss.sample(score, sde, x=x, solver=solver, seed=2)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert torch.equal(again.saved, found.saved)
        for t in (sde.T, 20.0, 0.3, sde.t_min):
            assert torch.equal(again.path(t), found.path(t))
    still = solver.solve(lambda x, *_: x, x, 1.0, 1.0)
    assert torch.equal(pickle.loads(pickle.dumps(still)).path(1.0), x)
