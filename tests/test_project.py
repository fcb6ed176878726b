"""The files around the code agree with one another and with the code."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import scoresolve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def test_readme_sets_up_in_two_lines_one_for_the_main_job_and_one_for_the_tests() -> None:
    main_job, tests = SETUP
    assert main_job.endswith("/bin/scoresolve demo")
    assert tests.endswith("/bin/pytest")
    assert all("pip install -c constraints.txt" in line for line in SETUP)


def test_other_pages_repeat_the_set_up_word_for_word() -> None:
    lines = [re.findall(r"^python3 -m venv .*$", page.read_text(), re.MULTILINE) for page in PAGES]
    assert {line for page in lines for line in page} == set(SETUP)


def test_ci_takes_its_test_command_from_the_readme() -> None:
    (pattern,) = re.findall(r"grep -E '(.*)' README\.md", CI)
    assert re.findall(pattern, README, re.MULTILINE) == [SETUP[1]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_pre_commit_runs_checks_of_ci() -> None:
    entries = re.findall(
        r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    assert entries
    assert all(f".venv-test/bin/{entry}" in CI for entry in entries)


def test_version_is_the_same_everywhere() -> None:
    (newest, *_) = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["project"]["version"] == scoresolve.__version__ == newest


def test_constraints_pin_every_requirement_to_a_version_it_allows() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["fit"] + extras["test"] + extras["docs"]
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in map(Requirement, wanted):
        if requirement.name != "scoresolve":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_and_page_that_is_linked_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 200_000 for path in ROOT.glob("docs/images/*"))
