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
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from scoresolve.errors import (
    ArgumentError,
    GridError,
    ScoresolveError,
    UnknownNameError,
    real_number,
    short,
)
from scoresolve.models import PREDICTIONS
from scoresolve.noise import first_draw
from scoresolve.plans.plan import Plan
from scoresolve.plans.stages import Action, Call, Combine, Custom, Draw, Drift, Mark, Stage
from scoresolve.precision import host
from scoresolve.sde import SDE, GaussianSDE, SchedulePoint, check_process

__all__ = ["Linear", "Past", "Run", "Steps", "trace"]


_ULPS = 4 * sys.float_info.epsilon


class _Slip(ArgumentError):
    """A mistake inside a step, told without the name of the solver."""


class Linear:
    """A linear combination of registers, with float coefficients.

    Sums, differences and products with numbers are all there is: whatever else a step tries with
    a state raises an `ArgumentError` that names it.

    Args:
        terms: coefficient of each register.
        run: the tracing that the registers belong to.
    """

    __slots__ = ("run", "terms")
    __array_ufunc__ = None  # numpy's numbers leave sums and products to this class

    def __init__(self, terms: dict[int, float], run: Run | None = None) -> None:
        self.terms, self.run = terms, run

    def __add__(self, other: Linear) -> Linear:
        if not isinstance(other, Linear):
            return self._with_nothing(other)
        if other.run is not self.run and other.run is not None and self.run is not None:
            raise _Slip(
                "adds a state, prediction or noise of another run, kept on the solver: read "
                "run.past instead"
            )
        terms = dict(self.terms)
        for register, coefficient in other.terms.items():
            terms[register] = terms.get(register, 0.0) + coefficient
        return Linear(terms, self.run or other.run)

    __radd__ = __add__

    def __sub__(self, other: Linear) -> Linear:
        return self + -1.0 * other

    def __rsub__(self, other: Linear) -> Linear:
        return -1.0 * self + other

    def __mul__(self, factor: float) -> Linear:
        factor = factor if type(factor) is float else _coefficient(factor)
        return Linear({register: factor * c for register, c in self.terms.items()}, self.run)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        divisor = divisor if type(divisor) is float else _coefficient(divisor)
        return Linear({register: c / divisor for register, c in self.terms.items()}, self.run)

    def __neg__(self) -> Linear:
        return -1.0 * self

    def __pos__(self) -> Linear:
        return self

    def _with_nothing(self, other: object) -> Linear:
        """The same, for a zero that starts a sum; any other number or tensor is refused."""
        if isinstance(other, (int, float, np.number)) and other == 0:
            return self
        if isinstance(other, (int, float, complex, np.number)):
            raise _Slip(
                f"adds the number {short(other)} to a state: a plan is linear, so a number cannot "
                "be added to a state; add states, predictions and noise, each times a number"
            )
        if isinstance(other, (Tensor, np.ndarray)):
            raise _Slip(
                f"adds a tensor of shape {tuple(other.shape)} to a state: a step is traced once "
                "for all samples; noise is run.noise(t, s), and all else comes from run.predict"
            )
        raise _Slip(f"adds {short(other)} to a state: add states, predictions and noise")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols are asked for by name, as in copy and numpy
            raise AttributeError(name)
        raise _Slip(_not_linear(f"asks for .{name} of a state"))

    def __getitem__(self, index: object) -> Any:
        raise _Slip(_not_linear("takes a part of a state by an index"))

    def __iter__(self) -> Any:
        raise _Slip(_not_linear("goes through the elements of a state"))

    def __float__(self) -> float:
        raise _Slip(_not_linear("makes a number of a state"))

    def __bool__(self) -> bool:
        raise _Slip(_not_linear("asks whether a state is true"))

    def _compare(self, other: object) -> bool:
        raise _Slip(_not_linear("compares a state"))

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __eq__(self, other: object) -> bool:
        return self is other if other is None or isinstance(other, Linear) else self._compare(other)

    __hash__ = object.__hash__

    def _power(self, other: object) -> Any:
        raise _Slip(_not_linear("takes a power, a remainder or a matrix product of a state"))

    __pow__ = __rpow__ = __mod__ = __floordiv__ = __matmul__ = __rmatmul__ = _power

    def __rtruediv__(self, other: object) -> Any:
        raise _Slip(_not_linear("divides by a state"))

    def __abs__(self) -> Any:
        raise _Slip(_not_linear("takes the size of a state"))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in _METHODS or (name.startswith("__") and name.strip("_") in _ARITHMETIC):
            return NotImplemented  # so that Python asks this class, as in tensor * state
        raise _Slip(_not_linear(f"applies torch's {name} to a state"))


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "div")
_METHODS = ("add", "sub", "mul", "div", "true_divide")  # what those of a tensor are called inside


