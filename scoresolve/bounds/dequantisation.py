r"""The mass of discrete data under a density, by uniform dequantisation.

A value x on a lattice of bins of width w stands for the cube [x, x + w]^D, whose mass is

    P(x) = w^D E_u[p(x + w u)],  u uniform:   E log (w^D / K sum_k p(x + w u_k)) <= log P(x),

a bound that rises with K towards log P(x); K = 1 is plain dequantisation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ShapeError, real_number, whole_number
from scoresolve.noise import NoiseSource, Purpose, Times, as_noise
from scoresolve.plans import check_state

__all__ = ["Dequantised", "bits_per_dim", "dequantised_log_prob", "log_mean_exp", "standard_error"]


@dataclass(frozen=True)
class Dequantised:
    """What `dequantised_log_prob` returns.

    Attributes:
        log_prob: a lower bound on the log-mass of each sample, in expectation, in nats, [B].
        standard_error: its standard deviation over the choice of points and the noise of the
            densities, to first order, [B]; NaN for a single point.
        log_densities: log p(x + w u_k), [K, B].
        dimension: D, the number of event elements.
    """

    log_prob: Tensor
    standard_error: Tensor
    log_densities: Tensor
    dimension: int

    @property
    def bits_per_dim(self) -> Tensor:
        """-log_prob / (D log 2), [B]: in expectation, an upper bound on bits per element."""
        return bits_per_dim(self.log_prob, self.dimension)


def dequantised_log_prob(
    log_density: Callable[..., Any],
    x: Tensor,
    width: float,
    *,
    draws: int = 1,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
    **cond: Any,
) -> Dequantised:
    r"""Importance-weighted bound on the log-mass of discrete data.

        log P(x) >= E log (1/K sum_k p(x + w u_k)) + D log w,   u_k uniform on the unit cube

    Where the density itself is an estimate, as with random probes, its error biases the mean of
    its exponentials upwards. A `log_density` that takes `noise=` gets other noise at every point,
    so that the spread holds this error too, and their mean less of it. Otherwise all points may
    share their noise, and a `.standard_error` that comes with the densities is added in full.

    Args:
        log_density: callable from points [B, *event] to log-densities [B] or to an object that
            holds them as its `.log_prob`, as
            `lambda x, noise: ss.log_likelihood(score, sde, x, noise=noise)`.
        x: lower edges of the bins, [B, *event], floating point.
        width: width w > 0 of a bin.
        draws: number K >= 1 of points, one call of `log_density` each.
        seed: seed of the counter-based noise; sample i gets the same points in any batch.
        noise: a noise source, a `torch.Generator`, or a callable, instead of `seed`.
        **cond: passed on to `log_density`.

    Returns:
        A `Dequantised`.

    Raises:
        ArgumentError: the width is not positive, or `draws` no whole number of at least 1.
        ShapeError: `log_density` does not return one number a sample.

    Source:
        Theis, van den Oord and Bethge 2016 (1511.01844), section 3.1; Burda et al. 2016
        (1509.00519), eq. 8 and theorem 1; Ho et al. 2019 (1902.00275), section 3.1.
    """
    check_state(x)
    width, draws = real_number("width", width, above=0), whole_number("draws", draws, 1, 2**16)
    source, dimension = as_noise(noise, seed), math.prod(x.shape[1:])
    takes_noise, found, errors = _takes_noise(log_density), [], []
    for draw in range(draws):
        points = x + width * source.uniform(x, draw, Purpose.DEQUANTISE)
        own = {"noise": _Apart(source, draw)} if takes_noise else {}
        value: Any = log_density(points, **own, **cond)
        density = value if isinstance(value, Tensor) else getattr(value, "log_prob", None)
        if not isinstance(density, Tensor) or density.shape != x.shape[:1]:
            shape = tuple(density.shape) if isinstance(density, Tensor) else None
            raise ShapeError(
                f"log_density returned {type(value).__name__} of shape {shape} for x of shape "
                f"{tuple(x.shape)}: return one log-density per sample, [B]"
            )
        found.append(density)
        errors.append(getattr(value, "standard_error", torch.zeros_like(density)))
    values = torch.stack(found)
    bound, error = log_mean_exp(values)
    if not takes_noise:
        shared = (values.softmax(0) * torch.stack(errors)).sum(0)
        error = torch.hypot(error, shared)
    return Dequantised(bound + dimension * math.log(width), error, values, dimension)


def bits_per_dim(log_prob: Tensor, dimension: int, width: float | None = None) -> Tensor:
    """-log_prob / (D log 2), less log2(width): bits per element, shape of `log_prob`.

    Args:
        log_prob: log-densities of continuous data, or log-masses of discrete data, in nats.
        dimension: D >= 1.
        width: of the bins of discrete data, where `log_prob` is a density of dequantised data;
            None for masses, and for continuous data, whose bits are those of a density.

    Source:
        Theis, van den Oord and Bethge 2016 (1511.01844), section 3.1.
    """
    bits = -log_prob / (whole_number("dimension", dimension) * math.log(2))
    return bits if width is None else bits - math.log2(real_number("width", width, above=0))


def log_mean_exp(values: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of exp(values) over the first axis, and its standard error, both [B]."""
    top = values.amax(0)
    top = torch.where(top.isfinite(), top, 0)
    weights = (values - top).exp()
    mean = weights.mean(0)
    return mean.log() + top, standard_error(weights) / mean


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first axis, [B]; NaN for a single value."""
    if len(values) == 1:
        return torch.full_like(values[0], torch.nan)
    return values.std(0) / math.sqrt(len(values))


class _Apart(NoiseSource):
    """The noise of one point: draws that no other point has."""

    def __init__(self, source: NoiseSource, point: int) -> None:
        self.source, self.point = source, point

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        return self.source.normal(like, (self.point << 16) + draw, purpose, times)

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        return self.source.uniform(like, (self.point << 16) + draw, purpose)

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        return self.source.signs(like, (self.point << 16) + draw, purpose)

    def rows(self, index: slice | Tensor) -> NoiseSource:
        return _Apart(self.source.rows(index), self.point)


def _takes_noise(log_density: Callable[..., Any]) -> bool:
    try:
        return "noise" in inspect.signature(log_density).parameters
    except ValueError:  # a callable of C has no signature
        return False
