"""Langevin correctors, and the predictor-corrector that joins one to any predictor.

A corrector moves the state at time t towards p_t without changing t:

    x <- x + delta score(x, t) + sqrt(2 delta) z.

The annealed rule takes delta proportional to sigma_t^2, which is linear and has an exact law;
the norm rule takes it from the sizes of score and noise, sample by sample. A kernel of
`scoresolve.kernels` corrects too, one that accepts and rejects without a bias of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, whole_number
from scoresolve.kernels import ChainNoise, Kernel, Target
from scoresolve.kernels.base import checked_acceptance
from scoresolve.kernels.target import column
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.plans import Linear, Run
from scoresolve.plans.stages import Predict
from scoresolve.solvers.base import Solver

__all__ = [
    "AnnealedCorrector",
    "Corrector",
    "KernelCorrector",
    "LangevinCorrector",
    "PredictorCorrector",
]


class Corrector(ABC):
    """A move at fixed time that leaves p_t (nearly) invariant."""

    name: str
    source: str

    @abstractmethod
    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        """The corrected state at `t`."""


class LangevinCorrector(Corrector):
    """Langevin moves whose step follows from the norms of score and noise, per sample.

        delta = 2 (snr |z| / |score|)^2,   x <- x + delta score + sqrt(2 delta) z.

    The factor alpha of the published VP rule is left out (it tends to 1 on fine grids); the
    published code takes norms over the batch, which ties every sample to its neighbours.

    Args:
        snr: signal-to-noise ratio of a move, > 0.
        moves: moves per time, >= 1.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Song et al. 2021 (2011.13456), algorithms 4 and 5.
    """

    source = "Song et al. 2021 (2011.13456), algorithms 4 and 5"

    def __init__(self, snr: float = 0.16, moves: int = 1) -> None:
        if not 0 < snr < math.inf:
            raise ArgumentError(f"snr = {snr}: the corrector's signal-to-noise ratio is positive")
        self.snr, self.calls = snr, whole_number("moves", moves)
        self.name = "langevin"

    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        return run.apply(self, x, t)

    def __call__(
        self, x: Tensor, t: float, predict: Predict, noise: NoiseSource, draw: int
    ) -> Tensor:
        """The moves on actual states [B, *event]; the `Action` of a `Custom` stage."""
        for move in range(self.calls):
            score = predict("score", x, t)
            z = noise.normal(x, draw + move, Purpose.CORRECTOR)
            axes = tuple(range(1, x.ndim))
            length = _norm(score, axes)
            # Where the score vanishes there is no direction to correct in: no move.
            ratio = torch.where(length > 0, _norm(z, axes) / length, 0.0)
            delta = 2 * (self.snr * ratio) ** 2
            x = x + delta * score + (2 * delta).sqrt() * z
        return x


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().sum(axes, keepdim=True).sqrt() if axes else x.abs()


class AnnealedCorrector(Corrector):
    """Langevin moves with a step proportional to sigma_t^2.

        delta = ratio sigma_t^2 / 2,   x <- x + delta score + sqrt(2 delta) z.

    Args:
        ratio: epsilon / sigma_L^2 of the paper, > 0; its epsilon = 2e-5 at sigma_L = 0.01 is 0.2.
        moves: moves per time, >= 1.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Song and Ermon 2019 (1907.05600), algorithm 1.
    """

    source = "Song and Ermon 2019 (1907.05600), algorithm 1"

    def __init__(self, ratio: float = 0.2, moves: int = 1) -> None:
        if not 0 < ratio < math.inf:
            raise ArgumentError(f"ratio = {ratio}: the corrector's step is positive")
        self.ratio, self.moves = ratio, whole_number("moves", moves)
        self.name = "annealed"

    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        delta = self.ratio * run.sigma(t) ** 2 / 2
        for _ in range(self.moves):
            score = run.predict(x, t, "score")
            x = x + delta * score + math.sqrt(2 * delta) * run.noise(t, t)
        return x


class KernelCorrector(Corrector):
    """Steps of a Markov chain kernel on p_t, which an adjusted kernel leaves invariant.

        h = step_size sigma_t^power,

    where the kernel's step size scales as a length to its `power`. For Langevin kernels this is
    the rule of a signal-to-noise ratio, h = 2 (snr sigma_t)^2, with the expected norms of noise and
    score: `MALA(2 * snr**2)`. A rule that reads the norms themselves would spoil the acceptance.

    Args:
        kernel: its acceptance is integrated from the score along the proposal.
        moves: steps per time, >= 1.
        nodes: of that integral, each an evaluation more in a move of an adjusted kernel.
        acceptance: if given, in (0, 1), the step of every sample is moved towards it in the moves
            of a time, log h <- log h + (a - acceptance) / sqrt(move), from the rule's.

    Raises:
        ArgumentError: a value is out of range, the kernel has replicas or a step size for every
            chain, or `acceptance` is given for a kernel that accepts everything.

    Source:
        Song et al. 2021 (2011.13456), appendix G, for correctors; the kernel's own for the move.
    """

    def __init__(
        self,
        kernel: Kernel,
        moves: int = 1,
        nodes: int = 3,
        acceptance: float | None = None,
    ) -> None:
        if kernel.copies > 1 or isinstance(kernel.step_size, Tensor):
            raise ArgumentError(f"{kernel.name!r}: give a kernel of single chains with one step")
        if acceptance is not None and not kernel.adjusted:
            raise ArgumentError(f"{kernel.name!r} accepts everything: leave out acceptance")
        self.kernel, self.moves = kernel, whole_number("moves", moves)
        self.nodes = whole_number("nodes", nodes)
        self.acceptance = None if acceptance is None else checked_acceptance(acceptance)
        self.name, self.source = kernel.name, kernel.source

    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        return run.apply(_KernelMoves(self, run.sigma(t) ** self.kernel.power), x, t)


class _KernelMoves:
    """The moves at a time whose unit of step size is `unit`; the `Action` of a `Custom` stage."""

    def __init__(self, corrector: KernelCorrector, unit: float) -> None:
        kernel, self.corrector, self.unit = corrector.kernel, corrector, unit
        integral = corrector.nodes if kernel.adjusted else 0
        self.name, self.calls = (
            corrector.name,
            1 + corrector.moves * (kernel.evaluations + integral),
        )

    def __call__(
        self, x: Tensor, t: float, predict: Predict, noise: NoiseSource, draw: int
    ) -> Tensor:
        kernel, wanted = self.corrector.kernel, self.corrector.acceptance
        target = Target(lambda y: (None, predict("score", y, t)), False, self.corrector.nodes)
        numbers = ChainNoise(noise, draw)
        h = self.unit * kernel.step_sizes(len(x), slice(None), x)
        state = kernel.start(x, target, numbers)
        for move in range(self.corrector.moves):
            state = kernel.step(state, target, numbers, column(h, x))
            if wanted is not None and state.acceptance is not None:
                h = h * ((state.acceptance - wanted) / math.sqrt(move + 1)).exp()
        return state.point.x


class PredictorCorrector(Solver):
    """Any predictor's step, followed by a corrector at the new time.

    The corrector's own bias stays when the grid is refined, so there is no order.

    Args:
        predictor: a fixed-grid solver.
        corrector: a `Corrector`.

    Source:
        Song et al. 2021 (2011.13456), algorithm 1.
    """

    order, stochastic = None, True

    def __init__(self, predictor: Solver, corrector: Corrector) -> None:
        self.predictor, self.corrector = predictor, corrector
        self.predicts = predictor.predicts
        self.name = f"pc({predictor.name}, {corrector.name})"
        self.source = f"Song et al. 2021 (2011.13456), algorithm 1; {corrector.source}"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        predicted = self.predictor.step(x, t, s, run)
        return predicted if run.sigma(s) == 0 else self.corrector.correct(predicted, s, run)
