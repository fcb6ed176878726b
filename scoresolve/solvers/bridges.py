"""torchdiffeq and torchsde behind the interface of the other integrators.

torchdiffeq gets dx/dt = drift(x, t); torchsde an Ito equation in the time tau that has passed,

    dx = r drift(x, t_start + r tau) dtau + g(t_start + r tau) dW,   r = sign(t_end - t_start),

whose diagonal noise comes from a `NoiseSource`, so that a sample does not depend on its batch.
Over a step h, srk also needs U = int (W_tau - W_a) dtau over [a, a + h], which given the
increment W is normal with mean h W / 2 and variance h^3 / 12.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torchsde import sdeint

from scoresolve.errors import ArgumentError, Status, known_name, row_status
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.sde.base import TimeLike, expand, host
from scoresolve.solvers.adaptive import BoundedDrift, CallLimit, check_velocity, unmoved
from scoresolve.solvers.integrator import GaussianFlow, Integrator, RowDrift, Solution

__all__ = ["StepNoise", "TorchDiffEq", "TorchSDE"]


class TorchDiffEq(Integrator):
    """An ODE solver of torchdiffeq.

    torchdiffeq knows one state and one step: the error norm of an adaptive method runs over the
    whole batch, so a row's numbers depend on its neighbours, and the stiffest row sets the pace of
    all. A row whose drift is not finite ends the run there; it gets `Status.NONFINITE` and the
    others start again from the last accepted time without it. If the step underflows or
    `max_steps` is reached, all rows end with `Status.STEP_LIMIT`. A fixed-step method leaves
    a bad row behind and its neighbours alone. Steps end on `t_end`, never beyond.

    Args:
        method: adaptive: dopri5, dopri8, bosh3, fehlberg2, adaptive_heun; with fixed steps: euler,
            midpoint, heun3, rk4.
        rtol, atol: tolerances of an adaptive method, at least 0.
        steps: number of steps of a fixed-step method, at least 1; None for an adaptive one.
        max_steps: attempted steps of an adaptive method, at least 1.
        max_calls: calls of the drift, at least 1.

    Raises:
        UnknownNameError: there is no such method.
        ArgumentError: a number is out of range, or `steps` does not fit the method.

    Source:
        Chen, "torchdiffeq", 2018, https://github.com/rtqichen/torchdiffeq.
    """

    source = "torchdiffeq (Chen 2018)"

    ADAPTIVE: Final = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
    FIXED: Final = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}

    def __init__(
        self,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        *,
        steps: int | None = None,
        max_steps: int = 10_000,
        max_calls: int = 100_000,
    ) -> None:
        orders = self.ADAPTIVE | self.FIXED
        known_name("torchdiffeq method", method, orders)
        if (steps is None) != (method in self.ADAPTIVE):
            needed = "leave steps out" if method in self.ADAPTIVE else "give steps, at least 1"
            raise ArgumentError(f"steps is {steps!r} for the method {method!r}: {needed}")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0 <= value < math.inf:
                raise ArgumentError(f"{name} is {value!r}: give a number at least 0")
        _check_counts(steps=steps, max_steps=max_steps, max_calls=max_calls)
        self.name, self.method = f"torchdiffeq_{method}", method
        self.order, self.rtol, self.atol = float(orders[method]), rtol, atol
        self.steps, self.max_steps, self.max_calls = steps, max_steps, max_calls

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
        """Integrate dx = drift(x, t) dt; `diffusion`, `noise` and `width` are not read.

        Raises:
            ArgumentError: the velocity of `flow` is not known at an end of the interval.
        """
        from torchdiffeq import odeint  # half a second, because of scipy

        field = BoundedDrift(drift, x, t_start, t_end, self.max_calls)
        if t_start == t_end or not x.numel():
            return unmoved(x, t_end)
        if flow is not None:
            check_velocity(flow, t_start, t_end)
        trail = _Trail(x.to(field.state_dtype), t_start)
        status = torch.full((x.shape[0],), int(Status.OK), device=x.device)
        rows = (row_status(x) == Status.OK).nonzero().flatten()
        while rows.numel():
            run, start = _Run(field, trail, rows), trail.x[rows]
            times = torch.stack((trail.t[rows[0]], torch.full_like(trail.t[0], t_end)))
            try:
                run.begin(times[0], start)
                if run.broken.any():
                    rows = rows[~run.broken]
                    continue
                x_end = odeint(
                    run,
                    start,
                    times,
                    rtol=self.rtol,
                    atol=self.atol,
                    method=self.method,
                    options=self._options(times),
                )[-1]
                trail.see(x_end, t_end, rows)
                break
            except CallLimit:
                status[rows] = int(Status.CALL_LIMIT)
                break
            except AssertionError:
                if run.inside or self.steps is not None:
                    raise
                if not run.broken.any():
                    status[rows] = int(Status.STEP_LIMIT)
                    break
                rows = rows[~run.broken]
        return trail.solution(x, t_end, field, status, self.method in self.ADAPTIVE)

    def _options(self, times: Tensor) -> dict[str, object]:
        if self.steps is None:
            return {"max_num_steps": self.max_steps, "step_t": times[1:]}
        grid = torch.linspace(
            times[0], times[1], self.steps + 1, dtype=times.dtype, device=times.device
        )
        return {"grid_constructor": lambda _func, _y0, _t: grid}


class TorchSDE(Integrator):
    """An SDE solver of torchsde on a uniform grid.

    The diffusion depends on time alone, so the Ito and Stratonovich equations are the same, and
    methods of either kind apply. Rows do not depend on one another. A row that stops being finite
    ends with `Status.NONFINITE` at its last finite step.

    Args:
        method: euler, milstein (which is euler here), srk, heun or midpoint.
        steps: number of steps, at least 1.
        max_calls: calls of the drift, at least 1.

    Raises:
        UnknownNameError: there is no such method.
        ArgumentError: a number is out of range.

    Source:
        Li, Wong, Chen, Duvenaud, "Scalable gradients for stochastic differential equations",
        2020, https://github.com/google-research/torchsde.
    """

    source = "torchsde (Li et al. 2020, 2001.01328)"
    order = 1.0
    stochastic = True

    METHODS: Final = {
        "euler": "ito",
        "milstein": "ito",
        "srk": "ito",
        "heun": "stratonovich",
        "midpoint": "stratonovich",
    }

    def __init__(
        self, method: str = "euler", *, steps: int = 100, max_calls: int = 100_000
    ) -> None:
        known_name("torchsde method", method, self.METHODS)
        _check_counts(steps=steps, max_calls=max_calls)
        self.name, self.method = f"torchsde_{method}", method
        self.steps, self.max_calls = steps, max_calls
        self.order = 1.5 if method == "srk" else 1.0

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
        """Integrate dx = drift(x, t) dt + diffusion(t) dw.

        Raises:
            ArgumentError: `diffusion` or `noise` is missing.
            GridError: the reverse SDE of `flow` is to go upwards.
        """
        if flow is not None:
            self.check_direction(t_start, t_end)
        if diffusion is None or noise is None:
            missing = "diffusion" if diffusion is None else "noise"
            raise ArgumentError(f"{missing} is None: torchsde needs a diffusion and a noise source")
        field = BoundedDrift(drift, x, t_start, t_end, self.max_calls)
        if t_start == t_end or not x.numel():
            return unmoved(x, t_end)
        trail = _Trail(x.to(field.state_dtype), t_start)
        status = torch.full((x.shape[0],), int(Status.OK), device=x.device)
        step_noise = StepNoise(noise, trail.x, t_start, t_end)
        equation = _Equation(field, diffusion, step_noise, trail, self.METHODS[self.method])
        span = host([0.0, abs(t_end - t_start)])
        try:
            x_end = sdeint(
                equation,
                trail.x.reshape(step_noise.shape),
                span,
                bm=step_noise,
                method=self.method,
                # A little longer, so that rounding does not leave a rest for one more step.
                dt=float(span[1]) / self.steps * (1 + 1e-12),
            )[-1]
            trail.see(x_end.reshape(x.shape), t_end, trail.all)
        except CallLimit:
            status[:] = int(Status.CALL_LIMIT)
        return trail.solution(x, t_end, field, status, False)


class StepNoise:
    """The increments of a Brownian motion over consecutive steps, as torchsde asks for them.

    Step k gets W = sqrt(h) z from draw k of the solver's stream (which may follow a path: the
    source is told the times of the step), and U from draw k of the corrector's stream, which no
    integrator uses otherwise.

    Args:
        noise: the source.
        like: the state, [B, *event]; gives shape, dtype and device.
        t_start, t_end: the interval, walked from `t_start`.
    """

    levy_area_approximation = "space-time"

    def __init__(self, noise: NoiseSource, like: Tensor, t_start: float, t_end: float) -> None:
        self.noise, self.like, self.step = noise, like, -1
        self.t_start, self.t_end = t_start, t_end
        self.dtype, self.device = like.dtype, like.device
        self.shape = torch.Size((like.shape[0], like[0].numel()))

    def time(self, tau: Tensor | float) -> float:
        """The time at which `tau` has passed, inside the interval."""
        low, high = sorted((self.t_start, self.t_end))
        passed = math.copysign(float(tau), self.t_end - self.t_start)
        return min(max(self.t_start + passed, low), high)

    def __call__(
        self, ta: Tensor | float, tb: Tensor | float, return_U: bool = False, return_A: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """W(tb) - W(ta), [B, D], of the next step; with `return_U` also U."""
        self.step += 1
        h = float(tb) - float(ta)
        z = self.noise.normal(self.like, self.step, times=(self.time(ta), self.time(tb)))
        w = math.sqrt(h) * z.reshape(self.shape)
        if not return_U:
            return w
        z = self.noise.normal(self.like, self.step, Purpose.CORRECTOR)
        return w, h / 2 * w + math.sqrt(h**3 / 12) * z.reshape(self.shape)


class _Trail:
    """The last finite state that each row was seen in."""

    def __init__(self, x: Tensor, t: float) -> None:
        self.x, self.all = x, torch.arange(x.shape[0], device=x.device)
        self.t = torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
        self.accepted = torch.zeros_like(self.all)
        self.attempted = torch.zeros_like(self.all)

    def see(self, x: Tensor, t: TimeLike, rows: Tensor) -> Tensor:
        """Move the finite ones of `rows` to `x` and `t`; tells which of them made a step."""
        moved = (row_status(x) == Status.OK) & (self.t[rows] != t)
        lifted = moved.reshape(-1, *(1,) * (x.ndim - 1))
        self.x = self.x.index_copy(0, rows, torch.where(lifted, x, self.x[rows]))
        self.t[rows] = torch.where(moved, t, self.t[rows])
        self.accepted[rows] += moved
        return moved

    def solution(
        self, x: Tensor, t_end: float, field: BoundedDrift, status: Tensor, adaptive: bool
    ) -> Solution:
        """Where the rows are; those that neither arrived nor have another status are not finite."""
        lost = (status == Status.OK) & (self.t != t_end)
        status = torch.where(lost, int(Status.NONFINITE), status)
        rejected = self.attempted - self.accepted if adaptive else torch.zeros_like(self.all)
        return Solution(
            self.x.to(x.dtype),
            self.t,
            status,
            field.calls,
            self.accepted,
            rejected,
            field.evaluations.to(x.device),
        )


class _Run:
    """The right-hand side for torchdiffeq, and the witness of its steps."""

    def __init__(self, field: BoundedDrift, trail: _Trail, rows: Tensor) -> None:
        self.field, self.trail, self.rows = field, trail, rows
        self.inside = False
        self.broken = torch.zeros_like(rows, dtype=torch.bool)
        self.first: tuple[Tensor, Tensor] | None = None

    def begin(self, t: Tensor, x: Tensor) -> None:
        """Call the drift at the start; torchdiffeq's own call there gets the same value."""
        self.first = x, self(t, x)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.first is not None and self.first[0] is x:
            value, self.first = self.first[1], None
            return value
        self.inside = True
        value = self.field(x, self.field.times(t), self.rows)
        self.inside = False
        bad = row_status(x).maximum(row_status(value)) != Status.OK
        self.broken = self.broken | bad
        return value

    @torch.no_grad()
    def callback_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        """torchdiffeq is about to step from the accepted state `x`."""
        self.broken = self.broken & ~self.trail.see(x, t, self.rows)
        self.field.tell_of_many_calls(lambda row: f"t = {float(self.trail.t[row]):.6g}")
        self.trail.attempted[self.rows] += 1


