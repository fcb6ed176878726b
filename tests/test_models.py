"""What a network predicts, read as anything else: every identity from its definition.

With x = alpha x0 + sigma eps:  v = alpha eps - sigma x0,  flow = alpha' x0 + sigma' eps,
score = -eps / sigma. Two different predictions and x fix everything, unless the source says
nothing new: its row (p, q) of p x0 + q eps is parallel to (alpha, sigma), or, for the score as a
target, sigma = 0. Exact denoisers of mixtures carry the identities from samples to expectations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    PROCESSES,
    BenesSDE,
    DiagonalMixture,
    event_shapes,
    fractions,
    generator,
    mixtures,
    normal,
    processes,
    seeds,
    times,
)
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.models import (
    PREDICTIONS,
    EnergyModel,
    Model,
    NetworkModel,
    as_model,
    conversion,
    from_denoiser,
    from_discrete,
    from_energy,
    from_eps,
    from_flow,
    from_v,
    from_x0,
)
from scoresolve.sde import (
    EDM,
    VP,
    CosineVP,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    SchedulePoint,
    SubVP,
    linear_betas,
)

ROWS = 3
every_kind = pytest.mark.parametrize("kind", PROCESSES)
PAIRS = [(source, target) for source in PREDICTIONS for target in PREDICTIONS]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def floats(at: SchedulePoint) -> SchedulePoint:
    return SchedulePoint(*(float(value) for value in at))


def definitions(at: SchedulePoint, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """Every prediction, from clean data and noise."""
    alpha, sigma, alpha_dot, sigma_dot = (
        torch.as_tensor(value, dtype=x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1)) for value in at
    )
    return {
        "x": alpha * x0 + sigma * eps,
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "flow": alpha_dot * x0 + sigma_dot * eps,
        "score": -eps / sigma,
    }


def shared_log_snr(first: GaussianSDE, second: GaussianSDE) -> tuple[float, float]:
    """Range of log-SNR that both processes go through; high < low where there is none."""
    ends = [[float(sde.log_snr(u * sde.T)) for u in (0.98, 0.02)] for sde in (first, second)]
    return max(low for low, _ in ends), min(high for _, high in ends)


def fixed(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, t, **cond: value


# --- conversions ---------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("source", PREDICTIONS)
@settings(max_examples=8)
@given(data=st.data(), event=event_shapes(), seed=seeds())
def test_every_prediction_is_read_as_every_other(
    kind: str, source: str, data: st.DataObject, event: tuple[int, ...], seed: int
) -> None:
    sde, rng = data.draw(PROCESSES[kind]), generator(seed)
    t = data.draw(times(sde, ROWS))
    at = sde.point(t)
    known = definitions(at, normal(rng, ROWS, *event), normal(rng, ROWS, *event))
    model = NetworkModel(fixed(known[source]), sde, source)
    for target in PREDICTIONS:
        u, w = conversion(source, target, at)
        terms = zip((u, w), ("x", source), strict=True)
        size = max(float(torch.as_tensor(c).abs().max() * known[m].abs().max()) for c, m in terms)
        close(model.predict(target, known["x"], t), known[target], rtol=1e-11, atol=1e-13 * size)


@every_kind
@given(data=st.data(), u=fractions())
def test_there_and_back_is_the_identity(kind: str, data: st.DataObject, u: float) -> None:
    sde = data.draw(PROCESSES[kind])
    at = sde.point(u * sde.T)
    for source, target in PAIRS:
        there, back = conversion(source, target, at), conversion(target, source, at)
        # m = u' x + w' (u x + w m)
        kept, left = back[1] * there[1], back[0] + back[1] * there[0]
        assert float(kept) == pytest.approx(1, rel=1e-10), (source, target)
        assert float(left) == pytest.approx(0, abs=1e-10 * (1 + abs(float(back[0])))), (
            source,
            target,
        )


@every_kind
@given(data=st.data(), u=fractions())
def test_numbers_convert_as_tensors_do(kind: str, data: st.DataObject, u: float) -> None:
    at = data.draw(PROCESSES[kind].map(lambda sde: sde.point(u * sde.T)))
    for source, target in PAIRS:
        as_numbers = conversion(source, target, floats(at))
        assert all(isinstance(value, float) for value in as_numbers)
        as_tensors = [float(value) for value in conversion(source, target, at)]
        assert as_numbers == pytest.approx(tuple(as_tensors), rel=1e-14)


def out_of_reach(source: str, target: str, at: SchedulePoint) -> bool:
    """Whether `target` truly cannot be had from x and `source` at this point."""
    if source == target or (source, target) == ("score", "eps"):
        return False
    if target == "score" and at.sigma == 0:
        return True
    if (source, target) == ("eps", "score"):
        return False
    parallel = {
        "x0": at.sigma == 0,
        "eps": at.alpha == 0,
        "score": at.alpha == 0,
        "v": False,
        "flow": at.alpha * at.sigma_dot == at.sigma * at.alpha_dot,
    }
    return bool(parallel[source])


ENDS = {
    "RectifiedFlow at noise": SchedulePoint(0.0, 1.0, -1.0, 1.0),
    "RectifiedFlow at data": SchedulePoint(1.0, 0.0, -1.0, 1.0),
    "EDM at data": SchedulePoint(1.0, 0.0, 0.0, 1.0),
    "SubVP at data": SchedulePoint(1.0, 0.0, -0.05, 0.1),
    "VP at noise": floats(VP().point(1.0)),
    "CosineVP at noise": floats(CosineVP().point(CosineVP().T)),
    "EDM at noise": SchedulePoint(1.0, 80.0, 0.0, 1.0),
}


@pytest.mark.parametrize("number", [float, lambda v: torch.tensor(v, dtype=torch.float64)])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_at_both_ends_only_what_is_out_of_reach_is_infinite(
    source: str, target: str, end: str, number: Callable[[float], float | Tensor]
) -> None:
    at = SchedulePoint(*(number(value) for value in ENDS[end]))
    u, w = (float(value) for value in conversion(source, target, at))
    if out_of_reach(source, target, ENDS[end]):
        assert not (math.isfinite(u) and math.isfinite(w))
        return
    x0, eps = normal(generator(0), 1, 5), normal(generator(1), 1, 5)
    score = normal(generator(2), 1, 5)
    if source == "score":
        eps = -ENDS[end].sigma * score
    known = definitions(ENDS[end], x0, eps)
    if source == "score":
        known["score"] = score
    close(u * known["x"] + w * known[source], known[target], rtol=1e-10, atol=1e-10)


def test_the_ends_hold_the_singular_pairs_one_expects() -> None:
    def singular(end: str) -> set[tuple[str, str]]:
        return {pair for pair in PAIRS if out_of_reach(*pair, ENDS[end])}

    blind = {(a, b) for a in ("eps", "score") for b in ("x0", "v", "flow")}
    assert singular("RectifiedFlow at noise") == blind
    no_score = {(a, "score") for a in PREDICTIONS if a != "score"}
    no_noise = {("x0", b) for b in ("eps", "v", "flow")}
    for end in ("RectifiedFlow at data", "EDM at data", "SubVP at data"):
        assert singular(end) == no_score | no_noise
    for end in ("VP at noise", "CosineVP at noise", "EDM at noise"):
        assert not singular(end)


@pytest.mark.parametrize(
    ("sde", "t", "at"),
    [
        (RectifiedFlow(), 1.0, ENDS["RectifiedFlow at noise"]),
        (RectifiedFlow(), 0.0, ENDS["RectifiedFlow at data"]),
        (EDM(), 0.0, ENDS["EDM at data"]),
        (EDM(), 80.0, ENDS["EDM at noise"]),
        (SubVP(0.1, 20.0), 0.0, ENDS["SubVP at data"]),
    ],
)
def test_the_ends_are_those_of_the_processes(sde: GaussianSDE, t: float, at: SchedulePoint) -> None:
    assert tuple(floats(sde.point(t))) == pytest.approx(tuple(at), rel=1e-14)


@pytest.mark.parametrize("sde", [VP(), CosineVP(), DiscreteVP.from_betas(linear_betas(10))])
def test_at_the_data_a_variance_preserving_flow_is_infinite(sde: GaussianSDE) -> None:
    at = sde.point(0.0)
    assert float(at.sigma_dot) == math.inf
    for source in ("eps", "x0", "v"):
        assert not all(math.isfinite(c) for c in map(float, conversion(source, "flow", at)))
    close(torch.as_tensor(conversion("eps", "x0", at)[0]).double(), torch.ones(()).double())


@given(seed=seeds(), part=st.floats(0, 1), here=processes(), there=processes())
def test_a_conversion_may_end_in_the_schedule_of_another_process(
    seed: int, part: float, here: GaussianSDE, there: GaussianSDE
) -> None:
    low, high = shared_log_snr(here, there)
    assume(low < high)
    log_snr = low + part * (high - low)
    at, other = (p.point(p.time_from_log_snr(log_snr)) for p in (here, there))
    x0, eps = normal(generator(seed), 1, 4), normal(generator(seed + 1), 1, 4)
    source, target = definitions(at, x0, eps), definitions(other, x0, eps)
    for a, b in PAIRS:
        u, w = (torch.as_tensor(c, dtype=torch.float64) for c in conversion(a, b, at, other))
        size = float((u * source["x"]).abs().max() + (w * source[a]).abs().max())
        close(u * source["x"] + w * source[a], target[b], rtol=1e-9, atol=1e-9 * size)


# --- exact models --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(max_examples=4)
@given(data=st.data(), mixture=mixtures(), seed=seeds())
def test_exact_predictions_give_the_exact_score(
    kind: str, prediction: str, data: st.DataObject, mixture: DiagonalMixture, seed: int
) -> None:
    sde = data.draw(PROCESSES[kind])
    t = data.draw(times(sde, ROWS, low=0.05))

    def net(x: Tensor, t: Tensor) -> Tensor:
        x0 = mixture.denoiser(sde, x, t)
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return definitions(sde.point(t), x0, (x - alpha * x0) / sigma)[prediction]

    x = mixture.sample(sde, t, generator(seed))
    model, score = NetworkModel(net, sde, prediction), mixture.score(sde, x, t)
    close(model(x, t), score, rtol=1e-7, atol=1e-7 * float(score.abs().max()))
    close(model.predict("x0", x, t), mixture.denoiser(sde, x, t), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(("home", "other"), list(itertools.permutations(PROCESSES, 2)))
@settings(max_examples=3)
@given(data=st.data(), mixture=mixtures(), seed=seeds())
def test_a_denoiser_on_another_process_is_its_exact_score(
    home: str, other: str, data: st.DataObject, mixture: DiagonalMixture, seed: int
) -> None:
    native, foreign = data.draw(PROCESSES[home]), data.draw(PROCESSES[other])
    low, high = shared_log_snr(native, foreign)
    assume(low < high)
    log_snr = low + data.draw(st.floats(0, 1)) * (high - low)
    t = foreign.time_from_log_snr(torch.full((ROWS,), log_snr, dtype=torch.float64))
    x = mixture.sample(foreign, t, generator(seed))
    moved = from_x0(lambda x, t: mixture.denoiser(native, x, t), native).on(foreign)
    exact = mixture.score(foreign, x, t)
    assert moved.sde == foreign
    close(moved(x, t), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    close(moved.predict("x0", x, t), mixture.denoiser(foreign, x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in PROCESSES if kind != "RectifiedFlow"])
@given(data=st.data())
def test_a_model_is_finite_on_another_process_where_alpha_vanishes(
    kind: str, data: st.DataObject
) -> None:
    native = data.draw(PROCESSES[kind])
    moved = from_x0(lambda x, t: torch.tanh(x), native).on(RectifiedFlow())
    x = normal(generator(0), ROWS, 2)
    for t in (1.0, torch.ones(ROWS, dtype=torch.float64)):
        for prediction in PREDICTIONS:
            assert bool(torch.isfinite(moved.predict(prediction, x, t)).all()), prediction


def test_a_model_at_home_stays_itself() -> None:
    model = from_eps(torch.sin, VP())
    assert model.on(VP()) is model
    assert as_model(model, VP()) is model


def test_only_gaussian_processes_are_matched() -> None:
    langevin = Langevin(torch.sin)
    with pytest.raises(ArgumentError, match="log-SNR"):
        as_model(torch.sin, langevin).on(VP())


@given(data=st.data(), mixture=mixtures())
def test_a_score_at_home_anywhere_is_read_as_x0_once_its_process_is_known(
    data: st.DataObject, mixture: DiagonalMixture
) -> None:
    sde = data.draw(processes())
    t = data.draw(times(sde, ROWS, low=0.05))
    x = mixture.sample(sde, t, generator(0))
    model = as_model(from_energy(lambda x, t: -mixture.log_prob(sde, x, t)), sde)
    close(model(x, t), mixture.score(sde, x, t), rtol=1e-8, atol=1e-8)
    close(model.predict("x0", x, t), mixture.denoiser(sde, x, t), rtol=1e-8, atol=1e-8)


# --- adapters ------------------------------------------------------------------------------------

ADAPTERS: dict[str, Callable[..., Model]] = {
    "eps": lambda net: from_eps(net, VP()),
    "x0": lambda net: from_x0(net, VP()),
    "v": lambda net: from_v(net, VP()),
    "flow": lambda net: from_flow(net, RectifiedFlow()),
    "denoiser": from_denoiser,
    "discrete": lambda net: from_discrete(net, [0.9, 0.5, 0.1]),
    "callable": lambda net: as_model(net, VP()),
    "moved": lambda net: from_eps(net, VP()).on(RectifiedFlow()),
    "energy": lambda net: from_energy(lambda x, t, **cond: net(x, t, **cond).sum(1)),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_conditions_reach_the_network(adapter: str) -> None:
    seen: list[dict[str, object]] = []

    def net(x: Tensor, t: Tensor, **cond: object) -> Tensor:
        seen.append(cond)
        return x.sin()

    label, x = torch.arange(4), torch.zeros(4, 3)
    model = ADAPTERS[adapter](net)
    model(x, 0.5, label=label, scale=2.0)
    prediction, native = model.bind("score")
    native(x, 0.5, label=label)
    assert prediction in PREDICTIONS
    assert [set(cond) for cond in seen] == [{"label", "scale"}, {"label"}]
    first = seen[0]["label"]  # a copy, to see whether the network writes into it
    assert isinstance(first, Tensor) and torch.equal(first, label) and seen[0]["scale"] == 2.0
    assert seen[1]["label"] is label


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "energy"])
def test_an_output_that_would_broadcast_is_refused(adapter: str) -> None:
    model = ADAPTERS[adapter](lambda x, t: x[:, :1])
    with pytest.raises(ShapeError, match=r"\(4, 1\).*\(4, 3\)"):
        model(torch.zeros(4, 3), 0.5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_keeps_the_dtype_of_the_state(adapter: str, dtype: torch.dtype) -> None:
    x = normal(generator(0), 4, 3).to(dtype)
    for t in (0.5, torch.tensor(0.5), torch.full((4,), 0.5, dtype=torch.float64)):
        score = ADAPTERS[adapter](lambda x, t: x.sin())(x, t)
        assert score.shape == x.shape and score.dtype == dtype


class Affine(torch.nn.Module):
    """A network that works in the dtype of its parameters only."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_a_module_works_in_its_own_dtype_and_answers_in_that_of_the_state(
    adapter: str, dtype: torch.dtype, own: torch.dtype
) -> None:
    x = normal(generator(0), 4, 3).to(dtype)
    model = ADAPTERS[adapter](Affine(own))
    for t in (0.5, torch.full((4,), 0.5, dtype=torch.float64)):
        assert model(x, t).dtype == dtype
        assert model.bind("score")[1](x, t).dtype == dtype


