"""Certificates: what a solver does, measured on data whose answer is known in closed form.

On Gaussian data the law of every plan is exact (`Plan.law`), so the order of convergence of mean,
covariance and path, and the bias at a budget, come out to rounding, without sampling. A run with
a recording model shows what else a user relies on: calls, interval, randomness, independence.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.driving import Samples
from scoresolve.errors import ArgumentError, GridError, ScoresolveError, Status
from scoresolve.grid import make_grid
from scoresolve.models import Model
from scoresolve.plans import Law
from scoresolve.sampling import grid_for, sample
from scoresolve.sampling import plan as make_plan
from scoresolve.sde import VP, GaussianSDE, TimeLike, as_time
from scoresolve.solvers import Integrator, Solver, TorchDiffEq, get_solver, nfe_rule
from scoresolve.targets import GaussianMixture

__all__ = ["Bias", "Certificate", "Check", "certify", "measured_order"]

MEAN, VARIANCE = (0.7, -0.4, 1.1), (0.25, 1.0, 2.25)
ROUNDING = 1e-12


@dataclass(frozen=True)
class Check:
    """One claim, whether it held, and what was seen."""

    claim: str
    passed: bool
    seen: str


@dataclass(frozen=True)
class Bias:
    """Exact errors on Gaussian data at one budget, from the process's own start to its end.

    Attributes:
        nfe: network calls.
        mean_error: RMS per coordinate of output mean minus target mean.
        variance_error: largest relative error of a variance.
        path_error: RMS per coordinate against the exact probability-flow image of the start;
            None for a stochastic solver.
    """

    nfe: int
    mean_error: float
    variance_error: float
    path_error: float | None


@dataclass(frozen=True)
class Certificate:
    """The result of `certify`.

    Attributes:
        solver, process: what was certified.
        nominal_order: the order the solver claims; None if it claims none.
        orders: measured order by quantity ("mean", "covariance", and "path" if deterministic);
            infinite where the error is rounding already.
        nfe: network calls as a function of the steps n.
        bias: exact errors at several budgets.
        checks: every claim with its outcome.
    """

    solver: str
    process: str
    nominal_order: float | None
    orders: dict[str, float]
    nfe: str
    bias: tuple[Bias, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The certificate as JSON text."""
        return json.dumps({**asdict(self), "passed": self.passed}, indent=2)

    def __str__(self) -> str:
        order = "none" if self.nominal_order is None else f"{self.nominal_order:g}"
        verdict = "PASSED" if self.passed else "FAILED"
        lines = [
            f"{self.solver} on {self.process}: {verdict}",
            f"  nominal order {order}; calls for n steps: {self.nfe}",
        ]
        if self.orders:
            measured = ", ".join(f"{name} {_order(p)}" for name, p in self.orders.items())
            lines.append(f"  measured order: {measured}")
        if self.bias:
            lines.append("     NFE  mean error  variance error  path error")
        for row in self.bias:
            path = "-" if row.path_error is None else f"{row.path_error:.2e}"
            lines.append(
                f"  {row.nfe:6d}  {row.mean_error:10.2e}  {row.variance_error:14.2e}  {path:>10}"
            )
        lines += [f"  [{'ok' if c.passed else 'FAIL'}] {c.claim}: {c.seen}" for c in self.checks]
        return "\n".join(lines)


def _order(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.2f}"


