"""What every kernel shares: targets, the state of a batch of chains, and the Metropolis rule.

A kernel moves x [B, *event], one chain a row, so that the density pi is (nearly) left invariant.
All that it asks of pi is the score and, to accept or reject, the change of log pi between two
points: exact where log pi is known up to a constant, and otherwise the integral of the score,

    log pi(y) - log pi(x) = int_0^1 <score(x + u (y - x)), y - x> du    (`scoresolve.kernels.line`).

A proposal with a density or a score that is not a number is refused. A kernel that refuses nothing
takes it, and the chain is marked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, Status, real_number, row_status
from scoresolve.kernels.line import decided_integral
from scoresolve.kernels.target import Point, Target
from scoresolve.noise import NoiseSource, Purpose
from scoresolve.plans import check_state
from scoresolve.precision import host

__all__ = [
    "MOST_STEPS",
    "ChainNoise",
    "ChainState",
    "Kernel",
    "StepSize",
    "chain_status",
    "check_chains",
    "checked_acceptance",
    "checked_step",
    "metropolis",
    "without_gradients",
]

StepSize = float | Tensor
MOST_STEPS = 2**30  # the numbers of a draw end at 2^32, and a step takes at most a few
_BLOCK = 64  # uniform numbers of a chain made at a time


class ChainNoise:
    """The random numbers of every chain, in the order in which its kernel asks for them.

    Args:
        source: where they come from; row b of a batch gets the numbers of its sample b.
        first: number of the first block of draws, for streams that follow one another.
        copies: states of a chain, each with numbers of its own; rows are [B * copies].
    """

    def __init__(self, source: NoiseSource, first: int = 0, copies: int = 1) -> None:
        self.source, self.copies = source, copies
        self.normals, self.block, self.used = 4 * first, first, _BLOCK
        self.uniforms = torch.empty(0, device="cpu")

    def normal(self, like: Tensor) -> Tensor:
        """The next standard normal numbers, fresh, shape of `like` [B * copies, *event]."""
        shape = (len(like) // self.copies, self.copies, *like.shape[1:])
        # four normals for each draw of the plan, whose numbers inside a process use all 32 bits
        z = self.source.normal(like.reshape(shape), self.normals % 2**32, Purpose.CHAIN)
        self.normals += 1
        return z.reshape(like.shape)

    def uniform(self, like: Tensor) -> Tensor:
        """The next uniform numbers in (0, 1), shape of `like` [B * copies]."""
        if self.used == _BLOCK:
            shape = (len(like) // self.copies, _BLOCK, self.copies)
            self.uniforms = self.source.uniform(like.new_empty(shape), self.block, Purpose.ACCEPT)
            self.block, self.used = self.block + 1, 0
        self.used += 1
        return self.uniforms[:, self.used - 1].reshape(like.shape)


class ChainState(NamedTuple):
    """Where the chains are.

    Attributes:
        point: the states and what the target says of them.
        momentum: [B, *event], of an underdamped kernel.
        acceptance: probability with which the last proposal was accepted, [B].
        error: bound of the error of the last change of log pi, [B], where it was integrated and
            could have turned the decision.
        extra: evaluations of the score for some chains alone, in the last step, [B].
        rounds, swaps: rounds of exchanges, and the sum of their probabilities, [B, R - 1].
    """

    point: Point
    momentum: Tensor | None = None
    acceptance: Tensor | None = None
    error: Tensor | None = None
    extra: Tensor | None = None
    rounds: int = 0
    swaps: Tensor | None = None


class Kernel(ABC):
    """One step of a Markov chain, for a batch of chains.

    Attributes:
        name, source: what it is called and where it is published.
        step_size: > 0, a number or one for each chain, [B].
        power: the step size scales as a length to this power, 2 for a variance.
        evaluations: evaluations of the score in a step.
        target_acceptance: acceptance to which the step size is adapted; None if not adjusted.
        copies: states that a chain holds.
    """

    name: str
    source: str
    step_size: StepSize
    power: int = 1
    evaluations: int = 1
    target_acceptance: float | None = None
    copies: int = 1

    @property
    def adjusted(self) -> bool:
        """Whether pi is left invariant exactly, by accepting and rejecting."""
        return self.target_acceptance is not None

    def bind(self, target: Target, x: Tensor) -> Target:
        """The target that the steps of chains from `x` [B, *event] get."""
        return target

    def step_sizes(self, batch: int, part: slice, like: Tensor) -> Tensor:
        """Step sizes [B] of the chains `part` of a `batch`, in the dtype of `like` [B, *event]."""
        h = host(self.step_size).to(like)
        if h.ndim and h.shape != (batch,):
            raise ShapeError(
                f"step_size of shape {tuple(h.shape)} for {batch} chains: give one number, or "
                "one for each chain"
            )
        return (h[part] if h.ndim else h.expand(len(like))).clone()

    def start(self, x: Tensor, target: Target, noise: ChainNoise) -> ChainState:
        """The state at `x` [B, *event], by one evaluation of the score."""
        return ChainState(target(x))

    @abstractmethod
    def step(self, state: ChainState, target: Target, noise: ChainNoise, h: Tensor) -> ChainState:
        """The state after one step of sizes `h` [B, 1, ...]; nothing is written in place."""


@contextmanager
def without_gradients() -> Iterator[None]:
    """Chains record no gradients; energies may take their own, in inference mode too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_chains(x: Tensor) -> None:
    """Raise unless `x` is a state of chains, [B, *event] in float32 or float64."""
    check_state(x)
    if x.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"x is {x.dtype}: chains need float32 or float64")
    if x.layout != torch.strided or x.is_meta:
        kind = x.device if x.is_meta else x.layout
        raise ArgumentError(f"x is a tensor of {kind}: chains need a dense one that has values")
    if not x.shape[1:].numel():
        raise ShapeError(
            f"x of shape {tuple(x.shape)} has events without elements: give [B, *event]"
        )


