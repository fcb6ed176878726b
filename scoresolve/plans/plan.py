"""A Plan: a fixed-grid sampler as data.

It prints as a table, counts its own network calls, saves as JSON, runs on a model
(`Plan.run`) and, because its stages are linear, tells its exact law on Gaussian data (`Plan.law`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError
from scoresolve.models import Model, NetworkModel
from scoresolve.noise import NoiseSource, Purpose, Times
from scoresolve.plans.executor import Program, StepReport, check_state
from scoresolve.plans.law import Law, propagate
from scoresolve.plans.reading import VERSION, read
from scoresolve.plans.stages import Call, Combine, Custom, Draw, Drift, Stage
from scoresolve.sde import SchedulePoint

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A traced sampler: what it computes, with every coefficient.

    Attributes:
        solver: name of the solver.
        process: description of the process.
        times: the grid, [steps + 1].
        denoised: whether a final call jumps from the last time to sigma = 0.
        start, end: schedule at the first and the last time (None if not Gaussian).
        prior_std: standard deviation of a start drawn at the first time (None if not Gaussian).
        stages: what is done, in order.
        output: the register that holds the result.
    """

    solver: str
    process: str
    times: tuple[float, ...]
    denoised: bool
    start: SchedulePoint | None
    end: SchedulePoint | None
    prior_std: float | None
    stages: tuple[Stage, ...]
    output: int

    @property
    def nfe(self) -> int:
        """Network calls of one run, counted stage by stage."""
        return sum(
            1 if isinstance(stage, Call) else stage.kernel.calls if isinstance(stage, Custom) else 0
            for stage in self.stages
        )

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return len(self.times) - 1

    @property
    def stochastic(self) -> bool:
        """Whether a run draws noise."""
        return any(isinstance(stage, Draw | Custom) for stage in self.stages)

    def __str__(self) -> str:
        head = f"{self.solver} on {self.process}: {self.steps} steps, NFE {self.nfe}"
        first = min((s.index for s in self.stages if isinstance(s, Draw)), default=0)
        rows = [_describe(stage, first) for stage in self.stages]
        width = max((len(left) for left, _ in rows), default=0)
        lines = [f"{i:4d}  {left:<{width}}  {right}" for i, (left, right) in enumerate(rows)]
        return "\n".join([head, *lines, f"      result: x{self.output}"])

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives it back exactly.

        Raises:
            ArgumentError: the plan holds a custom kernel, which is code and not data.
        """
        if custom := [s for s in self.stages if isinstance(s, Custom)]:
            raise ArgumentError(
                f"a plan with the kernel {custom[0].kernel.name!r} cannot be saved: "
                "save the solver's name and its grid instead"
            )
        known = {
            key: getattr(self, key)
            for key in ("solver", "process", "times", "denoised", "start", "end", "prior_std")
        }
        stages = [{"kind": stage.kind, **asdict(stage)} for stage in self.stages]
        return json.dumps({"version": VERSION, **known, "output": self.output, "stages": stages})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ArgumentError: `text` is not such a plan; the message says what is wrong, and where.
        """
        return cls(**read(text))

    def __getstate__(self) -> dict[str, Any]:
        # without the program, which is made of the rest and holds tensors of the last run
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _program(self) -> Program:
        return Program(self.stages, self.output)

    def run(
        self,
        model: Model | Callable[..., Tensor],
        x: Tensor,
        noise: NoiseSource | None = None,
        callback: Callable[[StepReport], object] | None = None,
        in_place: bool = True,
        **cond: Any,
    ) -> Tensor:
        """Execute the plan.

        Neither `x` nor any tensor the model returned or kept is written into; where gradients
        flow, everything is out of place.

        Args:
            model: a `Model` of the plan's process, or a callable `score(x, t, **cond)`.
            x: state at the first time, [B, *event], floating point.
            noise: source of randomness; needed if the plan is stochastic.
            callback: called with a `StepReport` after every step.
            in_place: whether the state may be updated in place (turn off inside `torch.func`
                transforms and `torch.compile`).
            **cond: passed on to the model.

        Returns:
            The final state, shape and dtype of `x`.

        Raises:
            ShapeError: the model's output does not have the shape of `x`.
            ArgumentError: `x` is not floating point, noise is missing, or the model is of another
                process.
        """
        if not isinstance(model, Model):
            if not callable(model):
                raise ArgumentError(f"the model is {type(model).__name__}: give a score(x, t)")
            if self.start is None:
                raise ArgumentError(
                    f"{self.process} is not Gaussian, so a plan does not know it from its times: "
                    "give as_model(score, sde)"
                )
            model = NetworkModel(model, None, "score")
        elif model.sde is not None and repr(model.sde) != self.process:
            raise ArgumentError(
                f"the model is at home in {model.sde}, the plan in {self.process}: "
                "give model.on(sde)"
            )
        return self._program.run(model, x, noise, callback, in_place, cond)

    def compile(
        self, model: Model | Callable[..., Tensor], **options: Any
    ) -> Callable[..., Tensor]:
        """The whole run as one `torch.compile`d function `run(x, noise=None, **cond)`.

        All its noise is drawn before it starts.

        Args:
            model: as in `run`.
            **options: passed on to `torch.compile`.

        Raises:
            ArgumentError: the plan holds a custom kernel.
        """

        if custom := [s for s in self.stages if isinstance(s, Custom)]:
            raise ArgumentError(
                f"a plan with the kernel {custom[0].kernel.name!r} cannot be compiled whole: run it"
            )
        draws = [stage for stage in self.stages if isinstance(stage, Draw)]
        numbers = [draw.index for draw in draws]

        def whole(x: Tensor, drawn: list[Tensor], cond: dict[str, Any]) -> Tensor:
            return self.run(
                model, x, _Drawn(dict(zip(numbers, drawn, strict=True))), None, False, **cond
            )

        compiled = torch.compile(whole, **options)

        def run(x: Tensor, noise: NoiseSource | None = None, **cond: Any) -> Tensor:
            check_state(x)
            if draws and noise is None:
                raise ArgumentError("this plan draws noise: give a noise source, as Philox(seed)")
            drawn = [draw(noise, x) for draw in draws if noise is not None]
            result: Tensor = compiled(x, drawn, cond)
            return result

        return run

    def law(
        self,
        mean: Tensor | Sequence[float] | float,
        covariance: Tensor | Sequence[Any] | float,
        start: str = "prior",
    ) -> Law:
        """The exact law of the plan's output for Gaussian data N(mean, covariance).

        The exact score of Gaussian data is affine, so the output is an affine function of the
        start and the noise; its mean and covariance follow without sampling.

        Args:
            mean: [D] or a number.
            covariance: [D, D], its diagonal [D], or a number.
            start: the law at the first time: "prior" N(0, prior_std^2 I), as in sampling, or
                "marginal", the data's own marginal, which leaves the discretisation error alone.

        Returns:
            A `Law` in float64.

        Raises:
            ArgumentError: the plan has a stage that is not linear, or no Gaussian process.
            ShapeError: mean and covariance do not fit.
        """
        return propagate(self, mean, covariance, start)


class _Drawn(NoiseSource):
    """Noise that was drawn beforehand."""

    def __init__(self, values: dict[int, Tensor]) -> None:
        self.values = values

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        return self.values[draw]


def _describe(stage: Stage, first_draw: int) -> tuple[str, str]:
    if isinstance(stage, Call):
        return f"x{stage.out} = {stage.prediction}(x{stage.x}, t={stage.t:.6g})", "network call"
    if isinstance(stage, Draw):
        what = "area, " if stage.area else ""
        return (
            f"x{stage.out} = noise {stage.index - first_draw}",
            f"{what}t={stage.t:.6g} -> {stage.s:.6g}",
        )
    if isinstance(stage, Combine):
        terms = " ".join(f"{c:+.8g} x{r}" for r, c in stage.terms)
        return f"x{stage.out} = {terms}", ""
    if isinstance(stage, Drift):
        return f"x{stage.out} = f(x{stage.x}, t={stage.t:.6g})", "drift"
    if isinstance(stage, Custom):
        return f"x{stage.out} = {stage.kernel.name}(x{stage.x}, t={stage.t:.6g})", (
            f"{stage.kernel.calls} network calls"
        )
    return f"step {stage.step} ends in x{stage.x}", f"t={stage.t:.6g}"