def measured_order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence at the finest pair of grids whose errors exceed rounding.

    Args:
        steps: increasing numbers of steps.
        errors: the error at each.

    Returns:
        log(e_coarse/e_fine) / log(n_fine/n_coarse); infinite if rounding is all there is.
    """
    pairs = zip(itertools.pairwise(steps), itertools.pairwise(errors), strict=True)
    slopes = [
        math.log(coarse / fine) / math.log(n_fine / n_coarse)
        for (n_coarse, n_fine), (coarse, fine) in pairs
        if coarse > ROUNDING and fine > ROUNDING
    ]
    return slopes[-1] if slopes else math.inf


def certify(
    solver: str | Solver | Integrator,
    sde: GaussianSDE | None = None,
    *,
    refinements: Sequence[int] = (64, 128, 256, 512, 1024),
    budgets: Sequence[int] = (10, 20, 50, 100),
    margin: float = 0.2,
    seed: int = 0,
) -> Certificate:
    """Measure what a solver does on Gaussian data and hold it against its claims.

    Orders are measured between the log-SNR levels 3 and -3 on the angle grid, where no form of
    the probability flow is singular; biases on the default grid from T to t_min.

    Args:
        solver: a name of the registry, a `Solver` or an `Integrator`.
        sde: a Gaussian process; `VP()` if omitted.
        refinements: increasing numbers of steps, at least two.
        budgets: network calls at which the bias is reported.
        margin: how far below its nominal order the measured one may lie.
        seed: seed of the runs that need noise.

    Returns:
        A `Certificate`; `print` shows it, `.passed` is the verdict.

    Raises:
        ArgumentError: the process is not Gaussian, or `refinements` do not increase.
        UnknownNameError: no such solver.
    """
    process = VP() if sde is None else sde
    if not isinstance(process, GaussianSDE):
        raise ArgumentError(f"{process} is not Gaussian: certificates need closed-form marginals")
    if len(refinements) < 2 or any(b <= a for a, b in itertools.pairwise(refinements)):
        raise ArgumentError(f"refinements = {tuple(refinements)}: give increasing step counts")
    resolved = get_solver(solver)
    if isinstance(resolved, Integrator):
        return _certify_integrator(resolved, process, seed)
    orders, order_checks = _orders(resolved, process, refinements, margin)
    return Certificate(
        solver=resolved.name,
        process=repr(process),
        nominal_order=resolved.order,
        orders=orders,
        nfe=nfe_rule(resolved),
        bias=_biases(resolved, process, budgets) if orders else (),
        checks=(*order_checks, *_conduct(resolved, process, seed)),
    )


def _orders(
    solver: Solver, sde: GaussianSDE, refinements: Sequence[int], margin: float
) -> tuple[dict[str, float], list[Check]]:
    ends = sde.time_from_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    plans = [make_plan(solver, sde, make_grid("cosine", sde, n, *ends)) for n in refinements]
    try:
        laws = [plan.law(MEAN, VARIANCE, start="marginal") for plan in plans]
    except ScoresolveError as error:
        return {}, [Check("has an exact law", solver.order is None, str(error))]
    quantities: dict[str, Callable[[Law], float]] = {
        "mean": lambda law: law.mean_error,
        "covariance": lambda law: law.variance_error,
    }
    if not plans[0].stochastic:
        quantities["path"] = lambda law: law.path_error
    orders = {
        name: measured_order(refinements, [error_of(law) for law in laws])
        for name, error_of in quantities.items()
    }
    if solver.order is None:
        return orders, []
    floor = solver.order - margin
    checks = [
        Check(f"order {solver.order} of the {name}", p >= floor, f"measured {_order(p)}")
        for name, p in orders.items()
    ]
    return orders, checks


def _biases(solver: Solver, sde: GaussianSDE, budgets: Sequence[int]) -> tuple[Bias, ...]:
    rows = []
    for budget in budgets:
        try:
            grid = grid_for(solver, sde, nfe=budget, t_start=_start(solver, sde))
            traced = make_plan(solver, sde, grid)
        except GridError:  # the budget does not reach for a single step
            continue
        law = traced.law(MEAN, VARIANCE, start="marginal")
        path = None if traced.stochastic else law.path_error
        rows.append(Bias(traced.nfe, law.mean_error, law.variance_error, path))
    return tuple(rows)


def _start(solver: Solver, sde: GaussianSDE) -> float:
    """T, or log-SNR -9 for solvers whose variables are singular at alpha = 0."""
    try:
        make_plan(solver, sde, grid_for(solver, sde, steps=2))
    except GridError:
        return float(sde.time_from_log_snr(-9.0))
    return sde.T


class _Recorder(Model):
    """An exact model of Gaussian data that notes the times of its calls."""

    def __init__(self, sde: GaussianSDE, spoilt: int | None = None) -> None:
        mean = torch.tensor(MEAN, dtype=torch.float64)
        target = GaussianMixture([1.0], mean[None], torch.tensor(VARIANCE).double()[None])
        self.model, self.sde, self.spoilt = target.score_model(sde), sde, spoilt
        self.times: list[Tensor] = []

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        self.times.append(as_time(t))
        m = self.model.predict(prediction, x, t)
        if self.spoilt is not None:
            bad = (x[:, 0] - x[:, 0] == 0) & (cond["row"] == self.spoilt)
            m = torch.where(bad[:, None], torch.nan, m)
        return m


def _conduct(solver: Solver | Integrator, sde: GaussianSDE, seed: int) -> list[Check]:
    """What a run does beside its accuracy."""
    fixed = isinstance(solver, Solver)
    start = _start(solver, sde) if isinstance(solver, Solver) else 0.99 * sde.T

    def run(model: _Recorder, **options: Any) -> Samples:
        return sample(
            model,
            sde,
            shape=(7, len(MEAN)),
            dtype=torch.float64,
            solver=solver,
            seed=seed,
            row=torch.arange(7),
            t_start=start,
            steps=8 if fixed else None,
            **options,
        )

    recorder = _Recorder(sde)
    whole = run(recorder)
    split = run(_Recorder(sde), chunk=3)
    spoilt = run(_Recorder(sde, spoilt=2))
    times = torch.cat([t.flatten() for t in recorder.times])
    low, high = sde.t_min, start
    inside = bool((times >= low).all() and (times <= high).all())
    apart = float((whole.x - split.x).abs().max())
    others = [row for row in range(7) if row != 2]
    moved = float((whole.x - spoilt.x)[others].abs().max())
    reported = spoilt.status.tolist() == [int(Status.NONFINITE) * (row == 2) for row in range(7)]
    coupled = isinstance(solver, TorchDiffEq)
    return [
        Check(
            "counts its calls",
            whole.nfe == len(recorder.times),
            f"{whole.nfe} reported, {len(recorder.times)} made",
        ),
        Check(
            "stays inside the interval",
            inside,
            f"calls between t = {float(times.min()):g} and {float(times.max()):g}",
        ),
        Check(
            "gives the same sample in any batch",
            apart < 1e-9 or coupled,
            f"largest difference {apart:.1e}" + (" (couples its batch by design)" * coupled),
        ),
        Check(
            "keeps a NaN row to itself",
            reported and (moved < 1e-9 or coupled),
            f"neighbours moved by {moved:.1e}, statuses {'right' if reported else 'wrong'}",
        ),
    ]


def _certify_integrator(solver: Integrator, sde: GaussianSDE, seed: int) -> Certificate:
    return Certificate(
        solver=solver.name,
        process=repr(sde),
        nominal_order=solver.order,
        orders={},
        nfe=nfe_rule(solver),
        bias=(),
        checks=tuple(_conduct(solver, sde, seed)),
    )
