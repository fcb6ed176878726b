"""Targets: a density pi by its score and, where it is known, log pi up to a constant.

A target may be seen in other coordinates, x = L u with L L^T a covariance; a kernel with unit
mass and isotropic noise in u is one with mass (L L^T)^-1 and noise of that covariance in x.
Tilted targets are families on a line, log pi_beta(x) = log q(x) + beta f(x) + const.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, check_output, whole_number
from scoresolve.models import Model
from scoresolve.plans import model_time
from scoresolve.targets import GaussianMixture

__all__ = [
    "Density",
    "Geometric",
    "Point",
    "Target",
    "Tilted",
    "as_target",
    "column",
    "factor_of",
    "inner",
]

Evaluate = Callable[[Tensor], tuple[Tensor | None, Tensor]]


def column(values: Tensor, x: Tensor) -> Tensor:
    """`values` [B] shaped to multiply `x` [B, *event]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every row, [B]."""
    return (a * b).flatten(1).sum(1) if a.ndim > 1 else a * b


class Point(NamedTuple):
    """Places, and what a target says of them.

    Attributes:
        x: [B, *event], in the target's coordinates.
        score: gradient of log pi there, [B, *event].
        log_prob: log pi up to a constant, [B], where it is known.
        tilt, tilt_score: of a tilted target f [B] and its gradient [B, *event].
    """

    x: Tensor
    score: Tensor
    log_prob: Tensor | None = None
    tilt: Tensor | None = None
    tilt_score: Tensor | None = None

    def where(self, chosen: Tensor, other: Point) -> Point:
        """The rows of `other` where `chosen` [B], of this point elsewhere."""

        def pick(mine: Tensor, its: Tensor) -> Tensor:
            return torch.where(column(chosen, mine), its, mine)

        return Point(
            pick(self.x, other.x),
            pick(self.score, other.score),
            *(
                None if mine is None or its is None else pick(mine, its)
                for mine, its in zip(self[2:], other[2:], strict=True)
            ),
        )

    def rows(self, index: Tensor) -> Point:
        """The rows `index` [n]."""
        rest = (None if values is None else values[index] for values in self[2:])
        return Point(self.x[index], self.score[index], *rest)


class Target:
    """A density known by a function for log pi and its score.

    Args:
        evaluate: from x [B, *event] to log pi up to a constant, [B] or None where it is not
            known, and the score, shape of `x`.
        density: whether it gives log pi.
        nodes: of the Gauss-Legendre rule that integrates the score where log pi is not known;
            each is an evaluation more for a proposal.

    """

    def __init__(self, evaluate: Evaluate, density: bool, nodes: int = 3) -> None:
        self.evaluate, self.density = evaluate, density
        self.nodes = whole_number("nodes", nodes)
        self.factor: Tensor | None = None
        self._calls, self._reuses_memory = 0, False
        self._first: Tensor | None = None

    @property
    def calls(self) -> int:
        """Evaluations so far."""
        return self._calls

    def scaled(self, factor: Tensor | None) -> Self:
        """The same target in the coordinates u, x = L u.

        Args:
            factor: L, lower triangular [D, D], or standard deviations [*event].
        """
        seen = copy.copy(self)
        seen.factor = factor
        return seen

    def place(self, u: Tensor) -> Tensor:
        """x = L u for `u` [B, *event]."""
        if self.factor is None:
            return u
        if self.factor.shape == u.shape[1:]:
            return u * self.factor
        return (u.flatten(1) @ self.factor.mT).reshape(u.shape)

    def coordinates(self, x: Tensor) -> Tensor:
        """u = L^-1 x for `x` [B, *event]."""
        if self.factor is None:
            return x
        if self.factor.shape == x.shape[1:]:
            return x / self.factor
        rows: Tensor = torch.linalg.solve_triangular(self.factor, x.flatten(1).mT, upper=False)
        return rows.mT.reshape(x.shape)

    def _pulled(self, score: Tensor) -> Tensor:
        """L^T score, the gradient in u."""
        if self.factor is None or self.factor.shape == score.shape[1:]:
            return score if self.factor is None else score * self.factor
        return (score.flatten(1) @ self.factor).reshape(score.shape)

    def __call__(self, u: Tensor) -> Point:
        """What the target says of `u` [B, *event]."""
        log_prob, score = self._evaluated(self.place(u))
        return Point(u, self._pulled(score), log_prob)

    def _evaluated(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """log pi and the score at `x`, which no later call writes into."""
        log_prob, score = self.evaluate(x)
        check_output(score, x)
        first = self._calls == 0
        if first:
            self._first = score
        elif self._first is not None:
            self._reuses_memory = score.data_ptr() == self._first.data_ptr()
            self._first = None
        if first or self._reuses_memory:
            score, log_prob = score.clone(), None if log_prob is None else log_prob.clone()
        self._calls += 1
        return log_prob, score.to(x.dtype)


class Tilted(Target):
    """The densities pi_beta(x) proportional to q(x) exp(beta f(x)), at one beta.

    Args:
        base: q; None for a constant.
        tilt: f in the place of a log-density, with its gradient.
        beta: inverse temperature, or one for each row, [B] in the dtype of the states.

    Raises:
        ArgumentError: f or log q is known by its gradient alone.
    """

    def __init__(self, base: Target | None, tilt: Target, beta: float | Tensor = 1.0) -> None:
        super().__init__(tilt.evaluate, True)
        if not tilt.density or not (base is None or base.density):
            raise ArgumentError(
                "a tilted target needs values, not only gradients: give an energy, a mixture or a "
                "model with log_prob_and_score"
            )
        self.base, self.tilt, self.beta = base, tilt, beta

    @property
    def calls(self) -> int:
        """Evaluations of f so far."""
        return self.tilt.calls

    def at(self, beta: float | Tensor) -> Self:
        """The member at another `beta`, a number or [B]; evaluations are counted together."""
        seen = copy.copy(self)
        seen.beta = beta
        return seen

    def moved(self, point: Point, before: float | Tensor) -> Point:
        """A `point` of the member at beta = `before` as one of this member: no evaluation."""
        assert point.tilt is not None and point.tilt_score is not None
        step = torch.as_tensor(self.beta - before, dtype=point.x.dtype, device=point.x.device)
        still = step == 0  # there f does not count, be it infinite
        pull = (column(step, point.x) * point.tilt_score).masked_fill(column(still, point.x), 0.0)
        log_prob = point.log_prob
        if log_prob is not None:
            log_prob = log_prob + (step * point.tilt).masked_fill(still, 0.0)
        return point._replace(score=point.score + pull, log_prob=log_prob)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log q, its score, f, its gradient."""
        f, gradient = self.tilt._evaluated(x)
        assert f is not None
        if self.base is None:
            return torch.zeros_like(f), torch.zeros_like(x), f, gradient
        log_q, score = self.base._evaluated(x)
        assert log_q is not None
        return log_q, score, f, gradient

    def _evaluated(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """log pi_beta and its score, for a family that is part of another."""
        log_q, score, f, gradient = self._parts(x)
        point = self.moved(Point(x, score, log_q, f, gradient), 0.0)
        return point.log_prob, point.score

    def __call__(self, u: Tensor) -> Point:
        log_q, score, f, gradient = self._parts(self.place(u))
        gradient = self._pulled(gradient)
        point = Point(u, self._pulled(score), log_q, f, gradient)
        return self.moved(point, 0.0)


class Geometric(Tilted):
    """The geometric path pi_beta proportional to q^(1 - beta) p^beta, f = log p - log q.

    Args:
        base: q.
        tilt: p.
        beta: in [0, 1], or one for each row, [B].
    """

    base: Target

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_q, score, log_p, gradient = super()._parts(x)
        return log_q, score, log_p - log_q, gradient - score


Density = Target | GaussianMixture | Model | Callable[..., Tensor]
"""What `as_target` takes."""


def as_target(
    score: Density,
    t: float | None = None,
    nodes: int = 3,
    **cond: Any,
) -> Target:
    """Anything a kernel can sample, as a `Target`.

    Args:
        score: a `Target`, a `GaussianMixture`, a model or a callable `score(x, t, **cond)`. A
            model with a method `log_prob_and_score(x, t, **cond)`, such as `from_energy`, or with
            `log_prob(x, t, **cond)` gives the acceptance; otherwise it is integrated.
        t: the fixed time at which a model is asked; if omitted `t_min` of its process, 0 if
            it has none.
        nodes: as in `Target`.
        **cond: passed on to the model.

    Raises:
        ArgumentError: `score` is none of these, or has no time or conditions but gets them.
    """
    if isinstance(score, Target | GaussianMixture):
        if cond or t is not None:
            raise ArgumentError(
                f"a {type(score).__name__} has neither time nor conditions: leave out "
                f"{', '.join([*(['t'] if t is not None else []), *cond])}"
            )
        if isinstance(score, Target):
            return score
        score.log_prob_and_score(score.means[:1])
        return Target(score.log_prob_and_score, True, nodes)
    if not callable(score):
        raise ArgumentError(f"score is {type(score).__name__}: give a callable score(x, t)")
    process = getattr(score, "sde", None)
    time = t if t is not None else (process.t_min if process is not None else 0.0)
    both = getattr(score, "log_prob_and_score", None)
    held: list[Tensor] = []

    def at(x: Tensor) -> Tensor:
        if not held or held[0].shape != x.shape[:1] or held[0].device != x.device:
            held[:] = [model_time(time, x)]
        return held[0]

    log_prob = getattr(score, "log_prob", None)
    if both is None and log_prob is not None:
        return Target(lambda x: (log_prob(x, at(x), **cond), score(x, at(x), **cond)), True, nodes)
    if both is None:
        return Target(lambda x: (None, score(x, at(x), **cond)), False, nodes)
    return Target(lambda x: both(x, at(x), **cond), True, nodes)


def factor_of(covariance: Tensor | None, x: Tensor) -> Tensor | None:
    """L of a covariance L L^T, for `Target.scaled`.

    Args:
        covariance: [D, D], or variances [*event].
        x: states [B, *event].

    Raises:
        ShapeError: it is neither.
        ArgumentError: it is not positive definite.
    """
    if covariance is None:
        return None
    if not isinstance(covariance, Tensor) or not bool(torch.isfinite(covariance).all()):
        raise ArgumentError("covariance is not a tensor of finite numbers")
    dimension = x.shape[1:].numel()
    if covariance.shape == x.shape[1:]:
        if not bool((covariance > 0).all()):
            raise ArgumentError("covariance has variances that are not positive")
        return covariance.to(x).sqrt()
    if covariance.shape != (dimension, dimension):
        raise ShapeError(
            f"covariance of shape {tuple(covariance.shape)} for x of shape {tuple(x.shape)}: "
            f"give ({dimension}, {dimension}) or {tuple(x.shape[1:])}"
        )
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance.to(x))
    if bool(info > 0) or not bool(torch.isfinite(factor).all()):
        raise ArgumentError("covariance is not positive definite")
    return factor
