"""Conditions: which of a model's keyword arguments follow the samples, and which they share.

A condition is a tensor or a nest of tensors (dict, list, tuple, whatever `torch.utils._pytree`
knows). A tensor whose first axis is not the batch is shared. One whose first axis is the batch may
be either, and while the batch stays whole nobody needs to know. Where it must be split, the mark
`per_sample(...)` or `shared(...)` tells; without one the model is asked for single samples, and of
the readings that it takes all must agree. Nothing is guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import keystr as _keystr
from torch.utils._pytree import (
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from scoresolve.errors import ArgumentError, ShapeError

__all__ = [
    "PerSample",
    "Shared",
    "may_differ",
    "part_of",
    "per_sample",
    "settled",
    "shared",
    "split_cond",
    "unmarked",
]

_MOST_READINGS: Final = 16
"""Combinations of readings that are tried: four tensors that may be read in two ways each."""

_AGREE: Final = 16
"""Units of rounding, of the answer's dtype, within which two answers are one: where noise hides
what a condition does, readings that differ give answers that differ by little."""


@dataclass(frozen=True, eq=False)
class PerSample:
    """A condition whose tensors have one row per sample; see `per_sample`."""

    value: Any


@dataclass(frozen=True, eq=False)
class Shared:
    """A condition that all samples share as it is; see `shared`."""

    value: Any


def per_sample(value: Any) -> PerSample:
    """Mark a condition as one row per sample: it is split whenever the batch is.

    Args:
        value: a tensor [B, ...] or a nest of such; other leaves are passed on.
    """
    return PerSample(value)


def shared(value: Any) -> Shared:
    """Mark a condition as one for all samples: it reaches the model whole.

    Args:
        value: anything; also a tensor that happens to have as many rows as the batch.
    """
    return Shared(value)


def part_of(cond: dict[str, Any], part: slice | Tensor, batch: int) -> dict[str, Any]:
    """The conditions of the rows `part` of a batch of `batch` samples, with their marks.

    Args:
        cond: conditions by name; a tensor without a mark follows the samples if its first axis
            is the batch, see `settled` for those that may be read in two ways.
        part: a slice, or [n] integers or a mask.
        batch: samples of the whole batch.

    Raises:
        ShapeError: a tensor marked per sample has another number of rows.
    """
    if not cond:
        return cond

    def rows(value: Any) -> Any:
        return value[part] if _follows(value, batch) else value

    def marked_rows(value: Any) -> Any:
        if isinstance(value, Tensor) and not _follows(value, batch):
            raise ShapeError(
                f"a condition marked per sample has shape {tuple(value.shape)} for {batch} "
                "samples: give it one row per sample, or mark it shared"
            )
        return rows(value)

    def of(value: Any) -> Any:
        if isinstance(value, PerSample):
            return PerSample(tree_map(marked_rows, value.value))
        return rows(value)

    return {name: tree_map(of, value) for name, value in cond.items()}


def split_cond(cond: dict[str, Any], part: slice | Tensor, batch: int) -> dict[str, Any]:
    """What `part_of` gives, without marks, as the model takes it."""
    return unmarked(part_of(cond, part, batch))


def unmarked(cond: dict[str, Any]) -> dict[str, Any]:
    """The conditions as the model gets them for the whole batch."""

    def of(value: Any) -> Any:
        return value.value if isinstance(value, Shared | PerSample) else value

    return {name: tree_map(of, value) for name, value in cond.items()} if cond else cond


def may_differ(cond: dict[str, Any]) -> bool:
    """Whether some condition may differ from sample to sample.

    Numbers and what is marked as shared do not; a tensor with axes does, whatever its first axis,
    as the batch it will be used on need not be this one.
    """
    return any(
        isinstance(leaf, PerSample) or (isinstance(leaf, Tensor) and leaf.ndim > 0)
        for leaf in tree_leaves(cond)
    )


def settled(
    cond: dict[str, Any], batch: int, answer: Callable[[int, dict[str, Any]], Tensor]
) -> dict[str, Any]:
    """The conditions with a mark on every tensor, so that parts of parts are read alike.

    Args:
        cond: conditions by name.
        batch: samples of the whole batch.
        answer: from the number of a sample and conditions for it the model's answer for it alone,
            [1, *event]; it raises where the model cannot take them or answers in another shape.
            It is asked for the first, the middle and the last sample, as a table whose row 0 is
            read by sample 0 looks like a row per sample to that one.

    Returns:
        Conditions for `split_cond`. Where the model takes no reading at all they follow their
        samples, so that its own complaint is heard when it is called.

    Raises:
        ArgumentError: the model takes several readings and they differ.
    """
    pairs, spec = tree_flatten_with_path(cond)
    leaves = [
        Shared(leaf) if isinstance(leaf, Tensor) and not _follows(leaf, batch) else leaf
        for _, leaf in pairs
    ]
    doubtful = [i for i, leaf in enumerate(leaves) if _follows(leaf, batch)]
    if 2 ** len(doubtful) > _MOST_READINGS:
        raise _ambiguous([_keystr(pairs[i][0]) for i in doubtful], batch)
    asked = sorted({0, batch // 2, batch - 1})
    taken: list[tuple[tuple[type, ...], Tensor]] = []
    readings = itertools.product((PerSample, Shared), repeat=len(doubtful))
    for marks in readings if batch > 1 and doubtful else ():
        marked = _marked(leaves, doubtful, marks)
        tree = tree_unflatten(marked, spec)
        try:
            answers = [answer(i, split_cond(tree, slice(i, i + 1), batch)) for i in asked]
            taken.append((marks, torch.cat(answers)))
        except Exception:  # whatever a network raises for arguments that do not fit
            continue
    chosen, first = taken[0] if taken else ((PerSample,) * len(doubtful), None)
    differ = {
        i
        for other, m in taken[1:]
        if first is not None and not _agree(m, first)
        for i, mine, its in zip(doubtful, chosen, other, strict=True)
        if mine is not its
    }
    if differ:
        raise _ambiguous([_keystr(pairs[i][0]) for i in sorted(differ)], batch)
    result: dict[str, Any] = tree_unflatten(_marked(leaves, doubtful, chosen), spec)
    return result


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two answers differ by rounding alone, each row measured by its largest number."""
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (m.nan_to_num().reshape(len(m), -1) for m in (a, b))
    room = _AGREE * torch.finfo(a.dtype).eps * b.abs().amax(1)
    return bool(((a - b).abs().amax(1) <= room).all())


def _follows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def _marked(leaves: list[Any], places: list[int], marks: tuple[type, ...]) -> list[Any]:
    marked = list(leaves)
    for i, mark in zip(places, marks, strict=True):
        marked[i] = mark(leaves[i])
    return marked


def _ambiguous(names: list[str], batch: int) -> ArgumentError:
    return ArgumentError(
        f"the conditions {', '.join(names)} have {batch} rows for {batch} samples, and the batch "
        "has to be split: say ss.per_sample(...) if each sample has its row, or ss.shared(...) if "
        "all samples share the whole"
    )
