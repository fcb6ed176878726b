"""What a run does beside its accuracy: calls, times, randomness, neighbours, bad models."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresolve.certificates.certificate import MEAN, VARIANCE, Check
from scoresolve.certificates.probes import ENDLESS, Endless, Misshapen, Spoilt, Watched
from scoresolve.certificates.randomness import Draws, Seeded
from scoresolve.conditions import per_sample
from scoresolve.errors import Status
from scoresolve.models import Model
from scoresolve.noise import Philox, Purpose
from scoresolve.peers import BadOutput, BlackBox
from scoresolve.sampling import sample
from scoresolve.sde import GaussianSDE
from scoresolve.solvers import Integrator, Solver, TorchDiffEq
from scoresolve.targets import gaussian

__all__ = ["Foreign", "Ours", "Subject", "conduct"]

ROWS, FEW, BAD, STEPS = 7, 3, 2, 8
PATIENCE = 2000
"""Calls beyond those of good rows, twice, after which a run with a bad row does not return: a step
that is refused and halved each time is 0 after 1074 refusals, and lost in t after some 60."""


class Outcome(NamedTuple):
    """What a run gave: samples, what it says of them, and whether it drew from numpy or Python."""

    x: Tensor
    nfe: int | None = None
    status: Tensor | None = None
    drew_elsewhere: bool = False


class Subject(ABC):
    """Something that samples, as its user would run it, from starts that are always the same.

    Attributes:
        sde: the process.
        start, end: the times between which it runs.
        stochastic: whether it claims to draw noise.
        rounding: how far apart, relative to their size, two equal samples may be.
        addressed: whether each row has draws of its own, whatever the batch, by design.
        coupled: whether it has one step size for the whole batch by design.
    """

    sde: GaussianSDE
    start: float
    end: float
    stochastic: bool
    rounding: float
    addressed: bool = False
    coupled: bool = False

    @abstractmethod
    def run(self, model: Model, rows: int, seed: int = 0, apart: bool = False) -> Outcome:
        """The first `rows` samples; if `apart`, each row is made to have draws of its own."""

    def starts(self, rows: int, dtype: torch.dtype) -> Tensor:
        """States at the start, [rows, D]."""
        like = torch.empty(rows, len(MEAN), dtype=dtype)
        size = math.hypot(float(self.sde.alpha(self.start)), float(self.sde.sigma(self.start)))
        return size * Philox(0).normal(like, 0, Purpose.START)


class Ours(Subject):
    """A solver of this package, through `sample`."""

    def __init__(
        self, solver: Solver | Integrator, sde: GaussianSDE, ends: tuple[float, float]
    ) -> None:
        self.solver, self.sde, (self.start, self.end) = _in_few_steps(solver), sde, ends
        self.stochastic, self.rounding, self.addressed = solver.stochastic, 1e-9, True
        self.coupled = isinstance(solver, TorchDiffEq)

    def run(self, model: Model, rows: int, seed: int = 0, apart: bool = False) -> Outcome:
        out = sample(
            model,
            self.sde,
            x=self.starts(rows, torch.float64),
            solver=self.solver,
            seed=seed,
            row=per_sample(torch.arange(rows)),
            t_start=self.start,
            t_end=self.end,
            steps=STEPS if isinstance(self.solver, Solver) else None,
        )
        return Outcome(out.x, out.nfe, out.status)


def _in_few_steps(solver: Solver | Integrator) -> Solver | Integrator:
    """An integrator whose steps are of a number in as few as a solver is run in here."""
    if isinstance(solver, Solver) or getattr(solver, "steps", None) is None:
        return solver
    few = copy.copy(solver)
    few.steps = STEPS  # type: ignore[attr-defined]
    return few


class Foreign(Subject):
    """A sampler of anyone; its own draws are those of torch's seed."""

    def __init__(self, box: BlackBox, sde: GaussianSDE, n: Any, ends: tuple[float, float]) -> None:
        self.box, self.sde, self.n, (self.start, self.end) = box, sde, n, ends
        self.stochastic = box.stochastic
        self.rounding = 1e-9 if box.dtype == torch.float64 else 1e-4

    def run(self, model: Model, rows: int, seed: int = 0, apart: bool = False) -> Outcome:
        x = self.starts(rows, self.box.dtype)

        def answer(like: Tensor, index: int) -> Tensor:
            return Philox(seed).normal(like, index)

        with torch.no_grad(), Seeded(seed) as others, Draws(answer if apart else None):
            y = self.box(model, x, self.n, torch.randn_like)
            return Outcome(y, drew_elsewhere=others.moved())


