"""Conditions that follow their samples, that all samples share, and that may be read either way."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from strategies import generator, normal
from torch import Tensor

import scoresolve as ss
from scoresolve.conditions import may_differ, settled, split_cond, unmarked
from scoresolve.errors import ArgumentError, ShapeError

B = 12
SDE = ss.VP()
RING = ss.targets.ring()
SCORE = RING.score_model(SDE)
SHIFT = torch.linspace(-1, 1, B).double()
NESTS: dict[str, tuple[Any, Any]] = {
    "tensor": (SHIFT, lambda c: c),
    "dict": ({"a": {"shift": SHIFT}, "name": "x"}, lambda c: c["a"]["shift"]),
    "list": ([None, SHIFT], lambda c: c[1]),
    "tuple": ((SHIFT, 3), lambda c: c[0]),
    "ordered": (OrderedDict(shift=SHIFT), lambda c: c["shift"]),
    "marked": ({"shift": ss.per_sample(SHIFT)}, lambda c: c["shift"]),
    "marked nest": (ss.per_sample({"shift": SHIFT}), lambda c: c["shift"]),
}


def moved(get: Any) -> Any:
    """The score of the ring, moved by a number of each sample."""

    def net(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return SCORE(x - SDE.alpha(t)[:, None] * get(c)[:, None], t)

    return net


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("how", [{"nfe": 8}, {"nfe": 8, "chunk": 5}, {"solver": "adams"}], ids=str)
def test_a_sample_keeps_its_own_condition(nest: str, how: dict[str, Any]) -> None:
    given, get = NESTS[nest]
    x = normal(generator(0), B, 2)
    found = ss.sample(moved(get), SDE, x=x, c=given, **how).x
    for i in (0, 4, 11):
        one = split_cond({"c": given}, slice(i, i + 1), B)
        alone = ss.sample(moved(get), SDE, x=x[i : i + 1], **how, **one).x
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nest", ["dict", "marked nest"])
def test_densities_and_encodings_follow_nested_conditions(nest: str) -> None:
    given, get = NESTS[nest]
    x = RING.sample(B) + SHIFT[:, None]
    found = ss.log_likelihood(moved(get), SDE, x, chunk=5, c=given)
    # probes are exact in two dimensions; nodes leave some 1e-3 nats, as without conditions
    torch.testing.assert_close(found.log_prob, RING.log_prob(x - SHIFT[:, None]), rtol=0, atol=0.02)
    whole = ss.encode(moved(get), SDE, x, c=given).x
    parts = ss.encode(moved(get), SDE, x, chunk=5, c=given).x
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", [{"nfe": 6, "chunk": 5}, {"solver": "dopri5"}], ids=str)
def test_a_tensor_that_could_be_read_either_way_is_not_guessed(how: dict[str, Any]) -> None:
    def mean(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return -x + table.mean()

    table, x = normal(generator(1), B, 3), normal(generator(0), B, 2)
    with pytest.raises(
        ArgumentError, match=r"\['table'\] have 12 rows.*ss\.per_sample.*ss\.shared"
    ):
        ss.sample(mean, SDE, x=x, table=table, **how)
    with pytest.raises(ArgumentError, match=r"ss\.shared"):
        ss.log_likelihood(mean, SDE, x, table=table)
    marked = ss.sample(mean, SDE, x=x, table=ss.shared(table), **how).x
    by_hand = ss.sample(lambda x, t: mean(x, t, table), SDE, x=x, **how).x
    torch.testing.assert_close(marked, by_hand, rtol=0, atol=1e-9)


def test_a_whole_batch_needs_no_mark() -> None:
    seen = []

    def net(x: Tensor, t: Tensor, table: Any) -> Tensor:
        seen.append(len(x))
        return -x + table["t"].mean()

    x = normal(generator(0), B, 2)
    for table in ({"t": normal(generator(1), B, 3)}, ss.shared({"t": torch.ones(B)})):
        ss.sample(net, SDE, x=x, solver="ddim", nfe=4, table=table)
    assert seen == [B] * 8


def test_a_reading_that_the_model_cannot_take_is_none() -> None:
    """Labels: with those of all samples, one row has an answer of the wrong shape."""
    calls = []

    def answer(i: int, one: dict[str, Any]) -> Tensor:
        calls.append(one["y"].shape)
        m = torch.zeros(1, 2) + one["y"][:, None]
        if m.shape != (1, 2):
            raise ShapeError("broadcast")
        return m

    marked = settled({"y": torch.arange(B)}, B, answer)
    assert calls == [(1,), (1,), (1,), (B,)]
    assert split_cond(marked, torch.tensor([3, 5]), B)["y"].tolist() == [3, 5]


@pytest.mark.parametrize("rows", [5, 3])
def test_a_shared_tensor_is_not_split_in_a_chunk_that_has_as_many_rows(rows: int) -> None:
    """A chunk of 5 rows under a solver that takes rows of its own: parts of parts."""

    def mean(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return -x + table.mean() + 0.3 * table[-1].sum()

    table, x = normal(generator(1), rows, 3), normal(generator(0), B, 2)
    runs: list[dict[str, Any]] = [
        {"solver": "dopri5"},
        {"solver": "dopri5", "chunk": 5},
        {"solver": "ddim", "chunk": 5},
    ]
    for how in runs:
        found = ss.sample(mean, SDE, x=x, table=table, **how).x
        by_hand = ss.sample(lambda x, t: mean(x, t, table), SDE, x=x, **how).x
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3]], ids=str
)
def test_a_table_with_a_row_for_every_sample_is_not_taken_for_rows(labels: list[int]) -> None:
    """To sample 0 of label 0 the table and a row per sample are the same."""

    def net(x: Tensor, t: Tensor, label: Tensor, bank: Tensor) -> Tensor:
        return bank[label] - x

    bank, label = 10 * normal(generator(2), 4, 2), torch.tensor(labels)
    options: dict[str, Any] = {"solver": "ddim", "nfe": 4, "label": label}
    x = normal(generator(0), 4, 2)
    whole = ss.sample(net, SDE, x=x, bank=bank, **options).x
    try:
        found = ss.sample(net, SDE, x=x, chunk=2, bank=bank, **options).x
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
    except ArgumentError as error:
        assert "ss.shared" in str(error)
    told = ss.sample(net, SDE, x=x, chunk=2, bank=ss.shared(bank), **options).x
    torch.testing.assert_close(told, whole, rtol=0, atol=1e-9)


def test_rows_that_were_marked_must_be_there() -> None:
    with pytest.raises(ShapeError, match=r"per sample has shape \(3,\) for 12 samples"):
        split_cond({"y": ss.per_sample(torch.ones(3))}, slice(0, 2), B)


def test_marks_are_gone_before_the_model_and_tell_what_may_differ() -> None:
    one = torch.ones(1, 5)
    assert unmarked({"a": [ss.shared(one)], "b": 2})["a"][0] is one
    assert may_differ({"a": {"b": one}}) and may_differ({"a": ss.per_sample([1])})
    assert not may_differ({"a": [ss.shared(one)], "b": 2.0, "c": torch.tensor(1.0)})
