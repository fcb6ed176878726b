"""Noise: counter-based random numbers, Brownian paths, and the sources a caller may bring."""

from scoresolve.noise.brownian import BrownianPath
from scoresolve.noise.philox import philox4x32
from scoresolve.noise.sources import (
    CallableNoise,
    GeneratorNoise,
    NoiseSource,
    Philox,
    Purpose,
    Times,
    as_noise,
    first_draw,
)

__all__ = [
    "BrownianPath",
    "CallableNoise",
    "GeneratorNoise",
    "NoiseSource",
    "Philox",
    "Purpose",
    "Times",
    "as_noise",
    "first_draw",
    "philox4x32",
]
