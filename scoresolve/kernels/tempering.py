"""Parallel tempering: chains at several temperatures that exchange their states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number, whole_number
from scoresolve.kernels.base import ChainNoise, ChainState, Kernel
from scoresolve.kernels.target import Target, Tilted
from scoresolve.precision import host

__all__ = ["ParallelTempering"]


class ParallelTempering(Kernel):
    """Replicas of each chain at inverse temperatures beta_0 = 1 > beta_1 > ..., with exchanges.

    Every replica takes a step of the kernel on pi_beta ~ q exp(beta f); then neighbours i and
    i + 1, the even and the odd pairs in turn, exchange their states with probability

        a = min(1, exp((beta_i - beta_{i+1}) (f(x_{i+1}) - f(x_i)))).

    The chain's state is that of the replica at beta = 1. A target that is not tilted has f = log pi
    and a constant q.

    Args:
        kernel: an adjusted kernel; its step size is a number, or one for each beta, [R].
        betas: inverse temperatures, falling from 1, R >= 2 of them, the last >= 0 (> 0 if q is
            constant).
        every: steps of the kernel between exchanges, >= 1.

    Raises:
        ArgumentError, ShapeError: a value is out of range, or the kernel is not adjusted.

    Source:
        Geyer 1991, "Markov chain Monte Carlo maximum likelihood"; alternating pairs of Okabe et
        al. 2001, Chem. Phys. Lett. 335, whose round trips Syed et al. 2022 (1905.02939) bound.
    """

    source = "Geyer 1991; Okabe et al. 2001, Chem. Phys. Lett. 335"

    def __init__(self, kernel: Kernel, betas: Sequence[float], every: int = 1) -> None:
        self.betas = [real_number("beta", beta, least=0, most=1) for beta in betas]
        falling = all(a > b for a, b in itertools.pairwise(self.betas))
        if not (len(self.betas) > 1 and self.betas[0] == 1 and falling):
            raise ArgumentError(f"betas = {self.betas}: give two or more that fall from 1")
        if not kernel.adjusted or kernel.copies > 1:
            raise ArgumentError(f"{kernel.name!r} is not an adjusted kernel of single chains")
        self.kernel, self.every = kernel, whole_number("every", every)
        self.name, self.copies = f"tempered({kernel.name})", len(self.betas)
        self.step_size, self.power = kernel.step_size, kernel.power
        self.target_acceptance = kernel.target_acceptance
        self.evaluations = self.every * kernel.evaluations

    def bind(self, target: Target, x: Tensor) -> Target:
        if not target.density:
            raise ArgumentError("exchanges need the density, not only its score: give an energy")
        if not isinstance(target, Tilted):
            if self.betas[-1] == 0:
                raise ArgumentError(
                    "beta = 0 needs a base q that is a density: give Tilted or Geometric"
                )
            target = Tilted(None, target.scaled(None)).scaled(target.factor)
        return target.at(host(self.betas).to(x).repeat(len(x)))

    def step_sizes(self, batch: int, part: slice, like: Tensor) -> Tensor:
        h, rungs = host(self.step_size).to(like), len(self.betas)
        if h.ndim and h.shape != (rungs,):
            raise ShapeError(f"step_size of shape {tuple(h.shape)}: give one number, or ({rungs},)")
        return h.expand(rungs).repeat(len(like))

    def start(self, x: Tensor, target: Target, noise: ChainNoise) -> ChainState:
        rungs = len(self.betas)
        state = self.kernel.start(x.repeat_interleave(rungs, 0), target, noise)
        return state._replace(swaps=x.new_zeros(len(x), rungs - 1))

    def step(self, state: ChainState, target: Target, noise: ChainNoise, h: Tensor) -> ChainState:
        rounds, swaps = state.rounds, state.swaps
        for _ in range(self.every):
            state = self.kernel.step(state, target, noise, h)
        return self.exchange(state._replace(rounds=rounds, swaps=swaps), target, noise)

    def exchange(self, state: ChainState, target: Target, noise: ChainNoise) -> ChainState:
        """The state after the even or the odd pairs have been offered an exchange."""
        assert isinstance(target, Tilted) and state.swaps is not None
        point, rungs, beta = state.point, len(self.betas), target.beta
        assert point.tilt is not None and isinstance(beta, Tensor)
        first = torch.arange(state.rounds % 2, rungs - 1, 2, device=point.x.device)
        f, b = point.tilt.view(-1, rungs), beta.view(-1, rungs)
        log_ratio = (b[:, first] - b[:, first + 1]) * (f[:, first + 1] - f[:, first])
        u = noise.uniform(point.tilt).view(-1, rungs)[:, first]
        exchanged = u.log() < log_ratio
        origin = torch.arange(rungs, device=point.x.device).expand_as(f).clone()
        origin[:, first] += exchanged.long()
        origin[:, first + 1] -= exchanged.long()
        rows = (origin + rungs * torch.arange(len(f), device=point.x.device)[:, None]).flatten()
        probability = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0).to(state.swaps.dtype)
        return state._replace(
            point=target.moved(point.rows(rows), beta[rows]),
            rounds=state.rounds + 1,
            swaps=state.swaps.index_add(1, first, probability),
        )

    def swap_rates(self, state: ChainState) -> Tensor:
        """Mean acceptance of the exchanges of beta_i and beta_{i+1}, [B, R - 1]."""
        assert state.swaps is not None
        tried = [(state.rounds + 1 - i % 2) // 2 for i in range(len(self.betas) - 1)]
        return state.swaps / host(tried).to(state.swaps)
