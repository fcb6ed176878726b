"""Error against network calls: our solvers and every peer that can run, on the same starts.

For a start x_T the probability flow has one exact image x_0 at t_min, found by an adaptive solver
at tolerance 1e-10 (1e-8 for the network). A sampler's strong error is its distance to that image
per coordinate,

    rms = sqrt(mean_i |y_i - x_i|^2 / D),   median = median_i |y_i - x_i| / sqrt(D),

over the samples i. Calls are counted as they are made; each sampler takes as many steps as the
budget allows, and every one stops at t_min. "Best peer" is the best of all samplers and grids for
that case and budget, a choice that no user could make beforehand.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.absent import absent
from scoresolve.digits import load_network
from scoresolve.files import whole_file
from scoresolve.metrics import class_mixture
from scoresolve.models import Model, from_denoiser
from scoresolve.peers import PEERS, Peer, installed
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, RectifiedFlow, TimeLike
from scoresolve.solvers import DormandPrince, Solver
from scoresolve.targets import GaussianMixture, MixtureModel, random_mixture, ring

__all__ = [
    "BUDGETS",
    "CASES",
    "GRIDS",
    "SETTINGS",
    "Score",
    "compare",
    "measure",
    "our_sampler",
    "samplers_of_peers",
]

BUDGETS = (5, 8, 10, 15, 20, 30, 50, 100)
Case = tuple[Model, GaussianSDE]


# --- cases ---------------------------------------------------------------------------------------


def _mixture(make: Callable[[], GaussianMixture], sde: GaussianSDE) -> Callable[[], Case]:
    return lambda: (make().score_model(sde), sde)


def _scaled(dimension: int, std: float, centre: float = 0.0, **options: Any) -> GaussianMixture:
    """A random mixture of the given standard deviation per coordinate, about `centre`."""
    mixture = random_mixture(dimension, **options)
    scale = std / float(mixture.covariance.diagonal().mean().sqrt())
    means = scale * (mixture.means - mixture.mean) + centre
    return GaussianMixture(mixture.weights, means, scale**2 * mixture.covariances)


def _network(sde: GaussianSDE) -> Case:
    return from_denoiser(load_network(dtype=torch.float64)).on(sde), sde


_narrow = functools.partial(_scaled, 8, 0.2, components=4, seed=1)
_wide = functools.partial(_scaled, 16, 3.0, 2.0, components=6, seed=2)
_uneven = functools.partial(_scaled, 128, 1.0, components=8, seed=3, stds=(0.01, 1.0))
_few = functools.partial(_scaled, 4, 1.0, -0.5, components=3, seed=4)
_middle = functools.partial(_scaled, 32, 0.5, components=5, seed=5, stds=(0.05, 1.0))
_line = functools.partial(_scaled, 1, 1.0, 0.3, components=3, seed=6)
_ten = functools.partial(random_mixture, 64, components=10, seed=7)
_FLOW = RectifiedFlow(T=0.999)

CASES: dict[str, Callable[[], Case]] = {
    "ring 2-D, VP": _mixture(ring, VP()),
    "ring 2-D, EDM": _mixture(ring, EDM()),
    "line 1-D, VP": _mixture(_line, VP()),
    "few 4-D off-centre, flow": _mixture(_few, _FLOW),
    "narrow 8-D std .2, VP": _mixture(_narrow, VP()),
    "narrow 8-D std .2, VE": _mixture(_narrow, VE()),
    "wide 16-D std 3 off-centre, EDM": _mixture(_wide, EDM()),
    "wide 16-D std 3 off-centre, CosineVP": _mixture(_wide, CosineVP()),
    "middle 32-D uneven, VE": _mixture(_middle, VE()),
    "middle 32-D uneven, CosineVP": _mixture(_middle, CosineVP()),
    "ten 64-D, VP": _mixture(_ten, VP()),
    "ten 64-D, EDM": _mixture(_ten, EDM()),
    "uneven 128-D, EDM": _mixture(_uneven, EDM()),
    "digits 64-D, VP": _mixture(class_mixture, VP()),
    "digits 64-D, EDM": _mixture(class_mixture, EDM()),
    "digits 64-D, flow": _mixture(class_mixture, _FLOW),
    "digits network, EDM": lambda: _network(EDM()),
}


SMALL = ("ring 2-D, VP", "wide 16-D std 3 off-centre, CosineVP", "digits 64-D, VP")
DECISIVE = (
    *(f"azula vAB{order}" for order in (2, 3, 4)),
    "azula zEAB4",
    "diffusers ipndm",
    "diffusers deis3",
    "diffusers dpmsolver 2M(midpoint)",
    "diffusers dpmsolver++ 3S",
    *(f"diffusers unipc{order}(bh1, x0)" for order in (2, 3, 4)),
    *(f"diffusers unipc{order}(bh1, eps)" for order in (3, 4)),
    "diffusers unipc2(bh2, x0)",
)
"""The peers that are best, or nearly so, in almost every case and budget."""


# --- grids ---------------------------------------------------------------------------------------


def _through_vp(name: str, sde: GaussianSDE, steps: int) -> tuple[float, ...]:
    """A grid of the linear-beta VP process, carried over at equal noise-to-signal ratio."""
    home = VP(T=2.0)
    ends = home.time_from_log_snr(
        sde.log_snr(torch.tensor([sde.T, sde.t_min], dtype=torch.float64))
    ).tolist()
    inner = ss.make_grid(name, home, steps, *ends).times[1:-1]
    times = sde.time_from_log_snr(home.log_snr(torch.tensor(inner, dtype=torch.float64))).tolist()
    return (sde.T, *times, sde.t_min)


def _named(name: str, sde: GaussianSDE, steps: int, rho: float | None = None) -> tuple[float, ...]:
    return ss.make_grid(name, sde, steps, rho=rho).times


GridMaker = Callable[[GaussianSDE, int], tuple[float, ...]]
GRIDS: dict[str, GridMaker] = {
    **{
        name: functools.partial(_named, name)
        for name in ("uniform", "quadratic", "log_snr", "karras", "cosine", "flow", "beta", "shift")
    },
    "polyexponential": functools.partial(_named, "polyexponential", rho=1.5),
    "vp_uniform": functools.partial(_through_vp, "uniform"),
    "vp_quadratic": functools.partial(_through_vp, "quadratic"),
}


def _distinct(grids: dict[str, GridMaker], sde: GaussianSDE) -> dict[str, GridMaker]:
    """The grids without those that repeat an earlier one on this process."""
    seen: list[Tensor] = []
    kept = {}
    for name, make in grids.items():
        times = torch.tensor(make(sde, 7), dtype=torch.float64)
        if not any(torch.allclose(times, other, rtol=1e-9, atol=0.0) for other in seen):
            seen.append(times)
            kept[name] = make
    return kept


# --- samplers ------------------------------------------------------------------------------------


class Counted(Model):
    """A model that counts its calls."""

    def __init__(self, model: Model) -> None:
        self.model, self.sde, self.calls = model, model.sde, 0
        self.data_scale = model.data_scale

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        self.calls += 1
        return self.model.predict(prediction, x, t, **cond)


Sampler = Callable[[Model, GaussianSDE, Sequence[float], Tensor], Tensor]


def _theirs(peer: Peer) -> Sampler:
    def run(model: Model, sde: GaussianSDE, times: Sequence[float], x: Tensor) -> Tensor:
        return peer.run(model, sde, times, x, None)

    return run


@functools.cache
def samplers_of_peers() -> dict[str, Sampler]:
    """Every deterministic peer that is installed, each method once."""
    return {
        name: _theirs(peer)
        for name, peer in PEERS.items()
        if installed(peer.library) and not (peer.stochastic or peer.repeats or peer.process)
    }


def our_sampler(solver: Solver) -> Sampler:
    """One of our solvers, traced and run for each call."""

    def run(model: Model, sde: GaussianSDE, times: Sequence[float], x: Tensor) -> Tensor:
        return ss.plan(solver, sde, times).run(model, x)

    return run


@functools.cache
def _trial() -> tuple[Model, GaussianSDE, Tensor]:
    return ss.targets.gaussian([0.0], 1.0).score_model(VP()), VP(), torch.ones(1, 1).double()


@functools.cache
def steps_within(sampler: Sampler, budget: int) -> int | None:
    """The most steps that a sampler makes within a budget of calls, found by running it."""
    model, sde, x = _trial()

    def cost(steps: int) -> float:
        counted = Counted(model)
        try:
            sampler(counted, sde, GRIDS["log_snr"](sde, steps), x)
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
            return math.inf  # too few steps for this method
        return counted.calls

    steps = budget
    while steps and cost(steps) > budget:
        steps -= 1
    return steps or None


def _starts(case: Case, count: int, seed: int = 1) -> Tensor:
    """Draws from the prior, [count, *event]; float64."""
    model, sde = case
    event = model.components.event if isinstance(model, MixtureModel) else (1, 8, 8)
    generator = torch.Generator().manual_seed(seed)
    return sde.prior_std * torch.randn(count, *event, dtype=torch.float64, generator=generator)


def _reference(model: Model, sde: GaussianSDE, x: Tensor) -> Tensor:
    """Images of the starts under the exact flow, kept on disk by the model's own fingerprint."""
    mark = hashlib.sha256(repr(sde).encode())
    for tensor in (x, model.predict("x0", x, sde.T), model.predict("x0", x, sde.T / 4)):
        mark.update(tensor.contiguous().numpy().tobytes())
    path = Path(tempfile.gettempdir()) / "scoresolve-nfe" / f"{mark.hexdigest()[:24]}.pt"
    if not path.exists():
        tolerance = 1e-10 if isinstance(model, MixtureModel) else 1e-8  # networks are dear
        exact = ss.sample(model, sde, x=x, solver=DormandPrince(tolerance, tolerance)).x
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as aside:  # another process may read it by now
            torch.save(exact, aside)
    found: Tensor = torch.load(path, weights_only=True)
    return found


