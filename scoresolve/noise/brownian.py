"""Brownian paths from counters: one per sample, independent of the steps that read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.noise.multiwavelets import Step, lines, pairs, rest
from scoresolve.noise.philox import normals, work_dtype
from scoresolve.noise.sources import NoiseSource, Philox, Purpose, Times, check_like, group_size
from scoresolve.precision import host

__all__ = ["BrownianPath"]

_LOG_SNR = 40.0  # beyond, a step is all signal or all noise
_GRAIN = 2.0**-34  # share of the whole, an eighth of the smallest tolerance


class _Process(Protocol):
    def log_snr(self, t: Tensor) -> Tensor: ...


class _SNR:
    """The clock alpha^2/sigma^2 of a process."""

    def __init__(self, sde: _Process) -> None:
        self.sde = sde

    def __call__(self, t: Tensor) -> Tensor:
        return self.sde.log_snr(t).clamp(-_LOG_SNR, _LOG_SNR).exp()


class BrownianPath(NoiseSource):
    """One Brownian path per sample on [t0, t1], the same whatever the steps that read it.

    dW is a sum of orthonormal functions times normals: two lines on the whole, a pair on each
    interval of levels 0 to L - 1, and a rest on those of level L, see `multiwavelets`. The law of
    all increments and areas together is exact but for two times in one interval of level L, and for
    a time within a grain g of its ends, where a variance lacks at most g/10. The normals of
    interval i of level l are the Box-Muller pairs of the draw `2^l + i` of the sample's Brownian
    stream, those of the whole of its draw 0. Intervals are halved in t or, if `geometric`, in
    log t.

    A read is continuous in its times. The grain is a share 2^-34 of the whole, or if `geometric`
    that times t log(t1/t0), and a read has E (dW/dt)^2 <= 5/g: of the levels above L no more than
    7 2^L/whole, of the rest 4/g at most, next to an interval's end. An ulp of a time so moves a
    read by some 3e-11 sqrt(whole), where a Brownian motion to the last digit would move by its
    root.

    As a `NoiseSource` it answers for the solver with its increments and areas over a step, scaled
    to unit variance, and hands all else to `noise`, draws that belong to no step (t = s) included.

    Args:
        noise: the source of the path's normals.
        t0: start of the interval, where W = 0.
        t1: end of the interval, above t0.
        tolerance: smallest distance of two times that must be resolved, in log t if `geometric`,
            at least a share 2^-31 of the whole; a draw costs about `4 log2(whole / tolerance)`
            normals. Default: a share 2^-24.
        geometric: whether intervals are halved in log t, so that early times are resolved as well
            as late ones; needs t0 > 0.
        clock: a monotone function from the times that are asked for, float64 tensors, to those of
            the path, into [t0, t1]. Default: they are the same.

    Raises:
        ArgumentError: the interval is empty or not finite, or the tolerance out of range.

    Source:
        Alpert 1993 (SIAM J. Math. Anal. 24), "A class of bases in L^2 for the sparse representation
        of integral operators", of order 2 and for unequal halves; the rest is this package's.
    """

    def __init__(
        self,
        noise: Philox,
        t0: float,
        t1: float,
        tolerance: float | None = None,
        *,
        geometric: bool = False,
        clock: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.noise, self.t0, self.t1, self.geometric = noise, float(t0), float(t1), geometric
        self.clock = clock
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

    @classmethod
    def in_snr(cls, noise: Philox, sde: _Process, tolerance: float | None = None) -> BrownianPath:
        """The path B(SNR) that drives the reverse SDE of a Gaussian process in its x0 form.

            d(alpha x/sigma^2) = x0 dtau + dB(tau),   tau = SNR = alpha^2/sigma^2.

        Times are those of the process; beyond a log-SNR of 40 either way the path stands still.

        Args:
            noise: the source of the path's normals.
            sde: the process.
            tolerance: smallest distance in log-SNR that must be resolved. Default: 5e-6.
        """

        ends = math.exp(-_LOG_SNR), math.exp(_LOG_SNR)
        return cls(noise, *ends, tolerance, geometric=True, clock=_SNR(sde))

    def increment(self, like: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """`W(s) - W(t)`, normal with variance |s - t|, or that of their clocks.

        Args:
            like: [B, *event], floating; gives shape, dtype and device.
            t, s: times in [t0, t1], or whose clocks are; floats or [B].

        Returns:
            [B, *event].

        Raises:
            ArgumentError: a time is outside [t0, t1] or not a number.
            ShapeError: a tensor of times is neither [] nor [B].
        """
        check_like(like)
        return self._read(like, self._times(t, like), self._times(s, like)).to(like.dtype)

    def space_time_area(self, like: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The space-time Levy area H: the mean of W less its chord between t and s.

            H = 1/h int_t^s (W(u) - W(t) - (u - t)/h (W(s) - W(t))) du,    h = s - t,

        normal with variance |h|/12 and independent of the increment; 0 where s = t. Over a union,

            h (H + W/2) = h_1 (H_1 + W_1/2) + h_2 (W_1 + H_2 + W_2/2).

        Arguments, result and errors as in `increment`.

        Source:
            Foster, Lyons and Oberhauser 2020 (SIAM J. Numer. Anal. 58), "An optimal polynomial
            approximation of Brownian motion", definition 3.5.
        """
        check_like(like)
        ends = self._times(t, like), self._times(s, like)
        return self._read(like, *ends, area=True).to(like.dtype)

    def __call__(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """`(W(s) - W(t)) / sqrt|s - t|`, standard normal [B, *event]; zero where s = t."""
        return self._unit(x, self._times(t, x), self._times(s, x)).to(x.dtype)

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """The path's unit increment over `times` for the solver, else the numbers of `noise`."""
        if times is None or purpose != Purpose.SOLVER:
            return self.noise.normal(like, draw, purpose)
        return self._drawn(like, draw, times)

    def area(self, like: Tensor, draw: int, times: Times) -> Tensor:
        """The path's unit area over `times`, `sqrt(12/|h|) H`; the numbers of `noise` if s = t."""
        return self._drawn(like, draw, times, area=True)

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        """The uniform numbers of `noise`."""
        return self.noise.uniform(like, draw, purpose)

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        """The signs of `noise`."""
        return self.noise.signs(like, draw, purpose)

    def rows(self, index: slice | Tensor) -> BrownianPath:
        """The same paths for the samples `index`."""
        path = copy(self)
        path.noise = self.noise.rows(index)
        return path

    def _times(self, t: float | Tensor, like: Tensor) -> Tensor:
        """Times of the path, [1] or [B]."""
        time = host(t)
        if time.shape not in ((), (like.shape[0],)):
            raise ShapeError(
                f"times of shape {tuple(time.shape)} for x of shape {tuple(like.shape)}: "
                "give a float or one time per sample"
            )
        time = time if self.clock is None else self.clock(time)
        slack = 1e-6 * (self.t1 - self.t0)
        if not bool(((time >= self.t0 - slack) & (time <= self.t1 + slack)).all()):
            raise ArgumentError(
                f"time {t} is outside the path's interval [{self.t0}, {self.t1}]: "
                "build the BrownianPath on the whole range of the solver"
            )
        return time.reshape(-1).clamp(self.t0, self.t1)

    def _drawn(self, like: Tensor, draw: int, times: Times, area: bool = False) -> Tensor:
        t, s = (self._times(time, like) for time in times)
        still = t == s
        if bool(still.all()):
            return self.noise.normal(like, draw)
        z = self._unit(like, t, s, area).to(like.dtype)
        if not bool(still.any()):
            return z
        return torch.where(_lift(still.to(like.device), like), self.noise.normal(like, draw), z)

    def _unit(self, like: Tensor, t: Tensor, s: Tensor, area: bool = False) -> Tensor:
        """An increment or area scaled to unit variance, in the dtype of the work."""
        wide = self._read(like, t, s, area)
        variance = (s - t).abs() / (12 if area else 1)
        return wide.div_(_lift(variance.where(variance > 0, 1.0).sqrt().to(wide), like))

    def _read(self, like: Tensor, t: Tensor, s: Tensor, area: bool = False) -> Tensor:
        """The increment over [t, s], or its area, in the dtype of the work."""
        wide = torch.zeros(like.shape, dtype=work_dtype(like.dtype), device=like.device)
        draws, weights = self._weights(t, s, area)
        used = weights.ne(0).any(0).any(1)
        draws, weights = draws[used].to(wide.device), weights[:, used].to(wide)
        pair = wide[..., None].expand(*like.shape, 2)
        group = max(1, group_size(pair))
        for first in range(0, len(draws), group):
            part = slice(first, first + group)
            z = self.noise.at(pair, draws[part], Purpose.BROWNIAN, normals)
            for weight, node in zip(weights[:, part].unbind(1), z, strict=True):
                for k in (0, 1):
                    wide.addcmul_(_lift(weight[k], like), node[..., k])
        return wide

    def _weights(self, t: Tensor, s: Tensor, area: bool = False) -> tuple[Tensor, Tensor]:
        """Draws [rows, n] of the pairs of normals in an increment or area over [t, s] or [s, t],
        and their weights [2, rows, n]."""
        low, high = torch.minimum(t, s), torch.maximum(t, s)
        ends, step = torch.stack((low, high)), Step(low, high, area)
        share = (ends / self.t0).log() if self.geometric else ends - self.t0
        unit = (share / self.length).clamp(0, 1)
        count = 2.0 ** torch.arange(self.levels + 1, dtype=unit.dtype, device=unit.device)
        count = count[:, None, None]
        index = (unit * count).floor().minimum(count - 1)
        a, m, b = (self._place((index + part) / count) for part in (0.0, 0.5, 1.0))
        draws = (count + index).to(torch.int64)
        shared = draws[:, 0] == draws[:, 1]
        edge = min(_GRAIN * float(count[-1]), 0.5)
        first, last = rest(step, a[-1], b[-1], edge).unbind(1)
        fine = torch.stack((first, torch.where(shared[-1], first + last, last)), 1)
        weights = torch.cat((pairs(step, a[:-1], m[:-1], b[:-1]), fine[:, None]), 1)
        first = weights[:, :, 0].masked_fill(shared, 0.0)
        whole = lines(step, *(torch.full_like(low, end) for end in (self.t0, self.t1)))
        weights = torch.cat((whole[:, None], first, weights[:, :, 1]), 1)
        weights = weights.masked_fill(low == high, 0.0)
        weights = weights if area else torch.where(s < t, -weights, weights)
        return torch.cat((torch.zeros_like(draws[:1, 0]), draws[:, 0], draws[:, 1])), weights

    def _place(self, unit: Tensor) -> Tensor:
        """The time at which a share of the way is done."""
        if self.geometric:
            return (self.t0 * (unit * self.length).exp()).clamp(max=self.t1)
        return self.t0 + unit * self.length


def _lift(rows: Tensor, like: Tensor) -> Tensor:
    """[n] as [n, 1, ...], so that it multiplies the samples of `like`."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))
