"""Markov chains: on a density in the plane, and how they mix."""

from __future__ import annotations

import torch
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from scoresolve.diagnostics import diagnose
from scoresolve.errors import known_name
from scoresolve.monte_carlo import Chains, run_chains
from scoresolve.plot.motion import PAUSE, moving
from scoresolve.plot.samples import shade_plane
from scoresolve.plot.style import COLOURS, FAINT, INK, colour, label, line, new_figure, on_host
from scoresolve.targets import GaussianMixture

__all__ = ["animate_chains", "plot_chains", "plot_diagnostics"]

KERNELS = {"ula": (0.05, 1), "mala": (0.05, 1), "baoab": (0.15, 1), "hmc": (0.15, 10)}
"""Kernels that are shown, their step sizes and the score calls of a step."""


@on_host
def plot_chains(
    mixture: GaussianMixture, chains: int = 4, calls: int = 400, seed: int = 0
) -> Figure:
    """Chains of several kernels over the density they sample, from equal starts.

    Args:
        mixture: the density, over events [2].
        chains: chains of each kernel, in colours of their own; they start near the centre.
        calls: score calls of each chain, at least 10.
        seed: of all noise.

    Returns:
        A figure with a panel for each kernel, titled with its score calls.

    Raises:
        ShapeError: the mixture is not over events [2].
    """
    figure, row = new_figure(0.4 + 2.8 * len(KERNELS), 3.2, columns=len(KERNELS), share=True)
    for axes, name in zip(row, KERNELS, strict=True):
        shade_plane(axes, mixture)
        states, spent = _states(mixture, name, chains, calls, seed)
        for i in range(chains):
            axes.plot(*states[:, i].T, color=colour(i + 1), linewidth=0.6, marker=".", markersize=2)
        label(axes, "x₁", "x₂" if axes is row[0] else "", f"{name}, {spent} score calls")
    return figure


@on_host
def animate_chains(
    mixture: GaussianMixture,
    kernel: str = "mala",
    chains: int = 300,
    frames: int = 60,
    seed: int = 0,
) -> FuncAnimation:
    """Many chains of one kernel that spread over a density from its middle.

    Args:
        mixture: the density, over events [2].
        kernel: "ula", "mala", "baoab" or "hmc".
        chains: how many.
        frames: frames of four steps each, at least 1.
        seed: of all noise.

    Raises:
        ShapeError: the mixture is not over events [2].
    """
    calls = 4 * frames * KERNELS[known_name("kernel", kernel, KERNELS)][1]
    figure, (axes,) = new_figure(4.2, 4.4)
    shade_plane(axes, mixture)
    states, _ = _states(mixture, kernel, chains, calls, seed)
    (points,) = axes.plot(*states[0].T, ".", markersize=3, color=INK, alpha=0.7)

    def draw(frame: int) -> list[Artist]:
        step = 4 * min(frame, frames)
        points.set_data(*states[step].T.numpy())
        label(axes, "x₁", "x₂", f"{chains} chains, {kernel}, step {step}")
        return []

    return moving(figure, draw, frames + 1 + PAUSE)


def _states(
    mixture: GaussianMixture, kernel: str, chains: int, calls: int, seed: int
) -> tuple[Tensor, int]:
    """States [steps + 1, chains, 2] from starts near the origin, and the score calls of one."""
    step_size, each = KERNELS[kernel]
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(chains, 2, dtype=torch.float64, generator=generator)
    found = run_chains(
        mixture, x=x, kernel=kernel, step_size=step_size, steps=calls // each, seed=seed
    )
    assert found.samples is not None
    return torch.cat([x[None], found.samples]), found.nfe


@on_host
def plot_diagnostics(chains: Chains, shown: int = 4) -> Figure:
    """How the worst coordinate of some chains mixes.

    Args:
        chains: of `run_chains`, which kept its samples; at least 32 draws.
        shown: chains whose trace is drawn, at least 1.

    Returns:
        A figure with three panels: traces, the mean autocorrelation over the lag, and the effective
        samples of all chains so far, with R-hat, over the draws.

    Raises:
        ArgumentError, ShapeError, ScoresolveError: as `diagnose`.
    """
    whole = diagnose(chains)
    assert chains.samples is not None
    worst = int(whole.ess_bulk.flatten().argmin())
    x = chains.samples.flatten(2)[..., worst][:, chains.ok].double().cpu()
    figure, row = new_figure(11.0, 3.2, columns=3)
    shown = min(shown, whole.chains)
    for i in range(shown):
        row[0].plot(x[:, i], color=colour(i), linewidth=0.6)
    label(row[0], "draw", f"coordinate {worst}", f"{shown} of {whole.chains} chains")

    from arviz_stats.base import array_stats

    tau = float(whole.autocorrelation_time.flatten()[worst])
    lags = min(len(x) // 2, max(10, round(6 * tau)))
    rho = array_stats.autocorr(x.mT.contiguous().numpy()).mean(0)[:lags]
    row[1].axhline(0, color=FAINT, linewidth=1)
    row[1].bar(range(lags), rho, color=COLOURS[0], width=0.8)
    label(row[1], "lag", "autocorrelation", f"one in {tau:.1f} draws is independent")

    parts = [len(x) * k // 8 for k in range(1, 9)]
    found = [diagnose(x[:n]) for n in parts]
    row[2].plot(parts, [float(part.ess_bulk) for part in found], **line(0))
    for n, part in zip(parts[1::2], found[1::2], strict=True):
        text = f"R̂ {float(part.rhat):.3f}"
        row[2].annotate(
            text, (n, float(part.ess_bulk)), (-4, 6), textcoords="offset points", ha="right", size=8
        )
    label(row[2], "draws", "effective samples", "of all chains together, so far")
    return figure
