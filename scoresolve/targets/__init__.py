"""Targets with known answers: mixtures of Gaussians and their exact score models."""

from scoresolve.targets.library import gaussian, random_mixture, ring
from scoresolve.targets.low_rank import LowRank
from scoresolve.targets.mixture import GaussianMixture
from scoresolve.targets.model import MixtureModel, Posterior

__all__ = [
    "GaussianMixture",
    "LowRank",
    "MixtureModel",
    "Posterior",
    "gaussian",
    "random_mixture",
    "ring",
]
