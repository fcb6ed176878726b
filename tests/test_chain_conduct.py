"""Chains on scores alone, on periodic targets, on what is not finite, and on careless input."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.kernels import (
    BAOAB,
    HMC,
    KERNELS,
    MALA,
    OBABO,
    ULA,
    ChainNoise,
    Kernel,
    ParallelTempering,
    Splitting,
    Target,
    as_target,
)
from scoresolve.kernels.base import metropolis

F64 = torch.float64
NORMAL = Target(lambda x: (-x.square().sum(1) / 2, -x), True)


def points(n: int, dimension: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dimension, generator=generator, dtype=F64)


# The score alone


def proposals(mixture: ss.GaussianMixture, h: float, n: int) -> tuple[Any, ...]:
    """Ends of leapfrog trajectories of ten steps from exact starts, and the change of kinetic
    energy."""
    x = mixture.sample(n, seed=5)
    target, p = as_target(mixture), points(*x.shape, seed=1)
    size = torch.full((n, 1), h, dtype=F64)
    new, r = ss.kernels.leapfrog(target, target(x), p, size, 10)
    return target(x), new, (p.square() - r.square()).sum(1) / 2


@pytest.mark.parametrize(("dimension", "h"), [(1, 0.84), (2, 0.63), (3, 0.62), (16, 0.5)])
def test_decisions_from_the_score_alone_are_those_of_the_density(dimension: int, h: float) -> None:
    """By three fixed nodes one in twenty to forty is another one, and more of them too many."""
    mixture = ss.targets.random_mixture(dimension, 10)
    if dimension == 16:
        mixture = ss.GaussianMixture([1.0, 2.0, 1.0], points(3, 16) / 2, 0.5)
    n = 4000
    old, new, kinetic = proposals(mixture, h, n)

    def decided(nodes: int, refined: bool) -> Tensor:
        alone = as_target(lambda x, t: mixture.score(x), nodes=nodes)
        if not refined:
            alone.of_rows = None
        state = metropolis(
            old._replace(log_prob=None),
            new._replace(log_prob=None),
            kinetic,
            alone,
            ChainNoise(ss.Philox(3)),
        )
        return (state.point.x == new.x).all(1)

    exact = metropolis(old, new, kinetic, as_target(mixture), ChainNoise(ss.Philox(3)))
    accepted = (exact.point.x == new.x).all(1)
    assert 0.4 < float(accepted.double().mean()) < 0.95
    assert int((decided(3, True) != accepted).sum()) <= n / 1000
    assert int((decided(3, False) != accepted).sum()) > n / 100


def test_only_chains_that_need_it_are_asked_again_with_their_conditions() -> None:
    """Chains on a Gaussian are settled by three nodes; some with two modes are not."""
    asked = list[Tensor]()

    def score(x: Tensor, t: Tensor, apart: Tensor) -> Tensor:
        asked.append(apart[:, 0])
        return apart * torch.tanh(apart * x) - x  # (N(apart, 1) + N(-apart, 1)) / 2

    apart = torch.tensor([[0.0], [2.0], [0.0], [2.0]], dtype=F64)
    x = points(4, 1)
    out = ss.run_chains(score, x=x, kernel=HMC(0.7, 8), steps=60, apart=ss.per_sample(apart))
    parts = [some for some in asked if len(some) < 4]
    assert parts and all((some == 2).all() for some in parts)
    assert out.calls == len(asked) and out.nfe > 1 + 60 * 11  # a part may ask a chain thrice
    part = ss.run_chains(score, x=x, kernel=HMC(0.7, 8), steps=60, apart=apart, chunk=3)
    assert torch.equal(part.samples, out.samples) and part.nfe == out.nfe  # type: ignore[arg-type]


def test_a_score_of_one_batch_size_gives_the_same_chains() -> None:
    centre, x = torch.full((6, 1), 2.0, dtype=F64), points(6, 1)

    def score(x: Tensor, t: Tensor, centre: Tensor = centre) -> Tensor:
        return centre * torch.tanh(centre * x) - x

    held = ss.run_chains(lambda x, t: score(x, t), x=x, kernel=HMC(0.7, 8), steps=20)
    given = ss.run_chains(score, x=x, kernel=HMC(0.7, 8), steps=20, centre=centre)
    torch.testing.assert_close(held.samples, given.samples, rtol=1e-12, atol=1e-12)
    assert held.calls == held.nfe > given.nfe


# Resonance


@pytest.mark.parametrize("dimension", [1, 2, 16, 64])
def test_hmc_does_not_resonate_on_a_round_gaussian(dimension: int) -> None:
    """|x| of a direction mixes, at best by one in three draws as the phase is random; by steps of
    one size one in forty where the length is nearly a period."""
    out = ss.run_chains(NORMAL, x=points(10, dimension), kernel="hmc", steps=400, warmup=150)
    assert out.samples is not None
    sizes = ss.diagnose(out.samples.square())
    assert float(sizes.ess_bulk.min()) / (400 * 10) > 0.08
    assert float(ss.diagnose(out).rhat.max()) < 1.03


def test_every_chain_draws_a_length_of_its_own_that_its_neighbours_do_not_change() -> None:
    x = torch.zeros(6, 1, dtype=F64)
    flat = Target(lambda x: (0 * x[:, 0], 0 * x), True)
    target, h = flat, torch.full((6, 1), 0.1, dtype=F64)

    def lengths(rows: slice) -> Tensor:
        noise = ChainNoise(ss.Philox(0, rows.start))
        kernel, start = HMC(0.1, 5), x[rows]
        after = kernel.step(kernel.start(start, target, noise), target, noise, h[rows])
        p = ss.Philox(0, rows.start).normal(start, 0, ss.noise.Purpose.CHAIN)
        return (after.point.x / p / 0.5)[:, 0]

    every = lengths(slice(0, 6))
    assert len(every.unique()) == 6 and bool(((every - 1).abs() < 0.2).all())
    assert torch.equal(lengths(slice(2, 5)), every[2:5])


# What is not finite

UNADJUSTED: list[Kernel] = [
    ULA(0.01),
    BAOAB(0.1),
    OBABO(0.1),
    Splitting("BAOAB", 0.1),
    Splitting("BABOBAB", 0.1),
]
GAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "energy": lambda x: (torch.where(x[:, 0] > 3, torch.nan, -x.square().sum(1) / 2), -x),
    "infinite": lambda x: (torch.where(x[:, 0] > 3, -torch.inf, -x.square().sum(1) / 2), -x),
    "score": lambda x: (-x.square().sum(1) / 2, torch.where(x > 3, torch.nan, -x)),
}


class Known(ss.Model):
    """A model with the given log-density and score."""

    sde = None

    def __init__(self, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.both = both

    def predict(self, prediction: str, x: Tensor, t: object, **cond: object) -> Tensor:
        return self.both(x)[1]

    def log_prob_and_score(self, x: Tensor, t: object) -> tuple[Tensor, Tensor]:
        return self.both(x)


@pytest.mark.parametrize("kernel", UNADJUSTED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("gap", GAPS)
def test_an_unadjusted_chain_that_meets_what_is_not_finite_has_failed(
    kernel: Kernel, gap: str
) -> None:
    """The second chain starts in the gap and may leave it; its neighbours stay as they were."""
    x = torch.tensor([[0.5], [3.0001], [-1.0]], dtype=F64)
    out = ss.run_chains(Known(GAPS[gap]), x=x, kernel=kernel, steps=60)
    alone = ss.run_chains(
        Known(lambda x: (-x.square().sum(1) / 2, -x)), x=x, kernel=kernel, steps=60
    )
    assert out.status.tolist() == [0, 1, 0]
    assert torch.equal(out.x[[0, 2]], alone.x[[0, 2]])
    annealed = ss.simulated_annealing(Known(GAPS[gap]), [1.0, 1.0], x=x, kernel=kernel, steps=30)
    assert annealed.status.tolist() == [0, 1, 0]


@pytest.mark.parametrize("gap", GAPS)
def test_adjusted_chains_refuse_to_go_there(gap: str) -> None:
    x = torch.full((50, 1), 2.0, dtype=F64)
    for kernel in (MALA(0.5), HMC(0.3, 3), ParallelTempering(MALA(0.5), [1.0, 0.3])):
        out = ss.run_chains(Known(GAPS[gap]), x=x, kernel=kernel, steps=60)
        assert out.ok.all() and out.samples is not None and float(out.samples.max()) <= 3
        start = torch.tensor([[4.0]], dtype=F64)
        if gap != "infinite":  # from where the density vanishes any move is accepted
            stuck = ss.run_chains(Known(GAPS[gap]), x=start, kernel=kernel, steps=9)
            assert stuck.status.tolist() == [1]


# The same bits


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("covariance", [None, "matrix"])
@pytest.mark.parametrize("name", [*KERNELS, "alone", "tempered"])
def test_with_a_score_of_each_row_alone_a_chain_has_the_same_bits_in_any_batch(
    name: str, covariance: str | None, dtype: torch.dtype
) -> None:
    variance = torch.linspace(0.3, 2.0, 5, dtype=dtype)

    def energy(x: Tensor, t: Tensor) -> Tensor:
        return (x.square() / variance).sum(1) / 2

    density: Any = lambda x, t: -x / variance  # noqa: E731
    kernel: Any = {"alone": "hmc", "tempered": ParallelTempering(HMC(0.4, 3), [1.0, 0.4])}
    if name not in ("alone", "ula"):
        density = ss.from_energy(energy)
    x = points(11, 5).to(dtype)
    options: dict[str, Any] = {"x": x, "kernel": kernel.get(name, name), "steps": 8}
    if covariance:
        mixing = points(5, 5, seed=2).to(dtype)
        options["covariance"] = mixing @ mixing.mT + torch.eye(5, dtype=dtype)
    if name in ("ula", "baoab", "obabo"):
        options["step_size"] = 0.05
    else:
        options["warmup"] = 4
    whole = ss.run_chains(density, **options)
    for chunk in (1, 7):
        part = ss.run_chains(density, **options, chunk=chunk)
        assert torch.equal(part.samples, whole.samples)  # type: ignore[arg-type]
        assert torch.equal(part.step_size, whole.step_size)


# The surroundings


@pytest.mark.parametrize("marked", [False, True])
def test_conditions_as_long_as_the_batch_are_read_right_or_refused(marked: bool) -> None:
    x, table, own = points(6, 2), torch.linspace(-1, 1, 6), torch.arange(6).flip(0)
    sde, ref = ss.VP(), ss.shared(table) if marked else table

    def looked_up(x: Tensor, t: Tensor, table: Tensor, own: Tensor) -> Tensor:
        return table[own][:, None] - x

    def pooled(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return table.square().mean() - x

    verbs: list[Callable[..., Tensor]] = [
        lambda net, **k: ss.run_chains(net, x=x, t=0.5, kernel=ULA(0.1), steps=2, **k).x,
        lambda net, **k: ss.annealed_langevin(net, sde, [0.5, 0.1], x=x, steps=2, **k).x,
        lambda net, **k: ss.simulated_annealing(net, [1.0], x=x, t=0.5, kernel=ULA(0.1), **k).x,
    ]
    for verb in verbs:
        found = [verb(looked_up, table=ref, own=own, chunk=chunk) for chunk in (4, 6)]
        assert torch.equal(*found)
        if marked:
            assert torch.equal(*(verb(pooled, table=ref, chunk=chunk) for chunk in (4, 6)))
        else:
            with pytest.raises(ArgumentError, match="table"):
                verb(pooled, table=ref, chunk=4)


def test_chains_work_under_any_default_device_dtype_and_in_inference_mode() -> None:
    x = points(4, 2)
    energy = ss.from_energy(lambda x, t: x.square().sum(1) / 2)

    def run() -> list[Tensor]:
        temper = ParallelTempering(MALA(0.2), [1.0, 0.5])
        kernels: list[Any] = ["mala", HMC(), temper]
        found = [ss.run_chains(energy, x=x, kernel=kernel, steps=4, warmup=3) for kernel in kernels]
        score = ss.run_chains(lambda x, t: -x, x=x, kernel="mala", steps=4, t=0.5)
        annealed = ss.simulated_annealing(energy, [0.5, 1.0], x=x)
        return [*(chains.x for chains in found), score.x, annealed.x]

    plain = run()
    with torch.device("meta"):
        others = [run()]
    with torch.inference_mode():
        others.append(run())
        inside = x.clone()
        assert torch.equal(
            ss.run_chains(energy, x=inside, kernel=HMC(), steps=2).x.clone(),
            ss.run_chains(energy, x=x, kernel=HMC(), steps=2).x,
        )
    before = torch.get_default_dtype()
    for dtype in (torch.float16, F64):
        torch.set_default_dtype(dtype)
        try:
            others.append(run())
        finally:
            torch.set_default_dtype(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("kernel", [ULA(0.1), MALA(0.3), BAOAB(0.3), HMC(0.3, 3)])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_score_that_writes_into_its_input_spoils_nothing(kernel: Kernel, hidden: bool) -> None:
    def careless(x: Tensor, t: Tensor) -> Tensor:
        return (x.data if hidden else x).mul_(-0.5)

    x = points(5, 2)
    before = x.clone()
    found = ss.run_chains(careless, x=x, kernel=kernel, steps=8)
    wanted = ss.run_chains(lambda x, t: -0.5 * x, x=x, kernel=kernel, steps=8)
    assert torch.equal(found.samples, wanted.samples)  # type: ignore[arg-type]
    assert torch.equal(x, before)


def test_a_score_that_begins_to_write_later_is_refused() -> None:
    calls = 0

    def late(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.neg_() if calls == 3 else -x

    with pytest.raises(ArgumentError, match="wrote into its input"):
        ss.run_chains(late, x=points(3, 2), kernel=ULA(0.1), steps=5)


def test_a_score_may_write_into_its_time() -> None:
    times = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        t.mul_(1000)
        return -x

    ss.run_chains(score, x=points(1, 2), kernel=ULA(0.1), steps=3, t=0.5)
    assert times == [0.5] * 4


def test_careless_input_gets_a_sentence_before_the_first_call() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    x = points(4, 2)
    states: list[tuple[Any, type[Exception]]] = [
        (x[:, :0], ShapeError),
        (x.to(torch.float8_e4m3fn), ArgumentError),
        (x.to("meta"), ArgumentError),
        (x.to_sparse(), ArgumentError),
        (x.to(torch.complex128), ArgumentError),
        (x.long(), ArgumentError),
        ([[1.0]], ArgumentError),
    ]
    sde = ss.VP()
    for state, error in states:
        with pytest.raises(error, match=r"give|need"):
            ss.run_chains(score, x=state)
        with pytest.raises(error, match=r"give|need"):
            ss.simulated_annealing(score, [1.0], x=state)
        with pytest.raises(error, match=r"give|need"):
            ss.annealed_langevin(score, sde, [0.5], x=state)
    wrong: list[tuple[str, Any]] = [
        ("steps", "10"),
        ("steps", 10**12),
        ("warmup", 10**12),
        ("steps", True),
        ("nodes", 10**9),
        ("t", "0.3"),
        ("t", math.nan),
        ("step_size", torch.tensor([1j] * 4)),
        ("covariance", torch.eye(2) * 1j),
    ]
    for name, value in wrong:
        with pytest.raises((ArgumentError, ShapeError), match=name):
            ss.run_chains(score, x=x, **{name: value})
    with pytest.raises(ArgumentError, match="thin="):
        ss.run_chains(score, x=torch.zeros(4096, 64), steps=2**30)  # 1 PiB
    with pytest.raises(ArgumentError, match="t ="):
        ss.run_chains(ss.targets.ring().score_model(sde), x=x, t=7.0)
    with pytest.raises(ArgumentError, match=r"stepz.*did you mean steps= for stepz="):
        ss.run_chains(score, x=x, stepz=3)
    with pytest.raises(ArgumentError, match="stepz would go to the score"):
        ss.simulated_annealing(score, [1.0], x=x, stepz=3)
    with pytest.raises(ArgumentError, match="jitter"):
        HMC(jitter=1.0)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bool, torch.int64])
def test_a_score_or_density_of_another_kind_of_number_is_refused(dtype: torch.dtype) -> None:
    x = points(3, 2)
    with pytest.raises(ArgumentError, match="real floating"):
        ss.run_chains(lambda x, t: x.to(dtype), x=x)
    with pytest.raises(ArgumentError, match="real floating"):
        ss.run_chains(Known(lambda x: (x.sum(1).to(dtype), -x)), x=x)
    with pytest.raises(ArgumentError, match="real floating"):
        ss.run_chains(ss.from_energy(lambda x, t: x.sum(1).to(dtype)), x=x)
    with pytest.raises(ArgumentError, match="no gradient in x"):
        ss.run_chains(ss.from_energy(lambda x, t: x.detach().sum(1)), x=x)
    with pytest.raises(ArgumentError, match="real floating"):
        ss.diagnose(torch.zeros(8, 2, 1).to(dtype))
    with pytest.raises(ShapeError, match="one number per sample"):
        ss.run_chains(Known(lambda x: (x, -x)), x=x)


def square(x: Tensor, t: Tensor) -> Tensor:
    return x.square().sum(1) / 2


def ends(kernel: Kernel) -> Tensor:
    return ss.run_chains(ss.from_energy(square), x=points(3, 2), kernel=kernel, steps=3).x


def test_results_and_kernels_travel_between_processes() -> None:
    kernels = [ULA(0.1), HMC(0.2, 3, jitter=0.1), Splitting("BAOAB", 0.1), MALA(torch.ones(3))]
    kernels.append(ParallelTempering(MALA(0.1), [1.0, 0.5]))
    energy, x = ss.from_energy(square), points(3, 2)
    normal = ss.targets.gaussian([0.0, 0.0], 1.0)
    results: list[Any] = [
        ss.run_chains(energy, x=x, steps=5),
        ss.simulated_annealing(energy, [1.0], x=x),
        ss.annealed_importance(energy, normal, [0.0, 1.0], x=x),
        ss.diagnose(ss.run_chains(energy, x=x, steps=5)),
    ]
    for result in results:
        for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert repr(again) == repr(result)
    for kernel in kernels:
        for again in (pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel)):
            assert torch.equal(ends(again), ends(kernel))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.map_async(ends, kernels[:2]).get(timeout=60)
    assert all(torch.equal(a, ends(kernel)) for a, kernel in zip(found, kernels, strict=False))


def test_simulated_annealing_takes_a_score_at_a_time() -> None:
    """The highest point of p_t, from the score alone."""
    mixture, sde = ss.GaussianMixture([1.0, 3.0], [[-1.0], [1.5]], [[0.3], [0.2]]), ss.VP()
    model, betas = mixture.score_model(sde), 2.0 ** torch.arange(0, 12)
    x = mixture.sample(60)
    out = ss.simulated_annealing(
        lambda y, t: model(y, t),
        betas,
        x=x,
        kernel=HMC(0.6, 4),
        steps=10,
        step_sizes=betas.rsqrt(),
        t=1e-3,
    )
    known = ss.simulated_annealing(
        model, betas, x=x, kernel=HMC(0.6, 4), steps=10, step_sizes=betas.rsqrt(), t=1e-3
    )
    assert out.value is None and known.value is not None and out.ok.all()
    line = torch.linspace(1, 2, 2001, dtype=F64)[:, None]
    mode = float(line[mixture.marginal(sde, 1e-3).log_prob(line).argmax()])
    for found in (out, known):
        assert float((found.x - mode).abs().quantile(0.5)) < 0.03
    with pytest.raises(ArgumentError, match="neither time nor conditions"):
        ss.simulated_annealing(mixture, [1.0], x=x, stepz=3)
