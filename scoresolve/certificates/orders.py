"""Orders and biases from exact laws, on Gaussian data, and from exact images, on a mixture.

Orders are measured between the log-SNR levels -3 and 3 on the angle grid, where no form of the
probability flow is singular; a sampler that makes its own grid runs from its start to its end.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scoresolve.certificates.affine import AffineLaw, affine_law
from scoresolve.certificates.certificate import (
    MEAN,
    ROUNDING,
    VARIANCE,
    Bias,
    Check,
    measured_order,
    shown,
)
from scoresolve.certificates.probes import ENDLESS, Watched
from scoresolve.certificates.randomness import Seeded
from scoresolve.errors import GridError, ScoresolveError
from scoresolve.grid import make_grid
from scoresolve.noise import BrownianPath, Philox, Purpose
from scoresolve.noise.sources import Times
from scoresolve.peers import BlackBox
from scoresolve.plans import Custom, Plan
from scoresolve.sampling import grid_for, sample
from scoresolve.sampling import plan as make_plan
from scoresolve.sde import GaussianSDE
from scoresolve.solvers import DormandPrince853, Solver, noise_rule
from scoresolve.targets import GaussianMixture, gaussian, ring

__all__ = [
    "Boxed",
    "Measurable",
    "Orders",
    "Planned",
    "biases",
    "finite_checks",
    "inside",
    "orders_of",
    "start_for",
]

FINE, END, FEW = 256, 64, 64
REFERENCE, STARTS, MOST_CALLS = 1e-12, 24, 1100
"""Tolerance of the exact images, how many, and what a run that is held against them may cost."""
PATHS = 100


class ExactLaw(Protocol):
    """Errors of an exact law."""

    @property
    def mean_error(self) -> float: ...
    @property
    def variance_error(self) -> float: ...
    @property
    def path_error(self) -> float: ...


class Measurable(ABC):
    """A sampler with fixed steps whose law is to be measured.

    Attributes:
        sde: the process.
        order: the order it claims; None if none.
        strong_order: the order along a Brownian path that it claims; None if none.
        stochastic: whether it draws noise.
        rounding: errors below are rounding.
        judged_at_end: whether its last step can be judged, on a fine grid or as a jump to 0.
    """

    sde: GaussianSDE
    order: float | None
    strong_order: float | None = None
    stochastic: bool
    rounding: float = ROUNDING
    judged_at_end: bool = True

    @abstractmethod
    def law(self, n: int) -> ExactLaw:
        """The law of n steps on the Gaussian of `MEAN` and `VARIANCE`."""

    def is_linear(self, n: int) -> bool:
        """Whether no step says of itself that it is not: else no law is to be expected."""
        return True

    @abstractmethod
    def ends(self, n: int) -> tuple[float, float]:
        """The times between which n steps go."""

    @abstractmethod
    def calls(self, n: int) -> int:
        """Network calls of n steps."""

    @abstractmethod
    def kept(self) -> float:
        """Variance of the output over the true one, of data as narrow as the last noise level."""

    def jumps(self, steps: Sequence[int]) -> list[float] | None:
        """sigma^2/alpha^2 from where it jumps to 0, if that depends on the steps."""
        return None

    @abstractmethod
    def images(self, target: GaussianMixture, x: Tensor, n: int) -> Tensor:
        """Where n steps take states x [B, D], given the exact score of the target."""

    def along_paths(self, n: int) -> float | None:
        """RMS per coordinate between n and n/2 steps along Brownian paths, if it can follow one."""
        return None

    @abstractmethod
    def budgeted(self, budget: int) -> tuple[int, ExactLaw] | None:
        """Calls and law at a budget on the whole way; None where it does not reach for a step."""


class Planned(Measurable):
    """A solver of this package."""

    def __init__(self, solver: Solver, sde: GaussianSDE) -> None:
        self.solver, self.sde = solver, sde
        self.order, self.strong_order = solver.order, solver.strong_order
        self.stochastic, self.judged_at_end = solver.stochastic, solver.order is not None
        self.follows_paths = solver.stochastic and noise_rule(solver) == "path"
        self.inside = inside(sde)
        self.plan = functools.cache(self._plan)  # for as long as the subject lives
        self.on_a_path = functools.cache(self._on_a_path)

    @functools.cached_property
    def start(self) -> float:
        """Where the whole way starts."""
        return start_for(self.solver, self.sde)

    def _plan(self, n: int) -> Plan:
        return make_plan(self.solver, self.sde, make_grid("cosine", self.sde, n, *self.inside))

    def law(self, n: int) -> ExactLaw:
        return self.plan(n).law(MEAN, VARIANCE, start="marginal")

    def is_linear(self, n: int) -> bool:
        return not any(isinstance(stage, Custom) for stage in self.plan(n).stages)

    def calls(self, n: int) -> int:
        return self.plan(n).nfe

    def ends(self, n: int) -> tuple[float, float]:
        return self.inside

    def kept(self) -> float:
        plan = make_plan(self.solver, self.sde, _to_the_end(self.sde))
        law = plan.law(0.0, _last_level(self.sde, self.sde.t_min), start="marginal")
        return float(law.output_variance / law.target_variance)

    def images(self, target: GaussianMixture, x: Tensor, n: int) -> Tensor:
        return self.plan(n).run(target.score_model(self.sde), x)

    def along_paths(self, n: int) -> float | None:
        if not self.follows_paths:
            return None
        gap = self.on_a_path(n) - self.on_a_path(n // 2)
        return float(gap.square().mean().sqrt())

    def _on_a_path(self, n: int) -> Tensor:
        target = _nonlinear()
        x = target.marginal(self.sde, self.inside[0]).sample(PATHS, seed=0)
        return self.plan(n).run(target.score_model(self.sde), x, _paths(_Key(self.sde)))

    def budgeted(self, budget: int) -> tuple[int, ExactLaw] | None:
        if (traced := self._whole(budget)) is None:
            return None
        return traced.nfe, traced.law(MEAN, VARIANCE, start="marginal")

    def about(self, calls: int) -> Plan:
        """A plan of about so many calls on the whole way, one step at least."""
        steps = max(1, round(calls * self.plan(FEW).steps / self.plan(FEW).nfe))
        return make_plan(
            self.solver, self.sde, grid_for(self.solver, self.sde, steps=steps, t_start=self.start)
        )

    def _whole(self, budget: int) -> Plan | None:
        """The plan of a budget on the whole way; None where it does not reach for a step."""
        try:
            grid = grid_for(self.solver, self.sde, nfe=budget, t_start=self.start)
        except GridError:
            return None
        return make_plan(self.solver, self.sde, grid)


class Boxed(Measurable):
    """A sampler of anyone."""

    def __init__(self, box: BlackBox, sde: GaussianSDE) -> None:
        self.box, self.sde = box, sde
        self.order, self.stochastic = box.order, box.stochastic
        # else its own grid may be coarse there
        self.judged_at_end = box.gridded or box.end_of(sde) == 0
        self.rounding = ROUNDING if box.dtype == torch.float64 else 1e-4
        self.inside = inside(sde)
        target = gaussian(MEAN, VARIANCE)
        model = Watched(target.score_model(sde), most=ENDLESS)
        self.law_between = functools.cache(functools.partial(affine_law, box, model, target, sde))

    def steps(self, n: int) -> Any:
        if not self.box.gridded:
            return n
        return make_grid("cosine", self.sde, n, *self.inside).times

    def law(self, n: int) -> AffineLaw:
        return self.law_between(self.steps(n), self.ends(n))

    def ends(self, n: int) -> tuple[float, float]:
        if self.box.gridded:
            return self.inside
        return self.box.start_of(self.sde, n), self.box.end_of(self.sde)

    def calls(self, n: int) -> int:
        return self.law(n).calls

    def kept(self) -> float:
        n: Any = max(self.box.refinements, default=FINE)
        ends, last = self.ends(n), self.ends(n)[1]
        if self.box.gridded:
            n = _to_the_end(self.sde)
            ends, last = (n[0], n[-1]), n[-1]
        elif last == 0:
            last = self.law(n).lowest
        target = gaussian([0.0], [_last_level(self.sde, last)])
        model = Watched(target.score_model(self.sde))
        law = affine_law(self.box, model, target, self.sde, n, ends)
        return float(law.covariance[0, 0] / law.target_variance)

    def jumps(self, steps: Sequence[int]) -> list[float] | None:
        if self.box.gridded or self.box.end_of(self.sde) > 0:
            return None
        last = [self.law(n).lowest for n in steps]
        if min(last) <= 0 or max(last) - min(last) < 1e-6 * max(last):
            return None
        return [_last_level(self.sde, t) for t in last]

    def images(self, target: GaussianMixture, x: Tensor, n: int) -> Tensor:
        model = target.score_model(self.sde)
        with Seeded(0), torch.no_grad():
            return self.box(model, x.to(self.box.dtype), self.steps(n), torch.randn_like)

    def budgeted(self, budget: int) -> tuple[int, AffineLaw]:
        n, ends = self.whole(budget)
        law = self.law_between(n, ends)
        return law.calls, law

    def calls_rule(self) -> str:
        """Calls as a function of the steps n, if they are linear in them."""
        if self.box.adaptive:
            return "as many as it needs"
        try:
            few, more, most = (self.budgeted(n)[0] for n in (10, 20, 30))
        except Exception:  # of any kind: the sampler is anyone's
            return "not known"
        slope, rest = (more - few) // 10, few - (more - few)
        if most - more != more - few or (more - few) % 10:
            return f"{few}, {more}, {most} for n = 10, 20, 30"
        rule = "n" if slope == 1 else f"{slope}n"
        return f"{rule} {'+-'[rest < 0]} {abs(rest)}" if rest else rule

    def whole(self, n: int) -> tuple[Any, tuple[float, float]]:
        """Its argument for n steps, and their ends, on the whole way."""
        if not self.box.gridded:
            return n, self.ends(n)
        times = make_grid("log_snr", self.sde, n).times
        return times, (times[0], times[-1])


def start_for(solver: Solver, sde: GaussianSDE) -> float:
    """T, or log-SNR -9 for solvers whose variables are singular at alpha = 0."""
    try:
        make_plan(solver, sde, grid_for(solver, sde, steps=2))
    except GridError:
        return float(sde.time_from_log_snr(-9.0))
    return sde.T


def inside(sde: GaussianSDE) -> tuple[float, float]:
    """The times of the log-SNR levels -3 and 3."""
    start, end = sde.time_from_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    return start, end


def _to_the_end(sde: GaussianSDE) -> tuple[float, ...]:
    """A fine grid in log-SNR over the last 6, so that what is judged is the end and not the way."""
    start = sde.time_from_log_snr(sde.log_snr(sde.t_min) - 6)
    return make_grid("log_snr", sde, END, float(start)).times


def _last_level(sde: GaussianSDE, t: float) -> float:
    """The variance (sigma/alpha)^2 at a time."""
    return float((-sde.log_snr(t)).exp())


def end_check(subject: Measurable) -> Check:
    """Whether the last step keeps the variance of data as narrow as the last noise level.

    A jump to sigma = 0 by the predicted x0 leaves v^2/(v + sigma^2) of a variance v, here half.
    """
    claim = "keeps the variance of narrow data at its end"
    try:
        kept = subject.kept()
    except Exception as error:  # of any kind: the sampler may be anyone's
        return Check(claim, False, f"{type(error).__name__}: {error}")
    return Check(claim, 0.75 < kept < 1.33, f"{kept:.3f} of the true one")


class Orders(NamedTuple):
    """Errors and orders by quantity, and the verdicts on them."""

    errors: dict[str, tuple[float, ...]]
    orders: dict[str, float]
    checks: list[Check]


def orders_of(subject: Measurable, steps: Sequence[int], margin: float) -> Orders:
    """Errors at several numbers of steps by quantity, the orders between them, and the verdicts."""
    try:
        if not subject.is_linear(steps[0]):
            return Orders({}, {}, [])
        laws = [subject.law(n) for n in steps]
    except Exception as error:  # of any kind: the sampler may be anyone's
        known = isinstance(error, ScoresolveError)
        seen = str(error) if known else f"{type(error).__name__}: {error}"
        if known and subject.order is None:
            return Orders({}, {}, [])
        return Orders({}, {}, [Check("has an exact law", False, seen)])
    errors = {
        "mean": tuple(law.mean_error for law in laws),
        "covariance": tuple(law.variance_error for law in laws),
    }
    if not subject.stochastic:
        errors["path"] = tuple(law.path_error for law in laws)
        if len({subject.ends(n) for n in steps}) == 1:
            errors["strong"] = tuple(_strong_errors(subject, _affordable(subject, steps)))
    elif None not in (gaps := [subject.along_paths(n) for n in steps[:2]]):
        errors["strong"] = tuple(gap for gap in gaps if gap is not None)
    floors = {"strong": max(subject.rounding, 100 * REFERENCE)}
    orders = {
        name: measured_order(steps[: len(found)], found, floors.get(name, subject.rounding))
        for name, found in errors.items()
    }
    ends = [end_check(subject)] if subject.judged_at_end else []
    if subject.order is None:
        return Orders(errors, orders, ends)
    checks = [] if (jump := subject.jumps(steps)) is None else [_jump_check(subject, steps, jump)]
    for name, p in orders.items():
        strong = subject.stochastic and name == "strong"
        claimed = subject.strong_order if strong else subject.order
        if claimed is not None:
            claim = f"order {claimed:g} {'along Brownian paths' if strong else _ERRORS[name]}"
            checks.append(Check(claim, p >= claimed - margin, f"measured {shown(p)}"))
    checks += [
        Check("no refinement makes it worse", False, f"{name}: {_listed(found)}")
        for name, found in errors.items()
        if _worsens(found, floors.get(name, subject.rounding))
    ]
    return Orders(errors, orders, [*checks, *ends])


def _jump_check(subject: Measurable, steps: Sequence[int], levels: Sequence[float]) -> Check:
    """A jump from sigma to 0 by the predicted x0 loses sigma^2 of variance, relative to v."""
    order, claimed = measured_order(steps, levels), subject.order or 0.0
    seen = f"measured {shown(order)}, from sigma^2 = " + ", ".join(f"{v:.1e}" for v in levels)
    return Check(f"order {claimed:g} of its last jump", order >= claimed - 0.2, seen)


def _worsens(errors: Sequence[float], rounding: float) -> bool:
    pairs = itertools.pairwise(errors)
    return any(fine > 1.5 * coarse and fine > 10 * rounding for coarse, fine in pairs)


def _listed(errors: Sequence[float]) -> str:
    return "errors " + ", ".join(f"{error:.1e}" for error in errors)


_ERRORS = {
    "mean": "of the mean",
    "covariance": "of the covariance",
    "path": "of the path",
    "strong": "of the path on a mixture",
}


def _affordable(subject: Measurable, steps: Sequence[int]) -> Sequence[int]:
    """The first of them, at least two, that make few calls."""
    return [n for i, n in enumerate(steps) if i < 2 or subject.calls(n) <= MOST_CALLS]


def _strong_errors(subject: Measurable, steps: Sequence[int]) -> list[float]:
    """RMS per coordinate to the exact images of some starts, on a mixture."""
    target = _nonlinear()
    x, exact = _exact_images(_Key(subject.sde), subject.ends(steps[0]))
    found = []
    for n in steps:
        gap = (subject.images(target, x, n).double() - exact).square().mean().sqrt()
        found.append(float(gap) if math.isfinite(gap) else math.inf)
    return found


def _nonlinear() -> GaussianMixture:
    """Three modes on a circle that overlap, so that errors are regular at modest steps."""
    return ring(3, 1.0, 1.0)


class _Key:
    """A process as a key of a cache, also one of a user's that has no hash."""

    def __init__(self, sde: GaussianSDE) -> None:
        self.sde = sde

    def __hash__(self) -> int:
        return hash(repr(self.sde))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.sde == other.sde


