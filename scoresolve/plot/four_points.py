"""Four points on the line: the smallest data set on which all of diffusion can be seen.

The data are -15, -5, 1 and 10. Their law at every step is known, a mixture of four Gaussians, and
so is its score; a small network learns it from the noised points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from scoresolve.chains import DiffusionChain
from scoresolve.models import Model, from_x0
from scoresolve.objectives import denoising_score_matching
from scoresolve.plot.flows import backward, shade_marginals
from scoresolve.plot.style import COLOURS, label, new_figure, on_host
from scoresolve.sde import linear_betas
from scoresolve.targets import GaussianMixture
from scoresolve.training import Training, seeded

__all__ = ["FOUR_POINTS", "learn_four_points", "plot_four_points"]

F64 = torch.float64
FOUR_POINTS = (-15.0, -5.0, 1.0, 10.0)
STD = 9.4
"""Of the points."""
CHAIN = DiffusionChain(linear_betas(400, 2.5e-4, 0.05))


class _Network(nn.Module):
    """The clean point, from a noised one and the log-SNR of its step."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (part(t.double())[:, None] for part in (CHAIN.sde.alpha, CHAIN.sde.sigma))
        total = (sigma**2 + (STD * alpha) ** 2).sqrt()
        y, level = x / total, (alpha / sigma).log() / 3
        features = [y, (2 * y).sin(), (4 * y).sin(), level, level**2, level**3]
        inner = self.layers(torch.cat(features, 1).float())
        x0: Tensor = STD**2 * alpha / total**2 * x + STD * sigma / total * inner
        return x0.clamp(-17, 17).to(x)  # no point is further out


@on_host
def learn_four_points(steps: int = 1500, seed: int = 0) -> Model:
    """A network that has learned where noised points come from.

    Args:
        steps: training steps of 256 noised points, at least 1.
        seed: of the initial weights and of every step.
    """
    points = torch.tensor(FOUR_POINTS, dtype=torch.float32)[:, None].repeat(64, 1)

    def loss(network: nn.Module, step: int) -> Tensor:
        model = from_x0(network, CHAIN.sde)
        return denoising_score_matching(
            model, CHAIN.sde, points, weighting="edm", even=True, data_std=STD, draw=step, seed=seed
        ).mean()

    with seeded(seed):
        network = _Network().float()
    run = Training(network, loss, steps, seed=seed, rate=4e-3, averaging=0.99)
    return from_x0(run.run(), CHAIN.sde)


@on_host
def plot_four_points(paths: int = 24, steps: int = 1500, seed: int = 0) -> Figure:
    """The forward chain of four points, and the way back: known and learned, SDE and ODE.

    Args:
        paths: paths in each panel.
        steps: training steps of the learned score, at least 1.
        seed: of the training and of all noise.

    Returns:
        A figure of six panels over the exact marginals as heat map: the chain forward, and back
        with the exact and the learned score; below the reverse SDE, and the probability flow with
        both scores. Titles tell the largest distance of an end to its nearest point.
    """
    data = GaussianMixture(
        torch.ones(4), torch.tensor(FOUR_POINTS, dtype=F64)[:, None], torch.zeros(4, 1, dtype=F64)
    )
    exact, learned = data.score_model(CHAIN.sde), learn_four_points(steps, seed)
    forward = torch.stack([*CHAIN.forward(data.sample(paths, seed=seed), seed=seed)])
    start = torch.special.ndtri((torch.arange(paths, dtype=F64) + 0.5) / paths)[:, None]
    back: dict[str, tuple[str, Model]] = {
        "reverse chain, exact score": ("ddpm", exact),
        "reverse chain, learned score": ("ddpm", learned),
        "reverse SDE, exact score": ("euler_maruyama", exact),
        "probability flow, exact score": ("ab2_v", exact),
        "probability flow, learned score": ("ab2_v", learned),
    }
    grid = [float(t) for t in range(CHAIN.T, 0, -1)]
    figure, row = new_figure(11.0, 6.2, columns=3, rows=2)
    tracks = [("forward chain", torch.arange(CHAIN.T + 1, dtype=F64), forward)]
    for title, (solver, model) in back.items():
        times, states = backward(model, CHAIN.sde, start, solver, seed, grid=grid)
        tracks.append((f"{title}: ends within {_off(states[-1]):.2f}", times, states))
    shade_marginals(row, data, CHAIN.sde, 17.0)
    for axes, (title, times, states) in zip(row, tracks, strict=True):
        axes.plot(times, states[..., 0], color=COLOURS[1], linewidth=0.7)
        first, last = (0, CHAIN.T) if axes is row[0] else (CHAIN.T, 0)
        axes.set_xlim(first, last)
        axes.set_ylim(-17, 12)
        label(axes, "step t", "x" if axes in (row[0], row[3]) else "", title)
    return figure


def _off(x: Tensor, points: Sequence[float] = FOUR_POINTS) -> float:
    """The largest distance of an end to its nearest point."""
    return float((x - torch.tensor(points, dtype=x.dtype)).abs().amin(1).max())
