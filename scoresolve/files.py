"""Files that are written whole or not at all.

What is written goes to a new file in the same folder, which takes the name of the old one in one
step once everything is on the disk. Whoever reads sees the old file or the new one, never a part,
also if the disk is full or the program is stopped.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_kept", "whole_file", "write_whole"]


def is_kept(path: Path) -> bool:
    """Whether there is a file at `path` that writing there would replace.

    A pipe, a terminal and what lies in /dev are not: they take what is written as it comes.
    """
    device = Path(os.path.abspath(path)).parts[1:2] == ("dev",)
    return path.is_file() and not device


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to in place of `path`, where the file appears once the block is left.

    Args:
        path: a file, which is replaced if it exists and keeps its permissions; where it is a link,
            what the link points to is replaced. A pipe or device is written to directly.

    Yields:
        A path in the same folder with the same suffix. If the block raises, or the file cannot
        be finished, it is removed, and `path` is as it was.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    path = Path(path)
    if path.exists() and not is_kept(path):
        yield path
        return
    place = Path(os.path.realpath(path))
    aside = place.with_name(f".{secrets.token_hex(6)}{place.suffix}")
    try:
        aside.touch(exist_ok=False)  # with the permissions that any new file gets here
        yield aside
        if place.exists():
            shutil.copymode(place, aside)
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, place)
    except OSError as error:
        if error.filename in (None, str(aside)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
