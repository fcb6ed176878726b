"""Markov chain Monte Carlo kernels on score models, for thousands of chains at a time."""

from scoresolve.kernels.adaptation import DualAveraging
from scoresolve.kernels.base import ChainNoise, ChainState, Kernel
from scoresolve.kernels.hamiltonian import HMC, leapfrog
from scoresolve.kernels.langevin import MALA, ULA
from scoresolve.kernels.line import line_integral
from scoresolve.kernels.registry import KERNELS, get_kernel
from scoresolve.kernels.target import Geometric, Point, Target, Tilted, as_target
from scoresolve.kernels.tempering import ParallelTempering
from scoresolve.kernels.underdamped import BAOAB, OBABO, Splitting

__all__ = [
    "BAOAB",
    "HMC",
    "KERNELS",
    "MALA",
    "OBABO",
    "ULA",
    "ChainNoise",
    "ChainState",
    "DualAveraging",
    "Geometric",
    "Kernel",
    "ParallelTempering",
    "Point",
    "Splitting",
    "Target",
    "Tilted",
    "as_target",
    "get_kernel",
    "leapfrog",
    "line_integral",
]
