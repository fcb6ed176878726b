"""Plans: what is traced, how it runs, and its exact law.

Three witnesses share no code with the package: coefficients worked out by hand, an interpreter of
the stages that never writes in place, and an affine propagation with full matrices,

    x = A xi + b,  xi = (start, z_1, ..., z_K),   E[x0 | x] = mu + alpha S V^-1 (x - alpha mu),

with V = alpha^2 S + sigma^2 I, from which the law of every register follows.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import BenesSDE, OwnGaussian, event_shapes, generator, normal, seeds
from torch import Tensor

from scoresolve.errors import ArgumentError, GridError, ShapeError
from scoresolve.grid import make_grid
from scoresolve.kernels import ULA
from scoresolve.models import Model, NetworkModel, as_model
from scoresolve.noise import NoiseSource, Philox, Purpose, first_draw
from scoresolve.plans import (
    Call,
    Combine,
    Custom,
    Draw,
    Drift,
    Linear,
    Mark,
    Plan,
    Run,
    StepReport,
    model_time,
    trace,
)
from scoresolve.sde import EDM, SDE, VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import (
    REGISTRY,
    KernelCorrector,
    PredictorCorrector,
    Solver,
    get_solver,
)
from scoresolve.targets import GaussianMixture

F64 = torch.float64
Matrix = NDArray[np.float64]
FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
STOCHASTIC = [name for name in FIXED if get_solver(name).stochastic]
LARGE = 6000  # rows of three elements: beyond the size from which the executor fuses passes
every_solver = pytest.mark.parametrize("name", FIXED)
linear_solvers = pytest.mark.parametrize("name", FIXED)

PLANE = VP()
MIXTURE = GaussianMixture(
    [0.3, 0.7], [[-1.0, 0.5, 0.2], [0.8, -0.3, 0.0]], [[0.3, 0.5, 0.4], [0.2, 0.6, 0.5]]
)


@functools.cache
def plan_of(name: str, steps: int = 5, sde: SDE = PLANE, denoise: bool = False) -> Plan:
    times = make_grid("cosine", sde, steps, 0.8 * sde.T, 0.1 * sde.T).times
    return trace(get_solver(name), sde, times, denoise)  # type: ignore[arg-type]


def wave(x: Tensor, t: Tensor) -> Tensor:
    """A bounded, nonlinear, elementwise score for states of any shape."""
    return -0.5 * torch.tanh(x + t.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype))


def start(rows: int = 4, *event: int, seed: int = 0) -> Tensor:
    return normal(generator(seed), rows, *(event or (3,)))


def interpret(plan: Plan, model: Model, x: Tensor, noise: NoiseSource | None) -> Tensor:
    """The stages one by one, out of place, every register kept."""
    registers = {0: x}
    for stage in plan.stages:
        if isinstance(stage, Call):
            y = registers[stage.x]
            registers[stage.out] = model.predict(stage.prediction, y, model_time(stage.t, y))
        elif isinstance(stage, Draw):
            assert noise is not None
            registers[stage.out] = noise.normal(x, stage.index)
        elif isinstance(stage, Combine):
            registers[stage.out] = torch.stack([c * registers[r] for r, c in stage.terms]).sum(0)
        elif isinstance(stage, Drift):
            assert model.sde is not None
            y = registers[stage.x]
            registers[stage.out] = model.sde.drift(y, model_time(stage.t, y))
        elif isinstance(stage, Custom):
            assert noise is not None
            registers[stage.out] = stage.kernel(
                registers[stage.x],
                stage.t,
                lambda prediction, y, t: model.predict(prediction, y, model_time(t, y)),
                noise,
                stage.draw,
            )
    return registers[plan.output]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


# --- tracing -------------------------------------------------------------------------------------


def vp_scales(t: float) -> tuple[float, float]:
    """alpha and sigma of the linear-beta process, from its integral of beta."""
    alpha = math.exp(-(t**2 * 19.9 / 4 + t * 0.05))
    return alpha, math.sqrt(1 - alpha**2)


def assert_stages(plan: Plan, expected: list[Any]) -> None:
    assert [type(stage) for stage in plan.stages] == [type(stage) for stage in expected]
    for stage, wanted in zip(plan.stages, expected, strict=True):
        if isinstance(stage, Combine):
            assert stage.out == wanted.out
            assert dict(stage.terms) == pytest.approx(dict(wanted.terms), rel=1e-12)
        elif isinstance(stage, Call):
            assert (stage.out, stage.x, stage.t, stage.prediction) == (
                wanted.out,
                wanted.x,
                wanted.t,
                wanted.prediction,
            )
        else:
            assert stage == wanted


def test_trace_of_euler_in_eps_form_has_the_coefficients_worked_out_by_hand() -> None:
    t0, t1, t2 = 0.9, 0.5, 0.1
    (a0, s0), (a1, s1), (a2, s2) = map(vp_scales, (t0, t1, t2))
    plan = trace(get_solver("euler"), VP(), (t0, t1, t2))  # type: ignore[arg-type]
    assert_stages(
        plan,
        [
            Call(1, 0, t0, "eps", None),
            Combine(2, ((0, a1 / a0), (1, s1 - a1 / a0 * s0))),
            Mark(2, 0, t1),
            Call(3, 2, t1, "eps", None),
            Combine(4, ((2, a2 / a1), (3, s2 - a2 / a1 * s1))),
            Mark(4, 1, t2),
        ],
    )
    assert plan.output == 4 and plan.nfe == plan.steps == 2 and plan.times == (t0, t1, t2)
    assert not plan.stochastic and not plan.denoised
    assert plan.prior_std == VP().start_std(t0) == pytest.approx(vp_scales(t0)[1], rel=1e-4)


def test_trace_of_dpmpp_2m_has_the_coefficients_worked_out_by_hand() -> None:
    times = (0.9, 0.6, 0.35, 0.1)
    (a, s) = zip(*map(vp_scales, times), strict=True)
    lam = [math.log(x / y) for x, y in zip(a, s, strict=True)]
    h = [lam[i + 1] - lam[i] for i in range(3)]
    weight = [a[i + 1] * (1 - math.exp(-h[i])) for i in range(3)]
    r = [h[i - 1] / h[i] for i in range(1, 3)]  # previous step over this one
    plan = trace(get_solver("dpmpp_2m"), VP(), times, denoise=True)  # type: ignore[arg-type]
    past1 = -weight[1] / (2 * r[0])
    past2 = -weight[2] / (2 * r[1])
    assert_stages(
        plan,
        [
            Call(1, 0, times[0], "x0", None),
            Combine(2, ((0, s[1] / s[0]), (1, weight[0]))),
            Mark(2, 0, times[1]),
            Call(3, 2, times[1], "x0", None),
            Combine(4, ((2, s[2] / s[1]), (3, weight[1] - past1), (1, past1))),
            Mark(4, 1, times[2]),
            Call(5, 4, times[2], "x0", None),
            Combine(6, ((4, s[3] / s[2]), (5, weight[2] - past2), (3, past2))),
            Mark(6, 2, times[3]),
            Call(7, 6, times[3], "x0", None),
        ],
    )
    assert plan.denoised and plan.nfe == 4 and plan.steps == 3 and plan.output == 7


@pytest.mark.parametrize(
    ("name", "ends", "prediction", "terms"),
    [
        ("dpmpp_2m", (1.0, 0.6), "x0", {1: 0.4, 0: 0.6}),
        ("ddpm", (1.0, 0.6), "x0", {1: 0.4, 2: 0.6}),
        ("dpmpp_2m", (0.6, 1.0), "x0", {1: -0.4 / 0.6, 0: 1 / 0.6}),
        ("dpmpp_2m", (0.6, 0.0), "x0", {1: 1.0}),
        ("dpmpp_2m", (0.0, 0.6), "eps", {0: 0.4, 1: 0.6}),
        ("ddim", (0.0, 0.6), "eps", {0: 0.4, 1: 0.6}),  # as x0 does not tell eps there
    ],
)
def test_a_jump_from_or_to_an_end_is_that_of_the_predicted_data_and_noise(
    name: str, ends: tuple[float, float], prediction: str, terms: dict[int, float]
) -> None:
    """x_s = (1 - s) x0 + s eps with x = (1 - t) x0 + t eps, or fresh noise for eps; where
    register 0 is x, register 1 the prediction and register 2 the noise."""
    plan = trace(get_solver(name), RectifiedFlow(), ends, denoise=False)  # type: ignore[arg-type]
    call, *rest = plan.stages
    assert isinstance(call, Call) and call.prediction == prediction and plan.nfe == 1
    made = {stage.out: dict(stage.terms) for stage in rest if isinstance(stage, Combine)}
    found = made.get(plan.output, {plan.output: 1.0})
    assert {register: c for register, c in found.items() if c != 0} == pytest.approx(terms)


def test_trace_of_ddpm_draws_one_noise_a_step_over_its_interval() -> None:
    plan = plan_of("ddpm", 4)
    draws = [stage for stage in plan.stages if isinstance(stage, Draw)]
    first = first_draw(plan.times[0])
    assert [(d.index, d.t, d.s) for d in draws] == [
        (first + i, t, s) for i, (t, s) in enumerate(itertools.pairwise(plan.times))
    ]


@every_solver
def test_calls_lie_in_the_grid_and_know_their_schedule(name: str) -> None:
    plan = plan_of(name, 6)
    calls = [stage for stage in plan.stages if isinstance(stage, Call)]
    assert calls[0].t == plan.times[0]
    for call in calls:
        assert plan.times[-1] <= call.t <= plan.times[0]
        assert call.point is not None
        alpha, sigma = vp_scales(call.t)
        assert (call.point.alpha, call.point.sigma) == pytest.approx((alpha, sigma), rel=1e-12)
    assert [m.t for m in plan.stages if isinstance(m, Mark)] == list(plan.times[1:])


@every_solver
@pytest.mark.parametrize("denoise", [False, True])
def test_nfe_is_the_number_of_calls_really_made(name: str, denoise: bool) -> None:
    calls = 0

    def counting(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return wave(x, t)

    for steps in (1, 2, 3, 7):
        plan, calls = plan_of(name, steps, denoise=denoise), 0
        plan.run(NetworkModel(counting, PLANE, "score"), start(), Philox(0))
        assert plan.nfe == calls
        assert plan.steps == steps


@pytest.mark.parametrize(
    "name, steps, nfe",
    [
        ("euler", 9, 9),
        ("heun", 9, 18),
        ("midpoint_v", 9, 18),
        ("rk4_x0", 9, 36),
        ("ab2", 9, 9),
        ("ab3_v", 9, 9),
        ("ab3_v", 30, 31),
        ("ab4_flow", 30, 34),
        ("dpmpp_2m", 9, 9),
        ("stochastic_heun", 9, 18),
        ("pc_annealed", 9, 18),
        ("pc", 9, 9 + 5),  # a corrector after every second step, and after the last
    ],
)
def test_nfe_is_as_documented(name: str, steps: int, nfe: int) -> None:
    assert plan_of(name, steps).nfe == nfe
    assert plan_of(name, steps, denoise=True).nfe == nfe + 1


def test_a_plan_prints_as_a_table_with_every_coefficient() -> None:
    plan = trace(get_solver("ddpm"), VP(), (0.9, 0.5), denoise=True)  # type: ignore[arg-type]
    (a_t, s_t), (a_s, s_s) = vp_scales(0.9), vp_scales(0.5)
    ratio = (a_t / a_s * s_s / s_t) ** 2  # SNR_t / SNR_s
    terms = [ratio * a_s / a_t, a_s * (1 - ratio), s_s * math.sqrt(1 - ratio)]
    lines = str(plan).splitlines()
    assert lines[0] == f"ddpm on {VP()}: 1 steps, NFE 2"
    assert lines[1].split("  ")[-1].strip() == "network call" and "x0(x0, t=0.9)" in lines[1]
    assert "noise 0" in lines[2] and "t=0.9 -> 0.5" in lines[2]
    assert lines[3].split()[1:3] == ["x3", "="] and lines[3].split()[4::2] == ["x0", "x1", "x2"]
    assert [float(c) for c in lines[3].split()[3::2]] == pytest.approx(terms, rel=1e-7)
    assert "step 0 ends in x3" in lines[4] and "x0(x3, t=0.5)" in lines[5]
    assert lines[6].split() == ["result:", "x4"] and len(lines) == 7


@every_solver
def test_json_gives_the_plan_back_exactly(name: str) -> None:
    plan = plan_of(name, 6, denoise=True)
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert type(loaded.stages) is tuple and type(loaded.times) is tuple
    x, model = start(), NetworkModel(wave, PLANE, "score")
    assert torch.equal(loaded.run(model, x, Philox(3)), plan.run(model, x, Philox(3)))
    assert torch.equal(loaded.law(0.5, 0.3).covariance, plan.law(0.5, 0.3).covariance)


def test_json_keeps_a_plan_whose_schedule_is_not_finite() -> None:
    plan = trace(get_solver("euler_v"), VP(), (0.5, 0.1, 0.0))  # type: ignore[arg-type]
    assert plan.end is not None and plan.end.sigma_dot == math.inf
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "3", "null", '"plan"', '{"stages": 3}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="not a plan"):
        Plan.from_json(text)


def test_json_of_a_stage_that_is_unknown_is_refused() -> None:
    data = json.loads(plan_of("ddim").to_json())
    data["stages"][0]["kind"] = "fly"
    with pytest.raises(ArgumentError, match="not a plan"):
        Plan.from_json(json.dumps(data))


# --- the executor against the interpreter --------------------------------------------------------


@every_solver
@settings(max_examples=4)
@given(event=event_shapes(), seed=seeds(), denoise=st.booleans(), rows=st.integers(0, 4))
def test_a_run_is_what_its_stages_say(
    name: str, event: tuple[int, ...], seed: int, denoise: bool, rows: int
) -> None:
    plan = plan_of(name, 5, denoise=denoise)
    x, model = normal(generator(seed), rows, *event), NetworkModel(wave, PLANE, "score")
    expected = interpret(plan, model, x, Philox(seed))
    close(plan.run(model, x, Philox(seed)), expected)
    single = plan.run(model, x.float(), Philox(seed))
    assert single.dtype == torch.float32
    close(single.double(), expected, 1e-3)


@pytest.mark.parametrize("name", ["euler", "euler_x0", "euler_v", "euler_flow", "euler_maruyama"])
@pytest.mark.parametrize("prediction", ["score", "eps", "x0", "v", "flow"])
def test_a_run_is_the_same_whatever_the_network_predicts(name: str, prediction: str) -> None:
    plan, exact, x = plan_of(name), MIXTURE.score_model(PLANE), start()
    net = NetworkModel(lambda x, t: exact.predict(prediction, x, t), PLANE, prediction)
    close(plan.run(net, x, Philox(0)), interpret(plan, exact, x, Philox(0)), 1e-11)


@pytest.mark.parametrize("name", ["euler_flow", "heun_flow", "ab3_flow", "euler_maruyama"])
def test_a_run_on_a_nonlinear_process_is_what_its_stages_say(name: str) -> None:
    sde = BenesSDE()
    plan = trace(get_solver(name), sde, (1.2, 0.9, 0.5, 0.4, 0.1))  # type: ignore[arg-type]
    model, x = as_model(wave, sde), start()
    close(plan.run(model, x, Philox(0)), interpret(plan, model, x, Philox(0)))


def native(plan: Plan) -> str:
    """The prediction that the plan's first call asks for."""
    return next(stage.prediction for stage in plan.stages if isinstance(stage, Call))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}
