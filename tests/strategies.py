"""Shared hypothesis strategies, and densities whose answers are written down here once more.

A diagonal mixture p_0 = sum_k w_k N(m_k, v_k) under x_t = alpha x_0 + sigma eps stays a mixture,
p_t = sum_k w_k N(alpha m_k, alpha^2 v_k + sigma^2): log p_t, score and E[x_0 | x_t] in closed form.
For a nonlinear drift, dx = g^2 tanh(x) dt + g dw has (Benes 1981), with tau = int g^2,
p(x, t | y) = cosh(x)/cosh(y) exp(-tau/2) N(x; y, tau) in each coordinate. Langevin dynamics in a
harmonic well, dx = A x dt + noise, has x_t ~ N(e^At m, S + e^At (C - S) e^A't), S at equilibrium.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from scoresolve.sde import (
    EDM,
    SDE,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    GaussianSDE,
    Langevin,
    RectifiedFlow,
    SubVP,
    TimeLike,
    UnderdampedLangevin,
    as_time,
)

__all__ = [
    "PROCESSES",
    "BenesSDE",
    "DiagonalMixture",
    "OwnGaussian",
    "OwnVP",
    "Well",
    "benes_log_density",
    "dtypes",
    "event_shapes",
    "fractions",
    "generator",
    "mixtures",
    "normal",
    "processes",
    "seeds",
    "times",
    "wells",
]

LOG_TAU = math.log(2 * math.pi)


@dataclass(frozen=True)
class OwnGaussian(GaussianSDE):
    """What a user writes: alpha and sigma, and nothing else."""

    rate: float = 0.7
    scale: float = 1.3
    T: float = 2.0
    t_min: float = 1e-3

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.exp(-self.rate * as_time(t))

    def sigma(self, t: TimeLike) -> Tensor:
        t = as_time(t)
        return self.scale * torch.sqrt(t * (1 + t))


@dataclass(frozen=True)
class OwnVP(SDE):
    """`VP()` as a user may write it: drift and diffusion, and nothing else."""

    t_min: float = 1e-3

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        rate = -self._beta(t) / 2
        return rate.to(x).reshape(rate.shape + (1,) * (x.ndim - rate.ndim)) * x

    def diffusion(self, t: TimeLike) -> Tensor:
        return self._beta(t).sqrt()

    def _beta(self, t: TimeLike) -> Tensor:
        return 0.1 + (20.0 - 0.1) * as_time(t)


@dataclass(frozen=True)
class BenesSDE(SDE):
    """A nonlinear process given by drift and diffusion alone: g^2 tanh(x) and g, g^2 = 1 + c t."""

    growth: float = 0.5
    T: float = 1.5

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        squared = 1 + self.growth * as_time(t)
        return squared.reshape(squared.shape + (1,) * (x.ndim - squared.ndim)) * torch.tanh(x)

    def diffusion(self, t: TimeLike) -> Tensor:
        return torch.sqrt(1 + self.growth * as_time(t))


def benes_log_density(
    sde: BenesSDE, weights: Tensor, starts: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """log p_t [B] at `x` [B, D] from starting points `starts` [K, D] with `weights` [K]."""
    tau = (t + sde.growth * t**2 / 2)[:, None, None]
    distance = x[:, None] - starts
    each = (
        (x.cosh().log()[:, None] - starts.cosh().log())
        - tau / 2
        - (distance**2 / tau + tau.log() + LOG_TAU) / 2
    )
    return torch.logsumexp(weights.log() + each.sum(-1), dim=1)


@dataclass(frozen=True)
class Well:
    """Langevin dynamics in the well k q^2/2, and its law p_t from N(start, F F^T) on.

    Every coordinate of the event is one of its own. With momentum, states are [B, 2, *event],
    `start` is [2] and `factor` [2, 2]; without they are [B, 1, *event], [1] and [1, 1].

    Attributes:
        stiffness: k, [].
        start, factor: mean of a coordinate at t = 0, and F of its covariance F F^T.
        friction, mass: of the momentum; None without.
    """

    stiffness: Tensor
    start: Tensor
    factor: Tensor
    friction: float | None = None
    mass: float = 1.0

    @property
    def sde(self) -> SDE:
        def force(q: Tensor) -> Tensor:
            return -self.stiffness * q

        if self.friction is None:
            return Langevin(force, T=0.6)
        return UnderdampedLangevin(force, self.friction, self.mass, T=0.6)

    def law(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, d] and covariance [B, d, d] of a coordinate at `t` [B]."""
        k, zero = self.stiffness, torch.zeros_like(self.stiffness)
        if self.friction is None:
            rate, rest = -k.reshape(1, 1), (1 / k).reshape(1, 1)
        else:
            row = [zero, zero + 1 / self.mass, -k, zero - self.friction]
            rate = torch.stack(row).reshape(2, 2)
            rest = torch.stack([1 / k, zero + self.mass]).diag()
        flow = torch.linalg.matrix_exp(t[:, None, None] * rate)
        return flow @ self.start, rest + flow @ (self.factor @ self.factor.mT - rest) @ flow.mT

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        """log p_t, [B]."""
        mean, covariance = self.law(torch.tensor([t], dtype=x.dtype))
        each = torch.distributions.MultivariateNormal(mean[0], covariance[0])
        return each.log_prob(x.movedim(1, -1)).flatten(1).sum(1)

    def score(self, x: Tensor, t: TimeLike) -> Tensor:
        mean, covariance = self.law(as_time(t).expand(len(x)).to(x))
        centred = x.flatten(2) - mean[..., None]
        return -torch.linalg.solve(covariance, centred).reshape(x.shape)


