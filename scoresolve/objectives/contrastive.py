r"""Contrastive divergence for p(x) ~ exp(-energy(x)): data against where a short chain takes them.

    loss = energy(x) - energy(x'),   x' from x by Langevin moves, held fixed,
    x' = x - delta grad energy(x) + sqrt(2 delta) z,   accepted with probability
    min(1, exp(energy(x) - energy(x')) q(x | x') / q(x' | x)).

The moves leave exp(-energy) invariant, so that the mean gradient vanishes where it is the density
of the data. Unadjusted moves leave it so up to O(delta).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresolve.errors import real_number, whole_number
from scoresolve.models import check_energy
from scoresolve.noise import NoiseSource, Purpose, as_noise

__all__ = ["contrastive_divergence", "langevin_negatives"]

Energy = Callable[[Tensor], Tensor]


def contrastive_divergence(
    energy: Energy,
    x: Tensor,
    *,
    moves: int = 1,
    delta: float = 0.01,
    adjust: bool = True,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """The contrast energy(x) - energy(x') of data with Langevin negatives that start from it.

    Its gradient is the objective's; its value falls to about 0 and is no measure of progress.

    Args:
        energy: [B, *event] to [B], differentiable; for `from_energy` of one time
            `lambda x: energy(x, t)`, where `x` is then noised to `t`.
        x: data, [B, *event], floating point.
        moves, delta, adjust, draw, seed, noise: as in `langevin_negatives`.

    Returns:
        The contrast of each sample, [B], differentiable in the energy's parameters.

    Raises:
        ShapeError, ArgumentError: as `langevin_negatives`.

    Source:
        Hinton 2002, Neural Computation 14, "Training products of experts by minimizing contrastive
        divergence", eq. 5-6; Du and Mordatch 2019 (1903.08689), section 3, for Langevin moves.
    """
    negatives = langevin_negatives(
        energy, x, moves=moves, delta=delta, adjust=adjust, draw=draw, seed=seed, noise=noise
    )
    return check_energy(energy(x), x) - check_energy(energy(negatives), x)


def langevin_negatives(
    energy: Energy,
    x: Tensor,
    *,
    moves: int = 1,
    delta: float = 0.01,
    adjust: bool = True,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """The ends of short Langevin chains under exp(-energy).

    Args:
        energy: [B, *event] to [B], differentiable.
        x: starts, [B, *event], floating point.
        moves: number of moves, at least 1.
        delta: step size of a move, > 0.
        adjust: accept or refuse each move by Metropolis and Hastings, so that exp(-energy) is
            invariant for any `delta`.
        draw: number of the draw: with one seed, the number of the training step.
        seed: of `Philox`, where `noise` is not given; chain i depends on it, `draw` and i alone.
        noise: source of randomness instead, or a `torch.Generator`.

    Returns:
        [B, *event], without history.

    Raises:
        ShapeError: `energy` does not return one number for each sample.
        ArgumentError: `moves` or `delta` is out of range.

    Source:
        Roberts and Tweedie 1996, Bernoulli 2, section 1.4 (the adjusted moves, MALA).
    """
    count, delta = whole_number("moves", moves), real_number("delta", delta, above=0)
    source = as_noise(noise, seed)
    x = x.detach()
    value, force = _force(energy, x)
    for move in range(draw * count, (draw + 1) * count):
        z = source.normal(x, move, Purpose.CORRECTOR)
        proposed = x + delta * force + (2 * delta) ** 0.5 * z
        new_value, new_force = _force(energy, proposed)
        if adjust:
            back = x - proposed - delta * new_force
            log_ratio = value - new_value + _square(z) / 2 - _square(back) / (4 * delta)
            u = source.uniform(x.new_empty(len(x), 1), move, Purpose.PROBE)[:, 0]
            accepted = u.log() < log_ratio
        else:
            accepted = torch.ones_like(value, dtype=torch.bool)
        keep = accepted.reshape(-1, *[1] * (x.ndim - 1))
        x, force = torch.where(keep, proposed, x), torch.where(keep, new_force, force)
        value = torch.where(accepted, new_value, value)
    return x


def _force(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """The energy [B] and -grad energy, shape of `x`, without history."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = check_energy(energy(leaf), leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), -gradient


def _square(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).square().sum(1)
