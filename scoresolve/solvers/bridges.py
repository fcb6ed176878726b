"""torchdiffeq and torchsde behind the interface of the other integrators.

torchdiffeq gets dx/dt = drift(x, t); torchsde an Ito equation in the way tau that is done,

    dy = r f(y, u) dtau + g(u) dW,   u = u_start + r tau,   r = sign(u_end - u_start),

with u = t and y = x for any process, and for a Gaussian one the variables of `_Reverse`. The
diagonal noise comes from a `NoiseSource`, so that a sample does not depend on its batch.
Over a step h, srk also needs U = int (W_tau - W_a) dtau over [a, a + h], which given the
increment W is normal with mean h W / 2 and variance h^3 / 12.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torchsde import sdeint

from scoresolve.errors import ArgumentError, Status, known_name, row_status
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.precision import host, widest
from scoresolve.sde.base import expand
from scoresolve.solvers.adaptive import BoundedDrift, CallLimit, check_velocity, unmoved
from scoresolve.solvers.adaptive.coordinates import Coordinates, LogSNR, Time
from scoresolve.solvers.adaptive.rows import Numbers, lift
from scoresolve.solvers.integrator import GaussianFlow, Integrator, RowDrift, Solution

__all__ = ["StepNoise", "TorchDiffEq", "TorchSDE"]

_NOISE_ALONE: Final = 1000.0
"""Of a state at this many times the scale of the data only a share of its inverse is data."""


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
        way = Time(field, t_start, t_end)
        trail = _Trail(x.to(field.state_dtype), t_start)
        status = torch.full((x.shape[0],), int(Status.OK), device=x.device)
        rows = (row_status(x) == Status.OK).nonzero().flatten()
        while rows.numel():
            run, start = _Run(field, trail, rows), trail.x[rows]
            times = torch.tensor(
                (trail.t[int(rows[0])], t_end), dtype=widest(x.device), device=x.device
            )
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
        return trail.solution(x, way, status, self.method in self.ADAPTIVE)

    def _options(self, times: Tensor) -> dict[str, object]:
        if self.steps is None:
            return {"max_num_steps": self.max_steps, "step_t": times[1:], "dtype": times.dtype}
        grid = torch.linspace(
            times[0], times[1], self.steps + 1, dtype=times.dtype, device=times.device
        )
        return {"grid_constructor": lambda _func, _y0, _t: grid}


class _Reverse(LogSNR):
    """The reverse SDE of a Gaussian process in y = x/S over u = log k, k = sigma/alpha.

    With c the scale of the data, S^2 = sigma^2 + (c alpha)^2, a = alpha/S and b = sigma/S,

        dy = (2 b eps - b^2 y) du + sqrt(2) b dW(-u),

    which follows from d(x/alpha) = 2 k eps du + sqrt(2) k dW(-u). No rate exceeds 2, whatever the
    process, and y is of the size of 1. The time of a process may run quite otherwise: steps of one
    length from sigma = 80 down pass by all that happens at the size of the data.

    The walk starts where k = 1000 c, or below. Of what it holds above, y keeps a share c/k, so a
    start with alpha = 0 is one from there.
    """

    def __init__(
        self, drift: BoundedDrift, flow: GaussianFlow, t_start: float, t_end: float
    ) -> None:
        alpha, sigma = float(flow.sde.alpha(t_start)), float(flow.sde.sigma(t_start))
        self.first_size = math.hypot(sigma, flow.scale * alpha)
        noisiest = host(-2 * math.log(_NOISE_ALONE * flow.scale))
        if float(flow.sde.log_snr(t_start)) < noisiest:
            t_start = max(float(flow.sde.time_from_log_snr(noisiest)), t_end)
        super().__init__(drift, flow, t_start, t_end)

    def size(self, alpha: Numbers, sigma: Numbers) -> Numbers:
        size: Numbers = np.hypot(sigma, self.scale * alpha)
        return size

    def mix(self, alpha: Numbers, sigma: Numbers, size: Numbers) -> tuple[Numbers, Numbers]:
        a, b = alpha / size, sigma / size
        return -b * b * a, (2 - b * b) * b

    def start_of(self, x: Tensor) -> Tensor:
        return x / self.first_size

    def spread(self, u: Numbers) -> Numbers:
        """sqrt(2) b at u [b]."""
        spread: Numbers = math.sqrt(2) / np.hypot(1.0, self.scale * np.exp(-u))
        return spread


class TorchSDE(Integrator):
    """An SDE solver of torchsde on a uniform grid.

    The grid is uniform in log k, k = sigma/alpha, for a Gaussian process, whose state is measured
    in the size of the noised data, and in time for any other. The diffusion depends on time alone,
    so the Ito and Stratonovich equations are the same, and methods of either kind apply. Rows do
    not depend on one another. A row that stops being finite ends with `Status.NONFINITE` at its
    last finite step.

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

        With `flow` the reverse SDE is taken from that, and `drift` and `diffusion` are not called.

        Raises:
            ArgumentError: `diffusion` or `noise` is missing, or sigma of `flow` is 0 at `t_end`.
            GridError: the reverse SDE of `flow` is to go upwards.
        """
        if flow is not None:
            self.check_direction(t_start, t_end)
        if diffusion is None or noise is None:
            missing = "diffusion" if diffusion is None else "noise"
            raise ArgumentError(f"{missing} is None: torchsde needs a diffusion and a noise source")
        field = BoundedDrift(
            drift if flow is None else flow.predict, x, t_start, t_end, self.max_calls
        )
        if t_start == t_end or not x.numel():
            return unmoved(x, t_end)
        ends = t_start, t_end
        way = Time(field, *ends) if flow is None else _Reverse(field, flow, *ends)
        trail = _Trail(way.start_of(x.to(field.state_dtype)), way.start)
        status = torch.full((x.shape[0],), int(Status.OK), device=x.device)
        step_noise = StepNoise(noise, trail.x, lambda tau: float(way.time(_place(way, tau))[0]))
        equation = _Equation(way, diffusion, step_noise, trail, self.METHODS[self.method])
        span = host([0.0, way.length])
        try:
            y_end = sdeint(
                equation,
                trail.x.reshape(step_noise.shape),
                span,
                bm=step_noise,
                method=self.method,
                # A little longer, so that rounding does not leave a rest for one more step.
                dt=float(span[1]) / self.steps * (1 + 1e-12),
            )[-1]
            trail.see(y_end.reshape(x.shape), way.end, trail.all)
        except CallLimit:
            status[:] = int(Status.CALL_LIMIT)
        return trail.solution(x, way, status, False)


class StepNoise:
    """The increments of a Brownian motion over consecutive steps, as torchsde asks for them.

    Step k gets W = sqrt(h) z from draw k of the solver's stream (which may follow a path: the
    source is told the times of the step), and U from draw k of the corrector's stream, which no
    integrator uses otherwise. Where tau is not time, that is the path's increment scaled to the
    variance of the step.

    Args:
        noise: the source.
        like: the state, [B, *event]; gives shape, dtype and device.
        time: the time at which tau is done.
    """

    levy_area_approximation = "space-time"

    def __init__(self, noise: NoiseSource, like: Tensor, time: Callable[[float], float]) -> None:
        self.noise, self.like, self.time, self.step = noise, like, time, -1
        self.dtype, self.device = like.dtype, like.device
        self.shape = torch.Size((like.shape[0], like[0].numel()))

    def __call__(
        self, ta: Tensor | float, tb: Tensor | float, return_U: bool = False, return_A: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """W(tb) - W(ta), [B, D], of the next step; with `return_U` also U."""
        self.step += 1
        a, b = float(ta), float(tb)
        h = b - a
        z = self.noise.normal(self.like, self.step, times=(self.time(a), self.time(b)))
        w = math.sqrt(h) * z.reshape(self.shape)
        if not return_U:
            return w
        z = self.noise.normal(self.like, self.step, Purpose.CORRECTOR)
        return w, h / 2 * w + math.sqrt(h**3 / 12) * z.reshape(self.shape)


class _Trail:
    """The last finite state that each row was seen in, and how far it had come, on the host."""

    def __init__(self, y: Tensor, u: float) -> None:
        self.x, self.all = y, torch.arange(y.shape[0], device=y.device)
        self.t = np.full(y.shape[0], u)
        self.accepted = torch.zeros_like(self.all)
        self.attempted = torch.zeros_like(self.all)

    def see(self, y: Tensor, u: float, rows: Tensor) -> Tensor:
        """Move the finite ones of `rows` to `y` and `u`; tells which of them made a step."""
        place = rows.cpu().numpy()
        new = torch.from_numpy(self.t[place] != u).to(rows.device)
        moved = (row_status(y) == Status.OK) & new
        lifted = moved.reshape(-1, *(1,) * (y.ndim - 1))
        self.x = self.x.index_copy(0, rows, torch.where(lifted, y, self.x[rows]))
        self.t[place[moved.cpu().numpy()]] = u
        self.accepted[rows] += moved
        return moved

    def solution(self, x: Tensor, way: Coordinates, status: Tensor, adaptive: bool) -> Solution:
        """Where the rows are; those that neither arrived nor have another status are not finite."""
        away = torch.from_numpy(self.t != way.end).to(x.device)
        status = torch.where((status == Status.OK) & away, int(Status.NONFINITE), status)
        rejected = self.attempted - self.accepted if adaptive else torch.zeros_like(self.all)
        return Solution(
            way.state(self.x, self.t).to(x.dtype),
            torch.from_numpy(way.time(self.t)).to(x.device, widest(x.device)),
            status,
            way.drift.calls,
            self.accepted,
            rejected,
            way.drift.evaluations.to(x.device),
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
        self.broken = self.broken & ~self.trail.see(x, float(t), self.rows)
        self.field.tell_of_many_calls(lambda row: f"t = {float(self.trail.t[row]):.6g}")
        self.trail.attempted[self.rows] += 1


class _Equation:
    """The equation for torchsde, on flat states [B, D].

    torchsde asks for one value several times (srk ten times for four); the last few are kept.
    """

    noise_type = "diagonal"

    def __init__(
        self,
        way: Time | _Reverse,
        diffusion: Callable[[Tensor], Tensor],
        noise: StepNoise,
        trail: _Trail,
        sde_type: str,
    ) -> None:
        self.way, self.diffusion, self.noise, self.trail = way, diffusion, noise, trail
        self.sde_type, self.seen_step = sde_type, -1
        self.place = trail.all.cpu().numpy()
        self.recent: deque[tuple[Tensor, float, Tensor]] = deque(maxlen=4)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        u = _place(self.way, tau)
        x = y.reshape(self.trail.x.shape)
        if self.noise.step != self.seen_step:
            # Every method draws its noise first and then starts from the accepted state.
            with torch.no_grad():
                self.trail.see(x, float(u[0]), self.trail.all)
            self.seen_step = self.noise.step
        for state, at, value in self.recent:
            if state is y and at == u[0]:
                return value
        value = self.way.sign * self.way.slope(x, u, self.place).reshape(y.shape)
        self.recent.append((y, float(u[0]), value))
        return value

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        u, like = _place(self.way, tau), self.trail.x
        if isinstance(self.way, _Reverse):
            return lift(self.way.spread(u), y).expand(y.shape)
        t = self.way.inside.times(u).expand(y.shape[0])
        return expand(self.diffusion(t), like, t).expand(like.shape).reshape(y.shape).to(y.dtype)


def _place(way: Coordinates, tau: Tensor | float) -> Numbers:
    """u where `tau` of the way is done, [1], inside its interval."""
    low, high = sorted((way.start, way.end))
    return np.array([min(max(way.start + way.sign * float(tau), low), high)])


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ArgumentError(f"{name} is {count!r}: give an integer, at least 1")
