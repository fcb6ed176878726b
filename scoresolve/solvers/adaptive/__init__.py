"""Solvers whose steps follow their error, one file a family, on one loop.

drift        the right-hand side: bounded, counted, checked
rows         rows that each go their own way
points       points of a path, and the polynomial through them
coordinates  what is integrated, over what
path         states between the steps, and events
loop         the loop: trial, control, statuses, rows that leave and enter
tableaus, runge_kutta, adams, dpm, stochastic    the methods
"""

from scoresolve.solvers.adaptive.adams import AdaptiveAdams
from scoresolve.solvers.adaptive.coordinates import check_velocity
from scoresolve.solvers.adaptive.dpm import AdaptiveDPMSolver
from scoresolve.solvers.adaptive.drift import BoundedDrift, CallLimit, unmoved
from scoresolve.solvers.adaptive.loop import Adaptive, Trial
from scoresolve.solvers.adaptive.path import Path
from scoresolve.solvers.adaptive.runge_kutta import (
    BogackiShampine,
    DormandPrince,
    DormandPrince853,
    Tsitouras,
)
from scoresolve.solvers.adaptive.stochastic import AdaptiveSDE, GottaGoFast
from scoresolve.solvers.adaptive.tableaus import (
    BOGACKI_SHAMPINE,
    DOP853,
    DORMAND_PRINCE,
    TSITOURAS,
    Tableau,
)

__all__ = [
    "BOGACKI_SHAMPINE",
    "DOP853",
    "DORMAND_PRINCE",
    "TSITOURAS",
    "Adaptive",
    "AdaptiveAdams",
    "AdaptiveDPMSolver",
    "AdaptiveSDE",
    "BogackiShampine",
    "BoundedDrift",
    "CallLimit",
    "DormandPrince",
    "DormandPrince853",
    "GottaGoFast",
    "Path",
    "Tableau",
    "Trial",
    "Tsitouras",
    "check_velocity",
    "unmoved",
]