NO_PLAIN_OUTPUT = [("contiguous", "channels_last"), ("channels_last", "strided")]


@every_solver
@pytest.mark.parametrize("size", [2, 46])  # on both sides of the size where passes are fused
def test_memory_layout_of_state_and_output_changes_nothing(name: str, size: int) -> None:
    plan, x = plan_of(name, 2), start(2, 4, size, size)
    expected = interpret(plan, NetworkModel(wave, PLANE, native(plan)), x, Philox(1))
    for state, output in (*itertools.product(LAYOUTS, ["contiguous"]), *NO_PLAIN_OUTPUT):

        def net(y: Tensor, t: Tensor, output: str = output) -> Tensor:
            return LAYOUTS[output](wave(y, t))

        found = plan.run(NetworkModel(net, PLANE, native(plan)), LAYOUTS[state](x), Philox(1))
        close(found, expected)


@every_solver
@pytest.mark.parametrize(
    "dtype, tolerance, rows",
    [(torch.float16, 0.05, 4), (torch.float16, 0.05, LARGE), (torch.bfloat16, 0.4, 4)],
)
def test_half_precision_states_stay_half_and_near(
    name: str, dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    plan, x = plan_of(name, 3), start(rows).to(dtype)
    asked: set[torch.dtype] = set()

    def net(y: Tensor, t: Tensor) -> Tensor:
        asked.update((y.dtype, t.dtype))
        return wave(y, t)

    result = plan.run(NetworkModel(net, PLANE, "score"), x, Philox(0))
    assert result.dtype == dtype and asked == {dtype, torch.float32}
    expected = plan.run(NetworkModel(wave, PLANE, "score"), x.double(), Philox(0))
    close(result.double(), expected, tolerance)


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_a_float32_network_leaves_the_state_in_float64(name: str, rows: int) -> None:
    plan, x = plan_of(name, 3), start(rows)
    for prediction in ("score", native(plan)):
        model = NetworkModel(lambda y, t: wave(y, t).float(), PLANE, prediction)
        result = plan.run(model, x, Philox(0))
        assert result.dtype == F64
        exact = NetworkModel(wave, PLANE, prediction)
        close(result, interpret(plan, exact, x, Philox(0)), 1e-4)


def test_times_reach_the_model_one_a_row_in_the_dtype_of_the_state() -> None:
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    plan = plan_of("heun", 3)
    plan.run(net, start(5))
    assert all(t.shape == (5,) and t.dtype == F64 for t in seen)
    expected = [call.t for call in plan.stages if isinstance(call, Call)]
    assert [float(t[0]) for t in seen] == expected


def test_a_model_that_writes_into_its_time_spoils_no_other_run() -> None:
    plan, x = plan_of("heun", 4), start(1)

    def vandal(y: Tensor, t: Tensor) -> Tensor:
        result = wave(y, t)
        t.mul_(1000)
        return result

    first = plan.run(vandal, x)
    assert torch.equal(plan.run(vandal, x), first)
    assert torch.equal(plan.run(wave, x), first)


def test_conditions_reach_the_model() -> None:
    plan, x = plan_of("pc", 3), start()
    scaled = plan.run(lambda y, t, factor: factor * wave(y, t), x, Philox(0), factor=0.5)
    close(scaled, plan.run(lambda y, t: 0.5 * wave(y, t), x, Philox(0)))


def test_one_plan_serves_several_threads_at_once() -> None:
    plan, xs = plan_of("ab3_v", 8), [start(rows, seed=rows) for rows in (1, 2, 3, 4)]
    expected = [plan.run(wave, x) for x in xs]
    found: dict[int, list[bool]] = {i: [] for i in range(len(xs))}

    def work(i: int) -> None:
        for _ in range(20):
            found[i].append(torch.equal(plan.run(wave, xs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(same) == 20 and all(same) for same in found.values())


def test_a_compiled_plan_is_the_same_function() -> None:
    plan, x = plan_of("ddpm", 3), start()
    compiled = plan.compile(NetworkModel(wave, PLANE, "score"), backend="eager")
    close(compiled(x, Philox(4)), plan.run(wave, x, Philox(4)))


# --- nobody else's tensor is written into --------------------------------------------------------


WAYS_TO_KEEP: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: x.detach(),
    lambda x: x.view(-1),
    lambda x: x[:1],
    lambda x: x.numpy(),
    lambda x: memoryview(x.numpy()),  # type: ignore[arg-type]
    lambda x: torch.utils.dlpack.to_dlpack(x),
]


def kept_values(held: Any) -> Tensor:
    """What was kept, as a flat tensor."""
    if isinstance(held, Tensor):
        return held.flatten()
    if isinstance(held, np.ndarray | memoryview):
        return torch.from_numpy(np.asarray(held)).flatten()
    return torch.utils.dlpack.from_dlpack(held).flatten()


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_what_a_model_keeps_of_its_inputs_stays(name: str, rows: int) -> None:
    plan, x = plan_of(name, 4), start(rows)
    before = x.clone()
    expected = plan.run(wave, before, Philox(0))
    for keep in WAYS_TO_KEEP:
        kept: list[tuple[Any, Tensor]] = []

        def hoarder(y: Tensor, t: Tensor, keep: Any = keep, kept: Any = kept) -> Tensor:
            kept.append((keep(y), y.clone()))
            return wave(y, t)

        close(plan.run(hoarder, x, Philox(0)), expected)
        assert torch.equal(x, before)
        assert len(kept) == plan.nfe
        for held, was in kept:
            values = kept_values(held)
            assert torch.equal(values, was.flatten()[: values.numel()])


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_what_a_model_returned_stays(name: str, rows: int) -> None:
    plan = plan_of(name, 4)
    for prediction in ("score", native(plan)):
        returned: list[tuple[Tensor, Tensor]] = []

        def net(x: Tensor, t: Tensor, returned: Any = returned) -> Tensor:
            m = wave(x, t)
            returned.append((m, m.clone()))
            return m

        plan.run(NetworkModel(net, PLANE, prediction), start(rows), Philox(0))
        assert all(torch.equal(m, was) for m, was in returned)


ECHOES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(-1).view(x.shape),
    "reversed": lambda x: x.transpose(0, 1).transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_a_model_may_return_its_input(name: str, rows: int) -> None:
    plan, x = plan_of(name, 3), start(rows)
    before = x.clone()
    for echo in ECHOES.values():
        model = NetworkModel(lambda y, t, echo=echo: echo(y), PLANE, native(plan))
        fresh = NetworkModel(lambda y, t, echo=echo: echo(y.clone()), PLANE, native(plan))
        close(plan.run(model, x, Philox(0)), interpret(plan, fresh, x, Philox(0)))
        assert torch.equal(x, before)


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_a_network_with_one_static_output_buffer_is_read_rightly(name: str, rows: int) -> None:
    plan, x = plan_of(name, 3, denoise=True), start(rows)
    for prediction in ("x0", native(plan)):
        buffer, was = torch.full_like(x, math.nan), torch.full_like(x, math.nan)

        def net(y: Tensor, t: Tensor, b: Tensor = buffer, w: Tensor = was) -> Tensor:
            assert torch.equal(b.nan_to_num(), w.nan_to_num())
            return b.copy_(w.copy_(wave(y, t)))

        found = plan.run(NetworkModel(net, PLANE, prediction), x, Philox(0))
        assert torch.equal(buffer, was)
        assert found.data_ptr() != buffer.data_ptr()
        exact = NetworkModel(wave, PLANE, prediction)
        close(found, interpret(plan, exact, x, Philox(0)), 1e-11)


def test_the_result_is_neither_the_start_nor_an_output() -> None:
    plan, x = trace(get_solver("ddim"), VP(), (0.5,), denoise=True), start()  # type: ignore[arg-type]
    for output in (x, x.clone()):
        result = plan.run(NetworkModel(lambda y, t, m=output: m, PLANE, "x0"), x)
        assert torch.equal(result, output)
        assert result.data_ptr() not in (x.data_ptr(), output.data_ptr())


@every_solver
@pytest.mark.parametrize("rows", [4, LARGE])
def test_states_that_a_callback_keeps_stay(name: str, rows: int) -> None:
    plan, kept = plan_of(name, 5), list[tuple[StepReport, Tensor]]()
    plan.run(wave, start(rows), Philox(0), lambda report: kept.append((report, report.x.clone())))
    assert [report.step for report, _ in kept] == [0, 1, 2, 3, 4]
    assert [report.t for report, _ in kept] == list(plan.times[1:])
    assert all(report.steps == 5 and torch.equal(report.x, was) for report, was in kept)


def test_a_run_with_a_callback_is_the_run_without() -> None:
    for name in FIXED:
        plan, x = plan_of(name), start()
        assert torch.equal(
            plan.run(wave, x, Philox(0), lambda _: None), plan.run(wave, x, Philox(0))
        )


def test_noise_that_its_source_keeps_stays() -> None:
    class Keeper(NoiseSource):
        kept: list[tuple[Tensor, Tensor]]

        def normal(
            self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Any = None
        ) -> Tensor:
            z = Philox(0).normal(like, draw, purpose)
            self.kept.append((z, z.clone()))
            return z

    for name in STOCHASTIC:
        source = Keeper()
        source.kept = []
        plan_of(name).run(wave, start(), source)
        assert source.kept and all(torch.equal(z, was) for z, was in source.kept)


def peak(name: str, steps: int) -> int:
    """The most states and outputs that are alive as the network returns."""
    plan, seen, most = plan_of(name, steps), list[weakref.ref[Tensor]](), 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        m = wave(x, t)
        seen.extend((weakref.ref(x), weakref.ref(m)))
        most = max(most, len({id(y) for ref in seen if (y := ref()) is not None}))
        return m

    plan.run(NetworkModel(net, PLANE, native(plan)), start(), Philox(0))
    return most


@every_solver
def test_live_tensors_do_not_grow_with_the_steps(name: str) -> None:
    most = 13 if name == "auto" else 8  # auto remembers five steps
    assert peak(name, 28) == peak(name, 56) <= most


@pytest.mark.parametrize(
    ("name", "remembered"),
    [("euler", 0), ("ddim", 0), ("ddpm", 0), ("dpmpp_2m", 1), ("ab2_v", 1), ("ab4_v", 3)],
)
def test_nothing_is_alive_but_the_state_its_output_and_what_a_step_remembers(
    name: str, remembered: int
) -> None:
    assert peak(name, 28) == 2 + remembered


# --- gradients -----------------------------------------------------------------------------------


@every_solver
def test_gradients_of_a_run_are_those_of_its_stages(name: str) -> None:
    plan, x = plan_of(name, 3), start().requires_grad_()
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    # sin keeps its input for the way back, so writing into a state would be noticed
    model = NetworkModel(lambda y, t: -0.5 * weight * torch.sin(y), PLANE, "score")
    found = torch.autograd.grad(plan.run(model, x, Philox(0)).sin().sum(), (x, weight))
    expected = torch.autograd.grad(interpret(plan, model, x, Philox(0)).sin().sum(), (x, weight))
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted, 1e-10)


@every_solver
@pytest.mark.parametrize("rows", [2, LARGE])
def test_gradients_pass_a_model_that_has_none(name: str, rows: int) -> None:
    plan, x = plan_of(name, 2), start(rows).requires_grad_()
    model = NetworkModel(lambda y, t: wave(y, t).detach(), PLANE, "score")
    (found,) = torch.autograd.grad(plan.run(model, x, Philox(0)).sin().sum(), x)
    (expected,) = torch.autograd.grad(interpret(plan, model, x, Philox(0)).sin().sum(), x)
    close(found, expected, 1e-10)


@pytest.mark.parametrize("name", ["ddim", "heun", "ab4_v", "ddpm", "stochastic_heun", "pc"])
def test_gradients_pass_gradcheck(name: str) -> None:
    plan = plan_of(name, 2)
    x = start(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: plan.run(wave, y, Philox(0)), (x,))


@pytest.mark.parametrize("name", ["heun", "ab3", "ddpm", "pc_annealed"])
def test_function_transforms_work_out_of_place(name: str) -> None:
    plan, x, v = plan_of(name, 3), start(2), start(2, seed=1)

    def run(y: Tensor) -> Tensor:
        return plan.run(wave, y, Philox(0), in_place=False)

    tangent = torch.func.jvp(run, (x,), (v,))[1]
    jacobian = torch.autograd.functional.jacobian(run, x)
    close(tangent, torch.einsum("abcd,cd->ab", jacobian, v), 1e-11)


def test_no_graph_is_kept_without_gradients() -> None:
    with torch.no_grad():
        assert not plan_of("heun").run(wave, start().requires_grad_()).requires_grad
    with torch.inference_mode():
        inside = plan_of("heun").run(wave, start())
    close(inside.clone(), plan_of("heun").run(wave, start()))


# --- bad models, and interrupts ------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (4,), (4, 3, 1), (1, 4, 3)])
def test_an_output_of_another_shape_is_refused_at_the_first_call(
    name: str, shape: tuple[int, ...]
) -> None:
    calls = 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(shape, dtype=F64)

    with pytest.raises(ShapeError, match=rf"shape \({shape[0]},.*for x of shape \(4, 3\)"):
        plan_of(name).run(net, start(), Philox(0))
    assert calls == 1


@pytest.mark.parametrize("name", ["ddim", "heun", "ab3", "ddpm"])
def test_an_output_that_changes_shape_later_is_refused(name: str) -> None:
    calls = 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return wave(x, t)[:, :1] if calls == 3 else wave(x, t)

    with pytest.raises(ShapeError):
        plan_of(name).run(net, start(), Philox(0))


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(ShapeError, match="returned NoneType: return a tensor"):
        plan_of("ddim").run(lambda x, t: None, start())


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.ones(2, 3, dtype=torch.int64), ArgumentError, "torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), ArgumentError, "torch.complex64"),
        (torch.ones(2, 3, dtype=torch.bool), ArgumentError, "torch.bool"),
        ([[1.0]], ArgumentError, "list"),
        (torch.tensor(1.0), ShapeError, "no batch axis"),
    ],
)
def test_a_state_that_is_none_is_refused(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_of("ddim").run(wave, x)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_plan_asks_for_noise(name: str) -> None:
    assert plan_of(name).stochastic
    with pytest.raises(ArgumentError, match="give a noise source"):
        plan_of(name).run(wave, start())


def test_a_model_of_another_process_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"at home in EDM.*give model.on\(sde\)"):
        plan_of("ddim").run(MIXTURE.score_model(EDM()), start())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError):
        plan_of("ddim").run(3, start())  # type: ignore[arg-type]


