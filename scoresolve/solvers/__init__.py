"""Solvers, one file a family, and the registry of their names."""

from scoresolve.solvers.adams import DEIS, Adams, AdamsBashforth, ExponentialAdams
from scoresolve.solvers.adaptive import (
    Adaptive,
    AdaptiveAdams,
    AdaptiveDPMSolver,
    AdaptiveSDE,
    BogackiShampine,
    DormandPrince,
    DormandPrince853,
    GottaGoFast,
    Tsitouras,
)
from scoresolve.solvers.ancestral import DPM2Ancestral, DPMSolverPP2SAncestral
from scoresolve.solvers.base import Solver
from scoresolve.solvers.bridges import TorchDiffEq, TorchSDE
from scoresolve.solvers.correctors import (
    AnnealedCorrector,
    Corrector,
    KernelCorrector,
    LangevinCorrector,
    PredictorCorrector,
)
from scoresolve.solvers.exponential import (
    RES2S,
    RES3S,
    SEEDS,
    DPMSolver,
    DPMSolverFast,
    DPMSolverPPS,
    SDEDPMSolverPPS,
)
from scoresolve.solvers.forms import FORMS, Form, data_form, noise_form, scaled_form
from scoresolve.solvers.integrator import GaussianFlow, Integrator, Solution
from scoresolve.solvers.multistep import IPNDM, PNDM, DPMSolverPP, GradientEstimation, UniPC
from scoresolve.solvers.registry import ALIASES, REGISTRY, get_solver, nfe_rule, noise_rule
from scoresolve.solvers.renoising import Churn, Consistency, Resampling, Restart
from scoresolve.solvers.runge_kutta import RungeKutta
from scoresolve.solvers.scaled import ScaledAdams
from scoresolve.solvers.splitting import SSCS
from scoresolve.solvers.stochastic import (
    DDIM,
    DDPM,
    EulerMaruyama,
    FlowSDE,
    ReverseDiffusion,
    StochasticHeun,
)
from scoresolve.solvers.stochastic_multistep import ERSDE, GDDIM, SASolver, SDEDPMSolverPP
from scoresolve.solvers.strong import SRA1, ShARK
from scoresolve.solvers.weak import WeakRungeKutta

__all__ = [
    "ALIASES",
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "FORMS",
    "GDDIM",
    "IPNDM",
    "PNDM",
    "REGISTRY",
    "RES2S",
    "RES3S",
    "SEEDS",
    "SRA1",
    "SSCS",
    "Adams",
    "AdamsBashforth",
    "Adaptive",
    "AdaptiveAdams",
    "AdaptiveDPMSolver",
    "AdaptiveSDE",
    "AnnealedCorrector",
    "BogackiShampine",
    "Churn",
    "Consistency",
    "Corrector",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMSolverFast",
    "DPMSolverPP",
    "DPMSolverPP2SAncestral",
    "DPMSolverPPS",
    "DormandPrince",
    "DormandPrince853",
    "EulerMaruyama",
    "ExponentialAdams",
    "FlowSDE",
    "Form",
    "GaussianFlow",
    "GottaGoFast",
    "GradientEstimation",
    "Integrator",
    "KernelCorrector",
    "LangevinCorrector",
    "PredictorCorrector",
    "Resampling",
    "Restart",
    "ReverseDiffusion",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolverPP",
    "SDEDPMSolverPPS",
    "ScaledAdams",
    "ShARK",
    "Solution",
    "Solver",
    "StochasticHeun",
    "TorchDiffEq",
    "TorchSDE",
    "Tsitouras",
    "UniPC",
    "WeakRungeKutta",
    "data_form",
    "get_solver",
    "nfe_rule",
    "noise_form",
    "noise_rule",
    "scaled_form",
]
