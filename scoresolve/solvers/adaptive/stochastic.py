r"""Adaptive solvers of the reverse SDE.

Each sample has one Brownian path, a tree of counters, and a step reads its increment. A step that
is rejected and made shorter therefore reads the same path again: what was refused is not forgotten,
and the law of the noise does not depend on the tolerance. For the same reason the path between two
points is known: it is what a step to there would have read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.noise import BrownianPath, NoiseSource, Philox
from scoresolve.sde import expand
from scoresolve.solvers.adaptive.coordinates import Coordinates, LogSNR, Time, check_ends
from scoresolve.solvers.adaptive.drift import BoundedDrift
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.points import Point
from scoresolve.solvers.adaptive.rows import Numbers, Rows, lift, padded
from scoresolve.solvers.integrator import GaussianFlow, RowDrift

__all__ = ["AdaptiveSDE", "GottaGoFast"]

_RUNGS: Final = np.exp2(np.arange(8) / 8)
"""The mantissas of step sizes. A path read an ulp later moves by many, and would by way of the
error move the next step by more: only sizes out of a list keep a rounding what it is."""
_ON_A_RUNG: Final = 1e-9
"""So that the logarithm of a rung never rounds to the one below."""


def _tree(noise: NoiseSource | None, ends: Sequence[float], geometric: bool) -> BrownianPath:
    if not isinstance(noise, Philox):
        raise ArgumentError(
            "an adaptive solver of the SDE asks for its noise again when a step is rejected, so "
            "it must come from counters: give seed= or a Philox source"
        )
    return BrownianPath(noise, min(ends), max(ends), geometric=geometric)


class _Driven(Adaptive):
    """An adaptive solver driven by a Brownian path, in coordinates of its own."""

    stochastic, order = True, 1.0
    usual_coordinates, possible_coordinates = None, ()

    def first_steps(self, way: Coordinates, rows: Rows) -> Numbers:
        return np.full_like(rows.u, way.length / 50)

    def settle(self, h: Numbers) -> Numbers:
        """The greatest rungs up to `h`."""
        octave, rung = np.divmod(np.floor(len(_RUNGS) * np.log2(h) + _ON_A_RUNG), len(_RUNGS))
        rungs: Numbers = np.ldexp(_RUNGS[rung.astype(np.int64)], octave.astype(np.int64))
        return rungs


class _PosteriorMean(LogSNR):
    """y = x/alpha over log k, with x0 for its slope, and the path B of the clock 1/k^2."""

    def __init__(
        self,
        drift: BoundedDrift,
        flow: GaussianFlow,
        t_start: float,
        t_end: float,
        noise: NoiseSource | None,
    ) -> None:
        super().__init__(drift, flow, t_start, t_end)
        ends = self.snr(np.array([self.start, self.end]))
        self.noise = _tree(noise, ends.tolist(), geometric=True)

    def mix(self, alpha: Numbers, sigma: Numbers, size: Numbers) -> tuple[Numbers, Numbers]:
        return np.ones_like(alpha), np.zeros_like(alpha)

    def snr(self, u: Numbers) -> Numbers:
        """1/k^2 [b]: the same to the last bit in any batch, as it is a time of the path."""
        return padded(lambda u: (np.exp(-2 * u),), u)[0]

    def increment(self, rows: Rows | Point, u: Numbers) -> Tensor:
        """B from where the rows are to u."""
        start, end = (torch.from_numpy(self.snr(at)).squeeze() for at in (rows.u, u))
        return self.noise.rows(torch.from_numpy(rows.place)).increment(rows.y, start, end)

    def flat(self, rows: Rows | Point, u: Numbers) -> Tensor:
        """y at u for an x0 that stays what it is."""
        kept, noise = self.snr(rows.u) / self.snr(u), self.increment(rows, u)
        noise = lift(1 / self.snr(u), noise) * noise
        return lift(kept, noise) * rows.y + lift(1 - kept, noise) * rows.slope + noise

    def between(self, now: Point, new: Point, before: Point, u: Numbers) -> Tensor:
        """The solution for an x0 that stays, and what its change adds, as the square of the way."""
        share = (u - now.u) / (new.u - now.u)
        return self.flat(now, u) + lift(share * share, now.y) * (new.y - self.flat(now, new.u))


class AdaptiveSDE(_Driven):
    """SDE-DPM-Solver++ 2M with an error, for a Gaussian process, one call a step.

    In y = x/alpha the reverse SDE is d(y/k^2) = x0 dtau + dB over tau = 1/k^2 (k = sigma/alpha), so
    a step is exact but for x0. It is taken linear in log k, through its values at the last two
    points; the distance from what its value at the new point makes of it is the error. Steps are
    at most `longest` in log k, as an x0 taken at small noise is consistent with any state.

    Args:
        rtol, atol: tolerances, relative to the standard deviation of the noised data.
        **options: as in `Adaptive`, but coordinates, which are its own.

    Raises:
        ArgumentError: the process is not Gaussian, alpha or sigma is 0 at an end of the interval,
            or the noise is not made of counters.

    Source:
        Lu et al. 2022 (2211.01095), eq. 18 and appendix D for the solutions; the error and the
        driving path are this package's.
    """

    name, source = "adaptive_sde", "Lu et al. 2022 (2211.01095); the pair: this package"
    usual_control, longest = (0.0, 2 / 3, 0.0), 0.2

    def __init__(self, rtol: float = 0.03, atol: float = 0.03, **options: Any) -> None:
        super().__init__(rtol, atol, **options)

    def way(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None,
        noise: NoiseSource | None,
        flow: GaussianFlow | None,
    ) -> Coordinates:
        if flow is None:
            raise ArgumentError(f"{self.name!r} needs a Gaussian process: take 'gotta_go_fast'")
        model = BoundedDrift(flow.predict, x, t_start, t_end, self.max_calls)
        return _PosteriorMean(model, flow, t_start, t_end, noise)

    def memory(self, way: Coordinates, rows: Rows) -> tuple[Tensor, ...]:
        """Rise of x0 per log k over the last step."""
        return (torch.zeros_like(rows.slope),)

    def trial(self, way: Any, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        late = 1 + (1 - way.snr(rows.u) / way.snr(u)) / (2 * h)  # the end's share of linear x0
        step, (rise,) = lift(h, rows.y), rows.memory
        y = way.flat(rows, u) + lift(late, rise) * step * rise
        x0 = way.slope(y, u, rows.place)
        change = x0 - rows.slope
        return Trial(y, x0, (lift(late, x0) * (change - step * rise))[None], (change / step,))


class _Driver(Time):
    """Time, with a Brownian path W and g."""

    def __init__(
        self,
        drift: BoundedDrift,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor],
        noise: NoiseSource | None,
    ) -> None:
        super().__init__(drift, t_start, t_end)
        self.diffusion, self.noise = diffusion, _tree(noise, (t_start, t_end), geometric=False)

    def kick(self, rows: Rows | Point, u: Numbers) -> tuple[Tensor, Tensor]:
        """g dW from the rows' times to u, with g at the start and at the end."""
        ends = [torch.from_numpy(at).squeeze() for at in (rows.u, u)]
        w = self.noise.rows(torch.from_numpy(rows.place)).increment(rows.y, *ends)
        first, last = (expand(self.diffusion(t), w, t) * w for t in map(self.inside.times, ends))
        return first, last

    def between(self, now: Point, new: Point, before: Point, u: Numbers) -> Tensor:
        """Euler-Maruyama with the mean g, and a share of what it misses at the end."""

        def euler(u: Numbers) -> Tensor:
            first, last = self.kick(now, u)
            return now.y + lift(u - now.u, now.y) * now.slope + (first + last) / 2

        share = (u - now.u) / (new.u - now.u)
        return euler(u) + lift(share, now.y) * (new.y - euler(new.u))


