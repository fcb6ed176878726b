"""Cost of adaptive solvers at a given error, ours and the peers', on samples of mixed stiffness.

Mixtures with standard deviations from 1e-3 to 1 give a batch in which some samples are smooth and
others stiff. Of a start x_T the flow's exact image x_0 is known to 1e-10, and

    rms = sqrt(mean_i |y_i - x_i|^2 / D),   rows = samples evaluated / samples in the batch.

Each solver runs down a ladder of tolerances; its cost at a given rms is interpolated in logarithms
between two neighbours on the ladder that enclose it, the cheapest such pair. All share one network,
which counts. `u` is log(sigma/alpha), where the flow of x/alpha has the slope sigma/alpha eps.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import scoresolve as ss
from benchmarks.absent import absent
from scoresolve.models import Model
from scoresolve.peers import k_sampling
from scoresolve.sde import EDM, VP, GaussianSDE, TimeLike, expand
from scoresolve.solvers import Integrator
from scoresolve.solvers.adaptive import (
    AdaptiveAdams,
    BogackiShampine,
    DormandPrince,
    DormandPrince853,
    Tsitouras,
)
from scoresolve.targets import GaussianMixture

__all__ = ["CASES", "OURS", "PEERS", "TARGETS", "bracket", "measure", "measure_time", "mixed"]

BATCH, MOST_CALLS = 256, 20_000
WIDTHS = (192, 640)
"""Of the networks whose time is measured: about 1.5 and 11 ms for 256 samples on a core."""
TARGETS = (1e-3, 1e-4)


# --- cases ---------------------------------------------------------------------------------------


def mixed(
    size: int, components: int = 8, uneven: bool = False, low: float = 1e-3
) -> GaussianMixture:
    """Components of standard deviations `low` to 1 about standard normal means.

    Args:
        size: D.
        components: how many.
        uneven: whether the standard deviations differ within a component, drawn log-uniformly;
            else components are round, and theirs evenly spaced in logarithm.
        low: the least.
    """
    generator = torch.Generator().manual_seed(int(uneven))
    means = torch.randn(components, size, generator=generator, dtype=torch.float64)
    place = torch.linspace(0, 1, components, dtype=torch.float64)[:, None].expand_as(means)
    if uneven:
        place = torch.rand(components, size, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.ones(components), means, low ** (2 * place))


CASES: dict[str, tuple[Callable[[], GaussianMixture], GaussianSDE]] = {
    "round 8-D, EDM": (lambda: mixed(8), EDM()),
    "uneven 8-D, EDM": (lambda: mixed(8, 6, uneven=True), EDM()),
    "round 8-D, VP": (lambda: mixed(8), VP()),
    "round 2-D, EDM": (lambda: mixed(2), EDM()),
    "round 32-D, EDM": (lambda: mixed(32), EDM()),
    "uneven 32-D, VP": (lambda: mixed(32, 6, uneven=True), VP()),
}
SMALL = tuple(CASES)[:3]


class Network(Model):
    """An exact model that counts calls and samples, and may cost as much as a network.

    Args:
        exact: what it answers.
        burden: run on every sample for its cost alone.
    """

    def __init__(self, exact: Model, burden: nn.Module | None = None) -> None:
        self.exact, self.sde, self.data_scale = exact, exact.sde, exact.data_scale
        self.burden, self.calls, self.rows = burden, 0, 0

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        if self.calls > MOST_CALLS:
            raise RuntimeError(f"more than {MOST_CALLS} calls")
        m = self.exact.predict(prediction, x, t, **cond)
        return m if self.burden is None else m + 0 * self.burden(x)


def perceptron(size: int, width: int) -> nn.Module:
    """Two products with a matrix of width x width a sample."""
    parts = [nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(width, width), nn.Linear(width, size)).double()


@dataclass(frozen=True)
class Problem:
    """Starts, their exact images and the process between; `model` is exact."""

    name: str
    model: Model
    sde: GaussianSDE
    x: Tensor
    truth: Tensor

    @classmethod
    def of(cls, name: str) -> Problem:
        make, sde = CASES[name]
        mixture = make()
        model, generator = mixture.score_model(sde), torch.Generator().manual_seed(1)
        x = torch.randn(BATCH, *mixture.event_shape, generator=generator, dtype=torch.float64)
        x = sde.prior_std * x
        fine = DormandPrince(1e-11, 1e-11, coordinates="scaled")
        return cls(name, model, sde, x, ss.sample(model, sde, x=x, solver=fine).x)


# --- solvers -------------------------------------------------------------------------------------

Run = Callable[[Problem, Model, float], Tensor]
"""The state at t_min from `problem.x` by the given model, at the given tolerance."""


def _ours(solver: Callable[..., Integrator], known: bool = True, **options: Any) -> Run:
    """One of our solvers; `known` is whether the model knows the scale of its data."""

    def run(problem: Problem, model: Model, tolerance: float) -> Tensor:
        model.data_scale = problem.model.data_scale if known else None
        made = solver(tolerance, tolerance, **options)
        return ss.sample(model, problem.sde, x=problem.x, solver=made).x

    return run


_PAIRS = (DormandPrince853, DormandPrince, Tsitouras, BogackiShampine)
OURS: dict[str, Run] = {
    "scoresolve adams": _ours(AdaptiveAdams),
    "scoresolve adams, scale not known": _ours(AdaptiveAdams, known=False),
    "scoresolve adams, coupled": _ours(AdaptiveAdams, coupled=True),
    **{f"scoresolve {pair.name}, scaled": _ours(pair, coordinates="scaled") for pair in _PAIRS},
    **{f"scoresolve {pair.name}, in t": _ours(pair, coordinates="time") for pair in _PAIRS},
}


class _InLogNoise:
    """The flow of x/alpha over u = log(sigma/alpha), which any solver of ODEs can take."""

    def __init__(self, problem: Problem, model: Model) -> None:
        self.sde, self.model = problem.sde, model
        ends = torch.tensor([self.sde.T, self.sde.t_min], dtype=torch.float64)
        self.ends, self.alpha = -0.5 * self.sde.log_snr(ends), self.sde.alpha(ends)
        self.y = problem.x / self.alpha[0]

    def predict(self, prediction: str, u: Tensor, y: Tensor) -> Tensor:
        t = self.sde.time_from_log_snr(-2 * u).clamp(self.sde.t_min, self.sde.T)
        return self.model.predict(prediction, expand(self.sde.alpha(t), y, t) * y, t)

    def __call__(self, u: Tensor, y: Tensor) -> Tensor:
        return expand(u.exp(), y, u) * self.predict("eps", u, y)


def _k_diffusion(order: int, ratio: float, flow: _InLogNoise, tolerance: float) -> Tensor:
    def denoise(y: Tensor, k: Tensor) -> Tensor:
        return flow.predict("x0", k[0].log(), y)

    options = {"order": order, "rtol": tolerance, "atol": ratio * tolerance, "disable": True}
    high, low = flow.ends.exp().tolist()
    y: Tensor = k_sampling().sample_dpm_adaptive(denoise, flow.y, low, high, **options)
    return y


def _torchdiffeq(flow: _InLogNoise, tolerance: float) -> Tensor:
    return _dopri5(flow, flow.y, flow.ends, tolerance)


def _torchdiffeq_in_time(problem: Problem, model: Model, tolerance: float) -> Tensor:
    ends = torch.tensor([problem.sde.T, problem.sde.t_min])
    return _dopri5(lambda t, x: model.predict("flow", x, t), problem.x, ends, tolerance)


def _dopri5(
    field: Callable[[Tensor, Tensor], Tensor], x: Tensor, ends: Tensor, tolerance: float
) -> Tensor:
    from torchdiffeq import odeint

    # Without step_t it steps beyond the end, where sigma < 0, and fails.
    options = {"method": "dopri5", "options": {"step_t": ends[1:]}}
    y: Tensor = odeint(field, x, ends, rtol=tolerance, atol=tolerance, **options)
    return y[-1]


def _torchode(method: str, flow: _InLogNoise, tolerance: float) -> Tensor:
    torchode: Any = importlib.import_module("torchode")
    term = torchode.ODETerm(flow)
    control = torchode.PIDController(tolerance, tolerance, 0.2, 0.5, 0.0, term=term)
    options = {"t_span": tuple(flow.ends), "method": method, "controller": control}
    y: Tensor = torchode.solve_ivp(term, flow.y, None, **options).ys
    return y[:, -1]


def _scipy(method: str, flow: _InLogNoise, tolerance: float) -> Tensor:
    from scipy.integrate import solve_ivp

    def slope(u: float, flat: Any) -> Any:
        y = torch.from_numpy(flat).reshape(flow.y.shape)
        return flow(torch.tensor(u), y).flatten().numpy()

    options = {"method": method, "rtol": tolerance, "atol": tolerance}
    found = solve_ivp(slope, flow.ends.tolist(), flow.y.flatten().numpy(), **options)
    return torch.from_numpy(found.y[:, -1].copy()).reshape(flow.y.shape)


def _theirs(solve: Callable[[_InLogNoise, float], Tensor]) -> Run:
    def run(problem: Problem, model: Model, tolerance: float) -> Tensor:
        flow = _InLogNoise(problem, model)
        return flow.alpha[1] * solve(flow, tolerance)

    return run


PEERS: dict[str, Run] = {
    **{
        f"k-diffusion dpm_adaptive {order}, atol = {ratio:g} rtol": _theirs(
            partial(_k_diffusion, order, ratio)
        )
        for order, ratio in ((2, 0.1), (3, 0.1), (3, 1.0))
    },
    "torchdiffeq dopri5, in t": _torchdiffeq_in_time,
    "torchdiffeq dopri5, in u": _theirs(_torchdiffeq),
    **{f"torchode {m}, in u": _theirs(partial(_torchode, m)) for m in ("dopri5", "tsit5")},
    **{f"scipy {m}, in u": _theirs(partial(_scipy, m)) for m in ("RK45", "DOP853")},
}


def peers() -> dict[str, Run]:
    """Those that are installed; says which are not."""
    missing = absent(name.split()[0] for name in PEERS)
    return {name: run for name, run in PEERS.items() if name.split()[0] not in missing}


# --- measuring -----------------------------------------------------------------------------------


class Point(NamedTuple):
    """A run: what it was asked, what it cost and how far it missed."""

    tolerance: float
    calls: float
    rows: float
    rms: float


@contextmanager
def _double() -> Iterator[None]:
    """Float64 also for what a library makes in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def run_once(run: Run, problem: Problem, tolerance: float) -> Point:
    """One run; one that fails has an infinite error."""
    network = Network(problem.model)
    try:
        with _double():
            rms = float((run(problem, network, tolerance) - problem.truth).square().mean().sqrt())
    except (ArithmeticError, AssertionError, RuntimeError):
        rms = math.inf
    rms = rms if math.isfinite(rms) else math.inf
    return Point(tolerance, network.calls, network.rows / BATCH, rms)


