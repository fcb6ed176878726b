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
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.driving import device_of
from scoresolve.errors import ArgumentError, ModelWarning, ScoresolveError, whole_number
from scoresolve.models import Model, as_model, scale_of_data
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import GaussianSDE
from scoresolve.solvers.adaptive.drift import rounded_inside

__all__ = ["LEAST_BUDGET", "measure_scale", "scale_within"]

LEVELS = (4.0, 16.0, 64.0)
"""Levels of sigma/alpha asked; the first that is six times the standard deviation found counts."""

LEAST_BUDGET: Final = 6
"""Calls from which on it pays to spend one of them on the scale, see docs/choosing.md."""

_NUMBERS: Final = 4096


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
        pairs: pairs of opposite states at each of three levels, >= 1; if omitted, as many as
            hold 4096 numbers, but at most 64. The estimate's relative error is about
            (pairs * D)^(-1/2) for data with many directions.
        seed: of the states.
        dtype, device: of the states; the default dtype and the network's device.
        **cond: passed on to the model.

    Returns:
        `scale_of_data(std, D)` with the measured standard deviation per coordinate.

    Raises:
        ArgumentError: the process is not Gaussian, or the answer is no positive variance, as
            from a model that is wrong at those levels.
    """
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} has no noise level sigma/alpha: the scale has no meaning there")
    size = math.prod(event)
    wanted = min(64, math.ceil(_NUMBERS / size)) if pairs is None else whole_number("pairs", pairs)
    factory = {"dtype": dtype, "device": device or device_of(score)}
    like = torch.empty((wanted, *event), **factory)  # type: ignore[arg-type]
    z = Philox(seed).normal(like, 0, Purpose.PROBE)
    times = sde.time_from_log_snr(-2 * torch.tensor(LEVELS, dtype=torch.float64).log())
    levels = (-sde.log_snr(times) / 2).exp().tolist()  # lower if the process ends below
    states = [float(sde.sigma(t)) * sign * z for t in times for sign in (1, -1)]
    precision = torch.promote_types(z.dtype, torch.float32)
    asked = times.to(z.device, precision).clamp(*rounded_inside(sde.t_min, sde.T, precision))
    with torch.no_grad():
        x0 = as_model(score, sde).predict(
            "x0", torch.cat(states), asked.repeat_interleave(2 * wanted), **cond
        )
    opposite = x0.reshape(len(levels), 2, *z.shape)
    found = (z * (opposite[:, 0] - opposite[:, 1])).double().flatten(1).mean(1).tolist()
    answers = [level * answer / 2 for level, answer in zip(levels, found, strict=True)]
    level, answer = next(
        ((k, v) for k, v in zip(levels, answers, strict=True) if 0 < 36 * v <= k**2),
        (levels[-1], answers[-1]),
    )
    variance = answer / (1 - answer / level**2)  # of a Gaussian, whose answer is v/(1 + v/k^2)
    if not 0 < variance < math.inf:
        raise ArgumentError(
            f"the model's x0 at sigma/alpha = {level:.3g} gives the data a variance of "
            f"{variance:.3g}: check it with check_model, or give the scale"
        )
    return scale_of_data(math.sqrt(variance), size)


def scale_within(
    nfe: int, model: Model, sde: GaussianSDE, like: Tensor, cond: dict[str, Any]
) -> tuple[float | None, int]:
    """The scale of the model's data, and the calls spent on it out of a budget of `nfe`.

    What the model knows itself costs nothing. Else it is measured by one call if the budget is
    at least `LEAST_BUDGET`. Conditions that differ from sample to sample forbid that: a sample
    must not depend on its neighbours.

    Args:
        nfe: the budget.
        model: the model, of the process `sde`.
        like: an empty tensor [0, *event] of the state's dtype and device.
        cond: conditions passed on to the model.

    Returns:
        The scale, None if it is not known, and the calls made, 0 or 1.
    """
    own = any(isinstance(value, Tensor) and value.ndim for value in cond.values())
    if model.data_scale is not None or own or nfe < LEAST_BUDGET:
        return model.data_scale, 0
    try:
        return measure_scale(
            model, sde, like.shape[1:], dtype=like.dtype, device=like.device, **cond
        ), 1
    except (ScoresolveError, RuntimeError) as error:
        warnings.warn(
            f"the scale of the data could not be measured ({error}): set the model's data_scale",
            ModelWarning,
            stacklevel=3,
        )
        return None, 1
