"""Brownian paths are continuous in the times that are read, and can be kept."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.noise import BrownianPath, Philox
from scoresolve.noise.multiwavelets import Step, rest

F64 = torch.float64
GRAIN = 2.0**-34
PATHS = {
    "plain": BrownianPath(Philox(0), 0.0, 1.0),
    "coarse": BrownianPath(Philox(0), 0.5, 3.0, tolerance=0.1),
    "finest": BrownianPath(Philox(0), 0.0, 80.0, tolerance=80 * 2.0**-31),
    "geometric": BrownianPath(Philox(0), 1e-4, 3e5, geometric=True),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def times(path: BrownianPath, n: int) -> Tensor:
    """Random times, ends of intervals, and times within some grains of these."""
    draw = torch.Generator().manual_seed(1)
    share = torch.rand(n, generator=draw, dtype=F64)
    ends = (share[: n // 2] * 1024).floor() / 1024
    near = ends + 3 * GRAIN * (torch.rand(n // 2, generator=draw, dtype=F64) - 0.5)
    t = path._place(torch.cat((share, ends, near)).clamp(1e-3, 0.999))
    return t.clamp(path.t0, path.t1)


@paths
@pytest.mark.parametrize("part", [1e-16, 1e-14, 1e-12])
def test_a_read_moves_in_proportion_to_its_time(path: BrownianPath, part: float) -> None:
    t = times(path, 800)
    s = torch.maximum(t * (1 + part), t.nextafter(torch.full_like(t, math.inf)))
    like, origin = torch.empty(len(t), 2, dtype=F64), torch.full_like(t, path.t0)
    grain = GRAIN * path.length * (t if path.geometric else torch.ones_like(t))
    # normals, of 3200 of which none is beyond five deviations
    bound = 5 * math.sqrt(5) * (s - t) / grain.sqrt()
    moved = path.increment(like, origin, s) - path.increment(like, origin, t)
    noise = 1e-14 * math.sqrt(path.t1)  # rounding of the sum
    assert (moved.abs() <= bound[:, None] + noise).all()
    assert (path.increment(like, t, s).abs() <= bound[:, None]).all()


@paths
def test_areas_move_in_proportion_to_their_times(path: BrownianPath) -> None:
    t = times(path, 400)
    s = path._place(torch.full_like(t, 0.9995)).clamp(max=path.t1)
    like, shift = torch.empty(len(t), 2, dtype=F64), 1e-13 * t
    grain = GRAIN * path.length * (t if path.geometric else torch.ones_like(t))
    moved = path.space_time_area(like, t + shift, s) - path.space_time_area(like, t, s)
    # dH/dt is (H + W/2 - w')/h and -w'/2 at most, of which H and W are less than the path's slope
    bound = 10 * math.sqrt(5) * shift / grain.sqrt() + 1e-13 * math.sqrt(path.t1)
    assert (moved.abs() <= bound[:, None]).all()


def test_the_smooth_ends_of_an_interval_lack_a_tenth_of_a_grain() -> None:
    edge = 2.0**-5
    x = torch.linspace(0, 1, 2001, dtype=F64)
    step = Step(torch.zeros_like(x), x, False)
    a, b = torch.zeros(2, len(x), dtype=F64), torch.ones(2, len(x), dtype=F64)
    smooth, exact = (rest(step, a, b, width)[:, 1].square().sum(0) for width in (edge, 0.0))
    inside = (x >= edge) & (x <= 1 - edge)
    assert torch.equal(smooth[inside], exact[inside])
    assert (smooth <= exact + 1e-15).all() and (exact - smooth).max() < edge / 10
    slope = rest(step, a, b, edge)[:, 1].diff(dim=1) * 2000
    assert slope.square().sum(0).max() < 4.4 / edge  # 4 at small edges
    assert rest(step, a, b, 0.0)[:, 1].diff(dim=1).square().sum(0).max() * 2000**2 > 1000


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.RectifiedFlow()], ids=repr)
def test_a_path_that_was_kept_is_the_same_path(sde: ss.GaussianSDE) -> None:
    like = torch.empty(3, 2, dtype=F64)
    for path in (BrownianPath.in_snr(Philox(3), sde), BrownianPath(Philox(3), 0.0, sde.T)):
        read = path.increment(like, 0.7 * sde.T, 0.2 * sde.T)
        for again in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
            assert torch.equal(again.increment(like, 0.7 * sde.T, 0.2 * sde.T), read)
