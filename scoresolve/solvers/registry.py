"""The names of all solvers: one row each.

A row is a name and how to build the solver with its default settings. Tests, certificates, the
command line and the documentation read this table; a new solver appears there by its row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scoresolve.errors import ArgumentError, UnknownNameError
from scoresolve.grid import make_grid
from scoresolve.plans import trace
from scoresolve.sde import VP
from scoresolve.solvers.adaptive import DormandPrince
from scoresolve.solvers.base import Solver
from scoresolve.solvers.bridges import TorchDiffEq, TorchSDE
from scoresolve.solvers.correctors import AnnealedCorrector, LangevinCorrector, PredictorCorrector
from scoresolve.solvers.forms import FORMS
from scoresolve.solvers.integrator import Integrator
from scoresolve.solvers.multistep import AdamsBashforth, DPMSolverPP2M
from scoresolve.solvers.runge_kutta import RungeKutta
from scoresolve.solvers.stochastic import (
    DDIM,
    DDPM,
    EulerMaruyama,
    ReverseDiffusion,
    StochasticHeun,
)

__all__ = ["REGISTRY", "get_solver", "nfe_rule"]

_EPS = {"eps": "", **{form: f"_{form}" for form in FORMS if form != "eps"}}

REGISTRY: dict[str, Callable[[], Solver | Integrator]] = {
    **{
        f"{method}{suffix}": partial(RungeKutta, method, form)
        for method in ("euler", "midpoint", "heun", "rk4")
        for form, suffix in _EPS.items()
    },
    **{
        f"ab{order}{suffix}": partial(AdamsBashforth, order, form)
        for order in (2, 3, 4)
        for form, suffix in _EPS.items()
    },
    "ddim": DDIM,
    "dpmpp_2m": DPMSolverPP2M,
    "ddpm": DDPM,
    "ddpm_forward": partial(DDPM, "forward"),
    "euler_maruyama": EulerMaruyama,
    "stochastic_heun": StochasticHeun,
    "reverse_diffusion": ReverseDiffusion,
    "pc": lambda: PredictorCorrector(ReverseDiffusion(), LangevinCorrector()),
    "pc_annealed": lambda: PredictorCorrector(ReverseDiffusion(), AnnealedCorrector()),
    "dopri5": DormandPrince,
    **{
        f"torchdiffeq_{method}": partial(TorchDiffEq, method)
        for method in ("dopri5", "dopri8", "bosh3")
    },
    "torchdiffeq_rk4": partial(TorchDiffEq, "rk4", steps=50),
    **{f"torchsde_{method}": partial(TorchSDE, method) for method in ("euler", "srk")},
}


def get_solver(solver: str | Solver | Integrator) -> Solver | Integrator:
    """The solver of the given name; a solver object is returned as it is.

    Raises:
        UnknownNameError: no such name; the message carries the nearest ones.
        ArgumentError: neither a name nor a solver object.
    """
    if isinstance(solver, Solver | Integrator):
        return solver
    if not isinstance(solver, str):
        raise ArgumentError(f"solver is {solver!r}: give a name or a Solver object")
    if solver not in REGISTRY:
        raise UnknownNameError("solver", solver, REGISTRY)
    return REGISTRY[solver]()


def nfe_rule(solver: Solver | Integrator) -> str:
    """Network calls as a function of the steps n, read off traced plans: "2n", "n + 1", ..."""
    if isinstance(solver, Integrator):
        return "chosen at run time"
    counts = [trace(solver, VP(), make_grid("uniform", VP(), n).times).nfe for n in (6, 7)]
    slope = counts[1] - counts[0]
    rest = counts[0] - 6 * slope
    return f"{slope if slope > 1 else ''}n" + (f" + {rest}" if rest else "")
