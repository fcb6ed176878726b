"""Linear measurements y = A x0 + s n of the data, and the equations they lead to.

A is a matrix or a callable with its adjoint; systems in A are solved by conjugate gradients,
every row of the batch on its own, so that nothing of the size of A A^T is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.sde import expand

__all__ = ["LinearMap", "Measurement", "conjugate_gradients"]

LinearMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Measurement:
    """A linear measurement y = A x0 + s n of the clean data.

    Args:
        operator: A, a matrix [M, D] on flattened events, or a linear callable from
            [B, *event] to [B, *measured].
        noise_std: s, at least 0.
        observation: y, [M] or [*measured] for all samples, or [B, *measured]. If omitted, or to
            split it with the batch, a verb takes it as the condition `observation=` [B, *measured].
        adjoint: A^T for a callable, [B, *measured] to [B, *event]; by autograd if omitted.

    Raises:
        ArgumentError: `noise_std` is negative or not finite.
        ShapeError: a matrix is not [M, D].
    """

    operator: Tensor | LinearMap
    noise_std: float
    observation: Tensor | None = None
    adjoint: LinearMap | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ArgumentError(f"noise_std = {self.noise_std}: give a finite number, at least 0")
        if isinstance(self.operator, Tensor) and self.operator.ndim != 2:
            raise ShapeError(
                f"operator of shape {tuple(self.operator.shape)}: give [M, D] or a callable"
            )

    def measure(self, x0: Tensor) -> Tensor:
        """A x0 for x0 [B, *event], [B, *measured]."""
        if isinstance(self.operator, Tensor):
            rows, matrix = x0.reshape(x0.shape[0], -1), self.operator.to(x0)
            if rows.shape[1] != matrix.shape[1]:
                raise ShapeError(
                    f"operator of shape {tuple(matrix.shape)} for events of {rows.shape[1]} "
                    "elements: give [M, D]"
                )
            return rows @ matrix.mT
        return self.operator(x0)

    def transposed(self, v: Tensor, like: Tensor) -> Tensor:
        """A^T v for v [B, *measured], of the shape of `like` [B, *event]."""
        if isinstance(self.operator, Tensor):
            return (v @ self.operator.to(v)).reshape(like.shape)
        if self.adjoint is not None:
            return self.adjoint(v)
        with torch.enable_grad():
            point = torch.zeros_like(like).requires_grad_()
            (result,) = torch.autograd.grad(
                self.operator(point), point, v, create_graph=v.requires_grad
            )
        return result

    def residual(self, x0: Tensor, observation: Tensor | None) -> Tensor:
        """y - A x0, [B, *measured].

        Raises:
            ArgumentError: there is no observation.
            ShapeError: y does not have the shape of A x0.
        """
        y = self.observation if observation is None else observation
        if y is None:
            raise ArgumentError("there is no observation: give it to Measurement or to the verb")
        measured = self.measure(x0)
        if y.shape not in (measured.shape, measured.shape[1:]):
            raise ShapeError(
                f"observation of shape {tuple(y.shape)} where the operator gives "
                f"{tuple(measured.shape)}: give that shape, or without the batch axis"
            )
        return y.to(measured) - measured


def conjugate_gradients(apply: LinearMap, b: Tensor, iterations: int) -> Tensor:
    """The solution of apply(u) = b, row by row, for `apply` symmetric and positive.

    A row whose residual has reached the precision of its dtype stays as it is.

    Source:
        Hestenes and Stiefel 1952, J. Res. NBS 49, section 3.
    """
    u, r, p = torch.zeros_like(b), b, b
    square = _dot(r, r)
    floor = square * (4 * torch.finfo(b.dtype).eps) ** 2
    for _ in range(iterations):
        active = square > floor
        if not bool(active.any()):
            break
        image = apply(p)
        curvature = _dot(p, image)
        active &= curvature > 0
        step = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        u = u + expand(step, b, step) * p
        r = r - expand(step, b, step) * image
        latest = _dot(r, r)
        turn = torch.where(active, latest / torch.where(active, square, 1.0), 0.0)
        p = r + expand(turn, b, turn) * p
        square = torch.where(active, latest, 0.0)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, [B]."""
    return (a * b).reshape(a.shape[0], -1).sum(1)
