"""Defects of other libraries, each shown in theirs and shown to be absent here.

Where a peer has mended a defect its test is skipped and says so. Published code that nobody has
packaged is in `test_unpackaged_defects.py`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exact_errors import (
    F64,
    HALVED,
    INSIDE,
    VARIANCE,
    Run,
    errors,
    model_of,
    our,
    slope,
    std,
    variance_of,
)
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ShapeError, Status
from scoresolve.noise import Philox
from scoresolve.peers import PEERS, installed, k_sampling, quiet_scheduler
from scoresolve.sde import EDM, VP, DiscreteVP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import (
    DDIM,
    DormandPrince,
    LangevinCorrector,
    PredictorCorrector,
    get_solver,
)


def need(library: str) -> None:
    if not installed(library):
        pytest.skip(f"{library} is not installed")


def peer(name: str, sde: GaussianSDE) -> Run:
    need(name.split()[0])
    return lambda times, x, noise: PEERS[name].run(model_of(sde), sde, times, x, noise)


def skip_if_mended(mended: bool, library: str) -> None:
    if mended:
        pytest.skip(f"the installed {library} has mended this")


# --- orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_azula_reab_has_order_one_whatever_it_says(order: int) -> None:
    sde, ends = EDM(), (2.0, 0.1)
    found = errors(peer(f"azula REAB{order}", sde), sde, HALVED, ends=ends)
    skip_if_mended(slope(found, HALVED) > 1.5, "azula")
    assert slope(found, HALVED) == pytest.approx(1.0, abs=0.1)
    ours = errors(our(f"ab{order}_v", sde), sde, HALVED, ends=ends)
    assert slope(ours, HALVED) > order - 0.2


@pytest.mark.parametrize(
    ("name", "nominal", "measured", "counterpart"),
    [
        ("diffusers dpmsolver++ 3M(midpoint, full end)", 3, 2, "dpmpp_3m"),
        ("k-diffusion dpmpp_3m_sde(eta=0)", 3, 2, "dpmpp_3m"),
        ("diffusers unipc3(bh2, x0)", 4, 2, "uni_pc"),
        ("azula zAB4", 4, 2, "ab4"),
    ],
)
def test_multistep_methods_lose_their_order_at_start_or_end(
    name: str, nominal: int, measured: int, counterpart: str
) -> None:
    steps = (160, 320, 640)
    found = errors(peer(name, VP()), VP(), steps, ends=INSIDE)
    skip_if_mended(slope(found, steps) > nominal - 0.3, name.split()[0])
    assert slope(found, steps) == pytest.approx(measured, abs=0.2)
    ours = errors(our(counterpart, VP()), VP(), HALVED, ends=INSIDE)
    assert slope(ours, HALVED) > nominal - 0.2


def test_dpm_fast_is_worse_with_twice_the_calls_where_it_ends_on_order_one() -> None:
    calls = (80, 160)  # 2 and 1 modulo 3
    found = errors(peer("k-diffusion dpm_fast", VP()), VP(), calls, ends=INSIDE)
    skip_if_mended(found[1] < found[0], "k-diffusion")
    assert found[1] > 5 * found[0]
    ours = []
    for nfe in calls:
        solver = ss.solvers.DPMSolverFast(nfe)
        times = ss.make_grid("log_snr", VP(), len(solver.orders(0)), *INSIDE).times
        plan = ss.plan(solver, VP(), times)
        assert plan.nfe == nfe
        x = torch.full((1, 1), std(VP(), times[0]), dtype=F64)
        ours.append(abs(float(plan.run(model_of(VP()), x)) / std(VP(), times[-1]) - 1))
    assert ours[0] > 3 * ours[1]


def test_dpmpp_sde_with_independent_noises_falls_to_order_one() -> None:
    found = errors(peer("k-diffusion dpmpp_sde", EDM()), EDM(), HALVED)
    assert slope(found[-2:], HALVED[-2:]) < 1.1
    ours = errors(our("dpmpp_sde", EDM()), EDM(), HALVED)
    assert slope(ours[-2:], HALVED[-2:]) > 1.8


def test_k_diffusion_3m_sde_starts_with_a_multiple_of_the_variance_and_has_order_two() -> None:
    sde, run = EDM(), peer("k-diffusion dpmpp_3m_sde", EDM())
    coarse = ss.make_grid("karras", sde, 10).times
    assert variance_of(run, sde, coarse) > 4.0
    assert abs(variance_of(our("dpmpp_3m_sde", sde), sde, coarse) - 1) < 0.5
    steps = (80, 160, 320)
    found = errors(run, sde, steps)
    assert slope(found, steps) == pytest.approx(2.0, abs=0.2)
    assert get_solver("dpmpp_3m_sde").order == 2
    ours = errors(our("dpmpp_3m_sde", sde), sde, steps)
    assert all(mine < 0.6 * theirs for mine, theirs in zip(ours, found, strict=True))


def test_diffusers_sde_solver_of_order_three_is_worse_than_order_two() -> None:
    steps = (40, 80, 160)
    second, third = (
        errors(peer(f"diffusers sde-dpmsolver++ {kind}", VP()), VP(), steps)
        for kind in ("2M(heun)", "3M(midpoint)")
    )
    skip_if_mended(third[-1] < second[-1], "diffusers")
    assert third[-1] > 5 * second[-1]
    assert slope(third, steps) < 1.3
    two, three = (errors(our(f"dpmpp_{k}m_sde", VP()), VP(), steps) for k in (2, 3))
    assert three[-1] < two[-1]
    assert slope(three[-2:], steps[-2:]) > 1.8


def test_stochastic_flow_matching_converges_to_half_the_variance() -> None:
    sde, steps = RectifiedFlow(T=0.999), (40, 160, 640)
    run = peer("diffusers flow_match_euler(stochastic)", sde)
    found = errors(run, sde, steps, "uniform")
    skip_if_mended(found[-1] < 0.1, "diffusers")
    assert found[-1] == pytest.approx(0.5, abs=0.02)
    ours = errors(our("flow_sde", sde), sde, steps, "uniform")
    assert ours[-1] < 0.01


# --- integer timesteps, in the library's own float32 ---------------------------------------------


def native(path: str, steps: int, variance: float = VARIANCE, **options: Any) -> list[float]:
    """Relative errors of the standard deviation after each step, in the library's own timesteps."""
    scheduler = quiet_scheduler(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about tensors
        scheduler.set_timesteps(steps)
        signal = scheduler.alphas_cumprod.double()[scheduler.timesteps]
        exact = (signal * variance + 1 - signal).sqrt().tolist()
        x, found = torch.ones(1, 1), []
        for t, a, end in zip(
            scheduler.timesteps, signal, [*exact[1:], math.sqrt(variance)], strict=True
        ):
            eps = float((1 - a).sqrt() / (a * variance + 1 - a)) * x
            x = scheduler.step(eps, t, x).prev_sample
            found.append(float(x) * exact[0] / end - 1)
    return found


def chain() -> DiscreteVP:
    """The 1000 steps of linear beta that all schedulers have by default."""
    return DiscreteVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0))


