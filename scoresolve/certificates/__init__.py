"""Certificates: what a solver does, measured on data whose answer is known in closed form.

On Gaussian data every sampler with fixed steps has an exact law, read off its plan or, of any
function that samples, off its answers to unit vectors; on a mixture the exact flow is known. A run
with a watching model shows what else a user relies on: calls, interval, randomness, independence
of neighbours, and what becomes of a bad model.
"""

from __future__ import annotations

from scoresolve.certificates.affine import AffineLaw, NotAffine, affine_law
from scoresolve.certificates.certificate import (
    MEAN,
    VARIANCE,
    Bias,
    Certificate,
    Check,
    measured_order,
    shown,
)
from scoresolve.certificates.randomness import Draws
from scoresolve.certificates.verbs import certify

__all__ = [
    "MEAN",
    "VARIANCE",
    "AffineLaw",
    "Bias",
    "Certificate",
    "Check",
    "Draws",
    "NotAffine",
    "affine_law",
    "certify",
    "measured_order",
    "shown",
]
