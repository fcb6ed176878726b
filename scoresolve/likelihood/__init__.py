"""Likelihood under the probability flow: one budget, shared nodes, an error bar."""

from scoresolve.likelihood.result import ErrorBudget, Likelihood
from scoresolve.likelihood.verbs import (
    DEFAULT_COST,
    DEFAULT_PROBES,
    EXACT_UP_TO,
    log_likelihood,
    sample_with_log_prob,
)

__all__ = [
    "DEFAULT_COST",
    "DEFAULT_PROBES",
    "EXACT_UP_TO",
    "ErrorBudget",
    "Likelihood",
    "log_likelihood",
    "sample_with_log_prob",
]
