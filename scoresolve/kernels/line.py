"""The change of log pi between two points where only the score is known.

    log pi(y) - log pi(x) = int_0^1 f(u) du,    f(u) = <score(x + u d), d>,    d = y - x,

by the Gauss-Legendre rule of n nodes, exact for a polynomial of degree 2n - 1 in u. The scores at
both ends are at hand, so a rule on the ends and the inner nodes estimates its error for nothing.

Between two components of a mixture f is nearly a step, which no fixed rule resolves. So where the
error could turn a decision, the interval is halved there, for those chains alone, until it cannot.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresolve.kernels.target import Point, Target, column, inner

__all__ = ["Decided", "decided_integral", "line_integral", "line_rules"]

_Weights = tuple[float, ...]
_ROUGHNESS = 3.0  # times the departure from a parabola that an integral is taken to be off by
_TOLERANCE = 1e-3  # of log pi: below it an acceptance probability is off by less than that
_HALVINGS = 20  # a step of f by 1000 is then placed to within the tolerance
_INTERVALS = 32  # of a line; each more takes six evaluations


@lru_cache
def line_rules(nodes: int) -> tuple[_Weights, _Weights, _Weights]:
    """Nodes on (0, 1), their Gauss weights, and the weights of the embedded rule.

    The embedded rule stands on 0, the nodes but the first and the last, and 1, in this order.
    """
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    places = np.array([-1.0, *roots[1:-1], 1.0])
    moments = np.zeros(len(places))
    moments[0] = 2.0
    embedded = np.linalg.solve(np.polynomial.legendre.legvander(places, len(places) - 1).T, moments)
    return (
        tuple(((roots + 1) / 2).tolist()),
        tuple((weights / 2).tolist()),
        tuple((embedded / 2).tolist()),
    )


@lru_cache
def _roughness(nodes: int) -> Tensor:
    """From f at 0, the nodes and 1 to what the nearest parabola leaves of it, a square matrix."""
    places = np.array([0.0, *line_rules(nodes)[0], 1.0])
    basis = np.linalg.qr(np.vander(places, min(3, len(places))))[0]
    return torch.from_numpy(np.eye(len(places)) - basis @ basis.T)


def line_integral(target: Target, old: Point, new: Point) -> tuple[Tensor, Tensor]:
    """log pi(y) - log pi(x) [B] and an estimate of its error, [B].

    The estimate is the distance to a rule of lower degree and so errs on the safe side. It does
    not see that a score which is no gradient has integrals that depend on the path.

    Args:
        target: pi; its `nodes` are evaluated.
        old, new: x and y with their scores.
    """
    step, ends = _ends(old, new)
    return _gauss(_slopes(target, old, step), ends)


class Decided(NamedTuple):
    """An integral that is as good as a decision asks for.

    Attributes:
        change: log pi(y) - log pi(x), [B].
        error: bound of its error where that could still turn the decision, else 0, [B].
        evaluations: of the score of each chain beyond those of all, [B]; None if there are none.
    """

    change: Tensor
    error: Tensor
    evaluations: Tensor | None = None


def decided_integral(target: Target, old: Point, new: Point, threshold: Tensor) -> Decided:
    """`line_integral`, good enough to tell whether it is above a threshold.

    The bound of the error is twice the estimate, which holds for a step of f at any place between
    three nodes, or three times what a parabola leaves of the values, whichever is more: no one rule
    sees every step. Where it reaches the threshold the interval is halved, and its worst parts
    again. It is the same both ways along the line, so that a chain stays reversible. On mixtures
    of ten components in one to three dimensions at most one decision of HMC in a thousand is wrong;
    by a fixed rule of three nodes it is one in twenty to forty.

    Args:
        target: pi; a target that cannot be asked for some chains alone keeps to its `nodes`.
        old, new: x and y with their scores.
        threshold: what the change is compared with, [B].
    """
    step, ends = _ends(old, new)
    slopes = _slopes(target, old, step)
    change, error = _gauss(slopes, ends)
    bound = _bound(slopes, ends, error)
    if target.of_rows is None:
        return Decided(change, bound)
    rows = _doubtful(change, bound, threshold).nonzero().flatten()
    spent = None
    if len(rows):
        line = _Line(target, rows, old.x, step)
        limits = ends[0][rows], ends[1][rows]
        known = None
        if target.nodes == 3:
            known = slopes[1][rows], change[rows], bound[rows]
        found, remains = _refined(line, limits, known, threshold[rows])
        change, bound = change.index_copy(0, rows, found), bound.index_copy(0, rows, remains)
        spent = rows.new_zeros(len(change)).index_copy(0, rows, line.count)
    sure = bound < (change - threshold).abs()
    return Decided(change, bound.masked_fill(sure, 0.0), spent)


def _ends(old: Point, new: Point) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    step = new.x - old.x
    return step, (inner(old.score, step), inner(new.score, step))


def _slopes(target: Target, old: Point, step: Tensor) -> list[Tensor]:
    """f at the nodes."""
    places = line_rules(target.nodes)[0]
    return [inner(target(torch.add(old.x, step, alpha=u)).score, step) for u in places]


def _gauss(slopes: list[Tensor], ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The integral over an interval of length 1 and its estimated error."""
    _, weights, embedded = line_rules(len(slopes))
    gauss = sum((w * g for w, g in zip(weights, slopes, strict=True)), torch.zeros_like(ends[0]))
    other = [ends[0], *slopes[1:-1], ends[1]]
    rough = sum((w * g for w, g in zip(embedded, other, strict=True)), torch.zeros_like(ends[0]))
    return gauss, (gauss - rough).abs()


