"""Pictures by name: what `scoresolve plot NAME` draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure

from scoresolve.digits import load_digits, load_network, to_unit
from scoresolve.errors import ArgumentError, known_name
from scoresolve.metrics import Method, class_mixture, compare
from scoresolve.model_check import ModelVerification, verify_model
from scoresolve.models import from_denoiser
from scoresolve.monte_carlo import Chains, run_chains
from scoresolve.noise import Philox, Purpose
from scoresolve.plot.chains import animate_chains, plot_chains, plot_diagnostics
from scoresolve.plot.convergence import plot_grids, plot_orders, plot_strong_errors
from scoresolve.plot.flows import plot_brownian, plot_flow, plot_paths, plot_score
from scoresolve.plot.four_points import plot_four_points
from scoresolve.plot.motion import animate_flow, animate_score
from scoresolve.plot.samples import plot_images, plot_samples
from scoresolve.plot.saving import WRITERS, require_writer, save_figure, save_film
from scoresolve.plot.style import on_host
from scoresolve.plot.verification import plot_verification
from scoresolve.sampling import DEFAULT_SOLVER, sample
from scoresolve.sde import EDM, VP
from scoresolve.targets import GaussianMixture, ring

__all__ = ["PICTURES", "Picture", "picture", "save_picture"]


@dataclass(frozen=True)
class Picture:
    """What a picture shows, how it is drawn, and how it moves if it can."""

    text: str
    draw: Callable[[], Figure]
    animate: Callable[[], FuncAnimation] | None = None


def _line() -> GaussianMixture:
    return GaussianMixture([0.3, 0.5, 0.2], [[-1.6], [0.4], [1.9]], [0.04, 0.05, 0.02])


def _lobes() -> GaussianMixture:
    means = [[-1.6, -0.8], [1.4, -1.0], [0.2, 1.5]]
    covariances = [[[0.6, 0.3], [0.3, 0.5]], [[0.5, -0.2], [-0.2, 0.4]], [[0.8, 0.0], [0.0, 0.3]]]
    return GaussianMixture([0.4, 0.3, 0.3], means, covariances)


@on_host
def _mixing() -> Chains:
    start = torch.zeros(50, 2, dtype=torch.float64)
    return run_chains(_lobes(), x=start, kernel="mala", steps=1000, warmup=200)


@on_host
def _samples() -> Figure:
    mixture, sde = ring(std=0.3), VP()
    panels = {
        "exact": mixture.sample(800),
        **{
            f"{method}, 10 calls": sample(
                mixture.score_model(sde),
                sde,
                shape=(800, 2),
                solver=method.solver,
                grid=method.grid,
                nfe=10,
            ).x
            for method in (Method(DEFAULT_SOLVER), Method("dpmpp_2m", "karras"))
        },
    }
    return plot_samples(panels, mixture)


@on_host
def _digits() -> Figure:
    out = sample(from_denoiser(load_network()), EDM(), shape=(100, 1, 8, 8), nfe=20)
    return plot_images({f"100 digits, {out.nfe} network calls": out.x})


@on_host
def _verified() -> dict[str, ModelVerification]:
    held_out, mixture = load_digits("test").levels[:160], class_mixture()
    spread = Philox(0).uniform(torch.empty(held_out.shape), 0, Purpose.DEQUANTISE)
    models = {
        "digits network, on held-out digits": (
            from_denoiser(load_network()),
            to_unit(held_out, spread),
        ),
        "exact score of a mixture like them": (
            mixture.score_model(EDM()),
            mixture.sample(160),
        ),
    }
    return {
        name: verify_model(model, EDM(), data, levels=6, points=16)
        for name, (model, data) in models.items()
    }


PICTURES: dict[str, Picture] = {
    "flow": Picture(
        "p_t over time with forward, probability-flow and reverse SDE paths; as GIF it moves",
        lambda: plot_flow(_line()),
        lambda: animate_flow(_line()),
    ),
    "paths": Picture(
        "the probability flow and paths of the reverse SDE from the same starts",
        lambda: plot_paths(_line()),
    ),
    "score": Picture(
        "the score of p_t as a vector field at four times; as GIF samples follow it",
        lambda: plot_score(ring(std=0.3)),
        lambda: animate_score(ring(std=0.3)),
    ),
    "four_points": Picture(
        "four points on the line: the chain forward, and back with the exact and a learned score",
        plot_four_points,
    ),
    "chains": Picture(
        "Langevin and Hamiltonian chains on a density; as GIF they spread over it",
        lambda: plot_chains(_lobes()),
        lambda: animate_chains(_lobes()),
    ),
    "mixing": Picture(
        "traces, autocorrelation and effective samples of MALA on a density",
        lambda: plot_diagnostics(_mixing()),
    ),
    "brownian": Picture("Brownian motion against its envelope sqrt(t)", plot_brownian),
    "samples": Picture("samples of a ring of Gaussians over its density", _samples),
    "digits": Picture("digits drawn from the bundled network", _digits),
    "model": Picture(
        "how far the digits network and an exact score are from a score field, by noise level",
        lambda: plot_verification(_verified()),
    ),
    "orders": Picture("error against steps, from the exact law of each solver", plot_orders),
    "grids": Picture("where the named time grids put their nodes", plot_grids),
    "solvers": Picture(
        "strong error against network calls on a mixture",
        lambda: plot_strong_errors(compare(class_mixture(), EDM(), starts=128)),
    ),
}
"""Pictures by name."""


@on_host
def picture(name: str) -> Figure:
    """The picture of the given name of `PICTURES`.

    Raises:
        UnknownNameError: no such picture.
    """
    return PICTURES[known_name("picture", name, PICTURES)].draw()


@on_host
def save_picture(name: str, path: str | Path) -> None:
    """Write the picture `name` of `PICTURES`, moving if the suffix of `path` is .gif or .mp4.

    Raises:
        UnknownNameError: no such picture.
        ArgumentError: it does not move, or there is nothing that writes such files.
        OSError: the file cannot be written.
    """
    path = Path(path)
    found = PICTURES[known_name("picture", name, PICTURES)]
    if path.suffix.lower() not in WRITERS:
        save_figure(found.draw(), path)
        return
    if found.animate is None:
        moving = [known for known, each in PICTURES.items() if each.animate]
        raise ArgumentError(f"{name!r} does not move: write it as .png, or take one of {moving}")
    require_writer(path)
    save_film(found.animate(), path)