@dataclass(frozen=True)
class Score:
    """One sampler on one grid within one budget: its strong error per coordinate."""

    sampler: str
    grid: str
    budget: int
    calls: int
    rms: float
    median: float


def _score(
    label: tuple[str, str],
    sampler: Sampler,
    budget: int,
    case: Case,
    times: tuple[float, ...],
    x: Tensor,
    exact: Tensor,
) -> Score:
    counted = Counted(case[0])
    with torch.no_grad():
        error = (sampler(counted, case[1], times, x) - exact).flatten(1).square().mean(1)
    if counted.calls > budget:
        raise AssertionError(f"{label[0]} made {counted.calls} calls within a budget of {budget}")
    rms, median = float(error.mean().sqrt()), float(error.median().sqrt())
    rms, median = (value if math.isfinite(value) else math.inf for value in (rms, median))
    return Score(*label, budget, counted.calls, rms, median)


def compare(
    case: Case,
    samplers: dict[str, Sampler],
    grids: dict[str, GridMaker],
    budgets: Iterable[int] = BUDGETS,
    starts: int = 128,
    screen: int = 32,
    keep: float = 10.0,
    finalists: int = 6,
    seed: int = 1,
) -> list[Score]:
    """Scores of the best pairs of sampler and grid at every budget.

    All pairs run on a part of the starts; the best by rms and by median run on all of them.

    Args:
        case: model and process.
        samplers: by name.
        grids: by name; repetitions on this process are left out.
        budgets: network calls, ascending.
        starts: number of starts.
        screen: starts of the first round.
        keep: after each budget of 10 or more, leave out pairs whose rms in the first round
            exceeds that many times the best.
        finalists: pairs of the second round, by rms and again by median.
        seed: of the starts.
    """
    model, sde = case
    x = _starts(case, starts, seed)
    exact = _reference(model, sde, x)
    pairs = list(itertools.product(samplers, _distinct(grids, sde)))
    scores: list[Score] = []
    for budget in sorted(budgets):

        def score(pair: tuple[str, str], rows: int, budget: int = budget) -> Score | None:
            sampler, grid = samplers[pair[0]], grids[pair[1]]
            steps = steps_within(sampler, budget)
            if steps is None:
                return None
            times = grid(sde, steps)
            return _score(pair, sampler, budget, case, times, x[:rows], exact[:rows])

        first = [found for pair in pairs if (found := score(pair, screen)) is not None]
        best = [sorted(first, key=key)[:finalists] for key in (_rms, _median)]
        chosen = {(found.sampler, found.grid) for found in itertools.chain(*best)}
        scores += [found for pair in sorted(chosen) if (found := score(pair, starts)) is not None]
        if budget >= 10:
            limit = keep * min(_rms(found) for found in first)
            pairs = [(found.sampler, found.grid) for found in first if found.rms <= limit]
    return scores


