"""Named targets: a Gaussian, a ring of Gaussians in the plane, a random mixture.

ring:  mu_k = radius (cos 2 pi k/K, sin 2 pi k/K),  Sigma_k = std^2 I
random:  mu_k ~ N(0, spread^2 I),  Sigma_k = Q_k diag(s^2) Q_k^T with random rotations Q_k
"""

from __future__ import annotations

import math

import torch

from scoresolve.errors import ArgumentError
from scoresolve.noise import Philox, Purpose
from scoresolve.targets.low_rank import LowRank
from scoresolve.targets.mixture import ArrayLike, GaussianMixture, as_tensor
from scoresolve.targets.rows import full_precision

__all__ = ["gaussian", "random_mixture", "ring"]


def gaussian(mean: ArrayLike, covariance: ArrayLike | LowRank) -> GaussianMixture:
    """One Gaussian, as a mixture of one component.

    Args:
        mean: [*event].
        covariance: [D, D], [D], [*event], a number, or `LowRank` of one component.
    """
    if not isinstance(covariance, LowRank):
        covariance = as_tensor("covariance", covariance)[None]
    return GaussianMixture([1.0], as_tensor("mean", mean)[None], covariance)


def ring(components: int = 8, radius: float = 4.0, std: float = 0.1) -> GaussianMixture:
    """Equal isotropic Gaussians at equal distances on a circle, [2]; float64.

    Args:
        components: K >= 1.
        radius: of the circle.
        std: standard deviation of each, >= 0.

    Raises:
        ArgumentError: `components` < 1 or `std` < 0.
    """
    if components < 1 or std < 0:
        raise ArgumentError(f"components = {components}, std = {std}: need >= 1 and >= 0")
    places = [2 * math.pi * k / components for k in range(components)]
    angle = as_tensor("angles", places)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture.from_data(means, std)


@full_precision
def random_mixture(
    dimension: int,
    components: int = 5,
    seed: int = 0,
    spread: float = 3.0,
    stds: tuple[float, float] = (0.3, 1.0),
) -> GaussianMixture:
    """A mixture of Gaussians of random weight, place, orientation and width; float64.

    Args:
        dimension: D >= 1.
        components: K >= 1; component k is the same for every K, but for its weight.
        seed: in [0, 2**64).
        spread: standard deviation of the means.
        stds: range, log-uniform, of the standard deviations along each component's axes, > 0.

    Raises:
        ArgumentError: a size is below 1, or `stds` is not an increasing positive range.
    """
    low, high = stds
    if dimension < 1 or components < 1 or not 0 < low <= high:
        raise ArgumentError(
            f"dimension = {dimension}, components = {components}, stds = {stds}: "
            "need sizes of at least 1 and 0 < low <= high"
        )
    noise = Philox(seed)
    vectors = as_tensor("means", 0.0).new_empty(components, dimension)
    means = spread * noise.normal(vectors, 0, Purpose.TARGET)
    place = noise.uniform(vectors, 1, Purpose.TARGET)
    variances = (2 * (math.log(low) + place * math.log(high / low))).exp()
    matrices = vectors.new_empty(components, dimension, dimension)
    rotations = torch.linalg.qr(noise.normal(matrices, 2, Purpose.TARGET)).Q
    covariances = (rotations * variances[:, None]) @ rotations.mT
    weights = 0.5 + noise.uniform(vectors[:, :1], 3, Purpose.TARGET)[:, 0]
    return GaussianMixture(weights, means, covariances)
