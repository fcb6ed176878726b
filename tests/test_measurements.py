"""Operators that are affine, complex or nonlinear, in any dtype and shape, and those refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import generator, normal
from torch import Tensor, nn

import scoresolve as ss
from scoresolve import guidance
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.guidance import Measurement
from scoresolve.models import from_x0
from scoresolve.sde import GaussianSDE

F64 = torch.float64
WORLDS = [ss.VP(), ss.EDM(), ss.RectifiedFlow()]
METHODS = [guidance.dps, guidance.pigdm, guidance.mmps]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def middle(sde: GaussianSDE, shift: float = 0.0) -> Tensor:
    """The time where log-SNR is `shift`."""
    return sde.time_from_log_snr(torch.tensor(shift, dtype=F64))


def states(sde: GaussianSDE, t: Tensor, mix: ss.GaussianMixture, rows: int = 3) -> Tensor:
    x0 = mix.sample(rows)
    return sde.alpha(t) * x0 + sde.sigma(t) * normal(generator(1), *x0.shape)


@pytest.mark.parametrize("sde", WORLDS, ids=repr)
@pytest.mark.parametrize(("size", "seen"), [(1, 1), (2, 1), (16, 5)])
def test_affine_operators_give_the_exact_posterior_of_gaussian_data(sde, size, seen):
    rng, std = generator(size), 0.4
    root, far = normal(rng, size, size), 10 + normal(rng, 1, size)
    mix = ss.GaussianMixture([1.0], far, (root @ root.mT + 0.1 * torch.eye(size))[None])
    even = ss.GaussianMixture([1.0], far, 0.7)
    a, b, y = normal(rng, seen, size), normal(rng, seen), 10 + normal(rng, seen)
    seen_by = Measurement(lambda x: x @ a.mT + b, std, y)
    with_adjoint = Measurement(lambda x: x @ a.mT + b, std, y, lambda v: v @ a)
    for shift in (-2.0, 2.0):
        t = middle(sde, shift)
        for law, build in (
            (mix, partial(guidance.mmps, iterations=3 * seen)),
            (even, partial(guidance.pigdm, data_variance=0.7)),
        ):
            x = states(sde, t, law)
            truth = law.condition(a, y - b, std).score_model(sde).predict("x0", x, t)
            for measurement in (seen_by, with_adjoint):
                model = build(law.score_model(sde), sde, measurement)
                close(model.predict("x0", x, t).detach(), truth, 1e-8)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=repr)
def test_a_complex_measurement_is_two_real_ones(sde):
    size, std = 6, 0.5
    rng, kept = generator(3), [0, 1, 3]
    mix = ss.GaussianMixture([0.4, 0.6], 3 + normal(rng, 2, size), 0.3)
    fourier = torch.fft.fft(torch.eye(size, dtype=F64), norm="ortho").mT[kept]
    both = torch.cat([fourier.real, fourier.imag])
    y = fourier @ mix.sample(1, seed=5)[0].to(fourier.dtype) + 0.1 * 1j

    def operator(x: Tensor) -> Tensor:
        return torch.fft.fft(x, norm="ortho")[:, kept]

    def adjoint(v: Tensor) -> Tensor:
        return torch.fft.ifft(
            v.new_zeros(len(v), size).index_add(1, torch.tensor(kept), v), norm="ortho"
        )

    t = middle(sde)
    x, inner = states(sde, t, mix), mix.score_model(sde)
    for build in METHODS:
        stacked = Measurement(both, std, torch.cat([y.real, y.imag]))
        expected = build(inner, sde, stacked).predict("x0", x, t)
        for measurement in (
            Measurement(fourier, std, y),
            Measurement(operator, std, y),
            Measurement(operator, std, y, adjoint),
        ):
            close(build(inner, sde, measurement).predict("x0", x, t), expected)
            as_rows = Measurement(measurement.operator, std, None, measurement.adjoint)
            model = build(inner, sde, as_rows)
            close(model.predict("x0", x, t, observation=y.expand(3, -1)), expected)


def curved(x: Tensor) -> Tensor:
    return torch.sinh(x[:, :1]) + x.square().sum(1, keepdim=True)


@pytest.mark.parametrize("sde", [ss.VP(), ss.RectifiedFlow()], ids=repr)
def test_nonlinear_operators_are_taken_at_the_denoised_state(sde):
    std, scale, v = 0.3, 0.7, 0.6
    mix = ss.GaussianMixture([0.5, 0.5], torch.tensor([[1.0, 0.5], [-0.5, 1.5]]), 0.4)
    y, t = torch.tensor([2.0], dtype=F64), middle(sde, 0.5)
    x, inner = states(sde, t, mix), mix.score_model(sde)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    leaf = x.clone().requires_grad_()
    square = (y - curved(inner.predict("x0", leaf, t))).square().sum()
    (gradient,) = torch.autograd.grad(square, leaf)
    found = guidance.dps(inner, sde, Measurement(curved, std, y), scale)
    close(found(x, t), inner(x, t) - scale / (2 * std**2) * gradient)
    mean, covariance = inner.posterior(x, t)
    for i in range(len(x)):
        at = mean[i : i + 1].detach()
        g = torch.autograd.functional.jacobian(lambda z: curved(z)[0], at)[:, 0]
        residual = y - curved(at)[0]
        even = v * sigma**2 / (v * alpha**2 + sigma**2)
        for model, spread in (
            (guidance.mmps(inner, sde, Measurement(curved, std, y)), covariance[i]),
            (
                guidance.pigdm(inner, sde, Measurement(curved, std, y), v),
                even * torch.eye(2, dtype=F64),
            ),
        ):
            u = torch.linalg.solve(g @ spread @ g.mT + std**2 * torch.eye(1, dtype=F64), residual)
            expected = at[0] + covariance[i] @ g.mT @ u
            close(model.predict("x0", x, t)[i], expected, 1e-8)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=repr)
def test_a_nonlinear_measurement_moves_towards_the_true_posterior_mean(sde):
    """The truth is a sum over a grid: E[x0 | x_t, y] of a Gaussian seen through x + x^3 / 3."""
    mean, std, y = 1.0, 0.4, torch.tensor([2.5], dtype=F64)
    mix = ss.GaussianMixture([1.0], torch.tensor([[mean]]), 0.25)

    def operator(x: Tensor) -> Tensor:
        return x + x**3 / 3

    points = torch.linspace(-3, 5, 4001, dtype=F64)
    for shift in (-1.0, 1.0, 3.0):
        t = middle(sde, shift)
        x = sde.alpha(t) * torch.tensor([[0.8], [1.2], [1.6]], dtype=F64)
        inner = mix.score_model(sde)
        log_weight = -((points - mean) ** 2) / 0.5 - (y - operator(points)) ** 2 / (2 * std**2)
        log_weight = log_weight - ((x - sde.alpha(t) * points) / sde.sigma(t)) ** 2 / 2
        truth = (log_weight.softmax(1) * points).sum(1, keepdim=True)
        gap = (inner.predict("x0", x, t) - truth).abs()
        found = guidance.mmps(inner, sde, Measurement(operator, std, y)).predict("x0", x, t)
        # the tangent leaves .23 of the gap at most, and all the more where A curves
        assert bool(((found - truth).abs() < 0.25 * gap + 0.02).all())


class Half(nn.Module):
    """A float32 network that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2).flatten(1))


