"""diffusers: schedulers, each given our grid under the names it reads it by.

The state is x/sqrt(alpha^2 + sigma^2), x/alpha or x, by family; `_Convention` tells which.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from scoresolve.models import Model
from scoresolve.peers.base import Noise, Peer, Schedule
from scoresolve.sde import EDM, GaussianSDE, RectifiedFlow

__all__ = ["peers", "quiet_scheduler"]

Calls = tuple[Tensor, list[float]]
"""The scheduler's label and our time of every call of the model."""


def _multistep(scheduler: Any, schedule: Schedule) -> Calls:
    """Schedulers that step through a list of noise levels k."""
    steps = len(schedule.times) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas = schedule.k
    scheduler.timesteps = torch.arange(steps, 0, -1, dtype=torch.float64)
    scheduler.set_begin_index(0)
    return scheduler.timesteps, list(schedule.times[:-1])


def _two_stage(scheduler: Any, schedule: Schedule) -> Calls:
    """The same with two calls a step, at its ends or at its start and its middle in log k."""
    _multistep(scheduler, schedule)
    k = schedule.k
    scheduler.sigmas = torch.cat([k[:1], k[1:-1].repeat_interleave(2), k[-1:]])
    seconds = list(schedule.times[1:])
    if hasattr(scheduler, "sigmas_interpol"):
        middle = (k[1:] * k[:-1]).sqrt()
        scheduler.sigmas_interpol = torch.cat([k[:1], middle.repeat_interleave(2)])
        seconds = [schedule.time(value) for value in middle]
    scheduler.timesteps = torch.arange(2 * len(seconds), 0, -1, dtype=torch.float64)
    pairs = zip(schedule.times[:-1], seconds, strict=True)
    return scheduler.timesteps, list(itertools.chain.from_iterable(pairs))


def _linear(scheduler: Any, schedule: Schedule) -> Calls:
    """Flow matching: the noise levels are our times, at one or two calls a step."""
    prepare = _two_stage if hasattr(type(scheduler), "state_in_first_order") else _multistep
    return prepare(scheduler, replace(schedule, k=schedule.sigma))


def _unit_circle(scheduler: Any, schedule: Schedule) -> Calls:
    """iPNDM: alpha and sigma of unit length, under the names alphas and betas."""
    calls = _multistep(scheduler, schedule)
    scheduler.alphas = schedule.alpha / schedule.radius
    scheduler.betas = schedule.sigma / schedule.radius
    return calls


def _chain(scheduler: Any, schedule: Schedule, every: int = 1) -> Calls:
    """Schedulers of integer timesteps: our times are the chain, clean ones first."""
    scheduler.alphas_cumprod = (schedule.alpha / schedule.radius).square().flip(0)
    nodes = len(schedule.times)
    scheduler.register_to_config(num_train_timesteps=nodes)
    scheduler.num_inference_steps = nodes // every
    labels = torch.arange(nodes - 1, 0, -every)
    return labels, list(schedule.times[:-1:every])


def _plms(scheduler: Any, schedule: Schedule) -> Calls:
    """PNDM without its Runge-Kutta start: a second call at the second node instead."""
    labels, times = _chain(scheduler, schedule)
    scheduler.prk_timesteps = ()
    return torch.cat([labels[:2], labels[1:]]), [*times[:2], *times[1:]]


def _pndm(scheduler: Any, schedule: Schedule) -> Calls:
    """PNDM: three pseudo Runge-Kutta steps, which call the model at both ends and the middle."""
    halves = [(t, (t + s) / 2) for t, s in itertools.pairwise(schedule.times)]
    times = [*itertools.chain.from_iterable(halves), schedule.times[-1]]
    labels, nodes = _chain(scheduler, Schedule.of(schedule.sde, times), every=2)
    start = torch.arange(len(times) - 1, len(times) - 8, -1).repeat_interleave(2)[1:-1]
    scheduler.prk_timesteps = start.numpy()
    first = [time for time in times[:7] for _ in range(2)][1:-1]
    return torch.cat([start, labels[3:]]), [*first, *nodes[3:]]


def _consistency(scheduler: Any, schedule: Schedule) -> Calls:
    """LCM: a chain with noise after the last step too."""
    labels, times = _chain(scheduler, schedule)
    scheduler.timesteps = torch.cat([labels, torch.zeros(1, dtype=labels.dtype)])
    scheduler.set_begin_index(0)
    return labels, times


