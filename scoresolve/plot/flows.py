"""Diffusion on the line and in the plane: p_t, its score, and paths forward and back.

p_t = sum_k pi_k N(alpha mu_k, alpha^2 Sigma_k + sigma^2 I) is known in closed form; paths back are
the solvers' own, and paths forward are exact: x_t = alpha (x_0 + W(k^2)) with k = sigma/alpha and a
Brownian path W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresolve.errors import ShapeError, whole_number
from scoresolve.models import Model
from scoresolve.noise import BrownianPath, Philox
from scoresolve.plans import StepReport
from scoresolve.plot.samples import shade_plane
from scoresolve.plot.style import COLOURS, DENSITY, colour, label, new_figure, on_host
from scoresolve.sampling import DEFAULT_SOLVER, sample
from scoresolve.sde import VP, GaussianSDE
from scoresolve.targets import GaussianMixture

__all__ = [
    "backward",
    "forward",
    "plot_brownian",
    "plot_flow",
    "plot_paths",
    "plot_score",
    "shade_marginals",
]

F64 = torch.float64
Track = tuple[Tensor, Tensor]
"""Times [n] and the states [n, B, D] there."""


def forward(sde: GaussianSDE, x0: Tensor, steps: int, seed: int = 0) -> Track:
    """Exact paths of the forward process from `x0` [B, D], at evenly spaced times.

    Args:
        sde: the process.
        x0: where they start, at t_min.
        steps: intervals, >= 1.
        seed: of the Brownian paths.
    """
    times = torch.linspace(sde.t_min, sde.T, whole_number("steps", steps) + 1, dtype=F64)
    alpha = sde.alpha(times).clamp(min=1e-3)  # a flow ends at alpha = 0, where k is infinite
    clock = ((sde.sigma(times) / alpha).square()).tolist()
    path = BrownianPath(Philox(seed), clock[0], clock[-1], geometric=True)
    walks = _walks(path, x0, clock)
    return times, alpha[:, None, None] * (x0 + walks)


def _walks(path: BrownianPath, like: Tensor, times: Sequence[float]) -> Tensor:
    """What the path of each sample of `like` [B, D] goes from the first time to each, [n, B, D]."""
    samples, count = len(like), len(times)
    each, ends = torch.arange(samples).repeat(count), torch.tensor(times, dtype=F64)
    many = like.repeat(count, 1)
    walks = path.rows(each).increment(many, times[0], ends.repeat_interleave(samples))
    return walks.reshape(count, *like.shape)


def backward(
    model: Model, sde: GaussianSDE, x: Tensor, solver: str, seed: int = 0, **grid: Any
) -> Track:
    """Paths of a solver from `x` [B, D] at time T, on the grid that `sample` takes as options."""
    track = [(sde.T, x)]
    note = partial(_note, track)
    sample(model, sde, x=x, solver=solver, seed=seed, callback=note, **grid)
    times, states = zip(*track, strict=True)
    return torch.tensor(times, dtype=F64), torch.stack(states)


def _note(track: list[tuple[float, Tensor]], step: StepReport) -> None:
    track.append((step.t, step.x))


@on_host
def plot_flow(
    mixture: GaussianMixture,
    sde: GaussianSDE | None = None,
    paths: int = 12,
    steps: int = 300,
    seed: int = 0,
) -> Figure:
    """The marginals p_t of a density on the line, with paths to noise and both ways back.

    Args:
        mixture: the data, over events [1].
        sde: the process; `VP()` if omitted.
        paths: number of paths; backward ones start at evenly spaced quantiles of the prior.
        steps: steps of the solvers, at least 1.
        seed: of all noise.

    Returns:
        A figure with three panels: the forward SDE, the probability flow, and the reverse SDE.
        Each column of the heat map is p_t over its maximum.

    Raises:
        ShapeError: the mixture is not over events [1].
    """
    process = sde or VP()
    start, model = _quantiles(paths) * process.prior_std, mixture.score_model(process)
    even: dict[str, Any] = {"grid": "uniform", "steps": steps}
    figure, row = new_figure(11.0, 3.3, columns=3, share=False)
    tracks = {
        "forward SDE": forward(process, mixture.sample(paths, seed=seed), steps, seed),
        "probability flow (ODE)": backward(model, process, start, DEFAULT_SOLVER, **even),
        "reverse SDE": backward(model, process, start, "euler_maruyama", seed, **even),
    }
    shade_marginals(row, mixture, process)
    for axes, (title, (times, states)) in zip(row, tracks.items(), strict=True):
        axes.plot(times, states[..., 0], color=COLOURS[1], linewidth=0.9)
        ends = (process.t_min, process.T)
        axes.set_xlim(ends if axes is row[0] else ends[::-1])
        way = "data → noise" if axes is row[0] else "noise → data"
        label(axes, f"time t  ({way})", "x" if axes is row[0] else "", title)
    return figure


@on_host
def plot_paths(
    mixture: GaussianMixture,
    sde: GaussianSDE | None = None,
    starts: int = 3,
    repeats: int = 3,
    steps: int = 300,
) -> Figure:
    """The probability flow and several paths of the reverse SDE from each of a few starts.

    Args:
        mixture: the data, over events [1].
        sde: the process; `VP()` if omitted.
        starts: starts, at evenly spaced quantiles of the prior; each has a colour of its own.
        repeats: paths of the SDE from each.
        steps: steps of the solvers, at least 1.

    Returns:
        A figure with one panel: p_t as a heat map, the flow as thick lines, the SDE as thin ones.

    Raises:
        ShapeError: the mixture is not over events [1].
    """
    process = sde or VP()
    start, model = _quantiles(starts) * process.prior_std, mixture.score_model(process)
    even: dict[str, Any] = {"grid": "uniform", "steps": steps}
    figure, (axes,) = new_figure(6.4, 3.8)
    shade_marginals([axes], mixture, process)
    many = start.repeat(repeats, 1)
    times, states = backward(model, process, many, "euler_maruyama", 1, **even)
    for i in range(starts):
        axes.plot(times, states[:, i::starts, 0], color=colour(i + 1), linewidth=0.5, alpha=0.8)
    times, states = backward(model, process, start, DEFAULT_SOLVER, **even)
    for i in range(starts):
        axes.plot(times, states[:, i, 0], color="white", linewidth=4.0)
        axes.plot(times, states[:, i, 0], color=colour(i + 1), linewidth=2.4)
    axes.set_xlim(process.T, process.t_min)
    title = "thick: probability flow; thin: reverse SDE from the same starts"
    label(axes, "time t  (noise → data)", "x", title)
    return figure


@on_host
def plot_brownian(paths: int = 60, steps: int = 500, seed: int = 0) -> Figure:
    """Brownian motion and its standard deviation sqrt(t).

    Args:
        paths: paths of `BrownianPath`.
        steps: intervals of time, at least 1.
        seed: of the paths.

    Returns:
        A figure of the paths, with the envelopes of one and of two standard deviations, and the
        share of paths inside them at t = 1.
    """
    times = torch.linspace(0, 1, whole_number("steps", steps) + 1, dtype=F64)
    path, like = BrownianPath(Philox(seed), 0.0, 1.0), torch.empty(paths, 1, dtype=F64)
    walks = _walks(path, like, times.tolist())[..., 0]
    figure, (axes,) = new_figure(6.4, 3.6)
    axes.plot(times, walks, color=COLOURS[0], linewidth=0.5, alpha=0.5)
    for factor, style in ((1, "-"), (2, "--")):
        inside = float((walks[-1].abs() <= factor).double().mean())
        for sign in (-1, 1):
            axes.plot(times, sign * factor * times.sqrt(), style, color=COLOURS[1], linewidth=1.6)
        text = f"±{'' if factor == 1 else factor}√t   {inside:.0%}"
        axes.text(1.01, factor, text, fontsize=9, color=COLOURS[1], va="center")
    axes.set_xlim(0, 1)
    label(axes, "time t", "W(t)", f"{paths} Brownian paths, and how many end within")
    return figure


@on_host
def plot_score(
    mixture: GaussianMixture,
    sde: GaussianSDE | None = None,
    times: Sequence[float] = (0.02, 0.2, 0.4, 0.8),
) -> Figure:
    """The score of p_t as a field of arrows over its density, at several times.

    Args:
        mixture: the data, over events [2].
        sde: the process; `VP()` if omitted.
        times: times in (0, T], a panel each.

    Returns:
        A figure; the arrows show the direction of the score, and sigma |score| by their length.

    Raises:
        ShapeError: the mixture is not over events [2].
    """
    process = sde or VP()
    figure, row = new_figure(0.4 + 2.7 * len(times), 3.1, columns=len(times), share=True)
    for axes, t in zip(row, times, strict=True):
        draw_score(axes, mixture, process, t)
        label(axes, "x₁", "x₂" if axes is row[0] else "", f"t = {t:g}")
    return figure


def draw_score(axes: Axes, mixture: GaussianMixture, sde: GaussianSDE, t: float) -> None:
    """p_t in shades and its score, times sigma, in arrows on `axes`."""
    shade_plane(axes, mixture, mixture.marginal(sde, t))
    reach = axes.get_xlim()[1]
    side = torch.linspace(-0.9 * reach, 0.9 * reach, 15, dtype=F64)
    x = torch.cartesian_prod(side, side)
    arrows = sde.sigma(t) * mixture.score_model(sde)(x, t)
    length = arrows.norm(dim=1, keepdim=True)
    arrows = arrows / length * length.clamp(max=3.0)
    axes.quiver(*x.T, *arrows.T, color=COLOURS[1], scale=45, width=0.006, pivot="mid")


def shade_marginals(
    panels: Sequence[Axes], mixture: GaussianMixture, sde: GaussianSDE, reach: float | None = None
) -> None:
    """p_t over its maximum at each t, as a heat map of t and x, up to `reach`, on each panel."""
    if mixture.event_shape != (1,):
        raise ShapeError(f"the mixture is over events {tuple(mixture.event_shape)}: need (1,)")
    t, reach = torch.linspace(sde.t_min, sde.T, 300, dtype=F64), reach or reach_of(mixture, sde)
    x = torch.linspace(-reach, reach, 400, dtype=F64)
    pairs = torch.cartesian_prod(t, x)
    p = mixture.score_model(sde).log_prob(pairs[:, 1:], pairs[:, 0]).reshape(300, 400).exp()
    shade = (p / p.amax(1, keepdim=True)).T
    for axes in panels:
        axes.imshow(  # triangles shaded by pcolormesh take ten times as long
            shade,
            cmap=DENSITY,
            vmin=0,
            vmax=1.3,
            extent=(sde.t_min, sde.T, -reach, reach),
            origin="lower",
            aspect="auto",
            interpolation="bilinear",
        )
        axes.set_ylim(-reach, reach)


def reach_of(mixture: GaussianMixture, sde: GaussianSDE) -> float:
    """A distance from 0 that nearly all of p_t stays within, at both ends."""
    ends = (mixture.marginal(sde, t).sample(2000).abs().max() for t in (sde.t_min, sde.T))
    return 0.85 * float(max(ends))


def _quantiles(n: int) -> Tensor:
    """Evenly spaced quantiles of the standard normal, [n, 1]."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
    return quantiles[:, None]
