"""Commands about a model: its samples, likelihoods, and whether it is a score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from scoresolve.models import Model
    from scoresolve.sde import GaussianSDE

from scoresolve.cli.shared import (
    ARRAYS,
    DATA,
    PICTURE,
    device_of,
    leave,
    model_options,
    overwrite_option,
    read_array,
    save_arrays,
    sizes_of,
    target_of,
)

__all__ = ["likelihood", "sample", "verify"]


@click.command()
@model_options
@click.option("--shape", metavar="B,...", help="Shape of the batch, as 64,3,32,32; or")
@click.option("--count", type=int, help="number of samples, where one sample's shape is known.")
@click.option("--solver", help="A name that `scoresolve solvers` lists.")
@click.option("--steps", type=int, help="Steps of the grid; or")
@click.option("--nfe", type=int, help="at most so many network calls.")
@click.option("--grid", help="A named grid.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chunk", type=int, help="Samples to work on at a time.")
@click.option("--denoise", is_flag=True, help="End with a call that jumps to sigma = 0.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32")
@click.option("--device", help="As torch names it, e.g. cuda.")
@click.option("--out", type=ARRAYS, default="samples.safetensors", show_default=True)
@click.option("--png", type=PICTURE, help="Also draw them: images, or points in the plane.")
@overwrite_option
def sample(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    out: Path,
    dtype: str,
    denoise: bool,
    shape: str | None = None,
    count: int | None = None,
    device: str | None = None,
    png: Path | None = None,
    **options: Any,
) -> None:
    """Draw samples and save them.

    \b
    scoresolve sample --target ring --count 500 --nfe 20 --png ring.png
    scoresolve sample --model nets:score --shape 64,3,32,32 --solver heun --steps 20
    """
    import torch

    import scoresolve as ss

    sizes = sizes_of(shape)
    if (sizes is None) == (count is None):
        raise click.UsageError("give --shape or --count")
    if sizes is None:
        if event is None:
            raise click.UsageError("--count does not tell the shape of a sample: give --shape")
        sizes = (count or 0, *event)
    images = len(sizes) == 4 and sizes[1] in (1, 3)
    if png is not None and not images and sizes[1:] != (2,):
        raise click.UsageError(f"--png draws images or points in the plane, not {sizes[1:]}")
    found = ss.sample(
        score,
        sde,
        shape=sizes,
        denoise=denoise or None,
        dtype=getattr(torch, dtype),
        device=device_of(device),
        progress=True,
        **options,
    )
    save_arrays(out, {"x": found.x, "status": found.status})
    if png is not None:
        from scoresolve.plot import plot_images, plot_samples, save_figure

        draw = plot_images if images else plot_samples
        save_figure(draw({f"{len(found.x)} samples, {found.nfe} calls": found.x}), png)
    good = int(found.ok.sum())
    click.echo(f"{good} of {len(found.x)} samples good, {found.nfe} network calls, in {out}")
    leave(found.status)


@click.command()
@model_options
@click.option("--data", type=DATA, help="An array [N, ...].")
@click.option("--count", type=click.IntRange(min=1), help="Take the first so many.")
@click.option("--solver", default="auto", show_default=True)
@click.option("--cost", type=int, help="Evaluations and products per sample, for auto; 200.")
@click.option("--nfe", type=int, help="Network calls.")
@click.option("--trace", type=click.Choice(["auto", "exact", "hutchinson"]), default="auto")
@click.option("--probes", type=int, help="Random probes a call, on average.")
@click.option("--dequantise", type=float, help="Width of the bins of discrete data.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chunk", type=int, help="Samples to work on at a time.")
@click.option("--out", type=ARRAYS, help="Save log-densities and latents.")
@overwrite_option
def likelihood(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    data: Path | None = None,
    count: int | None = None,
    out: Path | None = None,
    **options: Any,
) -> None:
    """Log-likelihood of data under a model; with --digits and no --data, of held-out digits.

    \b
    scoresolve likelihood --target ring --data ring.npz
    scoresolve likelihood --digits --count 100
    scoresolve likelihood --digits --count 10 --trace exact --nfe 64
    """
    import scoresolve as ss

    if data is not None:
        x = read_array(data)
    elif event == (1, 8, 8):
        from scoresolve.digits import BIN_WIDTH, load_digits, to_unit

        x = to_unit(load_digits("test").levels, 0.0)
        options["dequantise"] = BIN_WIDTH
    else:
        raise click.UsageError("give --data")
    found = ss.log_likelihood(score, sde, x[:count], progress=True, **options)
    if out is not None:
        names = ("log_prob", "standard_error", "latent", "status")
        save_arrays(out, {name: getattr(found, name) for name in names})
    good = found.ok
    click.echo(f"log-likelihood: {_mean(found.log_prob[good])} nats")
    click.echo(f"bits: {_mean(found.bits_per_dim[good])} bits/dim")
    cost = float(found.cost[good].mean())
    click.echo(f"{int(good.sum())} of {len(good)} good, {cost:.0f} evaluations each")
    leave(found.status)


def _mean(values: Tensor) -> str:
    """The mean, and its standard error where there are two values to tell it from."""
    if len(values) < 2:
        return f"{float(values.mean()):.4f}"
    return f"{float(values.mean()):.4f} +- {float(values.std()) / len(values) ** 0.5:.4f}"


@click.command()
@model_options
@click.option("--data", type=DATA, help="An array [N, ...].")
@click.option("--count", type=click.IntRange(min=1), help="Take the first so many.")
@click.option("--levels", type=click.IntRange(min=1), help="Noise levels.  [8]")
@click.option("--points", type=click.IntRange(min=2), help="Points to take all derivatives at.")
@click.option("--probes", type=click.IntRange(min=2), help="Random vectors per point and level.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--png", type=PICTURE, help="Also draw it.")
@overwrite_option
def verify(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    as_json: bool,
    data: Path | None = None,
    count: int | None = None,
    png: Path | None = None,
    **options: Any,
) -> None:
    """Measure how far a network is from a score field; exit code 1 if it is too far.

    With --digits and no --data on held-out digits; with --target on samples of it.

    \b
    scoresolve verify --target ring
    scoresolve verify --digits --png digits.png
    scoresolve verify --model nets:eps --prediction eps --data held_out.npy --json
    """
    import torch

    import scoresolve as ss

    target = click.get_current_context().params["target"]
    law = None if target is None else target_of(target)
    if data is not None:
        x = read_array(data)
    elif law is not None:
        x = law.sample(count or 512, seed=1)
    elif event == (1, 8, 8):
        from scoresolve.digits import load_digits, to_unit
        from scoresolve.noise import Purpose

        levels = load_digits("test").levels
        like = torch.empty(levels.shape)
        x = to_unit(levels, ss.Philox(options["seed"]).uniform(like, 0, Purpose.DEQUANTISE))
    else:
        raise click.UsageError("give --data")
    found = ss.verify_model(score, sde, x[:count], law=law, **options)
    if png is not None:
        from scoresolve.plot import plot_verification, save_figure

        save_figure(plot_verification({f"{len(x[:count])} points": found}), png)
    click.echo(found.to_json() if as_json else str(found))
    if not found.ok:
        raise SystemExit(1)