def conduct(subject: Subject) -> list[Check]:
    """The checks that need no exact law."""
    model = Watched(gaussian(MEAN, VARIANCE).score_model(subject.sde))
    watched = Watched(model, most=ENDLESS)
    try:
        with Draws() as draws:
            whole = subject.run(watched, ROWS, apart=True)
        few = subject.run(model, FEW, apart=True)
    except Exception as error:  # of any kind: the sampler may be anyone's
        seen = [_inside(subject, watched)] if watched.calls else []
        return [Check("runs", False, _said(error)), *seen]
    checks = [*_count(whole, watched), _inside(subject, watched)]
    if subject.stochastic:
        checks += _randomness(subject, model, whole, few)
    else:
        count = draws.normals + draws.others + whole.drew_elsewhere
        checks.append(Check("draws no random numbers", count == 0, f"{count} draws"))
    return [
        *checks,
        *_neighbours(subject, few, whole, not draws.held(ROWS) or whole.drew_elsewhere),
        _spoilt(subject, model, watched.calls, whole),
        _misshapen(subject, model),
    ]


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _apart(subject: Subject, one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the size of the samples; infinite if one is not finite."""
    gap = float((one - other).abs().max() / one.abs().max().clamp(min=1.0))
    return gap if math.isfinite(gap) else math.inf


def _count(whole: Outcome, watched: Watched) -> list[Check]:
    if whole.nfe is None:
        return []
    seen = f"{whole.nfe} reported, {watched.calls} made"
    return [Check("counts its calls", whole.nfe == watched.calls, seen)]


def _inside(subject: Subject, watched: Watched) -> Check:
    slack = subject.rounding * max(1.0, abs(subject.start))
    if not watched.calls:
        return Check("stays inside the interval", True, "no calls")
    inside = subject.end - slack <= watched.low and watched.high <= subject.start + slack
    seen = f"calls between t = {watched.low:g} and {watched.high:g}"
    if not inside:
        seen += f", of [{subject.end:g}, {subject.start:g}]"
    return Check("stays inside the interval", inside, seen)


def _randomness(subject: Subject, model: Model, whole: Outcome, few: Outcome) -> list[Check]:
    """Whether another seed gives another sample, the same the same, and in any batch."""
    again, other = subject.run(model, FEW), subject.run(model, FEW, seed=1)
    if not subject.addressed:
        whole, few = subject.run(model, ROWS), subject.run(model, FEW)
    moved, repeated = (_apart(subject, few.x, x) for x in (other.x, again.x))
    checks = [
        Check("draws its noise anew for another seed", moved > 0, f"differs by {moved:.1e}"),
        Check(
            "gives the same sample for the same seed",
            repeated <= subject.rounding,
            f"largest difference {repeated:.1e}",
        ),
    ]
    if not subject.coupled:
        gap = _apart(subject, few.x, whole.x[:FEW])
        claim = "gives the same sample in any batch"
        checks.append(Check(claim, gap <= subject.rounding, f"largest difference {gap:.1e}"))
    return checks


def _neighbours(subject: Subject, few: Outcome, whole: Outcome, free: bool) -> list[Check]:
    """Whether samples are the same without some of their neighbours.

    Where there are draws that cannot be held (`free`), a difference may be theirs: no verdict.
    """
    gap = _apart(subject, few.x, whole.x[:FEW])
    if free and gap > subject.rounding:
        return []
    seen = f"largest difference {gap:.1e} without its neighbours"
    if subject.coupled:
        seen += " (couples its batch by design)"
    return [Check("keeps samples apart", gap <= subject.rounding or subject.coupled, seen)]


def _spoilt(subject: Subject, model: Model, calls: int, whole: Outcome) -> Check:
    claim, most = "keeps a NaN row to itself", PATIENCE + 2 * calls
    try:
        out = subject.run(Spoilt(model, BAD, most), ROWS, apart=True)
    except Endless:
        return Check(claim, False, f"has not returned after {most} calls")
    except Exception as error:  # a clear failure is not a wrong sample
        return Check(claim, True, f"refused: {_said(error)}")
    others = [row for row in range(ROWS) if row != BAD]
    moved = _apart(subject, whole.x[others], out.x[others])
    seen = f"neighbours moved by {moved:.1e}"
    right = True
    if out.status is not None:
        expected = [int(Status.NONFINITE) * (row == BAD) for row in range(ROWS)]
        right = out.status.tolist() == expected
        seen += f", statuses {'right' if right else 'wrong'}"
    elif bool(out.x[BAD].isfinite().all()):
        right = False
        seen += ", the row itself looks like a sample"
    return Check(claim, right and (moved <= subject.rounding or subject.coupled), seen)


def _misshapen(subject: Subject, model: Model) -> Check:
    claim = "refuses a model of the wrong shape"
    try:
        subject.run(Misshapen(model, PATIENCE), ROWS)
    except BadOutput as error:
        return Check(claim, False, _said(error))
    except Exception as error:
        return Check(claim, True, _said(error))
    return Check(claim, False, f"[{ROWS}, 1] for [{ROWS}, {len(MEAN)}] is taken and broadcast")