def test_a_nonlinear_process_asks_for_its_model() -> None:
    for name in ("euler_flow", "euler_maruyama"):
        plan = trace(get_solver(name), BenesSDE(), (1.0, 0.5))  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="give as_model"):
            plan.run(wave, start(), Philox(0))


def test_a_prediction_that_the_network_cannot_give_there_is_refused() -> None:
    plan = trace(get_solver("euler_x0"), VP(), (0.5, 0.2))  # type: ignore[arg-type]
    assert plan.run(NetworkModel(wave, VP(), "eps"), start()).isfinite().all()
    sde = RectifiedFlow()
    plan = trace(get_solver("euler_flow"), sde, (1.0, 0.5))  # type: ignore[arg-type]
    assert plan.run(NetworkModel(wave, sde, "flow"), start()).isfinite().all()
    with pytest.raises(GridError, match="flow cannot be had from score at t = 1"):
        plan.run(NetworkModel(wave, sde, "score"), start())


@every_solver
def test_an_interrupt_passes_through_and_leaves_the_plan_as_it_was(name: str) -> None:
    plan, x = plan_of(name, 3), start()
    before, expected = x.clone(), plan.run(wave, x, Philox(0))
    for stop in range(plan.nfe):
        calls = 0

        def net(y: Tensor, t: Tensor, stop: int = stop) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            return wave(y, t)

        with pytest.raises(KeyboardInterrupt):
            plan.run(net, x, Philox(0))
        assert torch.equal(x, before)
        assert torch.equal(plan.run(wave, x, Philox(0)), expected)


