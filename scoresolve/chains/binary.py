r"""The binomial diffusion chain: bits that are forgotten step by step.

    q(x_t = 1 | x_{t-1}) = (1 - beta_t) x_{t-1} + beta_t/2,
    q(x_t = 1 | x_0) = keep_t x_0 + (1 - keep_t)/2,    keep_t = prod_{s <= t} (1 - beta_s).

The reverse chain asks a predictor for p(x_0 = 1 | x_t) of every bit, and takes the bits for
independent:

    p(x_{t-1} | x_t) = sum_{x_0} p(x_0 | x_t) q(x_{t-1} | x_t, x_0).

Where x_0 can be drawn from its joint law given x_t, drawing it first makes the reverse chain exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, whole_number
from scoresolve.noise import Philox, Purpose
from scoresolve.targets.binary import BinaryLaw, as_bits

__all__ = ["BinaryChain", "Predictor"]

Predictor = Callable[[Tensor, int], Tensor]
"""p(x_0 = 1 | x_t) of every bit, [B, *event], from x_t [B, *event] and t."""


class BinaryChain:
    """A chain that replaces bits by fair coins, and its reverse.

    Args:
        betas: chance of each step to replace a bit, [T], in (0, 1); the last may be 1.

    Attributes:
        betas, keeps: beta_t and keep_t at index t - 1, float64.

    Raises:
        ArgumentError: a beta is out of range.

    Source:
        Sohl-Dickstein et al. 2015 (1503.03585), table App.1 and section 2.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        self.betas = torch.as_tensor(betas, dtype=torch.float64).flatten()
        inner = bool(((self.betas > 0) & (self.betas < 1))[:-1].all())
        if not (self.betas.numel() and inner and 0 < float(self.betas[-1]) <= 1):
            raise ArgumentError("betas must lie in (0, 1), or (0, 1] for the last")
        self.keeps = (1 - self.betas).cumprod(0)

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def keep(self, t: int) -> float:
        """The chance of a bit to be the same coin as at 0, at step `t` in 0..T."""
        t = whole_number("t", t, 0, self.T)
        return float(self.keeps[t - 1]) if t else 1.0

    def step(self, x: Tensor, t: int) -> Tensor:
        """q(x_t = 1 | x_{t-1} = `x`) for t in 1..T, shape of `x`, float64."""
        beta = float(self.betas[whole_number("t", t, 1, self.T) - 1])
        return (1 - beta) * as_bits(x) + beta / 2

    def marginal(self, x0: Tensor, t: int) -> Tensor:
        """q(x_t = 1 | x_0 = `x0`) for t in 0..T, shape of `x0`, float64."""
        keep = self.keep(t)
        return keep * as_bits(x0) + (1 - keep) / 2

    def posterior(self, x: Tensor, x0: Tensor, t: int) -> Tensor:
        """q(x_{t-1} = 1 | x_t = `x`, x_0 = `x0`) for t in 1..T, float64."""
        x, prior = as_bits(x), self.marginal(x0, t - 1)
        rises = self.step(torch.ones_like(prior), t)
        one = prior * torch.where(x > 0, rises, 1 - rises)
        zero = (1 - prior) * torch.where(x > 0, 1 - rises, rises)
        return one / (one + zero)

    def reverse(self, x: Tensor, p: Tensor, t: int) -> Tensor:
        """p(x_{t-1} = 1 | x_t = `x`), where `p` predicts p(x_0 = 1 | x_t); for t in 1..T.

        Args:
            x: bits [B, *event].
            p: [B, *event], in [0, 1].
            t: the step.

        Raises:
            ShapeError, ArgumentError: `p` has another shape or is no probability.
        """
        if not isinstance(p, Tensor) or p.shape != x.shape:
            what = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise ShapeError(
                f"the predictor returned {what} for x of shape {tuple(x.shape)}: "
                "return one probability for each bit"
            )
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ArgumentError("the predictor returned something outside [0, 1]")
        ones, zeros = (self.posterior(x, torch.full_like(x, bit), t) for bit in (1.0, 0.0))
        return torch.lerp(zeros, ones, p.double())

    def forward(self, x0: Tensor, seed: int = 0) -> Iterator[Tensor]:
        """A path x_0, x_1, ..., x_T of bits, each [B, *event]; sample i depends on i alone."""
        noise, x = Philox(seed), as_bits(x0)
        yield x
        for t in range(1, self.T + 1):
            p = self.step(x, t)
            x = (noise.uniform(p, t, Purpose.SOLVER) < p).double()
            yield x

    def backward(
        self, predictor: Predictor | BinaryLaw, shape: Sequence[int], seed: int = 0
    ) -> Iterator[Tensor]:
        """A path x_T, ..., x_0 of the reverse chain, from fair coins.

        Args:
            predictor: of p(x_0 = 1 | x_t), which gets a copy of x_t; or the law of the data, whose
                joint reverse chain is exact if the last beta is 1, and else but for its start.
            shape: [B, *event].
            seed: sample i depends on it and on i alone.
        """
        noise, size = Philox(seed), tuple(shape)
        coins = noise.uniform(torch.empty(size, dtype=torch.float64), 0, Purpose.START)
        x = (coins < 0.5).double()
        yield x
        for t in range(self.T, 0, -1):
            if isinstance(predictor, BinaryLaw):
                p = self.posterior(x, predictor.draw(x, self.keep(t), noise, t), t)
            else:
                p = self.reverse(x, predictor(x.clone(), t), t)
            x = (noise.uniform(p, t, Purpose.SOLVER) < p).double()
            yield x

    def sample(
        self, predictor: Predictor | BinaryLaw, shape: Sequence[int], seed: int = 0
    ) -> Tensor:
        """The end of `backward`, [B, *event]."""
        *_, x = self.backward(predictor, shape, seed)
        return x

    def predictor(self, law: BinaryLaw) -> Predictor:
        """p(x_0 = 1 | x_t) of data of that law, exactly."""
        return partial(_predicted, law, self)


def _predicted(law: BinaryLaw, chain: BinaryChain, x: Tensor, t: int) -> Tensor:
    return law.predict(x, chain.keep(t))
