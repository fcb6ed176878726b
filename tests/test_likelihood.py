"""Likelihoods against densities in closed form.

Whatever the prior and the time of the data, the flow itself must satisfy

    log_prob - log prior(x_T) = log p_t0(x_0) - log p_T(x_T),

with the exact marginals of a mixture on the right: this leaves the error of solver and trace alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import OwnVP, dtypes, event_shapes, generator, normal
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from scoresolve.errors import (
    ArgumentError,
    GridError,
    ScoresolveError,
    ShapeError,
    SolveError,
    Status,
)
from scoresolve.likelihood import Likelihood, log_likelihood, verbs
from scoresolve.models import from_denoiser, from_energy, from_eps, from_flow
from scoresolve.noise import Philox, Purpose
from scoresolve.plans import Linear, Run
from scoresolve.sde import (
    EDM,
    SDE,
    VE,
    VP,
    CosineVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    SubVP,
    TimeLike,
)
from scoresolve.solvers import REGISTRY, DormandPrince, Solver
from scoresolve.targets import GaussianMixture, gaussian, random_mixture, ring

PROCESSES = [VP(), SubVP(), CosineVP(), VE(), EDM(), RectifiedFlow()]
FLOW_SOLVERS = [
    name for name, make in REGISTRY.items() if getattr(make(), "predicts", "") == "flow"
]
TIGHT = DormandPrince(rtol=1e-7, atol=1e-7)


def named(sde: GaussianSDE) -> str:
    return type(sde).__name__


def exact_log_prob(
    mix: GaussianMixture, sde: GaussianSDE, x: Tensor, found: Likelihood, t0: float
) -> Tensor:
    """What `found.log_prob` must be, given where its flow has taken the data."""
    prior = sde.prior(tuple(found.latent.shape), dtype=x.dtype).log_prob(found.latent)
    end = mix.marginal(sde, sde.T).log_prob(found.latent)
    return mix.marginal(sde, t0).log_prob(x) - end + prior


@functools.cache
def plane(sde: GaussianSDE) -> tuple[GaussianMixture, Tensor, Likelihood]:
    """A mixture in the plane, samples [24, 2] of it and their likelihood to 1e-6."""
    mix = random_mixture(2, 3, spread=1.0)
    x = mix.sample(24)
    return mix, x, log_likelihood(mix.score_model(sde), sde, x, solver=TIGHT)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


# Accuracy


@pytest.mark.parametrize("sde", PROCESSES, ids=named)
def test_log_prob_is_the_closed_form_for_every_process(sde: GaussianSDE) -> None:
    mix, x, found = plane(sde)
    assert bool(found.ok.all()) and bool((found.standard_error == 0).all())
    t0 = min(sde.t_min, 1e-5) if sde.T <= 1 and not isinstance(sde, VE) else sde.t_min
    expected = exact_log_prob(mix, sde, x, found, t0)
    assert float((found.log_prob - expected).abs().max()) < 2e-6
    # What is left is the data's time, and a prior that knows neither mean nor variance.
    assert rms(found.log_prob - mix.marginal(sde, 0.0).log_prob(x)) < 0.03


def test_the_adaptive_solver_meets_its_accuracy_at_its_cost() -> None:
    mix, sde = ring(), VP()
    x = mix.sample(256, seed=1)
    found = log_likelihood(mix.score_model(sde), sde, x, solver="dopri5")
    assert rms(found.log_prob - mix.log_prob(x)) < 1e-3
    assert found.cost.mean() <= 350


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_every_flow_form_solver_converges_to_the_adaptive_answer(solver: str) -> None:
    sde, order = VP(), REGISTRY[solver]().order
    mix, x, exact = plane(sde)
    errors = [
        rms(
            log_likelihood(mix.score_model(sde), sde, x, solver=solver, steps=n).log_prob
            - exact.log_prob
        )
        for n in (24, 72)  # the adaptive answer itself is off by about 3e-7
    ]
    assert order is not None
    assert errors[1] < 0.1
    assert errors[0] / errors[1] > 3 ** (0.6 * order)


@pytest.mark.parametrize("sde", PROCESSES, ids=named)
def test_default_grid_suits_every_process(sde: GaussianSDE) -> None:
    mix, x, exact = plane(sde)
    found = log_likelihood(mix.score_model(sde), sde, x, solver="ab3_flow")
    assert found.nfe == 100
    assert rms(found.log_prob - exact.log_prob) < 0.008


@settings(max_examples=12)
@given(event=event_shapes(), dtype=dtypes(), rows=st.integers(1, 3))
def test_every_event_shape_and_dtype(event: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
    sde, rng = VP(), generator(1)
    mean, variance = normal(rng, 1, *event)[0], normal(rng, 1, *event)[0].exp()
    mix = gaussian(mean, variance)
    x = (mean + variance.sqrt() * normal(rng, rows, *event)).to(dtype)
    for solver, budget in (("dopri5", None), ("ab3_flow", 40)):
        found = log_likelihood(mix.score_model(sde), sde, x, solver=solver, nfe=budget)
        assert found.log_prob.shape == found.standard_error.shape == (rows,)
        assert found.bits_per_dim.shape == found.status.shape == found.forwards.shape == (rows,)
        assert found.latent.shape == x.shape and found.latent.dtype == dtype
        assert found.log_prob.dtype == dtype and found.dimension == math.prod(event)
        torch.testing.assert_close(
            found.log_prob.double(), mix.log_prob(x.double()), rtol=0.02, atol=0.1
        )


def test_an_end_before_T_takes_the_prior_of_that_noise_level() -> None:
    sde = EDM()
    mix, x, _ = plane(sde)
    early = log_likelihood(mix.score_model(sde), sde, x, t_end=40.0)
    assert rms(early.log_prob - mix.log_prob(x)) < 0.05


@pytest.mark.parametrize("solver", [TIGHT, "ab3_flow"], ids=["adaptive", "fixed"])
def test_models_of_every_kind_have_the_same_likelihood(solver: Any) -> None:
    sde = VP()
    mix, x, found = plane(sde)
    wide = EDM(sigma_max=200.0)
    exact, edm, expected = mix.score_model(sde), mix.score_model(wide), found.log_prob
    models: dict[str, Callable[..., Tensor]] = {
        "score": lambda y, t: exact(y, t),
        "flow": from_flow(lambda y, t: exact.predict("flow", y, t), sde),
        "energy": from_energy(lambda y, t: -exact.log_prob(y, t)),
        "denoiser": from_denoiser(lambda y, t: edm.predict("x0", y, t), wide),
    }
    for model in models.values():
        other = log_likelihood(model, sde, x, solver=solver).log_prob
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5 if solver is TIGHT else 0.05)


# Random traces


@pytest.mark.parametrize(
    "options",
    [{"solver": "dopri5"}, {"solver": "ab3_flow", "nfe": 40}, {"solver": "rk4_flow", "nfe": 40}],
    ids=["adaptive", "multistep", "runge_kutta"],
)
def test_standard_error_is_calibrated(options: dict[str, Any]) -> None:
    mix, sde, rows, count = random_mixture(8, 4, spread=1.0), VP(), 256, 16
    x, model = mix.sample(rows), mix.score_model(sde)
    exact = log_likelihood(model, sde, x, trace="exact", **options)
    found = log_likelihood(model, sde, x, trace="hutchinson", probes=count, seed=3, **options)
    z = (found.log_prob - exact.log_prob) / found.standard_error
    # z is Student's t with n = count - 1 degrees of freedom: E z^2 = n / (n - 2), and
    # P(|z| > 4) is below 2e-3.
    n = count - 1
    spread = math.sqrt(2 * n**2 * (n - 1) / ((n - 2) ** 2 * (n - 4)) / rows)
    assert abs(float(z.square().mean()) - n / (n - 2)) < 4 * spread
    assert abs(float(z.mean())) < 4 * math.sqrt(n / (n - 2) / rows)
    assert int((z.abs() > 4).sum()) <= 4
    assert bool((found.products == count * found.forwards).all())


@functools.cache
def of_few_steps(sde: GaussianSDE, size: int, **trace: Any) -> Any:
    """The likelihood of 200 samples of a mixture in so many dimensions, by four steps."""
    mix = random_mixture(size, 4, spread=1.0, seed=3)
    model, x = mix.score_model(sde), mix.sample(200)
    return log_likelihood(model, sde, x, solver="rk4_flow", steps=4, **trace)


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=named)
@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [16, 24])
def test_few_probes_know_their_error(sde: GaussianSDE, count: int, size: int) -> None:
    rows, exact = 200, of_few_steps(sde, size, trace="exact")
    found = of_few_steps(sde, size, trace="hutchinson", probes=count)
    z = ((found.log_prob - exact.log_prob) / found.standard_error).abs()
    # 68.3 % and 95.4 % of normal errors, give or take 3 binomial deviations, and 0.04 as with two
    # probes of 16 elements there are about 10 degrees of freedom: Student's t has 93 % in two.
    for width in (1, 2):
        share = math.erf(width / math.sqrt(2))
        bound = 3 * math.sqrt(share * (1 - share) / rows) + 0.04
        assert abs(float((z < width).double().mean()) - share) < bound


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=named)
def test_probes_alike_but_for_a_sign_cannot_tell_their_error(sde: GaussianSDE) -> None:
    mix, rows = random_mixture(2, 4, spread=1.0), 400
    options: dict[str, Any] = {"solver": "euler_flow", "steps": 2, "trace": "hutchinson"}
    for count, chance in ((2, 1 / 2), (3, 1 / 4)):
        found = log_likelihood(mix.score_model(sde), sde, mix.sample(rows), probes=count, **options)
        untold = float(found.standard_error.isnan().double().mean())
        assert abs(untold - chance) < 4 * math.sqrt(chance * (1 - chance) / rows)
        assert bool(found.ok.all())
    one = random_mixture(1, 2)  # of one dimension z J z is J itself
    found = log_likelihood(one.score_model(sde), sde, one.sample(5), probes=2, **options)
    assert bool((found.standard_error == 0).all())


def test_turned_probes_beat_fixed_ones() -> None:
    mix, sde = random_mixture(64, 5, spread=1.0), VP()
    x, model = mix.sample(16), mix.score_model(sde)
    random: dict[str, Any] = {"trace": "hutchinson", "probes": 4}
    fixed = log_likelihood(model, sde, x, solver="dopri5", **random)
    turned = log_likelihood(model, sde, x, solver="ab3_flow", nfe=80, **random)
    assert float(turned.standard_error.mean()) < float(fixed.standard_error.mean()) / 3
    truth = mix.log_prob(x)
    assert rms(turned.log_prob - truth) < rms(fixed.log_prob - truth) / 3


def test_trace_is_exact_up_to_64_elements() -> None:
    sde = VP()
    for size, per_call in ((64, 64), (65, 8)):
        mix = random_mixture(size, 1)
        model, x = mix.score_model(sde), mix.sample(1)
        found = log_likelihood(model, sde, x, solver="euler_flow", steps=2)
        assert found.products.tolist() == [2 * per_call]
        assert bool((found.standard_error > 0).all()) == (size > 64)


def test_one_probe_cannot_tell_its_error() -> None:
    mix, sde = random_mixture(4, 2), VP()
    options: dict[str, Any] = {"solver": "dopri5", "trace": "hutchinson", "probes": 1}
    found = log_likelihood(mix.score_model(sde), sde, mix.sample(3), **options)
    assert bool(found.log_prob.isfinite().all()) and bool(found.standard_error.isnan().all())


@pytest.mark.parametrize("solver", ["auto", "dopri5", "ab3_flow"])
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    mix, sde = random_mixture(6, 3, spread=1.0), VP()
    x, model = mix.sample(11), mix.score_model(sde)
    options: dict[str, Any] = {"solver": solver, "trace": "hutchinson", "dequantise": 0.1}
    options["nfe"] = 30 if solver == "ab3_flow" else None
    whole = log_likelihood(model, sde, x, seed=5, **options)
    chunked = log_likelihood(model, sde, x, seed=5, chunk=4, **options)
    part = log_likelihood(model, sde, x[3:8], noise=Philox(5, first_sample=3), **options)
    for found, rows in ((chunked, slice(None)), (part, slice(3, 8))):
        for name in ("log_prob", "standard_error", "latent", "forwards", "status"):
            expected = getattr(whole, name)[rows]
            torch.testing.assert_close(getattr(found, name), expected, rtol=1e-8, atol=1e-8)
    assert not torch.equal(whole.log_prob, log_likelihood(model, sde, x, **options).log_prob)


class _Spy(Philox):
    """Philox that remembers which signs it gave to which sample."""

    seen: dict[tuple[int, int], Tensor]

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        signs = super().signs(like, draw, purpose)
        for row, values in enumerate(signs):
            type(self).seen.setdefault((self.first_sample + row, draw), values)
            assert torch.equal(type(self).seen[self.first_sample + row, draw], values)
        return signs

    def rows(self, index: slice | Tensor) -> Philox:
        assert isinstance(index, slice)
        return _Spy(self.seed, self.first_sample + (index.start or 0))


def test_probes_are_bitwise_the_same_for_any_chunks() -> None:
    _Spy.seen = {}
    mix, sde = random_mixture(6, 3), VP()
    for chunk in (None, 2, 3):
        log_likelihood(
            mix.score_model(sde),
            sde,
            mix.sample(7),
            solver="euler_flow",
            steps=2,
            trace="hutchinson",
            probes=3,
            noise=_Spy(9),
            chunk=chunk,
        )
    assert len(_Spy.seen) == 7 * 3


# Bits


def test_bits_per_dim_of_two_level_data_under_a_gaussian() -> None:
    mean, std, width, rows, sde = 0.3, 0.8, 0.5, 512, VP()
    model = gaussian(torch.full((4,), mean, dtype=torch.float64), std**2)
    levels = width * Philox(1).signs(torch.empty(rows, 4, dtype=torch.float64), 0).clamp(min=0)
    found = log_likelihood(model.score_model(sde), sde, levels, dequantise=width, seed=2)
    filled = levels + width * Philox(2).uniform(levels, 0, Purpose.DEQUANTISE)
    torch.testing.assert_close(found.log_prob, model.log_prob(filled), rtol=0, atol=0.02)
    # E (x + w u - m)^2 = (x - m + w/2)^2 + w^2/12 for u uniform on [0, 1].
    square = (levels - mean + width / 2) ** 2 + width**2 / 12
    nats = (square / (2 * std**2) + math.log(std) + math.log(2 * math.pi) / 2).mean(1)
    expected = nats / math.log(2) - math.log2(width)
    gap = found.bits_per_dim - expected
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(rows) + 1e-3


@pytest.mark.parametrize(("bin_width", "bits"), [(None, 0.0), (1 / 256, 8.0), (2.0, -1.0)])
def test_bits_per_dim_count_bins_not_units(bin_width: float | None, bits: float) -> None:
    """A density of 1 over a unit cube: 8 bits an element to tell 256 levels apart."""
    zero = torch.zeros(2)
    uniform = Likelihood(zero, zero, torch.zeros(2, 3), zero, 0, zero, zero, bin_width)
    assert bool((uniform.bits_per_dim == bits).all())


# Rows, calls and failures


class _Watch:
    """A score that records its calls; rows with x[0] > 100 get NaN."""

    def __init__(self, mix: GaussianMixture, sde: GaussianSDE) -> None:
        self.model, self.rows, self.times = mix.score_model(sde), list[int](), list[float]()

    def __call__(self, x: Tensor, t: TimeLike) -> Tensor:
        assert isinstance(t, Tensor)
        self.rows.append(len(x))
        self.times += [float(t.min()), float(t.max())]
        return torch.where(x[:, :1] > 100, torch.nan, self.model(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["auto", "dopri5", "torchdiffeq_dopri5", "ab4_flow"])
def test_calls_stay_inside_and_are_counted(solver: str, dtype: torch.dtype) -> None:
    mix, sde = random_mixture(3, 2, spread=1.0), VP()
    watch = _Watch(mix, sde)
    found = log_likelihood(watch, sde, mix.sample(9).to(dtype), solver=solver, chunk=5)
    low = torch.tensor(1e-5, dtype=dtype)
    assert min(watch.times) >= float(low.nextafter(-low)) and max(watch.times) <= sde.T
    assert sum(watch.rows) == int(found.forwards.sum()) + found.shared
    assert bool((found.products == 3 * found.forwards).all())
    assert found.nfe >= int(found.forwards.max())


def test_what_fits_the_nodes_to_the_model_is_counted() -> None:
    """In 12 dimensions a pilot takes two products at each of its evaluations, for all rows."""
    mix, sde = random_mixture(12, 2, spread=1.0), VP()
    watch = _Watch(mix, sde)
    watch.data_scale = watch.model.data_scale  # type: ignore[attr-defined]
    found = log_likelihood(watch, sde, mix.sample(5))
    pilot = sum(watch.rows) - int(found.forwards.sum())
    assert pilot > 0 and found.shared == 3 * pilot


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sde", [VP(), EDM(sigma_max=79.9), EDM(sigma_max=49.9)], ids=str)
def test_rounded_times_stay_inside_the_process(sde: GaussianSDE, dtype: torch.dtype) -> None:
    low, times = min(sde.t_min, 1e-5) if isinstance(sde, VP) else sde.t_min, []

    def score(x: Tensor, t: Tensor) -> Tensor:
        times.append(t.double())
        return -x / (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).to(x)[:, None]

    log_likelihood(score, sde, torch.ones(2, 3, dtype=dtype))
    asked = torch.cat(times)
    # All ends but those of float64 have to be rounded.
    assert low <= float(asked.min()) < low * 1.001 and sde.T * 0.9999 < float(asked.max()) <= sde.T


@pytest.mark.parametrize("solver", ["auto", "dopri5", "ab3_flow"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_failed_row_leaves_its_neighbours_untouched(solver: str, trace: str) -> None:
    mix, sde = random_mixture(3, 2, spread=1.0), VP()
    x, bad = mix.sample(6), torch.tensor([False, True, False, False, True, False])
    clean = log_likelihood(_Watch(mix, sde), sde, x, solver=solver, trace=trace)
    x[1], x[4] = torch.nan, 1000.0
    found = log_likelihood(_Watch(mix, sde), sde, x, solver=solver, trace=trace)
    assert torch.equal(found.status == int(Status.NONFINITE), bad)
    assert torch.equal(found.ok, ~bad)
    for name in ("log_prob", "standard_error", "bits_per_dim"):
        assert torch.equal(getattr(found, name).isnan(), bad)
    torch.testing.assert_close(found.log_prob[~bad], clean.log_prob[~bad], rtol=1e-12, atol=1e-12)
    with pytest.raises(SolveError, match="2 of 6 samples failed") as failure:
        log_likelihood(_Watch(mix, sde), sde, x, solver=solver, raise_on_failure=True)
    assert isinstance(failure.value.result, Likelihood)


@pytest.mark.parametrize("solver", ["auto", "dopri5"])
def test_a_score_that_no_steps_resolve_is_told(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pole at x = 1/2 that some paths have to cross, and a field with steps everywhere."""
    x = torch.tensor([[-2.0], [0.4], [0.8]]).double()
    monkeypatch.setattr(verbs, "NAMED_CALLS", 400)
    nodes = 16 if solver == "auto" else None
    found = log_likelihood(lambda x, t: -x + 0.1 / (x - 0.5), VP(), x, solver=solver, nfe=nodes)
    assert found.ok.tolist() == [True, False, False]
    assert torch.equal(found.log_prob.isfinite(), found.ok)
    if solver == "dopri5":
        found = log_likelihood(lambda x, t: -torch.round(5 * x), EDM(), x, solver=solver)
        assert bool((found.status == int(Status.CALL_LIMIT)).all()) and found.nfe == 400


