r"""Score matching without noised data: the Jacobian of the model stands for the unknown score.

By parts, with s the model's score, J its Jacobian and p the density of x,

    E |s - grad log p|^2 / 2 = E [tr J + |s|^2 / 2] + const          implicit, exact trace
                             = E [v^T J v + |s|^2 / 2] + const       one product a probe v
                             = E [v^T J v + (v^T s)^2 / 2] + const   sliced

with E[v v^T] = I. Each is a graph through J, so that a network must be twice differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresolve.errors import check_output, whole_number
from scoresolve.noise import NoiseSource, Purpose, as_noise
from scoresolve.plans import check_state

__all__ = ["implicit_score_matching", "sliced_score_matching"]

Score = Callable[[Tensor], Tensor]


def implicit_score_matching(
    score: Score,
    x: Tensor,
    *,
    probes: int = 0,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """Hyvarinen's objective (tr J + |s|^2 / 2) / D.

    Args:
        score: s, [B, *event] to its own shape, row by row; for a model of one time
            `lambda x: model(x, t)`, where `x` is then noised to `t`.
        x: data, [B, *event], floating point.
        probes: random signs for Hutchinson's estimate of the trace, one backward pass each; 0 for
            the exact trace, D backward passes.
        draw: number of the draw: with one seed, the number of the training step.
        seed: of `Philox`, where `noise` is not given.
        noise: source of randomness instead, or a `torch.Generator`.

    Returns:
        The loss of each sample, [B], differentiable in the score's parameters.

    Raises:
        ShapeError: `score` returns another shape than that of `x`.
        ArgumentError: `probes` is negative or not whole.

    Source:
        Hyvarinen 2005, JMLR 6, "Estimation of non-normalized statistical models by score
        matching", theorem 1; Hutchinson 1990 for the estimate.
    """
    s, product, keep = _differentiate(score, x)
    if whole_number("probes", probes, 0):
        signs = _signs(x, probes, draw, as_noise(noise, seed))
        trace = torch.stack([_dot(product(v), v) for v in signs]).mean(0)
    else:
        basis = torch.eye(x.shape[1:].numel()).to(x).reshape(-1, 1, *x.shape[1:])
        trace = torch.stack([_dot(product(e.expand_as(x)), e) for e in basis]).sum(0)
    return keep((trace + _dot(s, s) / 2) / x.shape[1:].numel())


def sliced_score_matching(
    score: Score,
    x: Tensor,
    *,
    probes: int = 1,
    reduce_variance: bool = True,
    draw: int = 0,
    seed: int = 0,
    noise: NoiseSource | torch.Generator | None = None,
) -> Tensor:
    """Sliced score matching (v^T J v + (v^T s)^2 / 2) / D, a mean over random signs v.

    Args:
        score, x, draw, seed, noise: as in `implicit_score_matching`.
        probes: number of directions, at least 1.
        reduce_variance: put |s|^2 for (v^T s)^2, its mean over v: the implicit objective with
            Hutchinson's trace.

    Returns:
        The loss of each sample, [B], differentiable in the score's parameters.

    Raises:
        ShapeError, ArgumentError: as `implicit_score_matching`.

    Source:
        Song, Garg, Shi and Ermon 2019 (1905.07088), eq. 7 and 8 (variance reduction).
    """
    count, source = whole_number("probes", probes), as_noise(noise, seed)
    if reduce_variance:
        return implicit_score_matching(score, x, probes=count, draw=draw, noise=source)
    s, product, keep = _differentiate(score, x)
    terms = [_dot(product(v), v) + _dot(s, v) ** 2 / 2 for v in _signs(x, count, draw, source)]
    return keep(torch.stack(terms).mean(0) / x.shape[1:].numel())


def _differentiate(
    score: Score, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """s at `x`, the map v to J^T v, and what is to be done with a result for the caller's mode."""
    check_state(x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        s = score(leaf.clone())  # which may write into it
    check_output(s, x)

    def product(v: Tensor) -> Tensor:
        if not s.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(
            s, leaf, v.to(s), retain_graph=True, create_graph=graph, allow_unused=True
        )
        return torch.zeros_like(x) if found is None else found

    return s, product, lambda loss: loss if graph else loss.detach()


def _signs(x: Tensor, count: int, draw: int, noise: NoiseSource) -> list[Tensor]:
    return [noise.signs(x, draw * count + i, Purpose.PROBE) for i in range(count)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, [B]."""
    return (a * b).reshape(len(a), a.shape[1:].numel()).sum(1)