@dataclass(frozen=True)
class Setting:
    """What a run of the benchmark compares."""

    cases: tuple[str, ...]
    budgets: tuple[int, ...]
    starts: int
    peers: tuple[str, ...] | None = None
    grids: tuple[str, ...] = tuple(GRIDS)


SETTINGS = {
    "small": Setting(SMALL, (5, 10, 20), 64, DECISIVE, ("log_snr", "flow", "quadratic")),
    "wide": Setting(tuple(CASES), (5, 8, 10, 15, 20, 50), 128, DECISIVE),
    "one": Setting(SMALL[:1], (10, 20), 64, None, ("log_snr", "flow", "quadratic")),
    "full": Setting(tuple(CASES), BUDGETS, 256),
}
"""Two minutes, some forty; with every peer, two minutes on one case, and hours."""


def measure(setting: str = "small", solver: str = "auto") -> list[dict[str, object]]:
    """The best peer of each case and budget, what is commonly used, and one solver of ours.

    Args:
        setting: one of `SETTINGS`.
        solver: ours, on its own grid throughout, and on one fitted to other starts.

    Returns:
        A row for each case and budget: the best peer by rms, DPM-Solver++ 2M on the Karras grid,
        ours, and the ratios of ours to the best peer's rms and to the least median of any peer.
        The last rows, one a budget, hold geometric means of the ratios.
    """
    torch.set_num_threads(1)
    chosen, peers = SETTINGS[setting], samplers_of_peers()
    if chosen.peers is not None:
        peers = {name: peers[name] for name in chosen.peers if name in peers}
    if not peers:
        raise ImportError("no peer is installed: pip install 'scoresolve[bench]'")
    absent(peer.library for peer in PEERS.values())
    grids, count = {name: GRIDS[name] for name in chosen.grids}, chosen.starts
    rows: list[dict[str, object]] = []
    for name in chosen.cases:
        case = CASES[name]()
        theirs = compare(case, peers, grids, chosen.budgets, count)
        for budget in chosen.budgets:
            usual = _one(case, budget, count, solver="dpmpp_2m", grid="karras", nfe=budget)
            mine = _one(case, budget, count, solver=solver, nfe=budget)
            fit = ss.fit_grid(*case, x=_starts(case, 96, seed=2), solver=solver, nfe=budget)
            fitted = _one(case, budget, count, solver=fit.solver, grid=fit.grid)
            found = [score for score in theirs if score.budget == budget]
            rows.append(_row(name, found, usual, mine, fitted))
    for budget in chosen.budgets:
        means: dict[str, object] = {"case": "geometric mean", "nfe": budget}
        for ratio in RATIOS:
            logs = [math.log(float(str(row[ratio]))) for row in rows if row["nfe"] == budget]
            means[ratio] = _short(math.exp(sum(logs) / len(logs)))
        rows.append({**dict.fromkeys(rows[0], ""), **means})
    return rows


