"""Strong order of stochastic solvers: one Brownian path, read at several step sizes.

In x0 form with eta = 1 the reverse SDE is dy = x0 dtau + dB with tau = SNR. A path of B has an
increment and a space-time area over every step. The error is the distance, per coordinate, to the
same path solved on a finer grid.
"""

from __future__ import annotations

import functools

import pytest
import torch
from strategies import generator, normal
from torch import Tensor

from scoresolve.noise import BrownianPath, Philox
from scoresolve.noise.sources import Times
from scoresolve.plans import trace
from scoresolve.sde import EDM, VP, GaussianSDE
from scoresolve.solvers import SRA1, SDEDPMSolverPPS, ShARK, Solver, WeakRungeKutta, get_solver
from scoresolve.targets import ring

F64 = torch.float64
# 8 to 64 steps; at order 1.5 a reference of 4 times as many is off by an eighth of the least error.
FINEST, STRIDES, ROWS = 256, (32, 16, 8, 4), 100
AREAL: list[Solver] = [SRA1(), ShARK(), WeakRungeKutta()]


class OwnAreas(BrownianPath):
    """The increments of a path, with areas from elsewhere."""

    def area(self, like: Tensor, draw: int, times: Times) -> Tensor:
        return self.noise.normal(like, draw)


class TurnedAreas(BrownianPath):
    """The increments of a path, with its areas of the wrong sign."""

    def area(self, like: Tensor, draw: int, times: Times) -> Tensor:
        return -super().area(like, draw, times)


@functools.cache
def finest(kind: type[BrownianPath], sde: GaussianSDE) -> tuple[list[float], Tensor, Tensor]:
    """The finest grid, starts, and where `kind` of path leads from there."""
    times = sde.time_from_log_snr(torch.linspace(-2.0, 5.0, FINEST + 1, dtype=F64)).tolist()
    x = float(sde.sigma(times[0])) * 1.3 * normal(generator(5), ROWS, 2)
    score, path = ring(3, 1.0, 0.7).score_model(sde), kind.in_snr(Philox(3), sde)
    return times, x, trace(ShARK(), sde, times).run(score, x, path)


def slope(
    solver: Solver,
    sde: GaussianSDE,
    kind: type[BrownianPath] = BrownianPath,
    reference: type[BrownianPath] = BrownianPath,
) -> float:
    """The order of the error over three refinements, from 8 steps to 64."""
    times, x, exact = finest(reference, sde)
    score, path = ring(3, 1.0, 0.7).score_model(sde), kind.in_snr(Philox(3), sde)
    errors = [
        float((trace(solver, sde, times[::n]).run(score, x, path) - exact).square().mean().sqrt())
        for n in STRIDES
    ]
    steps = torch.tensor(STRIDES, dtype=F64).log2()
    steps -= steps.mean()
    return float((steps * torch.tensor(errors, dtype=F64).log2()).sum() / steps.square().sum())


@pytest.mark.parametrize("solver", AREAL, ids=lambda solver: solver.name)
def test_with_areas_the_strong_order_is_one_and_a_half(solver: Solver) -> None:
    assert slope(solver, EDM()) > 1.4  # VP is in the certificates


@pytest.mark.parametrize("solver", [SDEDPMSolverPPS(), get_solver("gddim")], ids=lambda s: s.name)
def test_without_areas_the_strong_order_is_one(solver: Solver) -> None:
    assert 0.85 < slope(solver, VP()) < 1.3


@pytest.mark.parametrize("kind", [OwnAreas, TurnedAreas])
@pytest.mark.parametrize("solver", AREAL, ids=lambda solver: solver.name)
def test_areas_of_another_path_leave_order_one(solver: Solver, kind: type[BrownianPath]) -> None:
    assert slope(solver, VP(), kind) < 1.2


def test_a_path_in_time_leaves_order_one() -> None:
    """sqrt(SNR') dW over a step is its increment in the other clock only to first order."""

    class InTime(BrownianPath):
        @classmethod
        def in_snr(cls, noise: Philox, sde: GaussianSDE, tolerance=None):  # type: ignore[no-untyped-def, override]
            return BrownianPath(noise, sde.t_min, sde.T)

    assert slope(SRA1(), VP(), InTime, InTime) < 1.2


def test_one_path_in_snr_drives_every_process() -> None:
    """In y = x/alpha the solution depends on the SNR alone."""
    ends = []
    for sde in (VP(), EDM()):
        times = sde.time_from_log_snr(torch.linspace(-2.0, 5.0, 33, dtype=F64)).tolist()
        x = float(sde.sigma(times[0])) * normal(generator(5), 8, 2)
        path = BrownianPath.in_snr(Philox(1), sde)
        out = trace(SRA1(), sde, times).run(ring(3, 1.0, 0.7).score_model(sde), x, path)
        ends.append(out / float(sde.alpha(times[-1])))
    # clocks agree to the digits of a time, which the finest level of the path spreads
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-8)