@functools.lru_cache(maxsize=16)
def _exact_images(process: _Key, ends: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Starts from the mixture's marginal, [B, 2], and where the flow takes them."""
    target, sde = _nonlinear(), process.sde
    x = target.marginal(sde, ends[0]).sample(STARTS, seed=0)
    end = max(ends[1], sde.t_min)
    reference = DormandPrince853(REFERENCE, REFERENCE, coordinates="scaled")
    out = sample(target.score_model(sde), sde, x=x, solver=reference, t_start=ends[0], t_end=end)
    return x, out.x


class _Remembered(BrownianPath):
    """Brownian paths that keep what was read of them: every solver reads the same stretches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stretches: dict[tuple[Any, ...], Tensor] = {}

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        if times is None:
            return super().normal(like, draw, purpose)
        return self._once(("normal", purpose, *times), super().normal, like, draw, purpose, times)

    def area(self, like: Tensor, draw: int, times: Times) -> Tensor:
        return self._once(("area", *times), super().area, like, draw, times)

    def _once(self, key: tuple[Any, ...], read: Callable[..., Tensor], *given: Any) -> Tensor:
        if key not in self.stretches:
            self.stretches[key] = read(*given)
        return self.stretches[key].clone()


@functools.lru_cache(maxsize=16)
def _paths(process: _Key) -> BrownianPath:
    return _Remembered.in_snr(Philox(0), process.sde, tolerance=1e-3)  # a thirtieth of a step


def biases(subject: Measurable, budgets: Sequence[int]) -> tuple[Bias, ...]:
    """Exact errors at several budgets of calls, or of steps where only those can be given."""
    rows = []
    for budget in budgets:
        found = subject.budgeted(budget)
        if found is None:
            continue
        calls, law = found
        path = None if subject.stochastic else law.path_error
        rows.append(Bias(calls, law.mean_error, law.variance_error, path))
    return tuple(rows)


def finite_checks(bias: Sequence[Bias]) -> list[Check]:
    """That no budget leads to what is not a number."""
    if not bias:
        return []
    lost = [str(row.nfe) for row in bias if not math.isfinite(row.variance_error)]
    seen = f"not at {', '.join(lost)} calls" if lost else f"{len(bias)} budgets"
    return [Check("is finite at every budget", not lost, seen)]
