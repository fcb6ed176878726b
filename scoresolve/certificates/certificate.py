"""What a certificate says, and how an order is read off errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scoresolve.json_text import json_text

__all__ = [
    "MEAN",
    "ROUNDING",
    "VARIANCE",
    "Bias",
    "Certificate",
    "Check",
    "joined",
    "measured_order",
    "shown",
]

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
        steps: numbers of steps between which orders were measured.
        errors: error at each of them by quantity: "mean", "covariance" and, if deterministic,
            "path" on Gaussian data; "strong" at the first of the steps on a mixture, RMS per
            coordinate, if deterministic to the exact images of starts, else, where all noise
            belongs to intervals of time, to half as many steps along the same Brownian paths.
        orders: measured order by quantity; infinite where the error is rounding already.
        nfe: network calls as a function of the steps n.
        bias: exact errors at several budgets.
        checks: every claim with its outcome.
        not_proved: what the checks do not cover.
        worlds: where several processes were taken, the certificate on each; the other fields then
            hold for all: a check passes if it does everywhere, an order is the lowest, its errors
            are those where it was, and biases are the largest.
    """

    solver: str
    process: str
    nominal_order: float | None
    nfe: str
    checks: tuple[Check, ...]
    bias: tuple[Bias, ...] = ()
    steps: tuple[int, ...] = ()
    errors: dict[str, tuple[float, ...]] = field(default_factory=dict)
    orders: dict[str, float] = field(default_factory=dict)
    not_proved: tuple[str, ...] = ()
    worlds: tuple[Certificate, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def shown_orders(self) -> tuple[str, ...]:
        """The measured orders as text, in the order of `orders`."""
        return tuple(shown(order) for order in self.orders.values())

    def to_json(self) -> str:
        """The certificate as JSON, see `json_text`."""
        return json_text(self._fields())

    def _fields(self) -> dict[str, Any]:
        worlds = [world._fields() for world in self.worlds]
        return {**asdict(self), "worlds": worlds, "passed": self.passed}

    def __str__(self) -> str:
        order = "none" if self.nominal_order is None else f"{self.nominal_order:g}"
        verdict = "PASSED" if self.passed else "FAILED"
        lines = [
            f"{self.solver} on {self.process}: {verdict}",
            f"  nominal order {order}; calls for n steps: {self.nfe}",
        ]
        if self.orders:
            measured = ", ".join(f"{name} {shown(p)}" for name, p in self.orders.items())
            lines.append(f"  measured order: {measured}")
        if self.bias:
            lines.append("     NFE  mean error  variance error  path error")
        for row in self.bias:
            path = "-" if row.path_error is None else f"{row.path_error:.2e}"
            lines.append(
                f"  {row.nfe:6d}  {row.mean_error:10.2e}  {row.variance_error:14.2e}  {path:>10}"
            )
        lines += [f"  [{'ok' if c.passed else 'FAIL'}] {c.claim}: {c.seen}" for c in self.checks]
        lines += [f"  [not proved] {what}" for what in self.not_proved]
        return "\n".join(lines)


def joined(worlds: Sequence[Certificate]) -> Certificate:
    """One certificate of one sampler on several processes, at least one."""
    first, *others = worlds
    if not others:
        return first
    names = [world.process.partition("(")[0] for world in worlds]
    if len({*names}) < len(names):
        names = [world.process for world in worlds]
    claims = dict.fromkeys(check.claim for world in worlds for check in world.checks)
    checks = tuple(_joined_check(claim, worlds, names) for claim in claims)
    orders = {
        name: min(world.orders[name] for world in worlds if name in world.orders)
        for name in dict.fromkeys(name for world in worlds for name in world.orders)
    }
    errors = {
        name: next(w.errors[name] for w in worlds if w.orders.get(name) == order)
        for name, order in orders.items()
    }
    return replace(
        first,
        process=" and ".join(world.process for world in worlds),
        nfe="; ".join(dict.fromkeys(world.nfe for world in worlds)),
        checks=checks,
        bias=_joined_bias(worlds),
        steps=max((world.steps for world in worlds), key=len),
        errors=errors,
        orders=orders,
        not_proved=_joined_rest(worlds, names),
        worlds=tuple(worlds),
    )


def _joined_check(claim: str, worlds: Sequence[Certificate], names: Sequence[str]) -> Check:
    """What was seen where it failed or, if it held, everywhere."""
    found = [
        (check, name)
        for world, name in zip(worlds, names, strict=True)
        for check in world.checks
        if check.claim == claim
    ]
    passed = all(check.passed for check, _ in found)
    seen = _seen((check.seen, name) for check, name in found if passed or not check.passed)
    return Check(claim, passed, seen)


def _seen(found: Iterable[tuple[str, str]]) -> str:
    """Texts, each with the names of the processes it belongs to unless it is the only one."""
    where: dict[str, list[str]] = {}
    for text, name in found:
        where.setdefault(text, []).append(name)
    if len(where) == 1 and len(next(iter(where.values()))) > 1:
        return next(iter(where))
    return "; ".join(f"{' and '.join(names)}: {text}" for text, names in where.items())


def _joined_bias(worlds: Sequence[Certificate]) -> tuple[Bias, ...]:
    rows = zip(*(world.bias for world in worlds), strict=False)
    return tuple(
        Bias(
            max(row.nfe for row in each),
            max(row.mean_error for row in each),
            max(row.variance_error for row in each),
            None
            if (paths := [r.path_error for r in each if r.path_error is not None]) == []
            else max(paths),
        )
        for each in rows
    )


def _joined_rest(worlds: Sequence[Certificate], names: Sequence[str]) -> tuple[str, ...]:
    where: dict[str, list[str]] = {}
    for world, name in zip(worlds, names, strict=True):
        for what in world.not_proved:
            where.setdefault(what, []).append(name)
    return tuple(
        what if len(found) == len(names) else f"{what}, on {' and '.join(found)}"
        for what, found in where.items()
    )


def shown(order: float | None) -> str:
    """An order as text."""
    if order is None:
        return "none"
    if math.isinf(order):
        return "exact" if order > 0 else "not finite"
    return f"{order:.2f}"


def measured_order(
    steps: Sequence[int], errors: Sequence[float], rounding: float = ROUNDING
) -> float:
    """Order of convergence at the finest pair of grids whose errors exceed rounding.

    Args:
        steps: increasing numbers of steps.
        errors: the error at each, infinite where there is none.
        rounding: errors below are rounding.

    Returns:
        log(e_coarse/e_fine) / log(n_fine/n_coarse); infinite if rounding is all there is, and
        -infinity if the finest error is infinite.
    """
    if math.isinf(errors[-1]):
        return -math.inf
    pairs = zip(itertools.pairwise(steps), itertools.pairwise(errors), strict=True)
    slopes = [
        math.log(coarse / fine) / math.log(n_fine / n_coarse)
        for (n_coarse, n_fine), (coarse, fine) in pairs
        if math.inf > coarse > rounding and fine > rounding
    ]
    return slopes[-1] if slopes else math.inf
