"""azula: x itself, with alpha and sigma as a schedule, and a denoiser that returns a posterior."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresolve.models import Model
from scoresolve.peers.base import Noise, Peer, normals
from scoresolve.sde import GaussianSDE

__all__ = ["azula_denoiser", "peers"]


def azula_denoiser(model: Model, sde: GaussianSDE) -> Any:
    """Our model as a denoiser of azula, with our schedule."""
    denoise = importlib.import_module("azula.denoise")

    class Ours(denoise.Denoiser):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.schedule = lambda t: (sde.alpha(t), sde.sigma(t))

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            return denoise.DiracPosterior(mean=model.predict("x0", x_t, t))

    return Ours()


def _azula_run(
    sampler: str,
    options: dict[str, Any],
    model: Model,
    sde: GaussianSDE,
    times: Sequence[float],
    x: Tensor,
    noise: Noise | None,
) -> Tensor:
    grid = torch.tensor([float(t) for t in times], dtype=torch.float64)
    kind = getattr(importlib.import_module("azula.sample"), sampler)
    gridded = type(sampler, (kind,), {"timesteps": property(lambda self: grid)})
    with normals(noise):
        out: Tensor = gridded(azula_denoiser(model, sde), silent=True, **options)(x)
    return out


def _azula(
    name: str,
    sampler: str,
    accuracy: float,
    stochastic: bool = False,
    repeats: str = "",
    **options: Any,
) -> Peer:
    run = partial(_azula_run, f"{sampler}Sampler", options)
    return Peer("azula", name, run, stochastic, repeats=repeats, order=accuracy)


def peers() -> list[Peer]:
    families = ("zAB", "vAB", "zEAB", "xEAB", "REAB")
    return [
        _azula("euler", "Euler", 1, repeats="k-diffusion euler"),
        _azula("heun", "Heun", 2, repeats="k-diffusion heun"),
        _azula("ddim", "DDIM", 1, repeats="k-diffusion euler"),
        *(_azula(f"{family}{p}", family, p, order=p) for family in families for p in (2, 3, 4)),
        _azula("ddpm", "DDPM", 1, True),
        _azula("ddim(eta=0.5)", "DDIM", 1, True, eta=0.5),
        _azula("ito", "Ito", 1, True),
    ]