def ladder(run: Run, problem: Problem, per_decade: int, rms: float) -> list[Point]:
    """Runs at tolerances from 0.1 downwards, until the error is at most `rms`."""
    points: list[Point] = []
    for step in range(8 * per_decade + 1):
        points.append(run_once(run, problem, 10 ** (-1 - step / per_decade)))
        if points[-1].rms <= rms:
            break
    return points


class Bracket(NamedTuple):
    """Two neighbours on a ladder whose errors enclose `rms`."""

    a: Point
    b: Point
    rms: float

    def at(self, first: float, second: float) -> float:
        """A cost at the error, which is `first` at a and `second` at b."""
        if self.a is self.b or self.a.rms == math.inf:
            return second
        share = math.log(self.a.rms / self.rms) / math.log(self.a.rms / self.b.rms)
        return float(first ** (1 - share) * second**share)

    @property
    def calls(self) -> float:
        return self.at(self.a.calls, self.b.calls)

    @property
    def rows(self) -> float:
        return self.at(self.a.rows, self.b.rows)


def bracket(points: Sequence[Point], rms: float) -> Bracket | None:
    """The neighbours that need fewest calls for the error; None if it is never reached.

    A first point that is already below it makes both, so that the cost is an upper bound.
    """
    pairs = [Bracket(a, b, rms) for a, b in itertools.pairwise(points) if a.rms > rms >= b.rms]
    if points[0].rms <= rms:
        pairs.append(Bracket(points[0], points[0], rms))
    return min(pairs, key=lambda pair: pair.calls, default=None)