def _not_linear(what: str) -> str:
    return (
        f"{what}, which is not linear: a step may add states, predictions and noise, each times a "
        "number that hangs on time alone; anything else belongs into the model or into a kernel "
        "of run.apply"
    )


def _coefficient(value: Any) -> float:
    """A number, or a tensor or array without axes, as a float."""
    if isinstance(value, Linear):
        raise _Slip(
            "multiplies or divides two states, predictions or noises: a plan is linear, so one "
            "of the two must be a number that hangs on time alone"
        )
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        raise _Slip(
            f"multiplies a state by a tensor of shape {tuple(value.shape)}: a coefficient is one "
            "number for all samples"
        )
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _Slip(f"multiplies a state by {short(value)}: give a finite number") from None


class _History(list["Past"]):
    """Earlier steps; reading one that is not there says so."""

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise _Slip(
                f"reads run.past[{index}] where {len(self)} earlier steps are known: ask "
                "len(run.past) first, the first step has none"
            ) from None


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

    def __init__(
        self,
        sde: SDE,
        times: Sequence[float],
        predicts: str,
        stochastic: bool = True,
        name: str = "a solver",
    ) -> None:
        self.sde, self.times, self.predicts = sde, tuple(times), predicts
        self.stochastic, self.name = stochastic, name
        self.index = 0
        self.past: list[Past] = _History()
        self.stages: list[Stage] = []
        self._registers = 1
        self._draws = 0 if self.times[0] == sde.T else first_draw(self.times[0])
        self._driven: set[tuple[float, float, bool]] = set()
        self._first_call: tuple[Linear, Linear] | None = None
        self._log_scales: dict[float, tuple[float, float]] = {}
        if isinstance(sde, GaussianSDE):
            t = host(self.times)
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
            sde, time = self._gaussian(), host(_time("the schedule", t))
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
        point = self._gaussian().point(host(_time("the schedule", t)))
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
        lam = host(log_snr_halves)
        t: list[float] = self._gaussian().time_from_log_snr(2 * lam).tolist()
        low, high = min(self.times), max(self.times)
        return [min(max(each, low), high) for each in t]

    def transition(self, s: float, t: float) -> tuple[float, float]:
        """Scale and standard deviation of x_t | x_s, for s < t."""
        lost = -math.expm1(2 * (self.log_snr_half(t) - self.log_snr_half(s)))
        return math.exp(self._logs(t)[0] - self._logs(s)[0]), self.sigma(t) * math.sqrt(lost)

    def diffusion(self, t: float) -> float:
        """g(t), for processes with one diffusion coefficient."""
        g = self.sde.diffusion(host(_time("the schedule", t)))
        if g.ndim:
            raise ArgumentError(
                f"{self.sde} has a diffusion per part of the state: fixed-grid solvers need one "
                "coefficient g(t)"
            )
        return float(g)

    def predict(self, x: Linear, t: float, prediction: str | None = None) -> Linear:
        """The model's prediction at (x, t): one network call."""
        t, name = self._inside(t), self.predicts if prediction is None else prediction
        if name not in PREDICTIONS:
            what = f"prediction in the step of {self.name!r},"
            raise UnknownNameError(what, name, PREDICTIONS)
        source = self._materialise(x)
        x.terms = {source: 1.0}  # what exists as a register is cheaper to reuse than its sum
        m = self._register()
        (out,) = m.terms
        self.stages.append(Call(out, source, t, name, None))
        if self._first_call is None:
            self._first_call = (Linear({source: 1.0}, self), m)
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
        if not self.stochastic:
            raise _Slip("draws noise, but says stochastic = False: set stochastic = True")
        t, s, z = _time("noise", t), _time("noise", s), self._register()
        (out,) = z.terms
        if (t, s, area) in self._driven:  # a step taken again: a path has one number for it
            s, area = t, False
        self._driven.add((t, s, area))
        self.stages.append(Draw(out, self._draws, t, s, area))
        self._draws += 1
        return z

    def hold(self, x: Linear) -> Linear:
        """The same value in one register, so that sums over sub-steps do not grow."""
        return Linear({self._materialise(x): 1.0}, self)

    def drift(self, x: Linear, t: float) -> Linear:
        """The forward drift f(x, t)."""
        t = self._inside(t)
        if isinstance(self.sde, GaussianSDE):
            return float(self.sde.drift_rate(host(t))) * x
        source, d = self._materialise(x), self._register()
        (out,) = d.terms
        self.stages.append(Drift(out, source, t))
        return d

    def apply(self, kernel: Action, x: Linear, t: float) -> Linear:
        """A kernel that is not linear in the state, applied at (x, t)."""
        t, source, y = self._inside(t), self._materialise(x), self._register()
        (out,) = y.terms
        self.stages.append(Custom(out, source, t, kernel, self._draws))
        self._draws += kernel.calls
        return y

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
                raise _Slip(
                    f"returned {short(stepped)}: return a sum of states, predictions and noise, "
                    "each times a number"
                )
            result = self.hold(stepped)
        except _Slip as slip:
            raise ArgumentError(f"the step of {solver.name!r} {slip}") from None
        except ScoresolveError:
            raise
        except (ArithmeticError, ValueError) as error:  # 1/0, overflow, log(0)
            raise self._singular() from error
        except (TypeError, AttributeError, LookupError) as error:
            raise ArgumentError(
                f"the step of {solver.name!r} from t = {t:g} to {s:g} failed: {error}"
            ) from error
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
            f"the step of {self.name!r} from t = {t:g} to {s:g} has a coefficient that is "
            "not finite: the solver's variables are singular there (alpha = 0 or sigma = 0); move "
            "that end of the grid inside, or use a solver in v or flow form"
        )

    def _new(self) -> int:
        self._registers += 1
        return self._registers - 1

    def _register(self) -> Linear:
        return Linear({self._new(): 1.0}, self)

    def _inside(self, t: float) -> float:
        """`t` as a float, if it lies in the grid's interval: nothing is evaluated outside."""
        time, low, high = _time("a call", t), min(self.times), max(self.times)
        if not low <= time <= high:
            raise _Slip(
                f"calls at t = {time:g}, outside the grid's [{low:g}, {high:g}]: the model and the "
                "process are asked inside it alone"
            )
        return time

    def _materialise(self, x: Linear) -> int:
        if not isinstance(x, Linear):
            raise _Slip(f"calls the model at {short(x)}: give a state")
        if x.run is not self and x.run is not None:
            raise _Slip("uses a state of another run, kept on the solver: read run.past instead")
        terms = tuple((r, c) for r, c in x.terms.items() if c != 0.0)
        if len(terms) == 1 and abs(terms[0][1] - 1.0) < _ULPS:  # a * (x / a) is x
            return terms[0][0]
        if not terms:
            raise _Slip("leaves nothing of a state: all its coefficients are 0")
        if not all(math.isfinite(c) for _, c in terms):
            raise self._singular()
        out = self._new()
        self.stages.append(Combine(out, terms))
        return out


