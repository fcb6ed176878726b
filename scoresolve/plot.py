"""Pictures of solvers, grids, flows and samples, each a `matplotlib.figure.Figure`.

What is drawn is computed, never sketched: orders from exact laws, p_t = sum_k pi_k N(alpha mu_k,
alpha^2 Sigma_k + sigma^2 I) in closed form, trajectories by the solvers themselves. Colours are
those of Okabe and Ito, told apart by colour-blind readers, and lines carry their own labels.

    plot_orders([...]).savefig("orders.png")        picture("orders").savefig("orders.png")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from torch import Tensor

from scoresolve.certificates import MEAN, VARIANCE, measured_order
from scoresolve.digits import load_network
from scoresolve.errors import ArgumentError, ShapeError, known_name
from scoresolve.grid import make_grid
from scoresolve.metrics import Comparison, Method, class_mixture, compare
from scoresolve.models import from_denoiser
from scoresolve.plans import StepReport
from scoresolve.sampling import DEFAULT_SOLVER, plan, sample
from scoresolve.sde import EDM, VP, GaussianSDE
from scoresolve.targets import GaussianMixture, ring

__all__ = [
    "PICTURES",
    "picture",
    "plot_flow",
    "plot_grids",
    "plot_images",
    "plot_orders",
    "plot_samples",
    "plot_strong_errors",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#555555")
MARKERS = "osD^vPX*"
INK, MUTED, FAINT = "#222222", "#666666", "#E3E3E3"
DENSITY = LinearSegmentedColormap.from_list("density", ["#FFFFFF", "#C9DDEE", "#5B9BC8", "#123F66"])


def plot_orders(
    solvers: Sequence[str] = ("ddim", "dpmpp_2m", "heun", "ab3_v", "ab4_v", "ddpm"),
    sde: GaussianSDE | None = None,
    steps: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
) -> Figure:
    """Error against steps on Gaussian data, from exact laws.

    The error is the 2-Wasserstein distance between the output law and the exact one, between the
    log-SNR levels -3 and 3 on the angle grid, where `certify` measures orders.

    Args:
        solvers: names of fixed-grid solvers with an exact law.
        sde: the process; `VP()` if omitted.
        steps: increasing numbers of steps, at least two.

    Returns:
        A figure with one line per solver, labelled with its measured order.

    Raises:
        UnknownNameError, ArgumentError: a solver is unknown, or its law is not exact.
    """
    process = sde or VP()
    ends = process.time_from_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    grids = [make_grid("cosine", process, n, *ends) for n in steps]
    figure, (axes,) = _figure(6.4, 4.0)
    _log_log(axes, steps)
    ends_of = []
    for i, name in enumerate(solvers):
        plans = [plan(name, process, grid) for grid in grids]
        errors = [p.law(MEAN, VARIANCE, start="marginal").wasserstein for p in plans]
        order = measured_order(steps, errors)
        axes.plot(steps, errors, **_line(i))
        shown = "exact" if math.isinf(order) else f"order {order:.2f}"
        ends_of.append((errors[-1], f"{name}  {shown}", _colour(i)))
    axes.set_ylim(bottom=1e-13)
    _label(axes, "steps", "2-Wasserstein error of the output law")
    _label_ends(axes, ends_of)
    return figure


def plot_grids(
    names: Sequence[str] = (
        "sqrt_angle",
        "cosine",
        "quadratic",
        "flow",
        "shift",
        "karras",
        "log_snr",
        "uniform",
        "beta",
    ),
    sde: GaussianSDE | None = None,
    steps: int = 12,
) -> Figure:
    """Where named grids put their nodes, on the axis of the noise level sigma/alpha.

    Args:
        names: names of `GRIDS` that fit the process.
        sde: the process; `VP()` if omitted.
        steps: steps of each grid, at least 1.

    Returns:
        A figure with one row of nodes per grid.

    Raises:
        UnknownNameError, ArgumentError: a grid is unknown, or does not fit the process.
    """
    process = sde or VP()
    figure, (axes,) = _figure(6.4, 0.7 + 0.33 * len(names))
    for row, name in enumerate(names):
        times = torch.tensor(make_grid(name, process, steps).times, dtype=torch.float64)
        level = (-process.log_snr(times) / 2).exp().tolist()
        axes.plot(level, [row] * len(level), color=FAINT, linewidth=1.2, zorder=1)
        axes.scatter(level, [row] * len(level), s=26, color=COLOURS[0], linewidth=0, zorder=2)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _label(axes, "noise level σ/α  (noise → data)", "", f"{steps} steps on {process}")
    return figure


def plot_samples(panels: Mapping[str, Tensor], mixture: GaussianMixture | None = None) -> Figure:
    """Samples in the plane, over the density they should follow.

    Args:
        panels: samples [B, 2] by title, one panel each; rows that are not finite are left out.
        mixture: the density to draw underneath, on a logarithmic scale; none if omitted.

    Returns:
        A figure with a panel for each entry, all on the same axes.

    Raises:
        ShapeError: samples are not [B, 2], or there are none.
    """
    points = {title: _plane(title, x) for title, x in panels.items()}
    known = [*points.values()] if mixture is None else [mixture.sample(2000).cpu().numpy()]
    if not points or not sum(map(len, known)):
        raise ShapeError("there is nothing to draw: give at least one panel with finite samples")
    low, high = np.concatenate(known).min(0), np.concatenate(known).max(0)
    centre, reach = (low + high) / 2, 0.58 * float((high - low).max()) or 1.0
    figure, row = _figure(0.4 + 3.1 * len(points), 3.5, columns=len(points), share=True)
    for axes, (title, x) in zip(row, points.items(), strict=True):
        if mixture is not None:
            _density(axes, mixture, centre, reach)
        axes.scatter(x[:, 0], x[:, 1], s=5, color=COLOURS[1], alpha=0.6, linewidth=0)
        axes.set_xlim(centre[0] - reach, centre[0] + reach)
        axes.set_ylim(centre[1] - reach, centre[1] + reach)
        axes.set_aspect("equal")
        _label(axes, "x₁", "x₂" if axes is row[0] else "", title)
    return figure


def _plane(title: str, x: Tensor) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != 2:
        raise ShapeError(f"{title!r} holds samples of shape {tuple(x.shape)}: give [B, 2]")
    points: np.ndarray = x.detach().cpu().double().numpy()
    good: np.ndarray = points[np.isfinite(points).all(1)]
    return good


def _density(axes: Axes, mixture: GaussianMixture, centre: np.ndarray, reach: float) -> None:
    side = torch.linspace(-reach, reach, 240, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side) + torch.from_numpy(centre)
    log_prob = mixture.log_prob(grid).reshape(240, 240).T
    extent = (centre[0] - reach, centre[0] + reach, centre[1] - reach, centre[1] + reach)
    top = float(log_prob.max())
    shades: dict[str, Any] = {"cmap": DENSITY, "vmin": top - 8, "vmax": top + 2}
    axes.imshow(log_prob, origin="lower", extent=extent, interpolation="bilinear", **shades)


def plot_flow(
    mixture: GaussianMixture,
    sde: GaussianSDE | None = None,
    paths: int = 12,
    steps: int = 300,
    seed: int = 0,
) -> Figure:
    """The marginals p_t of a density on the line, and paths of both reverse equations through them.

    Args:
        mixture: the data, over events [1].
        sde: the process; `VP()` if omitted.
        paths: number of paths; they start at evenly spaced quantiles of the prior.
        steps: steps of the solvers, at least 1.
        seed: of the SDE's noise.

    Returns:
        A figure with two panels, the probability flow and the reverse SDE from equal starts. Each
        column of the heat map is p_t over its maximum.

    Raises:
        ShapeError: the mixture is not over events [1].
    """
    if mixture.event_shape != (1,):
        raise ShapeError(f"the mixture is over events {tuple(mixture.event_shape)}: need (1,)")
    process = sde or VP()
    model = mixture.score_model(process)
    start = torch.special.ndtri((torch.arange(paths, dtype=torch.float64) + 0.5) / paths)
    t = torch.linspace(process.t_min, process.T, 300, dtype=torch.float64)
    ends = torch.stack([mixture.marginal(process, s).sample(2000).abs().max() for s in t[[0, -1]]])
    reach = 0.85 * float(ends.max())
    x = torch.linspace(-reach, reach, 400, dtype=torch.float64)
    pairs = torch.cartesian_prod(t, x)
    p = model.log_prob(pairs[:, 1:], pairs[:, 0]).reshape(300, 400).exp()
    shade = (p / p.amax(1, keepdim=True)).T.numpy()
    figure, row = _figure(8.2, 3.4, columns=2, share=True)
    panels = {"probability flow (ODE)": DEFAULT_SOLVER, "reverse SDE": "euler_maruyama"}
    for axes, (title, solver) in zip(row, panels.items(), strict=True):
        begin = start[:, None] * process.prior_std
        track = [(process.T, begin)]
        note = partial(_note, track)
        sample(
            model,
            process,
            x=begin,
            solver=solver,
            grid="uniform",
            steps=steps,
            seed=seed,
            callback=note,
        )
        axes.pcolormesh(t, x, shade, cmap=DENSITY, vmin=0, vmax=1.3, shading="gouraud")
        lines = torch.stack([state[:, 0] for _, state in track]).numpy()
        axes.plot([time for time, _ in track], lines, color=COLOURS[1], linewidth=0.9)
        axes.set_xlim(process.T, process.t_min)
        axes.set_ylim(-reach, reach)
        _label(axes, "time t  (noise → data)", "x" if axes is row[0] else "", title)
    return figure


def _note(track: list[tuple[float, Tensor]], step: StepReport) -> None:
    track.append((step.t, step.x))


def plot_images(panels: Mapping[str, Tensor], columns: int = 10) -> Figure:
    """Pages of small images.

    Args:
        panels: images [B, 1 or 3, H, W], nominally in [-1, 1], by title; one page each, side by
            side. Values outside are cut; images that are not finite are left blank.
        columns: images in a row, at least 1.

    Returns:
        A figure of grey or colour pages.

    Raises:
        ShapeError: a panel does not hold images, or there is none.
    """
    if not panels or columns < 1:
        raise ShapeError("there is nothing to draw: give at least one panel and one column")
    pages = [_page(title, x, columns) for title, x in panels.items()]
    tallest = max(page.shape[0] / page.shape[1] for page in pages)
    figure, row = _figure(4.2 * len(pages), 4.2 * tallest + 0.35, columns=len(pages))
    for axes, page, title in zip(row, pages, panels, strict=True):
        axes.imshow(page, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10, color=INK, loc="left")
    return figure


def _page(title: str, x: Tensor, columns: int) -> np.ndarray:
    """Grey values [H', W'] or colours [H', W', 3] in [0, 1], with white lines between images."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise ShapeError(f"{title!r} holds shape {tuple(x.shape)}: give images [B, 1 or 3, H, W]")
    batch, channels, height, width = x.shape
    columns = min(columns, batch)
    rows, gap = -(-batch // columns), max(1, height // 16)
    shown = ((x.detach().cpu().double() + 1) / 2).clamp(0, 1).nan_to_num(nan=1.0)
    page = torch.ones(rows * columns, channels, height + gap, width + gap, dtype=shown.dtype)
    page[:batch, :, :height, :width] = shown
    page = page.reshape(rows, columns, channels, height + gap, width + gap)
    page = page.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), -1)
    whole: np.ndarray = page[:-gap, :-gap].squeeze(2).numpy()
    return whole


