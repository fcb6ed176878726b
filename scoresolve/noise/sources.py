"""Counter-based noise: every number is a pure function of its address.

The address is (seed, sample id, purpose, draw), laid out for Philox4x32-10 as

    key = seed,   counter = (block, draw, sample mod 2^32, sample >> 32 | purpose << 24),

and element `e` of a sample reads block `e // 4`. So sample 17 gets the same numbers whatever
the batch, the chunks, the threads, the order of work or the event shape.
"""

from __future__ import annotations

import hashlib
import operator
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.noise.philox import (
    MASK,
    Transform,
    fill,
    key_schedule,
    normals,
    open_interval,
    signs,
    uniforms,
    work_dtype,
)

__all__ = [
    "CallableNoise",
    "GeneratorNoise",
    "NoiseSource",
    "Philox",
    "Purpose",
    "Times",
    "as_noise",
    "check_like",
    "first_draw",
    "group_size",
]

Times: TypeAlias = tuple[float | Tensor, float | Tensor]

_SAMPLES: Final = 2**56


class Purpose(IntEnum):
    """What a number is drawn for; part of its address, so these values never change."""

    START = 0
    SOLVER = 1
    CORRECTOR = 2
    PROBE = 3
    DEQUANTISE = 4
    TARGET = 5
    BROWNIAN = 6
    CHAIN = 7
    ACCEPT = 8
    OBJECTIVE = 9
    DISTANCE = 10
    FORWARD = 11


class NoiseSource(ABC):
    """Where solvers get their randomness: every result is fresh, the caller may write into it.

    A source defines `normal`; unless it does better, a uniform number is `Phi(z)`, a sign is
    that of `z`, and the source does not tell samples apart, so that `rows` is the source itself.
    """

    @abstractmethod
    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """Standard normal numbers.

        Args:
            like: [B, *event], floating; gives shape, dtype and device.
            draw: number of the draw, in [0, 2^32); consecutive draws are the fastest.
            purpose: which stream.
            times: the step (t, s) that the noise drives, floats or [B]; only a source that
                follows a path or asks a user reads it.

        Returns:
            [B, *event] with the dtype and device of `like`.
        """

    def area(self, like: Tensor, draw: int, times: Times) -> Tensor:
        """Standard normal numbers for the area of the noise over a step against its chord.

        A source that follows no path has none: it draws a number of its own, at times (t, t).
        Arguments and result as in `normal`.
        """
        return self.normal(like, draw, times=(times[0], times[0]))

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        """Uniform numbers in the open interval (0, 1); arguments and result as in `normal`."""
        z = self.normal(like.to(work_dtype(like.dtype)), draw, purpose)
        return open_interval(torch.special.ndtr(z), like)

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        """Rademacher numbers, -1 or +1; arguments and result as in `normal`."""
        return torch.ones_like(like).copysign_(self.normal(like, draw, purpose))

    def rows(self, index: slice | Tensor) -> NoiseSource:
        """The source for the samples `index` of the batch: a slice, or [n] integers or mask."""
        return self

    def started(self, t: float) -> NoiseSource:
        """The source for a run that starts at time `t` inside the process.

        A run that goes on from where another ended must not meet the other's numbers again. A
        source whose numbers have no address gives new ones anyway and is returned itself.
        """
        return self