@pytest.mark.parametrize("build", METHODS)
def test_operators_may_write_into_their_input_and_return_another_dtype(build):
    sde, t = ss.EDM(), torch.tensor(1.3, dtype=F64)
    module = Half().requires_grad_(False)
    matrix, y = 2 * module.layer.weight.detach().double(), normal(generator(0), 2)
    inner = from_x0(lambda x, t: torch.tanh(x), sde)
    x = normal(generator(4), 3, 2, 2)
    expected = build(inner, sde, Measurement(matrix, 0.5, y)).predict("x0", x, t)
    for operator in (module, lambda x: (x.mul_(1).flatten(1) @ matrix.mT).float()):
        model = build(inner, sde, Measurement(operator, 0.5, y))
        close(model.predict("x0", x, t), expected, 1e-5)
    low = build(inner, sde, Measurement(matrix, 0.5, y)).predict("x0", x.bfloat16(), t)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.05)
    empty = build(inner, sde, Measurement(matrix, 0.5, y)).predict("x0", x[:0], t)
    assert empty.shape == (0, 2, 2)


SDE, SIZE = ss.VP(), 3
INNER = ss.targets.random_mixture(SIZE, 2).score_model(SDE)
Y = torch.zeros(SIZE, dtype=F64)
WEIGHT = torch.zeros(SIZE, requires_grad=True)
MIX = torch.eye(3, dtype=F64) + 1


