"""Plans: a solver traced over a time grid, as data that runs and has an exact law."""

from scoresolve.plans.executor import (
    StepReport,
    check_state,
    model_time,
)
from scoresolve.plans.law import Law
from scoresolve.plans.plan import Plan
from scoresolve.plans.stages import Action, Call, Combine, Custom, Draw, Drift, Mark, Stage
from scoresolve.plans.tracing import Linear, Past, Run, trace

__all__ = [
    "Action",
    "Call",
    "Combine",
    "Custom",
    "Draw",
    "Drift",
    "Law",
    "Linear",
    "Mark",
    "Past",
    "Plan",
    "Run",
    "Stage",
    "StepReport",
    "check_state",
    "model_time",
    "trace",
]
