"""torchdiffeq and torchsde behind our interface: accuracy, intervals, failures, and whose noise."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError, Status, UnknownNameError
from scoresolve.noise import BrownianPath, CallableNoise, GeneratorNoise, Philox, Purpose
from scoresolve.precision import widest
from scoresolve.solvers.bridges import StepNoise, TorchDiffEq, TorchSDE

ADAPTIVE, FIXED = list(TorchDiffEq.ADAPTIVE), list(TorchDiffEq.FIXED)
STAGES = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}
SDE_METHODS = list(TorchSDE.METHODS)
SDE_CALLS = {"euler": 1, "milstein": 1, "srk": 4, "heun": 2, "midpoint": 2}
RATE, DATA_MEAN, DATA_VARIANCE = 2.0, 1.5, 0.25


class Recorder:
    """A drift that remembers the times and the batch sizes it was asked for."""

    def __init__(self, drift: Callable[..., Tensor]) -> None:
        self.drift, self.times, self.sizes = drift, list[Tensor](), list[int]()

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert t.shape == rows.shape == x.shape[:1]
        self.times.append(t)
        self.sizes.append(len(x))
        return self.drift(x, t, rows)

    def assert_inside(self, *ends: float) -> None:
        times = torch.cat(self.times).double()
        assert min(ends) <= times.min() and times.max() <= max(ends)


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def state(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decay(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
    """x' = -(1 + t) x, solved by x0 exp(-t - t^2 / 2)."""
    return -x * (1 + column(t, x))


def solver_of(method: str, **arguments: float) -> TorchDiffEq:
    steps = {"steps": 40} if method in FIXED else {}
    return TorchDiffEq(method, **{**steps, **arguments})


def variance(t: Tensor | float) -> Tensor:
    """Of dx = -RATE/2 x dt + sqrt(RATE) dw at time t, from N(DATA_MEAN, DATA_VARIANCE)."""
    decayed = torch.exp(-RATE * torch.as_tensor(t, dtype=torch.float64))
    return DATA_VARIANCE * decayed + 1 - decayed


def mean(t: Tensor | float) -> Tensor:
    return DATA_MEAN * torch.exp(-RATE / 2 * torch.as_tensor(t, dtype=torch.float64))


def reverse_drift(weight: float) -> Callable[..., Tensor]:
    """f - weight g^2 score of that process: weight 1/2 for the flow, 1 for the reverse SDE."""

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        m, v = column(mean(t), x), column(variance(t), x)
        return -RATE / 2 * x + weight * RATE * (x - m) / v

    return drift


def diffusion(t: Tensor) -> Tensor:
    return math.sqrt(RATE) * torch.ones_like(t)


