"""Tracing: a solver's step, run once over the grid on symbols, leaves a Plan.

The state, model outputs and noise are `Linear` expressions over registers; sums and products
with numbers only edit coefficients. A stage is emitted when a value must exist: the argument
of a model call, and the state at the end of a step.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from scoresolve.errors import ArgumentError, GridError, ScoresolveError
from scoresolve.noise import first_draw
from scoresolve.plans.plan import Plan
from scoresolve.plans.stages import Action, Call, Combine, Custom, Draw, Drift, Mark, Stage
from scoresolve.sde import SDE, GaussianSDE, SchedulePoint

__all__ = ["Linear", "Past", "Run", "Steps", "trace"]


_ULPS = 4 * sys.float_info.epsilon


class Linear:
    """A linear combination of registers, with float coefficients."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, float]) -> None:
        self.terms = terms

    def __add__(self, other: Linear) -> Linear:
        terms = dict(self.terms)
        for register, coefficient in other.terms.items():
            terms[register] = terms.get(register, 0.0) + coefficient
        return Linear(terms)

    def __sub__(self, other: Linear) -> Linear:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> Linear:
        return Linear({register: factor * c for register, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        return Linear({register: c / divisor for register, c in self.terms.items()})

    def __neg__(self) -> Linear:
        return -1.0 * self


@dataclass(frozen=True)
class Past:
    """What a multistep solver remembers of an earlier step, from `t` to `s`.

    Attributes:
        t, s: ends of the step.
        x: state at `t`.
        m: the model's prediction at (x, t), the first call of the step.
        h: the step in half-log-SNR, lam(s) - lam(t).
    """

    t: float
    s: float
    x: Linear
    m: Linear
    h: float


class Steps(Protocol):
    """The part of a solver that tracing needs."""

    name: str
    predicts: str
    stochastic: bool
    jumps_at_noise: bool
    jumps_at_data: bool

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear: ...


class Run:
    """What a step may ask for while it is traced.

    Attributes:
        sde: the process.
        times: the whole grid.
        index: number of the current step, from 0.
        past: earlier steps, oldest first.
    """

    def __init__(self, sde: SDE, times: Sequence[float], predicts: str) -> None:
        self.sde, self.times, self.predicts = sde, tuple(times), predicts
        self.index = 0
        self.past: list[Past] = []
        self.stages: list[Stage] = []
        self._registers = 1
        self._draws = 0 if self.times[0] == sde.T else first_draw(self.times[0])
        self._driven: set[tuple[float, float, bool]] = set()
        self._first_call: tuple[Linear, Linear] | None = None
        self._log_scales: dict[float, tuple[float, float]] = {}
        if isinstance(sde, GaussianSDE):
            t = torch.tensor(self.times, dtype=torch.float64)
            scales = zip(sde.log_alpha(t).tolist(), sde.log_sigma(t).tolist(), strict=True)
            self._log_scales = dict(zip(self.times, scales, strict=True))

    @property
    def last(self) -> bool:
        """Whether the current step is the last of the grid."""
        return self.index == len(self.times) - 2

    def _gaussian(self) -> GaussianSDE:
        if not isinstance(self.sde, GaussianSDE):
            raise ArgumentError(
                f"this solver needs alpha(t) and sigma(t), which {self.sde} does not have: use a "
                "solver that works on the drift, such as 'euler_flow' or 'euler_maruyama'"
            )
        return self.sde

    def _logs(self, t: float) -> tuple[float, float]:
        if t not in self._log_scales:
            sde, time = self._gaussian(), torch.tensor(t, dtype=torch.float64)
            self._log_scales[t] = (float(sde.log_alpha(time)), float(sde.log_sigma(time)))
        return self._log_scales[t]

    def alpha(self, t: float) -> float:
        """Signal scale at `t`."""
        return math.exp(self._logs(t)[0])

    def sigma(self, t: float) -> float:
        """Noise standard deviation at `t`."""
        return math.exp(self._logs(t)[1])

    def rates(self, t: float) -> tuple[float, float]:
        """Time derivatives of alpha and sigma at `t`."""
        point = self._gaussian().point(torch.tensor(t, dtype=torch.float64))
        return float(point.alpha_dot), float(point.sigma_dot)

    def log_snr_half(self, t: float) -> float:
        """lam(t) = log(alpha / sigma), half the log-SNR."""
        log_alpha, log_sigma = self._logs(t)
        return log_alpha - log_sigma

    def time(self, log_snr_half: float) -> float:
        """The time at which lam(t) has the given value, inside the grid's interval."""
        return self.times_at([log_snr_half])[0]

    def times_at(self, log_snr_halves: Sequence[float]) -> list[float]:
        """The times at which lam(t) has the given values, inside the grid's interval."""
        lam = torch.tensor(log_snr_halves, dtype=torch.float64)
        t: list[float] = self._gaussian().time_from_log_snr(2 * lam).tolist()
        low, high = min(self.times), max(self.times)
        return [min(max(each, low), high) for each in t]

    def transition(self, s: float, t: float) -> tuple[float, float]:
        """Scale and standard deviation of x_t | x_s, for s < t."""
        lost = -math.expm1(2 * (self.log_snr_half(t) - self.log_snr_half(s)))
        return math.exp(self._logs(t)[0] - self._logs(s)[0]), self.sigma(t) * math.sqrt(lost)

    def diffusion(self, t: float) -> float:
        """g(t), for processes with one diffusion coefficient."""
        g = self.sde.diffusion(t)
        if g.ndim:
            raise ArgumentError(
                f"{self.sde} has a diffusion per part of the state: fixed-grid solvers need one "
                "coefficient g(t)"
            )
        return float(g)

    def predict(self, x: Linear, t: float, prediction: str | None = None) -> Linear:
        """The model's prediction at (x, t): one network call."""
        source = self._materialise(x)
        x.terms = {source: 1.0}  # what exists as a register is cheaper to reuse than its sum
        out = self._new()
        self.stages.append(Call(out, source, t, prediction or self.predicts, None))
        m = Linear({out: 1.0})
        if self._first_call is None:
            self._first_call = (Linear({source: 1.0}), m)
        return m

    def noise(self, t: float, s: float) -> Linear:
        """Standard normal noise that drives the interval from `t` to `s`; of its own if s = t."""
        return self._draw(t, s)

    def area(self, t: float, s: float) -> Linear:
        """The area of the noise from `t` to `s` against its chord, standard normal too.

        With h the variance of the increment `sqrt(h) noise(t, s)`, the area is `sqrt(h/12)` times
        this; a `BrownianPath` whose clock is that of the solver's noise has it.
        """
        return self._draw(t, s, area=True)

    def _draw(self, t: float, s: float, area: bool = False) -> Linear:
        out = self._new()
        if (t, s, area) in self._driven:  # a step taken again: a path has one number for it
            s, area = t, False
        self._driven.add((t, s, area))
        self.stages.append(Draw(out, self._draws, t, s, area))
        self._draws += 1
        return Linear({out: 1.0})

    def hold(self, x: Linear) -> Linear:
        """The same value in one register, so that sums over sub-steps do not grow."""
        return Linear({self._materialise(x): 1.0})

    def drift(self, x: Linear, t: float) -> Linear:
        """The forward drift f(x, t)."""
        if isinstance(self.sde, GaussianSDE):
            return float(self.sde.drift_rate(t)) * x
        source, out = self._materialise(x), self._new()
        self.stages.append(Drift(out, source, t))
        return Linear({out: 1.0})

    def apply(self, kernel: Action, x: Linear, t: float) -> Linear:
        """A kernel that is not linear in the state, applied at (x, t)."""
        source, out = self._materialise(x), self._new()
        self.stages.append(Custom(out, source, t, kernel, self._draws))
        self._draws += kernel.calls
        return Linear({out: 1.0})

    def jump(self, x: Linear, t: float, s: float, fresh: bool = False) -> Linear:
        """alpha_s x0 + sigma_s eps with the predicted x0 and its eps, or fresh noise for eps."""
        if self.sigma(t) == 0:
            x0, eps = x / self.alpha(t), self.predict(x, t, "eps")
        else:
            x0 = self.predict(x, t, "x0")
            eps = (x - self.alpha(t) * x0) / self.sigma(t)
        self._first_call = None  # a node that no polynomial in log-SNR passes through
        if self.sigma(s) == 0:
            return self.alpha(s) * x0
        return self.alpha(s) * x0 + self.sigma(s) * (self.noise(t, s) if fresh else eps)

    def _must_jump(self, solver: Steps, t: float, s: float) -> bool:
        if not isinstance(self.sde, GaussianSDE):
            return False
        at_noise = solver.jumps_at_noise and 0 in (self.alpha(t), self.alpha(s))
        # at sigma = 0 neither x0 nor the score tells eps
        blind = self.sigma(t) == 0 and solver.predicts in ("x0", "score")
        at_data = solver.jumps_at_data and 0 in (self.sigma(t), self.sigma(s))
        return at_noise or at_data or blind

    def advance(self, solver: Steps, x: Linear, t: float, s: float) -> Linear:
        """One step of `solver`, recorded in `past` and materialised."""
        self._first_call = None
        try:
            if self._must_jump(solver, t, s):
                stepped = self.jump(x, t, s, fresh=solver.stochastic)
            else:
                stepped = solver.step(x, t, s, self)
            if not isinstance(stepped, Linear):
                raise ArgumentError(
                    f"the step of {solver.name!r} returned {stepped!r}: return a sum of states, "
                    "predictions and noise, each times a number"
                )
            result = self.hold(stepped)
        except ScoresolveError:
            raise
        except (ArithmeticError, ValueError) as error:  # 1/0, overflow, log(0)
            raise self._singular() from error
        if self._first_call is not None and isinstance(self.sde, GaussianSDE):
            state, m = self._first_call
            h = self.log_snr_half(s) - self.log_snr_half(t)
            self.past.append(Past(t, s, state, m, h))
        elif self._first_call is not None:
            self.past.append(Past(t, s, *self._first_call, h=math.nan))
        (register,) = result.terms
        self.stages.append(Mark(register, self.index, s))
        self.index += 1
        return result

    def _singular(self) -> GridError:
        t, s = self.times[self.index], self.times[min(self.index + 1, len(self.times) - 1)]
        return GridError(
            f"the step from t = {t:g} to {s:g} has a coefficient that is not finite: the solver's "
            "variables are singular there (alpha = 0 or sigma = 0); move that end of the grid "
            "inside, or use a solver in v or flow form"
        )

    def _new(self) -> int:
        self._registers += 1
        return self._registers - 1

    def _materialise(self, x: Linear) -> int:
        terms = tuple((r, c) for r, c in x.terms.items() if c != 0.0)
        if len(terms) == 1 and abs(terms[0][1] - 1.0) < _ULPS:  # a * (x / a) is x
            return terms[0][0]
        if not terms or not all(math.isfinite(c) for _, c in terms):
            raise self._singular()
        out = self._new()
        self.stages.append(Combine(out, terms))
        return out


def trace(solver: Steps, sde: SDE, times: Sequence[float], denoise: bool = False) -> Plan:
    """Run `solver.step` symbolically over the grid and collect the stages.

    Args:
        solver: anything with `name`, `predicts`, `stochastic` and `step`.
        sde: the process.
        times: strictly monotone times inside the process's interval, at least two.
        denoise: end with a call that jumps to the predicted x0 (sigma = 0); counted as NFE.

    Raises:
        GridError: a coefficient is not finite on this grid, or a stochastic solver is to go up.
        ArgumentError: the solver cannot work on this kind of process.
    """
    if solver.stochastic and times[0] < times[-1]:
        raise GridError(
            f"{solver.name!r} runs the reverse SDE, from noise to data, but the grid goes up from "
            f"t = {times[0]:g} to {times[-1]:g}: give decreasing times, or a deterministic solver"
        )
    run = Run(sde, times, solver.predicts)
    x = Linear({0: 1.0})
    for t, s in itertools.pairwise(times):
        x = run.advance(solver, x, t, s)
    if denoise:
        run._gaussian()
        x = run.predict(x, times[-1], "x0")
    (output,) = x.terms
    schedule = _Schedule(sde, [*times] + [s.t for s in run.stages if isinstance(s, Call)])
    stages = tuple(
        replace(stage, point=schedule.at(stage.t)) if isinstance(stage, Call) else stage
        for stage in run.stages
    )
    return Plan(
        solver=solver.name,
        process=repr(sde),
        times=run.times,
        denoised=denoise,
        start=schedule.at(times[0]),
        end=schedule.at(times[-1]),
        prior_std=sde.start_std(times[0]) if isinstance(sde, GaussianSDE) else None,
        stages=stages,
        output=output,
    )


class _Schedule:
    """The schedule at many times, evaluated in one go."""

    def __init__(self, sde: SDE, times: Sequence[float]) -> None:
        self.points: dict[float, SchedulePoint] = {}
        if isinstance(sde, GaussianSDE):
            unique = sorted(set(times))
            columns = sde.point(torch.tensor(unique, dtype=torch.float64))
            values = zip(*(torch.as_tensor(c).tolist() for c in columns), strict=True)
            self.points = {t: SchedulePoint(*v) for t, v in zip(unique, values, strict=True)}

    def at(self, t: float) -> SchedulePoint | None:
        return self.points.get(t)
