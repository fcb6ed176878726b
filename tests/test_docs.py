"""Every code block of the documentation runs and prints what the page says it prints.

Python blocks run in order in one namespace a page, console blocks that start with `$ scoresolve`
through the command line, both in an empty directory; docstring examples run likewise.
"""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from sybil import Example, Sybil
from sybil.evaluators.doctest import NUMBER, OutputChecker
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | NUMBER
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(ROOT.glob("scoresolve/**/*.py"))
# Pages that print what hangs on the rounding of a machine.
FIGURES = {"distances", "kernels", "noise"}
# Languages of blocks that are shown and not run.
SHOWN = {"", "sh", "text", "toml", "math"}


def run_console(example: Example) -> str | None:
    """Run each `$ scoresolve ...` of a block; any output below it must match."""
    from scoresolve.cli import main

    session = example.parsed.replace("\\\n", " ")
    for command, expected in re.findall(r"^\$ (.*)\n?((?:(?!\$ ).*\n?)*)", session, re.MULTILINE):
        program, *arguments = shlex.split(command)
        if program != "scoresolve":
            return f"a console block runs scoresolve alone, not {program}: show it in a sh block"
        result = CliRunner().invoke(main, arguments)
        if result.exit_code:
            return f"{command}\nexit code {result.exit_code}\n{result.output}\n{result.exception!r}"
        if expected and not OutputChecker().check_output(expected, result.output, OPTIONS):
            return f"{command}\nexpected:\n{expected}\ngot:\n{result.output}"
    return None


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=OPTIONS),
        CodeBlockParser("console", run_console),
    ]
)
DOCSTRINGS = Sybil(parsers=[DocTestParser(OPTIONS)])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(path: Path) -> list[str]:
    """The languages of the fenced blocks of a page, directives left out."""
    opened = re.findall(
        r"^ *`{3,}([^\n]*)\n.*?^ *`{3,}$", path.read_text(), re.MULTILINE | re.DOTALL
    )
    return [language.strip() for language in opened if not language.startswith("{")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.arithmetic] if page.stem in FIGURES else [])
        for page in PAGES
        if {"python", "console"} & set(fences(page))
    ],
    ids=relative,
)
def test_the_code_of_the_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in SYBIL.parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_block_of_the_page_is_run_or_known_to_be_shown_only(page: Path) -> None:
    assert set(fences(page)) <= SHOWN | {"python", "console"}


@pytest.mark.parametrize(
    "module", [path for path in MODULES if ">>> " in path.read_text()], ids=relative
)
def test_the_examples_in_the_docstrings_hold(module: Path) -> None:
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    document = DOCSTRINGS.parse(module)
    document.namespace.update(vars(importlib.import_module(name)))
    for example in document.examples():
        example.evaluate()