def _fractions(scheduler: Any, schedule: Schedule) -> Calls:
    """The variance-exploding predictor: labels are fractions of a list of levels."""
    steps = len(schedule.times) - 1
    scheduler.discrete_sigmas = schedule.k.flip(0)
    scheduler.timesteps = torch.arange(steps + 1)
    return (torch.arange(steps, 0, -1) + 0.5) / steps, list(schedule.times[:-1])


@dataclass(frozen=True)
class _Convention:
    """How a family of schedulers is driven.

    Attributes:
        prepare: gives the scheduler our grid.
        prediction: what it takes from the model.
        scale: the state it works on is x / scale, of alpha and sigma.
        step: the name of its step.
    """

    prepare: Callable[[Any, Schedule], Calls]
    prediction: str = "eps"
    scale: Callable[[Tensor, Tensor], Tensor] = torch.hypot
    step: str = "step"


def _alpha(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha


_UNIT = _Convention(_multistep)
_LEVEL = _Convention(_multistep, scale=_alpha)
_STAGES = _Convention(_two_stage, scale=_alpha)
_INTEGER = _Convention(_chain)
_FLOW = _Convention(_linear, "flow", scale=lambda alpha, sigma: torch.ones_like(alpha))
_VE = _Convention(_fractions, "score", step="step_pred", scale=_alpha)


def quiet_scheduler(path: str, **options: Any) -> Any:
    """The diffusers scheduler "file.Class" with these options, without its advice."""
    file, name = path.split(".")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, name)(**options)


