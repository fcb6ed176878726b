r"""Fit the grid of a solver to a model, so that its calls go where the error is.

A grid of N steps has N - 1 free times. Here they are those of a first grid, bent: with t(i) the
monotone curve through its times at i = 0..N,

    t_j = t(N s_j/s_N),    s_j = sum_{i < j} exp(p_i),

where p runs smoothly through at most six numbers. They minimise, over pilot starts x_i,

    mean_i log(1 + e_i^2/m^2),    e_i = |y_i - Phi(x_i)|/sqrt(D),

with y_i what the solver makes of a start, Phi the exact flow and m three times the median of e. The
logarithm keeps the few starts that land in another mode from ruling the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.optimize import least_squares
from torch import Tensor, nn

from scoresolve.conditions import part_of
from scoresolve.driving import Given, Prior, Samples, check_call, device_of, failure, settle
from scoresolve.errors import ArgumentError, check_transforms, checked_place, whole_number
from scoresolve.grid import Grid, as_grid
from scoresolve.models import Model, as_model
from scoresolve.noise import Philox, Purpose, as_noise
from scoresolve.plans import check_state
from scoresolve.precision import doubled
from scoresolve.sampling import Times, checked_shape, grid_for, sample
from scoresolve.sde import SDE, GaussianSDE, check_process
from scoresolve.solvers import AdaptiveAdams, Integrator, Solver, get_solver
from scoresolve.tuning import LEAST_BUDGET, scale_within

__all__ = ["GridFit", "fit_grid"]

Array = NDArray[np.float64]

_KNOTS: Final = 6
_BENDS: Final = 3.0
_SHORT: Final = 8
_LONG_FIRST: Final = 1.5
_STEP: Final = 0.02
_ROUNDS, _ITERATIONS, _GAIN = 2, 6, 0.01
_FAR: Final = 3.0  # medians: the more, the better the RMS and the worse the median
_SKETCH: Final = 1024
_LOST: Final = 1e3
_LEAST_STARTS: Final = 12


@dataclass(frozen=True)
class GridFit:
    """A grid fitted to a model, and what it is worth on starts that it was not fitted to.

    Attributes:
        grid: the fitted grid, or the first one if that is better.
        solver: the solver it is for, with the scale of the data where that matters.
        rms, median: of the strong error per coordinate over the starts kept for the check.
        first_rms, first_median: the same of the first grid.
        evaluations: states at which the network was evaluated, for the fit and the exact flow.
    """

    grid: Grid
    solver: Solver
    rms: float
    median: float
    first_rms: float
    first_median: float
    evaluations: int


def fit_grid(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    *,
    shape: Sequence[int] | None = None,
    x: Tensor | None = None,
    solver: str | Solver = "auto",
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Times | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    **cond: Any,
) -> GridFit:
    """Find the grid on which a solver follows this model's flow best within a budget.

    Two thirds of the starts are fitted to, the last third is for the check. It costs about 50 to
    150 runs of the solver on the former, and the exact flow of all, so that it pays where
    thousands of samples are to be drawn.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`.
        sde: its process.
        shape: [n, *event] to start from the prior; 64 to 200 starts are enough; or
        x: starts [n, *event] at the grid's first time, at least 12.
        solver: a name of the registry or a deterministic fixed-grid solver.
        steps: number of steps; or
        nfe: at most so many calls a sample (if neither is given, 30); or
        grid: the grid to begin with. A name of `GRIDS` goes with `steps` or `nfe`; omitted it is
            the one that suits the solver.
        tolerance: of the adaptive solver that stands for the exact flow; well below the error
            that is aimed at, and above what the network's dtype resolves.
        seed: of the starts.
        chunk: samples to work on at a time; all if omitted.
        dtype, device: of the starts, with `shape`; float64 and the network's device.
        **cond: passed on to the model; tensors whose first axis is n follow their starts.

    Returns:
        A `GridFit`, whose solver and grid `sample` takes.

    Raises:
        ArgumentError: the solver draws noise or chooses its own steps, or there are too few
            starts; also as for `sample`.
        SolveError: over half of the starts have no image under the flow.

    Source:
        This package. Fitted grids: Sabour et al. 2024 (2404.14507), Chen et al. 2024 (2405.11326).
    """
    resolved = get_solver(solver)
    if isinstance(resolved, Integrator):
        raise ArgumentError(f"{resolved.name!r} chooses its steps at run time: it has no grid")
    if resolved.stochastic:
        raise ArgumentError(f"{resolved.name!r} draws noise: its error is not that of a path")
    if (shape is None) == (x is None):
        raise ArgumentError("give either shape=[n, *event] or starts x=, not both")
    check_transforms("fit_grid")
    check_process(sde)
    model = as_model(score, sde)
    check_call(score, cond, fit_grid)
    source = as_noise(None, seed)
    placed, where = checked_place(dtype, device_of(score) if device is None else device)
    if x is None:
        x = Prior(checked_shape(shape), sde, source, placed, where).rows(slice(None))
    check_state(x)
    check_process(sde, x)
    if chunk is not None:
        chunk = whole_number("chunk", chunk)
    if x.shape[0] < _LEAST_STARTS:
        raise ArgumentError(f"{x.shape[0]} starts: give at least {_LEAST_STARTS}")
    scale = model.data_scale
    if resolved.wants_scale and isinstance(sde, GaussianSDE):
        scale, _, _ = scale_within(LEAST_BUDGET, model, sde, x[:0], cond)  # outside the budget
    resolved = resolved.scaled(scale)
    if nfe is not None:
        resolved = resolved.budgeted(nfe)
    if grid is None or isinstance(grid, str):
        first = grid_for(resolved, sde, grid=grid, steps=steps, nfe=nfe)
    else:
        first = as_grid(grid)
    held = settle(cond, model, Given(x), first.times[0])
    runs = _Runs(model, sde, resolved, x, first, tolerance, chunk, held)
    split = x.shape[0] * 2 // 3
    train, check = slice(0, split), slice(split, None)
    fitted = _fit(runs, first, train)
    errors = [runs.errors(grid, check) for grid in (first, fitted)]
    before, after = ((_rms(e), float(np.median(e))) for e in errors)
    if math.prod(after) >= math.prod(before):
        fitted, after = first, before
    return GridFit(fitted, resolved, *after, *before, runs.evaluations)


class _Runs:
    """What a solver makes of the starts on any grid, against their exact images."""

    def __init__(
        self,
        model: Model,
        sde: SDE,
        solver: Solver,
        x: Tensor,
        first: Grid,
        tolerance: float,
        chunk: int | None,
        cond: dict[str, Any],
    ) -> None:
        self.model, self.sde, self.solver, self.x = model, sde, solver, x
        self.chunk, self.cond, self.evaluations = chunk, cond, 0
        exact = AdaptiveAdams(tolerance, tolerance)
        ends = {"t_start": first.times[0], "t_end": first.times[-1], "denoise": first.denoise}
        found = self._run(slice(None), solver=exact, **ends)
        self.images, self.good = found.x, found.ok
        if 2 * int(found.ok.sum()) < len(x):
            raise failure(found, found.status)
        self.signs = doubled(Philox(0).signs(x[:1], 0, Purpose.PROBE).flatten())
        self.width = min(len(self.signs), _SKETCH)
        self.last = first, slice(0), np.zeros((0, 0))

    def _run(self, part: slice, **how: Any) -> Samples:
        cond = part_of(self.cond, part, len(self.x))
        found = sample(self.model, self.sde, x=self.x[part], chunk=self.chunk, **how, **cond)
        self.evaluations += found.rows
        return found

    def misses(self, grid: Grid, part: slice) -> Array:
        """y - Phi(x) over sqrt(D) of the starts in `part` that have an image, [m, at most 1024].

        Longer rows are folded with random signs, which keeps their norms on average. A start that
        the solver loses has a large miss.
        """
        if self.last[:2] == (grid, part):
            return self.last[2]
        y = self._run(part, solver=self.solver, grid=grid).x
        miss = doubled((y - self.images[part])[self.good[part]].flatten(1))
        size = miss.shape[1]
        miss = miss.nan_to_num(_LOST, _LOST, -_LOST).clamp(-_LOST, _LOST) / math.sqrt(size)
        if size > self.width:
            signed = nn.functional.pad(miss * self.signs, (0, -size % self.width))
            miss = signed.reshape(len(miss), -1, self.width).sum(1)
        self.last = grid, part, miss.cpu().numpy()
        return self.last[2]

    def errors(self, grid: Grid, part: slice) -> Array:
        """Strong errors per coordinate of the starts in `part`."""
        squares: Array = np.square(self.misses(grid, part)).sum(1)
        return np.sqrt(squares)


def _fit(runs: _Runs, first: Grid, part: slice) -> Grid:
    """The grid of least error on the starts in `part`, from one or two bends to begin with."""
    count = min(first.steps - 1, _KNOTS)
    if not count:
        return first
    begin = np.zeros((1 if first.steps > _SHORT else 2, count))
    begin[1:, 0] = _LONG_FIRST
    found = [_descend(runs, first, part, p) for p in begin]
    return min(found, key=lambda pair: pair[0])[1]


def _descend(runs: _Runs, first: Grid, part: slice, p: Array) -> tuple[float, Grid]:
    """Gauss-Newton from a bend; the error reached (rms times median) and its grid."""

    def misses(p: Array) -> Array:
        return runs.misses(_bent(first, p), part).ravel()

    def slopes(p: Array) -> Array:
        middle = misses(p)
        return np.stack([(misses(p + _STEP * e) - middle) / _STEP for e in np.eye(len(p))], 1)

    def loss(squares: Array) -> Array:
        """Of a row as a whole; each of its numbers has the weight of the row."""
        rows = squares.reshape(-1, runs.width)
        norms = np.broadcast_to(rows.sum(1, keepdims=True), rows.shape)
        parts = np.log1p(norms) / runs.width, 1 / (1 + norms), np.zeros(rows.shape)
        return np.stack([value.ravel() for value in parts])

    errors = runs.errors(first, part)
    for _ in range(_ROUNDS):
        p = least_squares(
            misses,
            p,
            slopes,
            bounds=(-_BENDS, _BENDS),
            loss=loss,
            f_scale=max(_FAR * float(np.median(errors)), np.finfo(float).tiny),
            max_nfev=_ITERATIONS,
            ftol=_GAIN,
            xtol=_GAIN,
        ).x
        errors = runs.errors(_bent(first, p), part)
    return _rms(errors) * float(np.median(errors)), _bent(first, p)


def _bent(first: Grid, p: Array) -> Grid:
    """The first grid with its steps longer by exp(p), as p runs over them."""
    steps = first.steps
    free, along = len(p) == steps - 1, np.linspace(0, 1, steps)
    logs = np.append(p, 0.0) if free else CubicSpline(np.linspace(0, 1, len(p)), p)(along)
    ends = np.cumsum(np.exp(logs))
    curve = PchipInterpolator(np.arange(steps + 1), first.times)
    inner = curve(steps * ends[:-1] / ends[-1]).tolist()
    return replace(first, times=(first.times[0], *inner, first.times[-1]), name="fitted")


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.square(errors).mean()))
