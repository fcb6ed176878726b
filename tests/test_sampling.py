"""The verbs sample, encode and plan, as a caller meets them.

A sample is a function of (model, solver, grid, seed, its own number): the batch, the chunks, the
threads and the neighbours do not enter. What cannot be right is refused before the model is called,
and what goes wrong on the way is told per sample.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from strategies import BenesSDE, generator, normal
from torch import Tensor, nn

from scoresolve.errors import (
    ArgumentError,
    GridError,
    ModelWarning,
    ScoresolveError,
    ShapeError,
    SolveError,
    Status,
    UnknownNameError,
)
from scoresolve.grid import Grid, make_grid
from scoresolve.models import from_denoiser, from_discrete, from_eps, from_x0
from scoresolve.noise import NoiseSource, Philox, Purpose, Times
from scoresolve.plans import StepReport
from scoresolve.sampling import Samples, encode, plan, sample
from scoresolve.sde import (
    EDM,
    VE,
    VP,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    linear_betas,
)
from scoresolve.solvers import REGISTRY, DormandPrince, Integrator, Solver, get_solver
from scoresolve.targets import GaussianMixture
from scoresolve.tuning import LEAST_BUDGET

F64 = torch.float64
PLANE = VP()
MIXTURE = GaussianMixture(
    [0.3, 0.7], [[-1.0, 0.5, 0.2], [0.8, -0.3, 0.0]], [[0.3, 0.5, 0.4], [0.2, 0.6, 0.5]]
)
EXACT = MIXTURE.score_model(PLANE)
FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
ADAPTIVE = [name for name in REGISTRY if isinstance(get_solver(name), Integrator)]
STOCHASTIC = [name for name in FIXED if get_solver(name).stochastic]
# One of each kind: deterministic, stochastic, corrected, adaptive, a bridge of either library.
KINDS: dict[str, dict[str, Any]] = {
    "ab2_v": {"steps": 6},
    "ddpm": {"steps": 6},
    "pc": {"steps": 4},
    "dopri5": {},
    "torchdiffeq_rk4": {},
    "torchsde_euler": {},
}
every_kind = pytest.mark.parametrize("solver", KINDS)


def score(x: Tensor, t: Tensor) -> Tensor:
    return EXACT(x, t)


def draw(solver: str = "ab2_v", model: Callable[..., Tensor] = score, **options: Any) -> Samples:
    """Seven samples, in float64, unless said otherwise."""
    settings = {"shape": (7, 3), "dtype": F64, "seed": 3, **KINDS.get(solver, {}), **options}
    if "x" in options:
        del settings["shape"], settings["dtype"]
    return sample(model, PLANE, solver=solver, **settings)


class Counting:
    """A model that counts its calls, and may fail at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at, self.rows = 0, fails_at, list[int]()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.rows.append(len(x))
        return score(x, t)


# --- a sample is a function of its own number ----------------------------------------------------


@every_kind
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_no_sample(solver: str, chunk: int) -> None:
    whole, split = draw(solver), draw(solver, chunk=chunk)
    torch.testing.assert_close(split.x, whole.x, rtol=0, atol=1e-13)
    assert split.nfe == whole.nfe
    assert torch.equal(split.status, whole.status) and bool(whole.ok.all())


@every_kind
def test_a_sample_does_not_depend_on_how_many_are_drawn(solver: str) -> None:
    few, many = draw(solver, shape=(2, 3)), draw(solver)
    torch.testing.assert_close(many.x[:2], few.x, rtol=0, atol=1e-13)


@every_kind
def test_a_sample_keeps_its_number_in_another_batch(solver: str) -> None:
    many, last = draw(solver), draw(solver, shape=(3, 3), noise=Philox(3, 4))
    torch.testing.assert_close(many.x[4:], last.x, rtol=0, atol=1e-13)


