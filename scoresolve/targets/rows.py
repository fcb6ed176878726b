"""Sums and products whose rows do not depend on their batch, to the bit on a CPU.

A BLAS picks its kernel by the shape of the whole product, and another kernel adds in another
order. So products run over blocks of one shape, which the matrix alone decides; each has sides
that are multiples of what the kernels take at once, for what is left over has kernels of its own.
Sums run along the last axis, where torch adds each row for itself.

Measured for torch 2.13 with MKL, instruction sets from SSE4.2 to AVX-512 and one to four threads;
three threads with MKL_CBWR=AVX2 differ. On a GPU the products are those of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Final, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "Number",
    "across",
    "each_product",
    "full_precision",
    "is_timed",
    "last_sum",
    "product",
    "shares",
]

Number = float | Tensor
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SIDE: Final = 4
# Multiplications of one block and column: as many as take about as long as the call itself.
_WORK: Final = 2**15
_LEAST, _MOST = 16, 256
# Up to this size of a matrix, multiplying element by element is as fast.
_SMALL: Final = 16


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows` [B, I] @ `matrix` [I, O], [B, O]."""
    inner, outer = matrix.shape
    if rows.device.type != "cpu":
        return rows @ matrix
    if inner <= 2:
        columns = zip(torch.split(rows, 1, -1), matrix.unbind(), strict=True)
        return _sum([column * row for column, row in columns])
    if inner * outer <= _SMALL:
        return last_sum(rows[:, None] * matrix.mT.contiguous())
    return each_product(rows[:, None], matrix[None])[:, 0]


def each_product(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows[:, k] @ matrices[k] for `rows` [B, K, I] and `matrices` [K, I, O], [B, K, O]."""
    count, (inner, outer) = len(rows), matrices.shape[1:]
    if rows.device.type != "cpu":
        return (rows.transpose(0, 1) @ matrices).transpose(0, 1)
    block = _block(inner * outer)
    rows = rows.transpose(0, 1)
    if inner % _SIDE or count % block:
        rows = pad(rows, (0, -inner % _SIDE, 0, -count % block))
    if inner % _SIDE or outer % _SIDE:
        matrices = pad(matrices, (0, -outer % _SIDE, 0, -inner % _SIDE))
    found = []
    for part, matrix in zip(rows, matrices, strict=True):
        blocks = [piece @ matrix for piece in part.split(block)]
        found.append(torch.cat(blocks) if len(blocks) > 1 else blocks[0])
    whole = torch.stack(found, 1) if len(found) > 1 else found[0][:, None]
    return whole[:count, :, :outer]


def _block(work: int) -> int:
    """Rows of a block: a power of two, so that it stays a multiple of the kernels' sides."""
    return min(_MOST, max(_LEAST, 1 << (_WORK // work).bit_length() >> 1))


def last_sum(values: Tensor) -> Tensor:
    """The sum along the last axis."""
    if 1 <= values.shape[-1] <= 3:  # torch reduces short rows slowly
        return _sum(values.unbind(-1))
    return values.contiguous().sum(-1)


def shares(logits: Tensor) -> Tensor:
    """The softmax along the last axis, which torch's own takes longer for on short rows."""
    if logits.shape[-1] == 1:
        return (logits - logits).exp()
    powers = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return powers / last_sum(powers)[..., None]


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])


def is_timed(value: Number) -> TypeGuard[Tensor]:
    """Whether a coefficient is [B], one value a sample, rather than one for all."""
    return isinstance(value, Tensor) and value.ndim == 1


def across(value: Number, axes: int) -> Number:
    """A coefficient [] or [B], shaped to multiply rows with so many `axes` after the batch."""
    return value.reshape(-1, *(1,) * axes) if is_timed(value) else value


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function` outside `torch.autocast`, under which products lose most of their digits."""

    @wraps(function)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **options)
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*args, **options)

    return run