def wells(stiffness: float = 2.0) -> list[Well]:
    """One without and one with momentum, of leaf tensors that require gradients."""

    def leaf(value: object) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    return [
        Well(leaf(stiffness), leaf([0.7]), leaf([[0.45]])),
        Well(
            leaf(stiffness),
            leaf([0.7, -0.4]),
            leaf([[0.5, 0.1], [0.2, 0.7]]),
            friction=1.5,
            mass=0.8,
        ),
    ]


@dataclass(frozen=True)
class DiagonalMixture:
    """sum_k weights_k N(means_k, diag variances_k); [K], [K, D], [K, D] in float64."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def _parts(self, sde: GaussianSDE, x: Tensor, t: TimeLike) -> tuple[Tensor, ...]:
        t = as_time(t)
        alpha = sde.alpha(t).reshape(-1, 1, 1)
        variance = alpha**2 * self.variances + sde.sigma(t).reshape(-1, 1, 1) ** 2
        distance = x[:, None] - alpha * self.means
        logs = self.weights.log() - (distance**2 / variance + variance.log() + LOG_TAU).sum(-1) / 2
        return alpha, variance, distance, logs

    def log_prob(self, sde: GaussianSDE, x: Tensor, t: TimeLike) -> Tensor:
        """log p_t(x), [B]."""
        return torch.logsumexp(self._parts(sde, x, t)[3], dim=1)

    def score(self, sde: GaussianSDE, x: Tensor, t: TimeLike) -> Tensor:
        """grad log p_t(x), [B, D]."""
        _, variance, distance, logs = self._parts(sde, x, t)
        return -(logs.softmax(1)[..., None] * distance / variance).sum(1)

    def denoiser(self, sde: GaussianSDE, x: Tensor, t: TimeLike) -> Tensor:
        """E[x_0 | x_t = x], [B, D], as the mean of the components' posterior means."""
        alpha, variance, distance, logs = self._parts(sde, x, t)
        posterior = self.means + alpha * self.variances / variance * distance
        return (logs.softmax(1)[..., None] * posterior).sum(1)

    def sample(self, sde: GaussianSDE, t: Tensor, rng: torch.Generator) -> Tensor:
        """One draw of x_t for each time of `t` [B]; [B, D]."""
        which = torch.multinomial(self.weights, len(t), replacement=True, generator=rng)
        x0 = self.means[which] + self.variances[which].sqrt() * normal(rng, len(t), self.dim)
        return sde.alpha(t)[:, None] * x0 + sde.sigma(t)[:, None] * normal(rng, len(t), self.dim)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64 numbers of `shape`."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _between(low: float, high: float) -> SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def _falling_products(factors: list[float]) -> DiscreteVP:
    return DiscreteVP(torch.tensor(factors, dtype=torch.float64).cumprod(0))


_BETAS = {"beta_min": _between(0.01, 1.0), "beta_max": _between(1.0, 60.0)}
_SIGMAS = {"sigma_min": _between(1e-3, 0.1), "sigma_max": _between(1.0, 100.0)}

PROCESSES: dict[str, SearchStrategy[GaussianSDE]] = {
    "VP": st.builds(VP, **_BETAS),
    "SubVP": st.builds(SubVP, **_BETAS),
    "CosineVP": st.builds(CosineVP, s=_between(1e-3, 0.1), T=_between(0.5, 0.999)),
    "VE": st.builds(VE, **_SIGMAS),
    "EDM": st.builds(EDM, **_SIGMAS),
    "RectifiedFlow": st.builds(RectifiedFlow),
    "DiscreteVP": st.lists(_between(0.3, 0.999), min_size=1, max_size=12).map(_falling_products),
    "OwnGaussian": st.builds(OwnGaussian, rate=_between(0.1, 2.0), scale=_between(0.2, 3.0)),
}
"""Random Gaussian processes by kind; a test over all kinds is parametrized by these names."""


def processes() -> SearchStrategy[GaussianSDE]:
    """Any Gaussian process."""
    return st.one_of(*PROCESSES.values())


def fractions(low: float = 0.01, high: float = 0.98) -> SearchStrategy[float]:
    """Positions within [0, T], as a fraction of T."""
    return _between(low, high)


def times(sde: SDE, rows: int, low: float = 0.01, high: float = 0.98) -> SearchStrategy[Tensor]:
    """Times [rows] inside (low T, high T), float64."""
    drawn = st.lists(fractions(low, high), min_size=rows, max_size=rows)
    return drawn.map(lambda u: sde.T * torch.tensor(u, dtype=torch.float64))


def seeds() -> SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def dtypes() -> SearchStrategy[torch.dtype]:
    return st.sampled_from([torch.float32, torch.float64])


def event_shapes() -> SearchStrategy[tuple[int, ...]]:
    """Event shapes of zero to three axes; () is a batch of scalars."""
    return st.lists(st.integers(1, 4), max_size=3).map(tuple)


def _mixture(seed: int, components: int, dim: int) -> DiagonalMixture:
    rng = generator(seed)
    weights = torch.rand(components, generator=rng, dtype=torch.float64) + 0.1
    return DiagonalMixture(
        weights / weights.sum(),
        1.5 * normal(rng, components, dim),
        torch.exp(0.7 * normal(rng, components, dim) - 1),
    )


def mixtures() -> SearchStrategy[DiagonalMixture]:
    """Mixtures of one to three components in one to three dimensions."""
    return st.builds(_mixture, seeds(), st.integers(1, 3), st.integers(1, 3))
