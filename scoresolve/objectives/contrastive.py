r"""Contrastive divergence for p(x) ~ exp(-energy(x)): data against where a short chain takes it.

    loss = energy(x) - energy(x'),   x' from x by moves of a Markov kernel, held fixed.

The moves of an adjusted kernel leave exp(-energy) invariant, so that the mean gradient vanishes
where it is the density of the data; unadjusted ones leave it so up to their step size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresolve.errors import whole_number
from scoresolve.kernels import ChainNoise, Kernel, as_target, get_kernel
from scoresolve.kernels.target import column
from scoresolve.models import check_energy, from_energy
from scoresolve.noise import NoiseSource, as_noise
from scoresolve.plans import check_state

__all__ = ["contrastive_divergence", "negatives"]

Energy = Callable[[Tensor], Tensor]


def contrastive_divergence(
    energy: Energy,
    x: Tensor,
    *,
    kernel: str | Kernel = "mala",
    step_size: float | None = None,
    moves: int = 1,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """The contrast energy(x) - energy(x') of data with the ends of chains that start from it.

    Its gradient is the objective's; its value falls to about 0 and is no measure of progress.

    Args:
        energy: [B, *event] to [B], differentiable; for `from_energy` of one time
            `lambda x: energy(x, t)`, where `x` is then noised to `t`.
        x: data, [B, *event], floating point.
        kernel, step_size, moves, draw, seed, noise: as in `negatives`.

    Returns:
        The contrast of each sample, [B], differentiable in the energy's parameters.

    Raises:
        ShapeError, ArgumentError, UnknownNameError: as `negatives`.

    Source:
        Hinton 2002, Neural Computation 14, "Training products of experts by minimizing contrastive
        divergence", eq. 5-6; Du and Mordatch 2019 (1903.08689), section 3, for Langevin moves.
    """
    ends = negatives(
        energy,
        x,
        kernel=kernel,
        step_size=step_size,
        moves=moves,
        draw=draw,
        seed=seed,
        noise=noise,
    )
    return check_energy(energy(x.clone()), x) - check_energy(energy(ends), x)


def negatives(
    energy: Energy,
    x: Tensor,
    *,
    kernel: str | Kernel = "mala",
    step_size: float | None = None,
    moves: int = 1,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """The ends of short Markov chains under exp(-energy).

    Args:
        energy: [B, *event] to [B], differentiable; it gets copies that it may write into.
        x: starts, [B, *event], floating point.
        kernel: a name of `scoresolve.kernels.KERNELS` or a kernel: "mala" for Langevin moves that
            are accepted or refused, "ula" for moves that all are accepted.
        step_size: of a named kernel, > 0; the kernel's own if omitted.
        moves: number of moves, at least 1.
        draw: number of the draw: with one seed, the number of the training step.
        seed: of `Philox`, where `noise` is not given; chain i depends on it, `draw` and i alone.
        noise: source of randomness instead, or a `torch.Generator`.

    Returns:
        [B, *event], without history.

    Raises:
        ShapeError: `energy` does not return one number for each sample.
        ArgumentError: `moves` or `step_size` is out of range, or `x` is not floating point.
        UnknownNameError: no such kernel.
    """
    chosen, count = get_kernel(kernel, step_size), whole_number("moves", moves)
    check_state(x)
    target = chosen.bind(as_target(from_energy(lambda y, _: energy(y.clone()))), x)
    numbers = ChainNoise(as_noise(noise, seed), draw * (count + 1), chosen.copies)
    with torch.no_grad():
        h = chosen.step_sizes(len(x), slice(None), x)
        state = chosen.start(x.detach(), target, numbers)
        for _ in range(count):
            state = chosen.step(state, target, numbers, column(h, x))
    return state.point.x[:: chosen.copies]