class Philox(NoiseSource):
    """Philox4x32-10 addressed by (seed, sample id, purpose, draw).

    Row `i` of a batch is the sample `first_sample + i`, or `samples[i]` when ids are given.
    Float64 and float32 results come from the same integers and agree to float32 rounding;
    float16 and bfloat16 are rounded from float32. No global generator is read or changed.

    Args:
        seed: in [0, 2^64).
        first_sample: id of row 0, in [0, 2^56).
        samples: [B] integers in [0, 2^56), the id of each row, instead of `first_sample`.

    Raises:
        ArgumentError: a number is not an integer or is out of range.
        ShapeError: `samples` is not one-dimensional.

    Source:
        Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, 2011;
        Box, Muller, "A note on the generation of random normal deviates", 1958.
    """

    def __init__(
        self, seed: int = 0, first_sample: int = 0, *, samples: Tensor | None = None
    ) -> None:
        self.seed = _integer("seed", seed, 2**64)
        self.first_sample = _integer("first_sample", first_sample, _SAMPLES)
        self.samples = None if samples is None else _checked_ids(samples)
        if samples is not None and self.first_sample:
            raise ArgumentError("first_sample and samples are both given: give one of them")
        self._ahead: dict[Purpose, _Ahead] = {}

    def __repr__(self) -> str:
        if self.samples is None:
            return f"Philox(seed={self.seed}, first_sample={self.first_sample})"
        return f"Philox(seed={self.seed}, samples=<{self.samples.numel()} ids>)"

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """Standard normal [B, *event]: elements 2j, 2j+1 of a row are one Box-Muller pair.

        While the calls ask for consecutive draws of a small state, the next ones are computed
        along (1, 2, 4, ... at a time), which changes the cost of a call and no number.
        """
        layout, past = (like.shape, like.dtype, like.device), self._ahead.get(purpose)
        count = 1
        if past is not None and past.layout == layout:
            if past.values is not None and past.first <= draw < past.end:
                return past.values[draw - past.first].clone()
            if draw == past.end:
                count = max(1, min(2 * (past.end - past.first), group_size(like)))
        z = self._draw(like, draw, purpose, normals, count)
        self._ahead[purpose] = _Ahead(layout, draw, draw + count, z if count > 1 else None)
        return z[0].clone() if count > 1 else z[0]

    def uniform(self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER) -> Tensor:
        """Uniform [B, *event], `(n + 1/2) / 2^32` rounded to the dtype and kept inside (0, 1)."""
        return self._draw(like, draw, purpose, uniforms)[0]

    def signs(self, like: Tensor, draw: int, purpose: Purpose = Purpose.PROBE) -> Tensor:
        """Rademacher [B, *event], the top bit of the element's word."""
        return self._draw(like, draw, purpose, signs)[0]

    def rows(self, index: slice | Tensor) -> Philox:
        """The same numbers for some of the samples.

        Args:
            index: a slice, or [n] integers or a mask. Without `samples` the batch has no known
                end, so a slice then starts at 0 or later and integers are not negative.

        Raises:
            ArgumentError: the index counts from an end that is not known, or is not an index.
        """
        if self.samples is not None:
            return Philox(self.seed, samples=self.samples[index])
        if isinstance(index, slice):
            start, stop, step = index.start or 0, index.stop, index.step or 1
            if start < 0 or step < 1 or (stop is None and step > 1) or (stop or 0) < 0:
                raise ArgumentError(
                    f"rows({index}) counts from the end of a batch that has no known end: "
                    "give Philox the ids as samples=, or a slice that counts up from its start"
                )
            if step == 1:
                return Philox(self.seed, self.first_sample + start)
            index = torch.arange(start, max(start, stop), step, device="cpu")
        elif index.dtype is torch.bool:
            index = index.nonzero().flatten()
        return Philox(self.seed, samples=_checked_ids(index) + self.first_sample)

    def started(self, t: float) -> Philox:
        """The same samples with another key, a hash of the seed and of `t` in float64."""
        packed = struct.pack("<Qd", self.seed, t)
        seed = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        if self.samples is not None:
            return Philox(seed, samples=self.samples)
        return Philox(seed, self.first_sample)

    def _ids(self, like: Tensor) -> Tensor:
        batch = like.shape[0]
        if self.samples is None:
            if self.first_sample + batch > _SAMPLES:
                raise ArgumentError(f"sample ids from {self.first_sample} on pass 2**56")
            return torch.arange(
                self.first_sample, self.first_sample + batch, device=like.device, dtype=torch.int64
            )
        if self.samples.numel() != batch:
            raise ShapeError(
                f"a batch of {batch} samples meets a source of {self.samples.numel()} sample ids: "
                "give one id per row, or take rows(...) of the source"
            )
        self.samples = self.samples.to(like.device)
        return self.samples

    def _draw(
        self, like: Tensor, draw: int, purpose: Purpose, transform: Transform, count: int = 1
    ) -> Tensor:
        """Draws `draw, ..., draw + count - 1` as [count, B, *event]."""
        check_like(like)
        _integer("draw", draw, 2**32)
        draws = torch.arange(draw, draw + count, device=like.device, dtype=torch.int64)
        return self.at(like, draws[:, None], purpose, transform)

    def at(self, like: Tensor, draws: Tensor, purpose: Purpose, transform: Transform) -> Tensor:
        """The numbers of draws [count, 1] or [count, B] as [count, B, *event]."""
        count, ids = draws.shape[0], self._ids(like)
        out = torch.empty((count, *like.shape), dtype=like.dtype, device=like.device)
        if out.numel():
            rows = (count, len(ids))
            fill(
                out.view(count * len(ids), -1),
                draws.expand(rows).reshape(-1, 1),
                (ids & MASK).expand(rows).reshape(-1, 1),
                (ids >> 32 | int(purpose) << 24).expand(rows).reshape(-1, 1),
                key_schedule(self.seed),
                transform,
            )
        return out


class GeneratorNoise(NoiseSource):
    """A `torch.Generator` as a source: numbers come in the order of the calls.

    `draw`, `purpose` and `times` are ignored, so results depend on the batch and on the order of
    work, and `rows` cannot give a subset the numbers that the whole batch would get.

    Args:
        generator: on any device; results are moved to the device of `like`.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """The generator's next standard normal numbers, [B, *event]."""
        check_like(like)
        z = torch.empty(like.shape, dtype=work_dtype(like.dtype), device=self.generator.device)
        return z.normal_(generator=self.generator).to(like)


