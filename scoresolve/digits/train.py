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

import copy
import math
import os
import time
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from scoresolve.digits.data import load_digits, to_unit
from scoresolve.digits.network import CLASSES, SIGMA_DATA, DigitsNet

__all__ = ["Training", "denoising_loss", "held_out_losses"]

STEPS, BATCH = 12_000, 128
PEAK_RATE, WARM_UP = 2e-3, 200
DROPOUT, WEIGHT_DECAY = 0.1, 0.01
AVERAGING = 0.999
UNLABELLED = 0.3  # the share of images that are trained on without their class
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
LOG_MEAN, LOG_STD = -1.2, 1.2
DECADES = (SIGMA_MIN, 0.01, 0.1, 1.0, 10.0, SIGMA_MAX)


class Training:
    """One training run: a network, its moving average, the optimiser and the steps taken.

    Args:
        steps: planned steps, at least 1; the learning rate rises over the first 200 of them and
            falls to zero as a half cosine over all.
        seed: of the initial weights and of every step, not negative.
    """

    def __init__(self, steps: int = STEPS, seed: int = 0) -> None:
        self.steps, self.seed, self.step = steps, seed, 0
        self.data = load_digits("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = DigitsNet(dropout=DROPOUT).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
        )

    def advance(self) -> None:
        """Takes one step of the optimiser."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0])
            )
            self._loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(AVERAGING, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)

    def rate(self) -> float:
        """The learning rate of the next step."""
        rise = min(1.0, (self.step + 1) / WARM_UP)
        return PEAK_RATE * rise * (1 + math.cos(math.pi * self.step / self.steps)) / 2

    def save(self, path: Path) -> None:
        """Writes a checkpoint from which `load` continues bit for bit."""
        part = path.with_name(path.name + ".part")
        torch.save(
            {
                "numbers": (self.steps, self.seed, self.step),
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
            },
            part,
        )
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Training:
        """The training run that `save` wrote to `path`."""
        state = torch.load(path, weights_only=True)
        steps, seed, step = state["numbers"]
        training = cls(steps, seed)
        training.step = step
        training.network.load_state_dict(state["network"])
        training.average.load_state_dict(state["average"])
        training.optimiser.load_state_dict(state["optimiser"])
        return training

    def _loss(self) -> Tensor:
        rows = torch.randint(len(self.data), (BATCH,))
        levels = self.data.levels[rows]
        x0 = to_unit(levels, torch.rand(levels.shape))
        label = self.data.labels[rows].masked_fill(torch.rand(BATCH) < UNLABELLED, CLASSES)
        normal = torch.exp(LOG_MEAN + LOG_STD * torch.randn(BATCH))
        uniform = _log_uniform(SIGMA_MIN, SIGMA_MAX, BATCH)
        sigma = torch.where(torch.rand(BATCH) < 0.5, normal, uniform)
        return denoising_loss(self.network, x0, sigma, torch.randn(x0.shape), label)


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
    level = sigma[:, None, None, None]
    weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
    denoised: Tensor = network(x0 + level * noise, sigma, label)
    return torch.mean(weight * (denoised - x0) ** 2)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
    training = Training.load(checkpoint) if resume else Training(steps, seed)
    end = time.monotonic() + 60 * minutes
    with tqdm(total=training.steps, initial=training.step, disable=None) as bar:
        while training.step < training.steps and time.monotonic() < end:
            training.advance()
            bar.update()
            if training.step % 1000 == 0:
                training.save(checkpoint)
    training.save(checkpoint)
    save_file(training.average.state_dict(), out)
    click.echo(f"{training.step} of {training.steps} steps; held-out loss by noise level:")
    for low, high, loss in held_out_losses(training.average):
        click.echo(f"  {low:6g} .. {high:<6g} {loss:.4f}")


if __name__ == "__main__":
    main()
