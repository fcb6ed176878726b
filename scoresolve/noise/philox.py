"""Philox4x32-10 in torch integer operations, and numbers made of its words.

A block of four uint32 words is ten keyed rounds on a 128-bit counter. Normals are Box-Muller
pairs, `(r cos a, r sin a)` with `r = sqrt(-2 log u)` and `a` uniform on the circle; uniforms and
signs are read off single words. The integers are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.precision import doubled

__all__ = [
    "MASK",
    "Transform",
    "fill",
    "key_schedule",
    "normals",
    "open_interval",
    "philox4x32",
    "signs",
    "uniforms",
    "work_dtype",
]

_Keys: TypeAlias = Sequence[tuple[Tensor, Tensor]]
Transform: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]

MASK: Final = 2**32 - 1
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85


def _scalar(value: int) -> Tensor:
    # A zero-dimensional CPU tensor enters an operation on any device faster than a Python number.
    return torch.tensor(value, dtype=torch.int64, device="cpu")


_M0_T, _M1_T, _MASK_T, _SHIFT_T = map(_scalar, (0xD2511F53, 0xCD9E8D57, MASK, 32))


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10, a keyed bijection of four 32-bit words.

    Ten rounds, between which the key moves on by Weyl constants, of

        (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)).

    Args:
        counter: [..., 4] int64 holding uint32 values.
        key: [..., 2] int64 holding uint32 values; leading dimensions broadcast.

    Returns:
        [..., 4] int64 holding uint32 values.

    Raises:
        ArgumentError: not int64, or values outside uint32.
        ShapeError: the last dimensions are not 4 and 2.

    Source:
        Salmon et al., SC'11, section 3.3; constants and known answers of Random123.
    """
    for name, words, size in (("counter", counter, 4), ("key", key, 2)):
        if words.ndim == 0 or words.shape[-1] != size:
            raise ShapeError(f"{name} has shape {tuple(words.shape)}: give [..., {size}]")
        if words.dtype is not torch.int64 or bool(((words < 0) | (words > MASK)).any()):
            raise ArgumentError(
                f"{name} is not int64 holding uint32 values: give words in [0, 2**32)"
            )
    k0, k1 = key.unbind(-1)
    keys = [((k0 + r * _W0) & MASK, (k1 + r * _W1) & MASK) for r in range(10)]
    c0, c1, c2, c3 = counter.unbind(-1)
    packed = torch.stack(_rounds(c0, c1, c2, c3, keys), -1)
    return torch.stack((packed >> 32 & MASK, packed & MASK), -1).flatten(-2)


@lru_cache(maxsize=64)
def key_schedule(seed: int) -> _Keys:
    k0, k1 = seed & MASK, seed >> 32
    return [(_scalar(k0 + r * _W0 & MASK), _scalar(k1 + r * _W1 & MASK)) for r in range(10)]


@torch.no_grad()
def fill(
    out: Tensor, draw: Tensor, low: Tensor, high: Tensor, keys: _Keys, transform: Transform
) -> None:
    """Writes `transform` of the words into `out` [n, D], in parts that fit a cache."""
    blocks = -(-out.shape[1] // 4)
    room = 32768 * max(2, torch.get_num_threads()) if out.device.type == "cpu" else 2**20
    tall, wide = max(1, room // blocks), min(blocks, room)
    for column in range(0, blocks, wide):
        block = torch.arange(column, min(column + wide, blocks), device=out.device)[None]
        for row in range(0, len(out), tall):
            part = slice(row, row + tall)
            first, second = _rounds(block, draw[part], low[part], high[part], keys)
            transform(first, second, out[part, 4 * column : 4 * (column + wide)])


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
    """Ten rounds on words that broadcast; the result packed as `c0 << 32 | c1`, `c2 << 32 | c3`.

    An int64 product wraps modulo 2^64, so its low half is right as it stands and its high half
    is `product >> 32` in the low 32 bits. What lies above bit 31 is masked off only
    where a word is multiplied next. The first two rounds keep small words small.
    """
    for k0, k1 in keys[:2]:
        p0, p1 = c0 * _M0_T, c2 * _M1_T
        c0, c2 = (p1 >> _SHIFT_T ^ (c1 ^ k0)) & _MASK_T, (p0 >> _SHIFT_T ^ (c3 ^ k1)) & _MASK_T
        c1, c3 = p1, p0
    c0, c1, c2, c3 = (c.expand(c0.shape).contiguous() for c in (c0, c1, c2, c3))
    high = torch.empty_like(c0)
    for k0, k1 in keys[2:-1]:
        c0.mul_(_M0_T)
        c2.mul_(_M1_T)
        torch.bitwise_right_shift(c2, _SHIFT_T, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_MASK_T)
        torch.bitwise_right_shift(c0, _SHIFT_T, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_MASK_T)
        c0, c1, c2, c3 = c1, c2, c3, c0
    k0, k1 = keys[-1]
    c1.bitwise_xor_(k0).bitwise_left_shift_(_SHIFT_T).bitwise_xor_(c2.mul_(_M1_T))
    c3.bitwise_xor_(k1).bitwise_left_shift_(_SHIFT_T).bitwise_xor_(c0.mul_(_M0_T))
    return c1, c3


def normals(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Box-Muller on the packed words [n, blocks] into `out` [n, D]."""
    pairs = -(-out.shape[1] // 2)
    work = work_dtype(out.dtype)
    # u is the float32 nearest |n + 1/2| / 2^31: one number for all dtypes, exact near 0 and 1.
    u = first.view(torch.int32)[:, :pairs].to(torch.float32).mul_(2.0**-31).add_(2.0**-32).abs_()
    radius = u.to(work).log_().mul_(-2).sqrt_()
    angle = second.view(torch.int32)[:, :pairs].to(work).mul_(math.pi * 2.0**-31)
    cosine = torch.cos(angle).mul_(radius)
    sine = angle.sin_().mul_(radius)
    if out.dtype is work and out.stride(0) % 2 == 0:
        torch.complex(cosine, sine, out=torch.view_as_complex(out.view(len(out), -1, 2)))
    else:
        both = torch.view_as_real(torch.complex(cosine, sine))
        out.copy_(both.flatten(1)[:, : out.shape[1]])


def uniforms(first: Tensor, second: Tensor, out: Tensor) -> None:
    words = _words(first, second, out)
    words = doubled(words)  # on the host the numbers are the same
    out.copy_(open_interval(words.mul_(2.0**-32).add_(0.5 + 2.0**-33), out))


def signs(first: Tensor, second: Tensor, out: Tensor) -> None:
    out.copy_(_words(first, second, out) >> 31 | 1)


def _words(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """The first D words of each row as int32, [n, D]."""
    words = torch.stack((first, second), -1).view(torch.int32)
    return words.flatten(1)[:, : out.shape[1]]


def open_interval(u: Tensor, like: Tensor) -> Tensor:
    """`u` in the dtype of `like`, moved off 0 and 1 where rounding put it there."""
    limits = torch.finfo(like.dtype)
    return u.clamp_(limits.tiny, 1 - limits.eps / 2).to(like)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
