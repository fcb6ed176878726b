"""Our solvers and the samplers of other libraries: the same numbers from the same inputs.

Both get one model (the exact score of a mixture, which is not affine), one time grid, one start and
one set of normals, in float64. What is left is rounding: some peers work with alpha^2 and
1 - alpha^2, or solve small linear systems, so 1e-9 of the largest value is allowed. Start-up steps
are of lower order in all of them, which is `start="graded"` here. Where we differ on purpose, see
`test_peer_defects.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from benchmarks import nfe
from scoresolve.noise import CallableNoise
from scoresolve.peers import LIBRARIES, PEERS, Peer, installed
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    PNDM,
    REGISTRY,
    SEEDS,
    AdamsBashforth,
    Churn,
    DPMSolverPP,
    ExponentialAdams,
    Solver,
    UniPC,
    get_solver,
)

F64 = torch.float64
TOLERANCE = 1e-9
STEPS = 9
PROCESSES: dict[str, GaussianSDE] = {"VP": VP(), "EDM": EDM(), "flow": RectifiedFlow(T=0.99)}

Row = tuple[Callable[[], Solver], tuple[str, ...]]
"""How to build our solver, and the peers it must agree with."""

graded = partial(partial, start="graded")


def named(name: str) -> Callable[[], Solver]:
    """The registry's own solver of that name."""

    def make() -> Solver:
        solver = get_solver(name)
        assert isinstance(solver, Solver)
        return solver

    return make


DETERMINISTIC: dict[str, Row] = {
    "euler": (
        named("euler"),
        ("k-diffusion euler", "azula euler", "diffusers euler"),
    ),
    "ddim": (DDIM, ("diffusers ddim", "azula ddim")),
    "heun": (
        named("heun"),
        ("k-diffusion heun", "azula heun", "diffusers heun"),
    ),
    "dpm_solver_2": (
        named("dpm_solver_2"),
        ("k-diffusion dpm_solver_2", "k-diffusion dpm_2", "diffusers dpm_2"),
    ),
    "dpm_solver_3": (named("dpm_solver_3"), ("k-diffusion dpm_solver_3",)),
    "dpmpp_2s": (named("dpmpp_2s"), ("k-diffusion dpmpp_2s",)),
    "dpmpp_2m": (
        DPMSolverPP,
        ("k-diffusion dpmpp_2m", "diffusers dpmsolver++ 2M(midpoint, full end)"),
    ),
    "eab2": (
        graded(ExponentialAdams, 2),
        (
            "azula xEAB2",
            "k-diffusion dpmpp_2m_sde(eta=0, heun)",
            "diffusers dpmsolver++ 2M(heun, full end)",
        ),
    ),
    "dpmpp_3m": (graded(DPMSolverPP, 3), ("azula xEAB3",)),
    "eab4": (graded(ExponentialAdams, 4), ("azula xEAB4",)),
    "ab2": (graded(AdamsBashforth, 2), ("azula zAB2", "k-diffusion lms2")),
    "ab3": (graded(AdamsBashforth, 3), ("azula zAB3", "k-diffusion lms3")),
    "ab4": (graded(AdamsBashforth, 4), ("azula zAB4", "k-diffusion lms4", "diffusers lms4")),
    "deis_lamab2": (
        graded(DEIS, 2, "log_snr"),
        ("azula zEAB2", "diffusers deis2, full end", "diffusers dpmsolver 2M(heun, full end)"),
    ),
    "deis_lamab3": (
        graded(DEIS, 3, "log_snr"),
        ("azula zEAB3", "diffusers deis3, full end"),
    ),
    "deis_lamab4": (graded(DEIS, 4, "log_snr"), ("azula zEAB4",)),
    "uni_pc_1": (graded(UniPC, 1), ("diffusers unipc1(bh1, x0, full end)",)),
    "uni_pc_2": (graded(UniPC, 2), ("diffusers unipc2(bh1, x0, full end)",)),
    "uni_pc": (graded(UniPC), ("diffusers unipc3(bh1, x0, full end)",)),
    "uni_pc_4": (graded(UniPC, 4), ("diffusers unipc4(bh1, x0, full end)",)),
    "uni_pc_bh2": (graded(UniPC, 3, "bh2"), ("diffusers unipc3(bh2, x0, full end)",)),
    "uni_pc_2_bh2": (graded(UniPC, 2, "bh2"), ("diffusers unipc2(bh2, x0, full end)",)),
    "uni_pc_eps": (graded(UniPC, 3, "bh1", "eps"), ("diffusers unipc3(bh1, eps, full end)",)),
    "uni_pc_2_bh2_eps": (
        graded(UniPC, 2, "bh2", "eps"),
        ("diffusers unipc2(bh2, eps, full end)",),
    ),
    "ipndm": (IPNDM, ("diffusers ipndm",)),
    "pndm": (PNDM, ("diffusers pndm",)),
    "plms": (partial(PNDM, "plms"), ("diffusers plms",)),
}
ON_THE_FLOW: dict[str, Row] = {
    "euler_flow": (named("euler_flow"), ("diffusers flow_match_euler",)),
    "heun_flow": (named("heun_flow"), ("diffusers flow_match_heun",)),
    **{
        f"ab{order}_flow": (graded(AdamsBashforth, order, "flow"), (f"azula vAB{order}",))
        for order in (2, 3, 4)
    },
}
ON_SIGMA: dict[str, Row] = {
    f"deis_tab{order}": (graded(DEIS, order), (f"k-diffusion lms{order}",)) for order in (2, 3, 4)
}
STOCHASTIC: dict[str, Row] = {
    "ddpm": (
        DDPM,
        (
            "diffusers ddpm",
            "azula ddpm",
            "k-diffusion euler_ancestral",
            "diffusers euler_ancestral",
        ),
    ),
    "ddim(eta=0.5)": (partial(DDIM, 0.5), ("diffusers ddim(eta=0.5)",)),
    "ddim(eta=sqrt(0.5))": (partial(DDIM, 0.5**0.5), ("azula ddim(eta=0.5)",)),
    "seeds_1_eps": (partial(SEEDS, 1, "eps"), ("azula ito",)),
    "dpm_2_ancestral": (
        named("dpm_2_ancestral"),
        ("k-diffusion dpm_2_ancestral",),
    ),
    "dpmpp_2s_ancestral": (
        named("dpmpp_2s_ancestral"),
        ("k-diffusion dpmpp_2s_ancestral",),
    ),
    "dpmpp_2m_sde": (
        named("dpmpp_2m_sde"),
        ("k-diffusion dpmpp_2m_sde", "diffusers sde-dpmsolver++ 2M(midpoint)"),
    ),
    "dpmpp_2m_sde_heun": (
        named("dpmpp_2m_sde_heun"),
        ("k-diffusion dpmpp_2m_sde(heun)", "diffusers sde-dpmsolver++ 2M(heun)"),
    ),
    "consistency": (named("consistency"), ("diffusers lcm",)),
}


