"""How far two laws are apart, every distance between samples beside its noise floor."""

from scoresolve.distances.closed_form import (
    DensityGap,
    gaussian_kl,
    gaussian_wasserstein,
    log_density_gap,
)
from scoresolve.distances.compare import (
    DISTANCES,
    DistanceTable,
    Measure,
    compare_samples,
    log_density,
)
from scoresolve.distances.floor import Distance, against_floor, draw_floor
from scoresolve.distances.pairs import Pair, pair
from scoresolve.distances.pairwise import energy, ksd, median_distance, mmd
from scoresolve.distances.transport import ks, sliced_wasserstein, wasserstein
from scoresolve.distances.two_sample import classifier

__all__ = [
    "DISTANCES",
    "DensityGap",
    "Distance",
    "DistanceTable",
    "Measure",
    "Pair",
    "against_floor",
    "classifier",
    "compare_samples",
    "draw_floor",
    "energy",
    "gaussian_kl",
    "gaussian_wasserstein",
    "ks",
    "ksd",
    "log_density",
    "log_density_gap",
    "median_distance",
    "mmd",
    "pair",
    "sliced_wasserstein",
    "wasserstein",
]
