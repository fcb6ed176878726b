r"""One pass along the nodes: the path, the trace at every node, and what tells their errors.

The slopes dy/du at past nodes predict the next state (Adams-Bashforth); the call made there
corrects it (Adams-Moulton) and gives the trace. Two groups of Rademacher probes, z_g with
g = 1, 2, turned for every product by another row of a Walsh matrix, give

    v_g = sum over nodes and probes of w z (J^T z),   int tr J dlog k = sum_i (v_1 + v_2)_i/2.

The means of v_1 and v_2 agree element by element, the diagonal of one matrix, and their noise is
independent: |v_1 - v_2|^2 / 2 is an unbiased estimate of the variance. Its noise is a sum over
pairs of elements; where these are few, the path is cut into blocks with signs of their own.

Beyond the last node both go on as data with a mean and a variance would let them. A network's error
in x0 grows with k, so where the last node lies closer to no data than to the one before it, that
one is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.conditions import split_cond
from scoresolve.divergence import (
    Differentiator,
    exact_divergence,
    hutchinson,
    walsh_signs,
    watched,
)
from scoresolve.errors import check_output
from scoresolve.likelihood.nodes import ORDER, Nodes
from scoresolve.models import Model, conversion
from scoresolve.sde import GaussianSDE, as_time

__all__ = ["Field", "Walk", "block_count", "walk"]

_END = math.sqrt(math.pi / 2)
_SIGNS: Final = 64  # products z_i z_j of independent signs that the standard error rests on
_MOST_LEFT: Final = 0.9  # of the variance at a last node, that of the data
Observer = Callable[[int, Tensor], None]


class Field:
    """dy/dlog k of a model and the terms of its divergence, for rows of a batch.

    Args:
        model: a model of `sde`.
        sde: the process.
        cond: conditions; tensors whose first axis is `batch` follow their rows.
        batch: B, the size of the whole batch.
        differentiator: takes the products.

    Attributes:
        calls: network calls so far.
        forwards, products: of each row so far, [B] int64.
    """

    def __init__(
        self,
        model: Model,
        sde: GaussianSDE,
        cond: dict[str, Any],
        batch: int,
        differentiator: Differentiator,
        device: torch.device,
    ) -> None:
        self.prediction, self.network = watched(model, differentiator).bind("x0")
        self.sde, self.cond, self.batch, self.differentiator = sde, cond, batch, differentiator
        self.calls = 0
        self.forwards = torch.zeros(batch, dtype=torch.int64, device=device)
        self.products = torch.zeros_like(self.forwards)

    def at(
        self,
        nodes: Nodes,
        n: int,
        y: Tensor,
        rows: Tensor,
        probes: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """The slope dy/dlog k and terms of minus its divergence.

        Args:
            nodes, n: where on the path.
            y: the state, [b, *event].
            rows: places in the batch, [b].
            probes: [K, b, *event] for terms [K, b, D]; None for the exact sum, [1, b, 1].
            dtype: of the network's input; its time has that of `y`.
        """
        radius, alpha = float(nodes.radius[n]), float(nodes.alpha[n])
        x = (radius * y).to(dtype)
        t = torch.full((len(x),), float(nodes.times[n]), dtype=y.dtype, device=x.device)
        held = split_cond(self.cond, rows, self.batch)
        u, w = conversion(self.prediction, "x0", self.sde.point(as_time(float(nodes.times[n]))))
        shift = alpha * float(u) - (nodes.c * alpha / radius) ** 2
        scale = alpha * float(w)

        def network(state: Tensor) -> Tensor:
            m = self.network(state, t, **held)
            check_output(m, state)
            return m

        self.calls += 1
        self.forwards[rows] += 1
        size = math.prod(x.shape[1:])
        if probes is None:
            self.products[rows] += size
            m, divergence = exact_divergence(network, x, self.differentiator)
            terms = (shift * size + scale * divergence.to(y.dtype))[None, :, None]
        else:
            self.products[rows] += len(probes)
            m, found = hutchinson(network, x, probes, self.differentiator)
            terms = shift + scale * found.to(y.dtype)
        return -(shift * y + scale / radius * m.to(y.dtype)), terms


@dataclass
class Walk:
    """What a pass found for the rows that it finished.

    Attributes:
        rows: their places in the batch, [b].
        end: y at infinity for a pass to noise, x at 0 for one to data, [b, *event].
        last: y at the last time of the process, [b, *event].
        integral: of the trace over log k, [b].
        beyond: its part beyond the last time of the process, [b].
        error: its standard error, [b].
        coarse: the same integral by every second node, [b].
        path: estimated error of the path in nats, [b].
        worst: the largest move of a corrector, in units of the noise there, [b].
        data_end, noise_end: size in nats of what is made of the noise below the first node, and
            of the data left in the last one, [b].
        dropped: places of the rows that the nodes are too few for.
    """

    rows: Tensor
    end: Tensor
    last: Tensor
    integral: Tensor
    beyond: Tensor
    error: Tensor
    coarse: Tensor
    path: Tensor
    worst: Tensor
    data_end: Tensor
    noise_end: Tensor
    dropped: Tensor


def walk(
    field: Field,
    nodes: Nodes,
    start: Tensor,
    rows: Tensor,
    signs: Tensor | None,
    counts: Sequence[int],
    *,
    to_noise: bool = True,
    tolerance: float = math.inf,
    observe: Observer | None = None,
) -> Walk:
    """Follow the flow along the nodes.

    Args:
        field: the slopes.
        nodes: the nodes.
        start: data x [b, *event], or for a pass to data the state y at infinity.
        rows: places of `start` in the batch, [b].
        signs: z_1, z_2 of each block, [blocks, 2, b, *event]; None for the exact trace.
        counts: pairs of probes at each node.
        to_noise: the direction.
        tolerance: a row leaves when its corrector moves x' by more than that times k.
        observe: called at every node with its number and the terms.
    """
    dtype, size = start.dtype, math.prod(start.shape[1:])
    work = torch.promote_types(dtype, torch.float32)
    y = start.to(work)
    blocks, groups, terms_each = (1, 1, 1) if signs is None else (*signs.shape[:2], size)
    length = _block_length(size, sum(counts), blocks)
    state = {
        "rows": rows,
        "place": torch.arange(len(y), device=y.device),
        "sums": y.new_zeros(len(y), blocks, groups, terms_each),
        "coarse": y.new_zeros(len(y)),
        "last": y.clone(),
        "bend": torch.zeros_like(y),
        "path": y.new_zeros(len(y)),
        "worst": y.new_zeros(len(y)),
        "first": y.new_zeros(len(y)),
        "final": y.new_zeros(len(y)),
    }
    if signs is not None:
        state["signs"] = signs.movedim(2, 0)
    past: list[int] = []
    slopes: list[Tensor] = []
    dropped: list[Tensor] = []
    turned = 0
    told = len(nodes) - 1 - nodes.distrusted

    def ahead(to: float, most: int = ORDER) -> Tensor:
        used = past[-most:]
        weights = nodes.weights_between(used, at, to)
        return sum(
            (float(a) * f for a, f in zip(weights, slopes[-len(used) :], strict=True)), 0 * y
        )

    def extended(to: float, most: int = 2) -> Tensor:
        """The integral of the slopes from the last node on, as those up to `told` continue."""
        first = len(past) - (len(nodes) - 1 - told)
        weights = nodes.weights_between(past[first - most : first], at, to)
        used = slopes[first - most : first]
        return sum((float(a) * f for a, f in zip(weights, used, strict=True)), 0 * y)

    order = range(len(nodes)) if to_noise else range(len(nodes) - 1, -1, -1)
    at = 0.0 if to_noise else _END
    for n in order:
        k, radius, here = float(nodes.k[n]), float(nodes.radius[n]), float(nodes.clock[n])
        size_y = radius / float(nodes.alpha[n])  # x'/y
        begin = not past
        first_guess = y / size_y if to_noise else y
        predicted = first_guess if begin else y + ahead(here)
        probes, block = None, torch.zeros(1, dtype=torch.int64, device=y.device)
        if signs is not None:
            block = torch.arange(turned, turned + counts[n], device=y.device) // length
            probes = _turned(state["signs"][:, block], turned)
            turned += counts[n]
        slope, terms = field.at(nodes, n, predicted, state["rows"], probes, dtype)
        past = [*past[-ORDER + 1 :], n]
        slopes = [*slopes[-ORDER + 1 :], float(nodes.rate[n]) * slope]
        pull = slope + (k / size_y) ** 2 * predicted  # -(x0 - x')/size_y
        move: Tensor | None = None
        if begin and to_noise:
            y = predicted + pull / 2
        elif begin:
            beyond = (_END - here) * slopes[-1]
            y = predicted - beyond
            state["last"] = y + (nodes.last - here) * slopes[-1]
            state["bend"] = beyond
        else:
            y = y + ahead(here)
            change = y - predicted
            move = _flat(change).norm(dim=1) * (size_y / k)
            state["worst"] = torch.maximum(state["worst"], move)
            state["path"] = state["path"] + (_flat(pull * change).sum(1).abs() * (size_y / k) ** 2)
        at = here
        if observe is not None:
            observe(n, terms)
        trace = terms.sum(2).mean(0)
        shares = terms.reshape(groups, len(block), *terms.shape[1:]).permute(2, 1, 0, 3)
        state["sums"].index_add_(1, block, shares, alpha=float(nodes.weights[n]) / len(block))
        state["coarse"] = state["coarse"] + float(nodes.coarse[n]) * trace
        if n == 0:
            state["first"] = trace
        if n == told:
            state["final"] = trace
        if move is not None and bool((bad := move > tolerance).any()):
            dropped.append(state["rows"][bad])
            state = {name: value[~bad] for name, value in state.items()}
            y, pull, slopes = y[~bad], pull[~bad], [f[~bad] for f in slopes]
            if not len(y):
                break
    if to_noise:
        beyond = extended(_END)
        end, last, bend = y + beyond, y + extended(nodes.last), beyond - extended(_END, 1)
        at_noise = end
    else:
        end, last, bend = (y - pull / 2) * size_y, state["last"], state["bend"]
        at_noise = start[state["place"]].to(work)
    sums = state["sums"]
    tail = _tail(state["final"], size, nodes, told)
    # What is left of the data turns y by `bend`, to first order; with |bend|^2 the next one is in.
    turned_by = _flat(bend).norm(dim=1)
    noise_end = tail.abs() + (_flat(bend * at_noise).sum(1)).abs() + turned_by * (2 + turned_by)
    below = (float(nodes.k[0]) / nodes.c) ** 2
    return Walk(
        rows=state["rows"],
        end=end,
        last=last,
        integral=sums.sum((1, 3)).mean(1) + tail,
        beyond=tail * (float(nodes.k[-1]) / (nodes.c * math.tan(nodes.last**2))) ** 2,
        error=_standard_error(sums[:, :, 0] - sums[:, :, -1]),
        coarse=state["coarse"] + tail,
        path=state["path"],
        worst=state["worst"],
        data_end=state["first"].abs() / 2 + size * below**2,
        noise_end=noise_end,
        dropped=torch.cat(dropped) if dropped else rows[:0],
    )


def block_count(size: int, rows: int) -> int:
    """Blocks of a path with `rows` products in each group, one where D elements have many pairs."""
    pairs = size * (size - 1) // 2
    return max(1, min(rows, math.ceil(_SIGNS / max(1, pairs))))


def _block_length(size: int, rows: int, blocks: int) -> int:
    """Walsh rows of a block.

    Whole periods, over which pairs cancel, from five elements on. Below, nearly all would cancel
    at the nodes and a block or two decide the error, on too few signs: no period is whole.
    """
    length = -(-rows // blocks)
    period = _period(size)
    return -(-length // period) * period if size > 4 else length | 1


def _period(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _standard_error(difference: Tensor) -> Tensor:
    """Standard error [b] of the mean of both groups, whose terms differ by [b, blocks, D].

    Few terms may make up most of sum d^2/2. With n = (sum d^2)^2 / sum d^4 degrees of freedom,
    two thirds of Student's t lie within about 1 + 1/(2n).

    Source:
        Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    squares = difference.square().flatten(1)
    total = squares.sum(1)
    tiny = torch.finfo(total.dtype).tiny
    inverse = (squares / total.clamp(min=tiny)[:, None]).square().sum(1)
    return (total / 2).sqrt() * (1 + inverse / 2)