def chain_status(point: Point, failed: Tensor) -> Tensor:
    """How chains ended at a point.

    A chain failed that met something that is not finite on the way and took it, `failed` [B] bool,
    or that stands where an adjusted kernel can accept nothing.
    """
    status = row_status(point.x) | row_status(point.score)
    if point.log_prob is not None:
        status = status | row_status(point.log_prob)
    return status.masked_fill(failed, int(Status.NONFINITE))


def checked_acceptance(acceptance: float) -> float:
    """`acceptance` if it is a number in (0, 1); else raises."""
    if not 0 < real_number("acceptance", acceptance) < 1:
        raise ArgumentError(f"acceptance = {acceptance}: give a number in (0, 1)")
    return acceptance


def checked_step(step_size: object) -> StepSize:
    """`step_size` if it is a positive number or a tensor [B] of them; else raises."""
    if not isinstance(step_size, Tensor) or step_size.ndim == 0:
        return real_number("step_size", step_size, above=0)
    if step_size.ndim > 1:
        raise ShapeError(f"step_size of shape {tuple(step_size.shape)}: give a number or [B]")
    if step_size.is_complex() or step_size.is_meta:
        raise ArgumentError("step_size is a complex or a meta tensor: give real numbers")
    if not bool((torch.isfinite(step_size) & (step_size > 0)).all()):
        raise ArgumentError("step_size has entries that are not finite and positive")
    return step_size


def metropolis(
    old: Point, new: Point, proposal_ratio: Tensor, target: Target, noise: ChainNoise
) -> ChainState:
    """Accept `new` with probability min(1, pi(y) q(y -> x) / (pi(x) q(x -> y))), else stay.

    A ratio that is not a number is a rejection.

    Args:
        old, new: the points x and y.
        proposal_ratio: log q(y -> x) - log q(x -> y), [B].
        target: pi.
        noise: gives one uniform number a chain.

    Source:
        Hastings 1970, "Monte Carlo sampling methods using Markov chains", Biometrika 57.
    """
    log_u, error, extra = noise.uniform(proposal_ratio).log(), None, None
    if old.log_prob is None or new.log_prob is None:
        change, error, extra = decided_integral(target, old, new, log_u - proposal_ratio)
    else:
        change = new.log_prob - old.log_prob
    log_ratio = change + proposal_ratio
    accepted = log_u < log_ratio
    probability = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0).to(old.x.dtype)
    return ChainState(old.where(accepted, new), acceptance=probability, error=error, extra=extra)
