"""Targets with known answers: mixtures of Gaussians and their exact score models; laws of bits.

The identities of Gaussians under linear maps that the mixtures use are in `linear_gaussian`.
"""

from scoresolve.targets import linear_gaussian
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
    "linear_gaussian",
    "random_mixture",
    "ring",
]
