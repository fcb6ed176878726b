"""The main job, on a small setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scoresolve.demo import DemoReport, DemoSettings, run_demo
from scoresolve.metrics import Method

SMALL = DemoSettings(
    count=10,
    nfe=6,
    held_out=12,
    likelihood_cost=64,
    starts=8,
    budgets=(5, 10),
    methods=(Method("ab2_v", "flow"), Method("dpmpp_2m", "karras"), Method("ddpm", "karras")),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", SMALL)


def test_the_page_holds_every_part_and_needs_no_other_file(report: DemoReport) -> None:
    page = report.page.read_text(encoding="utf-8")
    assert f"{report.bits_per_dim:.3f}" in page
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert "$" not in page
    for method in SMALL.methods:
        assert str(method) in page


def test_figures_lie_beside_the_page(report: DemoReport) -> None:
    folder = report.page.parent
    assert (folder / "digits.png").stat().st_size > 1_000
    assert (folder / "solvers.png").stat().st_size > 1_000
    figures = json.loads((folder / "report.json").read_text())
    assert figures["bits_per_dim"] == report.bits_per_dim
    assert len(figures["comparison"]["landings"]) == 6


def test_the_network_beats_the_uniform_guess_by_far(report: DemoReport) -> None:
    assert report.bits_per_dim + 5 * report.bits_error < 2.6
    assert report.bits_error < 0.3


def test_the_same_seed_gives_the_same_figures(report: DemoReport, tmp_path: Path) -> None:
    again = run_demo(tmp_path, SMALL)
    assert again.bits_per_dim == pytest.approx(report.bits_per_dim, abs=1e-5)
    assert again.comparison == report.comparison


def test_the_summary_states_what_was_done(report: DemoReport) -> None:
    summary = report.summary()
    assert "10 digits drawn with 6 network calls" in summary
    assert "bits per dimension on 12 held-out digits" in summary