def measure(full: bool = False, cases: Sequence[str] = SMALL) -> list[dict[str, object]]:
    """Calls and rows that each solver needs for an rms of 1e-3 and of 1e-4.

    Args:
        full: all cases, four tolerances a decade, and the points of every ladder as rows of their
            own (some ten minutes), instead of `cases` and two a decade (under a minute a case).
        cases: names of `CASES`.

    Returns:
        Rows with `case`, `method`, `rms`, `calls`, `rows` and `tolerance`, which is empty where
        the costs are interpolated. The last hold geometric means over the cases.
    """
    torch.set_num_threads(1)
    methods, table = OURS | peers(), list[dict[str, object]]()
    costs: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for case in CASES if full else cases:
        problem = Problem.of(case)
        for method, run in methods.items():
            points = ladder(run, problem, 4 if full else 2, min(TARGETS))
            if full:
                table += [_row(case, method, p.rms, p.calls, p.rows, p.tolerance) for p in points]
            for rms in TARGETS:
                pair = bracket(points, rms)
                cost = (pair.calls, pair.rows) if pair else (math.inf, math.inf)
                costs.setdefault((method, rms), []).append(cost)
                table.append(_row(case, method, rms, *cost))
    for (method, rms), found in costs.items():
        calls, rows = (statistics.geometric_mean(part) for part in zip(*found, strict=True))
        table.append(_row("geometric mean", method, rms, calls, rows))
    return table


