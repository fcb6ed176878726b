r"""Denoising score matching: the noise, the data or a mixture of both, told from noised data.

    E_t E w(t) |m(x_t, t) - (p x_0 + q eps)|^2 / D,   x_t = alpha x_0 + sigma eps

Its minimiser is E[p x_0 + q eps | x_t] for any w > 0, from which the score of p_t follows. Errors
of all predictions are multiples of the error e of eps, so that a weighting is a choice of

    eps  |e|^2                x0  (sigma/alpha)^2 |e|^2       likelihood  g^2/(2 sigma^2) |e|^2
    flow (k' alpha)^2 |e|^2   v   (alpha + sigma k)^2 |e|^2   edm         (k^2/s_d^2 + 1) |e|^2

with k = sigma/alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, known_name, real_number
from scoresolve.models import Model, as_model, combine, prediction_rows
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.objectives.times import TimeLaw, UniformTimes
from scoresolve.plans import check_state
from scoresolve.sde import GaussianSDE, expand

__all__ = ["WEIGHTINGS", "denoising_loss", "denoising_score_matching"]

Weighting = str | Callable[[Tensor], Tensor]

WEIGHTINGS: Final = {
    "eps": "eps",
    "x0": "x0",
    "v": "v",
    "flow": "flow",
    "likelihood": "eps",
    "edm": "x0",
}
"""Names of weightings, and the prediction whose error each one weighs."""


def denoising_score_matching(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    x0: Tensor,
    *,
    weighting: Weighting = "eps",
    times: TimeLaw | None = None,
    proposal: TimeLaw | None = None,
    even: bool = False,
    data_std: float = 0.5,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    r"""The weighted denoising error at random times and noises.

        E_{t ~ times} E w(t) |m(x_t, t) - (p x_0 + q eps)|^2 / D

    With "likelihood", times D and the length of the interval, the mean over uniform times bounds
    the likelihood in nats, up to a constant and the prior.

    Args:
        score: a `Model`, whatever it predicts, or a callable `score(x, t, **cond)`.
        sde: the process, a Gaussian one.
        x0: data, [B, *event], floating point.
        weighting: one of `WEIGHTINGS`, or a function w(t), [B] to [B], that weighs the squared
            error of eps.
        times: the law of t that the objective is a mean over; uniform on [`t_min`, `T`] if omitted.
            EDM's is `LogNormalTimes(sde)`.
        proposal: draw times from this law instead and reweight, which leaves the mean as it is;
            `LogUniformTimes(sde)` suits the likelihood weighting.
        even: spread the times of the batch evenly, as `TimeLaw.draw`.
        data_std: s_d of the "edm" weighting, > 0.
        draw: number of the draw: with one seed, the number of the training step.
        seed: of `Philox`, where `noise` is not given; row i of a draw depends on both and on i,
            and its time, if they are even, on the batch.
        noise: source of randomness instead, or a `torch.Generator`.
        **cond: passed on to the model.

    Returns:
        The loss of each sample, [B], differentiable in the model's parameters.

    Raises:
        UnknownNameError: `weighting` is no such name.
        ArgumentError: the process is not Gaussian, `x0` is not floating point, or a law is one of
            another process, or the proposal does not cover the interval of `times`.
        ShapeError: the model returns another shape than that of `x0`, or the weighting another
            than that of its times.

    Source:
        Vincent 2011, "A connection between score matching and denoising autoencoders"; Song et al.
        2021 (2011.13456), eq. 7; Song et al. 2021 (2101.09258), eq. 7-8 and section 4.3
        (likelihood); Salimans and Ho 2022 (2202.00512), section 4 (v); Karras et al. 2022
        (2206.00364), section 5 (EDM).
    """
    target = UniformTimes(sde) if times is None else times
    law = target if proposal is None else proposal
    for name, each in (("times", target), ("proposal", law)):
        if not isinstance(each, TimeLaw):
            raise ArgumentError(f"{name} is {type(each).__name__}: give a TimeLaw of the process")
        if each.sde != sde:
            raise ArgumentError(f"{name} is a law on the times of {each.sde}, not of {sde}")
    if law.low > target.low or law.high < target.high:
        raise ArgumentError(
            f"the proposal covers [{law.low:g}, {law.high:g}], the objective [{target.low:g}, "
            f"{target.high:g}]: give a proposal that is positive wherever the objective is"
        )
    check_state(x0)
    source = as_noise(noise, seed)
    z = source.normal(x0, draw, Purpose.OBJECTIVE)
    t = law.draw(source, x0, draw, even)
    model = as_model(score, sde)
    time = t.to(torch.promote_types(x0.dtype, torch.float32))
    loss = denoising_loss(model, x0, time, z, weighting, data_std, **cond)
    if law is target:
        return loss
    inside = (t >= target.low) & (t <= target.high)
    return loss * torch.where(inside, target.density(t) / law.density(t), 0.0).to(loss)


def denoising_loss(
    model: Model,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    weighting: Weighting = "eps",
    data_std: float = 0.5,
    **cond: Any,
) -> Tensor:
    """The weighted denoising error at given times and noises.

    Args:
        model: a `Model` of a Gaussian process, whatever it predicts.
        x0: data, [B, *event], floating point.
        t: times, [B].
        eps: noise, standard normal, shape of `x0`.
        weighting, data_std, cond: as in `denoising_score_matching`.

    Returns:
        w(t) |m - (p x_0 + q eps)|^2 / D of each sample, [B].

    Raises:
        ShapeError: `t` or `eps` does not fit `x0`.
        ArgumentError: the model has no Gaussian process, or `data_std` is not positive.
        UnknownNameError: `weighting` is no such name.
    """
    sde = model.sde
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"the model's process is {sde}: give a model of a Gaussian process")
    check_state(x0)
    if t.shape != x0.shape[:1] or eps.shape != x0.shape:
        raise ShapeError(
            f"t of shape {tuple(t.shape)} and eps of shape {tuple(eps.shape)} for x0 of shape "
            f"{tuple(x0.shape)}: give [B] and the shape of x0"
        )
    if isinstance(weighting, str):
        prediction = WEIGHTINGS[known_name("weighting", weighting, WEIGHTINGS)]
    elif callable(weighting):
        prediction = "eps"
    else:
        raise ArgumentError(
            f"weighting is {type(weighting).__name__}: give a name of WEIGHTINGS, or a function "
            "of the times"
        )
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    mean, std = sde.marginal(x0, t)
    p, q = prediction_rows(prediction, sde.point(t))
    error = model.predict(prediction, mean + std * eps, t, **cond) - combine(q, eps, p, x0, t)
    square = error**2
    weight = _weight(weighting, sde, t, data_std)
    if weight is not None:
        square = expand(weight, x0, t) * square
    return square.reshape(len(x0), x0.shape[1:].numel()).mean(1)


def _weight(weighting: Weighting, sde: GaussianSDE, t: Tensor, data_std: float) -> Tensor | None:
    """The weight of the squared error, [B], or None for 1."""
    if not isinstance(weighting, str):
        weight: object = weighting(t)
        if not isinstance(weight, Tensor) or weight.shape not in ((), t.shape):
            what = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ShapeError(f"the weighting returned {what} for times {tuple(t.shape)}: give [B]")
        return weight
    if weighting == "likelihood":
        return (sde.diffusion(t) / sde.sigma(t)) ** 2 / 2
    if weighting == "edm":
        s, k = real_number("data_std", data_std, above=0), sde.sigma(t) / sde.alpha(t)
        return (k**2 + s**2) / (k * s) ** 2
    return None
