"""Measurements y = A(x0) + s n of the data, and the equations they lead to.

A is a matrix, or a callable, which may be affine or nonlinear: it is then replaced by its tangent
at the denoised state, A(x0') + G (x0 - x0') with G the Jacobian there, and G^T is a
vector-Jacobian product and G a product through it (the gradient of G^T v in v). Complex
measurements are pairs of real numbers. Systems in G are solved by conjugate gradients, every row
of the batch on its own, so that nothing of the size of G G^T is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number
from scoresolve.guidance.base import flat, own_copy
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import expand

__all__ = ["LinearMap", "Measurement", "Tangent", "check_operator", "conjugate_gradients"]

LinearMap = Callable[[Tensor], Tensor]


class Tangent(NamedTuple):
    """A measurement near some states x0 [B, *event], in real numbers of at least float32.

    Attributes:
        value: A(x0), [B, *measured], of a complex measurement [B, *measured, 2].
        pull: v -> G^T v, from the shape of `value` to that of x0.
        push: w -> G w, the other way.
    """

    value: Tensor
    pull: LinearMap
    push: LinearMap


@dataclass(frozen=True, eq=False)
class Measurement:
    """A measurement y = A(x0) + s n of the clean data, n ~ N(0, I).

    Where A(x0) is complex, so is y, and the noise has the standard deviation s in the real and in
    the imaginary part: E|s n|^2 = 2 s^2 for each number.

    Args:
        operator: A, a matrix [M, D] on flattened events, real or complex, or a callable from
            [B, *event] to [B, *measured], row by row. It gets a copy that it may write into; a
            module is called in the dtype of its parameters.
        noise_std: s, at least 0.
        observation: y, [M] or [*measured] for all samples, or [B, *measured] for a batch that is
            called as it is. A verb, which may split its batch, takes one for each sample as the
            condition `observation=` [B, *measured].
        adjoint: A^T of a linear callable, [B, *measured] to [B, *event], the conjugate transpose
            if it is complex. If omitted the callable need not be linear, and its products are
            found by autograd, twice where a method asks for A A^T.

    Raises:
        ArgumentError: `noise_std` is negative or not finite, `operator` is neither a matrix nor
            callable, or `observation` is not a finite tensor.
        ShapeError: a matrix is not [M, D].
    """

    operator: Tensor | LinearMap
    noise_std: float
    observation: Tensor | None = None
    adjoint: LinearMap | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_std", real_number("noise_std", self.noise_std, least=0))
        if isinstance(self.operator, Tensor):
            if self.operator.ndim != 2:
                raise ShapeError(
                    f"operator of shape {tuple(self.operator.shape)}: give [M, D] or a callable"
                )
            if self.adjoint is not None:
                raise ArgumentError("a matrix has its own adjoint: leave out adjoint=")
            _check_finite("operator", self.operator)
        elif not callable(self.operator):
            raise ArgumentError(
                f"operator is {type(self.operator).__name__}: give a matrix [M, D] or a callable"
            )
        if self.adjoint is not None and not callable(self.adjoint):
            raise ArgumentError(f"adjoint is {type(self.adjoint).__name__}: give a callable")
        if self.observation is not None:
            _check_finite("observation", self.observation)

    def measure(self, x0: Tensor) -> Tensor:
        """A(x0) for x0 [B, *event], [B, *measured], complex if the operator is.

        Raises:
            ShapeError: the operator does not fit the events, or does not return one row for each.
        """
        if isinstance(self.operator, Tensor):
            rows, matrix = flat(x0), _on(self.operator, x0)
            if rows.shape[1] != matrix.shape[1]:
                raise ShapeError(
                    f"operator of shape {tuple(matrix.shape)} for events of {rows.shape[1]} "
                    "elements: give [M, D]"
                )
            return rows.to(matrix.dtype) @ matrix.mT
        measured: object = self.operator(own_copy(self.operator, x0))
        if not isinstance(measured, Tensor):
            raise ShapeError(f"the operator returned {type(measured).__name__}: return a tensor")
        if measured.shape[:1] != x0.shape[:1]:
            raise ShapeError(
                f"the operator returned shape {tuple(measured.shape)} for x0 of shape "
                f"{tuple(x0.shape)}: return one measurement for each row, [B, *measured]"
            )
        return measured.to(x0.device)

    def tangent(self, x0: Tensor, keep_graph: bool = False) -> Tangent:
        """The operator at `x0` [B, *event] and its products there.

        Args:
            x0: the states.
            keep_graph: whether what is returned can be differentiated through `x0`.

        Raises:
            ShapeError: as `measure`.
            ArgumentError: at a product, the operator has no gradient in its input.
        """
        if isinstance(self.operator, Tensor):
            matrix = _on(self.operator, x0)
            return Tangent(
                _real(self.measure(x0), x0),
                lambda v: _event(_back(v, matrix) @ matrix.conj(), x0),
                lambda w: _real(flat(w).to(matrix.dtype) @ matrix.mT, x0),
            )
        if self.adjoint is not None:
            return self._with_adjoint(x0)
        with torch.enable_grad():
            point = x0 if keep_graph and x0.requires_grad else x0.detach().requires_grad_()
            value = _real(self.measure(point), x0)

        def pull(v: Tensor) -> Tensor:
            return _product(value, point, v.to(value), keep_graph)

        @cache
        def transpose() -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                v = torch.zeros_like(value).requires_grad_()
                return v, _product(value, point, v, True)

        def push(w: Tensor) -> Tensor:
            try:
                v, back = transpose()
                return _product(back, v, w.to(back), keep_graph)
            except RuntimeError as error:
                raise ArgumentError(
                    "the operator cannot be differentiated twice, which products with it take: "
                    "write it in operations that can, or give adjoint= if it is linear"
                ) from error

        return Tangent(value if keep_graph else value.detach(), pull, push)

    def _with_adjoint(self, x0: Tensor) -> Tangent:
        assert self.adjoint is not None
        adjoint, measured = self.adjoint, self.measure(x0)
        origin = _real(self.measure(torch.zeros_like(x0)), x0)

        def pull(v: Tensor) -> Tensor:
            back = adjoint(own_copy(adjoint, _back(v, measured).reshape(measured.shape)))
            if not isinstance(back, Tensor) or back.shape != x0.shape:
                kind = tuple(back.shape) if isinstance(back, Tensor) else type(back).__name__
                raise ShapeError(
                    f"the adjoint returned {kind} for x0 of shape {tuple(x0.shape)}: return that "
                    "shape"
                )
            return _event(back, x0)

        return Tangent(
            _real(measured, x0), pull, lambda w: _real(self.measure(w.to(x0)), x0) - origin
        )

    def residual(self, value: Tensor, observation: Tensor | None) -> Tensor:
        """y less a `value` of `tangent`, in its shape.

        Raises:
            ArgumentError: there is no observation, or it is complex where A is not, or real where
                A is complex.
            ShapeError: y does not have the shape of A(x0).
        """
        y = self.observation if observation is None else observation
        if y is None:
            raise ArgumentError("there is no observation: give it to Measurement or to the verb")
        if not isinstance(y, Tensor):
            raise ArgumentError(f"observation is {type(y).__name__}: give a tensor")
        given = tuple(y.shape)
        if y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
            fits = value.shape[-1:] == (2,) and y.shape in (value.shape, value.shape[1:])
            if not fits and y.shape[:-1] in (value.shape, value.shape[1:]):
                raise ArgumentError("observation is complex where the operator gives real numbers")
        if y.shape not in (value.shape, value.shape[1:]):
            raise ShapeError(
                f"observation of shape {given} where the operator gives {tuple(value.shape)} "
                "(real and imaginary part last, if it is complex): give that shape, or without "
                "the batch axis; one for each sample of a verb is its condition observation="
            )
        return y.to(value) - value


def check_operator(measurement: Measurement, tangent: Tangent, x0: Tensor) -> None:
    """Raise if the operator at `x0` is not what its methods take it for.

    Args:
        measurement: the measurement.
        tangent: at `x0`.
        x0: states, [B, *event].

    Raises:
        ArgumentError: rows depend on one another, the adjoint is not that of a linear operator,
            or the operator changes in steps, so that its gradient says nothing.
    """
    if isinstance(measurement.operator, Tensor):
        return
    x0, noise = x0.detach(), Philox(0)
    v = noise.normal(tangent.value.detach(), 0, Purpose.PROBE)
    first = torch.zeros_like(v)
    first[:1] = v[:1]
    if bool(tangent.pull(first)[1:].detach().any()):
        raise ArgumentError(
            "the operator mixes the samples of a batch: let row i of what it returns depend on "
            "row i of [B, *event] alone"
        )
    w = noise.normal(x0, 1, Purpose.PROBE)
    if measurement.adjoint is None:
        if not bool(tangent.pull(v).detach().any()):
            other = measurement.tangent(x0 + w)
            moves = bool((other.value != tangent.value.detach()).any())
            if moves and not bool(other.pull(v).any()):
                raise ArgumentError(
                    "the operator moves in steps, with gradient 0 everywhere (it rounds or "
                    "compares): give a smooth one, and let the noise stand for the rounding"
                )
        return
    image = tangent.push(w).detach()
    moved = (_real(measurement.measure(x0 + w), x0) - tangent.value).detach()
    size, near = _dot(image, image), 4 * math.sqrt(torch.finfo(x0.dtype).eps)
    scale = size + _dot(tangent.value, tangent.value).detach()  # of what was subtracted
    bent = _dot(moved - image, moved - image) > near**2 * scale
    skew = (_dot(w.to(image), tangent.pull(image).to(image)) - size).abs().detach() > near * scale
    if bool((bent | skew).any()):
        what = (
            "is not linear" if bool(bent.any()) else "has another adjoint: <A w, v> != <w, A^T v>"
        )
        raise ArgumentError(f"the operator {what}: leave out adjoint=, or mend it")


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
    return flat(a * b).sum(1)


def _product(value: Tensor, point: Tensor, v: Tensor, again: bool) -> Tensor:
    """v^T d value / d point, shape of `point`."""
    found = None
    if value.requires_grad:
        (found,) = torch.autograd.grad(
            value, point, v, retain_graph=True, create_graph=again, allow_unused=True
        )
    if found is None:
        raise ArgumentError(
            "the operator has no gradient in its input (it runs under no_grad, rounds or returns "
            "integers): write it in differentiable operations, or give adjoint= if it is linear"
        )
    return found


def _on(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix on the device of `x` in its precision, at least float32, and complex if it is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if matrix.is_complex():
        dtype = torch.promote_types(dtype, torch.complex64)
    return matrix.to(x.device, dtype)


def _real(measured: Tensor, x: Tensor) -> Tensor:
    """A measurement in real numbers of the precision of `x`, at least float32."""
    if measured.is_complex():
        measured = torch.view_as_real(measured.resolve_conj())
    return measured.to(torch.promote_types(x.dtype, torch.float32))


def _back(v: Tensor, like: Tensor) -> Tensor:
    """What `_real` made real, complex again if `like` is."""
    return torch.view_as_complex(v.contiguous()).to(like) if like.is_complex() else v.to(like)


def _event(back: Tensor, x: Tensor) -> Tensor:
    """A cotangent of real states `x`, in their shape, device and precision."""
    return (back.real if back.is_complex() else back).reshape(x.shape).to(x)


def _check_finite(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is {type(value).__name__}: give a tensor")
    if value.is_meta:
        raise ArgumentError(f"{name} is on the meta device, without numbers: give a real tensor")
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"{name} is not finite everywhere: give finite numbers")