def _row(
    case: str, method: str, rms: float, calls: float, rows: float, tolerance: float = math.nan
) -> dict[str, object]:
    figures = {"rms": rms, "calls": calls, "rows": rows, "tolerance": tolerance}
    return {"case": case, "method": method} | {name: _short(v) for name, v in figures.items()}


def measure_time(
    full: bool = False, rms: float = 1e-3, widths: Sequence[int] = WIDTHS
) -> list[dict[str, object]]:
    """Wall time for an error with networks of two sizes, on one thread.

    Their cost is in proportion to the samples. Each solver is timed at the two tolerances that
    enclose the error, all in turn, and the medians are interpolated as the calls are. Of a library
    those are timed that need at most 1.2 times the calls of its best, of ours the default.

    Args:
        full: all cases, four tolerances a decade and 15 repeats (many minutes), instead of two
            cases, two a decade and 3 repeats (three minutes).
        rms: the error.
        widths: of the networks.

    Returns:
        Rows with `case`, `method`, `calls`, `rows`, `ms`, `call_ms` (of the network for the whole
        batch, with the exact score), `of_peers` and `of_ode`, the time over that of the best peer
        and over that of the best of torchdiffeq, torchode and SciPy. The last rows hold geometric
        means over the cases, of the solvers timed in all of them.
    """
    torch.set_num_threads(1)
    theirs, table = peers(), list[dict[str, object]]()
    ratios: dict[tuple[int, str], list[tuple[float, float]]] = {}
    cases, per_decade, repeats = (tuple(CASES), 4, 15) if full else (SMALL[:2], 2, 3)
    for case in cases:
        problem = Problem.of(case)
        found = {
            method: bracket(ladder(run, problem, per_decade, rms), rms)
            for method, run in (_DEFAULT | theirs).items()
        }
        pairs = _thrifty({method: pair for method, pair in found.items() if pair})
        for width in widths:
            times, call = _times(pairs, problem, repeats, width)
            best, best_ode = (
                min((t for name, t in times.items() if name.startswith(kinds)), default=math.nan)
                for kinds in (PEER_LIBRARIES, ODE_LIBRARIES)
            )
            for method, pair in pairs.items():
                ms = times[method]
                ratio = (ms / best, ms / best_ode)
                ratios.setdefault((width, method), []).append(ratio)
                table.append(_timing(case, width, method, pair.calls, pair.rows, ms, call, *ratio))
    for (width, method), several in ratios.items():
        if len(several) == len(cases):
            means = map(statistics.geometric_mean, zip(*several, strict=True))
            table.append(_timing("geometric mean", width, method, *[math.nan] * 4, *means))
    return table


