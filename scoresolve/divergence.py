r"""The divergence of a vector field v on states x [B, *event], by products with its Jacobian.

With J the Jacobian of a row of v with respect to the same row of x, and D event elements,

    div v = sum_i e_i^T J e_i            exact, D products with the basis vectors
          = E[z^T J z],  E[z z^T] = I    Hutchinson, one product per probe z

One evaluation serves all products of a point. They are taken many at a time, as far as memory
allows, in whatever way the network supports: backward passes in one batch, backward passes one by
one, or forward mode. The field must treat the rows of the batch independently.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from scoresolve.errors import ArgumentError, ShapeError, check_output, known_name
from scoresolve.models import Model, NetworkModel, conversion
from scoresolve.plans import check_state
from scoresolve.precision import host
from scoresolve.sde import SDE, GaussianSDE, TimeLike, as_time

__all__ = [
    "MODES",
    "Differentiator",
    "check_constant",
    "exact_divergence",
    "full_precision",
    "hutchinson",
    "velocity_parts",
    "walsh_signs",
    "watched",
]

Field = Callable[[Tensor], Tensor]

MODES: Final = ("auto", "reverse", "forward")

# Elements of x copied at once into a batched backward pass, unless one row more is needed.
_ROOM: Final = 2**20


class Differentiator:
    """Takes products with the Jacobian of a field, and remembers which way its network allows.

    Reverse mode gives J^T z, forward mode J z; for z^T J z either will do. Reverse mode costs about
    one evaluation a product, and memory for the graph. Forward mode keeps no graph and also sees
    through a network that runs under `torch.no_grad`. The field may write into what it is given.

    Args:
        mode: "reverse", "forward", or "auto": reverse, batched if the network's backward passes
            can be, and forward for a network whose output has no gradient.

    Raises:
        UnknownNameError: another mode.
    """

    def __init__(self, mode: str = "auto") -> None:
        self.mode, self.batched = known_name("mode", mode, MODES), True
        self._watched = False

    def __call__(self, fn: Field, x: Tensor) -> tuple[Tensor, Field]:
        """The field's value at `x`, and the map from vectors [n, *x.shape] to their products.

        Raises:
            ArgumentError: the field depends on `x`, and yet has no gradient. That of a field that
                is constant is 0.
        """
        check_state(x)
        if self.mode == "forward":
            return self._forward(fn, x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = fn(leaf.clone())  # autograd lets nobody write into a leaf
        if self.mode == "forward":  # as `watch` found
            return self._forward(fn, x)
        check_output(value, x)
        if value.requires_grad:
            return value.detach(), partial(
                self._pull_back, functools.cache(partial(check_constant, fn, x, value)), value, leaf
            )
        if self.mode == "auto":
            return self._forward(fn, x)
        check_constant(fn, x, value)
        return value, torch.zeros_like

    def watch(self, network: Field, y: Tensor, m: Tensor) -> None:
        """Make sure, the first time, that `network`, of value `m` at `y`, is differentiated.

        Its field may add terms of its own, whose gradient would hide that it has none.

        Raises:
            ArgumentError: as for a call.
        """
        if self._watched:
            return
        self._watched = True
        if forward_ad.unpack_dual(m).tangent is not None:  # type: ignore[no-untyped-call]
            return
        if m.requires_grad and y.requires_grad:
            with full_precision(y):
                (found,) = torch.autograd.grad(m.sum(), y, retain_graph=True, allow_unused=True)
            if found is not None:
                return
        elif self.mode == "auto" and y.requires_grad:
            self.mode, self._watched = "forward", False
            return
        check_constant(network, y, m)

    def _pull_back(
        self, constant: Callable[[], None], value: Tensor, leaf: Tensor, vectors: Tensor
    ) -> Tensor:
        def gradient(vector: Tensor, batched: bool) -> Tensor:
            with full_precision(leaf):
                (product,) = torch.autograd.grad(
                    value,
                    leaf,
                    vector.to(value.dtype),
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            if product is None:  # parameters alone give an output a gradient
                constant()
                return torch.zeros_like(vector)
            return product

        if self.batched and len(vectors) > 1:
            try:
                return gradient(vectors, True)
            except RuntimeError:
                self.batched = False  # a compiled or custom backward pass may not be batched
        return torch.stack([gradient(vector, False) for vector in vectors])

    def _forward(self, fn: Field, x: Tensor) -> tuple[Tensor, Field]:
        def push(vector: Tensor) -> tuple[Tensor, Tensor | None]:
            with torch.no_grad(), forward_ad.dual_level():
                dual = fn(forward_ad.make_dual(x.detach().clone(), vector))  # type: ignore[no-untyped-call]
                check_output(dual, x)
                value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
            return value, tangent

        def products(vectors: Tensor) -> Tensor:
            found = [push(vector)[1] for vector in vectors]
            return torch.stack(
                [
                    torch.zeros_like(vector) if tangent is None else tangent
                    for tangent, vector in zip(found, vectors, strict=True)
                ]
            )

        value, tangent = push(torch.ones_like(x))
        if tangent is None:
            check_constant(fn, x, value)
            return value, torch.zeros_like
        self.mode = "forward"
        return value, products


def check_constant(fn: Field, x: Tensor, value: Tensor) -> None:
    """Raise `ArgumentError` unless a field that has no gradient is constant, as that would mean.

    Args:
        fn: the field.
        x: where its gradient is missing, [B, *event].
        value: of the field there.
    """
    with torch.no_grad():
        at, size = x.detach(), math.prod(x.shape[1:])
        ramp = torch.linspace(1, 2, size, dtype=x.dtype, device=x.device).reshape(x.shape[1:])
        other = fn(at + ramp * (1 + at.abs()))  # elements move apart, so that nothing cancels
        same = torch.equal(other.nan_to_num(), value.detach().nan_to_num())
    if not same:
        raise ArgumentError(
            "the model's output depends on x but has no gradient with respect to it, so its "
            "divergence is not to be had: if the network detaches x or runs under "
            "torch.no_grad, undo that"
        )


def watched(model: Model, differentiator: Differentiator) -> Model:
    """A model whose network, if it is inside of another model, is seen to have a gradient.

    Terms in x that the outer model adds, as one of another process does, would hide that it has
    none.

    Args:
        model: any; one that is itself made of a network is returned as it is.
        differentiator: it watches.
    """
    inner = getattr(model, "model", None)
    if not isinstance(inner, Model):
        return model
    outer = copy.copy(model)
    twin: Any = watched(inner, differentiator)
    if isinstance(inner, NetworkModel):
        twin = copy.copy(inner)
        name = "asked" if inner.bind("x0")[1] == inner.asked else "native"
        call: Callable[..., Tensor] = getattr(inner, name)

        def seen(x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
            m = call(x.clone(), t, **cond)
            if isinstance(m, Tensor):
                differentiator.watch(lambda y: call(y, t, **cond), x, m)
            return m

        setattr(twin, name, seen)
    outer.model = twin  # type: ignore[attr-defined]
    return outer


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast leaves the arithmetic on the device of `x` alone.

    A backward pass runs in the precision of the forward pass only outside of autocast.
    """
    kind = x.device.type
    enabled = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def exact_divergence(
    fn: Field, x: Tensor, differentiator: Differentiator | None = None
) -> tuple[Tensor, Tensor]:
    """The field and its divergence, sum_i e_i^T J e_i.

    Args:
        fn: the field, [B, *event] -> [B, *event]; row i of its value depends on row i of x alone.
        x: [B, *event], real floating point; its own gradient history is not continued.
        differentiator: takes the products; a new one if omitted.

    Returns:
        The value [B, *event] and the divergence [B], both without history.

    Raises:
        ArgumentError: `x` is not floating point, or `fn` depends on it without a gradient.
        ShapeError: `x` has no batch axis, or `fn` returns another shape.

    Source:
        Chen et al. 2018 (1806.07366), section 4, for the trace in the flow of a density.
    """
    value, products = (differentiator or Differentiator())(fn, x)
    size = math.prod(x.shape[1:])
    total = x.new_zeros(x.shape[0])
    index = torch.arange(size, device=x.device)
    for part in _groups(size, x):
        basis = (index[part, None] == index).to(x.dtype)
        vectors = basis[:, None].expand(-1, x.shape[0], -1).reshape(-1, *x.shape)
        rows = products(vectors).reshape(len(basis), x.shape[0], size)
        total += rows[..., part].diagonal(dim1=0, dim2=2).sum(1)
    return value, total


