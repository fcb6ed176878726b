"""Laws of bits whose every quantity is known, also after noise.

Noise keeps a bit with probability `keep` and else replaces it by a fair coin:

    q(x = 1 | x0) = keep x0 + (1 - keep)/2.

A mixture of independent bits stays one; a hidden Markov model stays one, with other emissions. So
both give the density of noised bits, p(x0 = 1 | x) and draws of x0 given x at any `keep`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number, whole_number
from scoresolve.noise import NoiseSource, Philox, Purpose
from scoresolve.targets.rows import product

__all__ = ["BinaryLaw", "BitMixture", "HiddenMarkovBits", "heartbeat"]

ArrayLike = Tensor | Sequence[Any]


class BinaryLaw(ABC):
    """A law on bits [*event], each 0.0 or 1.0 in float64."""

    event_shape: torch.Size

    @abstractmethod
    def noised(self, keep: float) -> Self:
        """The law of the bits of which each is kept with probability `keep`, else a fair coin."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log probability of bits `x` [B, *event], [B] float64."""

    @abstractmethod
    def predict(self, x: Tensor, keep: float) -> Tensor:
        """p(x0 = 1 | x) of every element for bits `x` [B, *event] noised to `keep`."""

    @abstractmethod
    def draw(self, x: Tensor, keep: float, noise: NoiseSource, draw: int) -> Tensor:
        """x0 given `x` [B, *event], all elements jointly; `draw` numbers the draws of `noise`."""

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """`n` samples, [n, *event]; sample i depends on `seed` and i alone."""
        nothing = torch.zeros(n, *self.event_shape, dtype=torch.float64)
        return self.draw(nothing, 0.0, Philox(seed), 0)

    def check(self, x: Tensor) -> Tensor:
        """`x` as float64 [B, *event], or a `ShapeError` or `ArgumentError`."""
        if x.shape[1:] != self.event_shape or not x.ndim:
            raise ShapeError(
                f"bits of shape {tuple(x.shape)} for a law on {tuple(self.event_shape)}: "
                "give [B, *event]"
            )
        return as_bits(x)


class BitMixture(BinaryLaw):
    """sum_k w_k prod_i Bernoulli(x_i; p_ki).

    One component is a product law; with one deterministic component for every word it is any law
    on a few bits.

    Args:
        weights: [K], positive; they are normalised.
        probabilities: p of a one, [K, *event], in [0, 1].

    Raises:
        ShapeError, ArgumentError: shapes do not agree, or a number is out of range.
    """

    def __init__(self, weights: ArrayLike, probabilities: ArrayLike) -> None:
        shares, p = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, probabilities))
        if p.ndim < 1 or shares.shape != p.shape[:1]:
            raise ShapeError(
                f"weights {tuple(shares.shape)} for probabilities {tuple(p.shape)}: "
                "give [K] and [K, *event]"
            )
        if not bool((shares > 0).all() and (p >= 0).all() and (p <= 1).all()):
            raise ArgumentError("weights must be positive and probabilities in [0, 1]")
        self.weights, self.probabilities = shares / shares.sum(), p
        self.event_shape = p.shape[1:]

    @classmethod
    def from_table(cls, table: ArrayLike) -> BitMixture:
        """The law whose word x has probability table[x], for `table` of shape [2] * D."""
        masses = torch.as_tensor(table, dtype=torch.float64)
        if set(masses.shape) != {2}:
            raise ShapeError(f"table of shape {tuple(masses.shape)}: give [2] * D")
        words = masses.nonzero()
        return cls(masses[masses != 0], words.double())

    @property
    def mean(self) -> Tensor:
        """p(x = 1) of every element, [*event]."""
        mean: Tensor = torch.tensordot(self.weights, self.probabilities, 1)
        return mean

    def noised(self, keep: float) -> BitMixture:
        return BitMixture(self.weights, _coin(self.probabilities, keep))

    def log_prob(self, x: Tensor) -> Tensor:
        return self._joint(x, self.probabilities).logsumexp(1)

    def predict(self, x: Tensor, keep: float) -> Tensor:
        shares = self._joint(x, _coin(self.probabilities, keep)).softmax(1)
        parts = _posterior(self.probabilities, self.check(x)[:, None], keep)
        return (shares.reshape(*shares.shape, *(1,) * len(self.event_shape)) * parts).sum(1)

    def draw(self, x: Tensor, keep: float, noise: NoiseSource, draw: int) -> Tensor:
        shares = self._joint(x, _coin(self.probabilities, keep)).softmax(1)
        first = noise.uniform(shares[:, :1], 2 * draw, Purpose.TARGET)
        index = (first > shares.cumsum(1)[:, :-1]).sum(1)
        p = _posterior(self.probabilities[index], self.check(x), keep)
        return (noise.uniform(p, 2 * draw + 1, Purpose.TARGET) < p).double()

    def _joint(self, x: Tensor, p: Tensor) -> Tensor:
        """log of weight times mass of every component, [B, K]."""
        bits, p = self.check(x).flatten(1)[:, None], p.flatten(1)
        ones, zeros = torch.xlogy(bits, p), torch.xlogy(1 - bits, 1 - p)
        return self.weights.log() + (ones + zeros).sum(2)