def _one(case: Case, budget: int, starts: int, **how: Any) -> Score:
    """The score of one of our solvers as a user calls it."""

    def run(model: Model, sde: GaussianSDE, times: Sequence[float], x: Tensor) -> Tensor:
        return ss.sample(model, sde, x=x, **how).x

    x = _starts(case, starts)
    return _score(("", ""), run, budget, case, (), x, _reference(*case, x))


RATIOS = ("rms_ratio", "median_ratio", "fitted_rms_ratio", "fitted_median_ratio")


def _row(
    name: str, theirs: list[Score], usual: Score, mine: Score, fitted: Score
) -> dict[str, object]:
    best, least = min(theirs, key=_rms), min(theirs, key=_median)
    ratios = (
        mine.rms / best.rms,
        mine.median / least.median,
        fitted.rms / best.rms,
        fitted.median / least.median,
    )
    return {
        "case": name,
        "nfe": mine.budget,
        "peer": f"{best.sampler} on {best.grid}",
        "peer_rms": _short(best.rms),
        "peer_median": _short(least.median),
        "usual_rms": _short(usual.rms),
        "our_rms": _short(mine.rms),
        "our_median": _short(mine.median),
        "fitted_rms": _short(fitted.rms),
        "fitted_median": _short(fitted.median),
        **{name: _short(ratio) for name, ratio in zip(RATIOS, ratios, strict=True)},
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _rms(score: Score) -> float:
    return score.rms


def _median(score: Score) -> float:
    return score.median