class GottaGoFast(_Driven):
    """Adaptive stochastic improved Euler with an embedded Euler-Maruyama, two calls a step.

    Args:
        rtol, atol: tolerances of x per element; 0.02 and 0.0078 are among the published ones.
        **options: as in `Adaptive`, but coordinates, which are its own.

    Raises:
        ArgumentError: alpha or sigma is 0 at an end of the interval, or the noise is not made of
            counters.

    Source:
        Jolicoeur-Martineau et al. 2021 (2105.14080), algorithm 1, where a rejected step draws
        new noise; here it reads the same path again.
    """

    name, source = "gotta_go_fast", "Jolicoeur-Martineau et al. 2021 (2105.14080), algorithm 1"
    usual_control = (0.0, 0.9, 0.0)

    def __init__(self, rtol: float = 0.02, atol: float = 0.0078, **options: Any) -> None:
        super().__init__(rtol, atol, **options)

    def way(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None,
        noise: NoiseSource | None,
        flow: GaussianFlow | None,
    ) -> Coordinates:
        if diffusion is None:
            raise ArgumentError("diffusion is None: a solver of the SDE needs it")
        if flow is not None:
            check_ends(flow.sde, t_start, t_end)
        bounded = BoundedDrift(drift, x, t_start, t_end, self.max_calls)
        return _Driver(bounded, t_start, t_end, diffusion, noise)

    def trial(self, way: Any, rows: Rows, u: Numbers, h: Numbers) -> Trial:
        early, late = way.kick(rows, u)
        step = lift(h, rows.y)
        euler = rows.y + step * rows.slope + early
        improved = rows.y + step * way.slope(euler, u, rows.place) + late
        y = (euler + improved) / 2
        return Trial(y, way.slope(y, u, rows.place), (y - euler)[None])
