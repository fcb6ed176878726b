r"""The evidence bound of the binomial diffusion chain.

    -log p(x) <= KL(q(x_T|x) || coins) + sum_{t > 1} E KL(q(x_{t-1}|x_t, x) || p(x_{t-1}|x_t))
                 - E log p(x|x_1)

Every divergence is between bits and closed; the averages over x_t are sampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresolve.bounds.dequantisation import standard_error
from scoresolve.bounds.estimator import MOST, VariationalBound
from scoresolve.chains import BinaryChain, Predictor
from scoresolve.errors import whole_number
from scoresolve.noise import Philox, Purpose

__all__ = ["binary_bound"]


@torch.no_grad()
def binary_bound(
    predictor: Predictor, chain: BinaryChain, x: Tensor, *, draws: int = 1, seed: int = 0
) -> VariationalBound:
    """Evidence bound of the reverse chain that takes the bits for independent.

    Args:
        predictor: p(x_0 = 1 | x_t) of every bit, from x_t [B, *event] and t; T calls a draw.
        chain: the chain.
        x: bits [B, *event].
        draws: independent evaluations K >= 1, whose spread gives the standard error.
        seed: of the noise; sample i gets the same in any batch.

    Returns:
        A `VariationalBound`, whose `terms` are those of t = 2..T.

    Raises:
        ArgumentError, ShapeError: `x` holds more than bits, or the predictor returns something
            else than one probability for each.

    Source:
        Sohl-Dickstein et al. 2015 (1503.03585), eq. 13 and 14.
    """
    noise, per_draw = Philox(seed), chain.T
    last = chain.marginal(x, chain.T)
    rows = []
    for draw in range(whole_number("draws", draws, 1, MOST)):
        terms = []
        for t in range(1, chain.T + 1):
            p = chain.marginal(x, t)
            coins = noise.uniform(p, draw * per_draw + t - 1, Purpose.SOLVER)
            state = (coins < p).double()
            back = chain.reverse(state, predictor(state, t), t)
            terms.append(_divergence(chain.posterior(state, x, t), back))
        rows.append(torch.stack(terms, 1))
    found = torch.stack(rows)
    return VariationalBound(
        prior=_divergence(last, torch.full_like(last, 0.5)),
        diffusion=found[:, :, 1:].sum(2).mean(0),
        reconstruction=found[:, :, 0].mean(0),
        standard_error=standard_error(found.sum(2)),
        terms=found[:, :, 1:].mean(0),
        nfe=draws * chain.T,
        dimension=math.prod(x.shape[1:]),
    )


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of bits with chances p from bits with chances q, summed over the event, [B]."""
    ones, zeros = torch.xlogy(p, p / q), torch.xlogy(1 - p, (1 - p) / (1 - q))
    return (torch.where(p > 0, ones, 0.0) + torch.where(p < 1, zeros, 0.0)).flatten(1).sum(1)
