"""SDE and ODE solvers for score models, each proved against distributions known in closed form."""

from scoresolve import (
    bounds,
    chains,
    distances,
    errors,
    gradients,
    guidance,
    kernels,
    noise,
    objectives,
    sde,
    solvers,
    targets,
    training,
)
from scoresolve.annealing import (
    Annealed,
    ImportanceEstimate,
    annealed_importance,
    annealed_langevin,
    simulated_annealing,
)
from scoresolve.audits import Audit, audit
from scoresolve.bounds import (
    bits_per_dim,
    continuous_bound,
    dequantised_log_prob,
    ito_bound,
    ito_log_density,
    variational_bound,
)
from scoresolve.certificates import Certificate, certify
from scoresolve.conditions import per_sample, shared
from scoresolve.diagnostics import Diagnostics, diagnose
from scoresolve.distances import DistanceTable, compare_samples, log_density_gap
from scoresolve.driving import Samples
from scoresolve.errors import ScoresolveError, SolveError, Status
from scoresolve.fitting import GridFit, fit_grid
from scoresolve.gradients import differentiable_log_likelihood, differentiable_sample
from scoresolve.grid import GRIDS, Grid, make_grid
from scoresolve.latents import noised, slerp
from scoresolve.likelihood import (
    ErrorBudget,
    Likelihood,
    log_likelihood,
    sample_with_log_prob,
)
from scoresolve.model_check import check_model, verify_model
from scoresolve.models import (
    Model,
    as_model,
    from_denoiser,
    from_discrete,
    from_energy,
    from_eps,
    from_flow,
    from_v,
    from_x0,
)
from scoresolve.monte_carlo import Chains, run_chains
from scoresolve.noise import BrownianPath, Philox
from scoresolve.peers import BlackBox
from scoresolve.plans import Law, Plan
from scoresolve.sampling import encode, plan, sample
from scoresolve.sde import (
    EDM,
    SDE,
    VE,
    VP,
    CosineVP,
    CriticallyDampedLangevin,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    LinearSDE,
    RectifiedFlow,
    SubVP,
    UnderdampedLangevin,
)
from scoresolve.solvers import Solver, get_solver
from scoresolve.targets import GaussianMixture
from scoresolve.transitions import GaussianChain
from scoresolve.tuning import measure_scale

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "GRIDS",
    "SDE",
    "VE",
    "VP",
    "Annealed",
    "Audit",
    "BlackBox",
    "BrownianPath",
    "Certificate",
    "Chains",
    "CosineVP",
    "CriticallyDampedLangevin",
    "Diagnostics",
    "DiscreteVP",
    "DistanceTable",
    "ErrorBudget",
    "GaussianChain",
    "GaussianMixture",
    "GaussianSDE",
    "Grid",
    "GridFit",
    "ImportanceEstimate",
    "Langevin",
    "Law",
    "Likelihood",
    "LinearSDE",
    "Model",
    "Philox",
    "Plan",
    "RectifiedFlow",
    "Samples",
    "ScoresolveError",
    "SolveError",
    "Solver",
    "Status",
    "SubVP",
    "UnderdampedLangevin",
    "annealed_importance",
    "annealed_langevin",
    "as_model",
    "audit",
    "bits_per_dim",
    "bounds",
    "certify",
    "chains",
    "check_model",
    "compare_samples",
    "continuous_bound",
    "dequantised_log_prob",
    "diagnose",
    "differentiable_log_likelihood",
    "differentiable_sample",
    "distances",
    "encode",
    "errors",
    "fit_grid",
    "from_denoiser",
    "from_discrete",
    "from_energy",
    "from_eps",
    "from_flow",
    "from_v",
    "from_x0",
    "get_solver",
    "gradients",
    "guidance",
    "ito_bound",
    "ito_log_density",
    "kernels",
    "log_density_gap",
    "log_likelihood",
    "make_grid",
    "measure_scale",
    "noise",
    "noised",
    "objectives",
    "per_sample",
    "plan",
    "run_chains",
    "sample",
    "sample_with_log_prob",
    "sde",
    "shared",
    "simulated_annealing",
    "slerp",
    "solvers",
    "targets",
    "training",
    "variational_bound",
    "verify_model",
]