def gain(solver: str, sde: GaussianSDE, grid: ss.Grid, variance: float = VARIANCE) -> float:
    """Relative error of our standard deviation on data N(0, variance)."""
    x = torch.ones(1, 1, dtype=F64)
    out = float(ss.plan(solver, sde, grid).run(model_of(sde, variance), x))
    end = math.sqrt(variance) if grid.denoise else std(sde, grid.times[-1], variance)
    return out * std(sde, grid.times[0], variance) / end - 1


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_diffusers_ddim_does_not_converge_unless_the_steps_divide_the_chain(spacing: str) -> None:
    need("diffusers")
    options: dict[str, Any] = {"timestep_spacing": spacing, "clip_sample": False}
    found = [native("ddim.DDIMScheduler", n, **options)[-1] for n in (300, 600, 900)]
    skip_if_mended(max(map(abs, found)) < 0.02, "diffusers")
    assert min(map(abs, found)) > 0.05
    assert abs(native("ddim.DDIMScheduler", 500, **options)[-1]) < 0.01
    ours = [gain("ddim", chain(), ss.make_grid(spacing, chain(), n)) for n in (300, 600, 900)]
    assert max(map(abs, ours)) < 0.011
    assert abs(ours[0]) > abs(ours[1]) > abs(ours[2])


