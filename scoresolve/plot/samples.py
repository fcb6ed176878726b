"""Samples as points in the plane and as small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresolve.errors import ShapeError
from scoresolve.plot.style import COLOURS, DENSITY, INK, label, new_figure, on_host
from scoresolve.targets import GaussianMixture

__all__ = ["plot_images", "plot_samples", "shade_density", "shade_plane"]


@on_host
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
    figure, row = new_figure(0.4 + 3.1 * len(points), 3.5, columns=len(points), share=True)
    for axes, (title, x) in zip(row, points.items(), strict=True):
        if mixture is not None:
            shade_density(axes, mixture, centre, reach)
        axes.scatter(x[:, 0], x[:, 1], s=5, color=COLOURS[1], alpha=0.6, linewidth=0)
        axes.set_xlim(centre[0] - reach, centre[0] + reach)
        axes.set_ylim(centre[1] - reach, centre[1] + reach)
        axes.set_aspect("equal")
        label(axes, "x₁", "x₂" if axes is row[0] else "", title)
    return figure


def _plane(title: str, x: Tensor) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != 2:
        raise ShapeError(f"{title!r} holds samples of shape {tuple(x.shape)}: give [B, 2]")
    points: np.ndarray = x.detach().cpu().double().numpy()
    good: np.ndarray = points[np.isfinite(points).all(1)]
    return good


def shade_density(axes: Axes, mixture: GaussianMixture, centre: np.ndarray, reach: float) -> None:
    side = torch.linspace(-reach, reach, 240, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side) + torch.from_numpy(centre)
    log_prob = mixture.log_prob(grid).reshape(240, 240).T
    extent = (centre[0] - reach, centre[0] + reach, centre[1] - reach, centre[1] + reach)
    top = float(log_prob.max())
    shades: dict[str, Any] = {"cmap": DENSITY, "vmin": top - 8, "vmax": top + 2}
    axes.imshow(log_prob, origin="lower", extent=extent, interpolation="bilinear", **shades)


def shade_plane(axes: Axes, mixture: GaussianMixture, law: GaussianMixture | None = None) -> None:
    """The density of `law`, or of the mixture itself, on axes that hold nearly all of the mixture.

    Raises:
        ShapeError: the mixture is not over events [2].
    """
    if mixture.event_shape != (2,):
        raise ShapeError(f"the mixture is over events {tuple(mixture.event_shape)}: need (2,)")
    reach = 1.15 * float(mixture.sample(2000).abs().max())
    shade_density(axes, law or mixture, np.zeros(2), reach)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")


@on_host
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
    figure, row = new_figure(4.2 * len(pages), 4.2 * tallest + 0.35, columns=len(pages))
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
