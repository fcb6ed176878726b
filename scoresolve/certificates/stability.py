"""Stability: small errors stay small, with few steps and many, also where data are narrow.

Order says what becomes of errors as the grid is refined; a consistent method may still blow up what
a network gets wrong. Two exact numbers tell, for data of unit size with directions of standard
deviation 1e-3 to 1, on the solver's own grid and the whole way:

    |std of the output - std of the law|           with the exact network,
    u sqrt(sum_k (dy/dm_k size_k)^2)               with one rounded to half precision,

m_k the k-th prediction, size_k = |p| + |q| its size for m = p x0 + q eps, and u = 2^-9 the rounding
of bfloat16. A sampler that knows nothing but the size of the data, N(mean, 1), is wrong by less
than 1, so a number above 1 is an explosion. Of a stable method the second tends to what the exact
flow makes of such errors; a parasitic root of a multistep method multiplies it from step to step,
by exp(2 int |df/dy|) in all if it is weak (leapfrog) and without end if it lies outside the circle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoresolve.certificates.affine import NotAffine, affine_law
from scoresolve.certificates.certificate import Check
from scoresolve.certificates.probes import ENDLESS, Watched
from scoresolve.certificates.randomness import Draws, Seeded
from scoresolve.models import Model, prediction_rows
from scoresolve.peers import BlackBox
from scoresolve.plans import Plan
from scoresolve.plans.stages import Call, Combine, Mark
from scoresolve.sde import GaussianSDE, SchedulePoint, TimeLike, as_time
from scoresolve.targets import gaussian

__all__ = [
    "Stability",
    "amplification",
    "rounding_errors",
    "stability_checks",
    "stability_of",
    "stability_of_box",
]

Array = NDArray[np.float64]

STDS = (1e-3, 1e-2, 0.1, 1.0)
BUDGETS = (10, 20, 50, 100)
LEAST = 20
"""Calls from which a solver must not explode; below, few methods with stages have two steps."""
HALF = 2.0**-9
LIMITS: Mapping[str, int] = MappingProxyType({"stochastic_heun": 50})
"""Calls from which a method is stable that is known to need more. A Heun step of the reverse SDE
in time multiplies a narrow direction by 1 - z + z^2/2, z = g^2 h/sigma^2, and the last steps of a
grid for 20 calls have a z far above the 2 below which that contracts."""
ROUNDING = 1e-9


class Stability(NamedTuple):
    """What a solver does to narrow directions at one budget.

    Attributes:
        nfe: network calls.
        spread: largest error of a standard deviation over the directions.
        distance: RMS over the directions of those errors.
        rounded: largest error that half precision of the network adds.
        amplified: errors of the network, over what the exact flow makes of them.
    """

    nfe: int
    spread: float
    distance: float
    rounded: float
    amplified: float


def stability_of(plan: Plan) -> Stability:
    """The numbers of one plan."""
    law = plan.law(0.0, [std**2 for std in STDS], start="marginal")
    gap = (law.output_variance.sqrt() - law.target_variance.sqrt()).abs().nan_to_num(nan=np.inf)
    return Stability(
        plan.nfe,
        float(gap.max()),
        float(gap.square().mean().sqrt()),
        float(rounding_errors(plan, STDS).max()),
        float(amplification(plan, STDS).max()),
    )


def stability_of_box(
    box: BlackBox, sde: GaussianSDE, n: Any, ends: tuple[float, float]
) -> Stability:
    """The same numbers of a sampler that is an affine map, from its answers alone.

    Args:
        box: the sampler.
        sde: the process.
        n: its number of steps, or its times.
        ends: the times of the states it is given and of those it returns.

    Raises:
        NotAffine: it is no affine map.
        Exception: whatever the sampler raises.
    """
    target = gaussian([0.0] * len(STDS), [std**2 for std in STDS])
    law = affine_law(box, Watched(target.score_model(sde), ENDLESS), target, sde, n, ends)
    gap = (law.covariance.diagonal().sqrt() - law.target_variance.sqrt()).abs()
    gap = gap.nan_to_num(nan=math.inf)
    # One row for every call, of which that call alone is answered with an error of 1.
    nudged = Nudged(target.score_model(sde))
    with Seeded(0), torch.no_grad(), Draws(lambda like, index: torch.zeros_like(like)):
        y = box(nudged, torch.zeros(1 + law.calls, len(STDS), dtype=box.dtype), n, torch.randn_like)
    if len(nudged.asked) != law.calls:
        raise NotAffine(f"{law.calls} calls for 2 states and {len(nudged.asked)} for {len(y)}")
    moved: Array = (y[1:] - y[0]).double().numpy()
    asked = [
        Asked(*prediction_size(prediction, sde.point(t)), weight)
        for (prediction, t), weight in zip(nudged.asked, moved, strict=True)
    ]
    start, end = ((float(sde.alpha(t)), float(sde.sigma(t))) if t > 0 else (1.0, 0.0) for t in ends)
    return Stability(
        law.calls,
        float(gap.max()),
        float(gap.square().mean().sqrt()),
        float(_rounded(asked).max()),
        float(_amplified(asked, STDS, start, end).max()) if end[1] > 0 else math.nan,
    )


class Nudged(Model):
    """A model whose k-th answer is 1 too large for row k + 1 of the states.

    Attributes:
        asked: what was asked for and at which time, call by call.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.sde, self.data_scale = model, model.sde, model.data_scale
        self.asked: list[tuple[str, float]] = []

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        m = self.model.predict(prediction, x, t).clone()
        self.asked.append((prediction, float(as_time(t).max())))
        if len(self.asked) < len(x):
            m[len(self.asked)] += 1
        return m