@pytest.mark.parametrize(
    ("adapter", "prediction", "sde"),
    [
        ("eps", "eps", VP()),
        ("x0", "x0", VP()),
        ("v", "v", VP()),
        ("flow", "flow", RectifiedFlow()),
        ("denoiser", "x0", EDM()),
        ("discrete", "eps", DiscreteVP([0.9, 0.5, 0.1])),
        ("callable", "score", VP()),
    ],
)
def test_an_adapter_names_its_prediction_and_process(
    adapter: str, prediction: str, sde: GaussianSDE
) -> None:
    model, x = ADAPTERS[adapter](lambda x, t: x.sin()), normal(generator(0), 4, 3)
    assert model.sde == sde
    close(model.predict(prediction, x, 0.5), x.sin())
    source, native = model.bind("x0")
    assert source == prediction
    close(native(x, 0.5), x.sin())


def test_a_denoiser_lives_in_edm_or_in_its_own_range() -> None:
    assert from_denoiser(torch.sin).sde == EDM()
    assert from_denoiser(torch.sin, EDM(0.01, 14.6)).sde == EDM(0.01, 14.6)


def test_a_bare_callable_is_a_score() -> None:
    x = normal(generator(0), 4, 3)
    for sde in (VP(), BenesSDE()):
        model = as_model(lambda x, t: -2 * x, sde)
        close(model(x, 0.3), -2 * x)
        close(
            model.predict("flow", x, 0.3), sde.probability_flow_drift(x, 0.3, lambda x, t: -2 * x)
        )
    with pytest.raises(ArgumentError, match="callable"):
        as_model(torch.zeros(3), VP())  # type: ignore[arg-type]


