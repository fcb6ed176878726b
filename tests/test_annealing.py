"""Chains through sequences of densities: where they end, and the normaliser they measure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, GridError, ShapeError, SolveError, Status
from scoresolve.kernels import BAOAB, HMC, MALA, ULA, Kernel, ParallelTempering, Tilted, as_target
from scoresolve.noise import Philox, Purpose, Times

F64 = torch.float64
MIX = ss.GaussianMixture([1.0, 2.0], [[-1.5, 0.0], [1.5, 0.5]], [0.3, 0.2])
WIDE = ss.GaussianMixture([1.0], [[0.0, 0.0]], 6.0)
LOG_Z = 3.0
ENERGY = ss.from_energy(lambda x, t: -MIX.log_prob(x) - LOG_Z)
BETAS = torch.linspace(0, 1, 21, dtype=F64) ** 2


def standard_errors(x: Tensor, law: ss.GaussianMixture) -> Tensor:
    """Distance of the mean and of the spread about the exact mean, in standard errors."""
    centred = x.double() - law.mean
    squares = centred.square() - law.covariance.diagonal()
    return torch.stack(
        [v.mean(0) / (v.std(0) / math.sqrt(len(x))) for v in (centred, squares)]
    ).abs()


LEVELS = torch.logspace(math.log10(9.9), math.log10(0.3), 8).tolist()


# Noise levels


@pytest.mark.parametrize("kernel", [MALA(0.3), HMC(0.7, 3), BAOAB(0.4)])
def test_annealed_langevin_ends_at_the_data(kernel: Kernel) -> None:
    """Both modes in their shares, though at the last level no chain could cross."""
    sde = ss.VE(sigma_min=0.01, sigma_max=10.0)
    times = [float(sde.time_from_log_snr(-2 * torch.tensor(s).log())) for s in LEVELS]
    x = ss.Philox(0).normal(torch.empty(2000, 2, dtype=F64), 0) * 10
    out = ss.annealed_langevin(MIX.score_model(sde), sde, times, x=x, kernel=kernel, steps=40)
    law = MIX.marginal(sde, times[-1])
    assert out.ok.all() and standard_errors(out.x, law).max() < 4.5
    assert out.nfe == out.calls == len(times) * (1 + 40 * kernel.evaluations)
    assert (out.acceptance is not None) is kernel.adjusted
    if out.acceptance is not None:
        assert out.acceptance.shape == (len(times), 2000) and (out.acceptance.mean(1) > 0.5).all()


def test_annealed_langevin_is_the_published_loop() -> None:
    """x <- x + alpha_i/2 score + sqrt(alpha_i) z, alpha_i = eps sigma_i^2 / sigma_L^2."""
    sde = ss.VE(sigma_min=0.01, sigma_max=1.0)
    times = [1.0, 0.6, 0.2, 0.01]
    sigmas = [float(sde.sigma(t)) for t in times]
    model, x = MIX.score_model(sde), WIDE.sample(7)
    out = ss.annealed_langevin(model, sde, times, x=x, steps=5, seed=3)
    noise, draw = ss.Philox(3), 0
    for t, sigma in zip(times, sigmas, strict=True):
        alpha = 2e-5 * sigma**2 / 0.01**2
        for _ in range(5):
            z = noise.normal(x, draw, ss.noise.Purpose.CHAIN)
            x, draw = x + alpha / 2 * model(x, t) + math.sqrt(alpha) * z, draw + 1
    torch.testing.assert_close(out.x, x, rtol=1e-9, atol=1e-9)


# Inverse temperatures


@pytest.mark.arithmetic
def test_simulated_annealing_finds_the_global_minimum() -> None:
    """A rugged bowl: local minima 2.1 apart, the least at 0, from starts far away."""
    rugged = ss.from_energy(lambda x, t: (0.15 * x.square() + 1 - torch.cos(3 * x)).sum(1))
    betas = 2.0 ** torch.arange(-1.0, 4.5, 0.25)
    x = WIDE.sample(100) * 2
    out = ss.simulated_annealing(
        rugged,
        betas,
        x=x,
        kernel=HMC(0.8, 3, jitter=0.0),
        steps=30,
        step_sizes=betas.sqrt().reciprocal(),
    )
    assert out.value is not None and out.acceptance is not None
    torch.testing.assert_close(out.value, -rugged.energy(out.x, out.x), rtol=1e-9, atol=1e-9)
    found = float((out.x.abs().amax(1) < 0.3).double().mean())
    quench = ss.simulated_annealing(rugged, [16.0], x=x, kernel=HMC(0.07, 3), steps=len(betas) * 10)
    # 3000 chains find 0.76 and 0.032: a share of 100 is within 4 deviations of 0.043 and 0.018
    assert found > 0.58 > 0.11 > float((quench.x.abs().amax(1) < 0.3).double().mean())


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_each_level_of_annealing_has_its_law(beta: float) -> None:
    """N(0, I) tilted by exp(beta <a, x>) is N(beta a, I)."""
    a = torch.tensor([1.0, -0.5], dtype=F64)
    line = ss.from_energy(lambda x, t: -x @ a)
    base = ss.GaussianMixture([1.0], [[0.0, 0.0]], 1.0)
    out = ss.simulated_annealing(
        line, [beta / 2, beta], x=base.sample(4000), base=base, kernel=HMC(0.5, 3), steps=15
    )
    law = ss.GaussianMixture([1.0], [(beta * a).tolist()], 1.0)
    assert standard_errors(out.x, law).max() < 4.5


# The normaliser


def importance(seed: int, n: int = 1500, **options: Any) -> ss.ImportanceEstimate:
    options = {"kernel": HMC(0.5, 3), **options}
    return ss.annealed_importance(
        ENERGY, WIDE, BETAS, x=WIDE.sample(n, seed=seed), seed=seed, **options
    )


@pytest.mark.parametrize("kernel", [HMC(0.5, 3), MALA(0.2)])
def test_log_z_of_a_mixture_is_within_its_standard_error(kernel: Kernel) -> None:
    """Ten runs: their mean is unbiased to their error, which has the size it says."""
    runs = [importance(seed, kernel=kernel) for seed in range(10)]
    z = torch.tensor([(run.log_z - LOG_Z) / run.standard_error for run in runs])
    assert abs(float(z.mean())) < 4 / math.sqrt(10)
    assert 0.4 < float(z.std()) < 1.7
    assert all(run.standard_error < 0.06 and run.effective_size > 300 for run in runs)
    weights = runs[0].log_weights.softmax(0)
    mean = weights @ runs[0].x
    assert float((mean - MIX.mean).norm()) < 0.3


@pytest.mark.parametrize("scale", [0.03, 10.0])
def test_a_pilot_finds_the_step_sizes_and_has_no_part_in_the_estimate(scale: float) -> None:
    """From steps 17 times too small and 20 times too large; the runs that follow are unbiased."""
    adapted, z = list[Tensor](), list[float]()
    for seed in range(3):
        x, pilot = WIDE.sample(400, seed=seed).split([320, 80])
        options: dict[str, Any] = {"x": x, "seed": seed, "kernel": HMC(scale, 2)}
        found = ss.annealed_importance(ENERGY, WIDE, BETAS, pilot=pilot, **options)
        given = ss.annealed_importance(ENERGY, WIDE, BETAS, step_sizes=found.step_sizes, **options)
        assert torch.equal(given.log_weights, found.log_weights)
        assert found.nfe == given.nfe and found.calls == given.calls + 1 + 20 * 10 * 2
        adapted.append(found.acceptance[5:].mean(1))
        z.append((found.log_z - LOG_Z) / found.standard_error)
    assert float((torch.stack(adapted) - 0.651).abs().max()) < 0.15
    assert abs(sum(z) / 3) < 4 / math.sqrt(3) and max(map(abs, z)) < 4
    told = str(found)
    assert f"{found.log_z:.4f} +- {found.standard_error:.4f}" in told and "of 320 chains" in told


class Addresses(Philox):
    """Notes where its numbers are read."""

    def __init__(self, seen: list[tuple[Purpose, int]]) -> None:
        super().__init__()
        self.seen = seen

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        self.seen.append((purpose, draw))
        return super().normal(like, draw, purpose, times)

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        self.seen.append((purpose, draw))
        return super().uniform(like, draw, purpose)

    def rows(self, index: slice | Tensor) -> Philox:
        return self


@pytest.mark.parametrize("kernel", [HMC(0.5, 1), MALA(0.2)])
def test_a_pilot_reads_numbers_of_its_own(kernel: Kernel) -> None:
    seen = list[tuple[Purpose, int]]()
    x, pilot = WIDE.sample(20).split([15, 5])
    ss.annealed_importance(
        ENERGY, WIDE, BETAS, x=x, pilot=pilot, kernel=kernel, steps=7, noise=Addresses(seen)
    )
    assert len(set(seen)) == len(seen) > 20 * (7 + 10)


def test_weights_are_those_of_their_definition() -> None:
    """Without moves (a step of size 0, as good as), log w is log p - log q at the start."""
    x = WIDE.sample(50)
    out = ss.annealed_importance(ENERGY, WIDE, [0.0, 0.3, 1.0], x=x, kernel=HMC(1e-12, 1))
    expected = MIX.log_prob(x) + LOG_Z - WIDE.log_prob(x)
    torch.testing.assert_close(out.log_weights, expected, rtol=1e-6, atol=1e-6)
    assert out.log_z == pytest.approx(float(expected.logsumexp(0)) - math.log(50), abs=1e-6)
    w = expected.exp()
    error = float(w.std() / w.mean()) / math.sqrt(50)
    assert out.standard_error == pytest.approx(error, rel=1e-5)
    assert out.effective_size == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-5)
    assert out.nfe == 3 and out.calls == 3


def test_one_density_has_the_ratio_one_whatever_happens() -> None:
    out = ss.annealed_importance(WIDE, WIDE, BETAS, x=WIDE.sample(20))
    assert out.log_z == pytest.approx(0, abs=1e-12) and out.effective_size == pytest.approx(20)


# Chains as rows


def test_an_annealed_chain_does_not_know_its_batch() -> None:
    sde, x = ss.VP(), WIDE.sample(9)
    wave = ss.as_model(lambda x, t, shift: shift - x.sin(), sde)
    shift = WIDE.sample(9, seed=1)

    def run(**options: Any) -> ss.Annealed:
        return ss.annealed_langevin(
            wave, sde, [0.9, 0.5, 0.1], x=x, kernel=MALA(0.1), steps=4, shift=shift, **options
        )

    whole = run()
    for chunk in (1, 4):
        part = run(chunk=chunk)
        assert torch.equal(part.x, whole.x) and torch.equal(part.acceptance, whole.acceptance)
        assert part.nfe == whole.nfe and part.calls > whole.calls
    weights = importance(0, n=40).log_weights
    split = importance(0, n=40, chunk=7).log_weights
    torch.testing.assert_close(split, weights, rtol=1e-9, atol=1e-9)


def test_failures_are_told_and_left_out() -> None:
    x = WIDE.sample(200)
    broken = x.clone()
    broken[5] = torch.nan
    good = ss.annealed_importance(ENERGY, WIDE, BETAS, x=x)
    bad = ss.annealed_importance(ENERGY, WIDE, BETAS, x=broken)
    assert bad.status.nonzero().flatten().tolist() == [5]
    keep = torch.arange(200) != 5
    torch.testing.assert_close(bad.log_weights[keep], good.log_weights[keep])
    assert bad.log_z == pytest.approx(
        float(good.log_weights[keep].logsumexp(0)) - math.log(199), abs=1e-9
    )
    with pytest.raises(SolveError, match="1 of 200"):
        ss.annealed_importance(ENERGY, WIDE, BETAS, x=broken, raise_on_failure=True)


def test_an_interrupt_hands_back_what_is_done() -> None:
    calls = 0

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return -x

    out = ss.annealed_langevin(
        score, ss.VP(), [0.9, 0.5], x=WIDE.sample(6), kernel=ULA(0.1), steps=5, chunk=2
    )
    assert out.status.tolist() == [0, 0, 4, 4, 4, 4]
    assert torch.isfinite(out.x[:4]).all() and out.x[4:].isnan().all()


def test_bad_input_is_refused() -> None:
    sde, x = ss.VP(), WIDE.sample(4)
    model = MIX.score_model(sde)
    for times in ([], [0.1, 0.5], [0.5, 0.5], [2.0, 0.5], [0.5, 0.0]):
        with pytest.raises(GridError, match="times"):
            ss.annealed_langevin(model, sde, times, x=x)
    for betas in ([], [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.7, 0.3, 1.0]):
        with pytest.raises(ArgumentError, match="betas"):
            ss.annealed_importance(MIX, WIDE, betas, x=x)
    with pytest.raises(ArgumentError, match="would bias log Z"):
        ss.annealed_importance(MIX, WIDE, BETAS, x=x, kernel=ULA(0.1))
    with pytest.raises(ArgumentError, match="no standard error"):
        ss.annealed_importance(MIX, WIDE, BETAS, x=x[:1])
    with pytest.raises(ShapeError, match="step_sizes"):
        ss.annealed_importance(MIX, WIDE, BETAS, x=x, step_sizes=[1.0])
    for pilot in (x[:, :1], x.float(), x[:0]):
        with pytest.raises(ShapeError, match="other samples of the base"):
            ss.annealed_importance(MIX, WIDE, BETAS, x=x, pilot=pilot)
    with pytest.raises(ArgumentError, match="temperatures of its own"):
        ss.annealed_importance(MIX, WIDE, BETAS, x=x, kernel=ParallelTempering(MALA(), [1.0, 0.5]))
    with pytest.raises(ArgumentError, match="betas are empty"):
        ss.simulated_annealing(ENERGY, [], x=x)
    with pytest.raises(ArgumentError, match="beta"):
        ss.simulated_annealing(ENERGY, [math.inf], x=x)
    with pytest.raises(ArgumentError, match="not only gradients"):
        ss.annealed_importance(lambda x, t: -x, WIDE, BETAS, x=x)
    for betas in ("abc", None, [1j], [[0.1], "a"]):
        with pytest.raises(ArgumentError, match="betas"):
            ss.simulated_annealing(ENERGY, betas, x=x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="float32 or float64"):
        ss.simulated_annealing(ENERGY, [1.0], x=x.half())
    with pytest.raises(ArgumentError, match="steps"):
        ss.simulated_annealing(ENERGY, [1.0], x=x, steps=0)


def test_a_tilted_target_keeps_its_base_inside_another() -> None:
    base = as_target(ss.targets.gaussian([0.0], 1.0))
    wide = ss.targets.gaussian([0.0], 4.0)
    slope = as_target(ss.from_energy(lambda x, t: -x[:, 0]))
    estimate = ss.annealed_importance(
        Tilted(base, slope), wide, torch.linspace(0, 1, 21), x=wide.sample(4000, seed=1)
    )
    assert abs(estimate.log_z - 0.5) < 4.5 * estimate.standard_error  # E exp(x) of N(0, 1)
    assert estimate.standard_error < 0.03


def box(x: Tensor, t: Tensor) -> Tensor:
    """The energy of 1 on |x| < 1."""
    return torch.where(x[:, 0].abs() < 1, 0.0, torch.inf) + 0 * x[:, 0]


def test_chains_outside_the_support_weigh_nothing_and_count() -> None:
    normal, inside = ss.targets.gaussian([0.0], 1.0), ss.from_energy(box)
    estimate = ss.annealed_importance(inside, normal, [0.0, 1.0], x=normal.sample(4000), seed=2)
    assert bool((estimate.status == Status.OK).all())
    assert abs(estimate.log_z - math.log(2)) < 4.5 * estimate.standard_error
    there = Tilted(as_target(normal), as_target(inside), 0.0)(torch.tensor([[3.0]]).double())
    torch.testing.assert_close(there.log_prob, normal.log_prob(there.x))


def test_annealing_takes_kernels_by_name_and_refuses_what_has_no_levels() -> None:
    x = torch.zeros(4, 1, dtype=torch.float64)
    energy = ss.from_energy(lambda x, t: x[:, 0] ** 2)
    assert ss.simulated_annealing(energy, [1.0, 2.0], x=x, kernel="mala").ok.all()
    langevin: Any = ss.Langevin(lambda x: -x)
    with pytest.raises(ArgumentError, match="Gaussian process"):
        ss.annealed_langevin(lambda x, t: -x, langevin, [0.5], x=x)


def test_an_interrupt_is_told_of_chains_outside_the_support_too() -> None:
    calls = 0

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return box(x, t)

    normal = ss.targets.gaussian([0.0], 1.0)
    x, betas = normal.sample(20), torch.linspace(0, 1, 9)
    estimate = ss.annealed_importance(ss.from_energy(interrupted), normal, betas, x=x)
    assert bool((estimate.log_weights == -math.inf).any())
    assert bool((estimate.status == Status.INTERRUPTED).all())
