"""The names of all solvers: one row each.

A row is a name and how to build the solver with its default settings. Tests, certificates, the
command line and the documentation read this table; a new solver appears there by its row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scoresolve.errors import ArgumentError, UnknownNameError, short
from scoresolve.grid import make_grid
from scoresolve.plans import Custom, Draw, trace
from scoresolve.sde import VP
from scoresolve.solvers.adams import DEIS, AdamsBashforth, ExponentialAdams
from scoresolve.solvers.adaptive import (
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
from scoresolve.solvers.correctors import AnnealedCorrector, LangevinCorrector, PredictorCorrector
from scoresolve.solvers.exponential import (
    RES2S,
    RES3S,
    SEEDS,
    DPMSolver,
    DPMSolverFast,
    DPMSolverPPS,
    SDEDPMSolverPPS,
)
from scoresolve.solvers.forms import FORMS
from scoresolve.solvers.integrator import Integrator
from scoresolve.solvers.multistep import IPNDM, PNDM, DPMSolverPP, GradientEstimation, UniPC
from scoresolve.solvers.renoising import Churn, Consistency, Resampling, Restart
from scoresolve.solvers.runge_kutta import RungeKutta
from scoresolve.solvers.scaled import ScaledAdams
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

__all__ = ["ALIASES", "REGISTRY", "get_solver", "nfe_rule", "noise_rule"]

_EPS = {"eps": "", **{form: f"_{form}" for form in FORMS if form != "eps"}}

REGISTRY: dict[str, Callable[[], Solver | Integrator]] = {
    "auto": ScaledAdams,
    **{
        f"{method}{suffix}": partial(RungeKutta, method, form)
        for method in ("euler", "midpoint", "heun", "rk4")
        for form, suffix in _EPS.items()
    },
    **{
        f"ab{order}{suffix}": partial(AdamsBashforth, order, form)
        for order in (2, 3, 4)
        for form, suffix in _EPS.items()
        if form != "x0"  # a polynomial in alpha/sigma: unstable, see `eab2` to `eab4`
    },
    **{f"eab{order}": partial(ExponentialAdams, order) for order in (2, 4)},
    "ddim": DDIM,
    **{f"dpm_solver_{order}": partial(DPMSolver, order) for order in (2, 3)},
    "dpm_fast": DPMSolverFast,
    **{f"dpmpp_{order}s": partial(DPMSolverPPS, order) for order in (2, 3)},
    **{f"dpmpp_{order}m": partial(DPMSolverPP, order) for order in (2, 3)},
    "res_2s": RES2S,
    "res_3s": RES3S,
    **{f"deis_tab{order}": partial(DEIS, order) for order in (2, 3, 4)},
    "uni_pc": UniPC,
    "uni_pc_bh2": partial(UniPC, variant="bh2"),
    "uni_p": partial(UniPC, correct=False),
    **{f"uni_pc_{order}": partial(UniPC, order) for order in (1, 2, 4)},
    "uni_pc_eps": partial(UniPC, form="eps"),
    "ipndm": IPNDM,
    **{f"ipndm_{order}": partial(IPNDM, order) for order in (2, 3)},
    "pndm": PNDM,
    "plms": partial(PNDM, "plms"),
    "gradient_estimation": GradientEstimation,
    "ddpm": DDPM,
    "ddpm_forward": partial(DDPM, "forward"),
    "dpm_2_ancestral": DPM2Ancestral,
    "dpmpp_2s_ancestral": DPMSolverPP2SAncestral,
    "gddim": GDDIM,
    "dpmpp_sde": SDEDPMSolverPPS,
    "dpmpp_2m_sde": SDEDPMSolverPP,
    "dpmpp_2m_sde_heun": partial(SDEDPMSolverPP, 2, "heun"),
    "dpmpp_3m_sde": partial(SDEDPMSolverPP, 3),
    "seeds_3": partial(SEEDS, 3),
    "sa_solver": SASolver,
    **{f"sa_solver_{order}": partial(SASolver, order) for order in (1, 2, 4)},
    "er_sde": ERSDE,
    **{f"er_sde_{order}": partial(ERSDE, order) for order in (1, 2)},
    "euler_maruyama": EulerMaruyama,
    "stochastic_heun": StochasticHeun,
    "sra1": SRA1,
    "shark": ShARK,
    "weak_rk3": WeakRungeKutta,
    "reverse_diffusion": ReverseDiffusion,
    "flow_sde": FlowSDE,
    "edm_churn": Churn,
    "restart": Restart,
    "repaint": lambda: Resampling(DDPM(), times=10),
    "consistency": Consistency,
    "pc": lambda: PredictorCorrector(ReverseDiffusion(), LangevinCorrector()),
    "pc_annealed": lambda: PredictorCorrector(ReverseDiffusion(), AnnealedCorrector()),
    "adams": AdaptiveAdams,
    "bosh3": BogackiShampine,
    "dopri5": DormandPrince,
    "tsit5": Tsitouras,
    "dop853": DormandPrince853,
    "dpm_solver_12": lambda: AdaptiveDPMSolver(order=2),
    "dpm_solver_23": AdaptiveDPMSolver,
    "adaptive_sde": AdaptiveSDE,
    "gotta_go_fast": GottaGoFast,
    **{
        f"torchdiffeq_{method}": partial(TorchDiffEq, method)
        for method in ("dopri5", "dopri8", "bosh3")
    },
    "torchdiffeq_rk4": partial(TorchDiffEq, "rk4", steps=50),
    **{f"torchsde_{method}": partial(TorchSDE, method) for method in ("euler", "srk")},
}

ALIASES = {
    "dpm_solver_1": "ddim",
    "dpm_2": "dpm_solver_2",
    "dpm_adaptive": "dpm_solver_23",
    "deis": "deis_tab3",
    "deis_tab1": "ddim",
    "deis_rhoab1": "ddim",
    **{f"deis_rhoab{order}": f"ab{order}" for order in (2, 3, 4)},
    "lms": "ab4",
    **{f"lms_{order}": f"ab{order}" for order in (2, 3, 4)},
    "ipndm_v": "ab4",
    **{f"ipndm_v_{order}": f"ab{order}" for order in (2, 3)},
    "res_2m": "eab2",
    "res_3m": "dpmpp_3m",
    "eab3": "dpmpp_3m",
    "dpmpp_1s_sde": "ddpm",
    "euler_ancestral": "ddpm",
    "seeds_1": "ddpm",
    "seeds_2": "dpmpp_sde",
    "ancestral_vp": "ddpm_forward",
    "ancestral_ve": "ddpm",
    "edm_heun": "heun",
    "lcm": "consistency",
    "ipndm_1": "ddim",
    "ipndm_4": "ipndm",
    "lms_1": "ddim",
    "ipndm_v_1": "ddim",
    "ipndm_v_4": "ab4",
    "res_multistep": "eab2",
    "er_sde_3": "er_sde",
    "sa_solver_3": "sa_solver",
    "uni_pc_3": "uni_pc",
    "uni_pc_bh1": "uni_pc",
}
"""Other names of the same method, to the name of its row."""


def get_solver(solver: str | Solver | Integrator) -> Solver | Integrator:
    """The solver of the given name; a solver object is returned as it is.

    Raises:
        UnknownNameError: no such name; the message carries the nearest ones.
        ArgumentError: neither a name nor a solver object.
    """
    if isinstance(solver, Solver | Integrator):
        return solver
    if not isinstance(solver, str):
        raise ArgumentError(f"solver is {short(solver)}: give a name or a Solver object")
    row = ALIASES.get(solver, solver)
    if row not in REGISTRY:
        names = [*REGISTRY, *ALIASES]
        raise UnknownNameError(
            "solver", solver, names, "`scoresolve solvers` and ss.solvers.REGISTRY"
        )
    return REGISTRY[row]()


def nfe_rule(solver: Solver | Integrator) -> str:
    """Network calls as a function of the steps n, read off traced plans: "2n", "n + 1", ...

    The rule is that of grids of 30 steps; below 24 steps multistep methods start without extra
    calls.
    """
    if isinstance(solver, Integrator):
        return "chosen at run time"
    counts = [trace(solver, VP(), make_grid("uniform", VP(), n).times).nfe for n in (30, 31, 32)]
    slope = counts[2] - counts[1]
    if counts[1] - counts[0] != slope:
        return "depends on the grid"
    rest = counts[0] - 30 * slope
    sign = "+" if rest > 0 else "-"
    return f"{slope if slope > 1 else ''}n" + (f" {sign} {abs(rest)}" if rest else "")


def noise_rule(solver: Solver | Integrator) -> str:
    """What drives the noise: "none"; "path", normals that each belong to an interval of time, so
    that a `BrownianPath` can give them; "fresh", normals of their own; or both.
    """
    if isinstance(solver, Integrator):
        return "path" if solver.stochastic else "none"
    traced = trace(solver, VP(), make_grid("cosine", VP(), 8).times)
    draws = [stage for stage in traced.stages if isinstance(stage, Draw)]
    kinds = ["path"] * any(draw.t != draw.s for draw in draws)
    fresh = any(draw.t == draw.s for draw in draws)
    kinds += ["fresh"] * (fresh or any(isinstance(stage, Custom) for stage in traced.stages))
    return " and ".join(kinds) or "none"
