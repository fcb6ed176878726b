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
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
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
        ArgumentError: the process is not Gaussian, or there are fewer than two data points.
    """
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} is not Gaussian: there is no denoising to compare with")
    if data.ndim < 1 or data.shape[0] < 2 or not data.is_floating_point():
        raise ArgumentError("give at least two floating-point data points, [N, *event]")
    model = as_model(score, sde)
    if isinstance(model, NetworkModel):
        declared, network = model.prediction, model.native
    else:
        declared, network = "score", model
    errors = _all_errors(network, sde, data, seed, levels, cond)
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
        verdict=_verdict(own, best, ok),
        declared=own,
        best=best,
        levels=tuple(zip(*errors[declared, 1, "t"], strict=True)),
    )


def _verdict(own: Reading, best: Reading, ok: bool) -> str:
    if ok:
        return f"the network denoises as declared: {own} (error {own.error:.2g} of a linear filter)"
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


@torch.no_grad()
def _all_errors(
    network: Callable[..., Tensor],
    sde: GaussianSDE,
    data: Tensor,
    seed: int,
    levels: int,
    cond: dict[str, Any],
) -> dict[tuple[str, int, str], tuple[list[float], list[float]]]:
    """Times and relative errors by (prediction, sign, time) for every way to read the network."""
    log_snr = torch.linspace(4.0, -3.0, levels, dtype=torch.float64)
    times = sde.time_from_log_snr(log_snr).clamp(sde.t_min, sde.T).tolist()
    variance = float(data.var(0, correction=0).mean())
    noise = Philox(seed)
    errors: dict[tuple[str, int, str], tuple[list[float], list[float]]] = {}
    for level, t in enumerate(times):
        at = SchedulePoint(*(float(value) for value in sde.point(t)))
        eps = noise.normal(data, level, Purpose.OBJECTIVE)
        x = at.alpha * data + at.sigma * eps
        filtered = variance * at.sigma**2 / (at.alpha**2 * variance + at.sigma**2)
        for name, time_of in _TIMES.items():
            time = torch.full((len(data),), time_of(sde, t, at), dtype=data.dtype)
            try:
                m = network(x, time.to(data.device), **cond)
            except (RuntimeError, IndexError, ValueError):
                if name == "t":
                    raise
                continue  # the network cannot take such a time, so it does not expect it
            for prediction, sign in itertools.product(PREDICTIONS, (1, -1)):
                u, w = conversion(prediction, "x0", at)
                error = float((u * x + sign * w * m - data).square().mean())
                relative = error / filtered if math.isfinite(error) else math.inf
                seen = errors.setdefault((prediction, sign, name), ([], []))
                seen[0].append(t)
                seen[1].append(float(min(max(relative, 1e-12), 1e12)))
    return {key: seen for key, seen in errors.items() if len(seen[0]) == len(times)}
