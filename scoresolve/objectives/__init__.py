"""Training objectives: functions of a model and data whose minimiser is the data's score.

Each returns one value a sample, [B], to be averaged; none keeps a state, and each draws its
randomness from a source that the caller passes, by number. No stream is one that data is drawn
from, by `GaussianMixture.sample` or `sample`, so that a seed may serve for both.
"""

from scoresolve.objectives.contrastive import contrastive_divergence, negatives
from scoresolve.objectives.denoising import (
    WEIGHTINGS,
    denoising_loss,
    denoising_score_matching,
)
from scoresolve.objectives.matching import implicit_score_matching, sliced_score_matching
from scoresolve.objectives.times import LogNormalTimes, LogUniformTimes, TimeLaw, UniformTimes

__all__ = [
    "WEIGHTINGS",
    "LogNormalTimes",
    "LogUniformTimes",
    "TimeLaw",
    "UniformTimes",
    "contrastive_divergence",
    "denoising_loss",
    "denoising_score_matching",
    "implicit_score_matching",
    "negatives",
    "sliced_score_matching",
]
