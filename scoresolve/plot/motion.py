"""Moving pictures: a density that goes to noise and comes back, and the score that leads it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from scoresolve.errors import whole_number
from scoresolve.plot.flows import backward, draw_score, forward, reach_of
from scoresolve.plot.style import COLOURS, INK, label, new_figure, on_host
from scoresolve.sampling import DEFAULT_SOLVER
from scoresolve.sde import VP, GaussianSDE
from scoresolve.targets import GaussianMixture

__all__ = ["PAUSE", "animate_flow", "animate_score", "moving"]

PAUSE = 8
"""Frames for which the noise and the data stand still."""
FINER = 10
"""Steps of the solver for each frame of the way back."""


@on_host
def animate_flow(
    mixture: GaussianMixture,
    sde: GaussianSDE | None = None,
    samples: int = 4000,
    frames: int = 40,
    solver: str = "euler_maruyama",
    seed: int = 0,
) -> FuncAnimation:
    """A density on the line that goes to noise and comes back, with samples that do the same.

    Args:
        mixture: the data, over events [1].
        sde: the process; `VP()` if omitted.
        samples: samples in the histogram.
        frames: frames each way, at least 1.
        solver: the way back.
        seed: of all noise.

    Returns:
        An animation: p_t in closed form as a line, the histogram of exact forward paths, then of
        the solver's.

    Raises:
        ShapeError: the mixture is not over events [1].
    """
    process, frames = sde or VP(), whole_number("frames", frames)
    times, states = forward(process, mixture.sample(samples, seed=seed), frames, seed)
    model, steps = mixture.score_model(process), FINER * frames
    back_times, back = backward(
        model, process, states[-1], solver, seed + 1, grid="uniform", steps=steps
    )
    shown = [
        (float(t), x[:, 0].numpy(), "data → noise") for t, x in zip(times, states, strict=True)
    ]
    shown += [shown[-1]] * PAUSE
    shown += [
        (float(t), x[:, 0].numpy(), "noise → data")
        for t, x in zip(back_times[::FINER], back[::FINER], strict=True)
    ]
    shown += [shown[-1]] * PAUSE
    reach = reach_of(mixture, process)
    x = torch.linspace(-reach, reach, 400, dtype=torch.float64)[:, None]
    edges = np.linspace(-reach, reach, 81)
    figure, (axes,) = new_figure(5.2, 3.2)
    bars = axes.stairs(np.zeros(80), edges, fill=True, color=COLOURS[1], alpha=0.45)
    (line,) = axes.plot(x, 0 * x, color=COLOURS[0], linewidth=1.8)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(0, 1.15 * _top(mixture, process, x, float(edges[1] - edges[0])))

    def draw(frame: int) -> list[Artist]:
        t, points, way = shown[frame]
        bars.set_data(np.histogram(points, edges)[0] / len(points) / (edges[1] - edges[0]))
        line.set_ydata(model.log_prob(x, t).exp().numpy())
        label(axes, "x", "", f"p_t and {len(points)} samples, {way}, t = {t:.2f}")
        return []

    return moving(figure, draw, len(shown))


def _top(mixture: GaussianMixture, sde: GaussianSDE, x: Tensor, width: float) -> float:
    """The largest density at t_min, on x and at the modes, as far as bars of a width show it."""
    modes = float(sde.alpha(sde.t_min)) * mixture.means.reshape(-1, 1).to(x)
    p = mixture.score_model(sde).log_prob(torch.cat([x, modes]), sde.t_min).exp()
    return min(float(p.max()), 1 / width)


@on_host
def animate_score(
    mixture: GaussianMixture, sde: GaussianSDE | None = None, samples: int = 400, frames: int = 40
) -> FuncAnimation:
    """Samples that follow the probability flow in the plane, over p_t and its score.

    Args:
        mixture: the data, over events [2].
        sde: the process; `VP()` if omitted.
        samples: samples that move.
        frames: frames from noise to data, at least 1.

    Raises:
        ShapeError: the mixture is not over events [2].
    """
    process, frames = sde or VP(), whole_number("frames", frames)
    start = process.prior_std * torch.randn(
        samples, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    model = mixture.score_model(process)
    times, states = backward(model, process, start, DEFAULT_SOLVER, grid="uniform", steps=frames)
    figure, (axes,) = new_figure(4.2, 4.4)

    def draw(frame: int) -> list[Artist]:
        i = min(frame, frames)
        axes.clear()
        draw_score(axes, mixture, process, float(times[i]))
        axes.plot(*states[i].T, ".", markersize=3, color=INK, alpha=0.7, zorder=3)
        label(axes, "x₁", "x₂", f"score of p_t and {samples} samples, t = {float(times[i]):.2f}")
        return []

    return moving(figure, draw, frames + 1 + PAUSE)


@on_host
def moving(figure: Figure, draw: Callable[[int], list[Artist]], frames: int) -> FuncAnimation:
    """A film of what `draw(frame)` changes on a figure."""
    figure.set_dpi(80)
    draw(0)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else every frame is laid out anew
    return FuncAnimation(figure, on_host(draw), frames=frames, interval=80, init_func=list)
