"""A file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scoresolve.files import whole_file, write_whole


def test_a_file_appears_when_it_is_whole_and_the_old_one_stays_if_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as aside:
        aside.write_text("half")
        assert (aside.parent, aside.suffix, path.read_text()) == (tmp_path, ".txt", "old")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    write_whole(path, "σ")
    assert path.read_bytes() == "σ".encode()
    assert [*tmp_path.iterdir()] == [path]


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    old, new, plain = (tmp_path / name for name in ("old", "new", "plain"))
    old.touch()
    old.chmod(0o640)
    plain.touch()
    for path in (old, new):
        write_whole(path, "x")
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode == plain.stat().st_mode


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, place = tmp_path / "link.txt", tmp_path / "far" / "place.txt"
    link.symlink_to(place)
    write_whole(link, "x")
    assert link.is_symlink()
    assert place.read_text() == "x"


def test_a_pipe_takes_what_is_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "x")
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    assert pipe.is_fifo()
