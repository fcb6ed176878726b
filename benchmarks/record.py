"""What is kept of a benchmark: its rows with the command, the versions, the machine and the day.

    {"name", "setting", "command", "date", "seconds", "commit", "versions", "machine", "rows"}

JSON has no infinity, so a figure that is not finite is kept as text.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import scoresolve
from scoresolve.files import write_whole
from scoresolve.json_text import json_text

__all__ = ["Record", "Row", "machine", "text_table", "versions"]

Row = dict[str, object]
OURS = ("scoresolve", "torch", "numpy", "scipy")
PEERS = (
    "diffusers",
    "k-diffusion",
    "azula",
    "torchdiffeq",
    "torchsde",
    "torchode",
    "flow_matching",
    "blackjax",
    "jax",
    "arviz-stats",
)


def versions() -> dict[str, str]:
    """Python's version, ours, that of what we stand on, and of every other library installed."""
    found = {"python": platform.python_version(), "scoresolve": scoresolve.__version__}
    for name in (*OURS, *PEERS):
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """The processor, its cores, the threads that torch uses, the platform, and the GPU if any."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, with a plus if files differ from it; None outside of one."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + "+" * bool(git("status", "--porcelain")) if commit else None
    except OSError:
        return None


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        name: of the benchmark.
        setting: "small" or "full".
        command: that runs it again.
        rows: figures, one dictionary a line of the table.
        seconds: that it took.
        date: when it ended, UTC, ISO 8601.
        commit: of the source tree, with a plus if files differed; None if unknown.
        versions, machine: by name.
    """

    name: str
    setting: str
    command: str
    rows: list[Row]
    seconds: float
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    commit: str | None = field(default_factory=_commit)
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, object] = field(default_factory=machine)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, json_text(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a record.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a record of a benchmark: give a file that --json wrote"
            ) from error


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column of the rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def text_table(rows: Sequence[Row]) -> str:
    """The rows as a table in plain text."""
    names = columns(rows)
    table = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)