def hutchinson(
    fn: Field, x: Tensor, probes: Tensor, differentiator: Differentiator | None = None
) -> tuple[Tensor, Tensor]:
    """The field and the terms z_i (J^T z)_i whose sum over i estimates its divergence.

    Args:
        fn: as in `exact_divergence`.
        x: [B, *event], real floating point.
        probes: z, [K, B, *event], each with mean 0 and covariance I.
        differentiator: takes the products, J z in forward mode; a new one if omitted.

    Returns:
        The value [B, *event] and the terms [K, B, D], both without history.

    Raises:
        ArgumentError: `x` is not floating point, or `fn` depends on it without a gradient.
        ShapeError: `x` has no batch axis, `probes` does not fit, or `fn` returns another shape.

    Source:
        Hutchinson 1990; Grathwohl et al. 2019 (1810.01367), eq. 7.
    """
    if probes.shape[1:] != x.shape:
        raise ShapeError(
            f"probes of shape {tuple(probes.shape)} for x of shape {tuple(x.shape)}: "
            "give [K, *x.shape]"
        )
    value, products = (differentiator or Differentiator())(fn, x)
    terms = [products(probes[part]) * probes[part] for part in _groups(len(probes), x)]
    return value, torch.cat(terms).reshape(len(probes), len(x), -1)