def test_diffusers_2m_with_leading_timesteps_ends_on_a_long_jump_of_order_one() -> None:
    """Its last timestep is 1000/(n + 1), not 0, so the jump to sigma = 0 shrinks with n only."""
    need("diffusers")
    path, steps = "dpmsolver_multistep.DPMSolverMultistepScheduler", (62, 124, 249)
    options: dict[str, Any] = {"timestep_spacing": "leading", "lower_order_final": False}
    runs = [native(path, n, **options) for n in steps]
    jumps = [abs(run[-1] - run[-2]) for run in runs]
    skip_if_mended(jumps[0] < 1e-3, "diffusers")
    assert slope(jumps, steps) < 1.5
    grids = [ss.make_grid("leading", chain(), n) for n in steps]
    assert all(grid.denoise and grid.times[-1] == 1.0 for grid in grids)
    ours = [
        gain("dpmpp_2m", chain(), grid) - gain("dpmpp_2m", chain(), ss.Grid(grid.times))
        for grid in grids
    ]
    assert max(map(abs, ours)) < jumps[-1] / 3


def test_diffusers_deis_of_order_three_gets_worse_with_more_steps() -> None:
    need("diffusers")
    path = "deis_multistep.DEISMultistepScheduler"
    options: dict[str, Any] = {"solver_order": 3, "lower_order_final": False}
    steps = (80, 320)
    found = [abs(native(path, n, **options)[-1]) for n in steps]
    skip_if_mended(found[-1] < found[0], "diffusers")
    assert found[-1] > 3 * found[0]
    model, ours = model_of(VP()), []
    for n in steps:
        times = ss.make_grid("log_snr", VP(), n).times
        x = torch.full((1, 1), std(VP(), times[0]), dtype=torch.float32)
        out = float(ss.plan("deis_tab3", VP(), times).run(model, x))
        ours.append(abs(out / std(VP(), times[-1]) - 1))
    assert ours[-1] < 1e-5 and ours[-1] < ours[0] / 30


def test_diffusers_unipc_bh1_is_not_a_number_where_it_ends_at_sigma_zero() -> None:
    need("diffusers")
    path = "unipc_multistep.UniPCMultistepScheduler"
    found = native(path, 10, solver_type="bh1", final_sigmas_type="zero")[-1]
    skip_if_mended(math.isfinite(found), "diffusers")
    assert not math.isfinite(found)
    grid = ss.Grid((*ss.make_grid("log_snr", VP(), 10).times, 0.0))
    assert abs(gain("uni_pc", VP(), grid)) < 0.1


# --- ends, noise and neighbours ------------------------------------------------------------------


def test_a_jump_to_sigma_zero_takes_variance_that_our_end_rule_keeps() -> None:
    """After the jump the variance is v^2/(v + sigma^2), without it v + sigma^2, the true law."""
    need("k-diffusion")
    sde, variance = EDM(sigma_min=0.1), 0.01
    model = model_of(sde, variance)
    grid = ss.make_grid("log_snr", sde, 400)
    x = torch.full((1, 1), std(sde, sde.T, variance), dtype=F64)
    sigmas = torch.tensor([*grid.times, 0.0], dtype=F64)
    theirs = k_sampling().sample_heun(
        lambda x, s: model.predict("x0", x, s), x, sigmas, disable=True
    )
    assert float(theirs) ** 2 == pytest.approx(variance**2 / (variance + 0.1**2), rel=1e-3)
    ours = ss.plan("heun", sde, grid)
    assert not ours.denoised
    assert float(ours.run(model, x)) ** 2 == pytest.approx(variance + 0.1**2, rel=1e-3)


@pytest.mark.parametrize(
    ("library", "name"),
    [("k-diffusion", "euler"), ("k-diffusion", "heun"), ("k-diffusion", "dpm_2")],
)
def test_deterministic_samplers_of_k_diffusion_draw_random_numbers(library: str, name: str) -> None:
    need("k-diffusion")
    sde, model = EDM(), model_of(EDM())
    times = ss.make_grid("karras", sde, 5).times
    x = torch.ones(2, 1, dtype=F64)
    before = torch.get_rng_state()
    getattr(k_sampling(), f"sample_{name}")(
        lambda x, s: model.predict("x0", x, s), x, torch.tensor(times, dtype=F64), disable=True
    )
    moved = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    skip_if_mended(not moved, library)
    assert moved
    ss.sample(model, sde, x=x, solver=name.replace("dpm_2", "dpm_solver_2"), steps=5)
    assert torch.equal(before, torch.get_rng_state())


