"""Several distances of one set of samples, as a table beside their noise floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from scoresolve.distances.closed_form import gap_of
from scoresolve.distances.floor import Distance, against_floor, draw_floor
from scoresolve.distances.pairs import Pair, Unavailable, pair
from scoresolve.distances.pairwise import energy, ksd, mmd
from scoresolve.distances.transport import ks, sliced_wasserstein, wasserstein
from scoresolve.distances.two_sample import classifier
from scoresolve.errors import ArgumentError, known_name
from scoresolve.json_text import json_text

__all__ = ["DISTANCES", "DistanceTable", "Measure", "compare_samples", "log_density"]

Measure = Callable[..., Distance]
"""Takes a `Pair`, and `draws=` for another number of draws of its floor than its own."""


def log_density(pair: Pair, *, draws: int = 39) -> Distance:
    """The log-density gap E_p[log p] - mean log p(x), in nats, E_p by exact samples.

    It has a sign: above 0 where samples stray, below 0 where they are too narrow.

    Args:
        pair: of `distances.pair`, of a target with `log_prob`.
        draws: of the floor, at least 19.

    Raises:
        ScoresolveError: there is no density.
        ArgumentError: `draws` is below 19.
    """
    found = gap_of(pair.log_prob(pair.x), pair.log_prob(pair.y))

    def statistic(x: Tensor, y: Tensor) -> float:
        return float(pair.log_prob(y).mean() - pair.log_prob(x).mean())

    return against_floor(
        "log_density",
        found.value,
        draw_floor(pair, statistic, draws),
        pair,
        detail=f"+- {found.standard_error:.2g} nats",
        two_sided=True,
    )


DISTANCES: dict[str, Measure] = {
    "log_density": log_density,
    "sliced_wasserstein": sliced_wasserstein,
    "wasserstein": wasserstein,
    "energy": energy,
    "mmd": mmd,
    "ksd": ksd,
    "ks": ks,
    "classifier": classifier,
}
"""Distances by name, in the order of the table."""


@dataclass(frozen=True)
class DistanceTable:
    """What `compare_samples` returns; `table["mmd"]` is one of them.

    Attributes:
        distances: in the order asked for.
        left_out: name and reason of those that could not be had or are no number, where none was
            asked for by name.
    """

    distances: tuple[Distance, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> Distance:
        names = {distance.name: distance for distance in self.distances}
        return names[known_name("distance", name, names)]

    @property
    def above_noise(self) -> tuple[str, ...]:
        """Names of the distances that are above their floors."""
        return tuple(each.name for each in self.distances if each.above_noise)

    def __str__(self) -> str:
        heads = ("distance", "value", "floor", "95 % below", "z", "p", "", "rows", "detail")
        rows = [heads] + [
            (
                each.name,
                f"{each.value:.4g}",
                f"{each.floor_mean:.4g}",
                f"{each.floor_quantile:.4g}",
                f"{each.z:.1f}",
                f"{each.p_value:.2g}",
                "above noise" if each.above_noise else "within noise",
                f"{each.sizes[0]}, {each.sizes[1]}",
                each.detail,
            )
            for each in self.distances
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"left out: {why}" for _, why in self.left_out)])

    def to_json(self) -> str:
        """The table as JSON, with what is left out, see `json_text`."""
        rows = [{**asdict(each), "above_noise": each.above_noise} for each in self.distances]
        return json_text({"distances": rows, "left_out": dict(self.left_out)})


def compare_samples(
    x: Tensor,
    reference: Any,
    distances: Sequence[str | Measure] | None = None,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    draws: int | None = None,
    seed: int = 0,
    chunk: int = 2048,
) -> DistanceTable:
    """How far samples are from a law, by several distances, each beside its noise floor.

    A distance within its floor says nothing, not that the laws are equal: which errors each one
    sees differs. The same arguments give the same table.

    Args:
        x: samples [N, *event], floating and finite, N >= 8.
        reference: exact or other samples [M, *event], or a target with `sample(n, seed)`, of
            which N exact samples are drawn; with `log_prob` and `score` it allows all distances.
        distances: names of `DISTANCES`, or functions of a `Pair`; unless given, all that can be
            had.
        score: grad log p of the reference at [B, *event], for "ksd".
        draws: of every floor, at least 19; each distance has a number of its own.
        seed: of exact samples, projections and splits, in [0, 2**64).
        chunk: rows of a pairwise matrix to hold at a time; changes values by rounding alone.

    Returns:
        A `DistanceTable`; `print` shows it.

    Raises:
        ArgumentError, ShapeError: as `distances.pair`, or `draws` is below 19.
        UnknownNameError: no such distance.
        ScoresolveError: a distance asked for by name lacks its score, density or library, or is
            no number.
    """
    if isinstance(distances, str):
        raise ArgumentError(f"distances = {distances!r}: give a sequence of names")
    chosen = [*DISTANCES] if distances is None else [*distances]
    measures = [
        each if callable(each) else DISTANCES[known_name("distance", each, DISTANCES)]
        for each in chosen
    ]
    both = pair(x, reference, score=score, seed=seed, chunk=chunk)
    options = {} if draws is None else {"draws": draws}
    found, left_out = [], []
    for name, measure in zip(chosen, measures, strict=True):
        try:
            found.append(measure(both, **options))
        except Unavailable as error:
            if distances is not None:
                raise
            left_out.append((str(name), str(error)))
    return DistanceTable(tuple(found), tuple(left_out))
