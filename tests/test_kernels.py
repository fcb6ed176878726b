"""Markov chain kernels: what they leave invariant, and how far off the others are, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError, SolveError, UnknownNameError
from scoresolve.kernels import (
    BAOAB,
    HMC,
    KERNELS,
    MALA,
    OBABO,
    ULA,
    ChainNoise,
    DualAveraging,
    Kernel,
    ParallelTempering,
    Splitting,
    Target,
    Tilted,
    as_target,
    leapfrog,
    line_integral,
)
from scoresolve.kernels.target import column
from scoresolve.noise import NoiseSource, Purpose, Times

F64 = torch.float64
MIX = ss.GaussianMixture(
    [1.0, 2.0],
    [[-1.0, 0.0], [1.5, 0.5]],
    [[[1.0, 0.3], [0.3, 0.5]], [[0.4, 0.0], [0.0, 0.8]]],
)
ADJUSTED: dict[str, Kernel] = {
    "mala": MALA(0.4),
    "hmc": HMC(0.6, 3),
}


def energy(x: Tensor, t: Tensor) -> Tensor:
    """A density that is not Gaussian, -log pi up to a constant."""
    u = x.flatten(1)
    return u.square().square().sum(1) / 4 + (u.roll(1, 1) * u).sum(1) / 2 + u[:, 0]


ENERGY = ss.from_energy(energy)


class Script(NoiseSource):
    """The given normal numbers in turn, and uniform numbers that accept what can be."""

    def __init__(self, *numbers: Tensor) -> None:
        self.numbers = list(numbers)

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        return self.numbers.pop(0).reshape(like.shape).clone()

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        return torch.full_like(like, 1e-300)


def points(n: int, dimension: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dimension, generator=generator, dtype=F64)


# Detailed balance


def step_sizes(n: int) -> Tensor:
    return torch.linspace(0.05, 0.5, n, dtype=F64)


def test_mala_is_in_detailed_balance() -> None:
    """log pi(x) + log q(x -> y) + log a(x, y) is the same both ways, q the density of ULA."""
    x, y, h = points(50, 3, 0), points(50, 3, 1), step_sizes(50)
    target, kernel, wide = as_target(ENERGY), MALA(), column(step_sizes(50), points(50, 3, 0))

    def flow(a: Tensor, b: Tensor) -> Tensor:
        at = target(a)
        mean = a + wide * at.score
        z = (b - mean) / (2 * wide).sqrt()
        noise = ChainNoise(Script(z))
        after = kernel.step(kernel.start(a, target, noise), target, noise, wide)
        torch.testing.assert_close(after.point.x, b, rtol=1e-12, atol=1e-12)
        assert after.acceptance is not None
        log_q = -z.square().sum(1) / 2 - 1.5 * (4 * math.pi * h).log()
        return -energy(a, h) + log_q + after.acceptance.log()

    torch.testing.assert_close(flow(x, y), flow(y, x), rtol=1e-10, atol=1e-10)


def test_hmc_is_in_detailed_balance() -> None:
    x, p, h = points(50, 3, 0), points(50, 3, 1), column(step_sizes(50), points(50, 3, 0))
    target, kernel = as_target(ENERGY), HMC(leapfrogs=4, jitter=0.0)

    def flow(a: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        noise = ChainNoise(Script(momentum))
        after = kernel.step(kernel.start(a, target, noise), target, noise, h)
        assert after.acceptance is not None
        log_joint = -energy(a, h) - momentum.square().sum(1) / 2
        return log_joint + after.acceptance.log(), after.point.x

    _, r = leapfrog(target, target(x), p, h, 4)
    there, y = flow(x, p)
    back, again = flow(y, -r)
    torch.testing.assert_close(again, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-10)


def test_leapfrog_is_undone_by_itself_keeps_volume_and_is_of_second_order() -> None:
    target, x, p = as_target(ENERGY), points(5, 2, 2), points(5, 2, 3)
    h = torch.full((5, 1), 0.3, dtype=F64)
    there, r = leapfrog(target, target(x), p, h, 7)
    back, minus_p = leapfrog(target, there, -r, h, 7)
    torch.testing.assert_close(back.x, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(-minus_p, p, rtol=1e-11, atol=1e-11)

    def jump(state: Tensor) -> Tensor:
        point, momentum = leapfrog(smooth, smooth(state[None, :2]), state[None, 2:], h[:1], 7)
        return torch.cat([point.x[0], momentum[0]])

    smooth = Target(lambda u: (None, -(u**3) - u.roll(1, 1) - _first(u)), False)
    for state in torch.cat([x, p], 1):
        jacobian = torch.autograd.functional.jacobian(jump, state)
        assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-10)

    def drift(size: float, steps: int) -> float:
        end, momentum = leapfrog(target, target(x), p, torch.full((5, 1), size, dtype=F64), steps)
        assert end.log_prob is not None
        change = end.log_prob - momentum.square().sum(1) / 2
        return float((change + energy(x, h) + p.square().sum(1) / 2).abs().mean())

    assert math.log2(drift(0.04, 20) / drift(0.02, 40)) == pytest.approx(2, abs=0.2)


def _first(u: Tensor) -> Tensor:
    return torch.eye(u.shape[1], dtype=u.dtype)[0].expand_as(u)


def test_exchanges_are_in_detailed_balance() -> None:
    """With two replicas: pi_1(x) pi_2(y) a(x, y) = pi_1(y) pi_2(x) a(y, x)."""
    kernel, x, y = ParallelTempering(MALA(), [1.0, 0.3]), points(20, 3, 4), points(20, 3, 5)
    target = kernel.bind(as_target(ENERGY), x)

    def flow(first: Tensor, second: Tensor) -> Tensor:
        noise = ChainNoise(Script(), copies=2)
        state = kernel.start(first, target, noise)
        both = torch.stack([first, second], 1).flatten(0, 1)
        after = kernel.exchange(state._replace(point=target(both)), target, noise)
        swapped = torch.stack([second, first], 1).flatten(0, 1)
        expected = target(swapped)
        for found, exact in zip(after.point, expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert after.swaps is not None
        log_joint = -energy(first, first) - 0.3 * energy(second, second)
        return log_joint + after.swaps[:, 0].log()

    torch.testing.assert_close(flow(x, y), flow(y, x), rtol=1e-10, atol=1e-10)


# Invariance, by Monte Carlo on exact starts


def drifts(before: Tensor, after: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
    """How many standard errors the means of x, x x^T and log pi have moved."""

    def features(x: Tensor) -> Tensor:
        products = (x[:, :, None] * x[:, None]).flatten(1)
        return torch.cat([x, products, log_prob(x)[:, None]], 1)

    change = features(after) - features(before)
    return change.mean(0) / (change.std(0) / math.sqrt(len(change)))


@pytest.mark.parametrize("name", ADJUSTED)
def test_adjusted_kernels_leave_the_target_invariant(name: str) -> None:
    """Paired by chain; one in 16,000 means is off by more than 4 standard errors."""
    x = MIX.sample(20_000, seed=1)
    out = ss.run_chains(MIX, x=x, kernel=ADJUSTED[name], steps=12, keep=False, seed=2)
    assert out.ok.all() and float((out.x - x).square().mean()) > 0.3
    assert drifts(x, out.x, MIX.log_prob).abs().max() < 4


def test_tempered_replicas_stay_in_their_laws() -> None:
    """On N(m, S) the replica at beta has N(m, S / beta), so all can start exactly."""
    betas = [1.0, 0.5, 0.2]
    gaussian = ss.GaussianMixture([1.0], [[0.5, -1.0]], [[[1.0, 0.6], [0.6, 0.8]]])
    laws = [ss.GaussianMixture([1.0], gaussian.means, gaussian.covariances / b) for b in betas]
    exact = [law.sample(20_000, seed=i) for i, law in enumerate(laws)]
    kernel = ParallelTempering(MALA(0.4), betas)
    target = kernel.bind(as_target(gaussian), exact[0])
    noise = ChainNoise(ss.Philox(5), copies=3)
    state = kernel.start(exact[0], target, noise)
    state = state._replace(point=target(torch.stack(exact, 1).flatten(0, 1)))
    h = column(kernel.step_sizes(20_000, slice(0, 20_000), exact[0]), state.point.x)
    for _ in range(10):
        state = kernel.step(state, target, noise, h)
    ends = state.point.x.view(-1, 3, 2)
    for i, law in enumerate(laws):
        assert drifts(exact[i], ends[:, i], law.log_prob).abs().max() < 4
    rates = kernel.swap_rates(state).mean(0)
    assert (rates > 0.3).all() and (rates < 0.99).all()


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_the_score_alone_leaves_the_target_invariant(name: str) -> None:
    x = MIX.sample(10_000, seed=3)
    out = ss.run_chains(
        lambda x, t: MIX.score(x), x=x, kernel=ADJUSTED[name], steps=10, nodes=5, keep=False
    )
    assert out.log_prob is None and out.acceptance_error is not None
    assert float(out.acceptance_error.mean()) < 0.05
    assert drifts(x, out.x, MIX.log_prob).abs().max() < 4


def test_unadjusted_kernels_are_seen_to_be_wrong_where_they_are() -> None:
    """The same test is able to fail: a large step of ULA moves the moments."""
    x = MIX.sample(10_000, seed=1)
    out = ss.run_chains(MIX, x=x, kernel=ULA(0.4), steps=10, keep=False)
    assert drifts(x, out.x, MIX.log_prob).abs().max() > 20


def test_chains_far_away_arrive() -> None:
    x = torch.full((2000, 2), 8.0, dtype=F64)
    out = ss.run_chains(MIX, x=x, kernel="hmc", steps=1, warmup=150)
    z = (out.x.mean(0) - MIX.mean) / (MIX.covariance.diagonal() / len(x)).sqrt()
    assert z.abs().max() < 4


def test_a_warm_up_keeps_the_law_of_exact_starts() -> None:
    """A step size that follows the states of its chain up to the end lost 8 % of the variance."""
    x = MIX.sample(24_000, seed=3)
    out = ss.run_chains(MIX, x=x, kernel=HMC(0.6, 3), steps=1, warmup=150, keep=False)
    sizes, exact = ((y - MIX.mean).square().sum(1) for y in (out.x, MIX.sample(400_000)))
    error = float(exact.std()) * (1 / len(sizes) + 1 / len(exact)) ** 0.5
    assert abs(float(sizes.mean() - exact.mean())) < 4 * error


# Bias on Gaussians, exactly


def stationary(kernel: Kernel, precision: float, h: float) -> Tensor:
    """Covariance of (x, p), or of x, that a linear kernel reaches on N(0, 1 / precision).

    Its matrices are read off the kernel itself, one unit vector of (x, p) or noise at a time.
    """
    target = Target(lambda x: (None, -precision * x), False)
    size = torch.full((1, 1), h, dtype=F64)
    momentum = isinstance(kernel, Splitting)
    draws = kernel.word.count("O") if isinstance(kernel, Splitting) else 1

    def step(x: float, p: float, z: list[float]) -> list[float]:
        numbers = [torch.tensor([[v]], dtype=F64) for v in z]
        start = ChainNoise(Script(torch.full((1, 1), p, dtype=F64)))
        state = kernel.start(torch.full((1, 1), x, dtype=F64), target, start)
        state = kernel.step(state, target, ChainNoise(Script(*numbers)), size)
        ends = [state.point.x, state.momentum] if momentum else [state.point.x]
        return [float(end) for end in ends if end is not None]

    rest = [0.0] * draws
    units = [[float(i == j) for i in range(draws)] for j in range(draws)]
    moves = [step(1, 0, rest), *([step(0, 1, rest)] if momentum else [])]
    a = torch.tensor(moves, dtype=F64).mT
    b = torch.tensor([step(0, 0, unit) for unit in units], dtype=F64).mT
    return torch.as_tensor(solve_discrete_lyapunov(a.numpy(), (b @ b.mT).numpy()))


@pytest.mark.parametrize("precision", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("h", [0.02, 0.3, 0.45])
def test_the_bias_on_gaussians_is_the_closed_form(precision: float, h: float) -> None:
    exact = 1 / precision
    ula = exact / (1 - h * precision / 2)
    assert float(stationary(ULA(h), precision, h)) == pytest.approx(ula, rel=1e-11)
    for friction in (0.3, 2.0, 20.0):
        covariance = stationary(BAOAB(h, friction), precision, h)
        assert float(covariance[0, 0]) == pytest.approx(exact, rel=1e-10)
        assert float(covariance[1, 1]) == pytest.approx(1 - h**2 * precision / 4, rel=1e-10)
        covariance = stationary(OBABO(h, friction), precision, h)
        assert float(covariance[0, 0]) == pytest.approx(
            exact / (1 - h**2 * precision / 4), rel=1e-10
        )
        assert float(covariance[1, 1]) == pytest.approx(1, rel=1e-10)


def test_chains_of_ula_have_that_bias() -> None:
    h = 0.5
    gaussian = ss.GaussianMixture([1.0], [[0.0] * 4], 1.0)
    out = ss.run_chains(gaussian, x=gaussian.sample(5000), kernel="ula", step_size=h, steps=40)
    variance, biased = float(out.x.square().mean()), 1 / (1 - h / 2)
    assert abs(variance - biased) < 4 * biased * math.sqrt(2 / out.x.numel())


# The line integral


def test_the_line_integral_is_exact_to_its_degree_and_estimates_its_error() -> None:
    """A score of degree 5 in x: three nodes are exact to degree 5, two are not."""
    x, y = points(40, 2, 6), points(40, 2, 7)
    exact = (x**6 - y**6).sum(1)
    for nodes, off in {2: True, 3: False, 6: False}.items():
        target = Target(lambda x: (None, -6 * x**5), False, nodes)
        found, error = line_integral(target, target(x), target(y))
        distance = (found - exact).abs()
        assert (float(distance.max()) > 1e-3) is off
        assert float((distance <= error + 1e-11).double().mean()) > 0.9
        assert target.calls == 2 + nodes
        back, _ = line_integral(target, target(y), target(x))
        torch.testing.assert_close(back, -found, rtol=1e-12, atol=1e-12)


def test_on_a_gaussian_one_node_gives_the_chain_of_the_density() -> None:
    gaussian = ss.GaussianMixture([1.0], [[1.0, 0.0]], [[[1.0, 0.5], [0.5, 2.0]]])
    x = points(30, 2, 8)
    known = ss.run_chains(gaussian, x=x, kernel=MALA(0.9), steps=30)
    alone = ss.run_chains(lambda x, t: gaussian.score(x), x=x, kernel=MALA(0.9), steps=30, nodes=1)
    assert alone.acceptance_error is not None and known.acceptance is not None
    torch.testing.assert_close(alone.samples, known.samples, rtol=1e-9, atol=1e-9)
    assert float(alone.acceptance_error.max()) < 1e-12 and float(known.acceptance.min()) < 0.99
    assert (known.nfe, alone.nfe) == (31, 61)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, torch.linspace(0, 1, 6, dtype=F64)])
def test_targets_give_the_gradient_of_their_density(beta: float | Tensor) -> None:
    x, h = points(6, 2, 20), 1e-5
    factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=F64))
    mixture, own = as_target(MIX), as_target(ENERGY)
    family = ss.kernels.Geometric(mixture, own)
    for target in (mixture, own, Tilted(None, own).at(beta), Tilted(mixture, own, beta), family):
        if isinstance(target, ss.kernels.Geometric):
            target = target.at(beta)
        for seen in (target, target.scaled(factor), target.scaled(torch.tensor([0.5, 2.0]))):
            for i in range(2):
                step = h * torch.eye(2, dtype=F64)[i]
                up, down = seen(x + step).log_prob, seen(x - step).log_prob
                assert up is not None and down is not None
                slope = (up - down) / (2 * h)
                torch.testing.assert_close(seen(x).score[:, i], slope, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(seen.place(seen.coordinates(x)), x, rtol=1e-12, atol=1e-12)
    log_p = -energy(x, x)
    between = torch.lerp(MIX.log_prob(x), log_p, torch.as_tensor(beta, dtype=F64))
    torch.testing.assert_close(family.at(beta)(x).log_prob, between, rtol=1e-12, atol=1e-12)
    tilted = Tilted(mixture, own, beta)(x).log_prob
    torch.testing.assert_close(tilted, MIX.log_prob(x) + beta * log_p, rtol=1e-12, atol=1e-12)


def test_a_model_with_a_density_of_its_own_needs_no_integral() -> None:
    class Known(ss.Model):
        sde = None

        def predict(self, prediction: str, x: Tensor, t: object, **cond: object) -> Tensor:
            return MIX.score(x)

        def log_prob(self, x: Tensor, t: object) -> Tensor:
            return MIX.log_prob(x)

    x = points(10, 2, 21)
    known = ss.run_chains(Known(), x=x, steps=10)
    joint = ss.run_chains(MIX, x=x, steps=10)
    assert known.nfe == 11
    torch.testing.assert_close(known.samples, joint.samples, rtol=1e-10, atol=1e-10)


# Adaptation


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        (MALA(10.0), 0.574),
        (MALA(1e-3), 0.574),
        (MALA(1e-3, acceptance=0.3), 0.3),
        (HMC(0.01, 3, jitter=0.0), 0.651),
        (HMC(3.0, 3, jitter=0.0), 0.651),
        (HMC(3.0, 3, acceptance=0.9), 0.9),
    ],
)
def test_warm_up_brings_the_acceptance_to_its_target(kernel: Kernel, wanted: float) -> None:
    variances = torch.linspace(0.1, 1.0, 20, dtype=F64)
    gaussian = ss.GaussianMixture([1.0], [[0.0] * 20], variances[None])
    out = ss.run_chains(
        gaussian, x=gaussian.sample(100), kernel=kernel, steps=100, warmup=600, keep=False
    )
    assert out.acceptance is not None
    assert float(out.acceptance.mean()) == pytest.approx(wanted, abs=0.06)


def test_dual_averaging_is_the_published_recursion() -> None:
    tuner = DualAveraging(torch.tensor([0.3], dtype=F64), 0.8)
    excess, average = 0.0, 0.0
    for m, a in enumerate([0.1, 0.9, 1.0, 0.0, 0.7], start=1):
        excess = (1 - 1 / (m + 10)) * excess + (0.8 - a) / (m + 10)
        log_step = math.log(3) - math.sqrt(m) / 0.05 * excess
        average = m**-0.75 * log_step + (1 - m**-0.75) * average
        tuner.update(torch.tensor([a], dtype=F64))
        assert float(tuner.step_size.log()) == pytest.approx(log_step, rel=1e-12)
    assert float(tuner.average.log()) == pytest.approx(average, rel=1e-12)


def test_a_covariance_is_a_change_of_variables() -> None:
    """MALA with covariance L L^T in x is plain MALA in u = L^-1 x."""
    covariance = torch.tensor([[1.0, 1.8], [1.8, 4.0]], dtype=F64)
    factor, u = torch.linalg.cholesky(covariance), points(20, 2, 9)
    narrow = ss.GaussianMixture([1.0], [[0.0, 0.0]], covariance[None])
    round_one = ss.GaussianMixture([1.0], [[0.0, 0.0]], 1.0)
    for kernel in (MALA(0.7), HMC(0.8, 2), BAOAB(0.5), ULA(0.2)):
        out = ss.run_chains(narrow, x=u @ factor.mT, kernel=kernel, steps=20, covariance=covariance)
        plain = ss.run_chains(round_one, x=u, kernel=kernel, steps=20)
        torch.testing.assert_close(out.samples, plain.samples @ factor.mT, rtol=1e-9, atol=1e-9)
    scales = ss.GaussianMixture([1.0], [[0.0, 0.0]], [[4.0, 0.25]])
    out = ss.run_chains(
        scales, x=u * 2, kernel=MALA(0.7), steps=9, covariance=torch.tensor([4.0, 0.25])
    )
    plain = ss.run_chains(round_one, x=u * 2 / torch.tensor([2.0, 0.5]), kernel=MALA(0.7), steps=9)
    torch.testing.assert_close(out.x, plain.x * torch.tensor([2.0, 0.5]), rtol=1e-9, atol=1e-9)


# Chains as rows


@pytest.mark.parametrize("name", [*KERNELS, "tempered"])
def test_a_chain_does_not_know_its_batch(name: str) -> None:
    kernel: str | Kernel = name
    if name == "tempered":
        kernel = ParallelTempering(MALA(0.1), [1.0, 0.5])
    step = None if name == "tempered" else 0.1
    x = points(10, 3, 10)
    warmup = 5 if name in ("mala", "hmc", "tempered") else 0

    def run(rows: slice, chunk: int | None = None, seed: int = 3) -> ss.Chains:
        return ss.run_chains(
            ENERGY,
            x=x[rows],
            kernel=kernel,
            step_size=step,
            steps=8,
            warmup=warmup,
            chunk=chunk,
            noise=ss.Philox(seed, rows.start or 0),
        )

    whole = run(slice(0, 10))
    for other in (run(slice(0, 10), chunk=3), run(slice(0, 10), chunk=1)):
        assert torch.equal(other.samples, whole.samples)  # type: ignore[arg-type]
        assert torch.equal(other.step_size, whole.step_size)
        assert other.nfe == whole.nfe and other.calls > whole.calls
    assert whole.samples is not None
    assert torch.equal(run(slice(4, 7)).x, whole.x[4:7])
    assert torch.equal(whole.samples[-1], whole.x) and whole.samples.shape == (8, 10, 3)
    assert not torch.equal(run(slice(0, 10), seed=4).x, whole.x)


def test_normal_and_uniform_numbers_share_nothing() -> None:
    noise, like = ChainNoise(ss.Philox(0)), torch.zeros(5000, 1, dtype=F64)
    z = torch.stack([noise.normal(like)[:, 0] for _ in range(3)])
    u = torch.stack([noise.uniform(like[:, 0]) for _ in range(70)])
    every = torch.cat([z, z.square(), u, (u - 0.5).abs()])  # one word gives radius and distance
    correlations = torch.corrcoef(every) - torch.eye(len(every))
    assert correlations.abs().max() < 5 / math.sqrt(5000)


def test_every_chain_may_have_its_step_size() -> None:
    x, sizes = points(4, 3, 11), torch.tensor([0.01, 0.1, 0.2, 0.3], dtype=F64)
    for name in KERNELS:
        out = ss.run_chains(ENERGY, x=x, kernel=name, step_size=sizes, steps=5, chunk=3)
        for row in range(4):
            alone = ss.run_chains(
                ENERGY,
                x=x[row : row + 1],
                kernel=name,
                step_size=float(sizes[row]),
                steps=5,
                noise=ss.Philox(0, row),
            )
            torch.testing.assert_close(alone.x[0], out.x[row], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(6,), (6, 2, 2), (0, 3)])
def test_any_event_shape(shape: tuple[int, ...]) -> None:
    def square(x: Tensor, t: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1) / 2 if x.ndim > 1 else x.square() / 2

    x = torch.full(shape, 0.3)
    for kernel in (*KERNELS, ParallelTempering(HMC(0.1, 2), [1.0, 0.5])):
        size = 0.1 if isinstance(kernel, str) else None
        for target in (ss.from_energy(square), lambda x, t: -x):
            if size is None and not isinstance(target, ss.Model):
                continue
            out = ss.run_chains(target, x=x, kernel=kernel, step_size=size, steps=3)
            assert out.x.shape == shape and out.x.dtype == x.dtype and out.ok.all()


def test_thinning_keeps_every_so_many_states() -> None:
    x = points(3, 2, 12)
    every = ss.run_chains(MIX, x=x, steps=10)
    some = ss.run_chains(MIX, x=x, steps=10, thin=3)
    assert every.samples is not None and some.samples is not None
    assert torch.equal(some.samples, every.samples[2::3])
    assert torch.equal(some.x, every.x)
    assert ss.run_chains(MIX, x=x, steps=10, keep=False).samples is None


def test_a_model_is_asked_at_a_fixed_time_with_its_conditions() -> None:
    sde, x, shift = ss.VP(), points(5, 2, 13), points(5, 2, 14)
    seen = []

    def score(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        seen.append(t)
        return shift - x

    model = ss.as_model(score, sde)
    out = ss.run_chains(model, x=x, kernel=ULA(0.1), steps=2, chunk=2, t=0.25, shift=shift)
    assert all(t.shape[0] <= 2 and (t == 0.25).all() for t in seen)
    whole = ss.run_chains(model, x=x, kernel=ULA(0.1), steps=2, shift=shift)
    assert torch.equal(out.x, whole.x) and float(seen[-1][0]) == pytest.approx(sde.t_min)
    noised = ss.run_chains(MIX.score_model(sde), x=x, kernel="mala", steps=20, t=0.5)
    marginal = ss.run_chains(MIX.marginal(sde, 0.5), x=x, kernel="mala", steps=20)
    torch.testing.assert_close(noised.x, marginal.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noised.log_prob, marginal.log_prob, rtol=1e-9, atol=1e-9)


# What goes wrong


def test_a_chain_that_fails_leaves_its_neighbours_alone() -> None:
    x = points(4, 2, 15)
    broken = x.clone()
    broken[1], broken[2] = torch.nan, 1e200
    for name in KERNELS:
        good = ss.run_chains(ENERGY, x=x, kernel=name, step_size=0.05, steps=10)
        bad = ss.run_chains(ENERGY, x=broken, kernel=name, step_size=0.05, steps=10)
        assert bad.status.tolist() == [0, 1, 1, 0]
        assert torch.equal(bad.x[[0, 3]], good.x[[0, 3]])
    with pytest.raises(SolveError, match="2 of 4"):
        ss.run_chains(ENERGY, x=broken, steps=2, raise_on_failure=True)


@pytest.mark.parametrize("kernel", [MALA(0.5), HMC(0.5, 3)])
@pytest.mark.parametrize("known", [True, False])
def test_a_proposal_that_is_not_a_number_is_a_rejection(kernel: Kernel, known: bool) -> None:
    """A half-normal whose density is not a number below 0."""

    def score(x: Tensor) -> Tensor:
        return torch.where(x > 0, -x, torch.nan)

    target = Target(
        lambda x: ((-x.square().sum(1) / 2 + 0 * score(x).sum(1)) if known else None, score(x)),
        known,
    )
    out = ss.run_chains(target, x=points(5000, 1, 16).abs(), kernel=kernel, steps=30)
    assert out.ok.all() and (out.x > 0).all()
    exact, spread = math.sqrt(2 / math.pi), math.sqrt(1 - 2 / math.pi)
    assert abs(float(out.x.mean()) - exact) < 4 * spread / math.sqrt(5000)


def test_models_that_reuse_memory_and_callers_that_keep_theirs() -> None:
    x = points(6, 2, 17)
    before, buffer, seen = x.clone(), torch.empty_like(x), []

    def static(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, x.clone()))
        return buffer.copy_(-(x**3))

    for kernel in (MALA(0.3), HMC(0.3, 3), BAOAB(0.3), ULA(0.1)):
        fresh = ss.run_chains(lambda x, t: -(x**3), x=x, kernel=kernel, steps=6)
        reused = ss.run_chains(static, x=x, kernel=kernel, steps=6)
        assert torch.equal(reused.x, fresh.x)
    assert torch.equal(x, before)
    assert all(torch.equal(kept, copy) for kept, copy in seen)


@pytest.mark.parametrize("at", [14, 20])
def test_an_interrupt_hands_back_what_is_done(at: int) -> None:
    """In the sixth step of the second chunk, or at its start."""
    calls = 0

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return -x

    out = ss.run_chains(score, x=points(4, 2, 18), kernel=ULA(0.1), steps=12, chunk=2)
    assert out.status.tolist() == [0, 0, 4, 4] and out.samples is not None
    done = max(at - 15, 0)
    assert torch.isfinite(out.samples[:done]).all()
    assert bool(torch.isfinite(out.x[2:]).all()) is (done > 0)
    assert torch.isfinite(out.samples[:, :2]).all() and out.samples[done:, 2:].isnan().all()


def test_bad_input_is_refused_before_the_first_call() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    x = points(4, 2, 19)
    with pytest.raises(UnknownNameError, match="mala"):
        ss.run_chains(score, x=x, kernel="malla")
    with pytest.raises(ArgumentError, match="give step_size"):
        ss.run_chains(score, x=x, kernel="ula")
    with pytest.raises(ArgumentError, match="of its own"):
        ss.run_chains(score, x=x, kernel=ULA(0.1), step_size=0.1)
    with pytest.raises(ArgumentError, match="float32 or float64"):
        ss.run_chains(score, x=x.half())
    with pytest.raises(ArgumentError, match="floating"):
        ss.run_chains(score, x=x.long())
    for name, value in {"steps": 0, "warmup": -1, "thin": 7, "chunk": 0, "nodes": 0}.items():
        with pytest.raises(ArgumentError, match=name):
            ss.run_chains(score, x=x, **{"steps": 5, name: value})  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="for 4 chains"):
        ss.run_chains(score, x=x, step_size=torch.ones(3))
    with pytest.raises(ShapeError, match="covariance"):
        ss.run_chains(score, x=x, covariance=torch.eye(3))
    with pytest.raises(ArgumentError, match="positive definite"):
        ss.run_chains(score, x=x, covariance=-torch.eye(2))
    with pytest.raises(ArgumentError, match="not positive"):
        ss.run_chains(score, x=x, covariance=torch.zeros(2))
    with pytest.raises(ArgumentError, match="neither time nor conditions"):
        ss.run_chains(MIX, x=x, t=0.1)
    with pytest.raises(ArgumentError, match="exchanges need the density"):
        ss.run_chains(score, x=x, kernel=ParallelTempering(MALA(), [1.0, 0.5]))
    with pytest.raises(ArgumentError, match="beta = 0"):
        ss.run_chains(MIX, x=x, kernel=ParallelTempering(MALA(), [1.0, 0.0]))
    for size in (0, -1.0, math.nan, math.inf, "a", torch.tensor([0.1, -0.1])):
        with pytest.raises(ArgumentError, match="step_size"):
            MALA(size)  # type: ignore[arg-type]
    for word in ("ABOBA", "BAO", "BAAB", ""):
        with pytest.raises(ArgumentError, match="palindrome"):
            Splitting(word, 0.1)
    for share in (0, 1.0, math.nan, "a"):
        for make in (MALA, HMC):
            with pytest.raises(ArgumentError, match="acceptance"):
                make(acceptance=share)
    with pytest.raises(ArgumentError, match="friction"):
        BAOAB(0.1, friction=0)
    with pytest.raises(ArgumentError, match="fall from 1"):
        ParallelTempering(MALA(), [0.5, 1.0])
    with pytest.raises(ArgumentError, match="not an adjusted kernel"):
        ParallelTempering(ULA(0.1), [1.0, 0.5])
    with pytest.raises(ArgumentError, match="values, not only gradients"):
        Tilted(None, as_target(score))
    with pytest.raises(ShapeError, match="one value per element"):
        ss.run_chains(lambda x, t: x[:, :1], x=x, steps=1)


# Parallel tempering and correctors


def test_tempering_crosses_a_barrier_where_langevin_does_not() -> None:
    """Two modes 14 standard deviations apart, all chains in one: half of them must move."""
    far = ss.GaussianMixture([1.0, 1.0], [[-4.0, 0.0], [4.0, 0.0]], 0.3)
    x = torch.tensor([[-4.0, 0.0]], dtype=F64).repeat(300, 1)
    kernel = ParallelTempering(MALA(0.3), [1.0, 0.4, 0.15, 0.05, 0.02])
    tempered = ss.run_chains(far, x=x, kernel=kernel, steps=250, warmup=150, keep=False)
    crossed = float((tempered.x[:, 0] > 0).double().mean())
    assert abs(crossed - 0.5) < 4 * 0.5 / math.sqrt(300)
    assert tempered.swap_rates is not None and tempered.acceptance is not None
    assert (tempered.swap_rates.mean(0) > 0.3).all() and tempered.acceptance.shape == (300, 5)
    assert tempered.nfe == 5 * 401 and tempered.calls == 401
    plain = ss.run_chains(far, x=x, kernel="mala", steps=250, warmup=150, keep=False)
    assert float((plain.x[:, 0] > 0).double().mean()) < 0.02


def test_a_tilted_base_may_be_the_last_rung() -> None:
    """beta = 0 is the base itself, from which the hottest replica draws."""
    base = ss.GaussianMixture([1.0], [[0.0, 0.0]], 4.0)
    target = ss.kernels.Geometric(as_target(base), as_target(MIX))
    kernel = ParallelTempering(HMC(0.5, 3), [1.0, 0.5, 0.0], every=2)
    x = torch.zeros(2000, 2, dtype=F64)
    out = ss.run_chains(target, x=x, kernel=kernel, steps=60, keep=False)
    assert out.nfe == 3 * (1 + 60 * 2 * 3)
    z = (out.x.mean(0) - MIX.mean) / (MIX.covariance.diagonal() / len(x)).sqrt()
    assert z.abs().max() < 4


@pytest.mark.arithmetic
@pytest.mark.parametrize("kernel", [MALA(0.5), HMC(0.5, 2)])
def test_an_adjusted_corrector_leaves_the_marginal_invariant(kernel: Kernel) -> None:
    sde, t = ss.VP(), 0.3
    marginal = MIX.marginal(sde, t)
    corrector = ss.solvers.KernelCorrector(kernel, moves=4, nodes=4)
    solver = ss.solvers.PredictorCorrector(ss.solvers.DDIM(), corrector)
    (moves,) = [
        stage.kernel
        for stage in ss.plan(solver, sde, [0.31, t]).stages
        if isinstance(stage, ss.plans.stages.Custom)
    ]
    x, model = marginal.sample(10_000), MIX.score_model(sde)
    calls = 0

    def predict(prediction: str, y: Tensor, s: float) -> Tensor:
        nonlocal calls
        calls += 1
        return model.predict(prediction, y, s)

    end = moves(x, t, predict, ss.Philox(1), 0)
    assert calls == moves.calls
    assert drifts(x, end, marginal.log_prob).abs().max() < 4
    assert float((end - x).square().mean()) > 0.1

    def elementwise(prediction: str, y: Tensor, s: float) -> Tensor:
        return -(y**3) + y.sin()

    whole = moves(x, t, elementwise, ss.Philox(1), 0)
    assert torch.equal(moves(x[3:9], t, elementwise, ss.Philox(1, 3), 0), whole[3:9])
    assert not torch.equal(moves(x, t, predict, ss.Philox(1), moves.calls), end)


class Addresses(Script):
    """Notes where numbers are read, which all are 1/2."""

    def __init__(self, seen: list[tuple[Purpose, int]]) -> None:
        self.seen = seen

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        self.seen.append((purpose, draw))
        return torch.full_like(like, 0.5)

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        self.seen.append((purpose, draw))
        return torch.full_like(like, 0.5)


@pytest.mark.parametrize("kernel", [ULA(0.1), MALA(0.1), OBABO(0.1), BAOAB(0.1), HMC(0.1, 1)])
def test_correctors_of_one_run_read_no_number_twice(kernel: Kernel) -> None:
    seen, sde = list[tuple[Purpose, int]](), ss.VP()
    corrector = ss.solvers.KernelCorrector(kernel, moves=4, nodes=1)
    solver = ss.solvers.PredictorCorrector(ss.solvers.EulerMaruyama(), corrector)
    ss.sample(
        MIX.score_model(sde), sde, x=points(3, 2, 22), solver=solver, steps=6, noise=Addresses(seen)
    )
    assert len(seen) == len(set(seen)) > 5 * (1 + 4)


def test_a_corrector_brings_a_coarse_predictor_to_the_law() -> None:
    sde = ss.VP()
    model, law = MIX.score_model(sde), MIX.marginal(sde, sde.t_min)
    exact = law.log_prob(law.sample(4000)).mean()

    def gap(solver: ss.Solver) -> float:
        out = ss.sample(model, sde, shape=(4000, 2), solver=solver, steps=4, denoise=False)
        return abs(float(law.log_prob(out.x.double()).mean() - exact))

    predictor = ss.solvers.EulerMaruyama()
    corrector = ss.solvers.KernelCorrector(HMC(0.6, 5), moves=12)
    assert gap(ss.solvers.PredictorCorrector(predictor, corrector)) < gap(predictor) / 3


def test_a_corrector_may_follow_its_acceptance() -> None:
    """From a step far too large, towards 0.6: where a fixed step stays put, it moves."""
    sde, t = ss.VE(sigma_max=10.0), 0.5
    model, x = MIX.score_model(sde), MIX.marginal(sde, t).sample(2000)
    moved = []
    for acceptance in (None, 0.6):
        corrector = ss.solvers.KernelCorrector(
            MALA(1000.0), moves=25, nodes=1, acceptance=acceptance
        )
        solver = ss.solvers.PredictorCorrector(ss.solvers.DDIM(), corrector)
        stages = ss.plan(solver, sde, [0.6, t]).stages
        (moves,) = [s.kernel for s in stages if isinstance(s, ss.plans.stages.Custom)]
        end = moves(x, t, model.predict, ss.Philox(0), 0)
        moved.append(float((end - x).square().mean() / x.square().mean()))
    assert moved[1] > 1 and moved[0] < moved[1] / 5
    with pytest.raises(ArgumentError, match="accepts everything"):
        ss.solvers.KernelCorrector(ULA(0.1), acceptance=0.5)
    with pytest.raises(ArgumentError, match="acceptance"):
        ss.solvers.KernelCorrector(MALA(), acceptance=1.5)
    with pytest.raises(ArgumentError, match="single chains"):
        ss.solvers.KernelCorrector(ParallelTempering(MALA(), [1.0, 0.5]))


@pytest.mark.parametrize("tempered", [False, True])
def test_an_energy_in_double_serves_single_states(tempered: bool) -> None:
    scale = torch.tensor([0.5], dtype=torch.float64)
    energy = ss.from_energy(lambda x, t: scale * x.square().sum(1))
    kernel = ParallelTempering(MALA(0.1), [1.0, 0.5]) if tempered else MALA(0.1)
    chains = ss.run_chains(energy, x=torch.zeros(4, 2), kernel=kernel, steps=8, warmup=8)
    assert chains.ok.all()
    assert chains.x.dtype == torch.float32


def test_replicas_have_the_conditions_of_their_chain() -> None:
    centre = torch.tensor([[-9.0], [0.0], [9.0]], dtype=torch.float64)
    energy = ss.from_energy(lambda x, t, centre: (x - centre).square().sum(1))
    kernel = ParallelTempering(MALA(0.2), [1.0, 0.5])
    for chunk in (None, 1):
        chains = ss.run_chains(
            energy, x=centre.clone(), kernel=kernel, steps=50, chunk=chunk, centre=centre
        )
        assert float((chains.x - centre).abs().max()) < 4


def test_a_covariance_that_cannot_be_one_is_refused() -> None:
    normal, x = ss.targets.gaussian([0.0], 1.0), torch.zeros(2, 1, dtype=torch.float64)
    for bad in ([1.0], torch.tensor([math.inf])):
        with pytest.raises(ArgumentError, match="covariance"):
            ss.run_chains(normal, x=x, steps=1, covariance=bad)
