"""What the default solver wants to know of the data, asked of the model itself.

At a noise level k = sigma/alpha far above the data's, the model's x0 answers noise linearly,

    E[x0 | x' = k z] = E[x0] + Cov z / k,

so that k <z, x0(k z) - x0(-k z)>/2 is the trace of the covariance on average over z ~ N(0, I). A
network that gets eps wrong by a fraction e is wrong by k^2 e here, so the lowest such k counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.conditions import may_differ, unmarked
from scoresolve.driving import check_call, device_of
from scoresolve.errors import (
    ArgumentError,
    ModelWarning,
    ScoresolveError,
    ShapeError,
    check_output,
    check_transforms,
    checked_place,
    whole_number,
)
from scoresolve.models import Model, as_model, conversion, scale_of_data
from scoresolve.noise import Philox, Purpose
from scoresolve.plans import Call, Plan, model_time
from scoresolve.precision import host
from scoresolve.sde import GaussianSDE, TimeLike
from scoresolve.solvers.adaptive.drift import rounded_inside

__all__ = [
    "LEAST_BUDGET",
    "FirstAnswers",
    "PriorMismatch",
    "data_at_start",
    "measure_scale",
    "measure_scale_and_mismatch",
    "measured_or_none",
    "prior_mismatch",
    "scale_within",
]

LEVELS = (4.0, 16.0, 64.0)
"""Levels of sigma/alpha asked; the first that is six times the standard deviation found counts."""

LEAST_BUDGET: Final = 6
"""Calls from which on it pays to spend one of them on the scale, see docs/choosing.md."""

MISMATCH: Final = 3e-4
"""Divergence in nats an element from which on a prior counts as another law than that at T.

