"""A training loop: AdamW, a moving average of the weights, checkpoints.

Step i of a run draws all its randomness from (seed, i) alone, and a checkpoint holds all else that
a step depends on; so a run that stops and resumes ends with the same weights, bit for bit. Any
loss will do; those of `scoresolve.objectives` have the score as their minimiser.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoresolve.errors import ArgumentError, ScoresolveError, real_number, whole_number

__all__ = ["Training", "seeded"]

Loss = Callable[[nn.Module, int], Tensor]


class Training:
    """One training run: a network, its moving average, the optimiser and the steps taken.

        rate_i = rate min(1, (i + 1)/warm_up) (1 + cos(pi i/steps))/2
        average <- average + (1 - d) (network - average),  d = min(averaging, (i + 1)/(i + 11))

    Args:
        network: trained in place; its moving average is a copy of it in eval mode.
        loss: `loss(network, step)`, a number to be lowered; torch's global generator is seeded for
            each step, and with `seed=seed, draw=step` an objective draws from its own counters.
        steps: planned steps, at least 1; the learning rate falls to 0 over them.
        seed: of every step, not negative.
        rate: largest learning rate, > 0.
        warm_up: steps over which the rate rises to it, at least 1.
        weight_decay: of AdamW, >= 0.
        averaging: largest share d of the old average that a step keeps, in [0, 1].
        clip: largest norm of the gradient, > 0; a longer one is scaled down to it.

    Attributes:
        network, average: the weights of the last step, and their moving average.
        step: steps taken.

    Raises:
        ArgumentError: a number is out of range, or the network has no parameters, or some of less
            precision than float32, in which small steps and averages are rounded away.

    Source:
        Loshchilov and Hutter 2019 (1711.05101), AdamW and the cosine; Song and Ermon 2020
        (2006.09011), technique 5, for the moving average.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        steps: int,
        *,
        seed: int = 0,
        rate: float = 1e-3,
        warm_up: int = 200,
        weight_decay: float = 0.01,
        averaging: float = 0.999,
        clip: float = 1.0,
    ) -> None:
        _check(network, loss)
        self.network, self.loss = network.train(), loss
        self.steps, self.seed, self.step = whole_number("steps", steps), seed, 0
        whole_number("seed", seed, 0)
        self.peak = real_number("rate", rate, above=0)
        self.warm_up = whole_number("warm_up", warm_up)
        self.averaging = real_number("averaging", averaging, least=0, most=1)
        self.clip = real_number("clip", clip, above=0)
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            network.parameters(),
            betas=(0.9, 0.99),
            weight_decay=real_number("weight_decay", weight_decay, least=0),
        )

    def rate(self) -> float:
        """The learning rate of the next step."""
        rise = min(1.0, (self.step + 1) / self.warm_up)
        return self.peak * rise * (1 + math.cos(math.pi * self.step / self.steps)) / 2

    def advance(self) -> Tensor:
        """Takes one step of the optimiser and returns its loss, [].

        Raises:
            ArgumentError: the loss is not one number that hangs on the network.
            ScoresolveError: the gradient is not finite; the weights are those of the step before.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.zero_grad()
        with seeded(self.seed, self.step):
            loss: object = self.loss(self.network, self.step)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ArgumentError(
                    f"the loss of step {self.step} is {what}: return one number, [], with a graph "
                    "to the network (the mean of an objective's [B])"
                )
            loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        if not math.isfinite(norm):
            raise ScoresolveError(
                f"the gradient of step {self.step} has the norm {float(norm)}: lower the rate, or "
                "see what the loss does there"
            )
        self.optimiser.step()
        self.step += 1
        decay = min(self.averaging, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
            for held, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
                held.copy_(now)
        return loss.detach()

    def run(
        self,
        checkpoint: Path | None = None,
        *,
        every: int = 1000,
        seconds: float = math.inf,
        progress: bool | None = False,
    ) -> nn.Module:
        """Takes the steps that are left, or as many as time allows, and returns the average.

        Args:
            checkpoint: file that is written every `every` steps and at the end.
            every: steps between checkpoints, at least 1.
            seconds: stop after so long, ready to resume.
            progress: show a bar; None for one on a terminal alone.
        """
        end, every = time.monotonic() + seconds, whole_number("every", every)
        hidden = None if progress is None else not progress
        with tqdm(total=self.steps, initial=self.step, disable=hidden) as bar:
            while self.step < self.steps and time.monotonic() < end:
                self.advance()
                bar.update()
                if checkpoint is not None and self.step % every == 0:
                    self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)
        return self.average

    def save(self, path: Path) -> None:
        """Writes a checkpoint from which `load` continues bit for bit; never half of one."""
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

    def load(self, path: Path) -> None:
        """Takes up the run that `save` wrote to `path`, with its steps, seed and place.

        The network, the loss and the other arguments must be those of that run.
        """
        device = next(self.network.parameters()).device
        state = torch.load(path, map_location=device, weights_only=True)
        self.steps, self.seed, self.step = state["numbers"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])


def _check(network: nn.Module, loss: Loss) -> None:
    if not isinstance(network, nn.Module) or not callable(loss):
        raise ArgumentError(
            f"network is {type(network).__name__} and loss {type(loss).__name__}: give a module "
            "and a callable loss(network, step)"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise ArgumentError("the network has no parameters to train")
    for p in network.parameters():
        if p.is_floating_point() and torch.finfo(p.dtype).eps > torch.finfo(torch.float32).eps:
            raise ArgumentError(
                f"the network has parameters in {p.dtype}, in which small steps and averages are "
                "rounded away: train in float32, with torch.autocast in the loss"
            )


@contextmanager
def seeded(seed: int, *place: int) -> Iterator[None]:
    """Torch's global generators are seeded by the numbers inside, and as they were after.

    Without a `place` by the seed itself, as `torch.manual_seed`.
    """
    with torch.random.fork_rng():
        number = np.random.SeedSequence([seed, *place]).generate_state(1)[0] if place else seed
        torch.manual_seed(int(number))
        yield