UNIT_LENGTH: dict[str, Row] = {
    "ddpm_forward": (partial(DDPM, "forward"), ("diffusers ddpm(fixed_large)",)),
}
"""Where the noise depends on the scale of x: alpha^2 + sigma^2 = 1 alone."""


def cases(table: dict[str, Row], processes: tuple[str, ...]) -> list[object]:
    """One test for each row, peer and process, skipped where the peer is not installed."""
    return [
        pytest.param(
            make,
            PEERS[peer],
            PROCESSES[process],
            id=f"{name}-{peer}-{process}",
            marks=pytest.mark.skipif(
                not installed(PEERS[peer].library), reason=f"{PEERS[peer].library} is not installed"
            ),
        )
        for name, (make, peers) in table.items()
        for peer in peers
        for process in processes
    ]


def normals(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(6, 2, dtype=F64, generator=generator) for _ in range(count)]


def same(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert theirs.dtype == F64
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)


def run_both(solver: Solver, peer: Peer, sde: GaussianSDE) -> tuple[Tensor, Tensor]:
    """Final states of both from the same start, with one normal for each step of the grid."""
    model = ss.targets.ring(5, 1.0, 0.3).score_model(sde)
    times = ss.make_grid("sqrt_angle", sde, STEPS).times
    start, *draws = normals(1 + STEPS)
    x = sde.prior_std * start
    ours = ss.plan(solver, sde, times).run(
        model, x, CallableNoise(lambda like, t, s: draws[times.index(t)])
    )
    sequence = iter(draws)
    theirs = peer.run(model, sde, times, x, lambda like, t, s: next(sequence))
    return ours, theirs


@pytest.mark.parametrize(
    ("make", "peer", "sde"),
    [
        *cases(DETERMINISTIC, ("VP", "EDM", "flow")),
        *cases(ON_THE_FLOW, ("flow",)),
        *cases(ON_SIGMA, ("EDM",)),
    ],
)
def test_deterministic_sampler_gives_the_same_sample(
    make: Callable[[], Solver], peer: Peer, sde: GaussianSDE
) -> None:
    same(*run_both(make(), peer, sde))


@pytest.mark.parametrize(
    ("make", "peer", "sde"),
    [*cases(STOCHASTIC, ("VP", "EDM", "flow")), *cases(UNIT_LENGTH, ("VP",))],
)
def test_stochastic_sampler_gives_the_same_sample_from_the_same_normals(
    make: Callable[[], Solver], peer: Peer, sde: GaussianSDE
) -> None:
    same(*run_both(make(), peer, sde))


@pytest.mark.skipif(not installed("k-diffusion"), reason="k-diffusion is not installed")
def test_churn_gives_the_same_sample_from_the_same_normals() -> None:
    solver = Churn(churn=10.0, low=0.05, high=50.0)
    same(*run_both(solver, PEERS["k-diffusion heun(churn)"], EDM()))


@pytest.mark.skipif(not installed("diffusers"), reason="diffusers is not installed")
def test_reverse_diffusion_gives_the_same_sample_from_the_same_normals() -> None:
    same(*run_both(named("reverse_diffusion")(), PEERS["diffusers sde_ve"], EDM()))


