"""What is given wrong is named, and what is right survives a copy."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import (
    ArgumentError,
    GridError,
    ModelWarning,
    ScoresolveError,
    ShapeError,
    SolveError,
    UnknownNameError,
    check_output,
)
from scoresolve.grid import Grid, as_grid, make_grid
from scoresolve.plans import Custom, Linear, Plan, Run, trace
from scoresolve.sde import (
    EDM,
    SDE,
    VE,
    VP,
    CosineVP,
    CriticallyDampedLangevin,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    check_process,
    linear_betas,
)
from scoresolve.solvers import REGISTRY, Solver, get_solver

F64 = torch.float64
TIMES = (0.9, 0.5, 0.1)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_solver_survives_pickle_and_deepcopy(name: str) -> None:
    solver = get_solver(name)
    for same in (pickle.loads(pickle.dumps(solver)), copy.deepcopy(solver)):
        assert type(same) is type(solver) and same.name == solver.name
        if isinstance(solver, Solver):
            plan, again = (trace(s, VP(), TIMES) for s in (solver, same))
            kernels = [s for s in plan.stages if isinstance(s, Custom)]
            assert again == plan if not kernels else str(again) == str(plan)
            kept = pickle.loads(pickle.dumps(plan))
            assert kept == plan if not kernels else str(kept) == str(plan)


def fail(number: int) -> None:
    error = SolveError("two rows failed", number)
    raise error if number else UnknownNameError("solver", "hun", ["heun"])


def test_errors_come_back_from_another_process() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(SolveError, match="two rows failed") as found:
            pool.map_async(fail, [7]).get(timeout=30)
        assert found.value.result == 7
        with pytest.raises(UnknownNameError, match="'hun': did you mean 'heun'"):
            pool.map_async(fail, [0]).get(timeout=30)


# --- slips inside a step -------------------------------------------------------------------------

Step = Callable[[Linear, float, float, Run], Any]


def solver_of(formula: Step) -> Solver:
    class Mine(Solver):
        name, predicts, order, source = "mine", "x0", 1, "a test"

        def step(self, x: Linear, t: float, s: float, run: Run) -> Any:
            return formula(x, t, s, run)

    return Mine()


def m(x: Linear, t: float, run: Run) -> Any:
    return run.predict(x, t)


SLIPS: dict[str, tuple[Step, str]] = {
    "adds a number": (lambda x, t, s, run: m(x, t, run) + 1, "number cannot be added"),
    "adds noise of torch": (lambda x, t, s, run: m(x, t, run) + torch.ones(3), "shape \\(3,\\)"),
    "product": (lambda x, t, s, run: x * m(x, t, run), "multiplies or divides two"),
    "quotient": (lambda x, t, s, run: x / m(x, t, run), "multiplies or divides two"),
    "clamp": (lambda x, t, s, run: m(x, t, run).clamp(-1, 1), "\\.clamp"),
    "tanh": (lambda x, t, s, run: torch.tanh(m(x, t, run)), "tanh"),
    "batch of weights": (lambda x, t, s, run: torch.ones(2) * m(x, t, run), "one number"),
    "comparison": (lambda x, t, s, run: x * (m(x, t, run) > 0), "compares"),
    "equality": (lambda x, t, s, run: x * (m(x, t, run) == 0), "compares"),
    "number of a state": (lambda x, t, s, run: float(m(x, t, run)) * x, "makes a number"),
    "numbers of math": (lambda x, t, s, run: math.exp(m(x, t, run)) * x, "makes a number"),
    "index": (lambda x, t, s, run: m(x, t, run)[:, 0], "index"),
    "power": (lambda x, t, s, run: m(x, t, run) ** 2, "power"),
    "no state": (lambda x, t, s, run: 1.0, "returned 1.0"),
    "nothing left": (lambda x, t, s, run: 0.0 * m(x, t, run), "leaves nothing"),
    "no call": (lambda x, t, s, run: 0.9 * x, "never calls the model"),
    "no past": (lambda x, t, s, run: m(x, t, run) + run.past[-1].m, "run.past\\[-1\\]"),
    "outside": (lambda x, t, s, run: m(x, 0.95, run), "outside the grid"),
    "no time": (lambda x, t, s, run: m(x, math.nan, run), "no time"),
    "hidden noise": (lambda x, t, s, run: m(x, t, run) + run.noise(t, s), "stochastic = True"),
    "text": (lambda x, t, s, run: "2" * m(x, t, run), "give a finite number"),
    "a bug of its own": (lambda x, t, s, run: run.nothing, "failed: .*nothing"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_inside_a_step_is_named(slip: str) -> None:
    formula, message = SLIPS[slip]
    with pytest.raises(ArgumentError, match=f"step of 'mine' .*{message}"):
        trace(solver_of(formula), VP(), TIMES)


def test_an_unknown_prediction_and_a_coefficient_that_is_no_number_are_named() -> None:
    with pytest.raises(UnknownNameError, match="'mine', 'x1': did you mean 'x0'"):
        trace(solver_of(lambda x, t, s, run: run.predict(x, t, "x1")), VP(), TIMES)
    with pytest.raises(GridError, match=r"step of 'mine' from t = 0\.9"):
        trace(solver_of(lambda x, t, s, run: math.nan * m(x, t, run)), VP(), TIMES)


def test_a_sum_may_start_at_zero_and_a_coefficient_be_a_tensor_without_axes() -> None:
    half = torch.tensor(0.5, dtype=F64)
    plain = trace(solver_of(lambda x, t, s, run: 0.5 * x + 0.5 * m(x, t, run)), EDM(), TIMES)
    same = trace(solver_of(lambda x, t, s, run: sum([half * x, m(x, t, run) / 2])), EDM(), TIMES)
    assert same == plain


def test_a_state_kept_on_the_solver_does_not_enter_the_next_run() -> None:
    kept: list[Linear] = []

    def remembers(x: Linear, t: float, s: float, run: Run) -> Linear:
        kept.append(m(x, t, run))
        return x + sum(kept)

    trace(solver_of(remembers), VP(), TIMES)
    with pytest.raises(ArgumentError, match="of another run"):
        trace(solver_of(remembers), VP(), TIMES)


# --- saved plans ---------------------------------------------------------------------------------

SAVED = [trace(get_solver(n), EDM(), (10.0, 1.0, 0.1)).to_json() for n in ("heun", "ddpm")]


def paths(entry: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = entry.items() if isinstance(entry, dict) else ()
    inside = enumerate(entry) if isinstance(entry, list) else inside
    found = [at] if at else []
    for key, value in inside:
        found += paths(value, (*at, key))
    return found


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.floats(), st.text(max_size=2)
) | st.sampled_from([[], {}, [1, 2, 3, 4], "combine", "eps"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_plan_is_refused_with_a_word_or_is_a_plan_that_runs(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SAVED))
    entry = json.loads(text)
    *way, last = data.draw(st.sampled_from(paths(entry)))
    holder = entry
    for key in way:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = data.draw(JUNK)
    try:
        plan = Plan.from_json(json.dumps(entry))
    except ScoresolveError:
        return
    assert Plan.from_json(plan.to_json()) == plan or "NaN" in plan.to_json()
    assert plan.steps == sum(stage.kind == "mark" for stage in plan.stages)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 10**5,
        "{}",
        SAVED[0] + "x",
        SAVED[0][:-9],
        '{"solver": 1, "solver": 2}',
        "NaN",
        "7",
    ],
)
def test_what_is_no_saved_plan_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="not a plan written by to_json"):
        Plan.from_json(text)


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("karras", {"rho": 7, "rhoo": 3}, "'rhoo': did you mean 'rho'"),
        ("uniform", {"rho": 7}, "option of the grid 'uniform', 'rho': there are none"),
        ("shift", {"scale": 2.0}, "known are 'shift'"),
    ],
)
def test_a_grid_refuses_options_it_does_not_have(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(UnknownNameError, match=message):
        make_grid(name, VP(), 10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, 10**9, "10", 2.5, True, math.nan, None])
def test_a_number_of_steps_is_a_number_of_steps(steps: Any) -> None:
    for build in (lambda: make_grid("karras", VP(), steps), lambda: linear_betas(steps)):
        with pytest.raises(ArgumentError, match="give a whole number"):
            build()
    with pytest.raises(ArgumentError, match="whole number"):
        get_solver("dpmpp_2m").make_grid(RectifiedFlow(), steps)  # type: ignore[union-attr]


@pytest.mark.parametrize("times", [["0.9", "0.1"], "karras", [None, 1], torch.ones(2, 2), 3])
def test_times_that_are_no_numbers_are_refused(times: Any) -> None:
    with pytest.raises(GridError):
        as_grid(times)
    with pytest.raises(GridError):
        Grid(times)


# --- processes -----------------------------------------------------------------------------------


class Own(GaussianSDE):
    T, t_min = 1.0, 0.01

    def alpha(self, t: Any) -> Any:
        return 1 - 0.9 * t**2

    def sigma(self, t: Any) -> Any:
        return 0.1 + t


class Plain(SDE):
    def drift(self, x: Tensor, t: Any) -> Tensor:
        return -x

    def diffusion(self, t: Any) -> Any:
        return torch.ones_like(t)


def variant(base: type, **methods: Any) -> Any:
    return type("Variant", (base,), methods)()


FAULTY: dict[str, tuple[Any, str]] = {
    "none": (None, "sde is None"),
    "class": (VP, "is the class VP: give an instance"),
    "falling sigma": (variant(Own, sigma=lambda s, t: torch.sin(3 * t)), "does not fall"),
    "negative": (variant(Own, alpha=lambda s, t: 0.5 - t), "at least 0"),
    "nan": (variant(Own, sigma=lambda s, t: t * math.nan), "finite"),
    "number": (variant(Own, alpha=lambda s, t: 1.0), "returned float"),
    "one for all": (variant(Own, alpha=lambda s, t: torch.ones(1)), "shape \\(1,\\)"),
    "wrong closed form": (variant(Own, diffusion=lambda s, t: torch.ones_like(t)), "mend"),
    "wrong rate": (variant(Own, drift_rate=lambda s, t: -t), "mend"),
    "diffusion": (variant(Plain, diffusion=lambda s, t: 1.0), "returned float"),
    "negative diffusion": (variant(Plain, diffusion=lambda s, t: -torch.ones_like(t)), "negative"),
    "drift": (variant(Plain, drift=lambda s, x, t: -x.sum(1, keepdim=True)), "shape \\(2, 1\\)"),
    "writes": (variant(Plain, drift=lambda s, x, t: x.mul_(-1)), "writes into x"),
    "fails": (variant(Plain, drift=lambda s, x, t: x @ x), "drift failed"),
    "parts": (
        variant(Plain, diffusion=lambda s, t: torch.ones(*t.shape, 2)),
        "appends axes \\(2,\\)",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_process_that_does_not_keep_its_word_is_refused(case: str) -> None:
    sde, message = FAULTY[case]
    with pytest.raises((ArgumentError, ShapeError), match=message):
        check_process(sde, torch.ones(4, 3))


def test_a_process_with_right_closed_forms_is_taken() -> None:
    """alpha = 1 - t and sigma = t, so that f = -1/alpha, g^2 = 2 t/alpha and lam = log(alpha/t)."""
    methods = {
        "T": 0.99,
        "alpha": lambda s, t: 1 - t,
        "sigma": lambda s, t: t.clone(),
        "log_alpha": lambda s, t: torch.log1p(-t),
        "log_sigma": lambda s, t: t.log(),
        "alpha_dot": lambda s, t: -torch.ones_like(t),
        "sigma_dot": lambda s, t: torch.ones_like(t),
        "log_snr": lambda s, t: 2 * ((1 - t) / t).log(),
        "time_from_log_snr": lambda s, v: torch.sigmoid(-v / 2),
        "drift_rate": lambda s, t: -1 / (1 - t),
        "diffusion": lambda s, t: (2 * t / (1 - t)).sqrt(),
    }
    sde = variant(Own, **methods)
    check_process(sde, torch.ones(4, 3))
    for name in [name for name in methods if name not in ("T", "alpha", "sigma")]:
        off = variant(type(sde), **{name: lambda s, t, name=name: 1.01 * methods[name](s, t)})
        with pytest.raises(ArgumentError, match=f"{name} gives .* mend the formula"):
            check_process(off, torch.ones(4, 3))


def test_a_process_of_ones_own_is_asked_once() -> None:
    asked = []
    sde = variant(Plain, diffusion=lambda s, t: asked.append(1) or torch.ones_like(t))
    for _ in range(3):
        check_process(sde, torch.ones(4, 3))
    assert len(asked) == 1
    check_process(Own(), torch.ones(4, 3))
    assert float(Own().marginal(torch.ones(1, 1, dtype=F64), 0.5)[0]) == pytest.approx(0.775)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, "1", None])
@pytest.mark.parametrize(
    "build",
    [
        lambda v: VP(beta_max=v),
        lambda v: VE(sigma_max=v),
        lambda v: EDM(sigma_max=v),
        lambda v: RectifiedFlow(T=v),
        lambda v: CosineVP(s=v),
        lambda v: DiscreteVP([0.9, 0.5], t_min=v),
        lambda v: Langevin(lambda x: -x, g=v),
        lambda v: Langevin(lambda x: -x, T=v),
        lambda v: CriticallyDampedLangevin(mass=v),
        lambda v: linear_betas(10, last=v),
    ],
)
def test_parameters_out_of_range_are_refused(build: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(ArgumentError):
        build(wrong)


@pytest.mark.parametrize("sde", [VP(), EDM(), CriticallyDampedLangevin()], ids=str)
@pytest.mark.parametrize("axes", [1, 2])
def test_a_column_of_times_is_a_time_per_row(sde: Any, axes: int) -> None:
    x, t = torch.arange(12.0, dtype=F64).reshape(3, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    column = t.reshape(-1, *(1,) * axes)

    def score(y: Tensor, t: Any) -> Tensor:
        return -y

    def reverse_drift(y: Tensor, t: Any) -> Any:
        return sde.reverse_drift(y, t, score)

    def mean(y: Tensor, t: Any) -> Any:
        return sde.marginal(y, t)[0]

    for ask in (sde.drift, reverse_drift, mean):
        torch.testing.assert_close(ask(x, column), ask(x, t), rtol=0, atol=0)
        for wrong in (t[:2], torch.ones(3, 2, dtype=F64)):
            with pytest.raises(ShapeError, match="one for each sample"):
                ask(x, wrong)


def test_host_numbers_do_not_hang_on_torch_s_defaults() -> None:
    def all_of_it() -> list[Any]:
        grids = [make_grid(n, VP(), 4).times for n in ("karras", "beta", "scaled")]
        chain = DiscreteVP.from_betas(linear_betas(20))
        phi = CriticallyDampedLangevin().transition(0.1, 0.5)[0]
        plan = trace(get_solver("dpmpp_3m"), chain, (20.0, 5.0, 1.0))  # type: ignore[arg-type]
        return [grids, plan, phi.tolist(), float(VP().sigma(0.5)), plan.law(1.0, 0.5).wasserstein]

    expected = all_of_it()
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float16)
        assert all_of_it() == expected
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 3, dtype=torch.bool), "bool"),
        (torch.ones(2, 3, dtype=torch.long), "int64"),
        (torch.ones(2, 3).to_sparse(), "sparse"),
        (torch.ones(2, 3, device="meta"), "meta"),
        (torch.ones(2, 6), "keep the first half, as lambda x, t: net"),
    ],
)
def test_an_answer_that_is_no_prediction_is_refused(output: Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        check_output(output, torch.ones(2, 3))


def test_an_unknown_solver_is_not_answered_with_all_names() -> None:
    with pytest.raises(UnknownNameError) as found:
        get_solver("qqqqqqqq" * 1000)
    assert len(str(found.value)) < 250 and "scoresolve solvers" in str(found.value)


def test_verbs_compute_where_the_state_is_whatever_the_default_device() -> None:
    ring, sde = ss.targets.ring(), EDM()
    model = ss.from_eps(lambda x, t: ring.score_model(sde).predict("eps", x, t), sde)
    data, start = ring.sample(16), 80.0 * ring.sample(16, seed=1)
    names = (
        "dopri5",
        "adams",
        "dpm_solver_12",
        "adaptive_sde",
        "torchdiffeq_rk4",
        "torchsde_euler",
    )

    def run() -> list[Tensor]:
        found = [ss.sample(model, sde, x=start[:4], solver=name, t_end=40.0).x for name in names]
        found.append(ss.log_likelihood(model, sde, data[:4]).log_prob)
        found.append(ss.differentiable_log_likelihood(model, sde, data[:4], steps=2))
        seen = repr(ss.check_model(model, sde, data, levels=2))
        seen += repr(ss.verify_model(model, sde, data, levels=2, quantities=("denoising",)))
        seen += repr(ss.compare_samples(data, start[:12]))
        seen += repr(ss.certify("ddim", sde, refinements=(8, 16), budgets=(4,)).errors)
        return [*found, torch.tensor([hash(seen)], device="cpu")]

    expected = run()
    with torch.device("meta"):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_marks_of_conditions_reach_no_network() -> None:
    sde, x = EDM(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    table, own = torch.linspace(-1, 1, 4), torch.tensor([3, 1, 0, 2])

    def net(x: Tensor, t: Tensor, table: Tensor, own: dict[str, Tensor]) -> Tensor:
        return -(x - table[own["i"]][:, None]) / (1 + t[:, None] ** 2)

    def run(**cond: Any) -> list[Tensor]:
        return [
            ss.differentiable_sample(net, sde, x, steps=2, **cond),
            ss.differentiable_log_likelihood(net, sde, x, steps=2, **cond),
            ss.continuous_bound(net, sde, x, draws=2, **cond).diffusion,
            ss.ito_bound(net, sde, x, steps=2, draws=2, **cond).paths,
        ]

    plain = run(table=table, own={"i": own})
    marked = run(table=ss.shared(table), own=ss.per_sample({"i": own}))
    assert all(torch.equal(a, b) for a, b in zip(plain, marked, strict=True))
    assert ss.check_model(net, sde, x, table=ss.shared(table), own=ss.per_sample({"i": own}))
    scale = ss.measure_scale(
        ss.from_x0(lambda x, t, c: x / (1 + t[:, None] ** 2) + 0 * c, sde),
        sde,
        (2,),
        c=ss.shared(1.0),
    )
    assert math.isclose(
        scale, ss.measure_scale(ss.from_x0(lambda x, t: x / (1 + t[:, None] ** 2), sde), sde, (2,))
    )


@pytest.mark.parametrize("event", [3, "3", None, (2.5,), torch.tensor([1.5, 2.0])])
def test_a_shape_of_no_sizes_is_refused_where_the_scale_is_measured(event: Any) -> None:
    with pytest.raises(ShapeError, match="event"):
        ss.measure_scale(lambda x, t: -x, VP(), event)


def test_counts_and_fractions_that_are_none_are_refused() -> None:
    x = torch.arange(32.0).reshape(16, 2).sin()
    for fractions in ("3", None):
        with pytest.raises(ArgumentError, match="fractions"):
            ss.slerp(x, x, fractions)  # type: ignore[arg-type]
    for verb in (ss.check_model, ss.verify_model):
        with pytest.raises(ArgumentError, match="levels"):
            verb(lambda x, t: -x, VP(), x, levels=10**30)


@pytest.mark.parametrize("through", ["data", "numpy", "late"])
def test_a_network_that_writes_unseen_changes_no_sample(through: str) -> None:
    sde, x, calls = EDM(), 80.0 * torch.ones(3, 2), 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        result = -x / (1 + t[:, None] ** 2)
        if through == "data":
            x.data.zero_()
        elif through == "numpy":
            x.numpy()[...] = 0
        elif calls == 3:
            t[0].zero_()
        return result

    def run(net: Any) -> Tensor:
        return ss.sample(net, sde, x=x, solver="torchsde_euler").x

    if through == "late":
        with pytest.raises(ArgumentError, match="wrote into its input"):
            run(net)
    else:
        with pytest.warns(ss.errors.ModelWarning, match="in place"):
            found = run(net)
        assert torch.equal(found, run(lambda x, t: -x / (1 + t[:, None] ** 2)))


def test_conditions_that_noise_hides_at_the_start_are_not_guessed() -> None:
    """At sigma = 80 the score tells means apart by 1e-4 of a unit, at sigma = 1 by their size."""
    table = torch.linspace(-1, 1, 6)

    def net(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return (table.square().mean() - x) / (1 + t[:, None] ** 2)

    for solver, chunk in (("ddim", 4), ("dopri5", None)):
        with pytest.raises(ArgumentError, match="table"):
            ss.sample(net, EDM(), shape=(6, 2), solver=solver, chunk=chunk, table=table)


@pytest.mark.parametrize(
    "given", [{"nfe": "10"}, {"nfe": [1]}, {"callback": 3}, {"t_end": torch.ones(2)}]
)
def test_arguments_of_the_wrong_kind_get_a_sentence(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="give"):
        ss.sample(lambda x, t: -x, VP(), shape=(2, 2), solver="ddim", **given)
    if "t_end" in given:
        with pytest.raises(ArgumentError, match="give"):
            ss.encode(lambda x, t: -x, VP(), torch.ones(2, 2), **given)


BAD: tuple[Any, ...] = ("3", b"x", 3.5, -1, math.nan, object(), [1.5], {"a": 1}, torch.ones(2))
POINTS = torch.linspace(-1, 1, 128).reshape(64, 2)


def plain(x: Tensor, t: Tensor) -> Tensor:
    return -x


VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "sample": (
        lambda **given: ss.sample(plain, **given),
        {"sde": VP(), "shape": (2, 2), "solver": "ddim", "steps": 2},
        "sde shape solver steps denoise gradients compile progress raise_on_failure chunk seed "
        "dtype device",
    ),
    "encode": (
        lambda **given: ss.encode(plain, **given),
        {"sde": VP(), "x": POINTS, "solver": "ddim", "steps": 2},
        "sde x solver steps progress raise_on_failure chunk",
    ),
    "log_likelihood": (
        lambda **given: ss.log_likelihood(plain, **given),
        {"sde": VP(), "x": POINTS[:2], "cost": 64},
        "sde x solver cost trace mode progress raise_on_failure chunk seed",
    ),
    "sample_with_log_prob": (
        lambda **given: ss.sample_with_log_prob(plain, **given),
        {"sde": VP(), "shape": (2, 2), "cost": 64},
        "sde shape solver cost trace mode progress raise_on_failure chunk seed dtype device",
    ),
    "fit_grid": (
        lambda **given: ss.fit_grid(plain, **given),
        {"sde": VP(), "shape": (12, 2), "solver": "ddim", "steps": 1},
        "sde shape solver steps chunk seed dtype device",
    ),
    "verify_model": (
        lambda **given: ss.verify_model(plain, **given),
        {"sde": VP(), "data": POINTS, "levels": [1.0], "quantities": ("denoising",)},
        "sde data quantities chunk seed",
    ),
    "run_chains": (
        lambda **given: ss.run_chains(ss.targets.ring().score, x=POINTS, **given),
        {"kernel": "mala", "steps": 2},
        "keep steps kernel",
    ),
    "measure_scale": (
        lambda **given: ss.measure_scale(plain, **given),
        {"sde": VP(), "event": (2,)},
        "sde pairs seed dtype device",
    ),
    "variational_bound": (
        lambda **given: ss.variational_bound(plain, **given),
        {"sde": VP(), "x": POINTS[:2]},
        "sde x stratified draws seed",
    ),
    "from_discrete": (
        lambda **given: ss.from_discrete(**given),
        {"net": plain, "alphas_cumprod": [0.9, 0.5]},
        "net quantize time_dtype prediction",
    ),
    "make_grid": (
        lambda **given: ss.make_grid(**given),
        {"name": "cosine", "sde": VP(), "steps": 2},
        "name sde steps denoise",
    ),
}


@pytest.mark.parametrize(
    ("verb", "argument"), [(verb, name) for verb in VERBS for name in VERBS[verb][2].split()]
)
def test_a_value_of_the_wrong_kind_is_refused_with_a_sentence(verb: str, argument: str) -> None:
    run, right, _ = VERBS[verb]
    for value in BAD:
        if isinstance(value, Tensor) and argument in ("x", "shape"):
            continue  # of two numbers, which are two samples, or two sizes
        with pytest.raises(ScoresolveError, match=r"\w+ \w+"):
            run(**(right | {argument: value}))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_that_hide_values_are_refused(transform: Callable[..., Any]) -> None:
    def inside(run: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(ArgumentError, match="inside a transform of"):
            transform(lambda x: run(x).sum())(POINTS[None] if transform is vmap else POINTS)

    vmap, sde = torch.func.vmap, VP()
    for solver in ("dopri5", "adams"):
        inside(lambda x, solver=solver: ss.sample(plain, sde, x=x, solver=solver).x)  # type: ignore[misc]
    inside(lambda x: ss.sample(plain, sde, x=x, solver="ddim", nfe=4, chunk=1).x)
    inside(lambda x: ss.sample(lambda y, t: -y * x.mean(), sde, shape=(4, 2), solver="ddim").x)
    inside(lambda x: ss.encode(plain, sde, x).x)
    inside(lambda x: ss.log_likelihood(plain, sde, x).log_prob)
    inside(lambda x: ss.sample_with_log_prob(plain, sde, x=x).log_prob)
    inside(lambda x: ss.fit_grid(plain, sde, x=x, solver="ddim").grid)  # type: ignore[return-value, arg-type]
    inside(lambda x: ss.verify_model(plain, sde, x).findings)  # type: ignore[return-value, arg-type]
    inside(lambda x: ss.check_model(plain, sde, x))  # type: ignore[return-value, arg-type]
    if transform is not vmap:
        inside(lambda x: ss.sample(plain, sde, x=x, solver="ddim", nfe=4).x)


def test_a_plan_runs_inside_a_transform() -> None:
    plan, sde = ss.plan("ddim", VP(), TIMES), VP()
    model = ss.models.as_model(plain, sde)
    gradient = torch.func.grad(lambda x: plan.run(model, x, in_place=False).sum())(POINTS)
    torch.testing.assert_close(gradient, plan.run(model, torch.ones_like(POINTS)))


@pytest.mark.parametrize("solver", ["auto", "ddpm", "dopri5", "dpmpp_2m"])
def test_plain_callables_may_return_objects_that_hold_a_sample(solver: str) -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    def held(x: Tensor, t: Tensor) -> Any:
        return Output(-x)

    given, bare = (ss.sample(f, VP(), shape=(3, 2), solver=solver).x for f in (held, plain))
    assert torch.equal(given, bare)


def test_names_that_others_have_for_arguments_are_told() -> None:
    def greedy(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return -x

    for name, own in {"t_stop": "t_end", "num_inference_steps": "steps", "stepz": "steps"}.items():
        with pytest.warns(ss.errors.ModelWarning, match=f"did you mean {own}= for {name}="):
            ss.sample(greedy, VP(), shape=(2, 2), solver="ddim", nfe=4, **{name: 0.1})  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=f"did you mean {own}="):
            ss.sample(plain, VP(), shape=(2, 2), solver="ddim", nfe=4, **{name: 0.1})  # type: ignore[arg-type]


def test_names_that_no_verb_has_are_told_by_every_verb_that_hands_them_on() -> None:
    def net(x: Tensor, t: Tensor, **kwargs: object) -> Tensor:
        return -x

    sde, x = ss.VP(), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[str, Callable[[], object]]] = [
        ("steps= for step", lambda: ss.differentiable_sample(net, sde, x, solver="ddim", step=5)),
        ("pairs= for pair", lambda: ss.measure_scale(net, sde, (2,), pair=5)),
        ("warmup= for burn_in", lambda: ss.run_chains(net, x=x, steps=2, t=0.1, burn_in=5)),
        ("solver= for sampler", lambda: ss.sample(net, sde, x=x, nfe=5, sampler="ddim")),
        ("levels= for level", lambda: ss.check_model(net, sde, x, level=5)),
    ]
    for hint, call in calls:
        with pytest.warns(ModelWarning, match=f"did you mean {hint}"):
            call()
    with pytest.raises(ArgumentError, match="encode has no seed="):
        ss.encode(net, sde, x, seed=3)


def opposite(x: Tensor, t: Tensor) -> Tensor:
    return -x


def test_noise_that_cannot_serve_is_refused() -> None:
    sde, x = EDM(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    class BrownianInterval:
        __module__ = "torchsde._brownian"

        def __call__(self, s: float, t: float) -> Tensor:
            return x

    def of_steps_alone(y: Tensor, t: float, s: float) -> Tensor:
        if not abs(t - s) > 0:
            raise ZeroDivisionError
        return torch.zeros_like(y) if t > 1 else y[0]

    def run(noise: Any, **options: Any) -> object:
        return ss.sample(opposite, sde, solver="ddpm", steps=3, noise=noise, **options)

    with pytest.raises(ArgumentError, match="increments over times"):
        run(BrownianInterval(), x=x)
    with pytest.raises(ArgumentError, match="those of the start: TypeError"):
        run(of_steps_alone, shape=(4, 2))
    with pytest.raises(ZeroDivisionError) as error:
        run(lambda y, t, s: 1 / 0, x=x)
    assert "for the step from t = 80" in error.value.__notes__[0]
    with pytest.raises(ArgumentError, match=r"start x=$"):
        ss.sample(opposite, sde)


def test_rows_that_are_not_those_of_the_batch_are_told_of() -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match="with c= of 5 rows for a batch of 4"):
        ss.sample(lambda x, t, c: -x + c["of"], EDM(), x=x, c={"of": torch.zeros(5, 2)})


@pytest.mark.parametrize("verb", [ss.differentiable_sample, ss.differentiable_log_likelihood])
def test_gradients_by_hand_are_not_taken_inside_a_transform(verb: Callable[..., Tensor]) -> None:
    with pytest.raises(ArgumentError, match="inside a transform"):
        torch.func.jacrev(lambda y: verb(opposite, EDM(), y, steps=2))(torch.zeros(2, 2))
