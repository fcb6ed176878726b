"""Samples given a measurement y = A x0 + s n, n ~ N(0, I), with a model of x0 alone.

With x0' = E[x0 | x_t], J its Jacobian in x_t and r = y - A x0', all methods are of the form

    x0 <- x0' + (sigma^2 / alpha) J^T A^T u,     score <- score + J^T A^T u:

    DPS     u = (w / s^2) r                       p(y | x_t) ~ N(A x0', s^2 I)
    PiGDM   u = (c A A^T + s^2 I)^-1 r            p(y | x_t) ~ N(A x0', c A A^T + s^2 I)
    MMPS    u = (A V A^T + s^2 I)^-1 r            V = (sigma^2 / alpha) J = Cov[x0 | x_t]

MMPS is exact for Gaussian data, PiGDM for data N(mu, v I) with c = v sigma^2 / (v alpha^2 +
sigma^2), DPS for neither. `GaussianMixture.condition` gives the truth to hold them against.
Where A is not linear, r = y - A(x0') and A stands for its Jacobian at x0': DPS is then still the
gradient of its likelihood, the others are exact where A is affine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, check_output, whole_number
from scoresolve.grid import Grid
from scoresolve.guidance.base import (
    CleanModel,
    Cost,
    GridAhead,
    GuidedModel,
    cost_at,
    flat,
    positive,
)
from scoresolve.guidance.linear import (
    LinearMap,
    Measurement,
    Tangent,
    check_operator,
    conjugate_gradients,
)
from scoresolve.models import Model
from scoresolve.sde import SDE, TimeLike, as_time, expand

__all__ = ["dps", "dps_steps", "inpaint", "mmps", "pigdm"]


def dps(
    score: Model | Callable[..., Tensor], sde: SDE, measurement: Measurement, scale: float = 1.0
) -> GuidedModel:
    """Diffusion posterior sampling: p(y | x_t) is taken for p(y | x0 = E[x0 | x_t]).

        score <- score - w / (2 s^2) grad_x |y - A E[x0 | x_t]|^2.

    This is the likelihood of the paper; with w = 1 and little noise it is stiff, since it
    disregards what x_t leaves open; see `dps_steps` for the step lengths that are used instead.
    A call costs one forward and one vector-Jacobian product.

    Args:
        score: the model of the data alone.
        sde: the process.
        measurement: the operator, its noise and y.
        scale: w > 0.

    Returns:
        A `Model` of the posterior, which takes the condition `observation=`.

    Raises:
        ArgumentError: the measurement has no noise, or `scale` is not positive.

    Source:
        Chung et al. 2023 (2209.14687), theorem 1 and eq. 16.
    """
    if _measurement(measurement).noise_std == 0:
        raise ArgumentError("noise_std = 0 has no likelihood for DPS: give a positive one")
    weight = positive("scale", scale) / measurement.noise_std**2
    return _Posterior(score, sde, measurement, partial(_weigh_likelihood, weight))


def dps_steps(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    measurement: Measurement,
    grid: Grid | Sequence[float] | Tensor,
    step: float = 1.0,
) -> GuidedModel:
    """Diffusion posterior sampling with the paper's step lengths, for "ddpm" on a known grid.

    After every ancestral step from t to s the state is moved by

        x_s <- x_s - (step / |r|) grad_x |r|^2,   r = y - A E[x0 | x_t];

    the ancestral mean has alpha_s (1 - SNR_t / SNR_s) x0 in it, so this is the model with

        x0 <- x0 - (step / |r|) grad_x |r|^2 / (alpha_s (1 - SNR_t / SNR_s)).

    The noise of y plays no part. A call costs one forward and one vector-Jacobian product.

    Args:
        score: the model of the data alone.
        sde: the process.
        measurement: the operator and y.
        grid: the grid that the solver runs on.
        step: zeta > 0; 0.3 to 1 in the paper.

    Returns:
        A `Model`, to be solved by "ddpm" on `grid`, which takes the condition `observation=`.

    Raises:
        ArgumentError: `step` is not positive.
        GridError: `grid` does not decrease strictly; at a call, the time is not on it.

    Source:
        Chung et al. 2023 (2209.14687), algorithm 1 and appendix C.2.
    """
    length, ahead = 2 * positive("step", step), GridAhead(sde, grid)
    return _Posterior(score, sde, measurement, partial(_weigh_steps, length, ahead))


def pigdm(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    measurement: Measurement,
    data_variance: float = 1.0,
    iterations: int = 100,
) -> GuidedModel:
    """Pseudoinverse guidance: x0 given x_t is taken for N(E[x0 | x_t], c I).

        c = v sigma^2 / (v alpha^2 + sigma^2),   u = (c A A^T + s^2 I)^-1 (y - A E[x0 | x_t]).

    Exact for data N(mu, v I). A call costs one forward and one vector-Jacobian product; u is
    found by conjugate gradients, which call the operator and not the model.

    Args:
        score: the model of the data alone.
        sde: the process.
        measurement: the operator, its noise and y.
        data_variance: v > 0, the variance of one element of the data.
        iterations: most steps of conjugate gradients.

    Returns:
        A `Model` of the posterior, which takes the condition `observation=`.

    Raises:
        ArgumentError: a number is out of range.

    Source:
        Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", ICLR,
        section 3, with its c for the general alpha and v.
    """
    v = positive("data_variance", data_variance)
    count = whole_number("iterations", iterations)

    return _Posterior(score, sde, measurement, partial(_weigh_pseudoinverse, v, count))


def mmps(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    measurement: Measurement,
    iterations: int = 5,
) -> GuidedModel:
    """Moment-matching posterior sampling: x0 given x_t is taken for a Gaussian of its moments.

        V = (sigma^2 / alpha) J,   u = (A V A^T + s^2 I)^-1 (y - A E[x0 | x_t]).

    Exact for Gaussian data once the conjugate gradients have converged, at the latest after M
    iterations. A call costs one forward and at most `iterations` + 1 vector-Jacobian products.

    Args:
        score: the model of the data alone.
        sde: the process.
        measurement: the operator, its noise and y.
        iterations: most steps of conjugate gradients.

    Returns:
        A `Model` of the posterior, which takes the condition `observation=`.

    Raises:
        ArgumentError: `iterations` is not a positive whole number.

    Source:
        Rozet et al. 2024 (2405.13712), section 4.2.
    """
    count = whole_number("iterations", iterations)

    return _Posterior(score, sde, measurement, partial(_weigh_moments, count), count + 1)


def inpaint(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    mask: Tensor,
    observation: Tensor | None = None,
) -> GuidedModel:
    """Replacement: where the data are known, the predicted x0 is the observation.

        x0 <- y on the mask, x0 elsewhere,

    so that the known part of x_t becomes alpha y + sigma eps for the noise it started with. The
    unknown part hears of y through x_t alone, so it is not a sample of the posterior; where
    known and unknown are independent it is. The solver "repaint" lets it hear several times a
    step, which brings it nearer.

    Args:
        score: the model of the data alone.
        sde: the process.
        mask: bool, [*event] or [B, *event]; True where the data are known.
        observation: y, [*event] or [B, *event], read on the mask. If omitted, or to split it with
            the batch, a verb takes it as the condition `observation=` [B, *event].

    Returns:
        A `Model` that costs what the given one does.

    Raises:
        ArgumentError: `mask` is not bool; at a call, there is no observation.
        ShapeError: at a call, a shape does not fit the state.

    Source:
        Song et al. 2021 (2011.13456), appendix I.2, written on the prediction; Lugmayr et al.
        2022 (2201.09865), algorithm 1, for "repaint".
    """
    return _Inpainted(score, sde, mask, observation)


@dataclass(frozen=True, eq=False)
class _Point:
    """What u is made of, at states x_t.

    Attributes:
        x0: E[x0 | x_t], [B, *event].
        tangent: A there.
        residual: y - A x0, [B, *measured] in real numbers.
        noise: s^2.
        t: time, [] or [B].
        alpha, sigma: schedule there, or at the last time `GuidedModel.settled` allows, [] or [B].
        covary: v -> V A^T v, from [B, *measured] to [B, *event].
    """

    x0: Tensor
    tangent: Tangent
    residual: Tensor
    noise: float
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    covary: LinearMap


def _weigh_likelihood(weight: float, at: _Point) -> Tensor:
    return at.residual * weight


def _weigh_steps(length: float, ahead: GridAhead, at: _Point) -> Tensor:
    alpha_s, h = ahead(at.t)
    factor = length * at.alpha / (at.sigma**2 * alpha_s * -torch.expm1(-2 * h))
    norm = flat(at.residual).norm(dim=1)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return expand(factor, at.residual, at.t) * expand(inverse, at.residual, norm) * at.residual


def _weigh_pseudoinverse(v: float, count: int, at: _Point) -> Tensor:
    spread = v * at.sigma**2 / (v * at.alpha**2 + at.sigma**2)
    c, tangent = expand(spread, at.residual, at.t), at.tangent
    return conjugate_gradients(
        lambda u: c * tangent.push(tangent.pull(u)) + at.noise * u, at.residual, count
    )


def _weigh_moments(count: int, at: _Point) -> Tensor:
    return conjugate_gradients(
        lambda u: at.tangent.push(at.covary(u)) + at.noise * u, at.residual, count
    )


def _real_tensor(observation: object) -> Tensor:
    if not isinstance(observation, Tensor) or observation.is_complex():
        kind = observation.dtype if isinstance(observation, Tensor) else type(observation).__name__
        raise ArgumentError(f"observation is {kind}: give a real tensor")
    return observation


def _measurement(given: object) -> Measurement:
    if not isinstance(given, Measurement):
        raise ArgumentError(
            f"measurement is {type(given).__name__}: give a guidance.Measurement(operator, "
            "noise_std, observation)"
        )
    return given


class _Posterior(CleanModel):
    """x0' + V A^T u, where `weigh` makes u and V = (sigma^2 / alpha) J is a product away."""

    def __init__(
        self,
        model: Model | Callable[..., Tensor],
        sde: SDE,
        measurement: Measurement,
        weigh: Callable[[_Point], Tensor],
        products: int = 1,
    ) -> None:
        super().__init__(model, sde)
        self.measurement, self.weigh, self.products = _measurement(measurement), weigh, products
        self.checked = 0  # rows that the operator was looked at with, up to 2

    def cost(self, t: float) -> Cost:
        forwards, products = cost_at(self.model, t)
        return Cost(forwards, products + self.products * (forwards + products))

    def clean(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        keep_graph, observation = torch.is_grad_enabled(), cond.pop("observation", None)
        time = self.settled(x, t)
        alpha, sigma = self.sde.alpha(time), self.sde.sigma(time)
        ratio = expand(sigma**2 / alpha, x, time)
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            mean = self.model.predict("x0", leaf, time, **cond)
        check_output(mean, x)
        if not mean.requires_grad:
            raise ArgumentError(_NO_GRADIENT)
        x0 = mean if keep_graph else mean.detach()
        tangent = self.measurement.tangent(x0, keep_graph)
        residual = self.measurement.residual(tangent.value, observation)
        if self.checked < min(len(x), 2):
            check_operator(self.measurement, tangent, x0)
            self.checked = min(len(x), 2)

        def covary(v: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(
                mean,
                leaf,
                tangent.pull(v),
                retain_graph=True,
                create_graph=keep_graph,
                allow_unused=True,
            )
            if product is None:
                raise ArgumentError(_NO_GRADIENT)
            return ratio * product

        noise, now = self.measurement.noise_std**2, as_time(t, x)
        u = self.weigh(_Point(x0, tangent, residual, noise, now, alpha, sigma, covary))
        return x0 + covary(u)


_NO_GRADIENT = (
    "the model's output has no gradient in x: take it out of torch.no_grad and "
    "torch.inference_mode, or use a model that depends on x"
)


class _Inpainted(CleanModel):
    def __init__(
        self,
        model: Model | Callable[..., Tensor],
        sde: SDE,
        mask: Tensor,
        observation: Tensor | None,
    ) -> None:
        super().__init__(model, sde)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"the mask is {kind}: give bool, True where data are known")
        self.mask = mask
        self.observation = None if observation is None else _real_tensor(observation)

    def cost(self, t: float) -> Cost:
        return cost_at(self.model, t)

    def clean(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        y = cond.pop("observation", self.observation)
        if y is None:
            raise ArgumentError("there is no observation: give it to inpaint or to the verb")
        y = _real_tensor(y)
        for name, value in (("mask", self.mask), ("observation", y)):
            if value.shape not in (x.shape, x.shape[1:]):
                raise ShapeError(
                    f"{name} of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: "
                    "give the shape of x, or of one event; an observation for each sample of a "
                    "verb is its condition observation="
                )
        return torch.where(self.mask.to(x.device), y.to(x), self.model.predict("x0", x, t, **cond))