@every_kind
@given(data=st.data(), event=event_shapes(), seed=seeds())
def test_the_flow_of_a_score_is_the_probability_flow(
    kind: str, data: st.DataObject, event: tuple[int, ...], seed: int
) -> None:
    sde, rng = data.draw(PROCESSES[kind]), generator(seed)
    x, s = normal(rng, ROWS, *event), normal(rng, ROWS, *event)
    t = data.draw(times(sde, ROWS))
    velocity = sde.probability_flow_drift(x, t, fixed(s))
    close(as_model(fixed(s), sde).predict("flow", x, t), velocity, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [from_eps, from_x0, from_v, from_flow])
@pytest.mark.parametrize("sde", [BenesSDE(), Langevin(torch.sin)])
def test_only_a_score_fits_a_process_that_is_not_gaussian(
    make: Callable[..., Model], sde: BenesSDE
) -> None:
    with pytest.raises(ArgumentError, match="Gaussian"):
        make(torch.sin, sde)
    for prediction in ("x0", "eps", "v"):
        with pytest.raises(ArgumentError, match="Gaussian"):
            as_model(lambda x, t: -x, sde).predict(prediction, torch.zeros(2, 1), 0.1)


def test_an_unknown_prediction_names_the_nearest() -> None:
    point = SchedulePoint(0.8, 0.6, -0.6, 0.8)
    calls: list[Callable[[], object]] = [
        lambda: NetworkModel(torch.sin, VP(), "epsilon"),
        lambda: from_discrete(torch.sin, [0.9, 0.5], prediction="epsilon"),
        lambda: conversion("epsilon", "x0", point),
        lambda: conversion("x0", "epsilon", point),
        lambda: from_eps(lambda x, t: x, VP()).predict("epsilon", torch.zeros(2, 1), 0.5),
        lambda: as_model(lambda x, t: x, BenesSDE()).predict("epsilon", torch.zeros(2, 1), 0.5),
    ]
    for call in calls:
        with pytest.raises(UnknownNameError, match="'epsilon': did you mean 'eps'"):
            call()
    with pytest.raises(UnknownNameError, match="known are 'score', 'eps', 'x0', 'v', 'flow'"):
        NetworkModel(torch.sin, VP(), "qqq")


