"""Targets with known answers: mixtures of Gaussians and their exact score models; laws of bits."""

from scoresolve.targets.binary import BinaryLaw, BitMixture, HiddenMarkovBits, heartbeat
from scoresolve.targets.library import gaussian, random_mixture, ring
from scoresolve.targets.low_rank import LowRank
from scoresolve.targets.mixture import GaussianMixture
from scoresolve.targets.model import MixtureModel, Posterior

__all__ = [
    "BinaryLaw",
    "BitMixture",
    "GaussianMixture",
    "HiddenMarkovBits",
    "LowRank",
    "MixtureModel",
    "Posterior",
    "gaussian",
    "heartbeat",
    "random_mixture",
    "ring",
]
