"""Splitting for linear processes with matrix coefficients: what is linear is solved exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, Status, row_status, step_count
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.precision import host
from scoresolve.sde.linear import LinearSDE, mixed, van_loan
from scoresolve.solvers.adaptive import BoundedDrift, CallLimit, unmoved
from scoresolve.solvers.integrator import GaussianFlow, Integrator, RowDrift, Solution

__all__ = ["SSCS"]


class SSCS(Integrator):
    """Symmetric splitting sampler for the reverse of a `LinearSDE`, one call a step.

    With the stationary covariance S of du = A u db + G dw and R = S A^T S^-1, the reverse equation
    over the backward clock b is

        du = R u db + G dw        a process at rest in N(0, S), solved exactly,
           + G G^T (score + S^-1 u) db        what the data add to it, by an Euler step,

    and a step is half of the first, all of the second in the middle, and half of the first.

    Args:
        sde: the process.
        steps: steps of equal clock, >= 1.

    Raises:
        ArgumentError: `sde` is not a `LinearSDE`, or `steps` is no whole number >= 1.

    Source:
        Dockhorn et al. 2022 (2112.07068), section 3.2 and appendix D.
    """

    name, order, stochastic = "sscs", 1.0, True
    source = "Dockhorn et al. 2022 (2112.07068), section 3.2"
    sde: LinearSDE

    def __init__(self, sde: LinearSDE, steps: int = 100) -> None:
        if not isinstance(sde, LinearSDE):
            raise ArgumentError(f"sscs splits a LinearSDE, not {sde}: take 'euler_maruyama'")
        self.sde, self.steps = sde, step_count("steps", steps)
        inverse = torch.linalg.inv(sde.stationary)
        self.rest = sde.stationary @ sde.matrix.mT @ inverse

    def solve(
        self,
        drift: RowDrift,
        x: Tensor,
        t_start: float,
        t_end: float,
        diffusion: Callable[[Tensor], Tensor] | None = None,
        noise: NoiseSource | None = None,
        *,
        flow: GaussianFlow | None = None,
        width: int | None = None,
    ) -> Solution:
        """Integrate the reverse SDE; `diffusion`, `flow` and `width` are not read.

        Raises:
            ArgumentError: there is no noise, or t_end > t_start.
        """
        if noise is None or t_end > t_start:
            raise ArgumentError("sscs goes from noise to data and draws noise: give both")
        field = BoundedDrift(drift, x, t_start, t_end, self.max_calls)
        if t_start == t_end or not x.numel():
            return unmoved(x, t_end)
        y, rows = x.to(field.state_dtype), torch.arange(len(x), device="cpu")
        first, last = (float(self.sde.clock(t)) for t in (t_start, t_end))
        step = (first - last) / self.steps
        half, whole = (self._at_rest(b) for b in (step / 2, step))
        status, done = torch.full((len(x),), int(Status.OK), device=x.device), 0
        y = self._move(y, half, noise, 0)
        for number in range(self.steps):
            t = self.sde.time(first - (number + 0.5) * step)
            try:
                velocity = field(y, field.times(t).expand(len(x)), rows)
            except CallLimit:
                status.fill_(int(Status.CALL_LIMIT))
                break
            excess = -velocity / float(self.sde.beta(t)) - mixed(self.rest, y)
            y, done = y + step * excess, number + 1
            y = self._move(y, half if done == self.steps else whole, noise, done)
        failed = row_status(y) != Status.OK
        status = torch.where(failed, int(Status.NONFINITE), status)
        reached = t_end if done == self.steps else self.sde.time(first - (done + 0.5) * step)
        times = torch.full((len(x),), reached, dtype=torch.float64, device=x.device)
        taken = torch.full_like(status, done)
        calls = field.evaluations.to(x.device)
        return Solution(y.to(x.dtype), times, status, field.calls, taken, 0 * taken, calls)

    def _at_rest(self, b: float) -> tuple[Tensor, Tensor]:
        """Transition of du = R u db + G dw over b, and a factor of its covariance."""
        phi, q = van_loan(self.rest, self.sde.noise, host(b))
        return phi, torch.linalg.cholesky(q)

    def _move(
        self, y: Tensor, part: tuple[Tensor, Tensor], noise: NoiseSource, draw: int
    ) -> Tensor:
        z = noise.normal(y, draw, Purpose.SOLVER)
        return mixed(part[0], y) + mixed(part[1], z)