@every_kind
def test_threads_change_no_sample(solver: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(solver)
        torch.set_num_threads(4)
        four = draw(solver)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(four.x, one.x, rtol=0, atol=1e-13)


@every_kind
def test_seeds_repeat_and_differ(solver: str) -> None:
    first = draw(solver).x
    assert torch.equal(draw(solver).x, first)
    assert not torch.equal(draw(solver, seed=4).x, first)


@every_kind
def test_no_global_generator_is_touched(solver: str) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.manual_seed(0)
    first = draw(solver).x
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(draw(solver).x, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    torch.set_rng_state(states[0])


def test_a_sample_is_the_plan_run_on_the_prior() -> None:
    for sde in (VP(), VE(), EDM(), RectifiedFlow(t_min=0.02)):
        model = MIXTURE.score_model(sde)
        out = sample(model, sde, shape=(5, 3), solver="heun_flow", steps=4, seed=9, dtype=F64)
        z = Philox(9).normal(torch.empty(5, 3, dtype=F64), 0, Purpose.START)
        std = 1.0 if isinstance(sde, VP | RectifiedFlow) else sde.sigma_max
        assert out.plan is not None
        torch.testing.assert_close(out.x, out.plan.run(model, std * z), rtol=1e-12, atol=0)
        assert out.times == out.plan.times and out.nfe == out.plan.nfe == 8


# --- start, budget, grid -------------------------------------------------------------------------


@every_kind
def test_a_given_start_is_used_and_not_written_into(solver: str) -> None:
    x = normal(generator(0), 7, 3)
    before = x.clone()
    first, second = draw(solver, x=x), draw(solver, x=x.flip(0).contiguous())
    assert torch.equal(x, before) and first.x.data_ptr() != x.data_ptr()
    if not get_solver(solver).stochastic:
        torch.testing.assert_close(second.x.flip(0), first.x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("denoise", [False, True])
def test_a_budget_is_used_up_and_never_passed(name: str, denoise: bool) -> None:
    for budget in (5, 8, 13):
        model = Counting()
        out = sample(
            model, PLANE, shape=(1, 3), solver=name, nfe=budget, denoise=denoise, grid="cosine"
        )
        assert model.calls == out.nfe <= budget
        assert out.plan is not None
        spent = out.nfe - out.plan.nfe
        assert spent == (name == "auto" and budget >= LEAST_BUDGET)
        longer = make_grid("cosine", PLANE, out.plan.steps + 1, denoise=denoise)
        assert spent + plan(name, PLANE, longer).nfe > budget


def test_without_a_budget_thirty_calls_are_made() -> None:
    model = Counting()
    out = sample(model, PLANE, shape=(1, 3))
    assert model.calls == out.nfe == 30
    assert (out.times[0], out.times[-1]) == (PLANE.T, PLANE.t_min)


def test_a_budget_that_pays_no_step_is_refused() -> None:
    for name, cost in (("heun", 2), ("rk4", 4), ("pc", 2)):
        with pytest.raises(GridError, match=f"'{name}.* needs {cost} calls for one step, nfe = 1"):
            draw(name, nfe=1, steps=None)


def test_steps_times_and_ends_are_those_asked_for() -> None:
    out = draw("euler", steps=4, grid="uniform", t_start=0.9, t_end=0.1)
    assert out.times == pytest.approx((0.9, 0.7, 0.5, 0.3, 0.1)) and out.nfe == 4
    for grid in ([0.9, 0.5, 0.2], torch.tensor([0.9, 0.5, 0.2], dtype=F64), Grid((0.9, 0.5, 0.2))):
        assert draw("euler", grid=grid, steps=None).times == (0.9, 0.5, 0.2)


@every_kind
def test_denoising_is_one_more_call_at_the_end(solver: str) -> None:
    model = Counting()
    plain, denoised = draw(solver), draw(solver, model, denoise=True)
    assert denoised.nfe == plain.nfe + 1 == model.calls
    clean = EXACT.predict("x0", plain.x, torch.tensor(PLANE.t_min, dtype=F64))
    torch.testing.assert_close(denoised.x, clean, rtol=0, atol=1e-10)


def test_the_end_rule_is_the_grids_own_unless_given() -> None:
    grid = Grid((0.9, 0.5), denoise=True)
    assert draw("ddim", grid=grid, steps=None).nfe == 2
    assert draw("ddim", grid=grid, steps=None, denoise=False).nfe == 1
    assert draw("ddim", grid=[0.9, 0.5], steps=None, denoise=True).nfe == 2
    assert draw("ddim", grid=[0.9], steps=None, denoise=True).nfe == 1


def test_integer_grids_run_a_network_of_integer_time() -> None:
    chain = DiscreteVP.from_betas(linear_betas(100))
    exact, seen = MIXTURE.score_model(chain), list[float]()

    def net(x: Tensor, n: Tensor) -> Tensor:
        seen.append(float(n[0]))
        return exact.predict("eps", x, n + 1)

    model = from_discrete(net, chain.alphas_cumprod)
    out = sample(model, chain, shape=(2, 3), solver="ddim", grid="trailing", steps=10, dtype=F64)
    assert seen == [99, 89, 79, 69, 59, 49, 39, 29, 19, 9] and out.nfe == 10
    other = sample(exact, chain, shape=(2, 3), solver="ddim", grid="trailing", steps=10, dtype=F64)
    torch.testing.assert_close(out.x, other.x, rtol=0, atol=1e-10)


def test_the_denoised_law_is_narrower_by_tweedies_factor() -> None:
    s2, end = 0.04, 0.1
    grid = make_grid("karras", EDM(), 300, t_end=end)
    plain, denoised = (plan("heun", EDM(), grid, d).law(0.0, s2) for d in (False, True))
    assert float(plain.covariance) == pytest.approx(s2 + end**2, rel=1e-3)
    assert float(denoised.covariance) == pytest.approx(s2**2 / (s2 + end**2), rel=1e-3)


# --- dtypes, devices, conditions, callbacks ------------------------------------------------------


def test_states_have_the_default_dtype_unless_given() -> None:
    assert draw(dtype=None).x.dtype == torch.get_default_dtype()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        assert draw(dtype=dtype).x.dtype == dtype
        assert draw(x=torch.ones(2, 3, dtype=dtype)).x.dtype == dtype


class Network(nn.Module):
    """A small network with an optional layer that is noisy in train mode."""

    def __init__(self, noisy: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.noisy = noisy

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return y if self.noisy is None else self.noisy(y)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_network_runs_in_its_own_dtype_and_on_its_device(dtype: torch.dtype) -> None:
    net = Network()
    out = sample(net, PLANE, shape=(2, 3), steps=3, dtype=dtype)
    assert out.x.dtype == dtype and out.x.device == net.layer.weight.device
    betas = linear_betas(10)
    chain = DiscreteVP.from_betas(betas)
    model = from_discrete(Network(), chain.alphas_cumprod)
    out = sample(model, chain, shape=(2, 3), steps=3, solver="ddim", grid="uniform", dtype=dtype)
    assert out.x.dtype == dtype


def test_gradients_flow_only_where_they_are_asked_for() -> None:
    net, x = Network(), torch.ones(2, 3, requires_grad=True)
    assert not sample(net, PLANE, x=x, steps=3).x.requires_grad
    for solver in ("heun", "ddpm", "dopri5"):
        budget = {} if solver == "dopri5" else {"steps": 3}
        out = sample(net, PLANE, x=x, solver=solver, gradients=True, **budget)
        out.x.sum().backward()
        assert x.grad is not None and bool(x.grad.any()) and bool(net.layer.weight.grad.any())
        x.grad, net.layer.weight.grad = None, None


@every_kind
def test_conditions_are_split_with_their_samples(solver: str) -> None:
    label = torch.arange(7.0, dtype=F64) / 7
    others = {"gain": 0.5, "table": torch.ones(5, dtype=F64), "names": ["a"] * 7}

    def model(x: Tensor, t: Tensor, label: Tensor, **rest: Any) -> Tensor:
        assert len(label) == len(x)
        assert rest["gain"] == 0.5 and len(rest["table"]) == 5 and len(rest["names"]) == 7
        return score(x, t) + 0.1 * label[:, None]

    whole = draw(solver, model, label=label, **others)
    split = draw(solver, model, label=label, chunk=2, **others)
    torch.testing.assert_close(split.x, whole.x, rtol=0, atol=1e-13)
    assert not torch.allclose(whole.x[6], draw(solver).x[6])


def test_a_callback_sees_every_step_of_every_chunk() -> None:
    seen: list[StepReport] = []
    out = draw("heun", steps=5, chunk=4, callback=seen.append)
    assert [report.step for report in seen] == [0, 1, 2, 3, 4] * 2
    assert [report.t for report in seen] == [*out.times[1:]] * 2
    assert [len(report.x) for report in seen] == [4] * 5 + [3] * 5
    assert torch.equal(torch.cat([seen[4].x, seen[9].x]), out.x)


def test_a_callback_that_fails_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        draw("heun", steps=2, callback=lambda report: 1 / 0)


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert torch.equal(draw(progress=True, chunk=3).x, draw(chunk=3).x)
    assert capsys.readouterr() == ("", "")


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "pc", "torchsde_euler"])
def test_a_generator_is_read_and_repeats(solver: str) -> None:
    first = draw(solver, noise=generator(5)).x
    assert torch.equal(draw(solver, noise=generator(5)).x, first)
    assert not torch.equal(draw(solver, noise=generator(6)).x, first)


def test_a_callable_is_asked_for_every_step() -> None:
    asked: list[tuple[Any, Any]] = []

    def noise(x: Tensor, t: Any, s: Any) -> Tensor:
        asked.append((t, s))
        return torch.zeros_like(x) if t is not None else torch.ones_like(x)

    out = draw("ddpm", steps=3, noise=noise)
    assert asked == [(None, None), *zip(out.times, out.times[1:], strict=False)]
    assert out.plan is not None
    quiet = draw("ddpm", steps=3, x=torch.ones(7, 3, dtype=F64), noise=noise)
    assert torch.equal(out.x, quiet.x)


class NoSolverNoise(NoiseSource):
    """A source that gives the start and nothing else."""

    def normal(
        self,
        like: Tensor,
        draw: int,
        purpose: Purpose = Purpose.SOLVER,
        times: Times | None = None,
    ) -> Tensor:
        assert purpose == Purpose.START, "a deterministic solver drew noise"
        return torch.ones_like(like)


@pytest.mark.parametrize("solver", ["ab2_v", "dopri5", "torchdiffeq_rk4"])
def test_deterministic_solvers_draw_the_start_alone(solver: str) -> None:
    start = torch.ones(7, 3, dtype=F64)
    assert torch.equal(draw(solver, noise=NoSolverNoise()).x, draw(solver, x=start).x)


# --- models of another process, encoding ---------------------------------------------------------


def test_a_denoiser_of_edm_samples_any_process() -> None:
    exact = MIXTURE.score_model(EDM())

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return exact.predict("x0", x, sigma)

    for sde in (VP(), VE(), RectifiedFlow()):
        options: dict[str, Any] = {"shape": (4, 3), "steps": 5, "dtype": F64, "t_start": 0.9}
        options["solver"] = "ab2_v"  # the default would read the data's scale off the mixture
        matched = sample(from_denoiser(denoiser), sde, **options)
        own = sample(MIXTURE.score_model(sde), sde, **options)
        torch.testing.assert_close(matched.x, own.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "solver, options, tolerance",
    [
        ("dopri5", {}, 1e-3),
        (DormandPrince(1e-10, 1e-10), {}, 1e-8),
        ("torchdiffeq_dopri5", {}, 1e-3),
        ("rk4_v", {"steps": 60}, 1e-5),
        ("heun", {"steps": 200, "grid": "log_snr"}, 1e-2),
    ],
    ids=str,
)
def test_encoding_goes_there_and_back(
    solver: Any, options: dict[str, Any], tolerance: float
) -> None:
    x = MIXTURE.sample(4, seed=1)
    latent = encode(score, PLANE, x, solver=solver, **options)
    assert bool(latent.ok.all()) and not torch.allclose(latent.x, x, atol=0.1)
    if latent.times:
        assert (latent.times[0], latent.times[-1]) == (PLANE.t_min, PLANE.T)
    back = sample(score, PLANE, x=latent.x, solver=solver, **options)
    torch.testing.assert_close(back.x, x, rtol=0, atol=tolerance)


def test_encoding_takes_chunks_grids_and_ends() -> None:
    x = MIXTURE.sample(5, seed=1)
    whole = encode(score, PLANE, x, solver="heun", steps=6, t_start=0.05, t_end=0.8)
    assert (whole.times[0], whole.times[-1]) == (0.05, 0.8)
    split = encode(score, PLANE, x, solver="heun", steps=6, t_start=0.05, t_end=0.8, chunk=2)
    torch.testing.assert_close(split.x, whole.x, rtol=0, atol=1e-13)
    assert encode(score, PLANE, x, solver="heun", grid=[0.1, 0.4, 0.9]).times == (0.1, 0.4, 0.9)


@pytest.mark.parametrize("name", [*STOCHASTIC, "torchsde_euler"])
def test_encoding_refuses_noise(name: str) -> None:
    with pytest.raises(ArgumentError, match="encoding needs a deterministic solver"):
        encode(score, PLANE, MIXTURE.sample(2), solver=name)


@pytest.mark.parametrize("name", ["ddpm", "pc", "euler_maruyama"])
def test_sampling_upwards_with_noise_is_refused(name: str) -> None:
    with pytest.raises(GridError, match="goes up"):
        draw(name, t_start=0.1, t_end=0.9)


# --- failures on the way -------------------------------------------------------------------------


@pytest.mark.arithmetic
@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_fails_is_told_and_spoils_no_neighbour(solver: str, value: float) -> None:
    push = torch.zeros(7, 1, dtype=F64)
    good = draw(solver, lambda x, t, push: score(x, t) + push, push=push)
    push[2] = value
    bad = draw(solver, lambda x, t, push: score(x, t) + push, push=push)
    expected = [int(Status.OK)] * 7
    expected[2] = int(Status.NONFINITE)
    assert bad.status.tolist() == expected
    assert bad.ok.tolist() == [code == Status.OK for code in expected]
    others = torch.arange(7) != 2
    assert torch.equal(bad.x[others], good.x[others])


@every_kind
def test_raise_on_failure_counts_and_carries_the_result(solver: str) -> None:
    push = torch.zeros(7, 1, dtype=F64)
    push[[1, 4]] = math.nan
    options = {"push": push, "raise_on_failure": True}
    with pytest.raises(SolveError, match=r"2 of 7 samples failed \(2 NONFINITE\)") as caught:
        draw(solver, lambda x, t, push: score(x, t) + push, **options)
    result = caught.value.result
    assert isinstance(result, Samples) and result.status.tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert draw(solver, raise_on_failure=True).ok.all()


def test_limits_of_an_integrator_reach_the_status() -> None:
    steps = sample(score, PLANE, shape=(2, 3), solver=DormandPrince(max_steps=3))
    assert steps.status.tolist() == [Status.STEP_LIMIT] * 2
    calls = sample(score, PLANE, shape=(2, 3), solver=DormandPrince(max_calls=20))
    assert calls.status.tolist() == [Status.CALL_LIMIT] * 2 and calls.nfe == 20


@pytest.mark.parametrize("solver", ["ab2_v", "ddpm"])
def test_an_interrupt_hands_back_the_chunks_that_are_done(solver: str) -> None:
    whole = draw(solver, chunk=2)
    out = draw(solver, Counting(fails_at=2 * whole.nfe + 1), chunk=2)
    done = int(out.ok.sum())
    assert done == 4
    assert out.status.tolist() == [int(Status.OK)] * done + [int(Status.INTERRUPTED)] * (7 - done)
    assert torch.equal(out.x[:done], whole.x[:done])
    assert out.x.shape == (7, 3) and bool(out.x[6].isnan().all())


@pytest.mark.parametrize("solver", ["adams", "dopri5"])
def test_an_interrupt_hands_back_the_rows_that_arrived(solver: str) -> None:
    whole = draw(solver, chunk=2)
    out = draw(solver, Counting(fails_at=2 * whole.calls // 3), chunk=2)
    assert 0 < int(out.ok.sum()) < 7
    assert torch.equal(out.x[out.ok], whole.x[out.ok])
    assert bool((out.status[~out.ok] == int(Status.INTERRUPTED)).all()) and out.x.isfinite().all()


def test_an_interrupt_with_nothing_done_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        draw("ab2_v", Counting(fails_at=0))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "ddpm", "pc"])
def test_an_interrupted_plan_hands_back_the_end_of_its_last_step(solver: str) -> None:
    seen: list[StepReport] = []
    whole = draw(solver, callback=seen.append)
    for stop in range(1, whole.nfe):
        try:
            out = draw(solver, Counting(fails_at=stop))
        except KeyboardInterrupt:  # in the first step, or where its state has gone already
            continue
        assert out.t is not None and out.status.tolist() == [int(Status.INTERRUPTED)] * 7
        (there,) = [report for report in seen if report.t == pytest.approx(float(out.t[0]))]
        torch.testing.assert_close(out.x, there.x, rtol=0, atol=1e-12)
        assert 0 < out.nfe <= stop
    assert float(out.t[0]) == pytest.approx(seen[-2].t)


def test_an_interrupted_adaptive_run_hands_back_where_it_was() -> None:
    out = draw("dopri5", Counting(fails_at=20))
    assert out.status.tolist() == [int(Status.INTERRUPTED)] * 7
    assert out.x.isfinite().all()


def test_a_static_output_buffer_spoils_no_chunk() -> None:
    buffer = torch.empty(2, 3, dtype=F64)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return buffer[: len(x)].copy_(EXACT.predict("x0", x, t))

    for solver in ("ddim", "dpmpp_2m", "dopri5"):
        options: dict[str, Any] = {"shape": (6, 3), "chunk": 2, "denoise": True}
        if solver != "dopri5":
            options["steps"] = 3
        expected = draw(solver, EXACT, **options)
        found = draw(solver, from_x0(net, PLANE), **options)
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-9)


def test_a_row_that_did_not_arrive_is_not_denoised() -> None:
    solver = DormandPrince(max_steps=3)
    plain = sample(score, PLANE, shape=(2, 3), solver=solver)
    denoised = sample(score, PLANE, shape=(2, 3), solver=solver, denoise=True)
    assert torch.equal(denoised.status, plain.status) and not bool(plain.ok.any())
    assert torch.equal(denoised.x, plain.x)


# --- bad input, refused before the model is called -----------------------------------------------


BAD: dict[str, tuple[dict[str, Any], type[ScoresolveError], str]] = {
    "no start": ({"shape": None}, ArgumentError, "either shape=.* or a start x="),
    "two starts": ({"x": torch.ones(2, 3), "shape": (2, 3)}, ArgumentError, "not both"),
    "empty shape": ({"shape": ()}, ShapeError, r"give \[B, \*event\]"),
    "no rows": ({"shape": (0, 3)}, ShapeError, r"\(0, 3\).*positive whole numbers"),
    "negative": ({"shape": (2, -3)}, ShapeError, r"\(2, -3\)"),
    "fraction": ({"shape": (2, 1.5)}, ShapeError, r"\(2, 1.5\)"),
    "no sequence": ({"shape": 5}, ShapeError, "shape = 5"),
    "words": ({"shape": ("a",)}, ShapeError, "'a'"),
    "integer state": ({"x": torch.ones(2, 3).int()}, ArgumentError, "torch.int32.*floating"),
    "complex state": ({"x": torch.ones(2, 3) + 0j}, ArgumentError, "complex.*real"),
    "scalar state": ({"x": torch.tensor(1.0)}, ShapeError, "no batch axis"),
    "list": ({"x": [[1.0]]}, ArgumentError, "list"),
    "integer dtype": ({"dtype": torch.int32}, ArgumentError, "torch.int32"),
    "complex dtype": ({"dtype": torch.complex64}, ArgumentError, "torch.complex64"),
    "two budgets": ({"steps": 3, "nfe": 4}, ArgumentError, "steps = 3 and nfe = 4.*one budget"),
    "no steps": ({"steps": 0}, ArgumentError, "steps = 0.*at least 1"),
    "half a step": ({"steps": 2.5}, ArgumentError, "steps = 2.5"),
    "no calls": ({"nfe": 0}, ArgumentError, "nfe = 0.*at least 1"),
    "nan calls": ({"nfe": math.nan}, ArgumentError, "nfe = nan"),
    "grid and steps": ({"grid": [0.9, 0.1], "steps": 3}, ArgumentError, "leave out steps="),
    "grid and end": ({"grid": [0.9, 0.1], "t_end": 0.2}, ArgumentError, "leave out t_end="),
    "grid goes back": ({"grid": [0.9, 0.1, 0.5]}, GridError, "strictly monotone"),
    "grid outside": ({"grid": [1.1, 0.1]}, GridError, r"outside the interval \[0, 1\]"),
    "grid with nan": ({"grid": [1.0, math.nan]}, GridError, "not finite"),
    "grid too short": ({"grid": [1.0]}, GridError, "at least two"),
    "no grid": ({"grid": 7}, GridError, "7"),
    "grid name": ({"grid": "karas"}, UnknownNameError, "'karas': did you mean 'karras'"),
    "start outside": ({"t_start": 2.0}, GridError, "outside the interval"),
    "start is nan": ({"t_start": math.nan}, GridError, "not finite"),
    "no interval": ({"t_start": 0.5, "t_end": 0.5}, GridError, "monotone"),
    "solver name": ({"solver": "dpmp_2m"}, UnknownNameError, "did you mean 'dpmpp_2m'"),
    "no solver": ({"solver": 3}, ArgumentError, "solver is 3"),
    "no chunk": ({"chunk": 0}, ArgumentError, "chunk = 0"),
    "half a chunk": ({"chunk": 1.5}, ArgumentError, "chunk = 1.5"),
    "negative seed": ({"seed": -1}, ArgumentError, "seed is -1"),
    "seed fraction": ({"seed": 0.5}, ArgumentError, "seed is 0.5"),
    "no noise": ({"noise": 3}, ArgumentError, "noise is a int"),
    "compiled steps": (
        {"compile": True, "callback": print},
        ArgumentError,
        "no steps to report.*leave out callback=",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_the_model_is_called(case: str) -> None:
    options, error, message = BAD[case]
    model, given = Counting(), dict(options)
    if "shape" not in given and "x" not in given:
        given["shape"] = (2, 3)
    with pytest.raises(error, match=message):
        sample(model, PLANE, **given)
    assert model.calls == 0


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize(
    "option", [{"steps": 3}, {"nfe": 9}, {"grid": "karras"}, {"callback": print}, {"compile": True}]
)
def test_an_integrator_refuses_what_only_a_grid_has(name: str, option: dict[str, Any]) -> None:
    (key,), model = option, Counting()
    with pytest.raises(ArgumentError, match=f"{key}= does not go with"):
        sample(model, PLANE, shape=(2, 3), solver=name, **option)
    with pytest.raises(GridError, match="outside"):
        sample(model, PLANE, shape=(2, 3), solver=name, t_start=1.5)
    with pytest.raises(ArgumentError, match="it has no plan"):
        plan(name, PLANE, [0.9, 0.1])
    assert model.calls == 0


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match="score is int"):
        sample(3, PLANE, shape=(2, 3))  # type: ignore[arg-type]


def test_a_process_without_prior_asks_for_a_start() -> None:
    sde = BenesSDE()
    with pytest.raises(ArgumentError, match="no prior: give the start x="):
        sample(score, sde, shape=(2, 3), solver="euler_maruyama", steps=3)
    with pytest.raises(ArgumentError, match="'euler_flow' or 'euler_maruyama'"):
        sample(score, sde, x=torch.ones(2, 3), solver="ddim", steps=3)
    for solver in ("euler_maruyama", "heun_flow"):
        out = sample(lambda x, t: -x, sde, x=torch.ones(2, 3), solver=solver, steps=3)
        assert bool(out.ok.all()) and out.times == pytest.approx((1.5, 1.0, 0.5, 0.0))


@pytest.mark.parametrize("name", ["dopri5", "torchsde_euler", "torchdiffeq_rk4", "ab2_v", "pc"])
@pytest.mark.parametrize(
    "output, message",
    [
        (lambda x: x[:, :1], r"shape \(2, 1\) for x of shape \(2, 3\)"),
        (lambda x: x[None], r"shape \(1, 2, 3\)"),
        (lambda x: None, "NoneType"),
        (lambda x: (x,), "tuple"),
    ],
)
def test_a_score_that_would_broadcast_is_refused(
    name: str, output: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        sample(lambda x, t: output(x), PLANE, shape=(2, 3), solver=name)


def test_errors_of_a_model_reach_the_caller() -> None:
    for solver in KINDS:
        with pytest.raises(ZeroDivisionError):
            draw(solver, lambda x, t: 1 / 0)  # type: ignore[arg-type,return-value]


@pytest.fixture
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("noisy", [nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Dropout1d(0.1)])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        lambda net: from_eps(net, PLANE),
        lambda net: from_denoiser(net),
        lambda net: from_discrete(net, DiscreteVP.from_betas(linear_betas(10)).alphas_cumprod),
    ],
    ids=["score", "eps", "denoiser", "discrete"],
)
def test_dropout_in_train_mode_warns(
    noisy: nn.Module, wrap: Callable[[nn.Module], Any], strict: None
) -> None:
    net = Network(noisy)
    with pytest.warns(ModelWarning, match=r"call net.eval\(\) first"):
        sample(wrap(net.train()), PLANE, x=torch.zeros(2, 3), steps=1)
    sample(wrap(net.eval()), PLANE, x=torch.zeros(2, 3), steps=1)


def test_the_warning_points_at_the_callers_line(strict: None) -> None:
    with pytest.warns(ModelWarning) as caught:
        sample(Network(nn.Dropout()), PLANE, shape=(2, 3), steps=1)
    assert caught[0].filename == __file__


def test_a_network_without_noise_does_not_warn(strict: None) -> None:
    sample(Network().train(), PLANE, x=torch.zeros(2, 3), steps=1)


def test_empty_batches_stay_empty() -> None:
    for solver in KINDS:
        out = draw(solver, x=torch.empty(0, 3, dtype=F64))
        assert out.x.shape == (0, 3) and out.status.shape == (0,)


@pytest.mark.parametrize("sde", [VP(), VE(), EDM(), RectifiedFlow()], ids=str)
def test_the_default_finds_the_mixture(sde: GaussianSDE) -> None:
    """Thirty calls, two well separated modes: weights within five standard errors."""
    n, mixture = 400, GaussianMixture([0.25, 0.75], [[-2.0, 0.0], [2.0, 0.0]], 0.05)
    out = sample(mixture.score_model(sde), sde, shape=(n, 2), dtype=F64)
    left = out.x[:, 0] < 0
    assert abs(float(left.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    spread = (out.x - torch.where(left[:, None], mixture.means[0], mixture.means[1])).var()
    assert float(spread) == pytest.approx(0.05, rel=5 * math.sqrt(2 / (2 * n)))


def test_denoising_a_process_without_sigma_is_refused_before_any_call() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    process = Langevin(lambda x: -x)
    with pytest.raises(ArgumentError, match="denoise="):
        sample(score, process, x=torch.zeros(2, 3), solver="dopri5", denoise=True)