def test_a_latent_beyond_all_bounds_has_no_log_density() -> None:
    found = log_likelihood(
        lambda x, t: -torch.round(5 * x), EDM(), torch.ones(2, 1), solver="rk4_flow", steps=50
    )
    assert bool((found.status == int(Status.NONFINITE)).all())


def test_an_unfinished_row_has_a_status_and_no_number() -> None:
    mix, sde = ring(), VP()
    lazy = DormandPrince(max_steps=5)
    found = log_likelihood(mix.score_model(sde), sde, mix.sample(4), solver=lazy)
    assert bool((found.status == int(Status.STEP_LIMIT)).all())
    assert bool(found.log_prob.isnan().all())


@pytest.mark.parametrize("solver", ["dopri5", "ab3_flow"])
def test_an_interrupt_hands_back_what_is_done(solver: str) -> None:
    mix, sde = random_mixture(2, 2), VP()
    model, calls = mix.score_model(sde), 0

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if len(x) == 3 and calls > 101:
            raise KeyboardInterrupt
        return model(x, t)

    x = mix.sample(9)
    whole = log_likelihood(model, sde, x, solver=solver)
    calls = 60 if solver == "dopri5" else 0
    found = log_likelihood(score, sde, x, solver=solver, chunk=3)
    done = found.ok
    assert not bool(done.all())
    assert bool((found.status[~done] == int(Status.INTERRUPTED)).all())
    assert bool(found.log_prob[~done].isnan().all())
    torch.testing.assert_close(found.log_prob[done], whole.log_prob[done])


