"""How far networks are from score fields, level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from scoresolve.errors import ArgumentError
from scoresolve.model_check import LIMITS, ModelVerification
from scoresolve.plot.style import COLOURS, FAINT, INK, MUTED, label, line, new_figure

__all__ = ["plot_verification"]

PANELS = {
    "linear": "denoising: error over a linear filter's",
    "calibration": "calibration: variance of errors",
    "fokker_planck": "Fokker-Planck: residual over the error",
    "curl": "curl: antisymmetric part of the Jacobian",
}
"""What is drawn, and how it is titled; the first two around 1, the others from 0."""


def plot_verification(verifications: Mapping[str, ModelVerification]) -> Figure:
    """The four quantities of `verify_model` over the log-SNR, for one or several models.

    Args:
        verifications: results by the name they are shown under, at least one; what one of them did
            not measure is left out.

    Returns:
        A figure of four panels. Bars are three standard errors; a model passes where they reach the
        shaded part. Where the law of the data is known, the error over the least possible is
        dashed.

    Raises:
        ArgumentError: there is nothing to draw, or it has no name.
    """
    if not isinstance(verifications, Mapping):
        raise ArgumentError("give the verifications by name, as {'mine': verify_model(...)}")
    if not verifications:
        raise ArgumentError("there is nothing to draw: give at least one verification")
    figure, row = new_figure(9.6, 6.2, columns=2, rows=2)
    for axes, (measure, title) in zip(row, PANELS.items(), strict=True):
        _limits(axes, measure)
        for i, (name, found) in enumerate(verifications.items()):
            _draw(axes, found, measure, i, label=name)
            if measure == "linear":
                _draw(axes, found, "exact", i, linestyle="--")
        label(axes, "log-SNR  (noise → data)" if axes in row[2:] else "", "", title)
    named = next((axes for axes in row if axes.get_legend_handles_labels()[1]), None)
    if named is not None:
        named.legend(frameon=False, fontsize=9, labelcolor="linecolor", handlelength=1.2)
    return figure


def _limits(axes: Axes, measure: str) -> None:
    limit = LIMITS[measure]
    if measure in ("linear", "calibration"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.axhline(1, color=MUTED, linewidth=0.8)
    if measure == "linear":
        axes.axhspan(1e-3, 1 + limit, color=FAINT, linewidth=0)
        axes.set_ylim(0.3, 1.6)
        axes.set_yticks([0.3, 0.5, 0.7, 1, 1.5])
    elif measure == "calibration":
        axes.axhspan(math.exp(-limit), math.exp(limit), color=FAINT, linewidth=0)
        axes.set_ylim(0.4, 2.5)
        axes.set_yticks([0.5, 0.7, 1, 1.4, 2])
    else:
        axes.axhspan(0, limit, color=FAINT, linewidth=0)
        axes.axhline(0, color=INK, linewidth=0.8)


def _draw(axes: Axes, found: ModelVerification, measure: str, i: int, **style: str) -> None:
    rows = [row for row in found.levels if getattr(row, measure) is not None]
    if not rows:
        return
    values = [getattr(row, measure) for row in rows]
    bars = [[abs(bound - each.value) for bound in each.bounds()] for each in values]
    axes.errorbar(
        [row.log_snr for row in rows],
        [each.value for each in values],
        [*zip(*bars, strict=True)],
        elinewidth=1,
        ecolor=COLOURS[i % len(COLOURS)],
        **{**line(i), **style},
    )
