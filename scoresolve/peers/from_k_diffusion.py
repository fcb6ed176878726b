"""k-diffusion: x' = x/alpha at noise level k = sigma/alpha, and a denoiser `D(x', k)`."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresolve.models import Model
from scoresolve.peers.base import Noise, Peer, Schedule, normals
from scoresolve.sde import GaussianSDE

__all__ = ["k_sampling", "peers"]


def k_sampling() -> Any:
    """`k_diffusion.sampling`, without the training half of the package and all that it imports."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        raise ImportError("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(spec.origin).parent)]
    utils: Any = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    package.utils = utils  # type: ignore[attr-defined]
    stand_ins = {"k_diffusion": package, "k_diffusion.utils": utils}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _k_denoiser(model: Model, schedule: Schedule) -> Callable[..., Tensor]:
    """`D(x', k [B]) = E[x0 | x']`, the model that k-diffusion calls."""

    def denoise(x: Tensor, k: Tensor, **_: object) -> Tensor:
        t = schedule.time(k.flatten()[0])
        return model.predict("x0", float(schedule.sde.alpha(t)) * x, t)

    return denoise


def _k_noise(noise: Noise | None, schedule: Schedule, like: Tensor) -> Callable[..., Tensor]:
    def sampler(k: Tensor, k_next: Tensor) -> Tensor:
        if noise is None:
            return torch.zeros_like(like)
        return noise(like, schedule.time(k), schedule.time(k_next))

    return sampler


def _k_run(
    function: str,
    options: dict[str, Any],
    takes_noise: bool,
    model: Model,
    sde: GaussianSDE,
    times: Sequence[float],
    x: Tensor,
    noise: Noise | None,
) -> Tensor:
    schedule = Schedule.of(sde, times)
    if takes_noise:
        options = {**options, "noise_sampler": _k_noise(noise, schedule, x)}
    sample = getattr(k_sampling(), function)
    with normals(noise):
        out: Tensor = sample(
            _k_denoiser(model, schedule),
            x / schedule.alpha[0],
            schedule.k,
            disable=True,
            **options,
        )
    return schedule.alpha[-1] * out


def _k_fast(
    model: Model, sde: GaussianSDE, times: Sequence[float], x: Tensor, noise: Noise | None
) -> Tensor:
    schedule = Schedule.of(sde, times)
    solver = k_sampling().DPMSolver(_k_denoiser(model, schedule))
    start, end = -schedule.k[0].log(), -schedule.k[-1].log()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out: Tensor = solver.dpm_solver_fast(
            x / schedule.alpha[0], start, end, len(times) - 1, noise_sampler=lambda *_: 0.0
        )
    finally:
        torch.set_default_dtype(default)
    return schedule.alpha[-1] * out


def _k_single(
    order: int,
    model: Model,
    sde: GaussianSDE,
    times: Sequence[float],
    x: Tensor,
    noise: Noise | None,
) -> Tensor:
    schedule = Schedule.of(sde, times)
    solver = k_sampling().DPMSolver(_k_denoiser(model, schedule))
    lam = -schedule.k.log()
    state = x / schedule.alpha[0]
    for t, s in itertools.pairwise(lam):
        state, _ = getattr(solver, f"dpm_solver_{order}_step")(state, t, s)
    return schedule.alpha[-1] * state


def _k(
    name: str,
    function: str,
    accuracy: float,
    stochastic: bool = False,
    repeats: str = "",
    **options: Any,
) -> Peer:
    takes_noise = function.endswith(("_ancestral", "_sde"))
    run = partial(_k_run, f"sample_{function}", options, takes_noise)
    return Peer("k-diffusion", name, run, stochastic, repeats=repeats, order=accuracy)


def peers() -> list[Peer]:
    multi, full = "diffusers dpmsolver++", "M(midpoint, full end)"
    return [
        _k("euler", "euler", 1),
        _k("heun", "heun", 2),
        _k("dpm_2", "dpm_2", 2),
        *(_k(f"lms{p}", "lms", p, order=p, repeats=f"azula zAB{p}") for p in (2, 3, 4)),
        _k("dpmpp_2m", "dpmpp_2m", 2, repeats=f"{multi} 2{full}"),
        _k("dpmpp_2s", "dpmpp_2s_ancestral", 2, eta=0.0),
        _k(
            "dpmpp_2m_sde(eta=0, heun)",
            "dpmpp_2m_sde",
            2,
            repeats="azula xEAB2",
            eta=0.0,
            solver_type="heun",
        ),
        _k("dpmpp_3m_sde(eta=0)", "dpmpp_3m_sde", 3, repeats=f"{multi} 3{full}", eta=0.0),
        Peer("k-diffusion", "dpm_fast", _k_fast, own_grid=True, order=3),
        Peer(
            "k-diffusion",
            "dpm_solver_2",
            partial(_k_single, 2),
            repeats="k-diffusion dpm_2",
            order=2,
        ),
        Peer("k-diffusion", "dpm_solver_3", partial(_k_single, 3), order=3),
        *(
            _k(name, name, order, True)
            for name, order in (
                ("euler_ancestral", 1),
                ("dpm_2_ancestral", 2),
                ("dpmpp_2s_ancestral", 2),
                ("dpmpp_sde", 2),
                ("dpmpp_2m_sde", 2),
                ("dpmpp_3m_sde", 3),
            )
        ),
        _k("dpmpp_2m_sde(heun)", "dpmpp_2m_sde", 2, True, solver_type="heun"),
        _k("heun(churn)", "heun", 2, True, s_churn=10.0, s_tmin=0.05, s_tmax=50.0),
    ]
