"""Claims about noise: known answers, addresses that fix the numbers, laws, Brownian paths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.grid import make_grid
from scoresolve.noise import (
    BrownianPath,
    CallableNoise,
    GeneratorNoise,
    NoiseSource,
    Philox,
    Purpose,
    as_noise,
    philox4x32,
)
from scoresolve.plans import Draw
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import REGISTRY, AdaptiveSDE, GottaGoFast, Integrator, get_solver

F64 = torch.float64
KINDS = ("normal", "uniform", "signs")


def empty(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def reference_normal(seed: int, sample: int, purpose: Purpose, draw: int, element: int) -> float:
    """One number of the stream by its address, in Python floats."""
    counter = [element // 4, draw, sample % 2**32, sample >> 32 | purpose << 24]
    words = reference_philox(counter, [seed % 2**32, seed >> 32])
    signed = [w - 2**32 if w >= 2**31 else w for w in words]
    pair = element % 4 // 2
    u = abs(float(np.float32(signed[1 - pair]) * np.float32(2.0**-31) + np.float32(2.0**-32)))
    radius, angle = math.sqrt(-2 * math.log(u)), math.pi * signed[3 - pair] / 2**31
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the generator ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    words = [torch.tensor([int(w, 16) for w in text.split()]) for text in (counter, key)]
    assert [f"{w:08x}" for w in philox4x32(*words).tolist()] == answer.split()


words32 = st.integers(0, 2**32 - 1)


@given(st.lists(words32, min_size=4, max_size=4), st.lists(words32, min_size=2, max_size=2))
def test_philox_agrees_with_python_integers(counter: list[int], key: list[int]) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == reference_philox(
        counter, key
    )


def test_philox_broadcasts_keys_and_keeps_its_input() -> None:
    counter, key = torch.arange(24).view(3, 2, 4), torch.tensor([[7, 8], [2**32 - 1, 1]])
    before = counter.clone()
    together = philox4x32(counter, key)
    assert torch.equal(counter, before)
    assert together.shape == (3, 2, 4)
    for i, j in np.ndindex(3, 2):
        assert together[i, j].tolist() == reference_philox(counter[i, j].tolist(), key[j].tolist())


# --- addresses -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**56 - 4),
    draw=words32,
    purpose=st.sampled_from(list(Purpose)),
    elements=st.integers(1, 11),
)
def test_normals_are_the_numbers_at_their_documented_address(
    seed: int, sample: int, draw: int, purpose: Purpose, elements: int
) -> None:
    z = Philox(seed, sample).normal(empty(3, elements), draw, purpose)
    expected = [
        [reference_normal(seed, sample + row, purpose, draw, e) for e in range(elements)]
        for row in range(3)
    ]
    torch.testing.assert_close(z, torch.tensor(expected, dtype=F64), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event", [(), (1,), (2,), (5,), (3, 7), (2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_batch_split_changes_no_bit(kind: str, event: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = getattr(Philox(5), kind)(empty(9, *event, dtype=dtype), 3)
    for first, size in ((0, 9), (0, 4), (4, 5), (8, 1), (3, 0)):
        part = getattr(Philox(5, first), kind)(empty(size, *event, dtype=dtype), 3)
        assert torch.equal(part, whole[first : first + size])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "index",
    [slice(None), slice(2, 5), slice(1, 8, 3), torch.tensor([4, 0, 7]),
     torch.tensor([False, True, True, False, False, False, True, False])],
    ids=str,
)  # fmt: skip
def test_rows_of_a_source_give_the_rows_of_its_numbers(kind: str, index: slice | Tensor) -> None:
    like = empty(8, 5)
    for source in (
        Philox(1, 10),
        Philox(1, samples=torch.tensor([9, 3, 2**56 - 1, 0, 4, 5, 8, 1])),
    ):
        whole = getattr(source, kind)(like, 2)
        part = getattr(source.rows(index), kind)(like[index], 2)
        assert torch.equal(part, whole[index])


def test_given_ids_are_the_ids_of_counted_samples() -> None:
    counted = Philox(2, 100).normal(empty(6, 3), 0)
    given_ids = Philox(2, samples=torch.tensor([103, 100, 105])).normal(empty(3, 3), 0)
    assert torch.equal(given_ids, counted[[3, 0, 5]])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_change_no_bit(kind: str, threads: None) -> None:
    # 300 x 1001 elements need several chunks of rows, 2 x 400_001 several chunks of columns.
    for shape in ((300, 1001), (2, 400_001)):
        like, results = empty(*shape, dtype=torch.float32), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(getattr(Philox(3), kind)(like, 1))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        last = getattr(Philox(3, shape[0] - 1), kind)(like[:1, : shape[1] // 2], 1)
        assert torch.equal(results[0][-1:, : shape[1] // 2], last)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_depend_on_the_flat_element_index_alone(kind: str) -> None:
    flat = getattr(Philox(4), kind)(empty(3, 64), 7)
    for event in ((8, 8), (64, 1), (1, 4, 16)):
        assert torch.equal(getattr(Philox(4), kind)(empty(3, *event), 7).flatten(1), flat)
    for fewer in (1, 2, 3, 30, 63):
        assert torch.equal(getattr(Philox(4), kind)(empty(3, fewer), 7), flat[:, :fewer])


def test_memory_format_changes_no_bit() -> None:
    like = empty(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert torch.equal(Philox(4).normal(like, 0), Philox(4).normal(empty(2, 4, 6, 6), 0))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.sampled_from([3, 20_000]))
def test_order_of_draws_changes_no_bit(order: list[int], elements: int) -> None:
    source, like = Philox(6), empty(1, elements, dtype=torch.float32)
    for draw in order:
        assert torch.equal(source.normal(like, draw), Philox(6).normal(like, draw))


def test_interleaved_consecutive_draws_change_no_bit_and_are_fresh() -> None:
    source, small, large = Philox(6), empty(2, 3), empty(4, 5)
    for draw in range(40):
        for like, purpose in ((small, Purpose.SOLVER), (large, Purpose.CORRECTOR)):
            z = source.normal(like, draw, purpose)
            assert torch.equal(z, Philox(6).normal(like, draw, purpose))
            z.fill_(math.nan)
            assert torch.equal(
                source.normal(like, draw, purpose), Philox(6).normal(like, draw, purpose)
            )


def test_change_of_shape_or_dtype_between_consecutive_draws_changes_no_bit() -> None:
    source = Philox(6)
    for draw in range(24):
        like = empty(1 + draw // 4 % 2, 4, dtype=(torch.float32, F64)[(draw + 2) // 4 % 2])
        assert torch.equal(source.normal(like, draw), Philox(6).normal(like, draw))


def test_last_draws_are_reached_by_counting() -> None:
    source, like = Philox(0), empty(1, 2)
    for draw in range(2**32 - 5, 2**32):
        assert torch.equal(source.normal(like, draw), Philox(0).normal(like, draw))


@pytest.mark.parametrize("kind", KINDS)
def test_global_generator_is_untouched(kind: str) -> None:
    before = torch.get_rng_state()
    getattr(Philox(1), kind)(empty(10, 10), 0)
    BrownianPath(Philox(1), 0, 1).increment(empty(2, 2), 0.2, 0.7)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_join_gradients_and_inference_mode() -> None:
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    z = Philox(0).normal(x, 0)
    assert not z.requires_grad
    (x * z).sum().backward()
    assert torch.equal(x.grad, z)
    source = Philox(0)
    with torch.inference_mode():
        for draw in range(4):
            source.normal(x, draw)
    y = torch.ones(2, 3, dtype=F64, requires_grad=True)
    (y * source.normal(y, 5).mul_(2)).sum().backward()
    assert torch.equal(y.grad, 2 * Philox(0).normal(x, 5))


# --- laws ------------------------------------------------------------------------------------

N = 2**18
DRAWN = {kind: getattr(Philox(11), kind)(empty(512, 512), 0).flatten() for kind in KINDS}


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    z = DRAWN["normal"]
    for power in range(1, 7):
        moment = 0.0 if power % 2 else math.prod(range(1, power, 2))
        variance = math.prod(range(1, 2 * power, 2)) - moment**2
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / N)


@pytest.mark.parametrize(("kind", "law"), [("normal", "norm"), ("uniform", "uniform")])
def test_numbers_pass_a_kolmogorov_smirnov_test(kind: str, law: str) -> None:
    # Kolmogorov: P(sqrt(n) D > 1.95) = 1e-3.
    assert stats.kstest(DRAWN[kind].numpy(), law).statistic < 1.95 / math.sqrt(N)


def test_tails_are_those_of_a_normal() -> None:
    z = Philox(0).normal(empty(16, 2**16, dtype=torch.float32), 0)
    expected = z.numel() * 2 * stats.norm.sf(4.0)
    assert abs(int((z.abs() > 4.0).sum()) - expected) < 4 * math.sqrt(expected)
    assert 4.5 < z.abs().max() < 6.7


def test_signs_are_fair() -> None:
    signs = DRAWN["signs"]
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(N)


def test_every_part_of_the_address_gives_an_independent_stream() -> None:
    like = empty(64, 64)
    streams = [
        Philox(seed, first).normal(like, draw, purpose).flatten()
        for seed, first, draw, purpose in [
            (0, 0, 0, Purpose.START),
            (1, 0, 0, Purpose.START),
            (2**32, 0, 0, Purpose.START),
            (0, 64, 0, Purpose.START),
            (0, 2**32, 0, Purpose.START),
            (0, 0, 1, Purpose.START),
            (0, 0, 2**31, Purpose.START),
            *((0, 0, 0, purpose) for purpose in Purpose if purpose != Purpose.START),
        ]
    ]
    # Fisher: under independence sqrt(n) r is standard normal; 4.5 deviations for 78 pairs.
    for a, b in combinations(streams, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(like.numel())
        assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 4.5 / math.sqrt(like.numel())


def test_neighbouring_elements_and_samples_are_uncorrelated() -> None:
    z = DRAWN["normal"].view(512, 512)
    for power in (1, 2):
        for lag in (1, 2, 3, 4, 5):
            for a, b in ((z[:, lag:], z[:, :-lag]), (z[lag:], z[:-lag])):
                r = np.corrcoef((a**power).flatten(), (b**power).flatten())[0, 1]
                assert abs(r) < 4.5 / math.sqrt(a.numel())


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64_to_rounding(kind: str) -> None:
    double = getattr(Philox(7), kind)(empty(512, 515), 0)
    single = getattr(Philox(7), kind)(empty(512, 515, dtype=torch.float32), 0)
    # The angle rounds to 2^-24 pi, times a radius of at most 6.7.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-6 * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_rounded_from_float32(kind: str, dtype: torch.dtype) -> None:
    half = getattr(Philox(7), kind)(empty(512, 512, dtype=dtype), 0)
    single = getattr(Philox(7), kind)(empty(512, 512, dtype=torch.float32), 0)
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    limits = torch.finfo(dtype)
    if kind == "uniform":
        single = single.clamp(limits.tiny, 1 - limits.eps / 2)
    torch.testing.assert_close(half.float(), single, rtol=limits.eps / 2, atol=limits.tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("source", [Philox(8), GeneratorNoise(torch.Generator().manual_seed(0))])
def test_uniform_numbers_lie_strictly_inside_the_unit_interval(
    source: NoiseSource, dtype: torch.dtype
) -> None:
    u = source.uniform(empty(512, 1024, dtype=dtype), 0)
    assert u.dtype == dtype
    assert float(u.min()) > 0
    assert float(u.max()) < 1


# --- other sources ---------------------------------------------------------------------------


def test_generator_noise_follows_its_generator() -> None:
    like, generator = empty(4, 3), torch.Generator().manual_seed(9)
    source = GeneratorNoise(generator)
    first, second = source.normal(like, 0), source.normal(like, 0)
    generator.manual_seed(9)
    assert torch.equal(source.normal(like, 5, Purpose.START), first)
    assert not torch.equal(first, second)
    assert set(source.signs(empty(64, 4), 0).unique().tolist()) == {-1.0, 1.0}
    u = source.uniform(empty(2**8, 2**8), 0).flatten()
    assert stats.kstest(u.numpy(), "uniform").statistic < 1.95 / 2**8


def test_callable_noise_passes_the_step_and_owns_its_result() -> None:
    seen, kept = [], torch.arange(6.0, dtype=F64).view(2, 3)

    def fn(x: Tensor, t: float | None, s: float | None) -> Tensor:
        seen.append((t, s))
        return kept

    source, like = CallableNoise(fn), empty(2, 3)
    z = source.normal(like, 0, times=(1.0, 0.5))
    assert source.normal(like.float(), 0, Purpose.START).dtype == torch.float32
    assert seen == [(1.0, 0.5), (None, None)]
    z.zero_()
    assert kept.sum() == 15
    assert torch.equal(source.uniform(like, 0), torch.special.ndtr(kept))


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(()), 1.0, None])
def test_callable_of_the_wrong_shape_is_named(wrong: object) -> None:
    with pytest.raises(ShapeError, match=r"noise callable returned .* x of shape \(2, 3\)"):
        CallableNoise(lambda x, t, s: wrong).normal(empty(2, 3), 0)


def test_as_noise_takes_all_that_callers_pass() -> None:
    generator, source, path = torch.Generator(), Philox(3), BrownianPath(Philox(3), 0, 1)
    assert as_noise(source) is source
    assert as_noise(path) is path
    assert isinstance(made := as_noise(generator), GeneratorNoise)
    assert made.generator is generator
    assert isinstance(as_noise(lambda x, t, s: x), CallableNoise)
    assert torch.equal(as_noise(None, 3).normal(empty(2), 0), source.normal(empty(2), 0))
    with pytest.raises(ArgumentError, match=r"noise is a str: give a NoiseSource"):
        as_noise("gaussian")  # type: ignore[arg-type]


# --- Brownian paths --------------------------------------------------------------------------

times = st.floats(0.5, 3.0)


@given(times, times, times)
def test_increments_add_up(t: float, s: float, u: float) -> None:
    path, like = BrownianPath(Philox(1), 0.5, 3.0), empty(3, 4)
    whole = path.increment(like, t, u)
    parts = path.increment(like, t, s) + path.increment(like, s, u)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole, -path.increment(like, u, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 10, 64])
def test_path_does_not_depend_on_the_steps_that_read_it(steps: int) -> None:
    path, like = BrownianPath(Philox(2), 0.0, 1.0), empty(5, 2)
    grid = np.linspace(0.0, 1.0, steps + 1) ** 2
    total = sum(path.increment(like, t, s) for t, s in pairwise(grid.tolist()))
    torch.testing.assert_close(total, path.increment(like, 0.0, 1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "ends", [(0.0, 1.0), (0.3, 0.300001), (0.25, 0.75), (0.9, 0.1), (0.0, 1e-5), (0.1, 0.7)]
)
def test_increment_is_normal_with_variance_equal_to_the_interval(ends: tuple[float, float]) -> None:
    n, gap = 2**16, abs(ends[1] - ends[0])
    w = BrownianPath(Philox(3), 0.0, 1.0).increment(empty(n, 1), *ends).flatten()
    assert abs(float((w**2).mean()) / gap - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(w.numpy() / math.sqrt(gap), "norm").statistic < 1.95 / math.sqrt(n)


def test_covariance_of_a_path_is_that_of_brownian_motion() -> None:
    n, grid = 2**16, [0.1, 0.35, 0.5, 0.501, 0.9, 1.0]
    path = BrownianPath(Philox(4), 0.0, 1.0, tolerance=1e-4)
    w = torch.stack([path.increment(empty(n, 1), 0.0, t).flatten() for t in grid])
    expected = torch.tensor([[min(t, s) for s in grid] for t in grid], dtype=F64)
    spread = (torch.outer(expected.diag(), expected.diag()) + expected**2).sqrt()
    assert ((w @ w.T / n - expected).abs() < 4 * spread / math.sqrt(n)).all()


@pytest.mark.parametrize("gap", [2.0, 1.5, 1.0])
def test_law_is_exact_down_to_the_tolerance(gap: float) -> None:
    n, tolerance = 2**14, 2.0**-12
    path = BrownianPath(Philox(5), 0.0, 1.0, tolerance)
    starts = torch.linspace(0.1, 0.8, n, dtype=F64)
    z = path(empty(n, 1), starts, starts + gap * tolerance)
    assert abs(float((z**2).mean()) - 1) < 4 * math.sqrt(2 / n)


def test_times_of_each_row_agree_with_scalar_times() -> None:
    path, like = BrownianPath(Philox(6), 0.0, 2.0), empty(4, 2, 3)
    t, s = (torch.tensor(v, dtype=F64) for v in ([0.0, 0.7, 1.3, 2.0], [0.5, 0.1, 1.3, 0.0]))
    together = path.increment(like, t, s)
    mixed = path.increment(like, 0.7, s)
    for row in range(4):
        alone = path.increment(like, float(t[row]), float(s[row]))[row]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-14)
        alone = path.increment(like, 0.7, float(s[row]))[row]
        torch.testing.assert_close(mixed[row], alone, rtol=0, atol=1e-14)


def test_rows_of_a_path_are_bitwise_its_rows() -> None:
    path, like = BrownianPath(Philox(7, 5), 0.0, 1.0), empty(6, 3)
    t, s = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    whole = path.increment(like, t, s)
    for index in (slice(2, 4), torch.tensor([5, 0])):
        part = path.rows(index).increment(like[index], t[index], s[index])
        assert torch.equal(part, whole[index])


def test_paths_of_samples_elements_and_intervals_are_independent() -> None:
    n = 2**14
    path = BrownianPath(Philox(8), 0.0, 1.0)
    z = torch.cat(
        [
            path(empty(n, 2), 0.2, 0.41).T,
            path(empty(n, 2), 0.41, 0.6).T,
            path(empty(n, 2), 0.6, 0.9).T,
        ]
    )
    off = torch.corrcoef(z) - torch.eye(6, dtype=F64)
    assert off.abs().max() < 4.5 / math.sqrt(n)
    assert abs(np.corrcoef(z[0, 1:], z[0, :-1])[0, 1]) < 4.5 / math.sqrt(n)


STOCHASTIC = [
    name
    for name in REGISTRY
    if get_solver(name).stochastic and not isinstance(get_solver(name), AdaptiveSDE | GottaGoFast)
]
KINDS_OF_PATH = {
    "plain": BrownianPath(Philox(0), 0.5, 3.0),
    "coarse": BrownianPath(Philox(0), 0.0, 1.0, tolerance=0.1),
    "geometric": BrownianPath(Philox(0), 1e-4, 3e5, geometric=True),
    "steep": BrownianPath(Philox(0), 1e-9, 1.0, 1.0, geometric=True),
}
paths = pytest.mark.parametrize("path", KINDS_OF_PATH.values(), ids=KINDS_OF_PATH)


def covariance(path: BrownianPath, t: Tensor, s: Tensor) -> Tensor:
    """The exact covariance of the increments over (t, s) and their areas, [2n, 2n]."""
    rows: list[dict[int, Tensor]] = []
    for area in (False, True):
        draws, weights = path._weights(t, s, area)
        for i in range(len(t)):
            found: dict[int, Tensor] = {}
            for draw, weight in zip(draws[:, i].tolist(), weights[..., i].T, strict=True):
                found[draw] = found.get(draw, 0) + weight
            rows.append(found)
    products = [[sum(float(a[k] @ b[k]) for k in a.keys() & b.keys()) for b in rows] for a in rows]
    return torch.tensor(products, dtype=F64)


def places(path: BrownianPath, shares: list[float]) -> Tensor:
    return path._place(torch.tensor(shares, dtype=F64)).clamp(path.t0, path.t1)


@paths
@settings(max_examples=20)
@given(shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=6, unique=True))
def test_law_of_the_path_and_its_integral_is_exact(path: BrownianPath, shares: list[float]) -> None:
    s = places(path, shares)
    t = torch.full_like(s, path.t0)
    h = s - t
    found = covariance(path, t, s)
    ww, wh, hh = found[: len(s), : len(s)], found[: len(s), len(s) :], found[len(s) :, len(s) :]
    # I = int W = h (H + W/2)
    wi = h * (wh + ww / 2)
    ii = h[:, None] * h * (hh + wh / 2 + wh.T / 2 + ww / 4)
    low, high = torch.minimum(h[:, None], h), torch.maximum(h[:, None], h)
    cross = torch.where(h[:, None] < h, h[:, None] * h - h[:, None] ** 2 / 2, h**2 / 2)
    # the same last interval holds both: the law is exact at each time alone
    level = (torch.tensor(shares, dtype=F64) * 2**path.levels).floor()
    apart = (level[:, None] != level) | torch.eye(len(s), dtype=torch.bool)
    for ours, exact, scale in (
        (ww, low, high),
        (wi, cross, high**2),
        (ii, low**2 * high / 2 - low**3 / 6, high**3),
    ):
        assert ((ours - exact) / scale).abs()[apart].max() < 1e-14


@paths
@pytest.mark.parametrize("share", [0.2, 3e-3, 2e-5, 4e-7])
def test_increments_and_areas_of_successive_steps_are_white(
    path: BrownianPath, share: float
) -> None:
    gap = max(share, 1.01 * path.tolerance / path.length)
    steps = 4 if gap < 0.2 else 2
    times = places(path, [0.3 + gap * k for k in range(steps + 1)])
    h = times.diff()
    spread = torch.cat((h, h / 12)).sqrt()
    found = covariance(path, times[:-1], times[1:]) / spread / spread[:, None]
    torch.testing.assert_close(found, torch.eye(2 * steps, dtype=F64), rtol=0, atol=1e-13)
    found = covariance(path, times[1:], times[:-1]) / spread / spread[:, None]  # backwards
    torch.testing.assert_close(found, torch.eye(2 * steps, dtype=F64), rtol=0, atol=1e-13)


@paths
@settings(max_examples=20)
@given(shares=st.lists(st.floats(0, 1), min_size=3, max_size=3, unique=True))
def test_areas_add_up(path: BrownianPath, shares: list[float]) -> None:
    like = empty(3, 4)
    t, s, u = places(path, sorted(shares)).tolist()

    def integral(t: float, s: float) -> Tensor:
        w, area = path.increment(like, t, s), path.space_time_area(like, t, s)
        return (s - t) * (area + w / 2)

    parts = integral(t, s) + integral(s, u) + (u - s) * path.increment(like, t, s)
    scale = (u - t) * math.sqrt(u)
    torch.testing.assert_close(integral(t, u) / scale, parts / scale, rtol=0, atol=1e-12)
    back = path.space_time_area(like, u, t)
    assert torch.equal(back, path.space_time_area(like, t, u))
    assert torch.equal(path.space_time_area(like, t, t), torch.zeros(3, 4, dtype=F64))


@paths
def test_area_is_the_mean_of_the_path_less_its_chord(path: BrownianPath) -> None:
    like, n = empty(6, 2), 400
    t, s = places(path, [0.31, 0.58]).tolist()
    u = torch.linspace(t, s, n + 1, dtype=F64)[1:].tolist()
    w = torch.stack([path.increment(like, t, time) for time in u])
    chord = torch.arange(1, n + 1, dtype=F64)[:, None, None] / n * w[-1]
    mean = (w - chord).mean(0)
    # between its n points a path keeps areas of variance h/12/n^2 that a sum does not see
    assert (path.space_time_area(like, t, s) - mean).abs().max() < 5 * math.sqrt((s - t) / 12) / n


def test_areas_do_not_know_their_batch() -> None:
    path, like = BrownianPath(Philox(7, 5), 0.0, 1.0), empty(6, 3)
    t, s = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    whole = path.space_time_area(like, t, s)
    for index in (slice(2, 4), torch.tensor([5, 0])):
        part = path.rows(index).space_time_area(like[index], t[index], s[index])
        assert torch.equal(part, whole[index])
    assert torch.equal(path.area(like, 0, (t, s))[:4], path.area(like[:4], 9, (t[:4], s[:4])))


def test_draws_that_belong_to_no_step_are_those_of_the_noise() -> None:
    path, noise, like = BrownianPath(Philox(9), 0.0, 1.0), Philox(9), empty(3, 2)
    for ask in (lambda times: path.normal(like, 4, times=times), lambda t: path.area(like, 4, t)):
        assert torch.equal(ask((0.75, 0.75)), noise.normal(like, 4))
        mixed = ask((0.75, torch.tensor([0.5, 0.75, 0.25], dtype=F64)))
        assert torch.equal(mixed[1], noise.normal(like, 4)[1])
        assert not torch.equal(mixed[::2], noise.normal(like, 4)[::2])
    area = path.area(like, 4, (0.75, 0.5))
    torch.testing.assert_close(area, path.space_time_area(like, 0.75, 0.5) / math.sqrt(0.25 / 12))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_stochastic_solver_keeps_its_variance_on_a_path(name: str) -> None:
    sde, n = VP(), 2**10
    budget = {} if isinstance(get_solver(name), Integrator) else {"nfe": 20}

    def variance(noise: NoiseSource) -> float:
        options = {"solver": name, "noise": noise, "dtype": F64, **budget}
        return float(ss.sample(score, sde, shape=(n // 16, 16), **options).x.var())

    score = ss.GaussianMixture([1.0], torch.zeros(1, 16), torch.full((1, 16), 0.25)).score_model(
        sde
    )
    expected = variance(Philox(1))
    # the variances of two sets of n normals, each to a relative sqrt(2/n)
    bound = 5 * math.sqrt(4 / n) * expected
    for path in (BrownianPath(Philox(0), 0.0, 1.0), BrownianPath.in_snr(Philox(0), sde)):
        assert abs(variance(path) - expected) < bound


@pytest.mark.parametrize("name", STOCHASTIC)
def test_no_two_draws_of_a_solver_read_the_same_stretch_of_a_path(name: str) -> None:
    solver = get_solver(name)
    if isinstance(solver, Integrator):
        return
    plan = ss.plan(solver, VP(), make_grid("cosine", VP(), 8))
    for area in (False, True):
        read = [
            (draw.t, draw.s)
            for draw in plan.stages
            if isinstance(draw, Draw) and draw.t != draw.s and draw.area is area
        ]
        for (_, end), (start, _) in pairwise(sorted(read, reverse=True)):
            assert start <= end


def test_a_source_without_areas_draws_numbers_of_its_own() -> None:
    like, seen = empty(3, 2), []
    assert torch.equal(Philox(1).area(like, 5, (0.7, 0.5)), Philox(1).normal(like, 5))
    CallableNoise(lambda x, t, s: seen.append((t, s)) or x).area(like, 5, (0.7, 0.5))
    assert seen == [(0.7, 0.7)]


@pytest.mark.parametrize("sde", [VP(), EDM(), RectifiedFlow()], ids=repr)
def test_a_path_in_snr_is_one_function_of_the_signal_to_noise_ratio(sde: GaussianSDE) -> None:
    path, like = BrownianPath.in_snr(Philox(3), sde), empty(3, 2)
    log_snr = torch.tensor([-1.0, 2.0], dtype=F64)
    t, s = sde.time_from_log_snr(log_snr).tolist()
    plain = BrownianPath(Philox(3), math.exp(-40), math.exp(40), geometric=True)
    expected = plain.increment(like, *log_snr.exp().tolist())
    torch.testing.assert_close(path.increment(like, t, s), expected, rtol=0, atol=1e-9)
    part = path.rows(slice(1, 3)).increment(like[1:], t, s)
    assert torch.equal(part, path.increment(like, t, s)[1:])
    # where alpha or sigma vanishes too a draw is a number
    assert path.normal(like, 0, times=(sde.T, s)).isfinite().all()
    assert path.normal(like, 0, times=(t, 0.0)).isfinite().all()


def test_path_serves_a_solver_as_a_source() -> None:
    path, like = BrownianPath(Philox(9), 0.0, 1.0), empty(3, 2)
    step = path.normal(like, 4, times=(0.75, 0.5))
    assert torch.equal(step, path(like, 0.75, 0.5))
    assert torch.equal(step, CallableNoise(path).normal(like, 0, times=(0.75, 0.5)))
    torch.testing.assert_close(step, path.increment(like, 0.75, 0.5) / 0.5)
    start = path.normal(like, 0, Purpose.START)
    assert torch.equal(start, Philox(9).normal(like, 0, Purpose.START))
    corrector = path.normal(like, 0, Purpose.CORRECTOR, times=(0.75, 0.5))
    assert torch.equal(corrector, Philox(9).normal(like, 0, Purpose.CORRECTOR))
    assert torch.equal(path(like, 0.5, 0.5), torch.zeros(3, 2, dtype=F64))


def test_float32_path_is_the_float64_path_to_rounding() -> None:
    path = BrownianPath(Philox(10), 0.0, 80.0)
    double = path(empty(64, 4), 2.0, 1.5)
    single = path(empty(64, 4, dtype=torch.float32), 2.0, 1.5)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0", None])
def test_seed_that_is_not_a_64_bit_integer_is_refused(seed: object) -> None:
    with pytest.raises(ArgumentError, match=r"seed is .*: give an integer in \[0, 2\*\*64\)"):
        Philox(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [-1, 2**56, 0.5])
def test_first_sample_out_of_range_is_refused(first: int) -> None:
    with pytest.raises(ArgumentError, match=r"first_sample is .*2\*\*56"):
        Philox(0, first)


@pytest.mark.parametrize("draw", [-1, 2**32, 0.5])
def test_draw_out_of_range_is_refused(draw: int) -> None:
    with pytest.raises(ArgumentError, match=r"draw is .*2\*\*32"):
        Philox(0).normal(empty(2, 2), draw)


@pytest.mark.parametrize("ids", [[0.5], [True], [-1], [2**56]])
def test_ids_that_are_not_sample_numbers_are_refused(ids: list[object]) -> None:
    with pytest.raises(ArgumentError, match="sample ids"):
        Philox(0, samples=torch.tensor(ids))


def test_sources_that_do_not_fit_the_batch_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"batch of 4 samples meets a source of 3 sample ids"):
        Philox(0, samples=torch.arange(3)).normal(empty(4, 2), 0)
    with pytest.raises(ShapeError, match="one id per row"):
        Philox(0, samples=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="pass 2"):
        Philox(0, 2**56 - 1).normal(empty(2, 2), 0)
    with pytest.raises(ArgumentError, match="give one of them"):
        Philox(0, 1, samples=torch.arange(3))


@pytest.mark.parametrize("index", [slice(-2, None), slice(0, -1), slice(None, None, 2)], ids=str)
def test_rows_from_an_unknown_end_are_refused(index: slice) -> None:
    with pytest.raises(ArgumentError, match="no known end"):
        Philox(0).rows(index)


@pytest.mark.parametrize(
    "source",
    [Philox(0), GeneratorNoise(torch.Generator()), CallableNoise(lambda x, t, s: x)],
    ids=lambda source: type(source).__name__,
)
def test_noise_for_something_else_than_a_floating_batch_is_refused(source: NoiseSource) -> None:
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(ArgumentError, match="give a floating tensor"):
            source.normal(empty(2, 2, dtype=dtype), 0)
    with pytest.raises(ShapeError, match="batch dimension"):
        source.normal(empty(), 0)


def test_words_that_are_not_uint32_are_refused() -> None:
    good, key = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"counter has shape \(3,\): give \[\.\.\., 4\]"):
        philox4x32(good[:3], key)
    for wrong in (good.int(), good - 1, good + 2**32):
        with pytest.raises(ArgumentError, match="counter is not int64 holding uint32 values"):
            philox4x32(wrong, key)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_path_without_length_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="has no length"):
        BrownianPath(Philox(0), *ends)


def test_times_that_a_path_cannot_answer_are_refused() -> None:
    path, like = BrownianPath(Philox(0), 0.0, 1.0), empty(3, 2)
    for t in (-0.1, 1.1, math.nan, torch.tensor([0.1, 0.2, 1.5])):
        with pytest.raises(ArgumentError, match="outside the path's interval"):
            path.increment(like, 0.0, t)
    for shape in ((1,), (2,), (3, 1)):
        with pytest.raises(ShapeError, match="one time per sample"):
            path.increment(like, 0.0, torch.zeros(shape))
    for tolerance in (0.0, -1.0, 2.0**-32, math.nan):
        with pytest.raises(ArgumentError, match="cannot be resolved"):
            BrownianPath(Philox(0), 0.0, 1.0, tolerance)
