"""Starts from data, and paths between latents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, event_shapes, generator, normal, processes, seeds
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.latents import noised, slerp
from scoresolve.noise import Philox, Purpose
from scoresolve.sde import VP


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(sde=processes(), shape=event_shapes(), dtype=dtypes(), u=st.floats(0, 1), seed=seeds())
def test_noised_states_are_alpha_x0_plus_sigma_noise_row_by_row(sde, shape, dtype, u, seed):
    x0, t = normal(generator(0), 5, *shape).to(dtype), u * sde.T
    found = noised(sde, x0, t, seed)
    z = Philox(seed).normal(x0, 0, Purpose.FORWARD)
    assert found.dtype == dtype
    close(found, sde.alpha(t).to(dtype) * x0 + sde.sigma(t).to(dtype) * z, 1e-5, 1e-5)
    close(noised(sde, x0[2:], t, noise=Philox(seed, 2)), found[2:], 0, 0)
    rows = noised(sde, x0, torch.full((5,), t, dtype=torch.float64), seed)
    close(rows, found, 1e-6, 1e-6)
    close(noised(sde, x0, 0.0)[:0], x0[:0])


def test_noised_data_have_the_exact_marginal_and_go_back_to_the_data():
    sde, mix, t = VP(), ss.targets.ring(), 0.4
    x0 = mix.sample(20000)
    x = noised(sde, x0, t, seed=1)
    law = mix.marginal(sde, t)
    close(x.mean(0), law.mean, 0, 4 / 20000**0.5)
    close(torch.cov(x.T), law.covariance, 0, 6 * float(law.covariance.max()) / 20000**0.5)
    out = ss.sample(mix.score_model(sde), sde, x=x[:2000], t_start=t, steps=60)
    close(torch.cov(out.x.T), mix.covariance, 0, 6 * float(mix.covariance.max()) / 2000**0.5)


@given(shape=event_shapes(), dtype=dtypes(), f=st.floats(-0.5, 1.5), seed=seeds())
def test_points_of_the_arc_keep_length_and_divide_the_angle(shape, dtype, f, seed):
    rng = generator(seed)
    a = torch.nn.functional.normalize(normal(rng, 3, *shape, 2).flatten(1), dim=1)
    b = torch.nn.functional.normalize(normal(rng, 3, *shape, 2).flatten(1), dim=1)
    event = (3, *shape, 2)
    point = slerp(2 * a.reshape(event).to(dtype), 2 * b.reshape(event).to(dtype), f)
    assert point.shape == event and point.dtype == dtype
    rows = point.flatten(1).double()
    tolerance = 1e-7 if dtype is torch.float64 else 1e-3
    theta = torch.acos((a * b).sum(1).clamp(-1, 1))
    clear = (theta > 0.1) & (theta < 3.0)
    close(rows.norm(dim=1)[clear], torch.full((3,), 2.0).double()[clear], tolerance, tolerance)
    reached = (rows * a).sum(1) / 2
    close(reached[clear], (f * theta).cos()[clear], tolerance, tolerance)


def test_ends_are_the_latents_and_many_fractions_are_stacked():
    a, b = normal(generator(0), 4, 2, 3), normal(generator(1), 4, 2, 3)
    path = slerp(a, b, [0.0, 0.3, 1.0])
    assert path.shape == (3, 4, 2, 3)
    close(path[0], a)
    close(path[1], slerp(a, b, 0.3))
    close(path[2], b)
    close(slerp(a[1:2], b[1:2], 0.3), slerp(a, b, 0.3)[1:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parallel_opposite_and_zero_latents_are_joined_by_a_line(dtype):
    a = normal(generator(0), 1, 6).to(dtype).expand(4, 6)
    b = torch.stack([2 * a[0], -a[0], torch.zeros_like(a[0]), a[0] * (1 + 1e-9)])
    close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, 1e-6, 1e-6)
    near = a + 1e-3 * normal(generator(1), 4, 6).to(dtype)
    close(slerp(a, near, 0.5), (a + near) / 2, 1e-5, 1e-5)


def test_interpolated_latents_decode_to_samples_along_the_flow():
    sde, mix = VP(), ss.targets.gaussian([1.0, -1.0], [0.5, 2.0])
    model = mix.score_model(sde)
    z = ss.encode(model, sde, mix.sample(2)).x
    x = ss.sample(model, sde, x=slerp(z[:1], z[1:], [0.0, 1.0]).flatten(0, 1), solver="dopri5").x
    close(x, mix.sample(2), 1e-3, 1e-3)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: noised(VP(), X, 1.5), ArgumentError, "leaves the interval"),
        (lambda: noised(VP(), X, torch.zeros(3)), ShapeError, "one for each row"),
        (lambda: noised(VP(), X.long(), 0.5), ArgumentError, "floating"),
        (lambda: noised(ss.Langevin(lambda x: x), X, 0.5), ArgumentError, "Gaussian process"),
        (lambda: slerp(X, X[:1], 0.5), ShapeError, "one shape"),
        (lambda: slerp(X, X, torch.zeros(2, 2)), ShapeError, "fractions"),
        (lambda: slerp(X.long(), X, 0.5), ArgumentError, "floating"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_half_precision_is_rounded_once_at_the_end() -> None:
    """A fraction of .3 is .30078 in bfloat16, and an angle has two digits."""
    a, b = normal(generator(0), 4, 64).bfloat16(), normal(generator(1), 4, 64).bfloat16()
    found = slerp(a, b, [0.3, 0.9])
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, slerp(a.double(), b.double(), [0.3, 0.9]).bfloat16())


def test_what_is_no_state_or_fraction_is_refused() -> None:
    x = torch.ones(3, 2)
    for call in (
        lambda: noised(VP(), x.long(), 0.5),
        lambda: noised(VP(), 1.0, 0.5),
        lambda: noised(VP(), x, float("nan")),
        lambda: slerp(x, x, float("nan")),
    ):
        with pytest.raises(ArgumentError):
            call()
    assert slerp(x[:0], x[:0], [0.1, 0.2]).shape == (2, 0, 2)