_DEFAULT = {method: run for method, run in OURS.items() if "adams" in method}
ODE_LIBRARIES = ("torchdiffeq", "torchode", "scipy")
PEER_LIBRARIES = ("k-diffusion", *ODE_LIBRARIES)


def _thrifty(pairs: dict[str, Bracket]) -> dict[str, Bracket]:
    """Ours, and the solvers of each library that need at most 1.2 times the calls of its best."""
    least: dict[str, float] = {}
    for method, pair in pairs.items():
        library = method.split()[0]
        least[library] = min(pair.calls, least.get(library, math.inf))
    return {
        method: pair
        for method, pair in pairs.items()
        if method in _DEFAULT or pair.calls <= 1.2 * least[method.split()[0]]
    }


def _times(
    pairs: dict[str, Bracket], problem: Problem, repeats: int, width: int
) -> tuple[dict[str, float], float]:
    """Milliseconds of each method at the error, and of one call for the whole batch."""
    torch.manual_seed(0)
    burden = perceptron(problem.x.shape[1], width).requires_grad_(False)

    def milliseconds(work: Callable[[Network], object]) -> float:
        network = Network(problem.model, burden)
        with _double():
            begin = time.perf_counter()
            work(network)
            return (time.perf_counter() - begin) * 1e3

    works: dict[tuple[str, float], Callable[[Network], object]] = {
        (name, point.tolerance): partial(_run, name, problem, tolerance=point.tolerance)
        for name, pair in pairs.items()
        for point in (pair.a, pair.b)
    }

    def calls(network: Network) -> None:
        for _ in range(20):
            network.predict("x0", problem.x, problem.sde.T)

    works["", 0] = calls
    taken = [{end: milliseconds(work) for end, work in works.items()} for _ in range(repeats)]
    median = {end: statistics.median(one[end] for one in taken) for end in works}
    found = {
        name: pair.at(median[name, pair.a.tolerance], median[name, pair.b.tolerance])
        for name, pair in pairs.items()
    }
    return found, median["", 0] / 20


def _run(method: str, problem: Problem, model: Model, tolerance: float) -> Tensor:
    return (OURS | PEERS)[method](problem, model, tolerance)


def _timing(case: str, width: int, method: str, *figures: float) -> dict[str, object]:
    names = ("calls", "rows", "ms", "call_ms", "of_peers", "of_ode")
    row: dict[str, object] = {"case": case, "width": width, "method": method}
    return row | {name: _short(v) for name, v in zip(names, figures, strict=True)}


def _short(value: float) -> float | str:
    """Three digits; nothing for what is not known, "never" for what is never reached."""
    if not math.isfinite(value):
        return "never" if value == math.inf else ""
    return float(f"{value:.3g}")
