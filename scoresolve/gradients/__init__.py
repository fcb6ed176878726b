"""Gradients through solvers: of samples and of log-densities, to states and to parameters."""

from scoresolve.gradients.density import differentiable_log_likelihood
from scoresolve.gradients.path import MODES
from scoresolve.gradients.samples import differentiable_sample

__all__ = ["MODES", "differentiable_log_likelihood", "differentiable_sample"]
