"""Time grids: where a fixed-grid solver evaluates its model.

A spacing is a monotone variable q(t); its grid is uniform in q between t_start and t_end:

    uniform  t                    log_snr     log(alpha/sigma)        karras   k^(1/rho)
    quadratic  sqrt(t)            cosine      angle = atan(k)         flow     k/(1 + k)
    shift  flow time, unshifted   sqrt_angle  sqrt(angle)             with k = sigma/alpha
    scaled  sqrt(atan(k/level)), the first step half as long, for the default solver

The end rule is part of the grid: stop at t_end, or add one call that jumps to sigma = 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from scoresolve.errors import (
    MOST_STEPS,
    ArgumentError,
    GridError,
    UnknownNameError,
    known_name,
    short,
    step_count,
    yes_or_no,
)
from scoresolve.precision import host
from scoresolve.sde import SDE, DiscreteVP, GaussianSDE, check_process

__all__ = ["GRIDS", "INTEGER_GRIDS", "Grid", "as_grid", "make_grid"]


@dataclass(frozen=True)
class Grid:
    """Strictly monotone times, and how the last of them ends.

    Args:
        times: at least two (one if `denoise`), decreasing for sampling, increasing for encoding.
        denoise: after the last time, call the model once more and jump to its x0 (sigma = 0).
        name: what the grid is called.

    Raises:
        GridError: times are not finite, or not strictly monotone, or too few.
    """

    times: tuple[float, ...]
    denoise: bool = False
    name: str = "custom"

    def __post_init__(self) -> None:
        times = _numbers(self.times)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "denoise", yes_or_no("denoise", self.denoise))
        if len(times) < (1 if self.denoise else 2):
            raise GridError(f"a grid of {len(times)} times has no step: give at least two times")
        if not all(math.isfinite(t) for t in times):
            bad = next(t for t in times if not math.isfinite(t))
            raise GridError(f"the grid holds a time that is not finite: {bad}")
        steps = [s - t for t, s in itertools.pairwise(times)]
        if not (all(h < 0 for h in steps) or all(h > 0 for h in steps)):
            i = next((i for i, h in enumerate(steps) if h * steps[0] <= 0), 0)
            raise GridError(
                f"times {i} and {i + 1} of the grid are {times[i]:g} and {times[i + 1]:g}: "
                "times must be strictly monotone"
            )

    @property
    def steps(self) -> int:
        """Number of steps, not counting a final denoising call."""
        return len(self.times) - 1

    def check(self, sde: SDE) -> None:
        """Raise `GridError` unless every time lies in the interval [0, T] of `sde`.

        Raises:
            ArgumentError: `sde` is no process; see `scoresolve.sde.check_process`.
        """
        check_process(sde)
        low, high = min(self.times), max(self.times)
        if low < 0 or high > sde.T * (1 + 1e-12):
            raise GridError(
                f"the grid covers [{low:g}, {high:g}], outside the interval [0, {sde.T:g}] of {sde}"
            )


def _numbers(times: Iterable[float]) -> tuple[float, ...]:
    """Times as floats, at most `MOST_STEPS` + 1 of them."""
    if isinstance(times, str):
        raise GridError(
            f"the grid is {times!r}: give a Grid or a sequence of times; a named grid comes from "
            "make_grid(name, sde, steps)"
        )
    try:
        if isinstance(times, Tensor):
            times = times.tolist()
        numbers = [_number(t) for t in itertools.islice(times, MOST_STEPS + 2)]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GridError(
            f"the grid is {short(times)}: give a Grid or a sequence of times; a named grid comes "
            "from make_grid(name, sde, steps)"
        ) from error
    if len(numbers) > MOST_STEPS + 1:
        raise GridError(f"the grid has more than {MOST_STEPS} steps: give fewer times")
    return tuple(numbers)


def _number(t: object) -> float:
    if isinstance(t, str | bytes | bool):
        raise TypeError(f"{t!r} is no time")
    return float(t)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Spacing:
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _of_noise_ratio(
    sde: SDE, forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]
) -> _Spacing:
    """A spacing in k = sigma/alpha, given by functions of log k."""
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(
            f"this grid needs the log-SNR, which {sde} does not have: use 'uniform'"
        )
    return _Spacing(
        lambda t: forward(-sde.log_snr(t) / 2),
        lambda q: sde.time_from_log_snr(-2 * inverse(q)),
    )


def _uniform(sde: SDE) -> _Spacing:
    return _Spacing(lambda t: t, lambda q: q)


def _quadratic(sde: SDE) -> _Spacing:
    return _Spacing(torch.sqrt, torch.square)


def _log_snr(sde: SDE) -> _Spacing:
    return _of_noise_ratio(sde, lambda log_k: log_k, lambda q: q)


def _karras(sde: SDE, rho: float = 7.0) -> _Spacing:
    return _of_noise_ratio(sde, lambda log_k: (log_k / rho).exp(), lambda q: rho * q.log())


def _angle(sde: SDE, power: float = 1.0, level: float = 1.0) -> _Spacing:
    return _of_noise_ratio(
        sde,
        lambda log_k: (log_k.exp() / level).atan() ** power,
        lambda q: (level * (q ** (1 / power)).tan()).log(),
    )


def _sqrt_angle(sde: SDE) -> _Spacing:
    return _angle(sde, power=0.5)


def _shift(sde: SDE, shift: float = 3.0) -> _Spacing:
    return _of_noise_ratio(
        sde,
        lambda log_k: torch.sigmoid(log_k - math.log(shift)),
        lambda q: torch.logit(q) + math.log(shift),
    )


def _scaled(sde: SDE, scale: float = 1.0) -> _Spacing:
    return _angle(sde, power=0.5, level=0.9 * scale)


def _flow(sde: SDE) -> _Spacing:
    return _shift(sde, shift=1.0)


_SPACINGS: dict[str, Callable[..., _Spacing]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "log_snr": _log_snr,
    "karras": _karras,
    "cosine": _angle,
    "sqrt_angle": _sqrt_angle,
    "flow": _flow,
    "scaled": _scaled,
    "shift": _shift,
    "polyexponential": _log_snr,
    "beta": _uniform,
}


def _warp(name: str, u: Tensor, rho: float = 1.0, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Where on [0, 1] the nodes of a spacing lie; evenly unless the grid is defined otherwise."""
    if name == "polyexponential":
        return 1 - (1 - u) ** rho
    if name == "scaled":  # the first step is half of the others, as it has no past
        return (u - u[1] / 2).clamp(min=0) / (1 - u[1] / 2)
    if name == "beta":
        return torch.from_numpy(1 - betaincinv(a, b, (1 - u).numpy()))
    return u