def posterior(operator: object, y: Tensor = Y, adjoint: object = None) -> Tensor:
    x = normal(generator(2), 3, SIZE)
    return guidance.mmps(INNER, SDE, Measurement(operator, 0.5, y, adjoint))(x, 0.5)


def test_a_first_call_of_one_row_does_not_hide_an_operator_that_mixes_rows():
    model = guidance.mmps(INNER, SDE, Measurement(lambda x: x - x.mean(0), 0.5, Y))
    x = normal(generator(2), 3, SIZE)
    model(x[:1], 0.5)
    with pytest.raises(ArgumentError, match="mixes the samples"):
        model(x, 0.5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: posterior(lambda x: MIX @ x), ArgumentError, "mixes the samples"),
        (lambda: posterior(lambda x: x.sum()), ShapeError, "one measurement for each row"),
        (lambda: posterior(lambda x: x.tolist()), ShapeError, "operator returned list"),
        (lambda: posterior(lambda x: (4 * x).round()), ArgumentError, "moves in steps"),
        (lambda: posterior(lambda x: x.detach()), ArgumentError, "no gradient in its input"),
        (lambda: posterior(lambda x: (x > 0).long()), ArgumentError, "no gradient in its input"),
        (lambda: posterior(torch.tanh, Y, lambda v: v), ArgumentError, "is not linear"),
        (lambda: posterior(lambda x: 3 * x, Y, lambda v: v), ArgumentError, "another adjoint"),
        (lambda: posterior(lambda x: x, Y, lambda v: v[:1]), ShapeError, "adjoint returned"),
        (lambda: posterior(lambda x: x, Y + 0j), ArgumentError, "complex where the operator"),
        (lambda: posterior(lambda x: x + 0j, Y), ShapeError, "real and imaginary part last"),
        (lambda: posterior(lambda x: x, Y[:1]), ShapeError, "observation of shape"),
        (lambda: posterior(lambda x: x, Y[None]), ShapeError, "observation of shape"),
        (lambda: posterior(lambda x: x, Y * torch.nan), ArgumentError, "not finite"),
        (lambda: posterior(lambda x: x, [0.0, 0.0]), ArgumentError, "observation is list"),
        (lambda: posterior(7), ArgumentError, "operator is int"),
        (lambda: posterior(MIX * torch.nan), ArgumentError, "operator is not finite"),
        (lambda: posterior(MIX, Y, lambda v: v), ArgumentError, "its own adjoint"),
        (lambda: Measurement(MIX, "0.5"), ArgumentError, "noise_std"),
        (lambda: guidance.mmps(INNER, SDE, MIX), ArgumentError, "measurement is Tensor"),
        (lambda: guidance.dps(INNER, None, Measurement(MIX, 0.5)), ArgumentError, "sde is None"),
        (
            lambda: guidance.mmps(
                from_x0(lambda x, t: WEIGHT.expand_as(x), SDE), SDE, Measurement(MIX, 0.5, Y)
            )(torch.zeros(2, SIZE), 0.5),
            ArgumentError,
            "no gradient in x",
        ),
    ],
)
def test_operators_and_observations_that_cannot_be_right_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
