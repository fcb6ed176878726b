"""How far a sampler lands from where the exact flow would have taken the same noise.

Along the probability flow every start x_T has one exact image Phi(x_T). For a solver's output y,

    strong error   e = |y - Phi(x_T)| / sqrt(D)            (deterministic solvers),
    density gap    mean log p(y) - mean log p(Phi(x_T))     (any solver; 0 for a perfect one),

with p the exact law of a mixture at t_min. The RMS of e is ruled by the few starts that land in
another mode than they should, its median by the rest. Cost is counted in network calls (NFE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.digits import BIN_WIDTH, CLASSES, load_digits, to_unit
from scoresolve.errors import ArgumentError, whole_number
from scoresolve.noise import Philox, Purpose
from scoresolve.sampling import DEFAULT_SOLVER, grid_for, plan, sample
from scoresolve.sde import GaussianSDE
from scoresolve.solvers import DormandPrince, Integrator, get_solver
from scoresolve.targets import GaussianMixture

__all__ = [
    "BUDGETS",
    "METHODS",
    "Comparison",
    "Landing",
    "Method",
    "class_mixture",
    "compare",
]

BUDGETS = (5, 8, 10, 15, 20, 30, 50, 100)


@dataclass(frozen=True)
class Method:
    """A fixed-grid solver of the registry on a grid of `GRIDS`, by name; None is its own grid."""

    solver: str
    grid: str | None = None

    @property
    def is_default(self) -> bool:
        """Whether `sample` takes this method unless told otherwise."""
        return (self.solver, self.grid) == (DEFAULT_SOLVER, None)

    def __str__(self) -> str:
        return self.solver if self.grid is None else f"{self.solver}, {self.grid}"


METHODS = (
    Method(DEFAULT_SOLVER),
    Method("ab4_v", "sqrt_angle"),
    Method("ab2_v", "sqrt_angle"),
    Method("dpmpp_2m", "karras"),
    Method("dpmpp_2m", "log_snr"),
    Method("ab3", "karras"),
    Method("heun", "karras"),
    Method("ddim", "karras"),
    Method("ddpm", "karras"),
    Method("euler_maruyama", "karras"),
)
"""The default, common practice and its neighbours; the last two draw noise."""


@dataclass(frozen=True)
class Landing:
    """Where one method lands with one budget.

    Attributes:
        method: solver and grid.
        budget: network calls allowed.
        nfe: network calls made, the most the method can use of the budget.
        rms, median: of the strong error over the starts; None for a stochastic solver.
        gap: mean log-density of the outputs less that of the exact images, in nats.
        gap_error: standard error of `gap`.
    """

    method: Method
    budget: int
    nfe: int
    rms: float | None
    median: float | None
    gap: float
    gap_error: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        landings: one for each method and budget that it can meet, in that order.
        starts: number of starts.
        reference_error: RMS distance, per coordinate, between two references of different
            tolerance: a bound on the error of the better one, which was used.
    """

    landings: tuple[Landing, ...]
    starts: int
    reference_error: float

    def of(self, method: Method) -> tuple[Landing, ...]:
        """The landings of one method, by budget."""
        return tuple(landing for landing in self.landings if landing.method == method)


def compare(
    mixture: GaussianMixture,
    sde: GaussianSDE,
    methods: Sequence[Method] = METHODS,
    budgets: Sequence[int] = BUDGETS,
    starts: int = 256,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> Comparison:
    """Strong error and density gap of several methods on a mixture, whose score is exact.

    All methods start from the same prior noise and run in float64. The exact images are those
    of Dormand-Prince 5(4) with relative and absolute tolerance `tolerance`.

    Args:
        mixture: the data.
        sde: the process.
        methods: solvers and grids by name.
        budgets: network calls allowed; a method that needs more for one step is left out there.
        starts: number of starts, at least 2.
        seed: of the starts and of the solvers' noise.
        tolerance: of the reference, > 0; it is checked against one ten times looser.

    Returns:
        A `Comparison`.

    Raises:
        ArgumentError: `starts` is below 2, or a method chooses its own steps.
        UnknownNameError, GridError: no such solver or grid, or they do not go together.
    """
    shape = (whole_number("starts", starts, least=2), *mixture.event_shape)
    model = mixture.score_model(sde)
    like = torch.empty(shape, dtype=torch.float64)
    x = Philox(seed).normal(like, 0, Purpose.START) * sde.prior_std
    loose, exact = (
        sample(model, sde, x=x, solver=DormandPrince(tol, tol), raise_on_failure=True).x
        for tol in (10 * tolerance, tolerance)
    )
    law = mixture.marginal(sde, sde.t_min)
    exact_log_prob = law.log_prob(exact)
    landings = []
    for method in methods:
        solver = get_solver(method.solver)
        if isinstance(solver, Integrator):
            raise ArgumentError(
                f"{method.solver!r} chooses its own steps: it has no budget to meet"
            )
        single = plan(solver, sde, grid_for(solver, sde, grid=method.grid, steps=1)).nfe
        for budget in (budget for budget in budgets if budget >= single):
            out = sample(model, sde, x=x, solver=solver, grid=method.grid, nfe=budget, seed=seed)
            error = None if solver.stochastic else _distance(out.x, exact)
            gain = law.log_prob(out.x) - exact_log_prob
            landings.append(
                Landing(
                    method=method,
                    budget=budget,
                    nfe=out.nfe,
                    rms=None if error is None else _rms(error),
                    median=None if error is None else float(error.median()),
                    gap=float(gain.mean()),
                    gap_error=float(gain.std()) / math.sqrt(starts),
                )
            )
    return Comparison(tuple(landings), starts, _rms(_distance(loose, exact)))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """RMS over the event of x - y, [B]."""
    return (x - y).flatten(1).square().mean(1).sqrt()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def class_mixture() -> GaussianMixture:
    """The digits as ten Gaussians, one for each class: a 64-dimensional target with known answers.

    Weight, mean and covariance are those of the class's training images, with the variance
    BIN_WIDTH^2 / 12 of uniform dequantisation added to every pixel.

    Returns:
        A mixture over events [1, 8, 8], float64.
    """
    digits = load_digits("train")
    x = to_unit(digits.levels).double()
    groups = [x[digits.labels == label] for label in range(CLASSES)]
    spread = BIN_WIDTH**2 / 12 * torch.eye(x[0].numel(), dtype=x.dtype)
    return GaussianMixture(
        torch.tensor([len(group) for group in groups]),
        torch.stack([group.mean(0) for group in groups]),
        torch.stack([torch.cov(group.flatten(1).T, correction=0) + spread for group in groups]),
    )
