"""Time grids, each against its published formula written out here.

With k = sigma/alpha a spacing is uniform in a variable q(t); the expected times solve q(t) = q_i by
a bracketing root search that shares nothing with the grids' own inverses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import beta as beta_distribution
from strategies import PROCESSES, BenesSDE, OwnGaussian, fractions

from scoresolve.errors import ArgumentError, GridError, ScoresolveError, UnknownNameError
from scoresolve.grid import GRIDS, Grid, as_grid, make_grid
from scoresolve.sde import EDM, VE, VP, CosineVP, DiscreteVP, GaussianSDE, RectifiedFlow, SubVP

INTEGER = ("leading", "linspace", "trailing")
SPACINGS = tuple(name for name in GRIDS if name not in INTEGER)
CHAIN = DiscreteVP.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
PROCESSES_BY_HAND = [VP(), SubVP(), CosineVP(), VE(), EDM(), RectifiedFlow(), OwnGaussian(), CHAIN]


def noise_ratio(sde: GaussianSDE, t: float) -> float:
    return float(sde.sigma(t)) / float(sde.alpha(t))


def uniform_in(
    variable: Callable[[float], float], start: float, end: float, steps: int
) -> list[float]:
    """The times between `start` and `end` at which `variable` takes evenly spaced values."""
    first, last = variable(start), variable(end)
    low, high = sorted((start, end))
    return [
        start,
        *(
            brentq(
                lambda t, q=first + i / steps * (last - first): variable(t) - q,
                low,
                high,
                xtol=1e-300,
                rtol=1e-14,
            )
            for i in range(1, steps)
        ),
        end,
    ]


VARIABLES: dict[str, Callable[[float, float], float]] = {
    "uniform": lambda t, k: t,
    "quadratic": lambda t, k: t**0.5,
    "log_snr": lambda t, k: math.log(k),
    "karras": lambda t, k: k ** (1 / 7),
    "cosine": lambda t, k: math.atan(k),
    "sqrt_angle": lambda t, k: math.atan(k) ** 0.5,
    "flow": lambda t, k: k / (1 + k),
    "shift": lambda t, k: (k / 3) / (1 + k / 3),
    "polyexponential": lambda t, k: math.log(k),
}


# --- the published formulas ----------------------------------------------------------------------


@pytest.mark.parametrize("sde", PROCESSES_BY_HAND, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("name", VARIABLES)
def test_every_spacing_is_uniform_in_its_variable(name: str, sde: GaussianSDE) -> None:
    start, end = 0.9 * sde.T, 0.02 * sde.T
    expected = uniform_in(lambda t: VARIABLES[name](t, noise_ratio(sde, t)), start, end, 7)
    assert make_grid(name, sde, 7, start, end).times == pytest.approx(expected, rel=1e-11)


def test_every_spacing_has_its_formula_in_this_file() -> None:
    assert set(SPACINGS) == {*VARIABLES, "beta", "scaled"}


@pytest.mark.parametrize("steps", [1, 3, 8, 40])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_scaled_grid_is_the_root_of_an_angle_with_half_a_first_step(
    steps: int, scale: float
) -> None:
    sde, sizes = EDM(), [0.5] + [1.0] * (steps - 1)
    roots = [math.atan(k / (0.9 * scale)) ** 0.5 for k in (sde.T, sde.t_min)]
    place = [sum(sizes[:i]) / sum(sizes) for i in range(steps + 1)]
    angles = [(roots[0] + u * (roots[1] - roots[0])) ** 2 for u in place]
    expected = [0.9 * scale * math.tan(angle) for angle in angles]
    assert make_grid("scaled", sde, steps, scale=scale).times == pytest.approx(expected, rel=1e-9)


def test_karras_grid_is_equation_5() -> None:
    rho, n, low, high = 7.0, 8, 0.002, 80.0
    expected = [
        (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(n)
    ]
    grid = make_grid("karras", EDM(), n - 1)
    assert grid.times == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0, 11.0])
def test_karras_exponent_is_rho(rho: float) -> None:
    expected = [
        (50 ** (1 / rho) + i / 5 * (0.1 ** (1 / rho) - 50 ** (1 / rho))) ** rho for i in range(6)
    ]
    assert make_grid("karras", EDM(), 5, 50.0, 0.1, rho=rho).times == pytest.approx(expected)


@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
def test_polyexponential_grid_is_that_of_k_diffusion(rho: float) -> None:
    n, low, high = 6, 0.05, 20.0
    ramp = [((n - 1 - i) / (n - 1)) ** rho for i in range(n)]
    expected = [math.exp(u * (math.log(high) - math.log(low)) + math.log(low)) for u in ramp]
    grid = make_grid("polyexponential", EDM(), n - 1, high, low, rho=rho)
    assert grid.times == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.5, 1.5), (1.0, 1.0)])
def test_beta_grid_lies_at_quantiles_of_the_beta_law(a: float, b: float) -> None:
    grid = make_grid("beta", RectifiedFlow(), 8, 1.0, 0.1, a=a, b=b)
    probability = [beta_distribution.cdf((t - 0.1) / 0.9, a, b) for t in grid.times]
    assert probability == pytest.approx([1 - i / 8 for i in range(9)], abs=1e-12)


@given(shift=st.floats(0.2, 12), steps=st.integers(2, 20))
def test_shift_grid_maps_flow_times_as_published(shift: float, steps: int) -> None:
    def mapped(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    start, end = 0.97, 0.01
    grid = make_grid("shift", RectifiedFlow(), steps, mapped(start), mapped(end), shift=shift)
    expected = [mapped(start + i / steps * (end - start)) for i in range(steps + 1)]
    assert grid.times == pytest.approx(expected, rel=1e-11)


def test_flow_grid_of_rectified_flow_is_uniform_and_needs_no_inner_end() -> None:
    expected = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert make_grid("flow", RectifiedFlow(), 4, 1.0, 0.0).times == pytest.approx(
        expected, abs=1e-15
    )


TABLE_2 = {
    "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
    "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
    "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
}


@pytest.mark.parametrize("name", TABLE_2)
def test_integer_grids_are_table_2_of_lin_et_al(name: str) -> None:
    grid = make_grid(name, CHAIN, 10)
    assert grid.times == tuple(map(float, TABLE_2[name]))
    assert grid.denoise and grid.name == name and grid.steps == 9
    assert not make_grid(name, CHAIN, 10, denoise=False).denoise


@pytest.mark.parametrize("name", INTEGER)
def test_integer_grids_hold_as_many_timesteps_as_asked(name: str) -> None:
    for steps in range(1, 1001):
        times = make_grid(name, CHAIN, steps).times
        assert len(times) == steps, steps
        assert times[-1] >= 1 and times[0] <= 1000, steps
        assert all(t == int(t) for t in times)


# --- what holds for all of them ------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", SPACINGS)
@settings(max_examples=8)
@given(data=st.data(), steps=st.integers(1, 100))
def test_grids_are_strictly_monotone_with_exact_ends_inside_the_process(
    name: str, kind: str, data: st.DataObject, steps: int
) -> None:
    sde = data.draw(PROCESSES[kind])
    start, end = (sde.T * data.draw(fractions(1e-3, 0.99)) for _ in range(2))
    assume(abs(start - end) > 1e-2 * sde.T)
    grid = make_grid(name, sde, steps, start, end)
    assert grid.times[0] == start and grid.times[-1] == end
    assert grid.steps == steps and len(grid.times) == steps + 1
    sign = math.copysign(1.0, end - start)
    assert all(sign * (s - t) > 0 for t, s in itertools.pairwise(grid.times))
    grid.check(sde)


@pytest.mark.parametrize("name", [n for n in SPACINGS if n not in ("polyexponential", "beta")])
@given(steps=st.integers(1, 30))
def test_an_ascending_grid_is_the_descending_one_reversed(name: str, steps: int) -> None:
    down, up = make_grid(name, VP(), steps, 0.9, 0.02), make_grid(name, VP(), steps, 0.02, 0.9)
    assert up.times == pytest.approx(down.times[::-1], rel=1e-12)


@pytest.mark.parametrize("sde", PROCESSES_BY_HAND, ids=lambda sde: type(sde).__name__)
def test_ends_default_to_those_of_the_process(sde: GaussianSDE) -> None:
    grid = make_grid("uniform", sde, 3)
    assert (grid.times[0], grid.times[-1]) == (sde.T, sde.t_min)
    assert not grid.denoise and make_grid("uniform", sde, 3, denoise=True).denoise


def test_uniform_and_quadratic_grids_need_no_gaussian_process() -> None:
    sde = BenesSDE()
    assert make_grid("uniform", sde, 3).times == pytest.approx((1.5, 1.0, 0.5, 0.0))
    assert make_grid("quadratic", sde, 2).times == pytest.approx((1.5, 0.375, 0.0))


def test_as_grid_takes_sequences_tensors_and_grids() -> None:
    for times in ([1.0, 0.5], (1, 0.5), torch.tensor([1.0, 0.5])):
        assert as_grid(times) == Grid((1.0, 0.5))
    named = Grid((1.0, 0.5), True, "mine")
    assert as_grid(named) is named
    assert as_grid(named, False) == Grid((1.0, 0.5), False, "mine")
    assert as_grid([1.0], True) == Grid((1.0,), True)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, message",
    [
        ((), "0 times"),
        ((0.5,), "at least two"),
        ((1.0, 0.5, 0.5, 0.1), "times 1 and 2 of the grid are 0.5 and 0.5"),
        ((1.0, 0.5, 0.7), "times 1 and 2 of the grid are 0.5 and 0.7"),
        ((0.1, 0.5, 0.4), "strictly monotone"),
        ((0.5, 0.5), "times 0 and 1"),
        ((1.0, math.nan), "not finite"),
        ((math.inf, 0.5), "not finite"),
    ],
)
def test_bad_times_are_named(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(GridError, match=message):
        Grid(times)


def test_a_grid_of_one_time_has_only_the_denoising_call() -> None:
    assert Grid((0.5,), denoise=True).steps == 0
    with pytest.raises(GridError, match="0 times"):
        Grid((), denoise=True)


@pytest.mark.parametrize("t_start, t_end", [(1.2, 0.1), (0.9, -0.1)])
def test_times_outside_the_process_are_refused(t_start: float, t_end: float) -> None:
    with pytest.raises(GridError, match=r"outside the interval \[0, 1\]"):
        make_grid("uniform", VP(), 4, t_start, t_end)
    with pytest.raises(GridError, match="outside"):
        Grid((t_start, t_end)).check(VP())


@pytest.mark.parametrize("t_start, t_end", [(0.5, 0.5), (math.nan, 0.1), (0.9, math.inf)])
def test_an_interval_without_length_or_ends_is_refused(t_start: float, t_end: float) -> None:
    with pytest.raises(GridError):
        make_grid("uniform", VP(), 4, t_start, t_end)


@pytest.mark.parametrize("name", ["log_snr", "karras", "polyexponential"])
def test_a_singular_end_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(GridError, match=r"singular at t = 1 .*'uniform', 'cosine' or 'flow'"):
        make_grid(name, RectifiedFlow(), 4)
    for safe in ("uniform", "cosine", "sqrt_angle", "flow", "shift", "beta", "quadratic"):
        assert make_grid(safe, RectifiedFlow(), 4, t_end=0.0).times[-1] == 0.0


def test_log_snr_grid_is_singular_at_zero_noise() -> None:
    with pytest.raises(GridError, match="singular"):
        make_grid("log_snr", VP(), 4, t_end=0.0)


@pytest.mark.parametrize(
    "given_name, near", [("karas", "'karras'"), ("Karras", "'karras'"), ("trailng", "'trailing'")]
)
def test_an_unknown_grid_gets_the_nearest_names(given_name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"grid '{given_name}': did you mean {near}"):
        make_grid(given_name, VP(), 4)


def test_a_grid_like_no_other_gets_all_names() -> None:
    with pytest.raises(UnknownNameError, match=f"known are 'uniform'.*'{GRIDS[-1]}'"):
        make_grid("#", VP(), 4)


@pytest.mark.parametrize("steps", [0, -3, 2.5, math.nan, math.inf, "ten", "5", None])
def test_steps_that_are_no_positive_whole_number_are_refused(steps: object) -> None:
    with pytest.raises(ArgumentError, match="whole number"):
        make_grid("uniform", VP(), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", INTEGER)
def test_integer_grids_need_a_chain_that_is_long_enough(name: str) -> None:
    with pytest.raises(ArgumentError, match="DiscreteVP"):
        make_grid(name, VP(), 4)
    with pytest.raises(ArgumentError, match="1001 timesteps asked of a chain of 1000"):
        make_grid(name, CHAIN, 1001)


@pytest.mark.parametrize("name", INTEGER)
def test_integer_grids_do_not_drop_an_end_in_silence(name: str) -> None:
    with pytest.raises(ArgumentError):
        make_grid(name, CHAIN, 10, t_start=500.0)


@pytest.mark.parametrize("name", [n for n in SPACINGS if n not in ("uniform", "quadratic", "beta")])
def test_log_snr_spacings_need_a_gaussian_process(name: str) -> None:
    with pytest.raises(ArgumentError, match="use 'uniform'"):
        make_grid(name, BenesSDE(), 4)


@pytest.mark.parametrize(
    "name, setting",
    [
        ("karras", {"rho": 0.0}),
        ("karras", {"rho": math.nan}),
        ("polyexponential", {"rho": -1.0}),
        ("shift", {"shift": 0.0}),
        ("shift", {"shift": -1.0}),
        ("beta", {"a": -0.6}),
        ("beta", {"b": 0.0}),
    ],
)
def test_settings_out_of_range_are_named(name: str, setting: dict[str, float]) -> None:
    (key,) = setting
    with pytest.raises(ArgumentError, match=key):
        make_grid(name, EDM(), 4, **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", ["karras", 5, torch.tensor(1.0), torch.ones(2, 2), [None, 1.0]])
def test_what_is_no_list_of_times_is_refused(times: object) -> None:
    with pytest.raises(ScoresolveError):
        as_grid(times)  # type: ignore[arg-type]
