"""Guidance: models made of models, for classes, prompts and measurements.

Each function takes a score model and returns one, which any verb and any solver takes.
"""

from __future__ import annotations

from scoresolve.guidance.base import CleanModel, Cost, GuidedModel, network_cost
from scoresolve.guidance.classifier import classifier
from scoresolve.guidance.clean import clip_x0, dynamic_threshold
from scoresolve.guidance.extrapolation import autoguidance, cfg_plus_plus, classifier_free
from scoresolve.guidance.linear import Measurement
from scoresolve.guidance.measurements import dps, dps_steps, inpaint, mmps, pigdm

__all__ = [
    "CleanModel",
    "Cost",
    "GuidedModel",
    "Measurement",
    "autoguidance",
    "cfg_plus_plus",
    "classifier",
    "classifier_free",
    "clip_x0",
    "dps",
    "dps_steps",
    "dynamic_threshold",
    "inpaint",
    "mmps",
    "network_cost",
    "pigdm",
]
