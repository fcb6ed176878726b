"""A real data set and a real score network, small enough to ship and to solve on a laptop.

The 1,797 handwritten digits of 8x8 pixels are the data; `load_network` gives a denoiser
D(x, sigma) trained on 1,437 of them, whose score is (D(x, sigma) - x) / sigma^2. Mixtures of
Gaussians show what a solver does when the answer is known; this pair shows what it does to a
network with errors of its own.
`python -m scoresolve.digits.train` trains the network again.
"""

from __future__ import annotations

from scoresolve.digits.data import (
    BIN_WIDTH,
    LEVELS,
    Digits,
    bits_per_dim,
    load_digits,
    to_image,
    to_levels,
    to_unit,
)
from scoresolve.digits.network import CLASSES, DigitsNet, load_network

__all__ = [
    "BIN_WIDTH",
    "CLASSES",
    "LEVELS",
    "Digits",
    "DigitsNet",
    "bits_per_dim",
    "load_digits",
    "load_network",
    "to_image",
    "to_levels",
    "to_unit",
]