def plot_strong_errors(comparison: Comparison) -> Figure:
    """Strong error against network calls, on logarithmic axes.

    Args:
        comparison: from `metrics.compare`; stochastic methods have no strong error and are left
            out.

    Returns:
        A figure with two panels, the RMS over the starts and the median.

    Raises:
        ArgumentError: no method of the comparison is deterministic.
    """
    methods = dict.fromkeys(row.method for row in comparison.landings if row.rms is not None)
    if not methods:
        raise ArgumentError("every method draws noise, so none has a strong error: add another")
    figure, row = _figure(9.6, 4.0, columns=2, share=True)
    budgets = sorted({landing.budget for landing in comparison.landings})
    for axes, kind in zip(row, ("rms", "median"), strict=True):
        _log_log(axes, budgets)
        ends = []
        for i, method in enumerate(methods):
            landings = comparison.of(method)
            errors = [getattr(landing, kind) for landing in landings]
            axes.plot([landing.nfe for landing in landings], errors, **_line(i, method.is_default))
            name = f"{method} (default)" if method.is_default else str(method)
            ends.append((errors[-1], name, _colour(i)))
        what = f"strong error, {'RMS' if kind == 'rms' else 'median'} of {comparison.starts} starts"
        _label(axes, "network calls (NFE)", "distance to the exact flow" * (kind == "rms"), what)
    # 1e0 and more is off by whole modes; nothing is to be told apart there
    row[0].set_ylim(top=1.5)
    _label_ends(row[1], ends)
    return figure