def _turned(signs: Tensor, row: int) -> Tensor:
    """Probes [2 count, b, *event] from z_1, z_2 [b, count, 2, *event], group after group.

    They take the Walsh rows from `row` on, the second group half a period apart.
    """
    count, event = signs.shape[1], signs.shape[3:]
    size = math.prod(event)
    half = _period(size) // 2
    rows = [row + group * half + q for group in (0, 1) for q in range(count)]
    turns = torch.stack([walsh_signs(row, size, signs) for row in rows])
    return signs.movedim(0, 2).transpose(0, 1).flatten(0, 1) * turns.reshape(-1, 1, *event)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _tail(trace: Tensor, size: int, nodes: Nodes, told: int) -> Tensor:
    """The integral of the trace beyond the last node k, [b].

    Of Gaussian data, whose tr dx0/dx' = D v/(v + k^2) there, it is

        D int_k^inf (v/(v + k^2) - c^2/(c^2 + k^2)) dlog k = D/2 log((1 + v/k^2)/(1 + c^2/k^2)).

    Args:
        trace: at the node that tells v, D (v/(v + k^2) - c^2/(c^2 + k^2)), [b].
        size: D.
        nodes, told: the nodes, and which one that is.
    """
    before, last = (float((nodes.c / nodes.k[n]) ** 2) for n in (told, -1))
    share = (trace / size + before / (1 + before)).clamp(0, _MOST_LEFT)
    variance = share / (1 - share) * (last / before)  # in units of the last k^2
    tail: Tensor = size / 2 * (torch.log1p(variance) - math.log1p(last))
    return tail