class CallableNoise(NoiseSource):
    """A user's `fn(x, t, s) -> z`, standard normal of x's shape, as a source.

    The step goes from t to s; both are None for noise that belongs to no step (the start).
    `draw` and `purpose` are not passed on; for some rows, `fn` is called with those alone.

    Args:
        fn: called as `fn(x, t, s)`.

    Raises:
        ShapeError: at a draw, when `fn` returns something else than a tensor of x's shape.
        ArgumentError: `fn` fails where t and s are None. What it raises elsewhere keeps its type.
    """

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn

    def normal(
        self, like: Tensor, draw: int, purpose: Purpose = Purpose.SOLVER, times: Times | None = None
    ) -> Tensor:
        """A copy of `fn(like, *times)` in the dtype and on the device of `like`, [B, *event]."""
        check_like(like)
        try:
            z: object = self.fn(like, *(times or (None, None)))
        except Exception as error:
            if times is None:
                raise ArgumentError(
                    "the noise callable failed as noise(x, None, None), which asks for numbers "
                    f"that belong to no step, as those of the start: {type(error).__name__}: "
                    f"{error}; return normals there too, or give the start as x="
                ) from error
            error.add_note(f"raised by the noise callable for the step from t = {times[0]}")
            raise
        if not isinstance(z, Tensor) or z.shape != like.shape:
            given = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise ShapeError(
                f"the noise callable returned {given} for x of shape {tuple(like.shape)}: "
                "return a tensor with one standard normal number per element of x"
            )
        return z.detach().to(like, copy=True)


class _Ahead(NamedTuple):
    """Draws first, ..., end - 1 of one stream, with their values where more than one was made."""

    layout: tuple[torch.Size, torch.dtype, torch.device]
    first: int
    end: int
    values: Tensor | None


def as_noise(
    noise: NoiseSource | torch.Generator | Callable[..., Tensor] | None, seed: int = 0
) -> NoiseSource:
    """Anything a caller may pass as noise, as a `NoiseSource`.

    Args:
        noise: a source; a `torch.Generator`; a callable `fn(x, t, s)`; or None for `Philox(seed)`.
        seed: read when `noise` is None, in [0, 2^64).

    Raises:
        ArgumentError: `noise` is none of these, or the seed is out of range.
    """
    if noise is None:
        return Philox(seed)
    if isinstance(noise, NoiseSource):
        return noise
    if isinstance(noise, torch.Generator):
        return GeneratorNoise(noise)
    if type(noise).__module__.startswith("torchsde"):
        raise ArgumentError(
            f"{type(noise).__name__} gives increments over times, not normal numbers: give "
            "scoresolve's BrownianPath, or noise=lambda x, t, s: normals of its increment"
        )
    if callable(noise):
        return CallableNoise(noise)
    raise ArgumentError(
        f"noise is a {type(noise).__name__}: give a NoiseSource, a torch.Generator, "
        "a callable fn(x, t, s) or None"
    )


def first_draw(t: float) -> int:
    """Number of the first draw of a plan that starts at time `t` inside the process.

    A plan from T on counts its draws from 0. One that starts inside counts from a hash of `t` with
    the top bit set, so that a run that goes on from where another ended has numbers of its own:
    two ranges of n draws meet by a chance of n / 2^30.
    """
    digest = hashlib.blake2b(struct.pack("<d", t), digest_size=4).digest()
    return 2**31 | int.from_bytes(digest, "little") >> 2


def group_size(like: Tensor) -> int:
    """How many draws of a small state to compute in one go."""
    return (2**17 if like.device.type == "cpu" else 2**20) // max(1, like.numel())


def _integer(name: str, value: int, bound: int) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < bound:
        raise ArgumentError(
            f"{name} is {value!r}: give an integer in [0, 2**{bound.bit_length() - 1})"
        )
    return number


def _checked_ids(samples: Tensor) -> Tensor:
    if samples.ndim != 1:
        raise ShapeError(f"sample ids have shape {tuple(samples.shape)}: give one id per row, [B]")
    integral = not (samples.is_floating_point() or samples.is_complex()) and (
        samples.dtype is not torch.bool
    )
    if not integral or bool(((samples < 0) | (samples >= _SAMPLES)).any()):
        raise ArgumentError("sample ids are not integers in [0, 2**56): give such ids")
    return samples.to(torch.int64, copy=True)


def check_like(like: Tensor) -> None:
    if not like.is_floating_point():
        raise ArgumentError(f"noise of dtype {like.dtype} does not exist: give a floating tensor")
    if like.ndim == 0:
        raise ShapeError("noise needs a batch dimension: give a tensor [B, *event]")
