"""Diffusion chains in discrete time: Gaussian, and of bits."""

from scoresolve.chains.binary import BinaryChain, Predictor
from scoresolve.chains.gaussian import DiffusionChain

__all__ = ["BinaryChain", "DiffusionChain", "Predictor"]
