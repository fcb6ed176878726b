"""What a peer is, and what all adapters need: the grid in its three scales, and its normals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from scoresolve.models import Model
from scoresolve.peers.black_box import BlackBox, Normals
from scoresolve.sde import EDM, GaussianSDE, RectifiedFlow

__all__ = ["LIBRARIES", "Noise", "Peer", "Schedule", "installed", "normals", "versions"]

Noise = Callable[[Tensor, float, float], Tensor]
LIBRARIES = (
    "diffusers",
    "k-diffusion",
    "azula",
    "flow_matching",
    "torchdiffeq",
    "torchsde",
    "torchode",
    "scipy",
)


@dataclass(frozen=True)
class Peer:
    """A sampler of another library.

    Attributes:
        library: one of `LIBRARIES`.
        name: the library's own name and its settings.
        run: `run(model, sde, times, x, noise)`, the state at `times[-1]` from `x` at `times[0]`;
            `noise(x, t, s)` gives the standard normals of the draw between two times.
        stochastic: whether it calls `noise`.
        process: the only kind of process it is made for; None if it runs on any.
        own_grid: it takes the ends of `times` and their number, and places the nodes itself.
        repeats: another peer that computes the same.
        order: order of accuracy that its library claims for it, None if none.
    """

    library: str
    name: str
    run: Callable[[Model, GaussianSDE, Sequence[float], Tensor, Noise | None], Tensor]
    stochastic: bool = False
    process: type[GaussianSDE] | None = None
    own_grid: bool = False
    repeats: str = ""
    order: float | None = None

    @property
    def box(self) -> BlackBox:
        """This peer on any grid, as a black box."""

        def run(model: Model, x: Tensor, times: Sequence[float], noise: Normals) -> Tensor:
            sde: Any = model.sde
            return self.run(model, sde, times, x, lambda like, t, s: noise(like))

        own: dict[object, GaussianSDE] = {EDM: EDM(), RectifiedFlow: RectifiedFlow(T=0.999)}
        return BlackBox(
            run,
            self.name,
            order=self.order,
            stochastic=self.stochastic,
            gridded=True,
            sde=own.get(self.process),
        )


def installed(library: str) -> bool:
    """Whether the library can be imported."""
    return util.find_spec(library.replace("-", "_")) is not None


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    return {name: metadata.version(name) for name in LIBRARIES if installed(name)}


@dataclass(frozen=True)
class Schedule:
    """A grid with alpha, sigma, k = sigma/alpha at its times, and the time of any k."""

    sde: GaussianSDE
    times: tuple[float, ...]
    alpha: Tensor
    sigma: Tensor
    k: Tensor

    @classmethod
    def of(cls, sde: GaussianSDE, times: Sequence[float]) -> Schedule:
        t = torch.tensor(times, dtype=torch.float64)
        return cls(sde, tuple(t.tolist()), sde.alpha(t), sde.sigma(t), (-sde.log_snr(t) / 2).exp())

    @property
    def radius(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2)."""
        return torch.hypot(self.alpha, self.sigma)

    def time(self, k: Tensor | float) -> float:
        """The time at which sigma/alpha is k, exact at the grid's own times."""
        near = int((self.k - k).abs().argmin())
        if float(self.k[near]) == float(k):
            return self.times[near]
        t = float(self.sde.time_from_log_snr(-2 * math.log(float(k))))
        return min(max(t, min(self.times)), max(self.times))


@contextmanager
def normals(noise: Noise | None) -> Iterator[None]:
    """Whatever a library draws by `torch.randn_like` comes from `noise`."""

    def draw(like: Tensor, **_: object) -> Tensor:
        if noise is None:
            return torch.zeros_like(like)
        return noise(like, math.nan, math.nan)

    with mock.patch.object(torch, "randn_like", draw):
        yield
