"""Libraries that a benchmark would compare with and that are not there."""

from __future__ import annotations

from collections.abc import Iterable

from scoresolve.peers import installed

__all__ = ["absent"]


def absent(libraries: Iterable[str]) -> set[str]:
    """Those of the libraries that are not installed, with a word that they are left out."""
    missing = {library for library in libraries if not installed(library)}
    if missing:
        print(f"not installed, so left out: {', '.join(sorted(missing))}")
    return missing
