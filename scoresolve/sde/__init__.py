"""Stochastic processes from data (t = 0) to noise (t = T), one file a kind."""

from scoresolve.sde.base import SDE, Score, TimeLike, as_rows, as_time, expand
from scoresolve.sde.betas import (
    constant_betas,
    cosine_betas,
    forgetting_betas,
    linear_betas,
    sampled_betas,
    scaled_linear_betas,
)
from scoresolve.sde.checking import check_process
from scoresolve.sde.discrete import DiscreteVP
from scoresolve.sde.flow import RectifiedFlow
from scoresolve.sde.gaussian import GaussianSDE, SchedulePoint
from scoresolve.sde.langevin import Langevin, UnderdampedLangevin
from scoresolve.sde.linear import CriticallyDampedLangevin, LinearSDE
from scoresolve.sde.prior import Prior, check_prior, log_prior, prior_scale
from scoresolve.sde.ve import EDM, VE
from scoresolve.sde.vp import VP, CosineVP, SubVP, VariancePreserving

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "CosineVP",
    "CriticallyDampedLangevin",
    "DiscreteVP",
    "GaussianSDE",
    "Langevin",
    "LinearSDE",
    "Prior",
    "RectifiedFlow",
    "SchedulePoint",
    "Score",
    "SubVP",
    "TimeLike",
    "UnderdampedLangevin",
    "VariancePreserving",
    "as_rows",
    "as_time",
    "check_prior",
    "check_process",
    "constant_betas",
    "cosine_betas",
    "expand",
    "forgetting_betas",
    "linear_betas",
    "log_prior",
    "prior_scale",
    "sampled_betas",
    "scaled_linear_betas",
]
