"""A budget spread over nodes and probes, and the engine that spends it on a batch.

A pilot follows a few states of the prior to data and tells the standard deviation of one probe's
trace at each node. Probes then go to the nodes in proportion to weight times standard deviation,
which for that many products has the least variance. Rows whose corrector says that the nodes are
too few for them are taken up again on twice as many. All this looks at one row alone, or at none
of the batch: a sample never depends on its neighbours.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoresolve.conditions import may_differ
from scoresolve.divergence import Differentiator
from scoresolve.driving import Engine, Part
from scoresolve.errors import ModelWarning, Status, row_status
from scoresolve.likelihood.nodes import Nodes, allocate, place_nodes
from scoresolve.likelihood.path import Field, Walk, block_count, walk
from scoresolve.models import Model, scale_of_data
from scoresolve.noise import NoiseSource, Philox, Purpose
from scoresolve.precision import host
from scoresolve.sde import GaussianSDE
from scoresolve.tuning import measured_or_none

__all__ = ["COLUMNS", "Budget", "PathEngine", "Pilot", "data_std", "fly_pilot", "scale_hidden"]

COLUMNS: Final = ("log_prob", "log_det", "probes", "path", "quadrature", "data_end", "prior")

UNKNOWN_STD: Final = 0.5  # per coordinate, of data whose scale nobody knows
PILOT_ROWS: Final = 8
PILOT_NODES: Final = 20

MOVE: Final = 0.3
"""By how much of the noise a corrector may move a state before the nodes are too few for it.