def _check_solver(solver: Steps) -> None:
    for attribute in ("name", "predicts"):
        if not isinstance(getattr(solver, attribute, None), str):
            raise ArgumentError(
                f"{type(solver).__name__} has no {attribute!r}: a solver says its name, what it "
                f"predicts ({', '.join(PREDICTIONS)}), its order and its source"
            )
    if solver.predicts not in PREDICTIONS:
        raise UnknownNameError(f"prediction of {solver.name!r},", solver.predicts, PREDICTIONS)


def _time(what: str, t: object) -> float:
    """A time that a step asks with, as a float."""
    if type(t) is float and math.isfinite(t):
        return t
    try:
        return real_number(f"{what}: t", t)
    except ArgumentError as error:
        raise _Slip(f"asks with no time, {error}") from None


def trace(solver: Steps, sde: SDE, times: Sequence[float], denoise: bool = False) -> Plan:
    """Run `solver.step` symbolically over the grid and collect the stages.

    Args:
        solver: anything with `name`, `predicts`, `stochastic` and `step`.
        sde: the process.
        times: strictly monotone times inside the process's interval, at least two.
        denoise: end with a call that jumps to the predicted x0 (sigma = 0); counted as NFE.

    Raises:
        GridError: a coefficient is not finite on this grid, or a stochastic solver is to go up.
        ArgumentError: the solver cannot work on this kind of process, or its step does what a
            plan cannot hold.
        UnknownNameError: it asks for a prediction that there is none of.
    """
    _check_solver(solver)
    check_process(sde)
    if solver.stochastic and times[0] < times[-1]:
        raise GridError(
            f"{solver.name!r} runs the reverse SDE, from noise to data, but the grid goes up from "
            f"t = {times[0]:g} to {times[-1]:g}: give decreasing times, or a deterministic solver"
        )
    run = Run(sde, times, solver.predicts, solver.stochastic, solver.name)
    x = Linear({0: 1.0}, run)
    for t, s in itertools.pairwise(times):
        x = run.advance(solver, x, t, s)
    if len(times) > 1 and not any(isinstance(stage, Call | Custom) for stage in run.stages):
        raise ArgumentError(
            f"the step of {solver.name!r} never calls the model: m = run.predict(x, t) is the "
            "model's prediction"
        )
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
            columns = sde.point(host(unique))
            values = zip(*(host(c).tolist() for c in columns), strict=True)
            self.points = {t: SchedulePoint(*v) for t, v in zip(unique, values, strict=True)}

    def at(self, t: float) -> SchedulePoint | None:
        return self.points.get(t)
