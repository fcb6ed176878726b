"""Every picture is drawn from what was computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.animation import writers
from matplotlib.figure import Figure
from PIL import Image

import scoresolve as ss
from scoresolve.cli import main
from scoresolve.errors import ArgumentError, ScoresolveError, UnknownNameError
from scoresolve.metrics import Method, compare
from scoresolve.plot import (
    PICTURES,
    animate_chains,
    animate_flow,
    animate_score,
    picture,
    plot_brownian,
    plot_diagnostics,
    plot_flow,
    plot_four_points,
    plot_grids,
    plot_images,
    plot_orders,
    plot_samples,
    plot_strong_errors,
    plot_verification,
    save_picture,
)
from scoresolve.plot.flows import forward

SLOW = ("solvers", "four_points")
LINE = ss.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.04, 0.04])
RING = ss.targets.ring()
SHORT = {
    "flow": lambda: animate_flow(LINE, samples=50, frames=2),
    "score": lambda: animate_score(ss.targets.ring(), samples=10, frames=2),
    "chains": lambda: animate_chains(ss.targets.ring(), chains=5, frames=2),
}


def texts(figure: Figure) -> str:
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    return " | ".join([*labels, *titles])


@pytest.mark.parametrize("name", [name for name in PICTURES if name not in SLOW])
def test_every_picture_is_drawn_by_its_command(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.png"
    result = CliRunner().invoke(main, ["plot", name, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert 5_000 < out.stat().st_size < 1_000_000


MOVING = [name for name, each in PICTURES.items() if each.animate]


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_picture_is_written_as_gif(name: str, tmp_path: Path) -> None:
    out = tmp_path / f"{name}.gif"
    short = replace(PICTURES[name], animate=SHORT[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PICTURES, name, short)
        result = CliRunner().invoke(main, ["plot", name, "--out", str(out)])
    assert result.exit_code == 0, result.output
    with Image.open(out) as film:
        assert film.n_frames >= 3


def test_what_does_not_move_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plot", "orders", "--out", str(tmp_path / "orders.gif")])
    assert result.exit_code == 2
    assert "does not move" in result.output
    if not writers.is_available("ffmpeg"):
        with pytest.raises(ArgumentError, match="ffmpeg"):
            save_picture("flow", tmp_path / "flow.mp4")


def test_forward_paths_have_the_marginals_of_the_process() -> None:
    for sde in (ss.VP(), ss.EDM(), ss.RectifiedFlow()):
        x0 = torch.full((4000, 1), 0.7, dtype=torch.float64)
        times, states = forward(sde, x0, 4, seed=1)
        for t, x in zip(times[1:-1], states[1:-1], strict=True):
            alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
            assert float(x.mean()) == pytest.approx(0.7 * alpha, abs=4.5 * sigma / 4000**0.5)
            assert float(x.std()) == pytest.approx(sigma, rel=4.5 / 8000**0.5)


def test_four_points_are_found_again_with_the_exact_score() -> None:
    figure = plot_four_points(paths=6, steps=2)
    off = {
        text.split(":")[0]: float(text.split()[-1])
        for text in texts(figure).split(" | ")
        if "ends within" in text
    }
    assert len(off) == 5
    assert max(value for title, value in off.items() if "exact" in title) < 0.1
    assert min(value for title, value in off.items() if "learned" in title) > 0.1


def test_the_picture_of_mixing_says_what_the_diagnosis_says() -> None:
    x = torch.zeros(6, 1, dtype=torch.float64)
    chains = ss.run_chains(ss.targets.gaussian([0.0], 1.0), x=x, step_size=0.2, steps=64)
    whole = ss.diagnose(chains)
    shown = texts(plot_diagnostics(chains, shown=2))
    assert f"one in {float(whole.autocorrelation_time):.1f} draws" in shown
    assert f"R̂ {float(whole.rhat):.3f}" in shown
    assert "2 of 6 chains" in shown


def test_brownian_paths_say_how_many_stay_inside() -> None:
    shares = [text for text in texts(plot_brownian(400, 20)).split(" | ") if "√t" in text]
    inside = [float(text.split()[-1].rstrip("%")) for text in shares]
    assert inside[0] == pytest.approx(68.3, abs=4.5 * 100 * (0.683 * 0.317 / 400) ** 0.5)
    assert inside[1] == pytest.approx(95.4, abs=4.5 * 100 * (0.954 * 0.046 / 400) ** 0.5)


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


def test_the_picture_of_a_verification_draws_what_was_measured() -> None:
    law, sde = ss.targets.ring(), ss.VP()
    found = ss.verify_model(law.score_model(sde), sde, law.sample(32), law=law, levels=2, points=4)
    figure = plot_verification({"exact": found})
    drawn = [tuple(line.get_ydata()) for axes in figure.axes for line in axes.lines]
    for name in ("linear", "exact", "calibration", "fokker_planck", "curl"):
        assert tuple(getattr(row, name).value for row in found.levels) in drawn
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plot_verification({})
    with pytest.raises(ArgumentError, match="by name"):
        plot_verification(found)


def test_models_are_named_in_the_first_panel_that_has_them() -> None:
    law, sde = ss.targets.ring(), ss.VP()
    options = {"levels": 2, "points": 4, "quantities": ("curl",)}
    found = ss.verify_model(law.score_model(sde), sde, law.sample(32), **options)
    legends = [axes.get_legend() for axes in plot_verification({"mine": found}).axes]
    assert [None if each is None else each.texts[0].get_text() for each in legends] == [
        *(None, None, None),
        "mine",
    ]


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


def test_pictures_are_drawn_in_any_default_dtype_and_on_any_default_device() -> None:
    learned = texts(plot_four_points(paths=4, steps=2))
    torch.set_default_dtype(torch.float64)
    try:
        assert len(texts(plot_four_points(paths=4, steps=2))) == len(learned)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert plot_flow(LINE, paths=2, steps=4).axes
        film = animate_score(RING, samples=4, frames=1)
        film._draw_frame(1)


def test_points_without_density_move_as_samples_do() -> None:
    points = ss.GaussianMixture.from_data([[-15.0], [1.0]])
    film = animate_flow(points, samples=20, frames=2)
    low, high = film._fig.axes[0].get_ylim()
    assert low == 0 < high < float("inf")
    film._draw_frame(0)


def test_a_picture_is_of_a_kind_that_matplotlib_writes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"written as .*\.png"):
        save_picture("grids", tmp_path / "grids.txt")
    save_picture("grids", tmp_path / "grids.PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["grids.PNG"]
