"""Ways into and between the states of a process.

    noised   x_t = alpha x0 + sigma z,   the start of image-to-image: sample(..., x=x_t, t_start=t)
    slerp    sin((1 - f) theta) / sin(theta) a + sin(f theta) / sin(theta) b

Two independent N(0, I) latents have nearly the same length, and so has every point of the arc
between them; the points of the chord are shorter and look like no noise the model has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.sde import SDE, GaussianSDE, TimeLike, as_time

__all__ = ["noised", "slerp"]


def noised(
    sde: SDE,
    x0: Tensor,
    t: TimeLike,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None = None,
) -> Tensor:
    """A draw of x_t given x0: alpha x0 + sigma z, z ~ N(0, I).

    z is the noise that `sample` starts from for the same seed and sample number: at t = T both
    begin alike, and row i does not depend on the batch.

    Args:
        sde: a Gaussian process.
        x0: clean states [B, *event], floating point.
        t: time in [0, T], [] or [B].
        seed: of the counter-based noise.
        noise: a noise source, a `torch.Generator` or a callable instead of `seed`.

    Returns:
        x_t, shape and dtype of `x0`.

    Raises:
        ArgumentError: the process is not Gaussian, `x0` is not floating, or t leaves [0, T].
        ShapeError: `t` is neither [] nor [B].

    Source:
        Meng et al. 2022 (2108.01073), section 3 (SDEdit), for its use as a start.
    """
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} has no alpha and sigma: noising needs a Gaussian process")
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or not x0.ndim:
        kind = f"{x0.dtype} of shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0)
        raise ArgumentError(f"x0 is {kind}: give a floating-point tensor [B, *event]")
    time = as_time(t, x0)
    time = time.to(torch.promote_types(time.dtype, torch.float32))
    if time.ndim > 1 or (time.ndim == 1 and time.shape != x0.shape[:1]):
        raise ShapeError(
            f"t of shape {tuple(time.shape)} for x0 of shape {tuple(x0.shape)}: "
            "give one time, or one for each row"
        )
    if not bool(((time >= 0) & (time <= sde.T)).all()):
        raise ArgumentError(f"t = {t} leaves the interval [0, {sde.T:g}] of {sde}")
    mean, std = sde.marginal(x0, time)
    return mean + std * as_noise(noise, seed).normal(x0, 0, Purpose.FORWARD)


def slerp(a: Tensor, b: Tensor, fractions: float | Sequence[float] | Tensor) -> Tensor:
    """Points on the great circle from `a` to `b`, for every sample on its own.

        sin((1 - f) theta) / sin(theta) a + sin(f theta) / sin(theta) b,   theta = angle(a, b).

    Where `a` and `b` are parallel, opposite or zero no circle is given, and the points lie on the
    straight line (1 - f) a + f b.

    Args:
        a, b: latents [B, *event], floating point, of one shape.
        fractions: f, a number or [N]; 0 is `a` and 1 is `b`.

    Returns:
        [B, *event] for a number, else [N, B, *event], in the dtype of `a`.

    Raises:
        ShapeError: `a` and `b` differ in shape or have no batch axis, or `fractions` is not [N].
        ArgumentError: `a` or `b` is not floating point, or a fraction not finite.

    Source:
        Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; the angle as in
        Kahan 2006, "How futile are mindless assessments of roundoff", section 12.
    """
    if a.shape != b.shape or not a.ndim:
        raise ShapeError(
            f"latents of shapes {tuple(a.shape)} and {tuple(b.shape)}: give two of one shape "
            "[B, *event]"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ArgumentError(f"latents are {a.dtype} and {b.dtype}: give floating-point tensors")
    dtype, work = a.dtype, torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(work), b.to(a.device, work)
    try:
        share = torch.as_tensor(fractions, dtype=work, device=a.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"fractions = {fractions!r}: give a number or [N]") from error
    if not bool(torch.isfinite(share).all()):
        raise ArgumentError("fractions are not finite: give numbers, from 0 for a to 1 for b")
    if share.ndim > 1:
        raise ShapeError(f"fractions of shape {tuple(share.shape)}: give a number or [N]")
    rows, ends = (x.reshape(len(x), x.shape[1:].numel()) for x in (a, b))
    u, v = (torch.nn.functional.normalize(row, dim=1) for row in (rows, ends))
    theta = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    sine = theta.sin()
    curved = (sine > math.sqrt(torch.finfo(a.dtype).eps)) & (u != 0).any(1) & (v != 0).any(1)
    scale = torch.where(curved, sine, 1.0)
    share = share[..., None]
    first, second = (
        torch.where(curved, (f * theta).sin() / scale, f)[..., None] for f in (1 - share, share)
    )
    return (first * rows + second * ends).reshape(*share.shape[:-1], *a.shape).to(dtype)
