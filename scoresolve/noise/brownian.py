"""Brownian paths from counters: one per sample, independent of the steps that read it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.noise.philox import normals, work_dtype
from scoresolve.noise.sources import NoiseSource, Philox, Purpose, Times, check_like, group_size

__all__ = ["BrownianPath"]


class BrownianPath(NoiseSource):
    """One Brownian path per sample on [t0, t1], the same whatever the steps that read it.

    Levy's sum over halved intervals. On one from a to b with the middle m, W is what the ends say,
    and a hat of height sqrt((m - a) (b - m)/(b - a)) at m, times a normal of its own:

        W(t) = (t - t0)/sqrt(t1 - t0) z_0 + sum_{l < L} hat_l(t) z_{l, i_l}
               + sqrt((t - a_L) (b_L - t)/(b_L - a_L)) z_{L, i_L},

    where i_l is the number of the interval of level l that holds t, and the normal `z_{l, i}` the
    draw `2^l + i` of the sample's Brownian stream. Intervals are halved in t or, if `geometric`, in
    log t. The law of `W` is exact except between two times in one interval of the last level.

    As a `NoiseSource` it answers `normal(..., times=(t, s))` for `Purpose.SOLVER` with
    `(W(s) - W(t)) / sqrt|s - t|`, and hands all else to `noise`.

    Args:
        noise: the source of the node normals.
        t0: start of the interval, where W = 0.
        t1: end of the interval, above t0.
        tolerance: smallest distance of two times that must be resolved, in log t if `geometric`,
            at least a share 2^-31 of the whole; a draw costs about `2 log2(whole / tolerance)`
            normals. Default: a share 2^-24.
        geometric: whether intervals are halved in log t, so that early times are resolved as well
            as late ones; needs t0 > 0.

    Raises:
        ArgumentError: the interval is empty or not finite, or the tolerance out of range.

    Source:
        Levy, "Processus stochastiques et mouvement brownien", 1948; Karatzas, Shreve, "Brownian
        Motion and Stochastic Calculus", section 2.3.
    """

    def __init__(
        self,
        noise: Philox,
        t0: float,
        t1: float,
        tolerance: float | None = None,
        *,
        geometric: bool = False,
    ) -> None:
        self.noise, self.t0, self.t1, self.geometric = noise, float(t0), float(t1), geometric
        if geometric and not 0 < self.t0 < self.t1:
            raise ArgumentError(f"a geometric Brownian path on [{t0}, {t1}]: give 0 < t0 < t1")
        self.length = math.log(self.t1 / self.t0) if geometric else self.t1 - self.t0
        if not 0 < self.length < math.inf:
            raise ArgumentError(
                f"a Brownian path on [{t0}, {t1}] has no length: give finite t0 < t1"
            )
        self.tolerance = self.length * 2.0**-24 if tolerance is None else float(tolerance)
        if not self.length * 2.0**-31 <= self.tolerance < math.inf:
            raise ArgumentError(
                f"tolerance {tolerance} cannot be resolved on [{t0}, {t1}]: "
                f"give at least {self.length * 2.0**-31:.3g}"
            )
        self.levels = max(0, math.ceil(math.log2(self.length / self.tolerance)))

    def increment(self, like: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """`W(s) - W(t)`, normal with variance |s - t|.

        Args:
            like: [B, *event], floating; gives shape, dtype and device.
            t, s: times in [t0, t1], floats or [B].

        Returns:
            [B, *event].

        Raises:
            ArgumentError: a time is outside [t0, t1] or not a number.
            ShapeError: a tensor of times is neither [] nor [B].
        """
        check_like(like)
        nodes_t, weights_t = self._nodes(self._times(t, like))
        nodes_s, weights_s = self._nodes(self._times(s, like))
        shared = nodes_t == nodes_s
        width = (-1, shared.shape[1])
        weights = torch.cat(
            (
                torch.where(shared, weights_s - weights_t, weights_s),
                torch.where(shared, 0.0, -weights_t),
            )
        )
        nodes = torch.cat((nodes_s.expand(width), nodes_t.expand(width)))
        used = weights.ne(0).any(1)
        wide = torch.zeros(like.shape, dtype=work_dtype(like.dtype), device=like.device)
        nodes, weights = nodes[used].to(wide.device), weights[used].to(wide)
        group = max(1, group_size(like))
        for first in range(0, len(nodes), group):
            part = slice(first, first + group)
            z = self.noise.at(wide, nodes[part], Purpose.BROWNIAN, normals)
            for weight, node in zip(weights[part], z, strict=True):
                wide.addcmul_(_lift(weight, like), node)
        return wide.to(like.dtype)

    def __call__(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """`(W(s) - W(t)) / sqrt|s - t|`, standard normal [B, *event]; zero where s = t."""
        gap = (self._times(s, x) - self._times(t, x)).abs().sqrt()
        scale = torch.where(gap > 0, gap, 1.0).to(x.device, work_dtype(x.dtype))
        wide = x.to(work_dtype(x.dtype))
        return self.increment(wide, t, s).div_(_lift(scale, x)).to(x.dtype)

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """The path's unit increment over `times` for the solver, else the numbers of `noise`."""
        if times is None or purpose != Purpose.SOLVER:
            return self.noise.normal(like, draw, purpose)
        return self(like, *times)

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        """The uniform numbers of `noise`."""
        return self.noise.uniform(like, draw, purpose)

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        """The signs of `noise`."""
        return self.noise.signs(like, draw, purpose)

    def rows(self, index: slice | Tensor) -> BrownianPath:
        """The same paths for the samples `index`."""
        noise, ends = self.noise.rows(index), (self.t0, self.t1)
        return BrownianPath(noise, *ends, self.tolerance, geometric=self.geometric)

    def _times(self, t: float | Tensor, like: Tensor) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64).detach()
        if time.shape not in ((), (like.shape[0],)):
            raise ShapeError(
                f"times of shape {tuple(time.shape)} for x of shape {tuple(like.shape)}: "
                "give a float or one time per sample"
            )
        slack = 1e-6 * (self.t1 - self.t0)
        if not bool(((time >= self.t0 - slack) & (time <= self.t1 + slack)).all()):
            raise ArgumentError(
                f"time {t} is outside the path's interval [{self.t0}, {self.t1}]: "
                "build the BrownianPath on the whole range of the solver"
            )
        return time.reshape(-1).clamp(self.t0, self.t1)

    def _nodes(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Draw numbers and weights of the sum above, both [levels + 2, n] for times [n]."""
        share = (time / self.t0).log() if self.geometric else time - self.t0
        unit = (share / self.length).clamp(0, 1)
        count = 2.0 ** torch.arange(self.levels + 1, dtype=unit.dtype, device=unit.device)[:, None]
        index = (unit * count).floor().minimum(count - 1)
        a, m, b = (self._place((index + part) / count) for part in (0.0, 0.5, 1.0))
        inside = time.clamp(a, b)  # their places are rounded
        hat = torch.minimum((inside - a) / (m - a), (b - inside) / (b - m))
        hat = hat * ((m - a) * (b - m) / (b - a)).sqrt()
        hat[-1] = ((inside - a) * (b - inside) / (b - a)).sqrt()[-1]
        nodes = torch.cat((torch.zeros_like(unit)[None], count + index))
        line = (time - self.t0) / math.sqrt(self.t1 - self.t0)
        return nodes.to(torch.int64), torch.cat((line[None], hat))

    def _place(self, unit: Tensor) -> Tensor:
        """The time at which a share of the way is done."""
        if self.geometric:
            return (self.t0 * (unit * self.length).exp()).clamp(max=self.t1)
        return self.t0 + unit * self.length


def _lift(rows: Tensor, like: Tensor) -> Tensor:
    """[n] as [n, 1, ...], so that it multiplies the samples of `like`."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))
