"""Trains the digit denoiser: `python -m scoresolve.digits.train --out digits.safetensors`.

Minimises E lambda(sigma) |D(x0 + sigma n, sigma) - x0|^2 with lambda = 1 / c_out^2, fresh uniform
dequantisation noise in x0, and sigma drawn half log-uniformly on [0.002, 80], because a likelihood
integrates over every noise level, and half from EDM's log-normal, where images take shape. The
weights kept are an exponential moving average. Step i draws all its randomness from (seed, i)
alone, so a run that stops and resumes ends with the same weights, bit for bit.

Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
section 5 and Table 1 (loss weight; log-normal noise levels with mean -1.2 and deviation 1.2).
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scoresolve import objectives
from scoresolve.digits.data import Digits, load_digits, to_unit
from scoresolve.digits.network import CLASSES, SIGMA_DATA, DigitsNet
from scoresolve.models import from_denoiser
from scoresolve.training import Training, seeded

__all__ = ["denoising_loss", "digits_training", "held_out_losses"]

STEPS, BATCH = 12_000, 128
DROPOUT = 0.1
UNLABELLED = 0.3  # the share of images that are trained on without their class
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
LOG_MEAN, LOG_STD = -1.2, 1.2
DECADES = (SIGMA_MIN, 0.01, 0.1, 1.0, 10.0, SIGMA_MAX)


def digits_training(steps: int = STEPS, seed: int = 0) -> Training:
    """The run that made the bundled weights.

    Args:
        steps: planned steps, at least 1.
        seed: of the initial weights and of every step, not negative.
    """
    with seeded(seed):
        network = DigitsNet(dropout=DROPOUT)
    loss = partial(_loss, load_digits("train"))
    return Training(network, loss, steps, seed=seed, rate=2e-3)


def _loss(data: Digits, network: nn.Module, step: int) -> Tensor:
    rows = torch.randint(len(data), (BATCH,))
    levels = data.levels[rows]
    x0 = to_unit(levels, torch.rand(levels.shape))
    label = data.labels[rows].masked_fill(torch.rand(BATCH) < UNLABELLED, CLASSES)
    normal = torch.exp(LOG_MEAN + LOG_STD * torch.randn(BATCH))
    uniform = _log_uniform(SIGMA_MIN, SIGMA_MAX, BATCH)
    sigma = torch.where(torch.rand(BATCH) < 0.5, normal, uniform)
    return denoising_loss(network, x0, sigma, torch.randn(x0.shape), label)


def denoising_loss(
    network: nn.Module, x0: Tensor, sigma: Tensor, noise: Tensor, label: Tensor | None = None
) -> Tensor:
    """The weighted error of a denoiser, `mean((D(x0 + sigma n, sigma) - x0)^2 / c_out^2)`.

    It is about 1 for a network that has learned nothing, at every noise level.

    Args:
        network: D(x, sigma, label), as `DigitsNet`.
        x0: clean images [B, 1, 8, 8].
        sigma: noise levels [B].
        noise: n, standard normal, [B, 1, 8, 8].
        label: classes [B] or None.

    Returns:
        The mean over images and pixels, [].

    Source: Karras et al. 2022, equation 2 with the weight of Table 1.
    """
    model = from_denoiser(network)
    loss = objectives.denoising_loss(model, x0, sigma, noise, "edm", SIGMA_DATA, label=label)
    return loss.mean()


@torch.no_grad()
def held_out_losses(network: nn.Module, draws: int = 8) -> list[tuple[float, float, float]]:
    """The loss on held-out digits without their class, by decade of noise levels.

    Args:
        network: D(x, sigma, label) in eval mode, as `DigitsNet`.
        draws: noise draws for each image and decade; the same in every call.

    Returns:
        Rows (lower sigma, upper sigma, mean loss for sigma log-uniform between them).
    """
    levels = load_digits("test").levels.repeat(draws, 1, 1, 1)
    table = []
    with seeded(0):
        for low, high in pairwise(DECADES):
            x0 = to_unit(levels, torch.rand(levels.shape))
            sigma = _log_uniform(low, high, len(x0))
            loss = denoising_loss(network, x0, sigma, torch.randn(x0.shape))
            table.append((low, high, float(loss)))
    return table


def _log_uniform(low: float, high: float, count: int) -> Tensor:
    """`count` numbers, log-uniform on [low, high], one in each of as many equal parts, shuffled."""
    place = (torch.randperm(count) + torch.rand(count)) / count
    return torch.exp(math.log(low) + place * math.log(high / low))


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--steps", default=STEPS, show_default=True, help="Length of the whole training.")
@click.option("--seed", default=0, show_default=True)
@click.option("--minutes", default=math.inf, help="Stop after so long, ready to resume.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint beside the output.")
def main(out: Path, steps: int, seed: int, minutes: float, resume: bool) -> None:
    """Train the digit denoiser and write its averaged weights to OUT (safetensors).

    The checkpoint OUT.checkpoint is written every 1,000 steps and when time is up; a resumed run
    keeps the steps and seed that it began with.
    """
    checkpoint = out.with_name(out.name + ".checkpoint")
    if resume and not checkpoint.is_file():
        raise click.UsageError(f"no checkpoint {checkpoint}: start without --resume")
    training = digits_training(steps, seed)
    if resume:
        training.load(checkpoint)
    training.run(checkpoint, seconds=60 * minutes, progress=None)
    save_file(training.average.state_dict(), out)
    click.echo(f"{training.step} of {training.steps} steps; held-out loss by noise level:")
    for low, high, loss in held_out_losses(training.average):
        click.echo(f"  {low:6g} .. {high:<6g} {loss:.4f}")


if __name__ == "__main__":
    main()