class _Equation:
    """The equation for torchsde, on flat states [B, D].

    torchsde asks for one value several times (srk ten times for four); the last few are kept.
    """

    noise_type = "diagonal"

    def __init__(
        self,
        field: BoundedDrift,
        diffusion: Callable[[Tensor], Tensor],
        noise: StepNoise,
        trail: _Trail,
        sde_type: str,
    ) -> None:
        self.field, self.diffusion, self.noise, self.trail = field, diffusion, noise, trail
        self.sde_type, self.seen_step = sde_type, -1
        self.sign = math.copysign(1.0, noise.t_end - noise.t_start)
        self.recent: deque[tuple[Tensor, float, Tensor]] = deque(maxlen=4)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        t = self.noise.time(tau)
        x = y.reshape(self.trail.x.shape)
        if self.noise.step != self.seen_step:
            # Every method draws its noise first and then starts from the accepted state.
            with torch.no_grad():
                self.trail.see(x, t, self.trail.all)
            self.seen_step = self.noise.step
        for state, time, value in self.recent:
            if state is y and time == t:
                return value
        value = self.sign * self.field(x, self.field.times(t), self.trail.all).reshape(y.shape)
        self.recent.append((y, t, value))
        return value

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        t = self.field.times(self.noise.time(tau)).expand(y.shape[0])
        like = self.trail.x
        return expand(self.diffusion(t), like, t).expand(like.shape).reshape(y.shape).to(y.dtype)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ArgumentError(f"{name} is {count!r}: give an integer, at least 1")