@pytest.mark.skipif(not installed("k-diffusion"), reason="k-diffusion is not installed")
@pytest.mark.parametrize("sde", PROCESSES.values(), ids=PROCESSES)
def test_two_stage_sde_solver_gives_the_same_sample_on_the_same_brownian_path(
    sde: GaussianSDE,
) -> None:
    """k-diffusion asks for the noise of half a step, then of the whole step on the same path.

    In the x0 form that path runs in the clock 1/k^2, k = sigma/alpha, so the whole step's normal is
    (a z_1 + b z_2)/sqrt(a^2 + b^2) with a^2 and b^2 the two parts of its length.
    """
    model = ss.targets.ring(5, 1.0, 0.3).score_model(sde)
    times = ss.make_grid("sqrt_angle", sde, STEPS).times
    start, *draws = normals(1 + 2 * STEPS)
    x = sde.prior_std * start
    ours_next, theirs_next = iter(draws), iter(draws)
    halves: list[tuple[float, Tensor]] = []

    def clock(t: float) -> float:
        return float(sde.log_snr(t).exp())

    def of_path(like: Tensor, t: float, s: float) -> Tensor:
        if not halves:
            halves.append((s, next(theirs_next)))
            return halves[0][1]
        middle, first = halves.pop()
        a, b = clock(middle) - clock(t), clock(s) - clock(middle)
        return (math.sqrt(a) * first + math.sqrt(b) * next(theirs_next)) / math.sqrt(a + b)

    ours = ss.plan("dpmpp_sde", sde, times).run(
        model, x, CallableNoise(lambda like, t, s: next(ours_next))
    )
    same(ours, PEERS["k-diffusion dpmpp_sde"].run(model, sde, times, x, of_path))


SINGLESTEP = {
    "dpmpp_2s": "diffusers dpmsolver++ 2S",
    "dpm_solver_2": "diffusers dpmsolver 2S",
}


@pytest.mark.skipif(not installed("diffusers"), reason="diffusers is not installed")
@pytest.mark.parametrize("name", SINGLESTEP)
@pytest.mark.parametrize("sde", PROCESSES.values(), ids=PROCESSES)
def test_singlestep_solver_agrees_where_the_grid_holds_its_inner_nodes(
    name: str, sde: GaussianSDE
) -> None:
    """diffusers takes its inner nodes from the grid; ours lie in the middle of the step.

    On a grid even in log-SNR both are the same, but for the last step of an odd number, which is of
    order 1. (Its order 3 has an inner stage of its own, neither DPM-Solver-3 nor ours.)
    """
    model = ss.targets.ring(5, 1.0, 0.3).score_model(sde)
    fine = ss.make_grid("log_snr", sde, STEPS).times
    (start,) = normals(1)
    x = sde.prior_std * start
    ours = ss.plan(name, sde, fine[::2]).run(model, x)
    ours = ss.plan("ddim", sde, fine[-2:]).run(model, ours)
    same(ours, PEERS[SINGLESTEP[name]].run(model, sde, fine, x, None))


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2"])
def test_torchdiffeq_takes_the_same_fixed_steps_on_the_same_flow(method: str) -> None:
    odeint = pytest.importorskip("torchdiffeq").odeint
    sde = PROCESSES["VP"]
    model = ss.targets.ring(5, 1.0, 0.3).score_model(sde)
    times = ss.make_grid("quadratic", sde, STEPS).times
    (x,) = normals(1)
    theirs = odeint(
        lambda t, y: model.predict("flow", y, t), x, torch.tensor(times, dtype=F64), method=method
    )[-1]
    ours = ss.plan(f"{method.removesuffix('2')}_flow", sde, times).run(model, x)
    same(ours, theirs)


def test_benchmark_gives_each_sampler_the_calls_of_its_budget_and_no_more() -> None:
    case = nfe.CASES["few 4-D off-centre, flow"]()
    samplers = {name: nfe.our_sampler(named(name)()) for name in ("euler", "heun", "ab2_v")}
    grids = {name: nfe.GRIDS[name] for name in ("flow", "uniform", "log_snr")}
    scores = nfe.compare(case, samplers, grids, (7, 21), starts=6, screen=4)
    for budget in (7, 21):
        calls = {s.sampler: s.calls for s in scores if s.budget == budget}
        assert calls == {"euler": budget, "heun": budget - 1, "ab2_v": budget}
        assert {s.grid for s in scores if s.budget == budget} == {"flow", "log_snr"}
    best = [min(s.rms for s in scores if s.budget == budget) for budget in (7, 21)]
    assert best[1] < best[0] / 3


def test_forty_names_of_the_registry_have_a_peer() -> None:
    tables = (DETERMINISTIC, ON_THE_FLOW, ON_SIGMA, STOCHASTIC, UNIT_LENGTH, SINGLESTEP)
    names = {name for table in tables for name in table} & set(REGISTRY)
    assert len(names | {"edm_churn", "reverse_diffusion", "dpmpp_sde", "midpoint_flow"}) >= 40
    assert {peer.library for peer in PEERS.values()} <= set(LIBRARIES)