def velocity_parts(
    model: Model, sde: SDE, x: Tensor, t: TimeLike, differentiator: Differentiator
) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
    """u, w [B] and the network m of the velocity v = u x + w m(x, t), where only m is unknown.

    Where the drift of the process may be anything, m is the velocity itself.

    Args:
        model: a model of `sde`.
        sde: the process.
        x: [B, *event].
        t: [] or [B].
        differentiator: what will differentiate m; it watches that the network has a gradient,
            where the drift of the process would hide that it has none.
    """
    if not isinstance(sde, GaussianSDE):

        def flow(y: Tensor, t: TimeLike, **cond: Any) -> Tensor:
            if not isinstance(model, NetworkModel):
                return model.predict("flow", y, t, **cond)

            def network(state: Tensor) -> Tensor:
                return model.native(state, t, **cond)

            score = network(y.clone())
            differentiator.watch(network, y, score)
            return sde.probability_flow_drift(y, t, lambda *_: score)

        return x.new_zeros(len(x)), x.new_ones(len(x)), flow
    prediction, network = watched(model, differentiator).bind("flow")
    parts = conversion(prediction, "flow", sde.point(as_time(t, x)))
    u, w = (c if isinstance(c, Tensor) else host(c) for c in parts)
    u, w = (c.expand(len(x)).to(x) for c in (u, w))
    return u, w, network


def walsh_signs(row: int, size: int, like: Tensor) -> Tensor:
    """The first `size` signs of a row of the Walsh matrix of order P = 2^k >= `size`.

    w_i = (-1)^popcount(i & g), with g from the Gray code of the row times an odd number near
    0.618 P, modulo P. Probes z * w with one z and any P consecutive rows are orthogonal to one
    another, where their mean of z^T J z is the trace. Over fewer rows, and when J changes slowly
    meanwhile, most pairs of elements cancel; the factor keeps any pair from cancelling late.

    Args:
        row: at least 0; it repeats with period P.
        size: number of signs, at most 2^31.
        like: gives dtype and device.

    Returns:
        -1 and +1, [size].

    Source:
        Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix" (Hadamard
        probes); the order of the rows is this package's.
    """
    period = 1 << max(0, size - 1).bit_length()
    row = row * (int(0.6180339887 * period) | 1) % period
    bits = torch.arange(size, device=like.device) & (row ^ row >> 1)
    for shift in (16, 8, 4, 2, 1):
        bits = bits ^ bits >> shift
    return (1 - 2 * (bits & 1)).to(like.dtype)


def _groups(count: int, x: Tensor) -> Iterator[slice]:
    size = max(1, _ROOM // max(1, x.numel()))
    return (slice(first, first + size) for first in range(0, count, size))