@pytest.mark.parametrize("solver", ["auto", "dopri5", "ab3_flow"])
def test_conditions_follow_their_samples(solver: str) -> None:
    sde = VP()
    model = gaussian(torch.zeros(2, dtype=torch.float64), 0.3).score_model(sde)
    shift = torch.arange(7, dtype=torch.float64)[:, None]

    def score(x: Tensor, t: Tensor, shift: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (3,)  # as many as a chunk, but not one for each sample
        return model(x - sde.alpha(t)[:, None] * shift, t)

    x = shift + 0.5 * normal(generator(0), 7, 2)
    x[2] += 5  # a stiffer row, so that rows end at different times
    found = log_likelihood(score, sde, x, solver=solver, chunk=3, shift=shift, table=torch.zeros(3))
    latent = (x - shift) * torch.sqrt((sde.alpha(1.0) ** 2 * 0.3 + sde.sigma(1.0) ** 2) / 0.3)
    torch.testing.assert_close(found.latent, latent + sde.alpha(1.0) * shift, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("sde", [VP(), EDM(), OwnVP()], ids=lambda sde: type(sde).__name__)
def test_a_network_without_a_gradient_has_no_likelihood(
    sde: SDE, parameters: bool, mode: str
) -> None:
    gain, calls = torch.ones(2, dtype=torch.float64, requires_grad=parameters), 0

    def detached(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gain * -x.detach()

    options: dict[str, Any] = {"solver": "euler_flow", "steps": 4, "mode": mode}
    options["prior"] = Independent(Normal(torch.zeros(2).double(), float(sde.T)), 1)
    x = normal(generator(0), 3, 2)
    with pytest.raises(ArgumentError, match="no gradient"):
        log_likelihood(detached, sde, x, **options)
    assert calls <= 3  # at the first point, asked once more, somewhere else
    attached = log_likelihood(lambda x, t: gain * -x, sde, x, **options)
    hidden = torch.no_grad()(lambda x, t: gain * -x)
    if mode == "reverse":
        with pytest.raises(ArgumentError, match="no gradient"):
            log_likelihood(hidden, sde, x, **options)
    else:
        torch.testing.assert_close(
            log_likelihood(hidden, sde, x, **options).log_prob, attached.log_prob
        )


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("solver", ["auto", "euler_flow"])
def test_a_model_of_another_process_does_not_hide_that_its_network_has_no_gradient(
    solver: str, mode: str
) -> None:
    x = normal(generator(0), 3, 2)
    options: dict[str, Any] = {"solver": solver, "mode": mode}
    home = gaussian([0.0, 0.0], 0.5).score_model(VP())

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return home.predict("eps", x, t)

    expected = log_likelihood(from_eps(eps, VP()), EDM(), x, **options).log_prob
    hidden = from_eps(torch.no_grad()(eps), VP())
    if mode != "reverse":
        found = log_likelihood(hidden, EDM(), x, **options).log_prob
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ArgumentError, match="no gradient"):
            log_likelihood(hidden, EDM(), x, **options)
    with pytest.raises(ArgumentError, match="no gradient"):
        log_likelihood(from_eps(lambda x, t: eps(x.detach(), t), VP()), EDM(), x, **options)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
def test_a_constant_score_has_the_divergence_of_the_drift_alone(mode: str) -> None:
    """Under dx = -beta/2 (x + s) dt volumes shrink by sqrt(abar) an element, whatever s."""
    sde, x = VP(), normal(generator(0), 3, 2)
    expected = 2 * (sde.alpha(1.0) / sde.alpha(1e-5)).log().expand(3)
    for score in (lambda x, t: torch.ones_like(x), lambda x, t: 0 * x + 1):
        found = log_likelihood(score, sde, x, solver=TIGHT, mode=mode)
        torch.testing.assert_close(found.log_det, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("solver", ["dopri5", "euler_flow"])
def test_a_network_may_write_into_what_it_is_given(solver: str, mode: str) -> None:
    x = normal(generator(0), 3, 2)
    options: dict[str, Any] = {"solver": solver, "mode": mode}
    expected = log_likelihood(lambda x, t: -torch.relu(x) - x.tanh(), VP(), x, **options)

    def writing(x: Tensor, t: Tensor) -> Tensor:
        rest = x.tanh()
        return -torch.relu_(x) - rest

    kept = x.clone()
    torch.testing.assert_close(
        log_likelihood(writing, VP(), x, **options).log_prob, expected.log_prob
    )
    assert torch.equal(x, kept)


def test_backward_passes_leave_autocast() -> None:
    """bfloat16 has three digits; forward the model itself leaves autocast, as a mixture's does."""
    rng, x = generator(2), normal(generator(0), 8, 16).float()
    root = normal(rng, 16, 16).float() / 8
    matrix = root @ root.mT + torch.eye(16)

    def score(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return -x @ matrix

    options: dict[str, Any] = {"solver": "euler_flow", "steps": 4}
    expected = log_likelihood(score, VP(), x, **options).log_prob
    with torch.autocast("cpu", torch.bfloat16):
        found = log_likelihood(score, VP(), x, **options).log_prob
    torch.testing.assert_close(found, expected)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.layer(x).tanh() - x
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net, x = _Net(), torch.ones(2, 3)
    expected = log_likelihood(net, VP(), x).log_prob
    with mode():
        found = log_likelihood(net, VP(), torch.ones(2, 3))
    assert torch.equal(found.log_prob, expected)
    assert not found.log_prob.requires_grad and not found.latent.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


class _Decaying(Solver):
    """Claims the flow form, yet scales the state: its integral of the divergence would decay."""

    name, predicts, order, source = "decaying", "flow", 1, "none"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        return math.exp(t - s) * x + (s - t) * run.predict(x, t)


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ArgumentError, "draws noise", {"solver": "euler_maruyama"}),
        (ArgumentError, "'ab3_flow'", {"solver": "dpmpp_2m"}),
        (ArgumentError, "'euler_flow'", {"solver": _Decaying()}),
        (ArgumentError, "'euler_flow'", {"solver": _Decaying(), "steps": 1}),
        (ArgumentError, "no prior", {"sde": Langevin(score=lambda x: -x)}),
        (GridError, "give increasing times", {"t_start": 0.9, "t_end": 0.1}),
        (GridError, "outside", {"t_end": 1.5}),
        (GridError, "give increasing times", {"solver": "ab3_flow", "grid": (1.0, 0.5, 0.1)}),
        (ArgumentError, "leave out nfe", {"solver": "ab3_flow", "grid": (0.1, 1.0), "nfe": 3}),
        (ArgumentError, "one budget", {"solver": "ab3_flow", "steps": 4, "nfe": 3}),
        (ArgumentError, "nfe= does not go", {"solver": "dopri5", "nfe": 3}),
        (ArgumentError, "nfe = 3", {"nfe": 3}),
        (ArgumentError, "cost = 10", {"cost": 10}),
        (ArgumentError, "cost = 1000000000: .* to 100000", {"cost": 10**9}),
        (ArgumentError, "cost = '100'", {"cost": "100"}),
        (ArgumentError, "nfe = 1000000000: .* to 2500", {"nfe": 10**9}),
        (ArgumentError, "probes = 1000000000: .* to 10000", {"probes": 10**9}),
        (ArgumentError, "probes = 1000: .* more than 100000", {"probes": 1000}),
        (
            ArgumentError,
            "steps = 1000000000: .* to 1000000$",
            {"solver": "rk4_flow", "steps": 10**9},
        ),
        (ArgumentError, "log_snr coordinates, not in x", {"solver": "dpm_solver_23"}),
        (ArgumentError, "t_start = 'a'", {"t_start": "a"}),
        (ArgumentError, "cost= does not go with 'dopri5'", {"solver": "dopri5", "cost": 200}),
        (ArgumentError, "steps= does not go with 'auto'", {"steps": 20}),
        (ArgumentError, "grid= does not go with 'auto'", {"grid": "karras"}),
        (LookupError, "mode 'backward'", {"mode": "backward"}),
        (ArgumentError, "probes = 0", {"probes": 0}),
        (LookupError, "'hutchinson'", {"trace": "hutchison"}),
        (ArgumentError, "dequantise = -1", {"dequantise": -1.0}),
        (ArgumentError, "dequantise = 0", {"dequantise": 0.0}),
        (ArgumentError, "chunk = 0", {"chunk": 0}),
        (ArgumentError, "int64", {"x": torch.zeros(2, 2, dtype=torch.int64)}),
        (ShapeError, "batch axis", {"x": torch.tensor(1.0)}),
        (ShapeError, "at least one", {"x": torch.zeros(0, 2)}),
    ],
)
def test_bad_input_is_refused_before_the_first_call(
    kind: type[Exception], message: str, options: dict[str, Any]
) -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    arguments: dict[str, Any] = {"sde": VP(), "x": torch.zeros(2, 2), **options}
    with pytest.raises(kind, match=message) as error:
        log_likelihood(score, **arguments)
    assert isinstance(error.value, ScoresolveError)


def test_a_score_that_would_broadcast_is_refused() -> None:
    for solver in ("auto", "dopri5", "ab3_flow"):
        with pytest.raises(ShapeError, match=r"\(\d+, 1\) for x of shape \(\d+, 3\)"):
            log_likelihood(lambda x, t: -x[:, :1], VP(), torch.zeros(4, 3), solver=solver)
