"""Noise rates beta_1..beta_T of discrete chains.

Step t multiplies the signal by sqrt(1 - beta_t) and adds noise of variance beta_t, so that
alpha_bar_t = prod_{s <= t} (1 - beta_s) of its variance is left; of bits, beta_t are replaced by
fair coins.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number, short, step_count
from scoresolve.precision import host
from scoresolve.sde.vp import VariancePreserving

__all__ = [
    "constant_betas",
    "cosine_betas",
    "forgetting_betas",
    "linear_betas",
    "sampled_betas",
    "scaled_linear_betas",
]


def constant_betas(steps: int, beta: float = 0.01) -> Tensor:
    """The same `beta` in (0, 1) at every step, [steps] float64."""
    if real_number("beta", beta, above=0) >= 1:
        raise ArgumentError(f"beta = {beta}: give a number below 1")
    return host([float(beta)] * step_count("steps", steps))


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's schedule, [steps] float64 (Ho et al. 2020, 2006.11239, section 4).

    Args:
        steps: at least 1.
        first, last: of the rates, in [0, 1].

    Raises:
        ArgumentError: a number is out of its range.
    """
    first, last = _rate("first", first), _rate("last", last)
    return host(np.linspace(first, last, step_count("steps", steps)))


def scaled_linear_betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Latent diffusion's schedule, linear in sqrt(beta), [steps] float64 (Rombach et al. 2022)."""
    first, last = _rate("first", first), _rate("last", last)
    return linear_betas(steps, math.sqrt(first), math.sqrt(last)) ** 2


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Tensor:
    """Cosine schedule, [steps] float64 (Nichol and Dhariwal 2021, 2102.09672, eq. 17)."""
    s, largest = real_number("s", s, least=0), real_number("largest", largest, above=0, most=1)
    n = host(range(step_count("steps", steps) + 1))
    alpha_bar = torch.cos((n / steps + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


def forgetting_betas(steps: int) -> Tensor:
    """beta_t = 1/(T - t + 1), with which alpha_bar_t = 1 - t/T falls evenly, [steps] float64.

    The last is 1: nothing of the data is left at T.

    Source:
        Sohl-Dickstein et al. 2015 (1503.03585), section 2.4.1.
    """
    return 1 / host(range(step_count("steps", steps), 0, -1))


def sampled_betas(sde: VariancePreserving, steps: int) -> Tensor:
    """beta_n = h beta(n h) with h = T/steps, whose chain tends to `sde` with error O(1/steps).

    Args:
        sde: a process with drift -beta(t)/2 x and diffusion sqrt(beta(t)): `VP`, `CosineVP`.
        steps: at least 1.

    Returns:
        [steps] float64.

    Raises:
        ArgumentError: the steps are so few that a beta is not below 1, or `sde` has no beta(t).

    Source:
        Song et al. 2021 (2011.13456), appendix B, eq. 22-25.
    """
    if not isinstance(sde, VariancePreserving):
        raise ArgumentError(f"{short(sde)} has no beta(t): give VP, CosineVP or their like")
    steps = step_count("steps", steps)
    h = sde.T / steps
    betas = h * sde.beta(h * host(range(1, steps + 1)))
    if not bool((betas < 1).all()):
        raise ArgumentError(
            f"steps = {steps} give the beta {float(betas.max()):.3g}: give more steps, so that "
            "it is below 1"
        )
    return betas


def _rate(name: str, value: float) -> float:
    return real_number(name, value, least=0, most=1)
