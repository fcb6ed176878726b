"""Two sets of samples, checked, and pairs of the same sizes that differ by chance alone.

Chance is fresh exact samples where the reference is a target that draws them, and else a random
split of both sets together, whose law is the same if theirs is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ScoresolveError, ShapeError, whole_number
from scoresolve.noise import Philox, Purpose
from scoresolve.precision import widest

__all__ = ["LEAST", "Pair", "Unavailable", "at_rows", "pair"]

LEAST = 8
"""Rows that either set must have."""

_ROWS = 2048  # evaluated at a time, so that a mixture's [K, D, B] arrays stay small


class Unavailable(ScoresolveError):
    """A distance needs what is not there (a score, a density, a library), or is no number."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Samples and reference of one dtype on one device, flattened; made by `pair`.

    They lie where the samples do, or on the host if float64 is not to be had there.

    Attributes:
        x: samples, [N, D].
        y: reference, [M, D].
        seed: of all that is drawn.
        chunk: rows of a pairwise matrix to hold at a time.
        event: shape of one sample.
        target: what draws exact samples, or None.
        score_function: grad log p at [B, *event], or None.
        device: where the samples were given, and the score is asked.
    """

    x: Tensor
    y: Tensor
    seed: int
    chunk: int
    event: torch.Size
    target: Any | None
    score_function: Callable[[Tensor], Tensor] | None
    device: torch.device

    @property
    def sizes(self) -> tuple[int, int]:
        """N and M."""
        return len(self.x), len(self.y)

    @property
    def noise(self) -> Philox:
        """Numbers for projections, splits and signs."""
        return Philox(self.seed)

    @property
    def origin(self) -> str:
        """Where the noise floor comes from."""
        return "splits of both sets" if self.target is None else "exact samples"

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the target at `x` [B, D], float64 [B]; raises `Unavailable`."""
        log_prob = getattr(self.target, "log_prob", None)
        if not callable(log_prob):
            raise Unavailable("log_density needs a target with log_prob as the reference")
        found = at_rows(log_prob, x.double().reshape(-1, *self.event))
        if found.shape != (len(x),):
            raise ShapeError(
                f"log_prob returned {tuple(found.shape)} for {len(x)} samples: return one number "
                "each"
            )
        return found

    def score(self, x: Tensor) -> Tensor:
        """Score of the reference at `x` [B, D], of the same shape; raises `Unavailable`."""
        if self.score_function is None:
            raise Unavailable("ksd needs a target with a score as the reference, or score=")
        found = at_rows(self.score_function, x.reshape(-1, *self.event).to(self.device))
        if found.shape != (len(x), *self.event):
            raise ShapeError(
                f"score returned {tuple(found.shape)} for x of shape {(len(x), *self.event)}: "
                "return one score per element"
            )
        return found.to(x).reshape(x.shape)

    def order(self, number: int, rows: int | None = None) -> Tensor:
        """A random order of `rows` numbers, of all N + M unless said otherwise; int64."""
        count = sum(self.sizes) if rows is None else rows
        like = torch.empty(count, dtype=torch.float64, device=self.x.device)
        return self.noise.uniform(like, number, Purpose.DISTANCE).argsort()

    def null(self, number: int) -> tuple[Tensor, Tensor]:
        """Pair number `number` >= 0 that differs by chance alone, [N, D] and [M, D]."""
        n, m = self.sizes
        if self.target is None:
            both = torch.cat([self.x, self.y])[self.order(number)]
        else:
            both = draw(self.target, n + m, self.seed, number + 1).to(self.x).reshape(n + m, -1)
        return both[:n], both[n:]

    def take(self, most: int) -> Pair:
        """At most `most` rows of either set, chosen at random."""
        n, m = (min(size, most) for size in self.sizes)
        if (n, m) == self.sizes:
            return self
        # Orders from the far end, which no floor reaches.
        first, second = (self.order(2**32 - 1 - i, size) for i, size in enumerate(self.sizes))
        return replace(self, x=self.x[first[:n]], y=self.y[second[:m]])


def pair(
    x: Tensor,
    reference: Any,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    exact: int | None = None,
    seed: int = 0,
    chunk: int = 2048,
) -> Pair:
    """Samples and what they are held against, checked.

    Args:
        x: [N, *event], floating and finite, N >= 8.
        reference: [M, *event] likewise, or a target with `sample(n, seed)`: a `GaussianMixture`
            or one of your own, which may also have `log_prob` and `score`.
        score: grad log p of the reference, from [B, *event] to the same shape; unless given,
            that of the target.
        exact: M, where the reference is a target; else N.
        seed: in [0, 2**64). What is drawn differs from `target.sample(n, seed)`.
        chunk: rows of a pairwise matrix to hold at a time; changes values by rounding alone.

    Returns:
        A `Pair`, which every distance takes.

    Raises:
        ArgumentError: a dtype is not floating, a value is not finite, or the reference is
            neither samples nor a target.
        ShapeError: the shapes do not agree, or there are fewer than 8 rows.
    """
    first = _checked("x", x)
    target = None if isinstance(reference, Tensor) else reference
    if target is not None:
        if isinstance(target, type) or not callable(getattr(target, "sample", None)):
            raise ArgumentError(
                f"reference is {type(target).__name__}: give samples [M, *event] or a target "
                "with sample(n, seed)"
            )
        count = len(x) if exact is None else whole_number("exact", exact, least=LEAST)
        second = _checked("exact samples", draw(target, count, seed, 0)).to(first)
        score = score or getattr(target, "score", None)
    else:
        second = _checked("reference", reference).to(first.device)
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = first.to(dtype), second.to(dtype)
    if widest(first.device) is not torch.float64:
        first, second = first.cpu(), second.cpu()
    if first.shape[1:] != second.shape[1:]:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} for a reference on {tuple(second.shape[1:])}: "
            "give samples of one event shape"
        )
    return Pair(
        x=first.reshape(len(first), -1),
        y=second.reshape(len(second), -1),
        seed=Philox(seed).seed,
        chunk=whole_number("chunk", chunk),
        event=x.shape[1:],
        target=target,
        score_function=score,
        device=x.device,
    )


def draw(target: Any, count: int, seed: int, number: int) -> Tensor:
    """Set `number` of exact samples: independent of the others and of those of seed `seed`."""
    # Multiples of an odd constant visit all seeds before one comes back (a Weyl sequence).
    stream = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    drawn = target.sample(count, seed=stream)
    if not isinstance(drawn, Tensor) or drawn.shape[:1] != (count,):
        kind = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise ShapeError(f"the target's sample({count}) returned {kind}: return that many samples")
    return drawn.detach()


def at_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` at the rows of `x`, some at a time and without gradients."""
    with torch.no_grad():
        parts = [function(part) for part in torch.split(x, _ROWS)]
    if not isinstance(parts[0], Tensor):
        raise ShapeError(f"a density or score returned {type(parts[0]).__name__}: return a tensor")
    return torch.cat(parts)


def _checked(name: str, x: Tensor) -> Tensor:
    """`x` in float32 or float64, if it is [N >= 8, *event], floating and finite."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"{name}: {kind}, give a floating-point tensor [N, *event]")
    if x.ndim < 1 or len(x) < LEAST or not math.prod(x.shape[1:]):
        raise ShapeError(
            f"{name} of shape {tuple(x.shape)}: give [N, *event] with at least {LEAST} rows"
        )
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    if not bool(finite.all()):
        raise ArgumentError(
            f"{int((~finite).sum())} of {len(x)} rows of {name} are not finite: leave them out "
            "(and say how many they were)"
        )
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
