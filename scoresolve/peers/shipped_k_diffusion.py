"""k-diffusion, EDM and azula as their users run them: own levels, own draws, own end."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.models import Model
from scoresolve.peers.black_box import BlackBox, Normals
from scoresolve.peers.from_azula import azula_denoiser
from scoresolve.peers.from_k_diffusion import k_sampling
from scoresolve.sde import EDM, VP

__all__ = ["azula_boxes", "azula_sampler", "edm_sampler", "k_boxes", "k_diffusion_function"]

LEVELS = EDM()


def _denoiser(model: Model) -> Callable[..., Tensor]:
    def denoise(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        return model.predict("x0", x, sigma.flatten()[0])

    return denoise


def _run_k(
    function: str, options: dict[str, Any], model: Model, x: Tensor, n: int, noise: Normals
) -> Tensor:
    ramp = torch.linspace(0, 1, n, dtype=x.dtype)
    low, high = LEVELS.sigma_min ** (1 / 7), LEVELS.sigma_max ** (1 / 7)
    sigmas = torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1, dtype=x.dtype)])
    sample = getattr(k_sampling(), function)
    out: Tensor = sample(_denoiser(model), x, sigmas, disable=True, **options)
    return out


def _run_k_adaptive(model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
    ends = LEVELS.sigma_min, LEVELS.sigma_max
    out: Tensor = k_sampling().sample_dpm_adaptive(_denoiser(model), x, *ends, disable=True)
    return out


def k_diffusion_function(
    function: str, order: float | None = 1, stochastic: bool = False, **options: Any
) -> BlackBox:
    """A function of `k_diffusion.sampling` on n Karras levels and 0, as a black box.

    Args:
        function: its name, as "sample_heun".
        order: order of accuracy it claims, None if none.
        stochastic: whether it claims to draw noise.
        **options: of the function.
    """
    return BlackBox(
        partial(_run_k, function, options),
        name=function.removeprefix("sample_"),
        order=order,
        stochastic=stochastic,
        end=0.0,
        refinements=(16, 32, 64) if stochastic else (32, 64, 128),
        sde=LEVELS,
    )


def k_boxes() -> list[BlackBox]:
    """The functions that are audited."""
    make = k_diffusion_function
    return [
        make("sample_euler", None),
        make("sample_heun", None),
        make("sample_dpm_2", None),
        make("sample_lms", None),
        make("sample_dpmpp_2m", None),
        make("sample_euler_ancestral", None, True),
        make("sample_dpmpp_2s_ancestral", None, True),
        make("sample_dpmpp_sde", None, True),
        make("sample_dpmpp_2m_sde", None, True),
        make("sample_dpmpp_3m_sde", None, True),
        BlackBox(_run_k_adaptive, "dpm_adaptive", adaptive=True, end=LEVELS.sigma_min, sde=LEVELS),
    ]


def edm_sampler(function: Callable[..., Tensor], name: str = "", **options: Any) -> BlackBox:
    """A function `sampler(net, latents, num_steps=, randn_like=, ...)`, EDM's, as a black box.

    Args:
        function: the sampler; it starts from sigma_max times the latents and ends at 0.
        name: what it is called; the function's name if empty.
        **options: of the function.

    Raises:
        ArgumentError: it is no function.
    """

    if not callable(function):
        raise ArgumentError(f"function = {function!r}: give a sampler(net, latents, num_steps=)")

    def run(model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
        def net(x: Tensor, sigma: Tensor, *_: object) -> Tensor:
            return model.predict("x0", x, torch.as_tensor(sigma).flatten()[0])

        net.sigma_min, net.sigma_max = LEVELS.sigma_min, LEVELS.sigma_max  # type: ignore[attr-defined]
        net.round_sigma = torch.as_tensor  # type: ignore[attr-defined]
        latents = x / LEVELS.sigma_max
        return function(net, latents, num_steps=n, randn_like=noise, **options)

    churn = options.get("S_churn", 0.0)
    return BlackBox(
        run,
        name=name or getattr(function, "__name__", "edm_sampler"),
        order=2,
        stochastic=churn > 0,
        end=0.0,
        refinements=(16, 32, 64),
        sde=LEVELS,
    )


def _run_azula(
    sampler: str, options: dict[str, Any], model: Model, x: Tensor, n: int, noise: Normals
) -> Tensor:
    sde: Any = model.sde
    made = getattr(importlib.import_module("azula.sample"), sampler)(
        azula_denoiser(model, sde),
        stop=sde.t_min,
        steps=n,
        silent=True,
        dtype=torch.float64,
        **options,
    )
    out: Tensor = made(x)
    return out


def azula_sampler(
    sampler: str, order: float | None = 1, stochastic: bool = False, name: str = "", **options: Any
) -> BlackBox:
    """A sampler class of azula on times uniform in [t_min, 1], as a black box.

    Args:
        sampler: its class, as "DDIMSampler".
        order: order of accuracy it claims, None if none.
        stochastic: whether it claims to draw noise.
        name: what it is called; the class if empty.
        **options: of the class.
    """
    return BlackBox(
        partial(_run_azula, sampler, options),
        name=name or sampler,
        order=order,
        stochastic=stochastic,
        sde=VP(),
    )


def azula_boxes() -> list[BlackBox]:
    """The samplers that are audited."""
    return [
        azula_sampler("DDIMSampler", None, name="ddim(eta=0)", eta=0.0),
        azula_sampler("DDPMSampler", None, True, name="ddpm"),
        azula_sampler("HeunSampler", None, name="heun"),
    ]
