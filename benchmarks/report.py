"""Tables and plots from records: `python -m benchmarks report FILES... --out FOLDER`.

Writes `report.md`, with one table and its plots for each record, and the plots as PNG files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.record import Record, Row, columns
from scoresolve.files import write_whole
from scoresolve.plot import save_figure
from scoresolve.plot.style import COLOURS, colour, label, line, log_log, new_figure

__all__ = ["CHARTS", "Bars", "Lines", "markdown_table", "write_report"]


@dataclass(frozen=True)
class Lines:
    """Curves of y over x on logarithmic axes, a panel for each value of `panel`.

    Attributes:
        panel: column that tells the panels apart.
        x: column of the abscissa.
        y: columns of the ordinate; each is a plot of its own if there is `series`, else a curve.
        series: column that tells the curves apart.
        best: draw so many curves a panel, those that are least at the last x.
    """

    panel: str
    x: str
    y: tuple[str, ...]
    series: str = ""
    best: int = 8


@dataclass(frozen=True)
class Bars:
    """A bar for each row, with a line at 1 where equals meet.

    Attributes:
        names: columns that name a row.
        value: column of its length, a ratio.
    """

    names: tuple[str, ...]
    value: str


CHARTS: dict[str, Lines | Bars] = {
    "adaptive": Lines("case", "calls", ("rms",), "method"),
    "adaptive_time": Bars(("case", "width", "method"), "of_peers"),
    "anchors": Bars(("case", "sampler", "nfe"), "ratio"),
    "conditioning": Bars(("task", "method", "solver"), "distance"),
    "digits": Lines("kind", "calls", ("rms", "median", "gap", "distance"), "sampler"),
    "likelihood": Lines("case", "cost", ("rms",), "method"),
    "mcmc": Bars(("target", "kernel"), "ratio"),
    "mcmc_yield": Bars(("kernel",), "ratio"),
    "nfe": Lines("case", "nfe", ("peer_rms", "usual_rms", "our_rms", "fitted_rms")),
    "nfe_peers": Lines("case", "nfe", ("peer_rms", "usual_rms", "our_rms", "fitted_rms")),
    "overhead": Bars(("solver", "shape"), "ratio"),
    "overhead_cuda": Bars(("solver", "shape"), "ratio"),
    "scaling": Lines("axis", "size", ("time_ratio", "memory_mb"), "run"),
    "sde": Lines("case", "calls", ("gap", "variance_error", "distance"), "sampler"),
    "tracing": Bars(("solver",), "trace_s"),
}
"""How each benchmark is drawn."""

PANELS = 6


def _number(value: object) -> float | None:
    """The figure in a cell; None where there is none, or one that a logarithm cannot show."""
    try:
        number = abs(float(str(value)))
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _points(rows: Iterable[Row], x: str, y: str) -> list[tuple[float, float]]:
    pairs = ((_number(row.get(x)), _number(row.get(y))) for row in rows)
    return sorted((a, b) for a, b in pairs if a is not None and b is not None)


def _panels(rows: Sequence[Row], column: str) -> list[str]:
    names = dict.fromkeys(str(row.get(column, "")) for row in rows)
    return [name for name in names if name and name != "geometric mean"][:PANELS]


def _curves(chart: Lines, rows: Sequence[Row], y: str) -> dict[str, list[tuple[float, float]]]:
    """The curves of one panel by name, best first."""
    if not chart.series:
        found = {column: _points(rows, chart.x, column) for column in chart.y}
    else:
        names = dict.fromkeys(str(row[chart.series]) for row in rows)
        found = {
            name: _points((row for row in rows if str(row[chart.series]) == name), chart.x, y)
            for name in names
        }
    kept = sorted((points[-1][1], name) for name, points in found.items() if points)
    return {name: found[name] for _, name in kept[: chart.best]}


def _draw_lines(chart: Lines, rows: Sequence[Row], y: str) -> Figure | None:
    panels = [
        (name, _curves(chart, [row for row in rows if str(row.get(chart.panel)) == name], y))
        for name in _panels(rows, chart.panel)
    ]
    panels = [(name, curves) for name, curves in panels if curves]
    if not panels:
        return None
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure, cells = new_figure(5.6 * across, 3.6 * down, columns=across, rows=down)
    order = {name: i for i, name in enumerate(dict.fromkeys(n for _, c in panels for n in c))}
    for cell, (title, curves) in zip(cells, panels, strict=False):
        places = sorted({x for points in curves.values() for x, _ in points})
        if places[-1] < 1_000:
            log_log(cell, [round(x) for x in places])
        else:
            cell.set(xscale="log", yscale="log")
        for name, points in curves.items():
            ours = name.startswith(("our", "scoresolve"))
            cell.plot(*zip(*points, strict=True), label=name, **line(order[name], ours))
        label(cell, chart.x, y if chart.series else "rms", title)
        cell.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    for cell in cells[len(panels) :]:
        cell.set_visible(False)
    return figure


def _draw_bars(chart: Bars, rows: Sequence[Row]) -> Figure | None:
    bars = [
        (", ".join(str(row.get(name, "")) for name in chart.names), value)
        for row in rows
        if (value := _number(row.get(chart.value))) is not None
    ][:60]
    if not bars:
        return None
    names, values = zip(*bars, strict=True)
    figure, (axes,) = new_figure(7.2, 1.0 + 0.24 * len(bars))
    axes.barh(range(len(bars)), values, color=COLOURS[0], height=0.65)
    axes.axvline(1.0, color=colour(1), linewidth=1.0)
    axes.set_yticks(range(len(bars)), names)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    label(axes, chart.value, "")
    return figure


def _figures(record: Record) -> dict[str, Figure]:
    """The plots of a record by the end of their file's name."""
    chart = CHARTS.get(record.name)
    if chart is None:
        return {}
    if isinstance(chart, Bars):
        drawn = {chart.value: _draw_bars(chart, record.rows)}
    elif chart.series:
        drawn = {y: _draw_lines(chart, record.rows, y) for y in chart.y}
    else:
        drawn = {"errors": _draw_lines(chart, record.rows, "")}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    names = columns(rows)
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")).replace("|", r"\|") for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _section(record: Record, pictures: Sequence[str]) -> str:
    host = record.machine
    used = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    facts = [
        f"- `{record.command}`, {record.setting} setting, {record.seconds:.0f} s, {record.date}",
        f"- {host['cpu']}, {host['cores']} cores, {host['threads']} threads, {host['platform']}"
        + (f", {host['gpu']}" if host.get("gpu") else ""),
        f"- {used}" + (f"; commit {record.commit}" if record.commit else ""),
    ]
    parts = [f"## {record.name}", "\n".join(facts)]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join([*parts, markdown_table(record.rows)])


def write_report(records: Sequence[Record], folder: Path) -> Path:
    """Write the page and its plots.

    Args:
        records: one section each.
        folder: made if it does not exist.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, record in enumerate(records):
        pictures = []
        for end, figure in _figures(record).items():
            name = re.sub(r"\W+", "_", f"{number}_{record.name}_{end}") + ".png"
            save_figure(figure, folder / name)
            pictures.append(name)
        sections.append(_section(record, pictures))
    page = folder / "report.md"
    write_whole(page, "\n\n".join(["# Benchmarks", *sections]) + "\n")
    return page
