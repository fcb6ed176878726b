"""`certify`: a solver of the package, or a sampler of anyone, held against its claims."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scoresolve.certificates.affine import NotAffine
from scoresolve.certificates.certificate import Certificate, Check, joined
from scoresolve.certificates.conduct import Foreign, Ours, conduct
from scoresolve.certificates.measured import Draw, Drawn, law_checks
from scoresolve.certificates.orders import (
    Boxed,
    Measurable,
    Orders,
    Planned,
    biases,
    finite_checks,
    inside,
    orders_of,
    start_for,
)
from scoresolve.certificates.randomness import Seeded
from scoresolve.certificates.stability import (
    BUDGETS,
    stability_checks,
    stability_of,
    stability_of_box,
)
from scoresolve.errors import ArgumentError, ScoresolveError, real_number, whole_number
from scoresolve.models import Model
from scoresolve.peers import BlackBox, refined
from scoresolve.precision import default_on_host
from scoresolve.sampling import sample
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import Integrator, Solver, get_solver, nfe_rule
from scoresolve.targets import gaussian

__all__ = ["certify"]


WORLDS = (VP, RectifiedFlow)
"""Where alpha^2 + sigma^2 = 1, which hides factors of the one, and where alpha + sigma = 1."""
BOX_WORLDS = (VP, EDM)
"""Those of a `BlackBox`, which need not know what to do where alpha = 0."""
REFINEMENTS = (64, 128, 256, 512)
"""Numbers of steps: the first three, two on further processes, more while a claim fails."""
STEPS, FINER = 200, 4
"""Steps of a measured law, and how many times more where its discretisation is to vanish."""
TIGHTER = 64.0
"""By how much tolerances are divided for that."""


@default_on_host()
def certify(
    solver: str | Solver | Integrator | BlackBox,
    sde: GaussianSDE | None = None,
    *,
    refinements: Sequence[int] | None = None,
    budgets: Sequence[int] = (10, 20, 50, 100),
    margin: float = 0.2,
) -> Certificate:
    """Measure what a solver does where the answer is known, and hold it against its claims.

    A solver runs on two processes that differ in kind, `VP()` and `RectifiedFlow()`, unless one is
    given: a fault may hide where alpha^2 + sigma^2 = 1. So does a `BlackBox` that names no process
    of its own, on `VP()` and `EDM()`.

    On Gaussian data the law of a sampler is exact, so orders of mean, covariance and path and
    the bias at a budget come out to rounding, without sampling; on a mixture a deterministic one
    is held against the exact flow, and a solver whose noise belongs to intervals of time against
    itself with half the steps along the same Brownian paths. Orders are measured between the
    log-SNR levels -3 and 3 on the angle grid, where no form of the probability flow is singular,
    biases and stability on the whole way. Where there is no exact law, since a step is not linear
    or is chosen while it runs, the law is measured on two separated modes in 1, 2 and 16
    dimensions, and an order that is claimed is among what is not proved.

    Args:
        solver: a name of the registry, a `Solver`, an `Integrator`, or a `BlackBox`, a sampler
            that anyone wrote.
        sde: a Gaussian process; both of the above if omitted, or the own one of a `BlackBox`.
        refinements: increasing numbers of steps, each at least 2, and at least two of them; 64,
            128, 256 and, where an order is not reached yet, 512 if omitted.
        budgets: network calls at which the bias is reported; steps of a `BlackBox`.
        margin: how far below its nominal order the measured one may lie.

    Returns:
        A `Certificate`; `print` shows it, `.passed` is the verdict, `.worlds` are those of each
        process and `.not_proved` is what no check covers.

    Raises:
        ArgumentError: the process is not Gaussian, or not the one the sampler is made for, or
            `refinements` do not increase, or a number is out of range.
        UnknownNameError: no such solver.
    """
    bound = sde or (solver.sde if isinstance(solver, BlackBox) else None)
    if not isinstance(bound, GaussianSDE | None):
        raise ArgumentError(f"{bound} is not Gaussian: certificates need closed-form marginals")
    given = None if refinements is None else refined(refinements)
    margin = real_number("margin", margin, least=0)
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        raise ArgumentError(f"budgets = {budgets!r}: give a sequence of numbers of calls")
    budgets = tuple(whole_number("budgets", budget) for budget in budgets)
    if isinstance(solver, BlackBox):
        if solver.sde not in (None, bound):
            raise ArgumentError(f"{solver.name} is made for {solver.sde}, not for {bound}")
        box = solver
        one = functools.partial(_of_box, box)
    else:
        one = functools.partial(_of_solver, get_solver(solver))
    kinds = BOX_WORLDS if isinstance(solver, BlackBox) else WORLDS
    processes = [kind() for kind in kinds] if bound is None else [bound]
    worlds = list[Certificate]()
    for process in processes:
        least = 2 if worlds else 3
        tries = [given] if given else [REFINEMENTS[:n] for n in range(least, 5)]
        worlds.append(one(process, tries, budgets, margin))
    if bound is not None:
        (only,) = worlds
        rest = f"any process but {only.process}"
        return replace(only, not_proved=(rest, *only.not_proved))
    return joined(worlds)


def _of_solver(
    solver: Solver | Integrator,
    sde: GaussianSDE,
    tries: Sequence[tuple[int, ...]],
    budgets: Sequence[int],
    margin: float,
) -> Certificate:
    name, process, nfe = solver.name, repr(sde), nfe_rule(solver)
    if isinstance(solver, Integrator):
        ours = Ours(solver, sde, inside(sde))
        checks, rest = _measured(solver, sde)
        if solver.order is not None:
            rest = [f"order {solver.order:g}, as it has a loop of its own", *rest]
        checks += conduct(ours)
        return Certificate(name, process, solver.order, nfe, tuple(checks), not_proved=tuple(rest))
    planned = Planned(solver, sde)
    steps, (errors, orders, checks) = _orders(planned, tries, margin)
    bias, rest = biases(planned, budgets) if orders else (), _unproved(solver, orders)
    checks += finite_checks(bias)
    if orders:
        found = [stability_of(planned.about(calls)) for calls in BUDGETS]
        stable, notes = stability_checks(found, solver.name, solver.order is not None)
    else:
        stable, notes = _measured(solver, sde)
    checks += [*stable, *conduct(Ours(solver, sde, (planned.start, sde.t_min)))]
    return Certificate(
        name,
        process,
        solver.order,
        nfe,
        tuple(checks),
        bias,
        steps,
        errors,
        orders,
        (*rest, *notes),
    )


def _orders(
    subject: Measurable, tries: Sequence[tuple[int, ...]], margin: float
) -> tuple[tuple[int, ...], Orders]:
    """The steps taken, and what `orders_of` says of them: the first try where all claims hold."""
    for steps in tries:
        found = orders_of(subject, steps, margin)
        if not found.orders or all(check.passed for check in found.checks):
            break
    return steps, found


def _unproved(solver: Solver, orders: Mapping[str, float]) -> list[str]:
    if not orders:
        claimed = "orders" if solver.order is None else f"order {solver.order:g}"
        if solver.strong_order is not None:
            claimed += f", order {solver.strong_order:g} along Brownian paths"
        return [f"an exact law, as a step is not linear: {claimed}, biases and stability"]
    if solver.order is None:
        return ["that refining the grid leads to the exact law: it claims no order"]
    if not solver.stochastic:
        return []
    rest = [f"order {solver.order:g} of the law of data that are not Gaussian"]
    return rest if "strong" in orders else [*rest, "an order along Brownian paths"]


def _measured(solver: Solver | Integrator, sde: GaussianSDE) -> tuple[list[Check], list[str]]:
    """The law of a solver of this package that has no exact one, on the whole way."""
    ends = (_start_of(solver, sde), sde.t_min)

    def drawing(solver: Solver | Integrator, steps: int) -> Draw:
        def draw(model: Model, x: Tensor) -> Drawn:
            out = sample(
                model,
                sde,
                x=x,
                solver=solver,
                t_start=ends[0],
                t_end=ends[1],
                steps=steps if isinstance(solver, Solver) else None,
                denoise=False if isinstance(solver, Solver) else None,
            )
            return Drawn(out.x, out.status)

        return draw

    return law_checks(drawing(solver, STEPS), sde, ends, drawing(_finer(solver), STEPS * FINER))


def _finer(solver: Solver | Integrator) -> Solver | Integrator:
    """The same with tolerances so small, or steps so many, that discretisation hardly counts."""
    finer = copy.copy(solver)
    if isinstance(solver, Integrator):
        for name in ("rtol", "atol"):
            if hasattr(finer, name):
                setattr(finer, name, getattr(finer, name) / TIGHTER)
        if getattr(finer, "steps", None):
            finer.steps = solver.steps * FINER  # type: ignore[attr-defined, union-attr]
    return finer


def _start_of(solver: Solver | Integrator, sde: GaussianSDE) -> float:
    """T, or log-SNR -9 for solvers whose equation is singular at alpha = 0."""
    if isinstance(solver, Solver):
        return start_for(solver, sde)
    if math.isinf(float(sde.log_snr(sde.T))) and (solver.stochastic or not _begins(solver, sde)):
        return float(sde.time_from_log_snr(-9.0))
    return sde.T


def _begins(solver: Integrator, sde: GaussianSDE) -> bool:
    """Whether it takes the start at T."""
    target, end = gaussian([0.0], [1.0]), float(sde.time_from_log_snr(-9.0))
    x = torch.zeros(1, 1, dtype=torch.float64)
    try:
        sample(target.score_model(sde), sde, x=x, solver=solver, t_start=sde.T, t_end=end)
    except ScoresolveError:
        return False
    return True


def _of_box(
    box: BlackBox,
    sde: GaussianSDE,
    tries: Sequence[tuple[int, ...]],
    budgets: Sequence[int],
    margin: float,
) -> Certificate:
    boxed = Boxed(box, sde)
    tries = [tuple(box.refinements)] if box.refinements else tries
    if box.adaptive:
        steps, (errors, orders, checks) = tries[0], Orders({}, {}, [])
    else:
        steps, (errors, orders, checks) = _orders(boxed, tries, margin)
    bias = biases(boxed, budgets) if orders else ()
    checks += finite_checks(bias)
    rest = list[str]()
    manners = conduct(Foreign(box, sde, *boxed.whole(8)))
    if orders:
        try:
            found = [stability_of_box(box, sde, *boxed.whole(budget)) for budget in BUDGETS]
            stable, rest = stability_checks(found, box.name, box.order is not None)
            checks += stable
        except NotAffine as error:
            rest = [f"stability: {error}"]
    else:
        rest = ["an exact law: orders, biases and stability"]
        if all(check.passed for check in [*checks, *manners[:1]]):
            measured, notes = _measured_box(box, boxed, steps[-1])
            checks, rest = [*checks, *measured], [*rest, *notes]
    checks += manners
    return Certificate(
        box.name,
        repr(sde),
        box.order,
        boxed.calls_rule(),
        tuple(checks),
        bias,
        steps,
        errors,
        orders,
        tuple(rest),
    )


def _measured_box(box: BlackBox, boxed: Boxed, n: int) -> tuple[list[Check], list[str]]:
    """The law of a sampler of anyone that has no exact one, on the whole way."""
    steps, ends = boxed.whole(n)

    def draw(model: Model, x: Tensor) -> Drawn:
        with torch.no_grad(), Seeded(0):
            return Drawn(box(model, x.to(box.dtype), steps, torch.randn_like))

    return law_checks(draw, boxed.sde, ends)
