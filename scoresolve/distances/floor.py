"""A distance beside its noise floor: what the same statistic gives between exact samples.

Of B values that chance alone made, the floor is the one of rank ceil(0.95 (B + 1)), so that a
further one exceeds it with probability of at most 5 %, whatever its law. The p-value is
(1 + number of them at or above the value) / (B + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.distances.pairs import Pair, Unavailable
from scoresolve.errors import whole_number

__all__ = ["FEWEST", "Distance", "against_floor", "draw_floor"]

FEWEST = 19
"""Draws of the floor, of which the greatest is exceeded in 5 % of all cases."""


@dataclass(frozen=True)
class Distance:
    """One distance between two sets of samples.

    Attributes:
        name: of the distance.
        value: in the unit that `detail` and the function say.
        floor_mean: mean of the same statistic where chance alone made it.
        floor_quantile: its 95 % quantile.
        z: standard deviations of the floor between its mean and `value`.
        p_value: of `value` under chance alone.
        sizes: rows that were used of samples and reference.
        draws: values that the floor comes from.
        origin: how these were made.
        detail: settings and what else was found.
        two_sided: whether the sign is a direction, so that the floor is one of |value|.
    """

    name: str
    value: float
    floor_mean: float
    floor_quantile: float
    z: float
    p_value: float
    sizes: tuple[int, int]
    draws: int
    origin: str
    detail: str = ""
    two_sided: bool = False

    @property
    def above_noise(self) -> bool:
        """Whether the value says more than that the samples are finitely many."""
        return (abs(self.value) if self.two_sided else self.value) > self.floor_quantile

    def __str__(self) -> str:
        detail = f"; {self.detail}" if self.detail else ""
        return (
            f"{self.name} {self.value:.4g}, floor {self.floor_mean:.4g} (95 % below "
            f"{self.floor_quantile:.4g}): {'above noise' if self.above_noise else 'within noise'}, "
            f"z {self.z:.1f}, p {self.p_value:.2g}; {self.sizes[0]} rows against {self.sizes[1]}, "
            f"floor of {self.draws} {self.origin}{detail}"
        )


def against_floor(
    name: str,
    value: float,
    floor: Tensor,
    pair: Pair,
    *,
    detail: str = "",
    two_sided: bool = False,
    p_value: float | None = None,
    origin: str | None = None,
) -> Distance:
    """`value` beside the values `floor` [B] that chance made, with quantile, z and p-value.

    Args:
        name: of the distance.
        value: of the statistic; larger is further apart, in magnitude if `two_sided`.
        floor: [B], B >= 19.
        pair: what was compared.
        detail, two_sided: as in `Distance`.
        p_value: a better one than that of the floor, where the law is known.
        origin: how the floor was made, if not as `pair` says.

    Raises:
        ScoresolveError: the value is not a number, or the floor not finite.
    """
    floor = floor.double()
    if math.isnan(value) or not bool(torch.isfinite(floor).all()):
        raise Unavailable(
            f"{name} is {value} beside a floor of {float(floor.mean())}: the density or the score "
            "is not finite, or the numbers are too large for their dtype"
        )
    size, sizes = (abs(value), floor.abs()) if two_sided else (value, floor)
    draws, spread = len(floor), float(floor.std())
    excess = value - float(floor.mean())
    ranked = sizes.sort().values
    return Distance(
        name=name,
        value=value,
        floor_mean=float(sizes.mean()),
        floor_quantile=float(ranked[math.ceil(0.95 * (draws + 1) - 1e-9) - 1]),
        z=excess / spread if spread > 0 else math.copysign(math.inf, excess) if excess else 0.0,
        p_value=(1 + int((sizes >= size).sum())) / (draws + 1) if p_value is None else p_value,
        sizes=pair.sizes,
        draws=draws,
        origin=origin or pair.origin,
        detail=detail,
        two_sided=two_sided,
    )


def draw_floor(pair: Pair, statistic: Callable[[Tensor, Tensor], float], draws: int) -> Tensor:
    """`statistic` between `draws` >= 19 pairs that differ by chance alone, float64 [draws]."""
    count = whole_number("draws", draws, least=FEWEST)
    values = [statistic(*pair.null(number)) for number in range(count)]
    return torch.tensor(values, dtype=torch.float64, device="cpu")
