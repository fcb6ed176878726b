"""A small denoiser D(x, sigma) for the 8x8 digits, in EDM's preconditioned form.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),     s_d the standard deviation of the data,
    c_skip = s_d^2 / (sigma^2 + s_d^2),    c_out = sigma s_d / sqrt(sigma^2 + s_d^2),
    c_in = 1 / sqrt(sigma^2 + s_d^2),      c_noise = ln(sigma) / 4,

so that D tends to x as sigma -> 0 and F sees and gives values of about unit variance at every
sigma. F is a transformer over the 16 patches of 2x2 pixels, modulated by noise level and class
(adaptive layer norm). The score of the noised data is (D(x, sigma) - x) / sigma^2.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from scoresolve.errors import ArgumentError, ShapeError

__all__ = ["CLASSES", "DigitsNet", "load_network"]

CLASSES = 10
SIGMA_DATA = 0.7075  # of the training images with uniform dequantisation noise
PATCHES, PIXELS = 16, 4


class DigitsNet(nn.Module):
    """The denoiser D(x, sigma), optionally of a given class.

    The map is smooth in x and sigma and has no state, no randomness in eval mode and no branch on
    values, so `torch.func` (jvp, vjp, vmap) and `torch.compile` apply.

    Args:
        width: features of a patch, a multiple of `heads`.
        depth: transformer blocks.
        heads: attention heads.
        dropout: probability of dropping a hidden unit in training.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    Table 1 and section 5 (preconditioning); Peebles and Xie, Scalable Diffusion Models with
    Transformers, 2023, section 3.2 (adaptive layer norm that starts as the identity).
    """

    data_scale = 1.48
    """`models.scale_of_data` of the training images: 64 pixels of standard deviation .51."""

    def __init__(
        self, width: int = 64, depth: int = 5, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.condition = _Condition(width)
        self.embed = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(torch.randn(PATCHES, width) / 2)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PIXELS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The denoised image `D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)`.

        Args:
            x: noisy images [B, 1, 8, 8], of the network's dtype.
            sigma: noise level > 0, a number, [] or [B]; trained on [0.002, 80].
            label: classes [B], int64 in 0..9, or 10 for none; None is 10 for every image.

        Returns:
            D, the expected clean image, [B, 1, 8, 8].

        Raises:
            ShapeError: `x`, `sigma` or `label` has another shape.
            ArgumentError: `label` is not of integers.
        """
        if x.ndim != 4 or x.shape[1:] != (1, 8, 8):
            raise ShapeError(f"x has shape {tuple(x.shape)}: give noisy images [B, 1, 8, 8]")
        work = torch.promote_types(x.dtype, torch.float32)  # noise levels are not rounded further
        sigma = torch.as_tensor(sigma, dtype=work, device=x.device)
        if sigma.shape not in {(), (len(x),)}:
            raise ShapeError(
                f"sigma has shape {tuple(sigma.shape)} for {len(x)} images: give one noise "
                "level or one per image"
            )
        if label is None:
            label = torch.full((len(x),), CLASSES, device=x.device)
        if label.is_floating_point() or label.is_complex():
            raise ArgumentError(f"label is {label.dtype}: give classes as integers")
        if label.shape != (len(x),):
            raise ShapeError(
                f"label has shape {tuple(label.shape)} for {len(x)} images: give one class "
                "per image"
            )
        sigma = sigma.expand(len(x))[:, None, None]
        total = torch.sqrt(sigma**2 + SIGMA_DATA**2)
        condition = self.condition(torch.log(sigma[:, 0]) / 4, label)

        patches = _patches(x)
        h = self.embed((patches / total).to(x.dtype)) + self.position
        for block in self.blocks:
            h = block(h, condition)
        out = self.head(self.norm(h))
        clean = patches * (SIGMA_DATA / total) ** 2 + out * (sigma * SIGMA_DATA / total)
        return _image(clean.to(x.dtype))


def load_network(
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DigitsNet:
    """A trained `DigitsNet`, frozen and in eval mode.

    Args:
        path: a safetensors file written by `python -m scoresolve.digits.train`; None for the
            bundled weights.
        device: where to put it; None for the CPU.
        dtype: floating dtype of the weights, and so of `x`.

    Returns:
        The network, with `requires_grad` off.

    Raises:
        ArgumentError: there is no such file, or it holds other weights than a `DigitsNet`'s.
    """
    path = Path(__file__).with_name("digits.safetensors") if path is None else Path(path)
    if not path.is_file():
        raise ArgumentError(
            f"no weights at {path}: train some with python -m scoresolve.digits.train"
        )
    network = DigitsNet()
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ArgumentError(
            f"{path} does not hold the weights of a DigitsNet: give a file that "
            "python -m scoresolve.digits.train has written"
        ) from error
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


class _Condition(nn.Module):
    """Noise level and class as one vector [B, width]."""

    frequencies: Tensor

    def __init__(self, width: int, count: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.25, 8.0, count))
        self.noise = nn.Linear(2 * count + 1, width)
        self.label = nn.Embedding(CLASSES + 1, width)
        self.mix = nn.Linear(width, width)
        nn.init.normal_(self.label.weight, std=0.1)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        angle = noise * self.frequencies
        waves = torch.cat([noise, torch.sin(angle), torch.cos(angle)], 1)
        waves = waves.to(self.noise.weight.dtype)
        return functional.silu(self.mix(functional.silu(self.noise(waves) + self.label(label))))


class _Block(nn.Module):
    """Attention between patches, then a perceptron in each, with modulated norms and gates."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        h = h + (1 + gate) * self.attention(self.norm(h) * (1 + scale) + shift)
        h = h + (1 + gate2) * self.perceptron(self.norm(h) * (1 + scale2) + shift2)
        return h

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(h).chunk(3, -1)
        )
        weight = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        mixed: Tensor = self.project((weight @ v).transpose(1, 2).flatten(2))
        return mixed


def _patches(x: Tensor) -> Tensor:
    """[B, 1, 8, 8] as [B, 16, 4]: the 2x2 patches, row by row."""
    return x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PIXELS)


def _image(patches: Tensor) -> Tensor:
    """The inverse of `_patches`."""
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)
