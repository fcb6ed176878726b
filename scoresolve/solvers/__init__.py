"""Solvers, one file a family, and the registry of their names."""

from scoresolve.solvers.adaptive import DormandPrince
from scoresolve.solvers.base import Solver
from scoresolve.solvers.bridges import TorchDiffEq, TorchSDE
from scoresolve.solvers.correctors import (
    AnnealedCorrector,
    Corrector,
    LangevinCorrector,
    PredictorCorrector,
)
from scoresolve.solvers.forms import FORMS, Form
from scoresolve.solvers.integrator import Integrator, Solution
from scoresolve.solvers.multistep import AdamsBashforth, DPMSolverPP2M
from scoresolve.solvers.registry import REGISTRY, get_solver, nfe_rule
from scoresolve.solvers.runge_kutta import RungeKutta
from scoresolve.solvers.stochastic import (
    DDIM,
    DDPM,
    EulerMaruyama,
    ReverseDiffusion,
    StochasticHeun,
)

__all__ = [
    "DDIM",
    "DDPM",
    "FORMS",
    "REGISTRY",
    "AdamsBashforth",
    "AnnealedCorrector",
    "Corrector",
    "DPMSolverPP2M",
    "DormandPrince",
    "EulerMaruyama",
    "Form",
    "Integrator",
    "LangevinCorrector",
    "PredictorCorrector",
    "ReverseDiffusion",
    "RungeKutta",
    "Solution",
    "Solver",
    "StochasticHeun",
    "TorchDiffEq",
    "TorchSDE",
    "get_solver",
    "nfe_rule",
]