@contextmanager
def _quietly_in_double(module: Any, noise: Noise | None) -> Iterator[None]:
    """No casts to float32, no warnings, and whatever the scheduler draws comes from `noise`."""

    def draw(shape: Sequence[int], **_: object) -> Tensor:
        like = torch.zeros(tuple(shape), dtype=torch.float64)
        return like if noise is None else noise(like, math.nan, math.nan)

    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(module, "randn_tensor", draw, create=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # NumPy's about tensors, diffusers' about its own options
        yield


def _drive(
    convention: _Convention,
    path: str,
    options: dict[str, Any],
    call: dict[str, Any],
    model: Model,
    sde: GaussianSDE,
    times: Sequence[float],
    x: Tensor,
    noise: Noise | None,
) -> Tensor:
    schedule, scheduler = Schedule.of(sde, times), quiet_scheduler(path, **options)

    def scale(t: float) -> Tensor:
        return convention.scale(sde.alpha(t), sde.sigma(t))

    state = x / scale(schedule.times[0])
    with _quietly_in_double(sys.modules[type(scheduler).__module__], noise):
        scheduler.is_scale_input_called = True
        step = getattr(scheduler, convention.step)
        for label, t in zip(*convention.prepare(scheduler, schedule), strict=True):
            m = model.predict(convention.prediction, scale(t) * state, t)
            if convention.prediction == "v":  # alpha eps - sigma x0, with alpha and sigma scaled
                m = m / scale(t)
            state = step(m, label, state, **call).prev_sample
    return scale(schedule.times[-1]) * state


def _diffusers(
    name: str,
    path: str,
    convention: _Convention = _UNIT,
    call: dict[str, Any] | None = None,
    stochastic: bool = False,
    process: type[GaussianSDE] | None = None,
    repeats: str = "",
    accuracy: float | None = 1,
    **options: Any,
) -> Peer:
    run = partial(_drive, convention, path, options, call or {})
    return Peer("diffusers", name, run, stochastic, process, repeats=repeats, order=accuracy)


_MULTI = "dpmsolver_multistep.DPMSolverMultistepScheduler"
_SINGLE = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
_UNIPC, _DEIS = "unipc_multistep.UniPCMultistepScheduler", "deis_multistep.DEISMultistepScheduler"
_DDIM, _DDPM, _PNDM = "ddim.DDIMScheduler", "ddpm.DDPMScheduler", "pndm.PNDMScheduler"
_TO_THE_END: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
_NO_CLIP: dict[str, Any] = {"clip_sample": False}


def _multistep_peers(lower: bool) -> Iterator[Peer]:
    """The multistep families, with or without steps of lower order at the end."""
    tail = "" if lower else ", full end"
    options: dict[str, Any] = {"lower_order_final": lower}
    ended = {**options, **_TO_THE_END}
    for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint")):
        for algorithm in ("dpmsolver++", "dpmsolver"):
            repeats = f"azula {'x' if '++' in algorithm else 'z'}EAB2" if kind == "heun" else ""
            yield _diffusers(
                f"{algorithm} {order}M({kind}{tail})",
                _MULTI,
                repeats="" if lower else repeats,
                accuracy=order,
                solver_order=order,
                solver_type=kind,
                algorithm_type=algorithm,
                **ended,
            )
    for order, variant in itertools.product((1, 2, 3, 4), ("bh1", "bh2")):
        for form, data in (("x0", True), ("eps", False)):
            yield _diffusers(
                f"unipc{order}({variant}, {form}{tail})",
                _UNIPC,
                repeats="" if lower or order > 1 else f"diffusers unipc1({variant}, {form})",
                accuracy=order,
                solver_order=order,
                solver_type=variant,
                predict_x0=data,
                **ended,
            )
    for order in (2, 3):
        repeats = "" if lower else f"azula zEAB{order}"
        yield _diffusers(
            f"deis{order}{tail}",
            _DEIS,
            repeats=repeats,
            accuracy=order,
            solver_order=order,
            **options,
        )


def peers() -> list[Peer]:
    singlestep = [
        _diffusers(
            f"{algorithm} {order}S",
            _SINGLE,
            accuracy=order,
            solver_order=order,
            algorithm_type=algorithm,
            lower_order_final=True,
            **_TO_THE_END,
        )
        for order, algorithm in itertools.product((2, 3), ("dpmsolver++", "dpmsolver"))
    ]
    stochastic = [
        _diffusers(
            f"sde-dpmsolver++ {order}M({kind})",
            _MULTI,
            stochastic=True,
            accuracy=order,
            solver_order=order,
            solver_type=kind,
            algorithm_type="sde-dpmsolver++",
            lower_order_final=False,
            **_TO_THE_END,
        )
        for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint"))
    ]
    return [
        *_multistep_peers(lower=True),
        *_multistep_peers(lower=False),
        *singlestep,
        *stochastic,
        _diffusers("ipndm", "ipndm.IPNDMScheduler", _Convention(_unit_circle, "v"), accuracy=4),
        _diffusers("plms", _PNDM, _Convention(_plms), accuracy=2, skip_prk_steps=True),
        _diffusers("pndm", _PNDM, _Convention(_pndm), accuracy=2),
        _diffusers("ddim", _DDIM, _INTEGER, repeats="k-diffusion euler", **_NO_CLIP),
        _diffusers("ddim(eta=0.5)", _DDIM, _INTEGER, {"eta": 0.5}, True, **_NO_CLIP),
        _diffusers("ddpm", _DDPM, _INTEGER, stochastic=True, **_NO_CLIP),
        _diffusers(
            "ddpm(fixed_large)",
            _DDPM,
            _INTEGER,
            stochastic=True,
            variance_type="fixed_large",
            **_NO_CLIP,
        ),
        _diffusers(
            "euler",
            "euler_discrete.EulerDiscreteScheduler",
            _LEVEL,
            repeats="k-diffusion euler",
        ),
        _diffusers(
            "heun",
            "heun_discrete.HeunDiscreteScheduler",
            _STAGES,
            repeats="k-diffusion heun",
            accuracy=2,
        ),
        _diffusers(
            "dpm_2",
            "k_dpm_2_discrete.KDPM2DiscreteScheduler",
            _STAGES,
            repeats="k-diffusion dpm_2",
            accuracy=2,
        ),
        _diffusers(
            "lms4", "lms_discrete.LMSDiscreteScheduler", _LEVEL, repeats="azula zAB4", accuracy=4
        ),
        _diffusers(
            "euler_ancestral",
            "euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
            _LEVEL,
            stochastic=True,
        ),
        _diffusers(
            "sa_solver",
            "sasolver.SASolverScheduler",
            stochastic=True,
            predictor_order=3,
            corrector_order=3,
            lower_order_final=False,
            tau_func=lambda t: torch.ones((), dtype=torch.float64),
        ),
        _diffusers(
            "lcm",
            "lcm.LCMScheduler",
            _Convention(_consistency),
            accuracy=None,
            stochastic=True,
            timestep_scaling=1e12,
            **_NO_CLIP,
        ),
        _diffusers(
            "flow_match_euler",
            "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
            _FLOW,
            process=RectifiedFlow,
        ),
        _diffusers(
            "flow_match_heun",
            "flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler",
            _FLOW,
            accuracy=2,
            process=RectifiedFlow,
        ),
        _diffusers(
            "flow_match_euler(stochastic)",
            "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
            _FLOW,
            stochastic=True,
            process=RectifiedFlow,
            stochastic_sampling=True,
        ),
        _diffusers("sde_ve", "sde_ve.ScoreSdeVeScheduler", _VE, stochastic=True, process=EDM),
    ]
