"""diffusers as its users run it: the scheduler's own timesteps, dtype, noise and end.

The adapters drive `set_timesteps`, `scale_model_input` and `step` as a pipeline does, with the
exact eps or velocity for a network. A scheduler's chain of alphas is `DiscreteVP`, whose time is
the timestep plus 1; those that work on x/alpha say so by their `init_noise_sigma`.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.models import Model
from scoresolve.peers.black_box import BlackBox, Normals
from scoresolve.peers.from_diffusers import quiet_scheduler
from scoresolve.sde import EDM, DiscreteVP, RectifiedFlow

__all__ = ["boxes", "diffusers_scheduler"]

CHAIN = DiscreteVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
"""The 1,000 steps of linear beta that all these schedulers have by default."""
FLOW = RectifiedFlow(T=0.999)


def _prepared(path: str, options: dict[str, Any], n: int) -> Any:
    scheduler = quiet_scheduler(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about tensors
        scheduler.set_timesteps(n)
    return scheduler


def _chain_start(path: str, options: dict[str, Any], n: int) -> float:
    return float(_prepared(path, options, n).timesteps[0]) + 1


def _run_chain(
    path: str,
    options: dict[str, Any],
    call: dict[str, Any],
    model: Model,
    x: Tensor,
    n: int,
    noise: Normals,
) -> Tensor:
    scheduler = _prepared(path, options, n)
    first = float(scheduler.init_noise_sigma)
    exploding = hasattr(scheduler, "sigmas") and hasattr(scheduler, "is_scale_input_called")
    state = first * x if exploding and first > 1 else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in scheduler.timesteps:
            eps = model.predict("eps", scheduler.scale_model_input(state, t), float(t) + 1)
            state = scheduler.step(eps, t, state, **call).prev_sample
    return state


def _run_flow(
    path: str, options: dict[str, Any], model: Model, x: Tensor, n: int, noise: Normals
) -> Tensor:
    scheduler = quiet_scheduler(path, **options)
    # as in pipelines that give their own levels, so that the first is below 1
    scheduler.set_timesteps(sigmas=np.linspace(FLOW.T, 1 / n, n).tolist())
    state = x
    for t in scheduler.timesteps:
        velocity = model.predict("flow", state, float(t) / 1000)
        state = scheduler.step(velocity, t, state).prev_sample
    return state


def _run_corrected(
    options: dict[str, Any], model: Model, x: Tensor, n: int, noise: Normals
) -> Tensor:
    scheduler = quiet_scheduler("sde_ve.ScoreSdeVeScheduler", **options)
    scheduler.set_timesteps(n)
    scheduler.set_sigmas(n)
    state = x
    for i, t in enumerate(scheduler.timesteps):
        level = float(scheduler.sigmas[i])
        for _ in range(scheduler.config.correct_steps):
            state = scheduler.step_correct(model.predict("score", state, level), state).prev_sample
        state = scheduler.step_pred(model.predict("score", state, level), t, state).prev_sample
    return state


def diffusers_scheduler(
    path: str,
    name: str = "",
    order: float | None = 1,
    stochastic: bool = False,
    call: dict[str, Any] | None = None,
    refinements: tuple[int, ...] = (50, 100, 200),
    **options: Any,
) -> BlackBox:
    """A scheduler of diffusers with its default chain of 1,000 alphas, as a black box.

    Args:
        path: file and class, as "ddim.DDIMScheduler".
        name: what it is called; the class if empty.
        order: order of accuracy it claims, None if none.
        stochastic: whether it claims to draw noise.
        call: options of its `step`.
        refinements: increasing numbers of steps, at most 1000.
        **options: of the scheduler.

    Raises:
        ArgumentError: diffusers is not installed, or has no such scheduler or option.
    """
    try:
        quiet_scheduler(path, **options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"diffusers makes no scheduler {path!r} with these options: {error}"
        ) from error
    return BlackBox(
        partial(_run_chain, path, options, call or {}),
        name=name or path.split(".")[1],
        order=order,
        stochastic=stochastic,
        start=partial(_chain_start, path, options),
        end=0.0,
        dtype=torch.float32,
        refinements=refinements,
        sde=CHAIN,
    )


_DDIM, _MULTI = "ddim.DDIMScheduler", "dpmsolver_multistep.DPMSolverMultistepScheduler"
_DEIS, _UNIPC = "deis_multistep.DEISMultistepScheduler", "unipc_multistep.UniPCMultistepScheduler"
_SINGLE = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
_SPACINGS = ("leading", "linspace", "trailing")
_NO_CLIP: dict[str, Any] = {"clip_sample": False}


def boxes() -> list[BlackBox]:
    """The schedulers that are audited, with the options that change what they do."""
    make = diffusers_scheduler
    uneven, halved = (60, 120, 240), (31, 62, 124)
    return [
        *(
            make(
                _DDIM, f"ddim({spacing})", refinements=uneven, timestep_spacing=spacing, **_NO_CLIP
            )
            for spacing in _SPACINGS
        ),
        make("ddpm.DDPMScheduler", "ddpm", 1, True, **_NO_CLIP),
        *(
            make(
                _MULTI,
                f"dpmsolver++ 2M({spacing})",
                2,
                refinements=halved,
                timestep_spacing=spacing,
            )
            for spacing in _SPACINGS
        ),
        make(_MULTI, "dpmsolver++ 2M(karras)", 2, refinements=halved, use_karras_sigmas=True),
        make(_MULTI, "sde-dpmsolver++ 2M", 2, True, None, halved, algorithm_type="sde-dpmsolver++"),
        make(
            "dpmsolver_singlestep.DPMSolverSinglestepScheduler",
            "dpmsolver++ 2S",
            2,
            False,
            None,
            halved,
        ),
        *(
            make(
                _DEIS,
                f"deis{order}",
                order,
                refinements=(80, 160, 320),
                solver_order=order,
                lower_order_final=False,
            )
            for order in (2, 3)
        ),
        *(
            make(
                _UNIPC,
                f"unipc2({kind})",
                2,
                refinements=halved,
                solver_type=kind,
                final_sigmas_type="zero",
            )
            for kind in ("bh1", "bh2")
        ),
        make("pndm.PNDMScheduler", "plms", 2, skip_prk_steps=True),
        make("euler_discrete.EulerDiscreteScheduler", "euler"),
        make("euler_discrete.EulerDiscreteScheduler", "euler(leading)", timestep_spacing="leading"),
        make(
            "euler_ancestral_discrete.EulerAncestralDiscreteScheduler", "euler_ancestral", 1, True
        ),
        make("lms_discrete.LMSDiscreteScheduler", "lms4", 4, refinements=halved),
        BlackBox(
            partial(_run_flow, "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler", {}),
            name="flow_match_euler",
            order=1,
            start=FLOW.T,
            end=0.0,
            dtype=torch.float32,
            refinements=(50, 100, 200),
            sde=FLOW,
        ),
        BlackBox(
            partial(
                _run_flow,
                "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
                {"stochastic_sampling": True},
            ),
            name="flow_match_euler(stochastic)",
            order=1,
            stochastic=True,
            start=FLOW.T,
            end=0.0,
            dtype=torch.float32,
            refinements=(50, 100, 200),
            sde=FLOW,
        ),
        BlackBox(
            partial(_run_corrected, {"sigma_max": 50.0, "sigma_min": 0.01}),
            name="sde_ve with its corrector",
            stochastic=True,
            start=50.0,
            end=0.0,
            dtype=torch.float32,
            refinements=(16, 32, 64),
            sde=EDM(),
        ),
    ]