class HiddenMarkovBits(BinaryLaw):
    """Bits in a row, x_i ~ Bernoulli(emission[s_i]) with s a Markov chain.

    Emissions 0 and 1 of two states make a Markov chain of bits.

    Args:
        initial: p(s_1), [S].
        transition: p(s_{i+1} | s_i), [S, S], rows sum to 1.
        emission: p(x_i = 1 | s_i), [S].
        length: number of bits.

    Raises:
        ShapeError, ArgumentError: shapes do not agree, or a number is no probability.

    Source:
        Rabiner 1989, section III, for the forward and backward pass.
    """

    def __init__(
        self, initial: ArrayLike, transition: ArrayLike, emission: ArrayLike, length: int
    ) -> None:
        given = (torch.as_tensor(v, dtype=torch.float64) for v in (initial, transition, emission))
        self.initial, self.transition, self.emission = given
        states = self.initial.shape
        if len(states) != 1 or self.emission.shape != states or self.transition.shape != states * 2:
            raise ShapeError("give initial [S], transition [S, S] and emission [S]")
        sums = torch.cat([self.initial.sum()[None], self.transition.sum(1)])
        sound = all(bool((v >= 0).all()) for v in (self.initial, self.transition))
        if not (sound and torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-9)):
            raise ArgumentError("initial and the rows of transition must be probabilities")
        if not bool((self.emission >= 0).all() and (self.emission <= 1).all()):
            raise ArgumentError("emissions must lie in [0, 1]")
        self.length = whole_number("length", length)
        self.event_shape = torch.Size((self.length,))

    def noised(self, keep: float) -> HiddenMarkovBits:
        emission = _coin(self.emission, keep)
        return HiddenMarkovBits(self.initial, self.transition, emission, self.length)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._forward(x, 1.0)[1]

    def predict(self, x: Tensor, keep: float) -> Tensor:
        ahead, _ = self._forward(x, keep)
        seen = self._seen(x, keep)
        after = torch.ones_like(ahead[0])
        ones = [_posterior(self.emission, x[:, i : i + 1], keep) for i in range(self.length)]
        found = []
        for i in reversed(range(self.length)):
            states = ahead[i] * after
            found.append((states * ones[i]).sum(1) / states.sum(1))
            after = product(after * seen[i], self.transition.mT)
            after = after / after.amax(1, keepdim=True)
        return torch.stack(found[::-1], 1)

    def draw(self, x: Tensor, keep: float, noise: NoiseSource, draw: int) -> Tensor:
        ahead, _ = self._forward(x, keep)
        coins = noise.uniform(self.check(x), 2 * draw, Purpose.TARGET)
        states = torch.empty(x.shape, dtype=torch.int64)
        weights = ahead[-1]
        for i in reversed(range(self.length)):
            edges = weights.cumsum(1)
            states[:, i] = (coins[:, i : i + 1] * edges[:, -1:] > edges[:, :-1]).sum(1)
            if i:
                weights = ahead[i - 1] * self.transition.mT[states[:, i]]
        p = _posterior(self.emission[states], self.check(x), keep)
        return (noise.uniform(p, 2 * draw + 1, Purpose.TARGET) < p).double()

    def _seen(self, x: Tensor, keep: float) -> list[Tensor]:
        """p(x_i | s_i), a [B, S] for each i."""
        p, bits = _coin(self.emission, keep), self.check(x)
        return [torch.where(bits[:, i : i + 1] > 0, p, 1 - p) for i in range(self.length)]

    def _forward(self, x: Tensor, keep: float) -> tuple[list[Tensor], Tensor]:
        """p(s_i | x_1..x_i), a [B, S] for each i, and log p(x), [B]."""
        state, total, found = self.initial, torch.zeros(len(x), dtype=torch.float64), []
        for seen in self._seen(x, keep):
            joint = state * seen
            mass = joint.sum(1, keepdim=True)
            total = total + mass[:, 0].log()
            found.append(joint / mass.clamp(min=math.ulp(0.0)))
            state = product(found[-1], self.transition)
        return found, total


def heartbeat(length: int = 20, period: int = 5) -> HiddenMarkovBits:
    """A one in every `period` bits and zeros between, from a random start.

    Args:
        length: number of bits, >= 1.
        period: >= 1.

    Source:
        Sohl-Dickstein et al. 2015 (1503.03585), section 3.1.2.
    """
    states = torch.eye(whole_number("period", period), dtype=torch.float64)
    return HiddenMarkovBits(states.mean(0), states.roll(1, 1), states[0], length)


def as_bits(x: Tensor) -> Tensor:
    """`x` as float64, or an `ArgumentError` where it holds anything but 0 and 1."""
    bits = x.double()
    if not bool(((bits == 0) | (bits == 1)).all()):
        raise ArgumentError("bits must be 0 or 1")
    return bits


def _coin(p: Tensor, keep: float) -> Tensor:
    keep = real_number("keep", keep, least=0, most=1)
    return keep * p + (1 - keep) / 2


def _posterior(p: Tensor, x: Tensor, keep: float) -> Tensor:
    """p(x0 = 1 | x) of a bit that is one with probability p."""
    one = p * _coin(x, keep)
    zero = (1 - p) * _coin(1 - x, keep)
    return one / (one + zero).clamp(min=math.ulp(0.0))
