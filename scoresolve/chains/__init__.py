"""Diffusion chains in discrete time, of bits."""

from scoresolve.chains.binary import BinaryChain, Predictor, forgetting_betas

__all__ = ["BinaryChain", "Predictor", "forgetting_betas"]
