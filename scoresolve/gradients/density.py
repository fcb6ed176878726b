r"""Log-densities as a differentiable function of the data and of the network.

    log p(x) = log p_T(x_T) + int div v(x_t, t) dt,   dx/dt = v

State and integral are one state [B, D + 1], whose velocity (v, div v) is differentiable because
the divergence is taken with a graph of its own; it then goes through any plan and any mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresolve.conditions import unmarked
from scoresolve.divergence import (
    Differentiator,
    check_constant,
    full_precision,
    velocity_parts,
)
from scoresolve.driving import check_call, warn_of_dropout
from scoresolve.errors import GridError, check_output, check_transforms, whole_number
from scoresolve.gradients.path import Path
from scoresolve.grid import Grid, as_grid, make_grid
from scoresolve.models import Model, as_model
from scoresolve.noise import NoiseSource, Philox, Purpose
from scoresolve.plans import check_state
from scoresolve.sde import EDM, SDE, VE, Prior, TimeLike, check_prior, expand, log_prior
from scoresolve.solvers import Solver, get_solver

__all__ = ["differentiable_log_likelihood"]

MOST_STEPS = 10**6
MOST_PROBES = 10_000

Times = Grid | Sequence[float] | Tensor


def differentiable_log_likelihood(
    score: Model | Callable[..., Tensor],
    sde: SDE,
    x: Tensor,
    *,
    steps: int = 50,
    grid: Times | None = None,
    probes: int | None = None,
    mode: str = "checkpoint",
    segment: int | None = None,
    refine: int = 1,
    prior: Prior | None = None,
    seed: int = 0,
    **cond: Any,
) -> Tensor:
    r"""Log-density under the probability flow, differentiable in data and parameters.

        log p(x) = log p_T(x_T) + int div v(x_t, t) dt,   dx/dt = v

    by classical Runge-Kutta steps on state and integral together. Its gradient with respect to
    `x` is the model's score at the first time if that score is exact; a network's own score is an
    approximation of it, and this is the gradient of the density that the network defines.

    Args:
        score: callable `score(x, t, **cond)` or a `Model`, twice differentiable.
        sde: the process. One that is given by drift and diffusion needs `prior`.
        x: data at the first time, [B, *event], floating point.
        steps: Runge-Kutta steps from `sde.t_min` to `sde.T`, four calls each; or
        grid: increasing times, instead of `steps`.
        probes: number K >= 1 of Rademacher probes, held fixed along the path: the gradient is
            that of the estimate. If omitted, the exact divergence, D products a call.
        mode, segment, refine: as in `differentiable_sample`; the adjoint is that of
            state and integral together.
        prior: the law p_T at the last time, a distribution or a log-density over [B, *event],
            instead of the process's own; gradients flow to what it is made of.
        seed: seed of the probes.
        **cond: passed on to the model.

    Returns:
        log p(x), [B] in the dtype of `x`, attached to `x` and to the leaves that the model uses.

    Raises:
        ArgumentError: there is no prior, the model's output depends on x without a gradient,
            or a number is out of range.
        ShapeError, GridError, UnknownNameError: as for `differentiable_sample`.

    Source:
        Chen et al. 2018 (1806.07366), theorem 1 (instantaneous change of variables) and appendix
        B; Grathwohl et al. 2019 (1810.01367), section 3.1, for fixed probes.
    """
    check_transforms("differentiable_log_likelihood")
    check_prior(sde, prior)
    check_state(x)
    if grid is None:
        name = "karras" if isinstance(sde, VE | EDM) else "quadratic"
        times = make_grid(name, sde, whole_number("steps", steps, 1, MOST_STEPS), sde.t_min, sde.T)
    else:
        times = as_grid(grid)
    times.check(sde)
    if times.times[0] > times.times[-1]:
        raise GridError("the times fall: a likelihood follows data to noise, give increasing times")
    count = None if probes is None else whole_number("probes", probes, 1, MOST_PROBES)
    warn_of_dropout(score)
    if cond:
        check_call(score, cond, differentiable_log_likelihood)
    flow = _DensityFlow(as_model(score, sde), sde, x, count, Philox(seed), unmarked(cond))
    solver = get_solver("rk4_flow")
    assert isinstance(solver, Solver)
    start = torch.cat([x.reshape(len(x), -1), x.new_zeros(len(x), 1)], 1)
    end = Path(solver, sde, times, flow, Philox(seed), {}).solve(start, mode, segment, refine)
    latent, integral = end[:, :-1], end[:, -1]
    return integral + log_prior(sde, latent.reshape(x.shape), times.times[-1], prior)


class _DensityFlow(Model):
    """The velocity (v, div v) of joint states [B, D + 1], as a differentiable model of "flow"."""

    sde = None

    def __init__(
        self,
        model: Model,
        sde: SDE,
        x: Tensor,
        probes: int | None,
        noise: NoiseSource,
        cond: dict[str, Any],
    ) -> None:
        self.model, self.process, self.event, self.cond = model, sde, x.shape[1:], cond
        self.differentiator = Differentiator("reverse")
        if probes is None:
            size = math.prod(self.event)
            basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *self.event)
            self.probes, self.weight = basis.expand(size, *x.shape), 1.0
        else:
            draws = [noise.signs(x, draw, Purpose.PROBE) for draw in range(probes)]
            self.probes, self.weight = torch.stack(draws), 1 / probes

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            state = x[:, :-1].reshape(-1, *self.event)
            state = state if state.requires_grad else state.detach().requires_grad_()
            u, w, network = velocity_parts(self.model, self.process, state, t, self.differentiator)

            def field(y: Tensor) -> Tensor:
                return network(y, t, **self.cond)

            m = field(state.clone())  # autograd lets nobody write into a leaf
            check_output(m, state)
            products = self._products(field, m, state, keep)
            trace = (torch.stack(products) * self.probes).reshape(*self.probes.shape[:2], -1)
            divergence = math.prod(self.event) * u + w * trace.sum((0, 2)) * self.weight
            v = expand(u, state, u) * state + expand(w, state, w) * m
            joint = torch.cat([v.reshape(len(x), -1), divergence[:, None].to(v.dtype)], 1)
        return joint if keep else joint.detach()

    def _products(
        self, field: Callable[[Tensor], Tensor], m: Tensor, state: Tensor, keep: bool
    ) -> list[Tensor]:
        """Products J^T z of the Jacobian of `field`, of value `m` at `state`, for all probes."""
        options: dict[str, Any] = {"create_graph": keep, "retain_graph": True}
        found = list[Tensor]()
        for z in self.probes:
            product = None
            if m.requires_grad:
                with full_precision(m):
                    (product,) = torch.autograd.grad(m, state, z, allow_unused=True, **options)
            if product is None:
                check_constant(field, state, m)
                return [torch.zeros_like(z) for z in self.probes]
            found.append(product)
        return found
