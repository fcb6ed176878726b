"""`certify`: a solver of the package, or a sampler of anyone, held against its claims."""

from __future__ import annotations

from collections.abc import Sequence

from scoresolve.certificates.certificate import Certificate
from scoresolve.certificates.conduct import Foreign, Ours, conduct
from scoresolve.certificates.orders import (
    Boxed,
    Planned,
    biases,
    finite_checks,
    inside,
    orders_of,
    start_for,
)
from scoresolve.errors import ArgumentError, real_number, whole_number
from scoresolve.peers import BlackBox, refined
from scoresolve.sde import VP, GaussianSDE
from scoresolve.solvers import Integrator, Solver, get_solver, nfe_rule

__all__ = ["certify"]


def certify(
    solver: str | Solver | Integrator | BlackBox,
    sde: GaussianSDE | None = None,
    *,
    refinements: Sequence[int] = (64, 128, 256, 512),
    budgets: Sequence[int] = (10, 20, 50, 100),
    margin: float = 0.2,
) -> Certificate:
    """Measure what a solver does where the answer is known, and hold it against its claims.

    On Gaussian data the law of a sampler is exact, so orders of mean, covariance and path and
    the bias at a budget come out to rounding, without sampling; on a mixture a deterministic one
    is held against the exact flow, and a solver whose noise belongs to intervals of time against
    itself with half the steps along the same Brownian paths. Orders are measured between the
    log-SNR levels -3 and 3 on the angle grid, where no form of the probability flow is singular,
    biases on the whole way.

    Args:
        solver: a name of the registry, a `Solver`, an `Integrator`, or a `BlackBox`, a sampler
            that anyone wrote.
        sde: a Gaussian process; that of the `BlackBox`, or `VP()`, if omitted.
        refinements: increasing numbers of steps, each at least 2, and at least two of them.
        budgets: network calls at which the bias is reported; steps of a `BlackBox`.
        margin: how far below its nominal order the measured one may lie.

    Returns:
        A `Certificate`; `print` shows it, `.passed` is the verdict.

    Raises:
        ArgumentError: the process is not Gaussian, or not the one the sampler is made for, or
            `refinements` do not increase, or a number is out of range.
        UnknownNameError: no such solver.
    """
    process = sde or (solver.sde if isinstance(solver, BlackBox) else None) or VP()
    if not isinstance(process, GaussianSDE):
        raise ArgumentError(f"{process} is not Gaussian: certificates need closed-form marginals")
    refinements, margin = refined(refinements), real_number("margin", margin, least=0)
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        raise ArgumentError(f"budgets = {budgets!r}: give a sequence of numbers of calls")
    budgets = tuple(whole_number("budgets", budget) for budget in budgets)
    if isinstance(solver, BlackBox):
        if solver.sde not in (None, process):
            raise ArgumentError(f"{solver.name} is made for {solver.sde}, not for {process}")
        return _of_box(solver, process, refinements, budgets, margin)
    return _of_solver(get_solver(solver), process, refinements, budgets, margin)


def _of_solver(
    solver: Solver | Integrator,
    sde: GaussianSDE,
    refinements: Sequence[int],
    budgets: Sequence[int],
    margin: float,
) -> Certificate:
    name, process, nfe = solver.name, repr(sde), nfe_rule(solver)
    if isinstance(solver, Integrator):
        checks = conduct(Ours(solver, sde, inside(sde)))
        return Certificate(name, process, solver.order, nfe, tuple(checks))
    planned = Planned(solver, sde)
    errors, orders, checks = orders_of(planned, refinements, margin)
    bias = biases(planned, budgets) if orders else ()
    checks += finite_checks(bias)
    checks += conduct(Ours(solver, sde, (start_for(solver, sde), sde.t_min)))
    return Certificate(
        name,
        process,
        solver.order,
        nfe,
        tuple(checks),
        bias,
        tuple(refinements),
        errors,
        orders,
    )


def _of_box(
    box: BlackBox,
    sde: GaussianSDE,
    refinements: Sequence[int],
    budgets: Sequence[int],
    margin: float,
) -> Certificate:
    boxed, steps = Boxed(box, sde), tuple(box.refinements or refinements)
    errors, orders, checks = ({}, {}, []) if box.adaptive else orders_of(boxed, steps, margin)
    bias = biases(boxed, budgets) if orders else ()
    checks += finite_checks(bias)
    checks += conduct(Foreign(box, sde, *boxed.whole(8)))
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
    )
