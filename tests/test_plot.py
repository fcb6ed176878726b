"""Every picture is drawn from what was computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

import scoresolve as ss
from scoresolve.cli import main
from scoresolve.errors import ScoresolveError, UnknownNameError
from scoresolve.metrics import Method, compare
from scoresolve.plot import (
    PICTURES,
    picture,
    plot_flow,
    plot_grids,
    plot_images,
    plot_orders,
    plot_samples,
    plot_strong_errors,
)


def texts(figure: Figure) -> str:
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    return " | ".join([*labels, *titles])


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "solvers"])
def test_every_picture_is_drawn_by_its_command(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.png"
    result = CliRunner().invoke(main, ["plot", name, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert 5_000 < out.stat().st_size < 500_000


def test_the_list_names_every_picture() -> None:
    output = CliRunner().invoke(main, ["plot", "--list"]).output
    assert all(name in output for name in PICTURES)


def test_an_unknown_picture_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="orders"):
        picture("order")


def test_order_lines_carry_the_measured_order() -> None:
    shown = texts(plot_orders(("ddim", "heun"), steps=(32, 64, 128)))
    assert "ddim  order 1.0" in shown
    assert "heun  order 2.0" in shown


def test_strong_errors_are_those_of_the_comparison() -> None:
    methods = (Method("ddim", "flow"), Method("heun", "flow"))
    comparison = compare(ss.targets.ring(), ss.VP(), methods, (4, 8), starts=4, tolerance=1e-6)
    figure = plot_strong_errors(comparison)
    drawn = {tuple(line.get_ydata()) for line in figure.axes[0].lines}
    for method in methods:
        assert tuple(landing.rms for landing in comparison.of(method)) in drawn


def test_comparison_meets_the_budget_and_knows_its_reference() -> None:
    methods = (Method("heun", "flow"), Method("ddpm", "karras"))
    comparison = compare(ss.targets.ring(), ss.VP(), methods, (1, 9), starts=4, tolerance=1e-7)
    assert [landing.nfe for landing in comparison.of(methods[0])] == [8]
    assert all(landing.rms is None for landing in comparison.of(methods[1]))
    assert comparison.reference_error < 1e-4
    with pytest.raises(ScoresolveError, match="chooses its own steps"):
        compare(ss.targets.ring(), ss.VP(), (Method("dopri5", "flow"),), starts=2, tolerance=1e-4)


def test_other_figures_take_what_a_user_has() -> None:
    assert plot_grids(("karras", "flow"), steps=6).axes
    assert plot_samples({"mine": torch.randn(20, 2)}).axes
    assert plot_images({"mine": torch.zeros(3, 1, 8, 8)}).axes
    assert plot_flow(ss.GaussianMixture([1.0], [[0.5]], [0.1])).axes