Where probes blur the result anyway it may be 250/cost, but at most 1.
"""

LEVELS: Final = 5  # of twice as many nodes, the first included
_LOST: Final = 1.0  # nats that the path of a row may be off which the most nodes are too few for
LEAST_NODES: Final = 16
_FIRST_PASS: Final = 0.94  # of the cost; the rest is for rows that are taken up again


@dataclass(frozen=True)
class Budget:
    """What one sample may cost.

    Attributes:
        nodes: network evaluations along the path; if None, nodes and products follow from `cost`.
        products: products with the Jacobian over the whole path; None for the exact trace.
        cost: evaluations and products in all.
    """

    nodes: int | None
    products: int | None
    cost: int


@dataclass(frozen=True)
class Pilot:
    """What the pilot saw.

    Attributes:
        clock: u of its nodes, increasing.
        deviation: standard deviation of one probe's trace there.
        spent: evaluations and products that it cost.
        calls: network calls among them.
    """

    clock: np.ndarray
    deviation: np.ndarray
    spent: int
    calls: int


def data_std(
    model: Model, sde: GaussianSDE, like: Tensor, cond: dict[str, Any]
) -> tuple[float, int]:
    """About the standard deviation of the data per coordinate, and the evaluations it cost.

    From the model's own `data_scale`, or else measured; 0.5, with a warning, if conditions differ
    among samples, as what one row's condition says must not reach the others.
    """
    size = math.prod(like.shape[1:])
    scale, spent = model.data_scale, 0
    if scale is None and not may_differ(cond):
        pairs = max(4, min(64, 96 // size))
        scale, _ = measured_or_none(model, sde, like, cond, pairs=pairs, stacklevel=7) or (None, 0)
        spent = 6 * pairs
    if scale_hidden(model, cond):
        warnings.warn(
            f"conditions differ from sample to sample and the model has no data_scale, so data of "
            f"standard deviation {UNKNOWN_STD:g} are assumed, and nodes may lie badly: set "
            "data_scale, as measure_scale gives it for one condition, or mark what all samples "
            "share with ss.shared(...)",
            ModelWarning,
            stacklevel=5,
        )
    return (UNKNOWN_STD if scale is None else scale / scale_of_data(1.0, size)), spent


def fly_pilot(
    model: Model,
    sde: GaussianSDE,
    c: float,
    ends: tuple[float, float],
    like: Tensor,
    cond: dict[str, Any],
    differentiator: Differentiator,
) -> Pilot | None:
    """Follow a few states of the prior to data; None where conditions differ among samples.

    Args:
        model: a model of `sde`.
        sde: the process.
        c: scale of the data per coordinate.
        ends: times of data and noise.
        like: gives event shape, dtype and device.
        cond: conditions.
        differentiator: takes the products.
    """
    if may_differ(cond):
        return None
    nodes = place_nodes(sde, c, PILOT_NODES, *ends, single=like.dtype != torch.float64)
    z = Philox(0).normal(like.new_empty(PILOT_ROWS, *like.shape[1:]), 0, Purpose.START)
    signs = torch.stack([Philox(0).signs(z, draw, Purpose.PROBE) for draw in (0, 1)])[None]
    rows = torch.arange(PILOT_ROWS, device=like.device)
    field = Field(model, sde, cond, PILOT_ROWS, differentiator, like.device)
    variances = np.zeros(len(nodes))

    def observe(n: int, terms: Tensor) -> None:
        spread = host((terms[0] - terms[1]).square().sum(1))
        good = spread[spread.isfinite()]
        variances[n] = float(good.mean()) if len(good) else 0.0

    walk(field, nodes, z, rows, signs, [1] * len(nodes), to_noise=False, observe=observe)
    spent = int((field.forwards + field.products).sum())
    return Pilot(nodes.clock, np.sqrt(variances), spent, field.calls)


class PathEngine(Engine):
    """Solves chunks along common nodes; the result holds latents, then `COLUMNS`; on the
    way to data it holds the data first.

    Args:
        field: the slopes, for the whole batch.
        c: scale of the data per coordinate.
        ends: times of data and noise.
        budget: what a sample may cost.
        pilot: what the pilot saw, if there was one.
        to_noise: the direction.
    """

    def __init__(
        self,
        field: Field,
        c: float,
        ends: tuple[float, float],
        budget: Budget,
        pilot: Pilot | None,
        single: bool,
        to_noise: bool,
    ) -> None:
        self.field, self.sde, self.c, self.ends, self.single = field, field.sde, c, ends, single
        self.budget, self.pilot, self.to_noise = budget, pilot, to_noise
        count = budget.nodes or max(LEAST_NODES, round(0.4 * budget.cost**0.8))
        self.products = budget.products
        if budget.products is not None and budget.nodes is None:
            self.products = max(2 * count, round(_FIRST_PASS * budget.cost) - count)
        self.levels = {0: self._level(count)}
        self.move = MOVE
        if self.products is not None:
            self.move = max(MOVE, min(1.0, 250 / (count + self.products)))
        self.steps, self.times = 1, tuple(self.levels[0][0].times.tolist())
        if not to_noise:
            self.times = self.times[::-1]

    def _level(self, count: int) -> tuple[Nodes, list[int]]:
        nodes = place_nodes(self.sde, self.c, count, *self.ends, single=self.single)
        density = np.ones(count)
        if self.pilot is not None:
            seen = np.interp(nodes.clock, self.pilot.clock, self.pilot.deviation)
            density = np.abs(nodes.weights) * seen
        return nodes, allocate(density, (self.products or 0) // 2).tolist()

    def solve(
        self,
        model: Model,
        x: Tensor,
        source: NoiseSource,
        bar: tqdm[object],
        cond: dict[str, Any],
    ) -> Part:
        field, rows = self.field, cond["rows"]
        first, calls, before = int(rows[0]), field.calls, field.forwards[rows]
        signs, size = None, math.prod(x.shape[1:])
        if self.products is not None:
            blocks = block_count(size, self.products // 2)
            draws = [source.signs(x, draw, Purpose.PROBE) for draw in range(2 * blocks)]
            signs = torch.stack(draws).reshape(blocks, 2, *x.shape)
        work = torch.promote_types(x.dtype, torch.float32)
        states = size if self.to_noise else 2 * size
        result = x.new_zeros(len(x), states + len(COLUMNS), dtype=work)
        todo, lost = rows, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for level in range(LEVELS):
            if level not in self.levels:
                self.levels[level] = self._level(len(self.times) << level)
            nodes, counts = self.levels[level]
            final = level == LEVELS - 1
            here = todo - first
            found = walk(
                field,
                nodes,
                x[here],
                todo,
                None if signs is None else signs[:, :, here],
                counts,
                to_noise=self.to_noise,
                tolerance=math.inf if final else self.move,
            )
            self._write(result, found, x, nodes, size, first)
            lost[found.rows - first] = (found.worst > self.move) & (found.path > _LOST)
            todo = found.dropped.sort().values
            if not len(todo):
                break
        bar.update()
        evaluations = field.forwards[rows] - before
        status = row_status(result)
        status[lost & (status == int(Status.OK))] = int(Status.STEP_LIMIT)
        return Part(result, status, field.calls - calls, evaluations)

    def _write(
        self, result: Tensor, found: Walk, x: Tensor, nodes: Nodes, size: int, first: int
    ) -> None:
        here = found.rows - first
        end = found.end if self.to_noise else x[here].to(found.end)
        log_prob = (
            -0.5 * end.square().reshape(len(end), size).sum(1)
            - size * (math.log(2 * math.pi) / 2 + math.log(self.c))
            - found.integral
        )
        alpha, sigma = (float(f(self.ends[1])) for f in (self.sde.alpha, self.sde.sigma))
        radius = math.hypot(sigma, self.c * alpha)
        latent = radius * found.last
        columns = [
            log_prob,
            size * math.log(radius / self.c) - (found.integral - found.beyond),
            found.error,
            found.path,
            (found.integral - found.coarse).abs(),
            found.data_end,
            found.noise_end,
        ]
        parts = [latent, torch.stack(columns, 1)]
        parts = parts if self.to_noise else [found.end, *parts]
        result[here] = torch.cat(
            [part.reshape(len(here), math.prod(part.shape[1:])) for part in parts], 1
        )


def scale_hidden(model: Model, cond: dict[str, Any]) -> bool:
    """Whether conditions that differ among samples hide the scale of the data."""
    return model.data_scale is None and may_differ(cond)
