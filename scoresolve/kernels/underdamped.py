"""Underdamped Langevin dynamics by splitting,

    dx = p dt,    dp = score(x) dt - gamma p dt + sqrt(2 gamma) dw,

into A: x <- x + h p, B: p <- p + h score(x), and O: the exact Ornstein-Uhlenbeck step of p. A word
such as BAOAB applies its letters in order, each with its share of h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, real_number
from scoresolve.kernels.base import ChainNoise, ChainState, Kernel, StepSize, checked_step
from scoresolve.kernels.target import Target

__all__ = ["BAOAB", "OBABO", "Splitting"]


class Splitting(Kernel):
    """Underdamped Langevin dynamics, split by a palindrome of the letters A, B and O.

        A: x <- x + k p    B: p <- p + k score(x)    O: p <- c p + sqrt(1 - c^2) z,

    with k = h / n for a letter that occurs n times, and c = exp(-gamma k). It is not adjusted: the
    law of x is off in second order of h.

    Args:
        word: a palindrome of A, B and O whose last B follows its last A, so that the score is
            known at the end.
        step_size: h > 0, a length; a number or [B].
        friction: gamma > 0, in inverse units of h.

    Raises:
        ArgumentError, ShapeError: a value is out of range, or the word is none of these.

    Source:
        Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods for
        molecular sampling", Appl. Math. Res. Express 2013 (1203.5428).
    """

    source = "Leimkuhler and Matthews 2013 (1203.5428)"

    def __init__(self, word: str, step_size: StepSize, friction: float = 1.0) -> None:
        good = (
            set(word) == set("ABO") and word == word[::-1] and word.rindex("B") > word.rindex("A")
        )
        if not good:
            raise ArgumentError(
                f"word = {word!r}: give a palindrome of A, B and O whose last B follows its last "
                "A, such as BAOAB or OBABO"
            )
        self.word, self.name = word, word.lower()
        self.evaluations = sum("A" in part for part in word.split("B"))
        self.step_size = checked_step(step_size)
        self.friction = real_number("friction", friction, above=0)

    def start(self, x: Tensor, target: Target, noise: ChainNoise) -> ChainState:
        return ChainState(target(x), momentum=noise.normal(x))

    def step(self, state: ChainState, target: Target, noise: ChainNoise, h: Tensor) -> ChainState:
        point, x, p = state.point, state.point.x, state.momentum
        assert p is not None
        for letter in self.word:
            k = h / self.word.count(letter)
            if letter == "A":
                x = torch.addcmul(x, k, p)
            elif letter == "B":
                point = point if point.x is x else target(x)
                p = torch.addcmul(p, k, point.score)
            else:
                c = torch.exp(-self.friction * k)
                kick = torch.expm1(-2 * self.friction * k).neg().sqrt()
                p = (c * p).addcmul_(kick, noise.normal(x))
        return ChainState(point, momentum=p)


class BAOAB(Splitting):
    """`Splitting` by BAOAB, whose law of x is exact on a Gaussian, at any stable step.

    Args:
        step_size: h > 0, a length; a number or [B]. It is stable below 2 standard deviations.
        friction: gamma > 0.
    """

    def __init__(self, step_size: StepSize, friction: float = 1.0) -> None:
        super().__init__("BAOAB", step_size, friction)


class OBABO(Splitting):
    """`Splitting` by OBABO; on a Gaussian with precision A the covariance is A^-1 (I - h^2 A/4)^-1.

    Args:
        step_size: h > 0, a length; a number or [B]. It is stable below 2 standard deviations.
        friction: gamma > 0.

    Source:
        Bussi and Parrinello 2007, "Accurate sampling using Langevin dynamics", Phys. Rev. E 75.
    """

    source = "Bussi and Parrinello 2007, Phys. Rev. E 75; Leimkuhler and Matthews 2013 (1203.5428)"

    def __init__(self, step_size: StepSize, friction: float = 1.0) -> None:
        super().__init__("OBABO", step_size, friction)
