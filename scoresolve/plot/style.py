"""How every picture looks: colours, axes, labels.

Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

__all__ = [
    "COLOURS",
    "DENSITY",
    "FAINT",
    "INK",
    "MUTED",
    "colour",
    "label",
    "label_ends",
    "line",
    "log_log",
    "new_figure",
    "on_host",
]

from scoresolve.precision import default_on_host

P = ParamSpec("P")
R = TypeVar("R")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#555555")
MARKERS = "osD^vPX*"
INK, MUTED, FAINT = "#222222", "#666666", "#E3E3E3"
DENSITY = LinearSegmentedColormap.from_list("density", ["#FFFFFF", "#C9DDEE", "#5B9BC8", "#123F66"])


def on_host(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorates what draws: matplotlib reads the host's memory, whatever torch's default device."""

    @functools.wraps(draw)
    def drawn(*values: P.args, **named: P.kwargs) -> R:
        with default_on_host():
            return draw(*values, **named)

    return drawn


def new_figure(
    width: float, height: float, columns: int = 1, share: bool = False, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    row = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flatten()
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    return figure, list(row)


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def line(i: int, strong: bool = False) -> dict[str, Any]:
    return {
        "color": colour(i),
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4.5,
        "markeredgewidth": 0,
        "linewidth": 2.4 if strong else 1.4,
        "zorder": 3 if strong else 2,
    }


def log_log(axes: Axes, ticks: Iterable[int]) -> None:
    """Logarithmic axes with these numbers under them, but for those that would overlap."""
    places = sorted(ticks)
    apart, ticks = (places[-1] / places[0]) ** 0.08, places[:1]
    for place in places[1:]:
        if place > ticks[-1] * apart:
            ticks.append(place)
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) to the right of a log axis, at its value but clear of others."""
    if not ends:
        return
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
