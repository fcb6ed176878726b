"""Whether a process of one's own keeps its word, asked once where it enters.

What is checked at some times of [0, T], on the host, for a process that is not of this package:

    alpha, sigma >= 0, finite, of the shape of t;   log(alpha/sigma) falls with t;
    closed forms that are overridden (log_alpha, alpha_dot, diffusion, ...) agree with alpha, sigma;
    drift(x, t) has the shape of x and does not write into it;   diffusion(t) >= 0, finite.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number, short
from scoresolve.precision import host
from scoresolve.sde.base import SDE
from scoresolve.sde.gaussian import GaussianSDE

__all__ = ["check_process"]

_POINTS = 65
_AGREEMENT = 1e-3  # of closed forms with derivatives: they are exact, or off by a factor or a sign
_ROUNDING = 1e-9  # by which a log-SNR may rise from one time to the next
_known: dict[int, tuple[weakref.ref[SDE], set[tuple[int, ...]]]] = {}


def check_process(sde: object, x: Tensor | None = None) -> None:
    """Raise unless `sde` is a process that does what it says.

    A process that has passed is not asked again, so that this costs microseconds.

    Args:
        sde: what should be an instance of `SDE`.
        x: a state [B, *event] it will be used on; without it the drift is not asked.

    Raises:
        ArgumentError: it is no process, or alpha, sigma, drift or diffusion give what they cannot
            be.
        ShapeError: drift or diffusion have a shape that would broadcast.
    """
    if not isinstance(sde, SDE):
        raise ArgumentError(_no_process(sde))
    shape = (-1,) if x is None else tuple(x.shape[1:])
    known = _known.get(id(sde))
    if known is not None and known[0]() is sde and shape in known[1]:
        return
    _check_interval(sde)
    own = not type(sde).__module__.startswith("scoresolve.")
    if own:
        if isinstance(sde, GaussianSDE):
            _check_schedule(sde)
        prefix = _check_diffusion(sde)
        if x is not None:
            _check_prefix(sde, prefix, x)
            if _has_own(sde, "drift", GaussianSDE.drift):
                _check_drift(sde, x)
    _remember(sde, shape)


def _no_process(sde: object) -> str:
    if isinstance(sde, type) and issubclass(sde, SDE):
        return f"sde is the class {sde.__name__}: give an instance, as {sde.__name__}()"
    if sde is None:
        return "sde is None: give the process, as VP()"
    return f"sde is {short(sde)}: give a process, an instance of SDE such as VP()"


def _remember(sde: SDE, shape: tuple[int, ...]) -> None:
    key = id(sde)
    known = _known.get(key)
    if known is not None and known[0]() is sde:
        known[1].add(shape)
        return
    _known[key] = (weakref.ref(sde, lambda _: _known.pop(key, None)), {shape})


def _check_interval(sde: SDE) -> None:
    T, t_min = (real_number(f"{_name(sde)}: {n}", getattr(sde, n)) for n in ("T", "t_min"))
    if not 0 <= t_min <= T or T == 0:
        raise ArgumentError(f"{_name(sde)}: t_min = {t_min:g}, T = {T:g}: need 0 <= t_min < T")


def _name(sde: SDE) -> str:
    return type(sde).__name__


def _has_own(sde: SDE, method: str, inherited: Callable[..., Any]) -> bool:
    return getattr(type(sde), method) is not inherited


def _asked(sde: SDE, method: str, *arguments: Any) -> Tensor:
    """What a method of the process returns, if that is a real floating-point tensor."""
    name = f"{_name(sde)}.{method}"
    try:
        value = getattr(sde, method)(*arguments)
    except Exception as error:
        raise ArgumentError(
            f"{name} failed for a tensor t of shape {tuple(arguments[-1].shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"{name} returned {kind} for a tensor t: return a floating-point tensor, made of torch "
            "operations on t"
        )
    return value.detach()


def _times(sde: SDE, points: int = _POINTS) -> Tensor:
    return host(np.linspace(0.0, float(sde.T), points))


def _check_schedule(sde: GaussianSDE) -> None:
    t = _times(sde)
    levels = {}
    for method in ("alpha", "sigma"):
        value = levels[method] = host(_asked(sde, method, t))
        if value.shape != t.shape:
            raise ArgumentError(
                f"{_name(sde)}.{method}(t) has shape {tuple(value.shape)} for t of shape "
                f"{tuple(t.shape)}: return one value for each time"
            )
        bad = ~(value.isfinite() & (value >= 0))
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ArgumentError(
                f"{_name(sde)}.{method}(t) = {float(value[i]):g} at t = {float(t[i]):g}: it must "
                "be finite and at least 0 on [0, T]"
            )
    log_snr = 2 * (levels["alpha"].log() - levels["sigma"].log())
    if bool(log_snr.isnan().any()):
        i = int(log_snr.isnan().nonzero()[0, 0])
        raise ArgumentError(f"{_name(sde)}: alpha and sigma are both 0 at t = {float(t[i]):g}")
    rises = log_snr[1:] > log_snr[:-1] + _ROUNDING * (1 + log_snr[:-1].abs())
    if bool(rises.any()) or log_snr[0] <= log_snr[-1]:
        i = int(rises.nonzero()[0, 0]) if bool(rises.any()) else 0
        raise ArgumentError(
            f"{_name(sde)}: log(alpha/sigma) does not fall from t = {float(t[i]):g} to "
            f"{float(t[i + 1]):g}: noise must only grow with t, from data at 0 to noise at T"
        )
    inner = t[1:-1]
    for method in ("log_alpha", "log_sigma", "alpha_dot", "sigma_dot", "drift_rate", "log_snr"):
        if _has_own(sde, method, getattr(GaussianSDE, method)):
            _check_agreement(sde, method, inner, getattr(GaussianSDE, method)(sde, inner))
    if _has_own(sde, "diffusion", GaussianSDE.diffusion):
        _check_agreement(sde, "diffusion", inner, GaussianSDE.diffusion(sde, inner))
    if _has_own(sde, "time_from_log_snr", GaussianSDE.time_from_log_snr):
        found = _asked(sde, "time_from_log_snr", sde.log_snr(inner))
        _compare(sde, "time_from_log_snr", inner, found, inner)


def _check_agreement(sde: GaussianSDE, method: str, t: Tensor, expected: Tensor) -> None:
    _compare(sde, method, t, _asked(sde, method, t), expected)


def _compare(sde: GaussianSDE, method: str, t: Tensor, found: Tensor, expected: Tensor) -> None:
    if found.shape != t.shape:
        raise ArgumentError(
            f"{_name(sde)}.{method} has shape {tuple(found.shape)} for an argument of shape "
            f"{tuple(t.shape)}: return one value for each"
        )
    found, expected = host(found), host(expected)
    reach = float(expected[expected.isfinite()].abs().max()) if len(expected) else 0.0
    wrong = (found - expected).abs() > _AGREEMENT * (expected.abs() + 1e-3 * reach)
    wrong &= expected.isfinite()
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0, 0])
        raise ArgumentError(
            f"{_name(sde)}.{method} gives {float(found[i]):g} at t = {float(t[i]):g}, where alpha "
            f"and sigma make it {float(expected[i]):g}: leave it out, or mend the formula"
        )


def _check_diffusion(sde: SDE) -> tuple[int, ...]:
    """The axes that diffusion(t) appends for the first event axes."""
    t = _times(sde, 5)
    g = host(_asked(sde, "diffusion", t))
    if g.ndim and g.shape[:1] != t.shape:
        raise ArgumentError(
            f"{_name(sde)}.diffusion(t) has shape {tuple(g.shape)} for t of shape "
            f"{tuple(t.shape)}: return one value for each time; a diffusion per part of the state "
            "has its axes behind that of t"
        )
    inner = g[1:-1] if g.ndim else g
    if not bool((inner.isfinite() & (inner >= 0)).all()):
        raise ArgumentError(
            f"{_name(sde)}.diffusion(t) is negative or not finite inside (0, T), where it is "
            f"{float(inner.flatten()[(~(inner.isfinite() & (inner >= 0))).flatten()][0]):g}"
        )
    return tuple(g.shape[1:])


def _check_prefix(sde: SDE, prefix: tuple[int, ...], x: Tensor) -> None:
    event = tuple(x.shape[1:])
    if prefix != event[: len(prefix)]:
        raise ShapeError(
            f"{_name(sde)}.diffusion(t) appends axes {prefix} to those of t, and the state has the "
            f"event axes {event}: give one number per time, or one for each of the first event axes"
        )


def _check_drift(sde: SDE, x: Tensor) -> None:
    state = torch.zeros(2, *x.shape[1:], dtype=x.dtype, device=x.device)
    rows = min(len(x), 2)
    state[:rows] = x[:rows].detach()
    kept = state.clone()
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    t = torch.full((2,), (sde.T + sde.t_min) / 2, dtype=dtype, device=x.device)
    with torch.no_grad():
        drift = _asked(sde, "drift", state, t)
    if drift.shape != state.shape:
        raise ShapeError(
            f"{_name(sde)}.drift(x, t) has shape {tuple(drift.shape)} for x of shape "
            f"{tuple(state.shape)}: return one value per element of x"
        )
    if isinstance(sde, GaussianSDE):
        expected = GaussianSDE.drift(sde, kept, t)
        if not torch.allclose(drift, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise ArgumentError(
                f"{_name(sde)}.drift(x, t) is not alpha'/alpha x, as alpha makes it: leave it out, "
                "or derive from SDE"
            )
    if not torch.equal(state.nan_to_num(), kept.nan_to_num()):
        raise ArgumentError(
            f"{_name(sde)}.drift(x, t) writes into x: make a new tensor, as in x * 2 for x.mul_(2)"
        )
