"""Bounds on the log-likelihood: variational, along SDE paths, and of discrete data."""

from scoresolve.bounds.binary import binary_bound
from scoresolve.bounds.continuous import TimeProposal, continuous_bound, fit_times
from scoresolve.bounds.dequantisation import Dequantised, bits_per_dim, dequantised_log_prob
from scoresolve.bounds.estimator import VariationalBound
from scoresolve.bounds.ito import PathEstimate, ito_bound, ito_log_density
from scoresolve.bounds.variational import variational_bound

__all__ = [
    "Dequantised",
    "PathEstimate",
    "TimeProposal",
    "VariationalBound",
    "binary_bound",
    "bits_per_dim",
    "continuous_bound",
    "dequantised_log_prob",
    "fit_times",
    "ito_bound",
    "ito_log_density",
    "variational_bound",
]
