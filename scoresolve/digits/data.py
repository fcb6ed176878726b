"""The 8x8 handwritten digits, as integers and as a density.

An image is 64 integer grey levels k in {0, ..., 16}. A density model needs real numbers: spread
each level over a bin of width 2/17, x = 2 (k + u) / 17 - 1 with u uniform in [0, 1), so that x lies
in [-1, 1). Then log P(k) >= E_u log p(x) + 64 log(2/17) by Jensen's inequality, and a log-density
in nats becomes bits per dimension of the integer image as -log2 p(x) / 64 + log2(17/2).

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0. These 1,797 images are its test set, in
the order in which scikit-learn carries it; nothing was changed but the shape of the array.
`held_out` marks 36 images of each class, the first of that class in the order
numpy.random.default_rng(0).permutation(1797).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, known_name

__all__ = [
    "BIN_WIDTH",
    "LEVELS",
    "Digits",
    "bits_per_dim",
    "load_digits",
    "to_image",
    "to_levels",
    "to_unit",
]

LEVELS = 17
BIN_WIDTH = 2 / LEVELS


@dataclass(frozen=True)
class Digits:
    """A set of digits: `levels` int64 [N, 1, 8, 8] in 0..16 and `labels` int64 [N] in 0..9."""

    levels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(split: str = "all") -> Digits:
    """The bundled digits; the split is fixed and balanced over the classes.

    Args:
        split: "train" (1,437 images), "test" (360 images held out of training) or "all".

    Returns:
        The images and labels of the split, in the order of the source.

    Raises:
        UnknownNameError: `split` is none of the three names.

    >>> load_digits("test").levels.shape
    torch.Size([360, 1, 8, 8])
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        held_out = stored["held_out"]
        rows = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}
        chosen = rows[known_name("split", split, rows)]
        images, labels = stored["images"][chosen], stored["labels"][chosen]
    return Digits(
        levels=torch.from_numpy(images.astype(np.int64))[:, None],
        labels=torch.from_numpy(labels.astype(np.int64)),
    )


def to_unit(levels: Tensor, noise: Tensor | float = 0.5) -> Tensor:
    """Real images in [-1, 1] of integer levels, `x = 2 (k + u) / 17 - 1`.

    Args:
        levels: k, any shape, values 0..16.
        noise: u in [0, 1), shape of `levels` (its dtype is kept), or one number for all pixels,
            in torch's default dtype; 0.5 is the centre of the bin.

    Returns:
        x, shape of `levels`.

    Raises:
        ArgumentError: `noise` is a tensor of another shape, or not floating, or a level is none of
            0..16.

    >>> to_unit(torch.tensor([0, 8, 16]))
    tensor([-0.9412,  0.0000,  0.9412])
    """
    if not bool(((levels >= 0) & (levels < LEVELS)).all()):
        raise ArgumentError("levels are not all in 0..16: give grey levels of the digits")
    if isinstance(noise, Tensor):
        if noise.shape != levels.shape or not noise.is_floating_point():
            raise ArgumentError(
                f"noise is {noise.dtype} of shape {tuple(noise.shape)} for levels of shape "
                f"{tuple(levels.shape)}: draw one uniform number per level, such as "
                "torch.rand(levels.shape)"
            )
        return (levels.to(noise.dtype) + noise) * BIN_WIDTH - 1
    return (levels.to(torch.get_default_dtype()) + noise) * BIN_WIDTH - 1


def to_levels(x: Tensor) -> Tensor:
    """The integer levels whose bins hold `x`, `k = floor((x + 1) 17/2)` cut to 0..16.

    Args:
        x: real images, any shape and floating dtype.

    Returns:
        k, int64, shape of `x`.

    Raises:
        ArgumentError: a value is not a number, which no bin holds.
    """
    if bool(x.isnan().any()):
        raise ArgumentError("x holds NaN, which lies in no bin: leave out the samples that failed")
    return ((x + 1) / BIN_WIDTH).floor().clamp(0, LEVELS - 1).long()


def to_image(x: Tensor, columns: int = 10) -> Tensor:
    """One picture of a batch of digits, row by row, for display.

    Args:
        x: real images [B, 1, 8, 8], nominally in [-1, 1]; values outside are cut, NaN
            is black.
        columns: digits in a row, at least 1.

    Returns:
        Grey values uint8 [8 ceil(B / columns), 8 columns]; digits missing from the last row are 0.

    Raises:
        ArgumentError: `x` has another shape, or `columns` is not positive.
    """
    if x.ndim != 4 or x.shape[1:] != (1, 8, 8) or columns < 1:
        raise ArgumentError(
            f"x has shape {tuple(x.shape)} and columns is {columns}: give images "
            "[B, 1, 8, 8] and at least one column"
        )
    rows = -(-len(x) // columns)
    shade = ((x.detach().cpu() + 1) * 127.5).round().clamp(0, 255)
    grey = shade.nan_to_num(0.0).to(torch.uint8)
    page = grey.new_zeros(rows * columns, 8, 8)
    page[: len(x)] = grey[:, 0]
    return page.view(rows, columns, 8, 8).transpose(1, 2).reshape(rows * 8, columns * 8)


def bits_per_dim(log_prob: Tensor) -> Tensor:
    """Bits per dimension of the integer image, `-log2 p(x) / 64 + log2(17/2)`.

    Args:
        log_prob: log-density of dequantised images in nats, any shape.

    Returns:
        Bits per dimension, shape of `log_prob`; log2(17) = 4.09 for the uniform density on [-1, 1].
    """
    return -log_prob / (64 * math.log(2)) - math.log2(BIN_WIDTH)
