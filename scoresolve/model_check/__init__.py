"""Is a network what its user says it is, and how far is it from a score field?"""

from scoresolve.model_check.reading import ModelReport, Reading, check_model
from scoresolve.model_check.result import Estimate, Finding, ModelVerification, NoiseLevel
from scoresolve.model_check.verification import LIMITS, QUANTITIES, verify_model

__all__ = [
    "LIMITS",
    "QUANTITIES",
    "Estimate",
    "Finding",
    "ModelReport",
    "ModelVerification",
    "NoiseLevel",
    "Reading",
    "check_model",
    "verify_model",
]
