"""The law of a sampler that has no exact one, measured on a target whose law is known.

Two separated modes in 1, 2 and 16 dimensions, of weights 0.3 and 0.7 and standard deviations 0.2
and 0.4 at a distance of 4; the starts are exact samples of its marginal, so that the law at the end
is its marginal there. Of N samples, each read from the mode it is nearest to, u = (x - mean)/std,

    share of the first mode    standard error sqrt(w (1 - w)/N)
    mean of u                  1/sqrt(N D)
    variance of u              sqrt(2/(N D))
    log-density gap            standard deviation of log p over sqrt(N)

each held against `BIAS` plus Z of its errors. With Z from P(|z| > Z) = 1e-4 over the number of
comparisons, a right sampler fails in one of ten thousand certificates at most (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.certificates.certificate import Check
from scoresolve.errors import Status
from scoresolve.models import Model
from scoresolve.sde import GaussianSDE
from scoresolve.targets import GaussianMixture

__all__ = ["BIAS", "Draw", "Drawn", "law_checks", "modes"]

DIMENSIONS = {1: 2000, 2: 1000, 16: 200}
"""Samples in each number of dimensions."""
WEIGHTS, STDS, DISTANCE = (0.3, 0.7), (0.2, 0.4), 4.0
BIAS = 0.05
"""What a sampler may be off beyond chance: 5 % of a variance, and as much of a share, of a mean in
standard deviations and, each coordinate adding half of its variance's error, of D/2 nats."""
MOST = 10.0
"""A share, mean or variance further off than this is no matter of discretisation."""
COMPARISONS = 4 * len(DIMENSIONS) * 2  # on two processes
Z = NormalDist().inv_cdf(1 - 1e-4 / COMPARISONS / 2)


class Drawn(NamedTuple):
    """Samples, and their statuses if there are any."""

    x: Tensor
    status: Tensor | None = None


Draw = Callable[[Model, Tensor], Drawn]
"""`draw(model, x)`, samples at the end from states x [N, D] at the start."""


class Reading(NamedTuple):
    """A statistic: what it was off, its standard error, and what bias it may have."""

    name: str
    off: float
    error: float
    bias: float

    @property
    def right(self) -> bool:
        return abs(self.off) <= self.bias + Z * self.error


def modes(dimension: int) -> GaussianMixture:
    """The target in so many dimensions."""
    corner = torch.full((dimension,), DISTANCE / 2 / math.sqrt(dimension), dtype=torch.float64)
    variances = torch.tensor(STDS, dtype=torch.float64).square()
    return GaussianMixture(WEIGHTS, torch.stack([-corner, corner]), variances)


def law_checks(
    draw: Draw, sde: GaussianSDE, ends: tuple[float, float], finer: Draw | None = None
) -> tuple[list[Check], list[str]]:
    """One verdict for each number of dimensions, and what holds for finer steps only.

    Args:
        draw: the sampler as it is used.
        sde: the process.
        ends: the times of the states it is given and of those it returns.
        finer: the sampler with so much finer steps that only chance and `BIAS` may be left.
    """
    checks, notes = [], []
    for dimension, count in DIMENSIONS.items():
        check, off = _law_check(draw, sde, ends, dimension, count)
        if not check.passed and finer is not None and off < MOST:
            usual, check = check, _law_check(finer, sde, ends, dimension, count)[0]
            if check.passed:
                check = replace(check, seen=f"{check.seen}, with finer steps")
                notes.append(f"the law in {dimension}-D with its usual steps: {usual.seen}")
        checks.append(check)
    return checks, notes


def _law_check(
    draw: Draw, sde: GaussianSDE, ends: tuple[float, float], dimension: int, count: int
) -> tuple[Check, float]:
    """The verdict, and how far the share or a moment was off at most."""
    claim = f"has the right law in {dimension} dimension{'s' * (dimension > 1)}"
    target = modes(dimension)
    start, end = (target.marginal(sde, t) if t > 0 else target for t in ends)
    try:
        drawn = draw(target.score_model(sde), start.sample(count, seed=7))
    except Exception as error:  # of any kind: the sampler may be anyone's
        return Check(
            claim, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ), math.inf
    x = drawn.x.double()
    lost = int((~x.isfinite().all(1)).sum())
    if drawn.status is not None:
        lost = max(lost, int((drawn.status != int(Status.OK)).sum()))
    if lost:
        return Check(claim, False, f"{lost} of {count} samples are lost"), math.inf
    found = _readings(x, end)
    wrong = [reading for reading in found if not reading.right]
    seen = ", ".join(
        f"{r.name} {r.off:+.2g} (at most {r.bias + Z * r.error:.2g})" for r in wrong or found
    )
    check = Check(claim, not wrong, f"{count} samples are off by {seen}")
    return check, max(abs(reading.off) for reading in found[:3])


def _readings(x: Tensor, law: GaussianMixture) -> list[Reading]:
    """The statistics of samples [N, D] of two modes with isotropic covariances."""
    count, dimension = x.shape
    centres, weights = law.means, law.weights
    stds = torch.stack([c.diagonal()[0] for c in law.covariances]).sqrt()
    first = (x - centres[0]).square().sum(1) < (x - centres[1]).square().sum(1)
    mode = (~first).long()
    u = (x - centres[mode]) / stds[mode, None]
    logs = law.log_prob(x)
    exact = law.log_prob(law.sample(16 * count, seed=11))
    spread = float(exact.std())
    share = float(weights[0])
    total = count * dimension
    return [
        Reading(
            "share",
            float(first.double().mean()) - share,
            math.sqrt(share * (1 - share) / count),
            BIAS,
        ),
        Reading("mean", float(u.mean()), 1 / math.sqrt(total), BIAS),
        Reading("variance", float(u.square().mean()) - 1, math.sqrt(2 / total), BIAS),
        Reading(
            "log-density",
            float(logs.mean() - exact.mean()),
            spread * math.sqrt((1 + 1 / 16) / count),
            BIAS * dimension / 2,
        ),
    ]