def poisoned(bad: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`decay`, but NaN in the rows where `bad(x, t)` [b] holds."""
    return lambda x, t, *_: decay(x, t).masked_fill(column(bad(x, t), x) > 0, math.nan)


def test_importing_the_bridges_does_not_import_torchdiffeq() -> None:
    code = "import sys, scoresolve.solvers.bridges; sys.exit('torchdiffeq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("ends", [(1.0, 1e-2), (1e-2, 1.0)])
def test_adaptive_torchdiffeq_maps_the_gaussian_flow(
    method: str, ends: tuple[float, float]
) -> None:
    x = state(6, 2, 3)
    solution = solver_of(method, rtol=1e-6, atol=1e-6).solve(reverse_drift(0.5), x, *ends)
    exact = mean(ends[1]) + (x - mean(ends[0])) * (variance(ends[1]) / variance(ends[0])).sqrt()
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=2e-4)
    assert (solution.status == Status.OK).all() and (solution.t == ends[1]).all()
    assert (solution.accepted > 1).all()


@pytest.mark.parametrize("method", FIXED)
def test_fixed_step_torchdiffeq_converges_with_its_order(method: str) -> None:
    x, errors = state(6, 4), []
    for steps in (40, 80):
        solution = TorchDiffEq(method, steps=steps).solve(decay, x, 1.0, 0.0)
        errors.append((solution.x - x * math.exp(1.5)).abs().max().item())
    order = math.log2(errors[0] / errors[1])
    assert order == pytest.approx(TorchDiffEq(method, steps=1).order, abs=0.15)


@given(
    method=st.sampled_from(FIXED),
    steps=st.integers(1, 60),
    t_start=st.floats(-3, 3),
    length=st.floats(0.01, 5),
)
def test_a_fixed_step_method_makes_exactly_its_steps(
    method: str, steps: int, t_start: float, length: float
) -> None:
    drift = Recorder(lambda x, t, *_: -x / 9)
    solution = TorchDiffEq(method, steps=steps).solve(drift, state(2, 3), t_start, t_start - length)
    assert solution.nfe == len(drift.sizes) == steps * STAGES[method]
    assert solution.accepted.tolist() == [steps, steps]
    assert solution.rejected.tolist() == [0, 0]


@given(
    method=st.sampled_from(ADAPTIVE + FIXED),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    ends=st.sampled_from([(1.0, 0.0), (0.1, 0.3), (80.0, 0.002), (1.0, 1.0 + 1e-6)]),
)
def test_torchdiffeq_never_calls_the_drift_outside_the_interval(
    method: str, dtype: torch.dtype, ends: tuple[float, float]
) -> None:
    seen = set()

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        seen.add(x.dtype)
        return -x / (3 + column(t, x))

    recorder = Recorder(drift)
    x = state(3, 2).to(dtype)
    solution = solver_of(method, rtol=1e-3, atol=1e-3).solve(recorder, x, *ends)
    recorder.assert_inside(*ends)
    assert (solution.status == Status.OK).all() and solution.nfe == len(recorder.sizes)
    assert seen == {dtype} and solution.x.dtype == dtype


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_a_row_with_nan_fails_and_the_others_arrive(method: str) -> None:
    x, wall = state(5, 3), 0.618
    x[2] = x[2].abs() + 7
    drift = poisoned(lambda x, t, *_: (t > wall) & (x[:, 0].abs() > 2))
    solution = solver_of(method, rtol=1e-5, atol=1e-5).solve(drift, x, 0.0, 1.0)
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0, 0]
    good = torch.tensor([0, 1, 3, 4])
    accuracy = 0.05 if method in ("euler", "fehlberg2") else 2e-3
    torch.testing.assert_close(
        solution.x[good], x[good] * math.exp(-1.5), rtol=accuracy, atol=accuracy
    )
    t = solution.t[2].item()
    assert 0 < t < wall + 1 / 40 and (solution.t[good] == 1).all()
    torch.testing.assert_close(solution.x[2], x[2] * math.exp(-t - t**2 / 2), rtol=accuracy, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_drift_of_torchdiffeq_is_told_which_samples_are_left(method: str) -> None:
    x, rates = torch.ones(5, 1, dtype=torch.float64), torch.arange(5, dtype=torch.float64)[:, None]

    def drift(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return (-rates[rows] * x).masked_fill((rows == 1)[:, None] & (t > 0.5)[:, None], math.nan)

    solution = solver_of(method).solve(drift, x, 0.0, 1.0)
    assert solution.status.tolist() == [0, Status.NONFINITE, 0, 0, 0]
    good = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(solution.x[good], (-rates[good]).exp(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_rows_that_start_without_a_finite_drift_fail_at_the_start(method: str) -> None:
    x = state(5, 3)
    x[1, 0] = math.nan
    x[3] = 100.0
    solution = solver_of(method).solve(poisoned(lambda x, t, *_: x[:, 0] == 100), x, 0.0, 1.0)
    assert solution.status.tolist() == [0, Status.NONFINITE, 0, Status.NONFINITE, 0]
    assert solution.t.tolist() == [1, 0, 1, 0, 1]
    assert torch.equal(solution.x[[1, 3]].nan_to_num(), x[[1, 3]].nan_to_num())


def test_a_row_that_recovered_is_not_blamed_for_a_later_failure() -> None:
    x, calls = torch.ones(3, 1, dtype=torch.float64), 0

    def drift(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = decay(x, t)
        if calls == 8:  # the last stage of the first step: an infinite error, and a smaller step
            value[rows == 0] = math.inf
        return value.masked_fill((rows == 1)[:, None] & (t > 0.5)[:, None], math.nan)

    solution = TorchDiffEq(rtol=1e-6, atol=1e-6).solve(drift, x, 0.0, 1.0)
    assert solution.rejected[0] > 0
    assert solution.status.tolist() == [0, Status.NONFINITE, 0]


def test_a_fixed_step_row_does_not_feel_its_neighbours() -> None:
    x = state(5, 3)
    x[0] = math.inf
    solver = TorchDiffEq("rk4", steps=10)
    solution = solver.solve(decay, x, 0.0, 1.0)
    assert torch.equal(solution.x[1:], solver.solve(decay, x[1:], 0.0, 1.0).x)


def test_an_exploding_row_ends_an_adaptive_run_without_an_exception() -> None:
    x = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    solution = TorchDiffEq().solve(lambda x, t, *_: x * x, x, 0.0, 1.0)
    assert solution.status[1] != Status.OK and solution.x.isfinite().all()
    assert solution.t[1].item() == pytest.approx(0.5, rel=1e-3)


def test_step_limit_of_an_adaptive_run() -> None:
    x = state(3, 2)
    solution = TorchDiffEq(rtol=1e-9, atol=1e-9, max_steps=7).solve(decay, x, 0.0, 1.0)
    assert (solution.status == Status.STEP_LIMIT).all()
    assert (solution.accepted + solution.rejected == 7).all()
    t = solution.t[:, None]
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(solution.x, x * torch.exp(-t - t**2 / 2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_call_limit_of_torchdiffeq(method: str) -> None:
    x, drift = state(3, 2), Recorder(decay)
    solution = solver_of(method, rtol=1e-9, atol=1e-9, max_calls=50).solve(drift, x, 0.0, 1.0)
    assert (solution.status == Status.CALL_LIMIT).all()
    assert solution.nfe == len(drift.sizes) == 50
    t = solution.t[:, None]
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(solution.x, x * torch.exp(-t - t**2 / 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("error", [AssertionError, ZeroDivisionError])
def test_an_exception_of_the_drift_is_not_taken_for_one_of_torchdiffeq(
    error: type[Exception],
) -> None:
    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        raise error

    with pytest.raises(error):
        TorchDiffEq().solve(drift, state(3, 2), 0.0, 1.0)


@pytest.mark.parametrize("solver", [TorchDiffEq(), TorchDiffEq("rk4", steps=3), TorchSDE()])
def test_an_interval_of_no_length_or_an_empty_batch_costs_nothing(
    solver: TorchDiffEq | TorchSDE,
) -> None:
    for x in (state(3, 2), torch.empty(0, 2)):
        solution = solver.solve(decay, x, 0.5, 0.5, diffusion, Philox(0))
        assert torch.equal(solution.x, x) and solution.nfe == 0
        assert (solution.t == 0.5).all() and (solution.status == Status.OK).all()
    assert solver.solve(decay, torch.empty(0, 2), 0.0, 1.0, diffusion, Philox(0)).nfe == 0


def test_gradients_flow_through_torchdiffeq() -> None:
    x = state(3, 2).requires_grad_()
    solution = TorchDiffEq(rtol=1e-8, atol=1e-8).solve(decay, x, 0.0, 1.0)
    (gradient,) = torch.autograd.grad(solution.x.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, math.exp(-1.5)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_torchsde_samples_the_data_through_the_reverse_sde(method: str) -> None:
    n, t_end = 4000, 1e-3
    noise = Philox(3)
    start = noise.normal(torch.empty(n, 1, dtype=torch.float64), 0, Purpose.START)
    x = mean(1.0) + variance(1.0).sqrt() * start
    # Euler's own error stays below the sampling error that is allowed for.
    solution = TorchSDE(method, steps=200 if SDE_CALLS[method] == 1 else 40).solve(
        reverse_drift(1.0), x, 1.0, t_end, diffusion, noise
    )
    assert (solution.status == Status.OK).all() and (solution.t == t_end).all()
    m, v = mean(t_end).item(), variance(t_end).item()
    assert solution.x.mean().item() == pytest.approx(m, abs=5 * math.sqrt(v / n))
    assert solution.x.var().item() == pytest.approx(v, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("name", ["torchsde_euler", "torchsde_srk"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.RectifiedFlow()], ids=repr)
def test_torchsde_samples_a_gaussian_and_two_modes_of_every_process(
    name: str, sde: ss.GaussianSDE
) -> None:
    """In steps of one length in time EDM gave seven times the variance, and RectifiedFlow NaN."""
    n = 4000
    for weights, means, v in (([1.0], [[1.5]], 0.25), ([0.3, 0.7], [[-1.0], [1.0]], 0.01)):
        model = ss.targets.GaussianMixture(weights, means, [v] * len(means)).score_model(sde)
        found = ss.sample(model, sde, shape=(n, 1), solver=name, dtype=torch.float64, seed=1)
        assert bool(found.ok.all())
        upper = found.x[found.x > 0] if len(means) == 2 else found.x.flatten()
        share, m = len(upper) / n, len(upper)
        chance = weights[-1]
        # Euler's own law is known for one Gaussian: with these scales and the longest of these
        # ways, 13.8 in log k, the mean is off by 0.050 deviations and the variance by 3.4%.
        assert abs(share - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / n)
        centre = means[-1][0]
        assert abs(upper.mean().item() - centre) <= 4.5 * math.sqrt(v / m) + 0.05 * math.sqrt(v)
        assert abs(upper.var().item() / v - 1) <= 4.5 * math.sqrt(2 / m) + 0.034


def test_torchsde_follows_the_law_of_langevin_dynamics() -> None:
    n, mixture = 4000, ss.targets.GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [0.25, 0.25])
    sde = ss.Langevin(mixture.score)
    x = mixture.sample(n, seed=2)
    found = ss.sample(lambda x, t: mixture.score(x), sde, x=x, solver="torchsde_euler", seed=1)
    assert bool(found.ok.all())
    assert abs(found.x.mean().item() - 0.4) <= 4.5 * math.sqrt(1.09 / n)
    fourth = ((mixture.sample(10 * n, seed=3) - 0.4) ** 2).var().item()
    assert abs(found.x.var().item() - 1.09) <= 4.5 * math.sqrt(fourth / n) + 0.02


class _Float64OnTheDevice(TorchFunctionMode):
    """Notes what is made in float64 for a device that is a state's, a `torch.device`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        told = [*args, *(kwargs or {}).values()]
        if isinstance(out, Tensor) and out.dtype is torch.float64:
            self.seen += [str(func) for part in told if isinstance(part, torch.device)]
        return out


@pytest.mark.parametrize(
    "name",
    ["adams", "dopri5", "torchdiffeq_dopri5", "torchdiffeq_rk4", "torchsde_srk"],
)
def test_a_device_without_float64_is_asked_for_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("bridges", "adaptive.loop", "adaptive.drift"):
        monkeypatch.setattr(f"scoresolve.solvers.{room}.widest", lambda device: torch.float32)
    assert widest(torch.device("mps")) is torch.float32
    sde, x = ss.EDM(), 80 * state(3, 2).float()
    with _Float64OnTheDevice() as mode:
        found = ss.sample(lambda x, t: -x / (1 + column(t, x) ** 2), sde, x=x, solver=name)
    assert bool(found.ok.all()) and not mode.seen


def test_torchsde_refuses_an_end_without_noise_before_any_call() -> None:
    calls: list[float] = []
    with pytest.raises(ArgumentError, match="give t_end="):
        ss.sample(
            lambda x, t: calls.append(1.0) or -x,
            ss.RectifiedFlow(),
            shape=(2, 1),
            solver="torchsde_euler",
            t_end=0.0,
        )
    assert not calls


@pytest.mark.parametrize("method", SDE_METHODS)
def test_torchsde_runs_forward_too(method: str) -> None:
    n = 4000
    z = Philox(4).normal(torch.empty(n, 1, dtype=torch.float64), 0, Purpose.START)
    x = DATA_MEAN + math.sqrt(DATA_VARIANCE) * z
    solution = TorchSDE(method, steps=100).solve(
        lambda x, t, *_: -RATE / 2 * x, x, 0.0, 1.0, diffusion, Philox(4)
    )
    m, v = mean(1.0).item(), variance(1.0).item()
    # One percent of Euler's own error at step 1/100: mean and variance decay with rate at most 2.
    assert solution.x.mean().item() == pytest.approx(m, abs=5 * math.sqrt(v / n) + 0.01 * m)
    assert solution.x.var().item() == pytest.approx(v, rel=5 * math.sqrt(2 / n) + 0.01)


@given(
    method=st.sampled_from(SDE_METHODS),
    split=st.integers(1, 6),
    event=st.sampled_from([(), (3,), (2, 4)]),
)
def test_a_sample_does_not_depend_on_its_batch(
    method: str, split: int, event: tuple[int, ...]
) -> None:
    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return -x * (1 + column(t, x))

    x, noise = state(7, *event), Philox(11)
    solver = TorchSDE(method, steps=9)
    whole = solver.solve(drift, x, 1.0, 0.0, diffusion, noise)
    for part in (slice(0, split), slice(split, 7)):
        alone = solver.solve(drift, x[part], 1.0, 0.0, diffusion, noise.rows(part))
        assert torch.equal(whole.x[part], alone.x)


def test_a_seed_is_reproducible_and_another_one_differs() -> None:
    def run(seed: int) -> Tensor:
        return TorchSDE(steps=9).solve(decay, state(4, 3), 1.0, 0.0, diffusion, Philox(seed)).x

    assert torch.equal(run(5), run(5))
    assert (run(5) != run(6)).all()


@given(
    method=st.sampled_from(SDE_METHODS),
    steps=st.integers(1, 40),
    ends=st.sampled_from([(1.0, 0.0), (0.1, 0.3), (80.0, 0.002), (-0.7, 0.1)]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_torchsde_makes_exactly_its_steps_inside_the_interval(
    method: str, steps: int, ends: tuple[float, float], dtype: torch.dtype
) -> None:
    drift, g = (
        Recorder(lambda x, t, *_: -x / 100),
        Recorder(lambda t, *_: 0.01 * torch.ones_like(t)),
    )
    solution = TorchSDE(method, steps=steps).solve(
        drift, state(3, 2).to(dtype), *ends, lambda t: g(t, t, t), Philox(0)
    )
    drift.assert_inside(*ends)
    g.assert_inside(*ends)
    assert solution.nfe == len(drift.sizes) == steps * SDE_CALLS[method]
    assert solution.accepted.tolist() == [steps] * 3 and solution.x.dtype == dtype
    assert (solution.status == Status.OK).all() and (solution.t == ends[1]).all()


@pytest.mark.parametrize("method", SDE_METHODS)
def test_a_bad_row_of_torchsde_holds_its_last_finite_state(method: str) -> None:
    x, steps = torch.zeros(3, 2, dtype=torch.float64), 10
    x[1] = 5.0

    def drift(x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        bad = (x[:, :1] > 4) & (t[:, None] < 0.45)
        return torch.zeros_like(x).masked_fill(bad, math.nan)

    solver = TorchSDE(method, steps=steps)
    solution = solver.solve(drift, x, 1.0, 0.0, lambda t: 1e-3 + 0 * t, Philox(0))
    assert solution.status.tolist() == [0, Status.NONFINITE, 0]
    assert solution.t[1].item() in (pytest.approx(0.5), pytest.approx(0.4))
    assert (solution.x[1] - 5).abs().max() < 0.01
    assert solution.accepted[1] == round((1 - solution.t[1].item()) * steps)
    alone = solver.solve(drift, x[2:], 1.0, 0.0, lambda t: 1e-3 + 0 * t, Philox(0, first_sample=2))
    assert torch.equal(solution.x[2:], alone.x)


def test_call_limit_of_torchsde() -> None:
    drift = Recorder(decay)
    solution = TorchSDE("srk", steps=50, max_calls=22).solve(
        drift, state(3, 2), 1.0, 0.0, diffusion, Philox(0)
    )
    assert (solution.status == Status.CALL_LIMIT).all()
    assert solution.nfe == len(drift.sizes) == 22
    torch.testing.assert_close(solution.t, torch.full((3,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("h", [0.5, 2.0])
def test_increment_and_area_have_their_joint_law(h: float) -> None:
    n = 10_000
    noise = StepNoise(Philox(9), torch.empty(n, 1, dtype=torch.float64), lambda tau: 1.0 - tau)
    first, (w, u) = noise(0.0, h), noise(h, 2 * h, return_U=True)
    covariance = torch.cov(torch.cat((first, w, u), 1).T)
    exact = torch.tensor(
        [[h, 0, 0], [0, h, h**2 / 2], [0, h**2 / 2, h**3 / 3]], dtype=torch.float64
    )
    scale = exact.diagonal().sqrt()
    scale = scale[:, None] * scale
    assert ((covariance - exact) / scale).abs().max() < 5 * math.sqrt(2 / n)
    residual = u - h / 2 * w
    assert residual.var().item() == pytest.approx(h**3 / 12, rel=5 * math.sqrt(2 / n))
    assert abs((residual * w).mean().item()) < 5 * math.sqrt(h**4 / 12 / n)


def test_srk_uses_the_area_as_the_integral_of_the_noise() -> None:
    # dx = -a x dt + dw over one step from 0: x = W - a U + O(a^2).
    x, a, h = torch.zeros(500, 1, dtype=torch.float64), 1e-4, 0.8
    one = TorchSDE("srk", steps=1).solve(
        lambda x, t, *_: -a * x, x, 0.0, h, torch.ones_like, Philox(2)
    )
    w, u = StepNoise(Philox(2), x, lambda tau: tau)(0.0, h, return_U=True)
    assert (one.x - (w - a * u)).abs().max() < 5 * a**2
    assert (one.x - w).abs().max() > 0.1 * a


@pytest.mark.parametrize("method", SDE_METHODS)
def test_a_brownian_path_is_followed_whatever_the_steps(method: str) -> None:
    path = BrownianPath(Philox(1), 0.0, 1.0)
    x = state(4, 3)
    for steps in (1, 7, 64):
        solution = TorchSDE(method, steps=steps).solve(
            lambda x, t, *_: torch.zeros_like(x), x, 1.0, 0.0, torch.ones_like, path
        )
        # torch takes the path's times apart to 2^-24 of its length.
        torch.testing.assert_close(solution.x - x, path.increment(x, 1.0, 0.0), rtol=0, atol=1e-5)


def test_area_is_independent_of_the_nodes_of_a_brownian_path() -> None:
    n = 10_000
    like = torch.empty(n, 1, dtype=torch.float64)
    noise = StepNoise(BrownianPath(Philox(1), 0.0, 1.0), like, lambda tau: tau)
    correlations = []
    for k in range(4):
        w, u = noise(k / 4, (k + 1) / 4, return_U=True)
        correlations.append(torch.corrcoef(torch.cat((w, u - w / 8), 1).T)[0, 1].abs().item())
    assert max(correlations) < 5 / math.sqrt(n)


def test_any_source_of_noise_will_do() -> None:
    x = state(4, 3)
    for noise in (
        GeneratorNoise(torch.Generator().manual_seed(0)),
        CallableNoise(lambda x, t, s: torch.ones_like(x)),
    ):
        solution = TorchSDE("srk", steps=5).solve(decay, x, 1.0, 0.0, diffusion, noise)
        assert (solution.status == Status.OK).all()


def test_a_diffusion_of_one_value_per_channel_is_understood() -> None:
    x = torch.zeros(4, 2, 3, dtype=torch.float64)
    solution = TorchSDE(steps=3).solve(
        lambda x, t, *_: torch.zeros_like(x),
        x,
        1.0,
        0.0,
        lambda t: t[:, None] * torch.tensor([0.0, 1.0], dtype=t.dtype),
        Philox(0),
    )
    assert (solution.x[:, 0] == 0).all() and (solution.x[:, 1] != 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TorchDiffEq("dopri55"), UnknownNameError, "dopri5"),
        (lambda: TorchDiffEq("rk4"), ArgumentError, "give steps"),
        (lambda: TorchDiffEq("dopri5", steps=4), ArgumentError, "leave steps out"),
        (lambda: TorchDiffEq("rk4", steps=0), ArgumentError, "steps"),
        (lambda: TorchDiffEq(rtol=-1.0), ArgumentError, "rtol"),
        (lambda: TorchDiffEq(max_calls=0), ArgumentError, "max_calls"),
        (lambda: TorchSDE("eular"), UnknownNameError, "euler"),
        (lambda: TorchSDE(steps=0), ArgumentError, "steps"),
        (lambda: TorchSDE().solve(decay, state(3, 2), 1.0, 0.0), ArgumentError, "diffusion"),
        (
            lambda: TorchSDE().solve(decay, state(3, 2), 1.0, 0.0, diffusion),
            ArgumentError,
            "noise",
        ),
        (
            lambda: TorchDiffEq().solve(lambda x, t, *_: x[:, :1], state(3, 2), 1.0, 0.0),
            ShapeError,
            "one value per element",
        ),
    ],
)
def test_bad_input_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
