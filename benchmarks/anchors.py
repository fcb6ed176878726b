"""Figures of peers that were recorded apart from this package, measured again.

They are strong errors of samplers as commonly used, RMS per coordinate from the same noise: a grid
of Karras (rho = 7) between the noise levels of T and t_min with a last step to sigma = 0, on which
k-diffusion's `dpmpp_2m` takes n steps for n calls, and its `heun`, which is EDM's, n for 2n - 1.

The record speaks of a ring of eight in two dimensions and says no more. Equal weights do not give
its figures: of 65,536 starts none changes basin under `dpmpp_2m` at 20 calls, which is half as
wrong as recorded. Weights from 1 to 1.6 at radius 1 and standard deviation .03 give them. Whether
one start in a few hundred changes basin rules such figures, so they are given for many starts, with
the range over blocks of starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.nfe import DECISIVE, GRIDS, Case, compare, samplers_of_peers
from scoresolve.metrics import class_mixture
from scoresolve.peers import PEERS, installed
from scoresolve.sde import EDM, VP
from scoresolve.solvers import AdaptiveAdams
from scoresolve.targets import GaussianMixture, ring

__all__ = ["RECORDED", "Figure", "measure", "uneven_ring"]


def uneven_ring() -> GaussianMixture:
    """Eight Gaussians on the unit circle, their weights rising from 1 to 1.6."""
    even = ring(8, 1.0, 0.03)
    return GaussianMixture(torch.linspace(1, 1.6, 8), even.means, even.covariances)


CASES: dict[str, Callable[[], Case]] = {
    "ring 2-D, VP": lambda: (uneven_ring().score_model(VP()), VP()),
    "digits 64-D, VP": lambda: (class_mixture().score_model(VP()), VP()),
    "digits 64-D, EDM": lambda: (class_mixture().score_model(EDM()), EDM()),
}


@dataclass(frozen=True)
class Figure:
    """A recorded strong error.

    Attributes:
        case: of `CASES`.
        sampler: a peer on the grid of Karras, or "best peer" on any.
        nfe: budget of calls.
        rms: what was recorded.
    """

    case: str
    sampler: str
    nfe: int
    rms: float


_2M, _HEUN, _BEST = "k-diffusion dpmpp_2m", "k-diffusion heun", "best peer"
RECORDED = (
    Figure("ring 2-D, VP", _2M, 10, 0.090),
    Figure("ring 2-D, VP", _2M, 20, 0.032),
    Figure("ring 2-D, VP", _HEUN, 10, 1.07),
    Figure("ring 2-D, VP", _HEUN, 20, 0.062),
    Figure("ring 2-D, VP", _BEST, 5, 0.055),
    Figure("ring 2-D, VP", _BEST, 10, 0.024),
    Figure("ring 2-D, VP", _BEST, 20, 0.0031),
    Figure("ring 2-D, VP", _BEST, 50, 1.1e-4),
    Figure("digits 64-D, VP", _2M, 10, 0.094),
    Figure("digits 64-D, VP", _2M, 20, 0.025),
    Figure("digits 64-D, VP", _HEUN, 10, 0.82),
    Figure("digits 64-D, VP", _HEUN, 20, 0.10),
    Figure("digits 64-D, EDM", _2M, 10, 0.099),
    Figure("digits 64-D, EDM", _2M, 20, 0.032),
    Figure("digits 64-D, EDM", _HEUN, 10, 0.60),
    Figure("digits 64-D, EDM", _HEUN, 20, 0.090),
)


def squared_errors(figure: Figure, case: Case, x: Tensor, exact: Tensor) -> Tensor:
    """Squared distance per coordinate of each start, [B], of a peer as commonly used."""
    model, sde = case
    levels = figure.nfe if figure.sampler == _2M else (figure.nfe + 1) // 2
    times = (*ss.make_grid("karras", sde, levels - 1).times, 0.0)
    with torch.no_grad():
        y = PEERS[figure.sampler].run(model, sde, times, x, None)
    return (y - exact).flatten(1).square().mean(1)


def measure(
    blocks: int = 8, starts: int = 256, best: bool = False, cases: tuple[str, ...] = tuple(CASES)
) -> list[dict[str, object]]:
    """Each recorded figure beside the one measured here.

    Args:
        blocks: of starts, of which the range is given; of digits each has an eighth of the starts.
        starts: a block.
        best: whether the best of the decisive peers and four grids is searched too, on four blocks
            (many minutes).
        cases: of `CASES`.

    Returns:
        Rows with `case`, `sampler`, `nfe`, `recorded`, `rms` over all starts, `ratio` of the two,
        and `low`, `high`, the least and the largest rms of a block.
    """
    torch.set_num_threads(1)
    if not installed("k-diffusion"):
        raise ImportError("k-diffusion is not installed: CONTRIBUTING.md says how")
    rows: list[dict[str, object]] = []
    for name in cases:
        case = model, sde = CASES[name]()
        event = (2,) if name.startswith("ring") else (1, 8, 8)
        size = starts if name.startswith("ring") else starts // 8
        like = torch.empty(blocks * size, *event, dtype=torch.float64)
        x = sde.prior_std * ss.Philox(0).normal(like, 0, ss.noise.Purpose.START)
        exact = ss.sample(model, sde, x=x, solver=AdaptiveAdams(1e-6, 1e-6)).x
        for figure in (figure for figure in RECORDED if figure.case == name):
            if figure.sampler != _BEST:
                errors = squared_errors(figure, case, x, exact).reshape(blocks, size).mean(1)
            elif best:
                errors = torch.tensor([_best(case, figure.nfe, size, s) ** 2 for s in range(1, 5)])
            else:
                continue
            rms = float(errors.mean().sqrt())
            rows.append(
                {
                    "case": name,
                    "sampler": figure.sampler,
                    "nfe": figure.nfe,
                    "recorded": figure.rms,
                    "rms": _short(rms),
                    "ratio": _short(rms / figure.rms),
                    "low": _short(float(errors.min().sqrt())),
                    "high": _short(float(errors.max().sqrt())),
                }
            )
    return rows


def _best(case: Case, nfe: int, starts: int, seed: int) -> float:
    """The least rms of the decisive peers on four grids, from the starts of a seed."""
    peers = {name: run for name, run in samplers_of_peers().items() if name in DECISIVE}
    grids = {name: GRIDS[name] for name in ("quadratic", "log_snr", "flow", "polyexponential")}
    scores = compare(case, peers, grids, (nfe,), starts, screen=starts // 4, seed=seed)
    return min(score.rms for score in scores)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
