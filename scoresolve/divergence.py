r"""The divergence of a vector field v on states x [B, *event], by vector-Jacobian products.

With J the Jacobian of a row of v with respect to the same row of x, and D event elements,

    div v = sum_i e_i^T J e_i            exact, D products with the basis vectors
          = E[z^T J z],  E[z z^T] = I    Hutchinson, one product per probe z

One forward pass serves all products of a point; they are taken many at a time (batched backward
passes), as far as memory allows. The field must treat the rows of the batch independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from scoresolve.errors import ShapeError
from scoresolve.models import check_output
from scoresolve.plans import check_state

__all__ = ["exact_divergence", "hutchinson", "walsh_signs"]

Field = Callable[[Tensor], Tensor]

# Elements of x copied at once into a batched backward pass, unless one row more is needed.
_ROOM: Final = 2**20


def exact_divergence(fn: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """The field and its divergence, sum_i e_i^T J e_i.

    Args:
        fn: the field, [B, *event] -> [B, *event]; row i of its value depends on row i of x alone.
        x: [B, *event], real floating point; its own gradient history is not continued.

    Returns:
        The value [B, *event] and the divergence [B], both without history.

    Raises:
        ArgumentError: `x` is not floating point.
        ShapeError: `x` has no batch axis, or `fn` returns another shape.

    Source:
        Chen et al. 2018 (1806.07366), section 4, for the trace in the flow of a density.
    """
    value, products = _pullback(fn, x)
    size = math.prod(x.shape[1:])
    total = x.new_zeros(x.shape[0])
    index = torch.arange(size, device=x.device)
    for part in _groups(size, x):
        basis = (index[part, None] == index).to(x.dtype)
        cotangents = basis[:, None].expand(-1, x.shape[0], -1).reshape(-1, *x.shape)
        rows = products(cotangents).reshape(len(basis), x.shape[0], size)
        total += rows[..., part].diagonal(dim1=0, dim2=2).sum(1)
    return value, total


def hutchinson(fn: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The field and estimates z_k^T J z_k of its divergence, one column a probe.

    Args:
        fn: as in `exact_divergence`.
        x: [B, *event], real floating point.
        probes: z, [K, B, *event], independent with mean 0 and covariance I.

    Returns:
        The value [B, *event] and the estimates [B, K], both without history.

    Raises:
        ArgumentError: `x` is not floating point.
        ShapeError: `x` has no batch axis, `probes` does not fit, or `fn` returns another shape.

    Source:
        Hutchinson 1990; Grathwohl et al. 2019 (1810.01367), eq. 7.
    """
    if probes.shape[1:] != x.shape:
        raise ShapeError(
            f"probes of shape {tuple(probes.shape)} for x of shape {tuple(x.shape)}: "
            "give [K, *x.shape]"
        )
    value, products = _pullback(fn, x)
    size = math.prod(x.shape[1:])
    columns = [
        (products(probes[part]) * probes[part]).reshape(-1, x.shape[0], size).sum(2)
        for part in _groups(probes.shape[0], x)
    ]
    return value, torch.cat(columns).mT


def walsh_signs(row: int, size: int, like: Tensor) -> Tensor:
    """The first `size` signs of a row of the Walsh matrix, rows in the order of the Gray code.

    w_i = (-1)^popcount(i & g) with g = row ^ (row >> 1). Probes z * w with one z and consecutive
    rows are orthogonal to one another over 2^k >= size rows, where their mean of z^T J z is the
    trace, and most pairs of elements cancel over far fewer: also when J changes slowly meanwhile.

    Args:
        row: in [0, 2^31); it repeats with period 2^k.
        size: number of signs, at most 2^31.
        like: gives dtype and device.

    Returns:
        -1 and +1, [size].

    Source:
        Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix" (Hadamard
        probes); the Gray code spreads them over the calls of a solver.
    """
    bits = torch.arange(size, device=like.device) & (row ^ row >> 1)
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ bits >> shift
    return (1 - 2 * (bits & 1)).to(like.dtype)


def _groups(count: int, x: Tensor) -> Iterator[slice]:
    size = max(1, _ROOM // max(1, x.numel()))
    return (slice(first, first + size) for first in range(0, count, size))


def _pullback(fn: Field, x: Tensor) -> tuple[Tensor, Field]:
    """The value at `x`, and the map from cotangents [n, *x.shape] to their products with J."""
    check_state(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = fn(leaf)
    check_output(value, x)

    def gradient(cotangent: Tensor, batched: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            value,
            leaf,
            cotangent.to(value.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return torch.zeros_like(cotangent) if product is None else product

    def products(cotangents: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(cotangents)
        if len(cotangents) > 1:
            try:
                return gradient(cotangents, batched=True)
            except RuntimeError:
                pass  # A compiled or custom backward pass may not be batched; one by one it is.
        return torch.stack([gradient(cotangent, batched=False) for cotangent in cotangents])

    return value.detach(), products
