"""Benchmarks keep what they measured, draw it, and measure what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import scoresolve as ss
from benchmarks import __main__ as command
from benchmarks import anchors, sde
from benchmarks.record import Record, Row
from benchmarks.report import CHARTS, Bars, write_report
from scoresolve.noise import Philox, Purpose
from scoresolve.peers import installed
from scoresolve.solvers import AdaptiveAdams

VP = ss.VP()
DRAWN = ("overhead", "nfe", "scaling")


def record(name: str, rows: list[Row]) -> Record:
    return Record(name, "small", f"python -m benchmarks {name}", rows, 1.0)


def made_up(name: str) -> list[Row]:
    """Rows with the columns that the chart of a benchmark reads."""
    chart = CHARTS[name]
    if isinstance(chart, Bars):
        return [{**dict.fromkeys(chart.names, "a|b"), chart.value: 2.0}]
    return [
        {chart.panel: "one", chart.x: x, chart.series: "s", **dict.fromkeys(chart.y, 1.0 / x)}
        for x in (5, 10)
    ]


def test_a_record_is_read_as_it_was_written_and_knows_where_it_was_made(tmp_path: Path) -> None:
    kept = record("nfe", [{"case": "ring", "rms": 0.5}, {"case": "ring", "rms": math.inf}])
    kept.save(tmp_path / "nfe.json")
    text = (tmp_path / "nfe.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Record.load(tmp_path / "nfe.json")
    assert again.rows == [{"case": "ring", "rms": 0.5}, {"case": "ring", "rms": "inf"}]
    assert (again.command, again.date, again.commit) == (kept.command, kept.date, kept.commit)
    assert again.versions["torch"] == torch.__version__
    assert {"scoresolve", "numpy", "python"} <= set(again.versions)
    assert all(again.machine[key] for key in ("cpu", "cores", "threads", "platform"))


def test_every_benchmark_has_a_chart_and_a_command_that_runs_it() -> None:
    assert set(CHARTS) == set(command.BENCHMARKS)
    assert set(command.main.commands) == {*command.BENCHMARKS, "report"}


def test_the_report_holds_a_table_and_the_plots_of_every_record(tmp_path: Path) -> None:
    files = []
    for name in DRAWN:
        files.append(tmp_path / f"{name}.json")
        record(name, made_up(name)).save(files[-1])
    result = CliRunner().invoke(
        command.main, ["report", *map(str, files), "--out", str(tmp_path / "page")]
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page" / "report.md").read_text()
    pictures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert len(pictures) == 4  # one of bars, one of columns, two of series
    assert all(f"]({name})" in page for name in pictures)
    assert all(f"`python -m benchmarks {name}`" in page for name in DRAWN)


def test_a_record_that_could_not_be_kept_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "tracing.json"
    result = CliRunner().invoke(command.main, ["tracing", "--json", str(path)])
    assert result.exit_code == 2
    assert "there is no folder" in result.output


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        (("k_diffusion",), "not installed, so left out: k-diffusion"),
        (("k_diffusion", "diffusers", "azula"), "no peer is installed: pip install"),
    ],
)
def test_peers_that_are_absent_are_left_out_with_a_word(
    gone: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in gone:
        monkeypatch.setitem(sys.modules, module, None)
    fresh = command.nfe.samplers_of_peers.__wrapped__  # not those of an earlier test
    monkeypatch.setattr(command.nfe, "samplers_of_peers", fresh)
    if len(gone) < 3 and not installed("azula"):
        pytest.skip("azula is not installed")
    monkeypatch.setattr(command.nfe, "compare", lambda *_: 1 / 0)  # all that follows takes long
    result = CliRunner().invoke(command.main, ["nfe"])
    assert word in result.output
    assert result.exit_code == (3 if len(gone) < 3 else 1)
    assert ("ZeroDivisionError" in result.output) == (len(gone) < 3)


@pytest.mark.parametrize(
    ("name", "how"),
    [("anchors", "CONTRIBUTING.md says how"), ("nfe", "pip install 'scoresolve[bench]'")],
)
def test_a_benchmark_of_peers_alone_says_what_to_install(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("k_diffusion", "diffusers", "azula"):
        monkeypatch.setitem(sys.modules, module, None)
    fresh = command.nfe.samplers_of_peers.__wrapped__  # not those of an earlier test
    monkeypatch.setattr(command.nfe, "samplers_of_peers", fresh)
    result = CliRunner().invoke(command.main, [name])
    assert f"installed: {how}" in result.output
    assert isinstance(result.exception, SystemExit)


def test_figures_that_do_not_exist_leave_a_table_without_a_plot(tmp_path: Path) -> None:
    page = write_report([record("overhead", [{"solver": "euler", "ratio": "never"}])], tmp_path)
    assert "| euler | never |" in page.read_text()
    assert not list(tmp_path.glob("*.png"))


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}')
    result = CliRunner().invoke(
        command.main, ["report", str(tmp_path / "other.json"), "--out", str(tmp_path)]
    )
    assert result.exit_code == 1
    assert "is not a record of a benchmark" in result.output


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "dpmpp_sde", "weak_rk3", "edm_churn"])
def test_the_variance_of_a_black_box_is_that_of_its_plan(name: str) -> None:
    times = ss.make_grid("karras", VP, 12).times
    mean, variance = torch.zeros(3), torch.tensor(sde.VARIANCES, dtype=torch.float64)
    law = ss.plan(name, VP, times).law(mean, variance)
    seen = sde.variance_error(sde.samplers(full=True)[f"scoresolve {name}"], VP, times)
    assert seen == pytest.approx(law.variance_error, rel=1e-9)


def test_a_step_that_is_drawn_after_its_first_part_continues_one_brownian_path() -> None:
    fresh = [torch.tensor([[1.0]]).double(), torch.tensor([[0.0]]).double()]
    noise = sde.continued(iter([*fresh, *fresh]), VP)
    x = torch.zeros(1, 1, dtype=torch.float64)
    snr = [float(VP.log_snr(t).exp()) for t in (0.8, 0.6, 0.5)]
    noise(x, 0.8, 0.6)
    share = (snr[1] - snr[0]) / (snr[2] - snr[0])
    assert float(noise(x, 0.8, 0.5)) == pytest.approx(math.sqrt(share))
    assert float(noise(x, 0.5, 0.4)) == 1.0  # the next step is fresh


@pytest.mark.skipif(not installed("k-diffusion"), reason="k-diffusion is not installed")
def test_recorded_figures_of_common_samplers_on_the_ring_are_found_again() -> None:
    """At ten calls, where no single start rules the figure; at twenty, see the benchmark."""
    case = model, process = anchors.CASES["ring 2-D, VP"]()
    like = torch.empty(256, 2, dtype=torch.float64)
    x = process.prior_std * Philox(0).normal(like, 0, Purpose.START)
    exact = ss.sample(model, process, x=x, solver=AdaptiveAdams(1e-6, 1e-6)).x
    figures = [f for f in anchors.RECORDED if f.case == "ring 2-D, VP" and f.nfe == 10]
    for figure in figures[:2]:
        rms = float(anchors.squared_errors(figure, case, x, exact).mean().sqrt())
        assert rms == pytest.approx(figure.rms, rel=0.2), figure