def test_deterministic_ddim_of_azula_draws_random_numbers() -> None:
    need("azula")
    denoise, sample = (importlib.import_module(f"azula.{name}") for name in ("denoise", "sample"))
    noise = importlib.import_module("azula.noise")

    class Zero(denoise.Denoiser):  # type: ignore[name-defined, misc]
        schedule = noise.VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            return denoise.DiracPosterior(mean=torch.zeros_like(x_t))

    before = torch.get_rng_state()
    sample.DDIMSampler(Zero(), eta=0.0, steps=3, silent=True)(torch.ones(2, 1))
    moved = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    skip_if_mended(not moved, "azula")
    assert moved
    ss.sample(model_of(VP()), VP(), x=torch.ones(2, 1), solver="ddim", steps=3)
    assert torch.equal(before, torch.get_rng_state())


def brownian_rows(library: str, rows: int) -> Tensor:
    """The first row of the library's Brownian increments for one seed and a batch of `rows`."""
    if library == "k-diffusion":
        x = torch.zeros(rows, 3, dtype=F64)
        sampler = k_sampling().BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=0)
        increment: Tensor = sampler(torch.tensor(10.0), torch.tensor(1.0))
    else:
        torchsde = importlib.import_module("torchsde")
        path = torchsde.BrownianInterval(0.0, 1.0, size=(rows, 3), dtype=F64, entropy=0)
        increment = path(0.0, 0.5)
    return increment[0]


@pytest.mark.parametrize("library", ["k-diffusion", "torchsde"])
def test_same_seed_and_another_batch_give_another_sample_elsewhere(library: str) -> None:
    need(library)
    small, large = (brownian_rows(library, rows) for rows in (2, 50))
    skip_if_mended(torch.equal(small, large), library)
    assert not torch.allclose(small, large)
    few, many = (
        ss.sample(model_of(EDM()), EDM(), shape=(rows, 1), solver="dpmpp_2m_sde", steps=6, seed=0).x
        for rows in (2, 50)
    )
    assert torch.equal(few, many[:2])