def _figure(
    width: float, height: float, columns: int = 1, share: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    row = figure.subplots(1, columns, squeeze=False, sharex=share, sharey=share)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    return figure, list(row)


def _label(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _line(i: int, strong: bool = False) -> dict[str, Any]:
    return {
        "color": _colour(i),
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4.5,
        "markeredgewidth": 0,
        "linewidth": 2.4 if strong else 1.4,
        "zorder": 3 if strong else 2,
    }


def _log_log(axes: Axes, ticks: Iterable[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) to the right of a log axis, at its value but clear of others."""
    low, high = np.log(axes.get_ylim())
    ordered = sorted(ends)
    places = [(math.log(max(value, 1e-300)) - low) / (high - low) for value, _, _ in ordered]
    places = [min(max(place, 0.0), 1.0) for place in places]
    gap = 0.055
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    excess = max(0.0, places[-1] - 1.0)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 - gap * (len(places) - 1 - i)) if excess else places[i]
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            text, (1.02, place), xycoords="axes fraction", color=colour, fontsize=9, va="center"
        )


def _picture_samples() -> Figure:
    mixture, sde = ring(std=0.3), VP()
    panels = {
        "exact": mixture.sample(800),
        **{
            f"{method}, 10 calls": sample(
                mixture.score_model(sde),
                sde,
                shape=(800, 2),
                solver=method.solver,
                grid=method.grid,
                nfe=10,
            ).x
            for method in (Method(DEFAULT_SOLVER), Method("dpmpp_2m", "karras"))
        },
    }
    return plot_samples(panels, mixture)


def _picture_flow() -> Figure:
    return plot_flow(GaussianMixture([0.3, 0.5, 0.2], [[-1.6], [0.4], [1.9]], [0.04, 0.05, 0.02]))


def _picture_digits() -> Figure:
    out = sample(from_denoiser(load_network()), EDM(), shape=(100, 1, 8, 8), nfe=20)
    return plot_images({f"100 digits, {out.nfe} network calls": out.x})


def _picture_solvers() -> Figure:
    return plot_strong_errors(compare(class_mixture(), EDM(), starts=128))


PICTURES: dict[str, tuple[str, Callable[[], Figure]]] = {
    "orders": ("error against steps, from the exact law of each solver", plot_orders),
    "grids": ("where the named time grids put their nodes", plot_grids),
    "samples": ("samples of a ring of Gaussians over its density", _picture_samples),
    "flow": ("p_t over time with probability-flow and SDE paths", _picture_flow),
    "digits": ("digits drawn from the bundled network", _picture_digits),
    "solvers": ("strong error against network calls on a mixture", _picture_solvers),
}
"""Pictures by name: what they show, and how they are made."""


def picture(name: str) -> Figure:
    """The picture of the given name of `PICTURES`.

    Raises:
        UnknownNameError: no such picture.
    """
    return PICTURES[known_name("picture", name, PICTURES)][1]()