class Asked(NamedTuple):
    """One prediction p x0 + q eps, and what an error of it makes of the output.

    Attributes:
        p, q: of the prediction; 0 and -1/sigma for the score.
        alpha, sigma: where it was asked for.
        weight: derivative of the output by it, [D].
    """

    p: float
    q: float
    alpha: float
    sigma: float
    weight: Array


def prediction_size(prediction: str, point: SchedulePoint) -> tuple[float, float, float, float]:
    """p, q, alpha and sigma of a prediction at a point."""
    p, q = map(float, prediction_rows(prediction, point))
    alpha, sigma = float(point.alpha), float(point.sigma)
    if prediction == "score":
        p, q = 0.0, -1 / sigma if sigma else -math.inf
    return p, q, alpha, sigma


def rounding_errors(plan: Plan, stds: Sequence[float]) -> Array:
    """Standard deviation of the output of data of unit size under a network in half precision.

    Args:
        plan: with linear stages.
        stds: standard deviations of D independent coordinates of Gaussian data.

    Returns:
        One number for each coordinate, [D].
    """
    return _rounded(_weights(plan, stds))


def _rounded(asked: Sequence[Asked]) -> Array:
    sizes = np.array([a.weight * (abs(a.p) + abs(a.q)) for a in asked])
    with np.errstate(over="ignore"):  # of an unstable sampler
        total: Array = HALF * np.sqrt(np.square(sizes).sum(0))
    return total


def amplification(plan: Plan, stds: Sequence[float]) -> Array:
    """How far equal errors of eps in every call, of the worst signs, move the output; [D].

    Over that of the exact flow, which for y = x/alpha and rho = sigma/alpha is

        sqrt(v + rho_s^2) int_{rho_s}^{rho_t} drho / sqrt(v + rho^2).

    Args:
        plan: with linear stages, on a Gaussian process.
        stds: sqrt(v) of D independent coordinates of Gaussian data.
    """
    assert plan.start is not None and plan.end is not None
    start, end = ((float(point.alpha), float(point.sigma)) for point in (plan.start, plan.end))
    return _amplified(_weights(plan, stds), stds, start, end)


def _amplified(
    asked: Sequence[Asked],
    stds: Sequence[float],
    start: tuple[float, float],
    end: tuple[float, float],
) -> Array:
    std = np.array(stds, dtype=np.float64)
    total = np.zeros_like(std)
    for p, q, alpha, sigma, weight in asked:
        if alpha > 0:
            total += abs(weight * (q - p * sigma / alpha))
    top = start[1] / max(start[0], np.finfo(float).tiny ** 0.25)
    alpha, sigma = end
    reach = np.arcsinh(top / std) - np.arcsinh(sigma / alpha / std)
    exact: Array = np.hypot(alpha * std, sigma) * reach
    return total / exact


def _weights(plan: Plan, stds: Sequence[float]) -> list[Asked]:
    """What every call asks for, and what an error of it makes of the output, calls in between
    answered by the exact model."""
    variance = np.square(np.array(stds, dtype=np.float64))
    zero = np.zeros_like(variance)
    adjoint: dict[int, Array] = {plan.output: np.ones_like(variance)}
    found = []
    for stage in reversed(plan.stages):
        if isinstance(stage, Mark) or stage.out not in adjoint:
            continue
        weight = adjoint.pop(stage.out)
        if isinstance(stage, Call):
            assert stage.point is not None
            p, q, alpha, sigma = prediction_size(stage.prediction, stage.point)
            found.append(Asked(p, q, alpha, sigma, weight))
            slope = (p * alpha * variance + q * sigma) / (alpha**2 * variance + sigma**2)
            adjoint[stage.x] = adjoint.get(stage.x, zero) + slope * weight
        elif isinstance(stage, Combine):
            for register, c in stage.terms:
                adjoint[register] = adjoint.get(register, zero) + c * weight
    return found


def stability_checks(
    found: Sequence[Stability], name: str, convergent: bool
) -> tuple[list[Check], list[str]]:
    """Verdicts on budgets in increasing order, and what is to be known below its limit.

    Args:
        found: the numbers at each budget.
        name: of the solver.
        convergent: whether refining the grid is meant to lead to the exact law.
    """
    least = LIMITS.get(name, LEAST)
    lost = [row for row in found if not max(row.spread, row.rounded) < 1]
    bad, few = ([r for r in lost if (r.nfe > 0.8 * least) == over] for over in (True, False))
    worst = max((row.rounded for row in found if row not in few), default=0.0)
    seen = _exploded(bad) or f"half precision moves samples by {worst:.1e} at most"
    checks = [Check("does not blow up narrow data or small errors", not bad, seen)]
    fine = [row for row in found if row.nfe > 0.8 * least]
    if convergent and len(fine) > 1:
        before, last = max(row.distance for row in fine[:-1]), fine[-1]
        grown = not last.distance < max(1.5 * before, ROUNDING)  # one alone may be small by chance
        seen = f"errors are {last.distance:.1e} at {last.nfe} calls, {before:.1e} at fewer"
        checks.append(Check("more calls do not make narrow data worse", not grown, seen))
    notes = [f"fewer than {least} calls: {_exploded(few)}"] if few else []
    if fine and fine[-1].amplified > 100:
        notes.append(
            f"a network with errors: at {fine[-1].nfe} calls they grow up to "
            f"{fine[-1].amplified:.0f} times as much as on the exact flow"
        )
    return checks, notes


def _exploded(rows: Sequence[Stability]) -> str:
    return "; ".join(
        f"at {row.nfe} calls a standard deviation is off by {row.spread:.1e} and half precision "
        f"adds {row.rounded:.1e}, data having size 1"
        for row in rows
    )
