"""The trained network of digits: how far samplers land from a long reference, and how good it is.

    rms, median  of the distance per pixel to the exact image of the start under the network's flow
    gap          mean log p(y) less that of the exact images, in nats, with p the mixture of one
                 Gaussian a class: it falls where images are blurred into none or broken
    distance     sliced Wasserstein-2 in pixel space to exact images of other starts; `floor` is
                 that of the exact images of these starts

Stochastic samplers have no exact image, so only the last two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks import sde as stochastic
from benchmarks.absent import absent
from benchmarks.conditioning import sliced_wasserstein
from benchmarks.nfe import Counted
from scoresolve.digits import load_network
from scoresolve.metrics import class_mixture
from scoresolve.models import from_denoiser
from scoresolve.peers import PEERS
from scoresolve.sde import EDM
from scoresolve.solvers import AdaptiveAdams

__all__ = ["OURS", "THEIRS", "measure"]

OURS: dict[str, tuple[str, str | None]] = {
    "scoresolve auto": ("auto", None),
    "scoresolve dpmpp_2m, karras": ("dpmpp_2m", "karras"),
    "scoresolve ab4_v, sqrt_angle": ("ab4_v", "sqrt_angle"),
    "scoresolve dpmpp_2m_sde, karras": ("dpmpp_2m_sde", "karras"),
    "scoresolve er_sde, karras": ("er_sde", "karras"),
}
THEIRS: dict[str, tuple[str, ...]] = {
    "k-diffusion heun": ("karras",),
    "k-diffusion dpmpp_2m_sde": ("karras",),
    "diffusers dpmsolver++ 2M(midpoint)": ("karras", "log_snr"),
    "diffusers unipc3(bh1, x0)": ("karras", "log_snr"),
    "diffusers ipndm": ("flow", "karras"),
    "azula vAB3": ("flow", "karras"),
    "azula vAB4": ("flow", "karras"),
    "azula ito": ("karras",),
}
"""Peers, and the grids each is run on; in the small setting on the first alone."""


def measure(full: bool = False) -> list[dict[str, object]]:
    """Errors against the long reference and quality of the images.

    Args:
        full: 1,024 starts in double precision and seven budgets, instead of 64 in single
            precision, two, and the peers' grids in common use.

    Returns:
        Rows with `kind` (deterministic or stochastic), `sampler`, `budget`, `calls`, `rms`,
        `median`, `gap`, `gap_error`, `distance`, `floor`.
    """
    torch.set_num_threads(1)
    count, dtype = (1024, torch.float64) if full else (64, torch.float32)
    budgets = (5, 8, 10, 15, 20, 50, 100) if full else (10, 20)
    sde = EDM()
    model = from_denoiser(load_network(dtype=dtype)).on(sde)
    like = torch.empty(2 * count, 1, 8, 8, dtype=dtype)
    starts = sde.prior_std * ss.Philox(0).normal(like, 0, ss.noise.Purpose.START)
    tolerance = 1e-8 if full else 1e-5
    fine = AdaptiveAdams(tolerance, tolerance)
    exact, other = ss.sample(model, sde, x=starts, solver=fine).x.double().split(count)
    x = starts[:count]
    law = class_mixture()
    level = law.log_prob(exact)
    floor = sliced_wasserstein(exact.flatten(1), other.flatten(1))
    rows: list[dict[str, object]] = []

    def add(name: str, budget: int, calls: int, y: Tensor, is_stochastic: bool) -> None:
        error = (y.double() - exact).flatten(1).square().mean(1).sqrt()
        gain = law.log_prob(y.double()) - level
        row: dict[str, object] = {
            "kind": "stochastic" if is_stochastic else "deterministic",
            "sampler": name,
            "budget": budget,
            "calls": calls,
            "rms": "" if is_stochastic else _short(float(error.square().mean().sqrt())),
            "median": "" if is_stochastic else _short(float(error.median())),
            "gap": _short(float(gain.mean())),
            "gap_error": _short(float(gain.std()) / math.sqrt(count)),
            "distance": _short(sliced_wasserstein(y.double().flatten(1), other.flatten(1))),
            "floor": _short(floor),
        }
        rows.append(row)

    for name, (solver, grid) in OURS.items():
        for budget in budgets:
            out = ss.sample(model, sde, x=x, solver=solver, grid=grid, nfe=budget, seed=1)
            add(name, budget, out.nfe, out.x, bool(out.plan and out.plan.stochastic))
    missing = absent(name.split()[0] for name in THEIRS)
    for name, grids in THEIRS.items():
        peer = PEERS[name]
        if peer.library in missing:
            continue
        for grid in grids if full else grids[:1]:
            for budget in budgets:
                steps = stochastic.steps_within(peer.run, sde, grid, budget)
                if steps is None:
                    continue
                times, counted = ss.make_grid(grid, sde, steps).times, Counted(model)
                noise = stochastic.in_order(x, sde, seed=1)
                with torch.no_grad():
                    y = peer.run(counted, sde, times, x, noise)
                add(f"{name}, {grid}", budget, counted.calls, y, peer.stochastic)
    return rows


def _short(value: float) -> float:
    return float(f"{value:.3g}")
