"""What guided models share: a process, a cost, and how a shifted x0 is read as any prediction.

A shift d of the score moves every prediction of x_t = alpha x0 + sigma eps with it,

    x0 <- x0 + (sigma^2 / alpha) d,     eps <- eps - sigma d,

so a method may be written in the prediction it is simplest in. The first factor has no value where
alpha = 0; gradients are taken no later than where alpha / sigma is the root of the precision.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresolve.errors import ArgumentError, GridError, real_number
from scoresolve.grid import Grid, as_grid
from scoresolve.models import Model, as_model, combine, conversion
from scoresolve.plans import Call, Plan, check_state
from scoresolve.precision import host
from scoresolve.sde import SDE, GaussianSDE, TimeLike, as_time

__all__ = [
    "CleanModel",
    "Cost",
    "GridAhead",
    "GuidedModel",
    "cost_at",
    "flat",
    "network_cost",
    "own_copy",
    "positive",
    "precise",
]


class Cost(NamedTuple):
    """Work of the networks inside a model, for every row of the batch.

    Attributes:
        forwards: evaluations of a network.
        products: vector-Jacobian products through a network.
    """

    forwards: int
    products: int


class GuidedModel(Model):
    """A model made of other models.

    For a solver a call of it is one call; `cost` says what that means for the networks inside.

    Args:
        model: the model that is guided, or a callable `score(x, t, **cond)`.
        sde: the process.

    Raises:
        ArgumentError: `sde` is not Gaussian, or `model` cannot be used with it.
    """

    sde: GaussianSDE

    def __init__(self, model: Model | Callable[..., Tensor], sde: SDE) -> None:
        self.sde = _gaussian(sde)
        self.model = as_model(model, sde)
        self.data_scale = self.model.data_scale
        self._latest: dict[torch.dtype, float] = {}

    @abstractmethod
    def cost(self, t: float) -> Cost:
        """What one call at time `t` costs, at most."""

    def settled(self, x: Tensor, t: TimeLike) -> Tensor:
        """`t`, but no later than where alpha^2 / sigma^2 is the precision of `x`.

        Raises:
            ArgumentError, ShapeError: `x` is no floating-point batch [B, *event].
        """
        check_state(x)
        if x.dtype not in self._latest:
            precision = min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
            log_snr = host(math.log(precision))
            self._latest[x.dtype] = float(self.sde.time_from_log_snr(log_snr))
        return precise(as_time(t, x)).clamp(max=self._latest[x.dtype])


class CleanModel(GuidedModel):
    """A guided model that is written in x0; other predictions follow from it."""

    @abstractmethod
    def clean(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        """The guided x0 at state `x` [B, *event] and time `t` [] or [B], shape of `x`."""

    def bind(self, prediction: str) -> tuple[str, Callable[..., Tensor]]:
        return "x0", self.clean

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        time = as_time(t, x)
        u, w = conversion("x0", prediction, self.sde.point(time))
        return combine(u, x, w, self.clean(x, t, **cond), time)


class GridAhead:
    """The schedule one step ahead: at the grid's next time below t, past the last at sigma = 0.

    Args:
        sde: the process.
        grid: strictly decreasing times.

    Raises:
        GridError: the times do not decrease.
    """

    def __init__(self, sde: SDE, grid: Grid | Sequence[float] | Tensor) -> None:
        self.sde = _gaussian(sde)
        times = as_grid(grid).times
        if times[0] < times[-1]:
            raise GridError(
                f"the grid goes up from t = {times[0]:g} to {times[-1]:g}: a model that knows its "
                "next step samples, so give decreasing times"
            )
        self.times = host(times[::-1])
        end = self.times.new_tensor([math.inf])
        self.log_snrs = torch.cat([end, self.sde.log_snr(self.times)])
        self.alphas = self.sde.alpha(torch.cat([torch.zeros_like(end), self.times]))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_s and h = lam(s) - lam(t), lam = log(alpha / sigma), for times t [] or [B].

        Raises:
            GridError: a time is not on the grid.
        """
        times, time = self.times, t.detach().cpu().double()  # no device lacks float64 there
        apart = (times - time[..., None]).abs()
        nearest = apart.argmin(-1)
        same = max(_SAME_TIME, torch.finfo(t.dtype).eps) * times[nearest]
        if bool(((apart <= same[..., None]).sum(-1) > 1).any()):
            raise GridError(
                f"times in {t.dtype} do not tell those of the grid apart: give them in float32"
            )
        strays = time[apart.min(-1).values > same]
        if len(strays):
            raise GridError(
                f"t = {float(strays[0]):g} is not among the {len(times)} times from "
                f"{float(times[-1]):g} to {float(times[0]):g} that the model was made for: give "
                "the verb the same grid=, and a solver that calls the model at its times alone"
            )
        ahead = (self.log_snrs[nearest] - self.log_snrs[nearest + 1]) / 2
        dtype = torch.promote_types(t.dtype, torch.float32)
        return self.alphas[nearest].to(t.device, dtype), ahead.to(t.device, dtype)


_SAME_TIME = 1e-6  # a time rounded to float32 is still the grid's


def cost_at(model: Model, t: float) -> Cost:
    """What one call of any model at time `t` costs: one forward unless it is a `GuidedModel`."""
    return model.cost(t) if isinstance(model, GuidedModel) else Cost(1, 0)


def network_cost(model: Model, plan: Plan) -> Cost:
    """What a run of `plan` on `model` costs the networks inside it, at most.

    `plan.nfe` counts calls of the model; this sums what each of them costs at its time.

    Args:
        model: any model of the plan's process.
        plan: a plan without custom kernels.

    Raises:
        ArgumentError: the plan holds a custom kernel, whose calls are not written in it.
    """
    times = [stage.t for stage in plan.stages if isinstance(stage, Call)]
    if len(times) != plan.nfe:
        raise ArgumentError("a custom kernel calls the model at times that the plan does not know")
    costs = [cost_at(model, t) for t in times]
    return Cost(sum(cost.forwards for cost in costs), sum(cost.products for cost in costs))


def positive(name: str, value: float) -> float:
    """`value`; raises `ArgumentError` unless it is positive and finite."""
    return real_number(name, value, above=0)


def precise(t: Tensor) -> Tensor:
    """Times in at least float32: in half precision 999 is 1000."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def flat(x: Tensor) -> Tensor:
    """`x` [B, *event] as [B, D], also where B = 0."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def own_copy(function: object, x: Tensor) -> Tensor:
    """A copy of `x` that `function` may write into, in the dtype of its parameters."""
    parameter = next(function.parameters(), None) if isinstance(function, nn.Module) else None
    if parameter is None or parameter.dtype == x.dtype or x.is_complex():
        return x.clone()
    return x.to(parameter.dtype)


def _gaussian(sde: SDE) -> GaussianSDE:
    if not isinstance(sde, SDE):
        raise ArgumentError(f"sde is {type(sde).__name__}: give a process, as ss.VP()")
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} has no alpha and sigma: guidance needs a Gaussian process")
    return sde