def test_langevin_corrector_of_diffusers_ties_a_sample_to_its_neighbours() -> None:
    need("diffusers")
    scheduler = quiet_scheduler("sde_ve.ScoreSdeVeScheduler")

    def theirs(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        moved: Tensor = scheduler.step_correct(-rows, rows, generator=generator).prev_sample[:1]
        return moved

    first, second = torch.ones(1, 2), torch.full((1, 2), 9.0)
    pair = theirs(torch.cat([first, second]))
    other = theirs(torch.cat([first, 100 * second]))
    skip_if_mended(torch.equal(pair, other), "diffusers")
    assert not torch.allclose(pair, other)

    solver = PredictorCorrector(DDIM(), LangevinCorrector())
    plan = ss.plan(solver, VP(), (0.5, 0.4))

    def ours(rows: Tensor) -> Tensor:
        return plan.run(lambda x, t: -x, rows, Philox(0))[:1]

    assert torch.equal(ours(torch.cat([first, second])), ours(torch.cat([first, 100 * second])))


# --- adaptive solvers ----------------------------------------------------------------------------


class Watched(ss.Model):
    """A model that keeps the times it was asked for."""

    def __init__(self, model: ss.Model) -> None:
        self.model, self.sde = model, model.sde
        self.seen: list[float] = []

    def predict(self, prediction: str, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        self.seen += torch.as_tensor(t).flatten().tolist()
        return self.model.predict(prediction, x, t, **cond)


def test_torchdiffeq_dopri5_evaluates_outside_the_interval() -> None:
    odeint = pytest.importorskip("torchdiffeq").odeint
    sde = EDM()
    model = ss.targets.ring().score_model(sde)
    x = 80 * torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    seen = []

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return model.predict("flow", y, t.clamp(1e-6))

    ends = torch.tensor([sde.T, sde.t_min], dtype=F64)
    odeint(velocity, x, ends, method="dopri5", rtol=1e-5, atol=1e-5)
    skip_if_mended(min(seen) >= sde.t_min, "torchdiffeq")
    assert min(seen) < 0.0
    watched = Watched(model)
    ss.sample(watched, sde, x=x, solver="dopri5")
    assert sde.t_min <= min(watched.seen) and max(watched.seen) <= sde.T


def one_bad_row(x: Tensor) -> Tensor:
    """The field -x, not a number where the start was 100."""
    return torch.where(x > 50, math.nan, -x)


def test_torchode_returns_uninitialised_memory_for_rows_beside_a_failed_one() -> None:
    torchode = pytest.importorskip("torchode")
    term = torchode.ODETerm(lambda t, y: one_bad_row(y))
    controller = torchode.IntegralController(atol=1e-8, rtol=1e-8, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    y0 = torch.tensor([[1.0], [100.0], [2.0]], dtype=F64)
    times = torch.linspace(0, 1, 3, dtype=F64).repeat(3, 1)
    solution = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
    right = torch.allclose(solution.ys[0, -1, 0], torch.tensor(math.exp(-1.0), dtype=F64))
    skip_if_mended(right or int(solution.status[0]) != 0, "torchode")
    assert int(solution.status[0]) == 0 and not right


def sampled_with_one_bad_row() -> ss.Samples:
    sde = EDM(sigma_max=10.0)
    score = ss.as_model(lambda x, t: torch.where(x > 50, math.nan, -x / (1 + t[:, None] ** 2)), sde)
    x = torch.tensor([[1.0], [100.0], [2.0]], dtype=F64)
    return ss.sample(score, sde, x=x, solver=DormandPrince(1e-8, 1e-8))


def test_our_adaptive_solver_marks_the_failed_row_and_finishes_the_others() -> None:
    samples = sampled_with_one_bad_row()
    assert samples.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]
    scale = std(EDM(), 0.002, 1.0) / std(EDM(), 10.0, 1.0)
    expected = torch.tensor([scale, 2 * scale], dtype=F64)
    torch.testing.assert_close(samples.x[[0, 2], 0], expected, rtol=1e-6, atol=0.0)


class NoReturn(Exception):
    """Raised after so many calls that the caller is in an endless loop."""


def limited(function: Callable[..., Any], calls: int = 2000) -> Callable[..., Any]:
    made = itertools.count()

    def counted(*args: Any) -> Any:
        if next(made) > calls:
            raise NoReturn
        return function(*args)

    return counted


def test_scipy_rk45_does_not_return_from_a_row_that_is_not_a_number() -> None:
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp
    field = limited(lambda t, y: np.where(y > 50, np.nan, -y))
    with pytest.raises(NoReturn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solve_ivp(field, (0.0, 1.0), np.array([1.0, 100.0]), method="RK45")


def test_dpm_adaptive_does_not_return_from_a_row_that_is_not_a_number() -> None:
    need("k-diffusion")
    denoiser = limited(lambda x, sigma: torch.where(x > 50, math.nan, 0 * x))
    with pytest.raises(NoReturn):
        k_sampling().sample_dpm_adaptive(
            denoiser, torch.tensor([[1.0], [100.0]]), 0.01, 10.0, disable=True
        )


# --- shapes --------------------------------------------------------------------------------------


def one_column(x: Tensor, t: object) -> Tensor:
    """A model that forgot an axis: one value per sample."""
    return -x.mean(1, keepdim=True)


def test_a_model_of_the_wrong_shape_is_broadcast_elsewhere_and_refused_here() -> None:
    odeint = pytest.importorskip("torchdiffeq").odeint
    need("k-diffusion")
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    ends = torch.tensor([1.0, 0.1], dtype=F64)
    assert odeint(lambda t, y: one_column(y, t), x, ends, method="midpoint").shape == (2, 1, 3)
    assert k_sampling().sample_euler(one_column, x, ends, disable=True).shape == (1, 3)
    with pytest.raises(ShapeError, match="one value per element"):
        ss.sample(one_column, VP(), x=x, solver="midpoint", steps=3)


def test_flow_matching_takes_an_exact_divergence_of_rows_alone() -> None:
    solver = pytest.importorskip("flow_matching.solver").ODESolver
    wrapper = pytest.importorskip("flow_matching.utils").ModelWrapper

    class Contraction(wrapper):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return -x

    def log_normal(x: Tensor) -> Tensor:
        return -(x.flatten(1).square() + math.log(2 * math.pi)).sum(1) / 2

    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = solver(velocity_model=Contraction(None))
    options = {"step_size": 0.1, "exact_divergence": True}
    theirs.compute_likelihood(images.reshape(2, 64), log_normal, **options)
    try:
        theirs.compute_likelihood(images, log_normal, **options)
    except IndexError:
        exact = log_normal(images)  # under VP the flow of N(0, I) does not move
        ours = ss.log_likelihood(lambda x, t: -x, VP(), images, trace="exact")
        torch.testing.assert_close(ours.log_prob, exact, rtol=1e-4, atol=0)
    else:
        skip_if_mended(True, "flow_matching")