# --- the exact law -------------------------------------------------------------------------------


@dataclass
class Affine:
    """x = matrix xi + shift, with xi = (start [D], noises [K D])."""

    matrix: Matrix
    shift: Matrix


@dataclass
class ByMatrices:
    """The law of a plan with full matrices, for data N(mu, covariance)."""

    plan: Plan
    mu: Matrix
    covariance: Matrix
    schedule: Callable[[float], tuple[float, float, float, float]]
    registers: dict[int, Affine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dim = len(self.mu)
        drawn = [stage.index for stage in self.plan.stages if isinstance(stage, Draw)]
        width = dim * (1 + len(drawn))

        def unit(block: int) -> Matrix:
            matrix = np.zeros((dim, width))
            matrix[:, block * dim : (block + 1) * dim] = np.eye(dim)
            return matrix

        self.registers[0] = Affine(unit(0), np.zeros(dim))
        for stage in self.plan.stages:
            if isinstance(stage, Draw):
                self.registers[stage.out] = Affine(
                    unit(1 + drawn.index(stage.index)), np.zeros(dim)
                )
            elif isinstance(stage, Combine):
                self.registers[stage.out] = Affine(
                    sum(c * self.registers[r].matrix for r, c in stage.terms),  # type: ignore[arg-type]
                    sum(c * self.registers[r].shift for r, c in stage.terms),  # type: ignore[arg-type]
                )
            elif isinstance(stage, Call):
                x = self.registers[stage.x]
                slope, shift = self.prediction(stage.prediction, stage.t)
                self.registers[stage.out] = Affine(slope @ x.matrix, slope @ x.shift + shift)

    def marginal(self, t: float) -> tuple[Matrix, Matrix]:
        alpha, sigma, _, _ = self.schedule(t)
        return alpha * self.mu, alpha**2 * self.covariance + sigma**2 * np.eye(len(self.mu))

    def prediction(self, name: str, t: float) -> tuple[Matrix, Matrix]:
        """Slope and shift of E[m | x], with E[eps | x] = (x - alpha E[x0 | x]) / sigma."""
        alpha, sigma, alpha_dot, sigma_dot = self.schedule(t)
        mean, variance = self.marginal(t)
        clean = alpha * self.covariance @ np.linalg.inv(variance)
        offset = self.mu - clean @ mean
        noise = (np.eye(len(self.mu)) - alpha * clean) / sigma
        p, q = {
            "x0": (1.0, 0.0),
            "eps": (0.0, 1.0),
            "score": (0.0, -1 / sigma),
            "v": (-sigma, alpha),
            "flow": (alpha_dot, sigma_dot),
        }[name]
        return p * clean + q * noise, (p - q * alpha / sigma) * offset

    @property
    def output(self) -> Affine:
        return self.registers[self.plan.output]

    def moments(self, mean: Matrix, covariance: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """Mean, covariance and covariance with the start, for a start of the given moments."""
        dim, a = len(mean), self.output.matrix
        xi = np.eye(a.shape[1])
        xi[:dim, :dim] = covariance
        return (
            a[:, :dim] @ mean + self.output.shift,
            a @ xi @ a.T,
            a[:, :dim] @ covariance,
        )

    def path_error(self, mean: Matrix, covariance: Matrix) -> float:
        """RMS per coordinate of output minus exact flow map, averaged over the start."""
        dim = len(mean)
        m0, v0 = self.marginal(self.plan.times[0])
        m1, v1 = self.marginal(self.plan.times[-1])
        map_slope = root(v1) @ np.linalg.inv(root(v0))
        map_shift = m1 - map_slope @ m0
        if self.plan.denoised:
            slope, shift = self.prediction("x0", self.plan.times[-1])
            map_slope, map_shift = slope @ map_slope, slope @ map_shift + shift
        slope = self.output.matrix - np.pad(
            map_slope, ((0, 0), (0, self.output.matrix.shape[1] - dim))
        )
        centre = slope[:, :dim] @ mean + self.output.shift - map_shift
        xi = np.eye(slope.shape[1])
        xi[:dim, :dim] = covariance
        return math.sqrt((centre @ centre + np.trace(slope @ xi @ slope.T)) / dim)


def root(matrix: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(matrix)
    result: Matrix = (vectors * np.sqrt(values)) @ vectors.T
    return result


def vp_schedule(t: float) -> tuple[float, float, float, float]:
    alpha, sigma = vp_scales(t)
    beta = 0.1 + 19.9 * t
    return alpha, sigma, -beta / 2 * alpha, beta * alpha**2 / (2 * sigma)


def own_schedule(t: float) -> tuple[float, float, float, float]:
    alpha, sigma = math.exp(-0.7 * t), 1.3 * math.sqrt(t * (1 + t))
    return alpha, sigma, -0.7 * alpha, 1.3**2 * (1 + 2 * t) / (2 * sigma)


SCHEDULES: dict[str, tuple[GaussianSDE, Callable[[float], tuple[float, float, float, float]]]] = {
    "VP": (VP(), vp_schedule),
    "EDM": (EDM(), lambda t: (1.0, t, 0.0, 1.0)),
    "RectifiedFlow": (RectifiedFlow(), lambda t: (1 - t, t, -1.0, 1.0)),
    "OwnGaussian": (OwnGaussian(), own_schedule),
}
MU = np.array([0.5, -1.0, 0.25])
FACTOR = np.array([[0.9, 0.0, 0.0], [-0.5, 0.6, 0.0], [0.3, 0.2, 0.2]])
COVARIANCE: Matrix = FACTOR @ FACTOR.T


@linear_solvers
@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("denoise", [False, True])
def test_law_is_that_of_full_matrices(name: str, process: str, denoise: bool) -> None:
    sde, schedule = SCHEDULES[process]
    plan = plan_of(name, 6, sde, denoise)
    witness = ByMatrices(plan, MU, COVARIANCE, schedule)
    starts = {
        "prior": (np.zeros(3), sde.start_std(plan.times[0]) ** 2 * np.eye(3)),
        "marginal": witness.marginal(plan.times[0]),
    }
    for kind, (mean, covariance) in starts.items():
        law = plan.law(torch.tensor(MU), torch.tensor(COVARIANCE), kind)
        size = 1 + np.abs(witness.moments(mean, covariance)[1]).max()
        for found, expected in zip(
            (law.mean, law.covariance, law.cross_covariance),
            witness.moments(mean, covariance),
            strict=True,
        ):
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11 * size)
        if not plan.stochastic:
            expected_error = witness.path_error(mean, covariance)
            assert law.path_error == pytest.approx(expected_error, rel=1e-9, abs=1e-12 * size)


@linear_solvers
def test_errors_of_the_law_compare_it_with_its_target(name: str) -> None:
    for denoise in (False, True):
        plan = plan_of(name, 6, denoise=denoise)
        law = plan.law(torch.tensor(MU), torch.tensor(COVARIANCE))
        alpha, sigma = vp_scales(plan.times[-1])
        values, vectors = np.linalg.eigh(COVARIANCE)
        target_mean, target = alpha * MU, alpha**2 * values + sigma**2
        if denoise:  # E[x0 | x] has mean mu, and variance (alpha v)^2 / (alpha^2 v + sigma^2)
            target_mean, target = MU, (alpha * values) ** 2 / target
        mean, covariance = law.mean.numpy(), law.covariance.numpy()
        spectrum = np.diag(vectors.T @ covariance @ vectors)
        error = mean - target_mean
        assert law.mean_error == pytest.approx(math.sqrt((error**2).mean()), rel=1e-9)
        assert law.variance_error == pytest.approx(np.abs(spectrum / target - 1).max(), rel=1e-9)
        distance = (error**2).sum() + ((np.sqrt(spectrum) - np.sqrt(target)) ** 2).sum()
        assert law.wasserstein == pytest.approx(math.sqrt(distance), rel=1e-9)


def test_law_takes_matrices_diagonals_and_numbers() -> None:
    plan = plan_of("ddpm", 4)
    full = plan.law([0.1, 0.1], [[0.5, 0.0], [0.0, 0.5]])
    for mean, covariance in (([0.1, 0.1], [0.5, 0.5]), (0.1, [0.5, 0.5]), ([0.1, 0.1], 0.5)):
        law = plan.law(mean, covariance)
        close(law.covariance, full.covariance)
        close(law.mean, full.mean)
    assert plan.law(0.1, 0.5).covariance.shape == (1, 1)


def test_law_of_data_that_is_one_point_is_right() -> None:
    law = plan_of("ddim", 200).law([1.0, 2.0], 0.0)
    alpha, sigma = vp_scales(0.1)
    close(law.mean, alpha * torch.tensor([1.0, 2.0], dtype=F64), 0.02)
    close(law.covariance, sigma**2 * torch.eye(2, dtype=F64), 0.02)


@pytest.mark.parametrize(
    "mean, covariance, error",
    [
        ([0.0, 0.0], [1.0, 1.0, 1.0], ShapeError),
        ([[0.0]], 1.0, ShapeError),
        ([0.0, 0.0], [[1.0, 0.0]], ShapeError),
        ([0.0, 0.0], [[1.0, 0.5], [0.2, 1.0]], ArgumentError),
        ([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]], ArgumentError),
        (0.0, -1.0, ArgumentError),
    ],
)
def test_a_covariance_that_is_none_is_refused(
    mean: Any, covariance: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        plan_of("ddim").law(mean, covariance)


CUSTOM = PredictorCorrector(get_solver("ddim"), KernelCorrector(ULA(0.05)))  # type: ignore[arg-type]


def test_a_plan_with_a_kernel_cannot_be_saved() -> None:
    with pytest.raises(ArgumentError, match="'ula' cannot be saved"):
        trace(CUSTOM, VP(), (0.8, 0.5, 0.1)).to_json()


def test_law_refuses_what_is_not_linear() -> None:
    with pytest.raises(ArgumentError, match=r"custom stage at t = .*not linear"):
        trace(CUSTOM, VP(), (0.8, 0.5, 0.1)).law(0.0, 1.0)
    with pytest.raises(ArgumentError, match="not a Gaussian process"):
        trace(get_solver("euler_flow"), BenesSDE(), (1.0, 0.5)).law(0.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="'prior' or 'marginal'"):
        plan_of("ddim").law(0.0, 1.0, "uniform")


@pytest.mark.parametrize(
    "name, denoise",
    [("ab3_v", False), ("ddpm", True), ("stochastic_heun", False), ("pc_annealed", False)],
)
def test_law_is_that_of_many_runs(name: str, denoise: bool) -> None:
    n, plan = 20_000, plan_of(name, 5, denoise=denoise)
    data = GaussianMixture([1.0], torch.tensor(MU)[None], torch.tensor(COVARIANCE)[None])
    x = Philox(1).normal(torch.empty(n, 3, dtype=F64), 0, Purpose.START)
    y = plan.run(data.score_model(PLANE), x, Philox(1))
    law = plan.law(torch.tensor(MU), torch.tensor(COVARIANCE))
    variances = law.covariance.diagonal()
    # five standard errors of a mean, and of the covariance of two normal variables
    assert bool(((y.mean(0) - law.mean).abs() < 5 * (variances / n).sqrt()).all())
    spread = (variances[:, None] * variances + law.covariance**2) / n
    assert bool(((y.T.cov() - law.covariance).abs() < 5 * spread.sqrt()).all())
    cross = (y - y.mean(0)).T @ (x - x.mean(0)) / (n - 1)
    spread = (variances[:, None] + law.cross_covariance**2) / n
    assert bool(((cross - law.cross_covariance).abs() < 5 * spread.sqrt()).all())


def test_a_thousand_steps_are_traced_and_have_a_law() -> None:
    plan = plan_of("ab3_v", 1000)
    law = plan.law(torch.linspace(-1, 1, 64), torch.linspace(0.1, 2, 64))
    assert law.path_error < 1e-6 and law.variance_error < 1e-1


def test_denoising_shrinks_the_law_as_tweedie_says() -> None:
    s, sde = 0.5, EDM()
    times = make_grid("karras", sde, 400).times
    plain, denoised = (trace(get_solver("heun"), sde, times, d).law(0.0, s**2) for d in (0, 1))  # type: ignore[arg-type]
    shrink = s**2 / (s**2 + sde.sigma_min**2)
    assert float(denoised.covariance / plain.covariance) == pytest.approx(shrink**2, rel=1e-12)
    assert float(denoised.target_variance) == pytest.approx(s**2 * shrink, rel=1e-12)


@pytest.mark.parametrize("wrong", [None, 1.0, "x"])
def test_a_step_that_returns_no_state_is_refused_with_a_word(wrong: Any) -> None:
    class Forgetful(Solver):
        name, predicts, order, source = "forgetful", "x0", 1, "none"

        def step(self, x: Linear, t: float, s: float, run: Run) -> Any:
            return wrong

    with pytest.raises(ArgumentError, match="the step of 'forgetful' returned"):
        trace(Forgetful(), VP(), (0.9, 0.5))
