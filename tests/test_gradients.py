"""Gradients through solvers against finite differences, one another and the exact score."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import BenesSDE, OwnVP, Well, generator, normal, wells
from torch import Tensor, nn

import scoresolve as ss
from scoresolve.errors import ArgumentError, GridError, SolveError, UnknownNameError
from scoresolve.gradients import (
    MODES,
    differentiable_log_likelihood,
    differentiable_sample,
)
from scoresolve.plans import Linear, Run
from scoresolve.sde import SDE, GaussianSDE
from scoresolve.solvers import REGISTRY, Solver

VP = ss.VP()


class Network(nn.Module):
    """A smooth prediction of the noise in three dimensions, near that of N(0, I)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width).double(), nn.Linear(width, 3).double()
        for parameter in self.parameters():
            size = 0.5 * (8 / width) ** 0.5
            parameter.data = size * normal(generator(parameter.numel()), *parameter.shape)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        hidden = torch.sin(self.first(torch.cat([x + shift, t[:, None]], 1)))
        return 0.5 * x + 0.3 * self.last(hidden)


def start(batch: int = 2) -> Tensor:
    return normal(generator(1), batch, 3)


def both_gradients(value: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of sum(w * value) to x and the parameters, with fixed weights w."""
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(weighted(value(x)), [x, *net.parameters()]))


def weighted(result: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype)
    return (weight.reshape(result.shape) * result).sum()


def slope_error(value: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> float:
    """Relative error of the gradients along random directions, by central differences.

    The differences themselves are good to some 1e-8.
    """
    gradients, step, worst = both_gradients(value, net, x), 1e-5, 0.0
    for i, (tensor, gradient) in enumerate(
        zip([x.clone(), *(p.data for p in net.parameters())], gradients, strict=True)
    ):
        way = normal(generator(i), *tensor.shape)
        way /= way.norm()
        at, ends = x if i else tensor, []
        with torch.no_grad():
            for sign in (1, -1):
                tensor += sign * step * way
                ends.append(float(weighted(value(at))))
                tensor -= sign * step * way
        found = (ends[0] - ends[1]) / (2 * step)
        worst = max(worst, abs(found - float((way * gradient).sum())) / float(gradient.norm()))
    return worst


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a gradient, as a share of its norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


INNER = ss.make_grid("quadratic", VP, 16, 0.9, 0.05)


@pytest.mark.parametrize(
    ("mode", "options", "bound"),
    [
        ("direct", {"solver": "auto", "steps": 6}, 1e-6),
        ("checkpoint", {"solver": "auto", "steps": 6}, 1e-6),
        ("reverse", {"solver": "heun", "grid": INNER}, 1e-6),
        ("adjoint", {"solver": "rk4_flow", "grid": INNER, "refine": 2}, 1e-3),
    ],
)
def test_gradients_of_samples_are_finite_differences(mode, options, bound):
    net = Network()
    model = ss.from_eps(net, VP)

    def value(x: Tensor) -> Tensor:
        return differentiable_sample(model, VP, x, mode=mode, **options)

    assert slope_error(value, net, start()) < bound


@pytest.mark.parametrize("sde", [VP, ss.EDM(), ss.RectifiedFlow()], ids=str)
def test_the_adjoint_tends_to_the_gradient_of_the_plan_as_the_plan_does_to_the_flow(sde):
    net = Network()
    model = ss.from_eps(net, VP).on(sde)
    x = sde.prior_std * start()

    def gap(solver: str, steps: int, refine: int) -> float:
        grid = ss.make_grid("quadratic", sde, steps, 0.9 * sde.T, 0.05 * sde.T)

        def value(mode: str, **options: int) -> list[Tensor]:
            return both_gradients(
                lambda y: differentiable_sample(
                    model, sde, y, solver=solver, grid=grid, mode=mode, **options
                ),
                net,
                x,
            )

        return distance(value("adjoint", refine=refine), value("direct"))

    euler = [gap("euler_flow", steps, 1) for steps in (40, 80)]
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(euler))
    fine = [gap("rk4_flow", steps, 1) for steps in (16, 32)]
    assert fine[0] > 10 * fine[1] and fine[1] < 1e-3


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        ("auto", None),
        ("ab3_v", None),
        ("dpmpp_2m", [0.9, 0.7, 0.5, 0.3, 0.2]),
        ("ddpm", None),
        ("sa_solver", None),
        ("heun", ss.Grid((0.9, 0.6, 0.3, 0.1), denoise=True)),
        ("euler_maruyama", ss.Grid((0.9, 0.6, 0.3, 0.1), denoise=True)),
    ],
)
@pytest.mark.parametrize("segment", [None, 1, 2, 100])
def test_recomputation_changes_no_number(solver, grid, segment):
    net = Network()
    model = ss.from_eps(net, VP)

    def value(mode: str, segment: int | None = None) -> Callable[[Tensor], Tensor]:
        options = {"solver": solver, "steps": 7, "grid": grid, "seed": 3}
        return lambda x: differentiable_sample(
            model, VP, x, mode=mode, segment=segment, shift=0.1, **options
        )

    direct = both_gradients(value("direct"), net, start())
    assert distance(both_gradients(value("checkpoint", segment), net, start()), direct) < 1e-12
    reference = value("direct")(start()).detach()
    torch.testing.assert_close(value("checkpoint", segment)(start()).detach(), reference)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "rk4_flow", "dpmpp_2s"])
@pytest.mark.parametrize("denoise", [False, True])
def test_a_path_that_is_undone_step_by_step_gives_the_gradients_of_the_plan(solver, denoise):
    net, x = Network(), start()
    model = ss.from_eps(net, VP)

    def value(mode: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        grid = ss.Grid(INNER.times, denoise)
        return both_gradients(
            lambda y: differentiable_sample(model, VP, y, solver=solver, grid=grid, mode=mode),
            net,
            x.to(dtype),
        )

    direct = value("direct")
    assert distance(value("reverse"), direct) < 1e-10
    single = [gradient.double() for gradient in value("reverse", torch.float32)]
    assert distance(single, direct) < 1e-4


def test_a_step_that_cannot_be_undone_is_refused():
    target = ss.targets.ring()
    x = torch.tensor([[0.3, -0.2]]).double().requires_grad_()
    out = differentiable_sample(
        target.score_model(VP), VP, x, solver="ddim", steps=2, mode="reverse"
    )
    with pytest.raises(SolveError, match="finer grid"):
        out.sum().backward()


@pytest.mark.parametrize(
    "solver", [name for name, make in REGISTRY.items() if isinstance(make(), Solver)]
)
def test_every_solver_can_be_recomputed(solver):
    model = ss.targets.random_mixture(2, components=2).score_model(VP)
    x, grid = start()[:, :2].requires_grad_(), [0.9, 0.7, 0.5, 0.35, 0.2]
    gradients = []
    for mode, segment in (("direct", None), ("checkpoint", 1), ("checkpoint", 3)):
        out = differentiable_sample(
            model, VP, x, solver=solver, grid=grid, mode=mode, segment=segment
        )
        gradients.append(torch.autograd.grad(weighted(out), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


class Echo(Solver):
    """A solver that uses the noise of a step again in the next one."""

    name, predicts, order, stochastic, source = "echo", "score", None, True, "this test"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        z = run.noise(t, s)
        last = z if run.index == 0 else self.last
        self.last = z
        return x + 0.1 * run.predict(x, t) + 0.1 * z + 0.1 * last


def test_noise_that_outlives_its_segment_is_kept():
    net = Network()
    model = ss.from_eps(net, VP)
    direct, recomputed = (
        both_gradients(
            lambda x: differentiable_sample(model, VP, x, solver=Echo(), steps=4, mode=mode),  # noqa: B023
            net,
            start(),
        )
        for mode in ("direct", "checkpoint")
    )
    assert distance(recomputed, direct) < 1e-12


def test_every_mode_gives_the_values_of_sample():
    net = Network()
    model, grid = ss.from_eps(net, VP), ss.Grid((0.9, 0.5, 0.3, 0.1), denoise=True)
    expected = ss.sample(model, VP, x=start(), solver="heun", grid=grid).x
    for mode in MODES:
        found = differentiable_sample(model, VP, start(), solver="heun", grid=grid, mode=mode)
        torch.testing.assert_close(found.detach(), expected)
        assert found.requires_grad
        with torch.no_grad():
            quiet = differentiable_sample(model, VP, start(), solver="heun", grid=grid, mode=mode)
        assert not quiet.requires_grad
    noisy = ss.sample(model, VP, x=start(), solver="ddpm", grid=grid, seed=3).x
    found = differentiable_sample(model, VP, start(), solver="ddpm", grid=grid, seed=3)
    torch.testing.assert_close(found.detach(), noisy)


@pytest.mark.parametrize(
    ("solver", "mode"),
    [
        ("euler_maruyama", "checkpoint"),
        ("heun_flow", "checkpoint"),
        ("heun_flow", "reverse"),
        ("heun_flow", "adjoint"),
    ],
)
def test_a_process_with_a_drift_of_its_own_has_its_gradients(solver, mode):
    sde, net = BenesSDE(), Network()
    grid = ss.make_grid("uniform", sde, 40, 1.4, 0.2)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -net(x, t)

    found, direct = (
        both_gradients(
            lambda x: differentiable_sample(score, sde, x, solver=solver, grid=grid, mode=each),  # noqa: B023
            net,
            start(),
        )
        for each in (mode, "direct")
    )
    assert distance(found, direct) < (1e-2 if mode == "adjoint" else 1e-10)


class Scene(Network):
    """A network of two experts, one for each half of time."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Parameter(torch.ones(3).double())
        self.late = nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return (self.early if float(t[0]) > 0.5 else self.late) * super().forward(x, t, shift)


@pytest.mark.parametrize("mode", MODES)
def test_all_that_the_network_uses_gets_its_gradient(mode):
    net, shift = Scene(), torch.full((1, 3), 0.2, dtype=torch.float64, requires_grad=True)
    model = ss.from_eps(net, VP)

    def value(x: Tensor) -> Tensor:
        return differentiable_sample(
            model, VP, x, solver="rk4_flow", steps=40, mode=mode, shift=shift
        )

    found = both_gradients(value, net, start())
    direct = both_gradients(
        lambda x: differentiable_sample(
            model, VP, x, solver="rk4_flow", steps=40, mode="direct", shift=shift
        ),
        net,
        start(),
    )
    assert all(bool(gradient.any()) for gradient in found)
    # an expert ends at t = 0.5, where the adjoint's nodes do not lie: an error of one step
    assert distance(found, direct) < (0.05 if mode == "adjoint" else 1e-12)
    (gradient,) = torch.autograd.grad(value(start()).sum(), shift)
    assert bool(gradient.any())
    moved = shift * 1.0
    if mode != "direct":
        with pytest.raises(ArgumentError, match="leaf"):
            differentiable_sample(model, VP, start(), mode=mode, solver="ddim", shift=moved)


class Held:
    """Counts the numbers that autograd holds at a time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        box = _Box([tensor])
        size = tensor.numel()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self.drop, size)
        return box

    def drop(self, size: int) -> None:
        self.now -= size


class _Box(list[Tensor]):
    """A list that can be watched."""

    __slots__ = ("__weakref__",)


def memory(mode: str, steps: int, target: str, segment: int | None = None) -> int:
    """The most numbers saved at a time, in forward and backward pass together."""
    net, held = Network(64), Held()
    model, x = ss.from_eps(net, VP), start().requires_grad_()
    weights = sum(parameter.numel() for parameter in net.parameters())
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box[0]):
        if target == "sample":
            result = differentiable_sample(
                model, VP, x, solver="euler_flow", steps=steps, mode=mode, segment=segment
            )
        else:
            result = differentiable_log_likelihood(
                model, VP, x, steps=steps // 4, mode=mode, segment=segment
            )
        result.sum().backward()
    del result
    return held.peak - weights


@pytest.mark.parametrize("mode", ["reverse", "adjoint"])
@pytest.mark.parametrize("target", ["sample", "likelihood"])
def test_going_back_from_the_end_the_memory_does_not_grow_with_the_steps(target, mode):
    few, many = (memory(mode, steps, target) for steps in (32, 128))
    assert few == many
    direct = [memory("direct", steps, target) for steps in (32, 128)]
    assert direct[1] > 3.5 * direct[0] and direct[0] > few


def test_the_memory_of_recomputation_grows_with_the_root_of_the_steps():
    """Once with the saved weights, which count in each segment, and the calls of one segment."""
    roots = [memory("checkpoint", steps, "sample") for steps in (16, 64, 256)]
    assert all(a < 2.3 * b and b < 2.3 * a for a, b in itertools.pairwise(roots))
    assert roots[2] < memory("direct", 256, "sample") / 8
    single = memory("checkpoint", 256, "sample", 1)
    whole = memory("checkpoint", 256, "sample", 256)
    assert roots[2] < single and roots[2] < whole


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_log_densities_are_finite_differences(mode, probes):
    net = Network()
    model = ss.from_eps(net, VP)
    grid = ss.make_grid("quadratic", VP, 12, 0.05, 0.9)

    def value(x: Tensor) -> Tensor:
        return differentiable_log_likelihood(model, VP, x, probes=probes, grid=grid, mode=mode)

    assert slope_error(value, net, start()) < (1e-3 if mode == "adjoint" else 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sde", [VP, ss.EDM(sigma_min=0.02)], ids=str)
def test_the_gradient_of_the_exact_log_density_is_the_score(sde: GaussianSDE, mode: str):
    target = ss.targets.random_mixture(3, components=3, spread=1.0)
    model, x = target.score_model(sde), target.sample(4).requires_grad_()
    # the law at T itself, of which a prior leaves out what hangs on the samples
    end = target.marginal(sde, sde.T).log_prob
    log_prob = differentiable_log_likelihood(model, sde, x, prior=end, steps=40, mode=mode)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    at = target.marginal(sde, sde.t_min)
    torch.testing.assert_close(log_prob.detach(), at.log_prob(x.detach()), rtol=0, atol=2e-2)
    torch.testing.assert_close(gradient, at.score(x.detach()), rtol=0, atol=2e-2)


LAW = torch.distributions.Independent(
    torch.distributions.Normal(torch.zeros(3).double(), torch.tensor([1.0, 1.5, 0.7]).double()), 1
)


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_nonlinear_drift_has_gradients_that_are_finite_differences(mode, probes):
    sde, net = BenesSDE(), Network()
    grid = ss.make_grid("uniform", sde, 12, 0.2, 1.4)

    def value(x: Tensor) -> Tensor:
        return differentiable_log_likelihood(
            lambda y, t: -net(y, t), sde, x, prior=LAW, probes=probes, grid=grid, mode=mode
        )

    assert slope_error(value, net, start()) < (1e-3 if mode == "adjoint" else 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_drift_and_diffusion_alone_give_the_gradients_of_the_process(mode):
    net = Network()
    grid = ss.make_grid("quadratic", VP, 12, 1e-3, 1.0)

    def value(sde: SDE, **options: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: differentiable_log_likelihood(
            lambda y, t: -net(y, t), sde, x, grid=grid, mode=mode, **options
        )

    law = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(3).double(), VP.prior_std), 1
    )
    own, known = value(OwnVP(), prior=law), value(VP)
    torch.testing.assert_close(own(start()), known(start()), rtol=0, atol=1e-10)
    found = both_gradients(own, net, start())
    assert distance(found, both_gradients(known, net, start())) < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("well", wells(), ids=["overdamped", "underdamped"])
def test_langevin_dynamics_have_the_gradients_of_their_density(mode: str, well: Well):
    """Through score, drift and prior the stiffness drops out: it does not move the start."""
    x = normal(generator(3), 4, len(well.start), 2).requires_grad_()
    value = differentiable_log_likelihood(
        well.score, well.sde, x, steps=60, mode=mode, prior=lambda y: well.log_prob(y, 0.6)
    )
    exact = well.log_prob(x, 0.0)
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-5)
    leaves = [x, well.start, well.factor, well.stiffness]
    found = torch.autograd.grad(weighted(value), leaves)
    expected = torch.autograd.grad(weighted(exact), leaves, materialize_grads=True)
    assert not bool(expected[-1].any())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sde", "options"),
    [(ss.EDM(), {}), (VP, {"prior": LAW}), (OwnVP(), {"prior": LAW}), (BenesSDE(), {"prior": LAW})],
    ids=str,
)
def test_the_value_is_that_of_the_likelihood_on_the_same_grid(sde, options):
    net = Network()
    grid = ss.make_grid("uniform", sde, 12, 0.1 * sde.T, 0.6 * sde.T)  # its last time is not T

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -net(x, t) / sde.T

    found = differentiable_log_likelihood(score, sde, start(), grid=grid, **options)
    expected = ss.log_likelihood(score, sde, start(), solver="rk4_flow", grid=grid, **options)
    torch.testing.assert_close(found.detach(), expected.log_prob, rtol=1e-10, atol=1e-10)


def test_probes_estimate_the_gradient_without_bias():
    net, n = Network(), 2000
    model, x = ss.from_eps(net, VP), start(1)
    exact = both_gradients(lambda y: differentiable_log_likelihood(model, VP, y, steps=4), net, x)
    many = x.expand(n, 3).clone().requires_grad_()
    found = differentiable_log_likelihood(model, VP, many, steps=4, probes=2, mode="direct")
    (each,) = torch.autograd.grad(found.sum(), many)
    error = each.std(0) / n**0.5
    assert bool(((each.mean(0) - exact[0][0] / 0.5).abs() < 5 * error).all())


def test_a_state_of_any_shape_is_carried():
    sde = ss.EDM()
    model = ss.from_denoiser(lambda x, s: x / (1 + s.reshape(-1, 1, 1, 1) ** 2), sde)
    x = normal(generator(0), 2, 1, 2, 2).requires_grad_()
    for mode in MODES:
        log_prob = differentiable_log_likelihood(model, sde, x, steps=30, mode=mode)
        expected = -(x.square().sum((1, 2, 3)) / 2 + 2 * torch.log(torch.tensor(2 * torch.pi)))
        torch.testing.assert_close(log_prob, expected.double(), rtol=1e-3, atol=1e-3)
        (gradient,) = torch.autograd.grad(log_prob.sum(), x)
        torch.testing.assert_close(gradient, -x.detach(), rtol=1e-3, atol=1e-3)


def test_bad_input_is_refused():
    def uncalled(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    model, x = ss.from_eps(Network(), VP), start()
    for error, call in (
        (UnknownNameError, lambda: differentiable_sample(model, VP, x, mode="adjont")),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, solver="dopri5")),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, solver="ddpm", mode="adjoint")),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, solver="ddpm", mode="reverse")),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, mode="reverse")),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, segment=0)),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, mode="direct", refine=2)),
        (ArgumentError, lambda: differentiable_sample(model, VP, x, mode="adjoint", segment=2)),
        (ArgumentError, lambda: differentiable_log_likelihood(model, VP, x, probes=0)),
        (GridError, lambda: differentiable_log_likelihood(model, VP, x, grid=[0.9, 0.1])),
        (ArgumentError, lambda: differentiable_log_likelihood(uncalled, BenesSDE(), x)),
        (ArgumentError, lambda: differentiable_log_likelihood(uncalled, VP, x, prior=1.0)),
        (
            ArgumentError,
            lambda: differentiable_log_likelihood(lambda x, t: -x.detach(), VP, x),
        ),
        (
            ArgumentError,  # its parameters give the output a gradient, x does not
            lambda: differentiable_log_likelihood(
                ss.from_eps(lambda y, t: Network()(y.detach(), t), VP), VP, x
            ),
        ),
    ):
        with pytest.raises(error):
            call()
