"""Targets: a density pi by its score and, where it is known, log pi up to a constant.

A target may be seen in other coordinates, x = L u with L L^T a covariance; a kernel with unit
mass and isotropic noise in u is one with mass (L L^T)^-1 and noise of that covariance in x.
Tilted targets are families on a line, log pi_beta(x) = log q(x) + beta f(x) + const.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from scoresolve.errors import (
    ArgumentError,
    ShapeError,
    check_output,
    real_number,
    row_status,
    whole_number,
)
from scoresolve.models import Model
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
_MOST_NODES = 100  # to this degree numpy has tested the rule
_TILE = 16  # rows and columns of a product that give a row the same bits in any batch
_SPLIT = 1 << 15  # elements from which torch adds one row up in several threads


def column(values: Tensor, x: Tensor) -> Tensor:
    """`values` [B] shaped to multiply `x` [B, *event]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every row, [B]; on a CPU the same bits in any batch."""
    if a.ndim == 1:
        return a * b
    rows = (a * b).flatten(1).contiguous()
    if len(rows) == 1 and rows.numel() >= _SPLIT:  # many rows are shared out among threads whole
        return rows.expand(2, -1).contiguous().sum(1)[:1]
    return rows.sum(1)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` [B, D] times `matrix` [D, D]; on a CPU a row has the same bits in any batch.

    BLAS adds up the last few rows and columns of a product in another order, so that both are
    filled up with zeros.
    """
    rows, dimension = x.shape
    wide = (0, -dimension % _TILE)
    filled = torch.nn.functional.pad(x, (*wide, 0, -rows % _TILE))
    square = torch.nn.functional.pad(matrix, (*wide, *wide))
    return (filled @ square.contiguous())[:rows, :dimension]


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
            each is an evaluation more for a proposal; at most 100.

    Attributes:
        of_rows: from the numbers [n] of some chains of the batch to their `evaluate`. Without it
            the integral cannot be refined where it needs to be.
        partial: evaluations so far that were made for some chains alone.
    """

    of_rows: Callable[[Tensor], Evaluate] | None = None

    def __init__(self, evaluate: Evaluate, density: bool, nodes: int = 3) -> None:
        self.evaluate, self.density = evaluate, density
        self.nodes = whole_number("nodes", nodes, most=_MOST_NODES)
        self.factor: Tensor | None = None
        self.partial, self._whole = 0, False
        self._calls, self._reuses_memory, self._writes = 0, False, False
        self._first: Tensor | None = None
        self._failed: Tensor | None = None

    @property
    def calls(self) -> int:
        """Evaluations so far."""
        return self._calls

    def watch(self, failed: Tensor) -> None:
        """Mark in `failed` [B] bool from now on where this target is not finite."""
        self._failed = failed

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
        return product(u.flatten(1), self.factor.mT).reshape(u.shape)

    def coordinates(self, x: Tensor) -> Tensor:
        """u = L^-1 x for `x` [B, *event]."""
        if self.factor is None:
            return x
        if self.factor.shape == x.shape[1:]:
            return x / self.factor
        rows, flat = torch.empty_like(x.flatten(1)), x.flatten(1)
        for i, line in enumerate(self.factor):  # as BLAS does not, row by row the same in any batch
            rows[:, i] = (flat[:, i] - (rows[:, :i] * line[:i]).sum(1)) / line[i]
        return rows.reshape(x.shape)

    def _pulled(self, score: Tensor) -> Tensor:
        """L^T score, the gradient in u."""
        if self.factor is None or self.factor.shape == score.shape[1:]:
            return score if self.factor is None else score * self.factor
        return product(score.flatten(1), self.factor).reshape(score.shape)

    def __call__(self, u: Tensor) -> Point:
        """What the target says of `u` [B, *event]."""
        log_prob, score = self._evaluated(self.place(u))
        return self._watch(Point(u, self._pulled(score), log_prob))

    def _watch(self, point: Point) -> Point:
        if self._failed is not None:
            for values in (point.score, point.log_prob):
                if values is not None:
                    self._failed |= row_status(values) != 0
        return point

    def score_of(self, rows: Tensor, u: Tensor) -> Tensor | None:
        """The score at `u` [n, *event] for the chains `rows` [n] of the batch alone.

        None, then and ever after, from a score that fails on a part of the batch.
        """
        if self.of_rows is None or self._whole:
            return None
        x = self.place(u)
        try:
            score = self._asked(self.of_rows(rows), x)[1]
        except Exception:  # whatever a model of a fixed batch raises; the whole batch will tell
            self._whole = True
            return None
        self._calls, self.partial = self._calls + 1, self.partial + 1
        return self._pulled(score.to(x.dtype))

    def _asked(self, evaluate: Evaluate, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """log pi and the score, checked; `x` is as before, whatever the function does to it."""
        first = self._calls == 0
        copied = self._writes or first
        given = x.clone() if copied else x
        before = _version(given)
        log_prob, score = evaluate(given)
        if _version(given) != before:
            if not copied:
                raise ArgumentError(
                    "the score wrote into its input x, which it did not at its first call: let it "
                    "work on a copy"
                )
            self._writes = True
        elif first:  # .data and NumPy leave the version as it is
            self._writes = not torch.equal(given, x)
        check_output(score, x)
        _check_real("score", score)
        if log_prob is not None:
            if log_prob.shape != x.shape[:1]:
                raise ShapeError(
                    f"the log-density has shape {tuple(log_prob.shape)} for x of shape "
                    f"{tuple(x.shape)}: return one number per sample, [B]"
                )
            _check_real("log-density", log_prob)
        return log_prob, score

    def _evaluated(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """log pi and the score at `x`, which no later call writes into."""
        log_prob, score = self._asked(self.evaluate, x)
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
        return self._watch(self.moved(point, 0.0))


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
        t: the fixed time at which a model is asked, from 0 to the T of its process; if omitted
            `t_min` of its process, 0 if it has none.
        nodes: as in `Target`.
        **cond: passed on to the model.

    Raises:
        ArgumentError: `score` is none of these, `t` is out of range, or `score` has no time or
            conditions but gets them.
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
    if t is None:
        time = process.t_min if process is not None else 0.0
    elif process is None:
        time = real_number("t", t)
    else:
        time = real_number("t", t, least=0.0, most=process.T)
    _check_conditions(score, cond)
    held = {name: _plain(value) for name, value in cond.items()}
    at, log_prob = _Clock(time), getattr(score, "log_prob", None)
    both = getattr(score, "log_prob_and_score", None)
    if both is not None:
        target = Target(lambda x: both(x, at(x), **held), True, nodes)
    elif log_prob is not None:
        target = Target(
            lambda x: (log_prob(x, at(x), **held), score(x, at(x), **held)), True, nodes
        )
    else:
        target = Target(lambda x: (None, score(x, at(x), **held)), False, nodes)
    if not cond:
        target.of_rows = lambda _: target.evaluate
    return target


def _check_conditions(score: Callable[..., object], cond: dict[str, Any]) -> None:
    """Raise if `score` says that it takes no such conditions, which may be misspelt arguments."""
    if not cond:
        return
    function = getattr(score, "net", score)
    try:
        signature = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        )
    except (TypeError, ValueError):  # it says nothing
        return
    try:
        signature.bind(None, None, **cond)
    except TypeError as error:
        raise ArgumentError(
            f"{', '.join(cond)} would go to the score, which takes other conditions ({error}): "
            "correct the name, or give the score that argument"
        ) from error


def _version(x: Tensor) -> int:
    """Counts the writes into a tensor; inference tensors have none."""
    return 0 if x.is_inference() else x._version


class _Clock:
    """A fixed time as a model gets it, [B] without copies, anew if the model wrote into it."""

    def __init__(self, t: float) -> None:
        self.t = t
        self.held: Tensor | None = None
        self.version = 0

    def __call__(self, x: Tensor) -> Tensor:
        held = self.held
        same = held is not None and held.shape == x.shape[:1] and held.device == x.device
        if not same or held is None or _version(held) != self.version:
            held = torch.full((), self.t, dtype=x.dtype, device=x.device).expand(len(x))
            self.held, self.version = held, _version(held)
        return held


def _plain(value: Any) -> Any:
    """A condition that gradients may be taken beside."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


def _check_real(what: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ArgumentError(f"the {what} is {values.dtype}: return real floating-point numbers")


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
    real = isinstance(covariance, Tensor) and not (covariance.is_complex() or covariance.is_meta)
    if not real or not bool(torch.isfinite(covariance).all()):
        raise ArgumentError("covariance is not a tensor of finite real numbers")
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