# --- integer timesteps ---------------------------------------------------------------------------


def timesteps_of(times: float | Tensor, quantize: bool, steps: int = 10) -> Tensor:
    seen: list[Tensor] = []

    def net(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        return x

    bars = (1 - linear_betas(steps)).cumprod(0)
    from_discrete(net, bars, quantize=quantize)(torch.ones(4, 3), times)
    return seen[0]


def test_a_network_sees_one_less_than_the_time() -> None:
    t = torch.tensor([1.0, 2.0, 3.5, 10.0], dtype=torch.float64)
    close(timesteps_of(t, quantize=False), t - 1)
    integers = timesteps_of(t + 0.2, quantize=True)
    assert integers.dtype == torch.int64
    assert integers.tolist() == [0, 1, 3, 9]
    assert timesteps_of(torch.tensor([0.0, 0.3, 10.0, 9.8]), quantize=True).tolist() == [0, 0, 9, 9]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("t", [3.0, torch.tensor(3.0), torch.full((4,), 3.0)])
def test_a_network_sees_one_timestep_per_row(t: float | Tensor, quantize: bool) -> None:
    timestep = timesteps_of(t, quantize)
    assert timestep.shape == (4,)
    assert timestep.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_discrete_network_may_wrap_its_output(prediction: str) -> None:
    bars, x = [0.9, 0.5, 0.1], normal(generator(0), 4, 3)
    t = torch.tensor([1.0, 2.0, 2.5, 3.0], dtype=torch.float64)
    wrapped = from_discrete(lambda x, _: SimpleNamespace(sample=x.sin()), bars, prediction)
    plain = NetworkModel(lambda x, _: x.sin(), DiscreteVP(bars), prediction)
    assert wrapped.sde == DiscreteVP(bars)
    for target in PREDICTIONS:
        close(wrapped.predict(target, x, t), plain.predict(target, x, t))


def test_ddpm_noise_is_read_with_the_alpha_of_its_timestep() -> None:
    bars = (1 - linear_betas(1000)).cumprod(0)
    x, eps = normal(generator(0), 2, 3), normal(generator(1), 2, 3)
    model = from_discrete(fixed(eps), bars)
    for timestep in (0, 1, 500, 999):
        clean = (x - (1 - bars[timestep]).sqrt() * eps) / bars[timestep].sqrt()
        close(model.predict("x0", x, float(timestep + 1)), clean, rtol=1e-10, atol=1e-10)


# --- energies ------------------------------------------------------------------------------------


def double_well(x: Tensor, t: float | Tensor, height: float = 1.0) -> Tensor:
    return height * ((x**2 - 1) ** 2).flatten(1).sum(1)


@given(event=event_shapes().filter(bool), seed=seeds(), height=st.floats(0.1, 3))
def test_the_score_of_an_energy_is_minus_its_gradient(
    event: tuple[int, ...], seed: int, height: float
) -> None:
    model, x = from_energy(double_well), normal(generator(seed), ROWS, *event)
    expected = -height * 4 * x * (x**2 - 1)
    close(model(x, 0.5, height=height), expected, atol=1e-12)
    with torch.no_grad():
        score = model(x, 0.5, height=height)
    close(score, expected, atol=1e-12)
    assert not score.requires_grad and not x.requires_grad


def test_an_energy_score_can_be_differentiated_again() -> None:
    x = normal(generator(0), ROWS, 2).requires_grad_()
    (curvature,) = torch.autograd.grad(from_energy(double_well)(x, 0.5).sum(), x)
    close(curvature, (-12 * x**2 + 4).detach())


def test_an_energy_leaves_its_parameters_alone() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    model, x = from_energy(lambda x, t: weight * (x**2).sum(1)), normal(generator(0), 4, 3)
    score = model(x, 0.5)
    assert weight.grad is None and x.grad is None
    score.sum().backward()
    close(weight.grad, -2 * x.sum())


@pytest.mark.parametrize("energy", [lambda x, t: x**2, lambda x, t: (x**2).sum()])
def test_an_energy_is_one_number_per_sample(energy: Callable[..., Tensor]) -> None:
    assert isinstance(from_energy(energy), EnergyModel)
    with pytest.raises(ShapeError, match=r"\[B\]"):
        from_energy(energy)(torch.zeros(4, 3), 0.5)