def _bound(slopes: list[Tensor], ends: tuple[Tensor, Tensor], error: Tensor) -> Tensor:
    """Bound of the error of an integral over an interval of length 1."""
    values = torch.stack([ends[0], *slopes, ends[1]], -1)
    left = (values[..., None, :] * _roughness(len(slopes)).to(values)).sum(-1)
    return torch.maximum(2 * error, _ROUGHNESS * left.abs().amax(-1))


def _doubtful(change: Tensor, bound: Tensor, threshold: Tensor) -> Tensor:
    return bound > (change - threshold).abs().clamp(min=_TOLERANCE)


class _Line:
    """f of some chains, at places of their own.

    Args:
        target: pi.
        rows: their numbers in the batch, [n].
        x, step: where the lines of all chains begin and where they lead, [B, *event].
    """

    def __init__(self, target: Target, rows: Tensor, x: Tensor, step: Tensor) -> None:
        self.target, self.rows, self.x, self.step = target, rows, x, step
        # a score that holds something of every chain must fail on a part of them, not mistake it
        self.most = max(1, len(x) - 1)
        self.count = torch.zeros_like(rows)

    def at(self, which: Tensor, places: Tensor) -> Tensor:
        """f [m] of the lines `which` [m] at `places` [m]."""
        found = []
        rows = self.rows[which]
        step = self.step[rows]
        x = torch.addcmul(self.x[rows], column(places, step), step)
        for begin in range(0, len(rows), self.most):
            part = slice(begin, begin + self.most)
            score = self.target.score_of(rows[part], x[part])
            if score is None:
                return self._whole(rows, x, step)
            found.append(inner(score, step[part]))
        self.count.index_add_(0, which, torch.ones_like(which))
        return torch.cat(found)

    def _whole(self, rows: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """The same by calls with all chains, for a score that has only one size of batch."""
        order = rows.argsort(stable=True)
        begins = torch.searchsorted(rows[order], rows[order])
        turn = torch.empty_like(rows)
        turn[order] = torch.arange(len(rows), device=rows.device) - begins
        f = torch.empty_like(x.flatten(1)[:, 0] if x.ndim > 1 else x)
        for k in range(int(turn.amax()) + 1):
            mine = turn == k
            score = self.target(self.x.index_copy(0, rows[mine], x[mine])).score
            f[mine] = inner(score[rows[mine]], step[mine])
        return f


class _Intervals(NamedTuple):
    """Parts [begin, end] of lines, and what the rule of three nodes says of them; all [p]."""

    line: Tensor
    begin: Tensor
    end: Tensor
    first: Tensor
    middle: Tensor
    last: Tensor
    integral: Tensor
    bound: Tensor

    def some(self, chosen: Tensor) -> _Intervals:
        return _Intervals(*(values[chosen] for values in self))


def _measured(
    line: _Line, which: Tensor, begin: Tensor, end: Tensor, first: Tensor, last: Tensor
) -> _Intervals:
    """The intervals, by three evaluations each; `first` and `last` is f at their ends."""
    places, length = line_rules(3)[0], end - begin
    at = torch.cat([begin + u * length for u in places])
    slopes = list(line.at(which.repeat(3), at).chunk(3))
    ends = first, last
    integral, error = _gauss(slopes, ends)
    bound = _bound(slopes, ends, error)
    return _Intervals(which, begin, end, first, slopes[1], last, length * integral, length * bound)


def _refined(
    line: _Line,
    ends: tuple[Tensor, Tensor],
    known: tuple[Tensor, Tensor, Tensor] | None,
    threshold: Tensor,
) -> tuple[Tensor, Tensor]:
    """The integrals along lines and bounds of their errors, each [n].

    `known` is f in the middle, the integral and its bound, if the rule of three nodes was applied.
    """
    first, last = ends
    every = torch.arange(len(first), device=first.device)
    whole = torch.zeros_like(first), torch.ones_like(first)
    if known is None:
        parts = _measured(line, every, *whole, first, last)
    else:
        middle, integral, bound = known
        parts = _Intervals(every, *whole, first, middle, last, integral, bound)
    for _ in range(_HALVINGS):
        change, bound = _summed(parts, first)
        count = torch.bincount(parts.line, minlength=len(first))
        open_lines = _doubtful(change, bound, threshold) & (count < _INTERVALS)
        worst = torch.zeros_like(first).scatter_reduce(0, parts.line, parts.bound, "amax")
        chosen = open_lines[parts.line] & (parts.bound >= worst[parts.line] / 2)
        if not bool(chosen.any()):
            break
        old, kept = parts.some(chosen), parts.some(~chosen)
        middle = (old.begin + old.end) / 2
        halves = _measured(
            line,
            torch.cat([old.line, old.line]),
            torch.cat([old.begin, middle]),
            torch.cat([middle, old.end]),
            torch.cat([old.first, old.middle]),
            torch.cat([old.middle, old.last]),
        )
        parts = _Intervals(*(torch.cat(pair) for pair in zip(kept, halves, strict=True)))
    return _summed(parts, first)


def _summed(parts: _Intervals, like: Tensor) -> tuple[Tensor, Tensor]:
    """The integral of every line and the bound of its error."""
    zero = torch.zeros_like(like)
    integral = zero.index_add(0, parts.line, parts.integral)
    return integral, zero.index_add(0, parts.line, parts.bound)
