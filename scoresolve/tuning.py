"""What the default solver wants to know of the data, asked of the model itself.

At a noise level k = sigma/alpha far above the data's, the model's x0 answers noise linearly,

    E[x0 | x' = k z] = E[x0] + Cov z / k,

so that k <z, x0(k z) - x0(-k z)>/2 is the trace of the covariance on average over z ~ N(0, I). A
network that gets eps wrong by a fraction e is wrong by k^2 e here, so k is raised only as needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresolve.driving import device_of
from scoresolve.errors import ArgumentError, whole_number
from scoresolve.models import Model, as_model, scale_of_data
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import GaussianSDE

__all__ = ["measure_scale"]

LEVELS = (4.0, 16.0, 64.0)
"""Levels of sigma/alpha to ask at, until one is six times the standard deviation found there."""


def measure_scale(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: Sequence[int],
    *,
    rows: int = 64,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **cond: Any,
) -> float:
    """The scale of the data for `Model.data_scale`, by one to three calls on 2 * rows states.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`.
        sde: its process; it must be Gaussian.
        event: shape of one sample.
        rows: pairs of opposite states, >= 1; the estimate's relative error is about
            (rows * D)^(-1/2) for data with many directions.
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
    rows = whole_number("rows", rows)
    factory = {"dtype": dtype, "device": device or device_of(score)}
    like = torch.empty((rows, *event), **factory)  # type: ignore[arg-type]
    z = Philox(seed).normal(like, 0, Purpose.PROBE)
    model = as_model(score, sde)
    for asked in LEVELS:
        t = sde.time_from_log_snr(torch.tensor(-2 * math.log(asked), dtype=torch.float64))
        level = float((-sde.log_snr(t) / 2).exp())  # lower if the process ends below
        x = float(sde.sigma(t)) * torch.cat([z, -z])
        with torch.no_grad():
            x0 = model.predict("x0", x, t.to(x), **cond)
        answer = level * float((z * (x0[:rows] - x0[rows:])).double().mean()) / 2
        if 0 < 36 * answer <= level**2 or level < 0.99 * asked:
            break
    variance = answer / (1 - answer / level**2)  # of a Gaussian, whose answer is v/(1 + v/k^2)
    if not 0 < variance < math.inf:
        raise ArgumentError(
            f"the model's x0 at sigma/alpha = {level:.3g} gives the data a variance of "
            f"{variance:.3g}: check it with check_model, or give the scale"
        )
    return scale_of_data(math.sqrt(variance), z[0].numel())