def _leading(n: int, steps: int) -> Iterable[float]:
    return (n // steps) * np.arange(steps)


def _linspace(n: int, steps: int) -> Iterable[float]:
    return np.linspace(0, n - 1, steps).round()


def _trailing(n: int, steps: int) -> Iterable[float]:
    return (n - np.arange(steps) * n / steps).round() - 1


_INTEGER: dict[str, Callable[[int, int], Iterable[float]]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}

INTEGER_GRIDS = tuple(_INTEGER)
GRIDS = (*_SPACINGS, *INTEGER_GRIDS)

_OPTIONS = {
    "karras": ("rho",),
    "polyexponential": ("rho",),
    "shift": ("shift",),
    "beta": ("a", "b"),
    "scaled": ("scale",),
}
"""Options of the grids that have some."""


def make_grid(
    name: str,
    sde: SDE,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool | None = None,
    *,
    rho: float | None = None,
    shift: float | None = None,
    a: float | None = None,
    b: float | None = None,
    scale: float | None = None,
    **other: object,
) -> Grid:
    """The named grid of `steps` steps from `t_start` to `t_end`.

    Args:
        name: one of `GRIDS`. "leading", "linspace" and "trailing" are the integer grids of DDPM
            for `DiscreteVP`: `steps` timesteps, whose natural end is the denoising call.
        sde: the process.
        steps: number of steps, 1 to 10**6 (the denoising call comes on top; integer grids include
            it).
        t_start: first time; the process's T if omitted.
        t_end: last time; the process's t_min if omitted. May exceed t_start, for encoding.
        denoise: the end rule; if omitted, False (True for the integer grids).
        rho: exponent of "karras" (7 if omitted) and of "polyexponential" (1 if omitted).
        shift: factor of sigma/alpha in "shift", > 0; 3 if omitted.
        a, b: parameters of the "beta" grid, > 0; 0.6 if omitted.
        scale: of "scaled", the noise level sigma/alpha at which the modes of the data part, > 0;
            1 if omitted.
        **other: refused, as is an option of another grid.

    Returns:
        A `Grid` whose first and last times are exactly `t_start` and `t_end`.

    Raises:
        UnknownNameError: no such grid, or an option that it does not have.
        GridError: the interval is empty or leaves the process's.
        ArgumentError: the grid does not fit the process, `steps` is not such a number, or an
            option is not positive.

    Source:
        karras: Karras et al. 2022 (2206.00364), eq. 5. quadratic: Song et al. 2020 (2010.02502),
        appendix D.3. log_snr: Lu et al. 2022 (2206.00927), section 3.3. beta: Lee et al. 2024
        (2407.12173), section 3.2. shift: Esser et al. 2024 (2403.03206), eq. 23. Integer grids:
        Lin et al. 2023 (2305.08891), table 2.
    """
    known_name("grid", name, GRIDS)
    steps = step_count("steps", steps)
    denoise = None if denoise is None else yes_or_no("denoise", denoise)
    check_process(sde)
    given = {"rho": rho, "shift": shift, "a": a, "b": b, "scale": scale}
    options = _own_options(name, {k: v for k, v in given.items() if v is not None} | other)
    if name in _INTEGER:
        if t_start is not None or t_end is not None:
            raise ArgumentError(
                f"the grid {name!r} is fixed by the chain: leave out t_start= and t_end="
            )
        return _integer_grid(name, sde, steps, True if denoise is None else denoise)
    start, end = ends(sde, t_start, t_end)
    warped = name in ("polyexponential", "beta")  # their options say where the nodes lie
    spacing = _SPACINGS[name](sde, **({} if warped else options))
    Grid((start, end)).check(sde)
    q = spacing.forward(host([start, end]))
    if not torch.isfinite(q).all():
        raise GridError(
            f"the grid {name!r} is singular at t = {start:g} or {end:g}, where alpha or sigma "
            "vanishes: move that end inside, or choose 'uniform', 'cosine' or 'flow'"
        )
    u = _even(steps)
    u = _warp(name, u, **(options if warped else {}))
    if name == "scaled" and start < end:  # its short step is the one at the noise
        u = 1 - u.flip(0)
    inner = spacing.inverse(q[0] + u * (q[1] - q[0]))[1:-1].tolist()
    return Grid((start, *inner, end), bool(denoise), name)


def _even(steps: int) -> Tensor:
    """`steps` + 1 even numbers from 0 to 1, [steps + 1]; each half is counted from its own end."""
    i = host(range(steps + 1))
    return torch.where(i < (steps + 1) // 2, i / steps, 1 - (steps - i) / steps)


def _own_options(name: str, options: dict[str, Any]) -> dict[str, float]:
    """The options of a grid, each a positive number; another grid's are refused."""
    own = _OPTIONS.get(name, ())
    for option, value in options.items():
        if option not in own:
            raise UnknownNameError(f"option of the grid {name!r},", option, own)
        if isinstance(value, bool | str) or not _positive(value):
            raise ArgumentError(f"{option} = {short(value)}: give a positive number")
    return {option: float(value) for option, value in options.items()}


def _positive(value: Any) -> bool:
    try:
        return 0 < float(value) < math.inf
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def ends(sde: SDE, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    """First and last time: those given, or the process's own."""
    try:
        start = _number(sde.T if t_start is None else t_start)
        end = _number(sde.t_min if t_end is None else t_end)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GridError(
            f"t_start = {short(t_start)}, t_end = {short(t_end)}: give numbers"
        ) from error
    if not (math.isfinite(start) and math.isfinite(end)):
        raise GridError(f"the grid from {start} to {end} has an end that is not finite")
    return start, end


def _integer_grid(name: str, sde: SDE, steps: int, denoise: bool) -> Grid:
    if not isinstance(sde, DiscreteVP):
        raise ArgumentError(f"the grid {name!r} is made of integer timesteps: it needs DiscreteVP")
    if steps > sde.T:
        raise ArgumentError(f"{steps} timesteps asked of a chain of {sde.T:g}")
    timesteps = sorted({float(n) for n in _INTEGER[name](int(sde.T), steps)}, reverse=True)
    return Grid(tuple(n + 1 for n in timesteps), denoise, name)


def as_grid(grid: Grid | Sequence[float] | Tensor, denoise: bool | None = None) -> Grid:
    """A user's times as a `Grid`; `denoise` overrides the grid's own end rule if it is given.

    Raises:
        GridError: `grid` is not a sequence of times that make a grid.
    """
    if isinstance(grid, Grid):
        return grid if denoise is None else Grid(grid.times, denoise, grid.name)
    return Grid(_numbers(grid), False if denoise is None else denoise)
