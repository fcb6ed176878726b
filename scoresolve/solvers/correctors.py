"""Langevin correctors, and the predictor-corrector that joins one to any predictor.

A corrector moves the state at time t towards p_t without changing t:

    x <- x + delta score(x, t) + sqrt(2 delta) z.

A delta that depends on t alone, in proportion to sigma_t^2, keeps the move linear and its law
exact. A kernel of `scoresolve.kernels` corrects too, one that accepts and rejects without a bias
of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from scoresolve.errors import ArgumentError, real_number, whole_number
from scoresolve.grid import Grid
from scoresolve.kernels import ChainNoise, Kernel, Target
from scoresolve.kernels.base import checked_acceptance
from scoresolve.kernels.target import column
from scoresolve.noise import NoiseSource
from scoresolve.plans import Linear, Run
from scoresolve.plans.stages import Predict
from scoresolve.sde import SDE, GaussianSDE
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

    def suited(self, predictor: Solver) -> Corrector:
        """The corrector for that predictor, where that matters to it."""
        return self

    def usual_every(self, predictor: Solver) -> int:
        """After how many steps of that predictor it comes unless told otherwise."""
        return 1


class _Langevin(Corrector):
    """Langevin moves of step `rate` sigma_t^2; the noise of the step over again without sigma.

    The score is taken at x + `shift` sqrt(2 delta) z.
    """

    shift: float

    def __init__(self, rate: float, moves: int) -> None:
        self.rate, self.moves = rate, whole_number("moves", moves)

    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        if isinstance(run.sde, GaussianSDE):
            delta = self.rate * run.sigma(t) ** 2
        else:
            delta = run.diffusion(t) ** 2 * abs(t - run.times[run.index]) / 2
        for _ in range(self.moves):
            kick = math.sqrt(2 * delta) * run.noise(t, t)
            x = x + delta * run.predict(x + self.shift * kick, t, "score") + kick
        return x


class LangevinCorrector(_Langevin):
    """Langevin moves whose step follows from the expected norms of score and noise.

        delta = 2 (snr E|z| / E|score|)^2 = 2 (snr sigma_t)^2,
        x <- x + delta score(x + sqrt(2 delta) z / 4, t) + sqrt(2 delta) z,

    as E|z|^2 = D, and E|score|^2 = D / sigma_t^2 where noise rules every direction. A process
    without sigma(t) gets delta = g^2 h / 2: noise of the variance of the step's own.

    It departs from the published rule in two ways. That takes the norms of the states at hand. Of
    each state alone they tie the step to where it goes, and then no p_t is invariant: of
    dx = d(x) score dt + sqrt(2 d(x)) dw it is p_t / d, whose E|x|^2 for N(0, I) is D + 2. Of the
    whole batch they tie every sample to its neighbours. And it takes the score at x, which widens
    a variance v by delta^2 / v at each move; at x + c sqrt(2 delta) z that is (1 - 4c) delta^2 / v,
    so that with c = 1/4 only delta^3 / 8v^2 is left. The factor alpha_t of the published VP rule
    is left out; it tends to 1 where the data show.

    Args:
        snr: signal-to-noise ratio of a move, > 0; if omitted 0.5 after a predictor of first order
            and 0.25 after others, whose own error is below the bias of a longer move. The paper
            takes 0.16 for its own rule.
        moves: moves per time, >= 1.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Song et al. 2021 (2011.13456), algorithms 4 and 5; for the score at a shifted state Vilmart
        2015, "Postprocessed integrators for the high order integration of ergodic SDEs", whose
        shift of 1/2 is right before a further half kick.
    """

    name, shift = "langevin", 0.25
    source = "Song et al. 2021 (2011.13456), algorithms 4 and 5"

    def __init__(self, snr: float | None = None, moves: int = 1) -> None:
        self.given = snr is not None
        self.snr = 0.25 if snr is None else real_number("snr", snr, above=0)
        super().__init__(2 * self.snr**2, moves)

    def suited(self, predictor: Solver) -> Corrector:
        if self.given or not _is_crude(predictor):
            return self
        return LangevinCorrector(0.5, self.moves)

    def usual_every(self, predictor: Solver) -> int:
        return 2 if _is_crude(predictor) else 16


class AnnealedCorrector(_Langevin):
    """Langevin moves with a step proportional to sigma_t^2.

        delta = ratio sigma_t^2 / 2,   x <- x + delta score + sqrt(2 delta) z.

    A process without sigma(t) gets delta = g^2 h / 2: noise of the variance of the step's own.

    Args:
        ratio: epsilon / sigma_L^2 of the paper, > 0; its epsilon = 2e-5 at sigma_L = 0.01 is 0.2.
        moves: moves per time, >= 1.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Song and Ermon 2019 (1907.05600), algorithm 1.
    """

    name, shift = "annealed", 0.0
    source = "Song and Ermon 2019 (1907.05600), algorithm 1"

    def __init__(self, ratio: float = 0.2, moves: int = 1) -> None:
        self.ratio = real_number("ratio", ratio, above=0)
        super().__init__(self.ratio / 2, moves)


class KernelCorrector(Corrector):
    """Steps of a Markov chain kernel on p_t, which an adjusted kernel leaves invariant.

        h = step_size sigma_t^power,

    where the kernel's step size scales as a length to its `power`. A process without sigma(t) takes
    h = step_size. For Langevin kernels this is
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
        gaussian = isinstance(run.sde, GaussianSDE)
        unit = run.sigma(t) ** self.kernel.power if gaussian else 1.0
        return run.apply(_KernelMoves(self, unit), x, t)


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


