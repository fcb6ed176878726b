"""Figures and films as files, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.animation import FuncAnimation, writers
from matplotlib.figure import Figure

from scoresolve.errors import ArgumentError
from scoresolve.files import whole_file

__all__ = ["WRITERS", "save_figure", "save_film"]

WRITERS = {".gif": "pillow", ".mp4": "ffmpeg"}
"""Suffixes of moving pictures, and what matplotlib writes them with."""


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, cut to what it holds.

    Args:
        figure: any figure of matplotlib.
        path: the file, of the format that its suffix names, else a PNG; replaced if it exists.

    Raises:
        ArgumentError: matplotlib has no such format.
        OSError: the file cannot be written.
    """
    kind = Path(path).suffix[1:].lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ArgumentError(f"{path}: pictures are written as .{', .'.join(sorted(known))}")
    with whole_file(path) as aside:
        figure.savefig(aside, format=kind, bbox_inches="tight")


def save_film(film: FuncAnimation, path: str | Path) -> None:
    """Write an animation.

    Args:
        film: any animation of matplotlib.
        path: a file ending in .gif or .mp4; replaced if it exists.

    Raises:
        ArgumentError: it has another suffix, or what writes such files is not installed.
        OSError: the file cannot be written.
    """
    require_writer(path)
    with whole_file(path) as aside:
        film.save(aside, writer=WRITERS[Path(path).suffix.lower()], fps=15)


def require_writer(path: str | Path) -> None:
    """Raise `ArgumentError` unless films can be written to `path`."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ArgumentError(f"{path}: moving pictures are written as {' or '.join(WRITERS)}")
    if not writers.is_available(WRITERS[suffix]):
        raise ArgumentError(
            f"{suffix} files are written by {WRITERS[suffix]}, which is not installed"
        )