(r - 1)^2 for a ratio r of standard deviations near 1, which the probability flow of Gaussian data
hands on to the samples: there theirs are off by 1.7 %."""

_MISMATCH_OF_FEW: Final = 1e-3  # as a few samples of data about 0 lie on one side by chance

MOST_PAIRS: Final = 2**16

_DEVIATIONS: Final = 6.0
_NO_SCORE: Final = -0.1  # slope of x0 in x below which no data answer, as their variances are >= 0

_COLLAPSED: Final = 0.1
_FEW_ANSWERS: Final = 16

_NUMBERS: Final = 4096
_FARTHEST: Final = 700.0  # log-SNR of the last time where alpha does not vanish in float64


def measure_scale(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: Sequence[int],
    *,
    pairs: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **cond: Any,
) -> float:
    """The scale of the data for `Model.data_scale`, by one call.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`; it is called on 6 * pairs states, whose
            times differ.
        sde: its process; it must be Gaussian.
        event: shape of one sample.
        pairs: pairs of opposite states at each of three levels, from 1 to 65536; if omitted, as
            many as hold 4096 numbers, but at most 64. The estimate's relative error is about
            (pairs * D)^(-1/2) for data with many directions.
        seed: of the states.
        dtype, device: of the states; the default dtype and the network's device.
        **cond: passed on to the model.

    Returns:
        `scale_of_data(std, D)` with the measured standard deviation per coordinate.

    Raises:
        ArgumentError: the process is not Gaussian, or the answer is no positive variance, as
            from a model that is wrong at those levels.
        ShapeError: an event of no elements.
    """
    if cond:
        check_call(score, cond, measure_scale)
    held = unmarked(cond)
    return _scale(_ask(score, sde, event, LEVELS, pairs, seed, dtype, device, held))


@dataclass(frozen=True)
class PriorMismatch:
    """How far the law of a model's states at T is from the prior, taking it for Gaussian.

    Attributes:
        mean: E[x_T] in units of the prior's standard deviation, root mean square over the event.
        std: standard deviation of x_T per coordinate in those units; 1 where no data are left.
        dimension: D, the number of event elements.
    """

    mean: float
    std: float
    dimension: int

    @property
    def per_element(self) -> float:
        """KL(law at T || prior) / D in nats, >= 0; inf where `std` is no finite number."""
        if not math.isfinite(self.mean + self.std):
            return math.inf
        ratio = self.std**2
        return (self.mean**2 + ratio - 1 - math.log(ratio)) / 2

    @property
    def matters(self) -> bool:
        """Whether samples that start from the prior are off by more than about 2 %."""
        return self.per_element > MISMATCH


def prior_mismatch(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: Sequence[int],
    *,
    pairs: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **cond: Any,
) -> PriorMismatch:
    """How much of the data is left at T, where the prior takes it for noise; by one call.

    Args:
        score, sde, event, seed, dtype, device, cond: as in `measure_scale`.
        pairs: pairs of opposite states at T, from 1 to 65536; the default of `measure_scale`.

    Returns:
        A `PriorMismatch`. Data that are no Gaussian are taken for one.

    Raises:
        ArgumentError: the process is not Gaussian.
        ShapeError: an event of no elements.
    """
    asked = _ask(score, sde, event, (math.inf,), pairs, seed, dtype, device, cond)
    return _mismatch(asked, sde)


def measure_scale_and_mismatch(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: Sequence[int],
    *,
    pairs: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **cond: Any,
) -> tuple[float, PriorMismatch]:
    """What `measure_scale` and `prior_mismatch` say, by the one call of the former.

    The highest level asked is that of T, or lies so far above the data that T follows from it.

    Args:
        score, sde, event, pairs, seed, dtype, device, cond: as in `measure_scale`.

    Returns:
        The scale and the mismatch.

    Raises:
        ArgumentError: as for `measure_scale`.
        ShapeError: an event of no elements.
    """
    asked = _ask(score, sde, event, LEVELS, pairs, seed, dtype, device, cond)
    last = _Answers(asked.levels[-1:], asked.z, asked.x0[-1:])
    return _scale(asked), _mismatch(last, sde)


class _NoScale(ArgumentError):
    """A model's answers are those of no data."""


@dataclass(frozen=True)
class _Answers:
    """x0 [levels, 2, pairs, *event] at the states k z and -k z of noise levels k.

    Attributes:
        levels: sigma/alpha, lower than asked for if the process ends below.
        z: standard normal noise, [pairs, *event].
    """

    levels: list[float]
    z: Tensor
    x0: Tensor

    def products(self) -> tuple[list[float], float]:
        """Means over pairs and elements of z (x0(k z) - x0(-k z)), for each level, and of z^2."""
        found = _wide(self.z * (self.x0[:, 0] - self.x0[:, 1])).mean(1)
        return found.tolist(), float(_wide(self.z).square().mean())


def _ask(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: Sequence[int],
    levels: Sequence[float],
    pairs: int | None,
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    cond: dict[str, Any],
) -> _Answers:
    check_transforms("measuring the scale of the data", mapped=True)
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} has no noise level sigma/alpha: the scale has no meaning there")
    try:
        event = tuple(whole_number("size", size) for size in event)
    except (TypeError, ScoresolveError) as error:
        raise ShapeError(f"event = {event}: give the sizes of a sample, [*event]") from error
    size = math.prod(event)
    if size < 1:
        raise ShapeError(f"event = {tuple(event)}: give the shape of samples that hold elements")
    wanted = min(64, math.ceil(_NUMBERS / size))
    if pairs is not None:
        wanted = whole_number("pairs", pairs, 1, MOST_PAIRS)
    dtype, device = checked_place(dtype, device_of(score) if device is None else device)
    like = torch.empty((wanted, *event), dtype=dtype, device=device)
    z = Philox(seed).normal(like, 0, Purpose.PROBE)
    log_snr = -2 * host(levels).log()
    times = sde.time_from_log_snr(log_snr.clamp(min=-_FARTHEST))
    found = (-sde.log_snr(times) / 2).exp().tolist()
    states = [float(sde.sigma(t)) * sign * z for t in times for sign in (1, -1)]
    precision = torch.promote_types(z.dtype, torch.float32)
    asked = times.to(z.device, precision).clamp(*rounded_inside(sde.t_min, sde.T, precision))
    with torch.no_grad():
        x0 = as_model(score, sde).predict(
            "x0", torch.cat(states), asked.repeat_interleave(2 * wanted), **cond
        )
    return _Answers(found, z, x0.reshape(len(found), 2, *z.shape))


def _scale(asked: _Answers) -> float:
    levels, size = asked.levels, math.prod(asked.z.shape[1:])
    found, square = asked.products()
    answers = [level * answer / 2 for level, answer in zip(levels, found, strict=True)]
    level, answer = next(
        ((k, v) for k, v in zip(levels, answers, strict=True) if 0 < 36 * v <= k**2),
        (levels[-1], answers[-1] / square),  # where data show the noise of z^2 would count
    )
    variance = _variance(answer, level)
    if not 0 < variance < math.inf:
        raise _NoScale(
            f"the model's x0 at sigma/alpha = {level:.3g} gives the data a variance of "
            f"{variance:.3g}: check it with check_model, or give the scale"
        )
    return scale_of_data(math.sqrt(variance), size)


def _variance(answer: float, level: float) -> float:
    """v of a Gaussian, whose answer at noise level k is v/(1 + v/k^2)."""
    return answer / (1 - answer / level**2) if answer != level**2 else math.inf


def _mismatch(asked: _Answers, sde: GaussianSDE) -> PriorMismatch:
    (level,), ((found,), square) = asked.levels, asked.products()
    alpha, sigma = float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
    if alpha == 0:
        return PriorMismatch(0.0, sigma / sde.prior_std, math.prod(asked.z.shape[1:]))
    variance = _variance(level * found / 2 / square, level)
    middle = _wide(asked.x0.flatten(0, 2)).mean(0)  # (1 - share) E[x0] of a Gaussian
    share = variance / (variance + level**2)
    mean = float(middle.square().mean().sqrt()) / abs(1 - share) if share != 1 else math.inf
    spread = alpha**2 * variance + sigma**2
    std = math.sqrt(spread) if 0 < spread < math.inf else math.inf
    return PriorMismatch(
        alpha * mean / sde.prior_std, std / sde.prior_std, math.prod(asked.z.shape[1:])
    )


def data_at_start(
    model: Model,
    sde: GaussianSDE,
    ends: tuple[float, float],
    x: Tensor,
    rows: Callable[[], tuple[Tensor, dict[str, Any]]],
    answers: FirstAnswers | None = None,
) -> tuple[PriorMismatch | None, int]:
    """What samples that began as noise alone say of the data left at their start.

    The samples tell where the data lie, at no cost. Only where such data would show at the start is
    the model asked, by one call at the starts: its alpha E[x0 | x] is alpha m + b (x - alpha m),
    with m the mean of the data and b from 0 to 1 the share of them in x. Both times a law counts as
    another one by n rows if it is so by six standard errors of a variance, even if all rows lie on
    one line.

    Args:
        model: the model, of the process `sde`.
        sde: the process.
        ends: times of the starts and of the samples.
        x: samples that arrived, [n, *event].
        rows: gives starts [B, *event] and their conditions, as the model takes them.
        answers: of the run, in place of the call.

    Returns:
        The mismatch if it matters, else None; and the rows that the model was asked for.
    """
    start, end = ends
    alpha, std = float(sde.alpha(start)), sde.start_std(start)
    shrink = float(sde.alpha(end))
    if alpha == 0 or shrink == 0 or not len(x):
        return None, 0
    data = _wide(x) / shrink
    spread = float(data.var(0, unbiased=False).mean()) - (float(sde.sigma(end)) / shrink) ** 2
    mean = float(data.mean(0).square().mean().sqrt())
    share = max(spread, 0.0) * (alpha / std) ** 2
    if not _shows(alpha * mean / std, share / (1 + share), len(x)):
        return None, 0
    if answers is not None and answers.at_start:
        return answers.mismatch, 0
    states, cond = rows()
    with torch.no_grad():
        x0 = model.predict("x0", states, model_time(start, states), **cond)
    z, y = _wide(states) / std, _wide(x0) * (alpha / std)
    return _of_starts(z, y, not may_differ(cond)), len(states)


class FirstAnswers(Model):
    """`model`, of whose first answer in each run of a plan the variance is kept.

    Args:
        model: a model of the plan's process.
        plan: what is run, from a state x_0 at its first time.
        alike: whether all samples have the same conditions.

    Attributes:
        mismatch: what the first answer of the first run shows of data left at the start.
    """

    def __init__(self, model: Model, plan: Plan, alike: bool = True) -> None:
        self.alike = alike
        self.mismatch: PriorMismatch | None = None
        first = next((stage for stage in plan.stages if isinstance(stage, Call)), None)
        self.at_start = first is not None and first.x == 0 and first.t == plan.times[0]
        self.model, self.sde, self.data_scale = model, model.sde, model.data_scale
        self.plan, self.made, self.count = plan, 0, 0
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        return self.model.predict(prediction, x, t, **cond)

    def bind(self, prediction: str) -> tuple[str, Callable[..., Tensor]]:
        source, function = self.model.bind(prediction)
        return source, partial(self._asked, source, function)

    def _asked(
        self, source: str, function: Callable[..., Tensor], x: Tensor, t: Tensor, **cond: Any
    ) -> Tensor:
        m = function(x, t, **cond)
        if self.made % self.plan.nfe == 0 and self.plan.start is not None:
            check_output(m, x)
            u, w = conversion(source, "x0", self.plan.start)
            x0 = _wide(u * x + w * m)
            self.count += len(x)
            self.sums, self.squares = self.sums + x0.sum(0), self.squares + x0.square().sum()
            if self.made == 0 and self.at_start:
                std = self.plan.prior_std or 1.0
                z = _wide(x) / std
                self.mismatch = _of_starts(z, x0 * (self.plan.start.alpha / std), self.alike)
        self.made += 1
        return m

    def collapsed(self, x: Tensor) -> float | None:
        """Their variance in that of the samples `x` [n, *event] that came of them, if it is small.

        That of a consistency model is about 1, as its answer to noise is a sample. That of a
        denoiser is v/(v + k^2) where the data have variance v, k = sigma/alpha. Below a tenth it
        is told; by chance, of 16 samples on one line, it is there with probability 2e-5.
        """
        if self.plan.nfe < 2 or min(self.count, len(x)) < _FEW_ANSWERS:
            return None
        total = self.squares - torch.as_tensor(self.sums).square().sum() / self.count
        spread = float(_wide(x).var(0).sum())
        share = float(total) / (self.count - 1) / spread if spread > 0 else math.nan
        return share if share < _COLLAPSED else None


def _wide(x: Tensor) -> Tensor:
    """Rows [B, D] in float32 or more; not every device has float64."""
    return x.detach().reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))


def _of_starts(z: Tensor, y: Tensor, alike: bool) -> PriorMismatch | None:
    """The mismatch that answers y = alpha x0 to starts z show, both [B, D] in stds of the start.

    Where conditions differ, so may the mean of each row.
    """
    count, size = y.shape
    if alike and count > 1:
        centre, parts = y.mean(0), count - 1
        slope = float(((z - z.mean(0)) * (y - centre)).sum()) / (parts * size)
        noise = float((y - centre).square().sum()) / parts  # of a network, which is not in the mean
        square = (float(centre.square().sum()) - noise / count) / size
    else:
        slope = float((z * y).mean()) if count > 1 else 0.0
        square = float(y.square().mean()) - slope**2
    if not math.isfinite(square + slope) or not _NO_SCORE < slope < 1:
        return None
    share = max(slope, 0.0)
    mean = math.sqrt(max(square, 0.0)) / (1 - share)
    return PriorMismatch(mean, (1 - share) ** -0.5, size) if _shows(mean, share, count) else None


def _shows(mean: float, share: float, count: int) -> bool:
    """Whether a mean, in stds of the start, and a share of the data are no chance of `count`."""
    room = 1 + _DEVIATIONS / math.sqrt(2 * count)
    share /= room
    found = PriorMismatch(mean / room, (1 - share) ** -0.5, 1).per_element
    return found > (MISMATCH if count >= _FEW_ANSWERS else _MISMATCH_OF_FEW)


def scale_within(
    nfe: int, model: Model, sde: GaussianSDE, like: Tensor, cond: dict[str, Any]
) -> tuple[float | None, PriorMismatch | None, int]:
    """The scale of the model's data, what is left of them at T, and the calls spent on both.

    What the model knows itself costs nothing. Else it is measured by one call if the budget is
    at least `LEAST_BUDGET`. Conditions that differ from sample to sample forbid that: a sample
    must not depend on its neighbours.

    Args:
        nfe: the budget.
        model: the model, of the process `sde`.
        like: an empty tensor [0, *event] of the state's dtype and device.
        cond: conditions passed on to the model.

    Returns:
        The scale and the mismatch, None if they are not known, and the calls made, 0 or 1.
    """
    if model.data_scale is not None or may_differ(cond) or nfe < LEAST_BUDGET:
        return model.data_scale, None, 0
    return *(measured_or_none(model, sde, like, cond, stacklevel=4) or (None, None)), 1


def measured_or_none(
    model: Model,
    sde: GaussianSDE,
    like: Tensor,
    cond: dict[str, Any],
    *,
    pairs: int | None = None,
    stacklevel: int = 3,
) -> tuple[float, PriorMismatch] | None:
    """The measured scale and mismatch, or None, with a warning, if it is not to be had.

    That is where the answers are those of no data, and where a network refuses so many rows with a
    RuntimeError, as one compiled for its batch or out of memory does. All else that a model raises
    is its own affair and passes.

    Args:
        model, sde, like, cond: as in `scale_within`.
        pairs: as in `measure_scale`.
        stacklevel: of the warning.
    """
    try:
        return measure_scale_and_mismatch(
            model,
            sde,
            like.shape[1:],
            pairs=pairs,
            dtype=like.dtype,
            device=like.device,
            **unmarked(cond),
        )
    except (_NoScale, RuntimeError) as error:
        if isinstance(error, ScoresolveError) and not isinstance(error, _NoScale):
            raise
        why = f"{error}" if isinstance(error, _NoScale) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the scale of the data could not be measured ({why}): set the model's data_scale",
            ModelWarning,
            stacklevel=stacklevel,
        )
        return None
