"""Divergences against traces in closed form, whatever way the products are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import event_shapes, generator, normal, seeds
from torch import Tensor

import scoresolve.divergence as divergence_module
from scoresolve.divergence import Differentiator, exact_divergence, hutchinson, walsh_signs
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.noise import Philox
from scoresolve.sde import EDM, VE, VP, CosineVP, GaussianSDE, RectifiedFlow, SubVP
from scoresolve.targets import random_mixture

PROCESSES = [VP(), SubVP(), CosineVP(), VE(), EDM(), RectifiedFlow()]


def named(sde: GaussianSDE) -> str:
    return type(sde).__name__


@given(seed=seeds(), event=event_shapes(), rows=st.integers(1, 3))
def test_divergence_of_a_linear_field_is_its_trace(
    seed: int, event: tuple[int, ...], rows: int
) -> None:
    size = math.prod(event)
    rng = generator(seed)
    matrix, x = normal(rng, size, size), normal(rng, rows, *event)

    def field(y: Tensor) -> Tensor:
        return (y.reshape(rows, size) @ matrix.mT).reshape(y.shape)

    value, divergence = exact_divergence(field, x)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(divergence, matrix.trace().expand(rows))
    probes = normal(rng, 4, rows, *event)
    value, terms = hutchinson(field, x, probes)
    z = probes.reshape(4, rows, size)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(terms.sum(2), torch.einsum("kbi,ij,kbj->kb", z, matrix, z))


@pytest.mark.parametrize("sde", PROCESSES, ids=named)
def test_divergence_of_a_mixture_score_is_its_closed_form(sde: GaussianSDE) -> None:
    model = random_mixture(5, 3).score_model(sde)
    x, t = normal(generator(0), 7, 5), torch.linspace(0.1, 0.9, 7, dtype=torch.float64) * sde.T
    _, divergence = exact_divergence(lambda y: model(y, t), x)
    torch.testing.assert_close(divergence, model.divergence(x, t), rtol=1e-9, atol=1e-9)


def test_groups_of_basis_vectors_and_probes_do_not_change_a_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, probes = normal(generator(0), 3, 11), normal(generator(1), 5, 3, 11)

    def field(y: Tensor) -> Tensor:
        return y.sin().cumsum(1) * y

    whole = exact_divergence(field, x)[1], hutchinson(field, x, probes)[1]
    for room in (1, 70):
        monkeypatch.setattr(divergence_module, "_ROOM", room)
        torch.testing.assert_close(exact_divergence(field, x)[1], whole[0])
        torch.testing.assert_close(hutchinson(field, x, probes)[1], whole[1])


class _Cube(torch.autograd.Function):
    """x^3 with a backward pass that cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert cotangent.shape == x.shape
        bool(cotangent.sum() > 1e300)  # reads a value, which vmap forbids
        return 3 * x**2 * cotangent


def test_a_network_without_batched_backward_is_differentiated_one_by_one() -> None:
    x, calls = normal(generator(0), 4, 3), []

    def field(y: Tensor) -> Tensor:
        calls.append(y)
        result: Tensor = _Cube.apply(y)
        return result

    _, divergence = exact_divergence(field, x)
    torch.testing.assert_close(divergence, (3 * x**2).sum(1))
    probes = Philox(0).signs(torch.empty(2, 4, 3, dtype=x.dtype), 0)
    torch.testing.assert_close(hutchinson(field, x, probes)[1].sum(2), divergence.expand(2, 4))
    assert len(calls) == 2


@pytest.mark.parametrize("parameter", [False, True], ids=["constant", "parameter"])
def test_a_field_that_ignores_x_has_no_divergence(parameter: bool) -> None:
    x = normal(generator(0), 4, 3)
    bias = torch.ones(4, 3, dtype=x.dtype, requires_grad=parameter)
    value, divergence = exact_divergence(lambda y: 2 * bias, x)
    assert bool((divergence == 0).all()) and bool((value == 2).all())
    assert not value.requires_grad
    terms = hutchinson(lambda y: 2 * bias, x, torch.ones(3, 4, 3, dtype=x.dtype))[1]
    assert terms.shape == (3, 4, 3) and bool((terms == 0).all())


@given(power=st.integers(0, 5), start=st.integers(0, 500))
def test_walsh_signs_are_orthogonal_over_a_period(power: int, start: int) -> None:
    size = 2**power
    like = torch.empty(0, dtype=torch.float64)
    start -= start % size
    rows = torch.stack([walsh_signs(start + n, size, like) for n in range(size)])
    torch.testing.assert_close(rows.mT @ rows, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(
        walsh_signs(3, max(1, size - 1), like), walsh_signs(3, size, like)[: size - 1 or 1]
    )


def test_divergence_errors_say_what_is_wrong() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ShapeError, match=r"\(4, 1\) for x of shape \(4, 3\)"):
        exact_divergence(lambda y: y[:, :1], x)
    with pytest.raises(ShapeError, match=r"probes of shape \(4, 3\)"):
        hutchinson(lambda y: y, x, x)
    with pytest.raises(ArgumentError, match="int64"):
        exact_divergence(lambda y: y, torch.zeros(4, 3, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_both_modes_take_the_same_products(mode: str) -> None:
    x, probes = normal(generator(0), 3, 5), normal(generator(1), 4, 3, 5)

    def field(y: Tensor) -> Tensor:
        return y.sin() * y.sum(1, keepdim=True)

    ways = Differentiator(mode)
    _, divergence = exact_divergence(field, x, ways)
    torch.testing.assert_close(divergence, exact_divergence(field, x)[1])
    terms = hutchinson(field, x, probes, ways)[1].sum(2)
    torch.testing.assert_close(terms, hutchinson(field, x, probes)[1].sum(2))
