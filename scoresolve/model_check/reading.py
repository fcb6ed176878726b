"""Is the network what its user says it is? A check on a few data points.

Noise the data, let the network denoise it, and compare: whatever the prediction is called, it
implies an x0, and E|x0_hat - x0|^2 of a trained network is at most that of the best filter
x0_hat = mean + a (x - alpha mean), whose error is v sigma^2 / (alpha^2 v + sigma^2) per element
for data of variance v. The output is read in every other way too; the best reading tells what
was mixed up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresolve.conditions import unmarked
from scoresolve.driving import check_call
from scoresolve.errors import ArgumentError, check_output, check_transforms, whole_number
from scoresolve.models import PREDICTIONS, Model, NetworkModel, as_model, conversion
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import GaussianSDE, SchedulePoint

__all__ = ["ModelReport", "Reading", "check_model"]


@dataclass(frozen=True)
class Reading:
    """One way to read a network, and how well it denoises when read so.

    Attributes:
        prediction: what the output is taken for.
        sign: 1, or -1 if the output is taken with the other sign.
        time: what the network is given as its time, as a formula in t.
        error: denoising error over that of the best linear filter, geometric mean over levels.
    """

    prediction: str
    sign: int
    time: str
    error: float

    def __str__(self) -> str:
        return f"{'-' if self.sign < 0 else ''}{self.prediction} with time {self.time}"


@dataclass(frozen=True)
class ModelReport:
    """What `check_model` found.

    Attributes:
        ok: whether the network denoises as it was declared, and nothing else fits better.
        verdict: one sentence that says what is right or how to mend it.
        declared: the reading the user gave.
        best: the reading that denoises best.
        levels: for the declared reading, (t, error relative to the best linear filter).
    """

    ok: bool
    verdict: str
    declared: Reading
    best: Reading
    levels: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        rows = "\n".join(f"  t = {t:10.4g}   error {error:10.4g}" for t, error in self.levels)
        return f"{self.verdict}\n{rows}"


_TIMES: dict[str, Callable[[GaussianSDE, float, SchedulePoint], float]] = {
    "t": lambda sde, t, at: t,
    "1000 t": lambda sde, t, at: 1000 * t,
    "t / 1000": lambda sde, t, at: t / 1000,
    "T - t": lambda sde, t, at: sde.T - t,
    "sigma / alpha": lambda sde, t, at: float(at.sigma / at.alpha),
}
_CLEAR = 1.3  # a reading must beat the declared one by this factor to be preferred
_TRAINED = 1.25  # a trained network is at 1 or below; the rest is for the few data points


def check_model(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    data: Tensor,
    *,
    seed: int = 0,
    levels: int = 8,
    **cond: Any,
) -> ModelReport:
    """Tell whether `score` is what it was declared to be: prediction, sign and time scale.

    Args:
        score: a model made by `from_eps`, `from_x0`, ... or a plain `score(x, t)`.
        sde: the process it is to be used with.
        data: some tens of clean data points, [N, *event].
        seed: seed of the noise.
        levels: noise levels between log-SNR 4 and -3 to try.
        **cond: passed on to the network.

    Returns:
        A `ModelReport`; `print` shows it.

    Raises:
        ArgumentError: the process is not Gaussian, or the data are not floating point, fewer than
            two points, not finite or one point.
        Exception: what the network raises when it is called as declared, with a note of where.
    """
    check_transforms("check_model")
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} is not Gaussian: there is no denoising to compare with")
    if not isinstance(data, Tensor):
        raise ArgumentError(f"data is {type(data).__name__}: give a tensor [N, *event]")
    if data.ndim < 1 or data.shape[0] < 2 or not data.is_floating_point():
        raise ArgumentError("give at least two floating-point data points, [N, *event]")
    if not bool(torch.isfinite(data).all()) or not bool(data.float().var(0).any()):
        raise ArgumentError(
            "the data are not finite, or are one point: there is nothing to denoise"
        )
    if cond:
        check_call(score, cond, check_model)
    model = as_model(score, sde)
    # in y = x/alpha and sigma/alpha all Gaussian processes are one, so a model is asked in its own
    if isinstance(score, Model) and isinstance(score.sde, GaussianSDE):
        model = score
    home = model.sde
    assert isinstance(home, GaussianSDE)
    if isinstance(model, NetworkModel):
        declared, network = model.prediction, model.native
    else:
        declared, network = "score", model
    wanted, held = whole_number("levels", levels, 1, 1000), unmarked(cond)
    found = _all_errors(network, sde, home, data, seed, wanted, held)
    errors = found.errors
    readings = {
        key: Reading(*key, math.exp(sum(map(math.log, e)) / len(e)))
        for key, (_, e) in errors.items()
    }
    own = readings[declared, 1, "t"]
    best = min(readings.values(), key=lambda reading: reading.error)
    if own.error <= _CLEAR * best.error:
        best = own
    ok = best is own and own.error < _TRAINED
    return ModelReport(
        ok=ok,
        verdict=_verdict(own, best, ok, found.not_finite),
        declared=own,
        best=best,
        levels=tuple(zip(*errors[declared, 1, "t"], strict=True)),
    )


def _verdict(own: Reading, best: Reading, ok: bool, not_finite: list[float]) -> str:
    if ok:
        return f"the network denoises as declared: {own} (error {own.error:.2g} of a linear filter)"
    if not_finite:
        other = f"; read as {best} it has the error {best.error:.2g}" if best is not own else ""
        return (
            "as it was declared the network returns numbers that are not finite at t = "
            f"{', '.join(f'{t:.4g}' for t in not_finite)}{other}"
        )
    if best.error >= _TRAINED:
        return (
            f"read as {own} or any other way the network denoises worse than a linear filter "
            f"(error {best.error:.2g}): it is untrained, or the data is scaled differently"
        )
    wrong = []
    if best.prediction != own.prediction:
        wrong.append(f"it predicts {best.prediction}, not {own.prediction}")
    if best.sign != own.sign:
        wrong.append("its sign is reversed")
    if best.time != own.time:
        wrong.append(f"it expects {best.time} for its time")
    return (
        f"the network is not what was declared: {' and '.join(wrong)} (error {best.error:.2g} of a "
        f"linear filter when read so, {own.error:.2g} as declared)"
    )


class _Found(NamedTuple):
    """What was seen.

    Attributes:
        errors: times and relative errors by (prediction, sign, time), for every way to read the
            network.
        not_finite: times at which the network, called as declared, is not finite.
    """

    errors: dict[tuple[str, int, str], tuple[list[float], list[float]]]
    not_finite: list[float]


@torch.no_grad()
def _all_errors(
    network: Callable[..., Tensor],
    sde: GaussianSDE,
    home: GaussianSDE,
    data: Tensor,
    seed: int,
    levels: int,
    cond: dict[str, Any],
) -> _Found:
    """Reads a network of the process `home` in every way, at times of `sde`."""
    log_snr = torch.linspace(4.0, -3.0, levels, dtype=torch.float64, device="cpu")
    times = sde.time_from_log_snr(log_snr).clamp(sde.t_min, sde.T)
    here = times if home == sde else home.time_from_log_snr(sde.log_snr(times))
    # in half precision what is left of an error is rounding
    clean = data.to(torch.promote_types(data.dtype, torch.float32))
    variance = float(clean.var(0, correction=0).mean())
    noise, found = Philox(seed), _Found({}, [])
    for level, t in enumerate(here.clamp(home.t_min, home.T).tolist()):
        at = SchedulePoint(*(float(value) for value in home.point(t)))
        x = at.alpha * clean + at.sigma * noise.normal(clean, level, Purpose.OBJECTIVE)
        given, told = x.to(data.dtype), float(times[level])
        filtered = variance * at.sigma**2 / (at.alpha**2 * variance + at.sigma**2)
        for name, time_of in _TIMES.items():
            time = clean.new_full((len(data),), time_of(home, t, at))
            try:
                m = network(given.clone(), time.to(data.device), **cond)
                check_output(m, given)
            except Exception as error:
                if name != "t":
                    continue  # the network cannot take such a time, so it does not expect it
                error.add_note(
                    f"check_model called the network with x {tuple(given.shape)} in {given.dtype} "
                    f"and t = {t:.6g}, noise level {level + 1} of {levels}"
                )
                raise
            if name == "t" and not bool(torch.isfinite(m).all()):
                found.not_finite.append(told)
            for prediction, sign in itertools.product(PREDICTIONS, (1, -1)):
                u, w = conversion(prediction, "x0", at)
                off = u * given.to(clean) + sign * w * m.to(clean) - clean
                relative = float(off.square().mean() / filtered)
                bounded = min(max(relative, 1e-12), 1e12) if math.isfinite(relative) else 1e12
                seen = found.errors.setdefault((prediction, sign, name), ([], []))
                seen[0].append(told)
                seen[1].append(bounded)
    whole = {key: seen for key, seen in found.errors.items() if len(seen[0]) == levels}
    return _Found(whole, found.not_finite)