def _is_crude(predictor: Solver) -> bool:
    return not predictor.remembers and (predictor.order or 1) == 1


class PredictorCorrector(Solver):
    """Any predictor's steps, with a corrector after some of them and after the last.

    A corrector takes back a part of the error so far and adds a bias of its own, which stays when
    the grid is refined, so there is no order. It costs a call or more, and leaves the path of the
    steps, so that a predictor that looks at earlier ones starts anew. So a good predictor is
    corrected seldom. Grid and jumps are the predictor's.

    Args:
        predictor: a fixed-grid solver.
        corrector: a `Corrector`.
        every: a corrector after each so many steps, >= 1, as in the published algorithm with 1.
            If omitted that of the corrector: 1, but for `LangevinCorrector` 2 after a predictor
            of first order and 16 after others. With these and its default snr the exact law at
            200 calls has variances within 5 % and, in up to 64 dimensions, at most 0.13 nats more
            of a log-density gap than the predictor alone, for the predictors, processes and widths
            of tests/test_correctors.py; elsewhere up to 0.5 nats more were seen in 64 dimensions.

    Raises:
        ArgumentError: `every` is not a whole number >= 1.

    Source:
        Song et al. 2021 (2011.13456), algorithm 1.
    """

    order, stochastic = None, True

    def __init__(self, predictor: Solver, corrector: Corrector, every: int | None = None) -> None:
        usual = corrector.usual_every(predictor)
        self.every = usual if every is None else whole_number("every", every)
        self.predictor, self.corrector = predictor, corrector.suited(predictor)
        self.predicts, self.wants_scale = predictor.predicts, predictor.wants_scale
        self.grid, self.grid_options = predictor.grid, dict(predictor.grid_options)
        self.jumps_at_noise = predictor.jumps_at_noise
        self.jumps_at_data = predictor.jumps_at_data
        rhythm = "" if self.every == usual else f", every={self.every}"
        self.name = f"pc({predictor.name}, {corrector.name}{rhythm})"
        self.source = f"Song et al. 2021 (2011.13456), algorithm 1; {corrector.source}"

    def make_grid(
        self,
        sde: SDE,
        steps: int,
        t_start: float | None = None,
        t_end: float | None = None,
        denoise: bool | None = None,
    ) -> Grid:
        return self.predictor.make_grid(sde, steps, t_start, t_end, denoise)

    def scaled(self, scale: float | None) -> Solver:
        return PredictorCorrector(self.predictor.scaled(scale), self.corrector, self.every)

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        if run.index % self.every == 0:
            run.past.clear()
        predicted = self.predictor.step(x, t, s, run)
        if isinstance(run.sde, GaussianSDE) and run.sigma(s) == 0:
            return predicted
        if (run.index + 1) % self.every and not run.last:
            return predicted
        return self.corrector.correct(predicted, s, run)
