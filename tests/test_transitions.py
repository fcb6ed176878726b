"""Transition densities against joint Gaussian laws, the verbs, and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, normal, processes, seeds
from torch import Tensor
from torch.distributions import MultivariateNormal

import scoresolve as ss
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.plans import Linear, Run
from scoresolve.sde import VP, GaussianSDE, RectifiedFlow
from scoresolve.solvers import Solver
from scoresolve.solvers.stochastic import DDIM
from scoresolve.transitions import GaussianChain

CHAINS = ("ddpm", "ddpm_forward", "euler_maruyama", "reverse_diffusion")


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def inner_grid(sde: GaussianSDE, steps: int, denoise: bool = False) -> ss.Grid:
    return ss.make_grid("uniform", sde, steps, 0.9 * sde.T, 0.1 * sde.T, denoise)


def solvers() -> st.SearchStrategy[str | Solver]:
    return st.sampled_from([*CHAINS, DDIM(eta=1.0), DDIM(eta=0.3)])


@settings(max_examples=30)
@given(sde=processes(), solver=solvers(), denoise=st.booleans(), seed=seeds())
def test_a_rollout_is_a_run_of_the_plan_and_its_densities_are_evaluated_again(
    sde, solver, denoise, seed
):
    plan = ss.plan(solver, sde, inner_grid(sde, 5, denoise))
    model = ss.targets.ring().score_model(sde)
    x = sde.prior_std * normal(generator(seed), 6, 2)
    reports: list[Tensor] = []
    final = plan.run(model, x, ss.Philox(seed), lambda report: reports.append(report.x.clone()))
    chain = GaussianChain(plan)
    rollout = chain.rollout(model, x, ss.Philox(seed))
    scale = 1 + float(rollout.states.abs().max())
    close(rollout.states / scale, torch.stack([x, *reports]) / scale)
    close(rollout.x / scale, final / scale)
    close(chain.log_prob(model, rollout.states), rollout.log_prob)
    part = chain.rollout(model, x[2:], ss.Philox(seed, 2))
    close(part.log_prob, rollout.log_prob[:, 2:], 1e-6, 1e-6)
    for k, step in enumerate(chain.steps):
        assert (step.t, step.s) == plan.times[k : k + 2]
        standard = torch.distributions.Normal(rollout.means[k], rollout.stds[k])
        close(rollout.log_prob[k], standard.log_prob(rollout.states[k + 1]).sum(1))


@settings(max_examples=15)
@given(sde=processes(), solver=solvers(), seed=seeds())
def test_log_probabilities_sum_to_the_joint_density_of_the_gaussian_chain(sde, solver, seed):
    rng = generator(seed)
    root = normal(rng, 2, 2)
    mean, covariance = normal(rng, 2), root @ root.mT + 0.1 * torch.eye(2)
    model = ss.GaussianMixture([1.0], mean[None], covariance[None]).score_model(sde)
    plan = ss.plan(solver, sde, inner_grid(sde, 3))
    chain = GaussianChain(plan)
    std = sde.start_std(plan.times[0])
    start = MultivariateNormal(torch.zeros(2).double(), std**2 * torch.eye(2).double())
    states = chain.rollout(model, start.mean + std * normal(rng, 4, 2), ss.Philox(seed))

    # the path is linear in (start, z_1, ..., z_S): its covariance is J J^T
    def path(noises: Tensor) -> Tensor:
        x, rows = std * noises[:2][None], []
        for k, step in enumerate(chain.steps):
            rows.append(x[0])
            x = step.mean(model, x) + step.std * noises[2 * k + 2 : 2 * k + 4]
        return torch.cat([*rows, x[0]])

    zero = torch.zeros(8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(path, zero)
    residual = states.states.transpose(0, 1).reshape(4, 8) - path(zero)
    white = torch.linalg.solve(jacobian, residual.mT)
    joint = -white.square().sum(0) / 2 - torch.linalg.slogdet(jacobian)[1]
    joint = joint - 4 * torch.log(torch.tensor(2 * torch.pi))
    close(start.log_prob(states.states[0]) + states.log_prob.sum(0), joint, 1e-6, 1e-6)
    law = plan.law(mean, covariance)
    end = jacobian[-2:] @ jacobian[-2:].mT
    size = 1 + float(end.abs().max())
    close(end / size, law.covariance / size, 1e-7, 1e-7)
    close(path(zero)[-2:] / size, law.mean / size, 1e-7, 1e-7)


def test_gradients_of_stored_paths_match_finite_differences_and_sum_over_steps():
    sde = VP()
    chain = GaussianChain(ss.plan("ddpm", sde, inner_grid(sde, 4, denoise=True)))
    weight = torch.tensor([0.8, -0.3], dtype=torch.float64, requires_grad=True)

    def score(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return -weight * x + shift * torch.sin(x)

    shift = torch.rand(5, 1, generator=generator(0), dtype=torch.float64)
    x = normal(generator(1), 5, 2)
    rollout = chain.rollout(score, x, ss.Philox(0), shift=shift)
    assert not rollout.log_prob.requires_grad and not rollout.x.requires_grad
    log_prob = chain.log_prob(score, rollout.states, shift=shift)
    close(log_prob.detach(), rollout.log_prob)
    (gradient,) = torch.autograd.grad(log_prob.sum(), weight)
    for i, delta in enumerate(1e-6 * torch.eye(2, dtype=torch.float64)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * delta)
                values.append(float(chain.log_prob(score, rollout.states, shift=shift).sum()))
                weight.sub_(sign * delta)
        assert float(gradient[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)
    single = [
        torch.autograd.grad(
            step.log_prob(score, *pair, shift=shift).sum(), weight, retain_graph=True
        )[0]
        for step, pair in zip(chain.steps, itertools.pairwise(rollout.states), strict=True)
    ]
    close(torch.stack(single).sum(0), gradient)


def test_the_score_function_estimates_the_gradient_of_an_expected_reward():
    sde, n = VP(), 40000
    chain = GaussianChain(ss.plan("ddpm", sde, inner_grid(sde, 3)))
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return theta - x

    def log_prob(shift: float) -> Tensor:
        return chain.log_prob(lambda x, t: score(x, t) + shift, rollout.states).sum(0)

    rollout = chain.rollout(score, normal(generator(2), n, 1), ss.Philox(4))
    reward = rollout.x[:, 0] - rollout.x.mean()
    (estimate,) = torch.autograd.grad((log_prob(0.0) * reward).mean(), theta)
    each = (log_prob(0.5) - log_prob(-0.5)).detach() * reward  # log_prob is quadratic in theta
    state = torch.zeros(1, 1, dtype=torch.float64)
    for step in chain.steps:  # the means are affine: E[x] passes through them
        state = step.mean(score, state)
    (exact,) = torch.autograd.grad(state.sum(), theta)
    assert float(estimate) == pytest.approx(float(each.mean()), rel=1e-9)
    assert abs(float(estimate - exact)) < 4 * float(each.std()) / n**0.5 < 0.1 * float(exact)


def test_densities_are_summed_in_double_precision():
    sde = VP()
    chain = GaussianChain(ss.plan("ddpm", sde, inner_grid(sde, 3)))
    x = normal(generator(0), 2, 3, 64, 64).float()
    rollout = chain.rollout(lambda x, t: -x, x, ss.Philox(0))
    assert rollout.states.dtype == torch.float32 and rollout.log_prob.dtype == torch.float64
    again = chain.log_prob(lambda x, t: -x.double(), rollout.states.double())
    close(rollout.log_prob, again, 1e-6, 0.1)


class EarlyNoise(Solver):
    """Its noise passes through the network."""

    name, predicts, order, stochastic, source = "early", "score", None, True, "a test"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        y = x + 0.1 * run.noise(t, s)
        return y + 0.1 * run.predict(y, t)


class LateNoise(Solver):
    """Its noise of one step enters the next step too."""

    name, predicts, order, stochastic, source = "late", "score", None, True, "a test"

    def __init__(self) -> None:
        self.kept: list[Linear] = []

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        z = run.noise(t, s)
        result = x + 0.1 * run.predict(x, t) + 0.1 * z
        result = result + 0.1 * self.kept[-1] if self.kept else result
        self.kept.append(z)
        return result


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("heun", "step 0 of 'heun' adds no noise"),
        ("dpmpp_2m", "adds no noise"),
        (DDIM(eta=0.0), "adds no noise"),
        ("stochastic_heun", "uses its noise before its end"),
        ("pc", "draws noise 2 times"),
        ("pc_annealed", "draws noise 2 times"),
        (EarlyNoise(), "uses its noise before its end"),
        (LateNoise(), "uses its noise before its end"),
    ],
)
def test_solvers_without_a_transition_density_are_refused_by_name(solver, message):
    sde = VP()
    plan = ss.plan(solver, sde, inner_grid(sde, 3))
    with pytest.raises(ArgumentError, match=message):
        GaussianChain(plan)


@pytest.mark.parametrize(
    ("solver", "times", "message"),
    [
        ("flow_sde", (1.0, 0.6, 0.3), "step 0 of 'flow_sde' adds no noise from t = 1 to 0.6,"),
        ("ddpm", (0.6, 0.3, 0.0), "step 1 of 'ddpm' adds no noise from t = 0.3 to 0,"),
    ],
)
def test_a_step_without_noise_at_an_end_of_the_grid_is_named_and_absent_inside(
    solver, times, message
):
    sde = RectifiedFlow()
    with pytest.raises(ArgumentError, match=message + ".*move that end of the grid inside"):
        GaussianChain(ss.plan(solver, sde, times))
    inside = [min(max(t, 0.01), 0.99) for t in times]
    assert all(step.std > 0 for step in GaussianChain(ss.plan(solver, sde, inside)).steps)


class Remembers(Solver):
    """Ancestral sampling from an extrapolated prediction."""

    name, predicts, order, stochastic, source = "remembers", "x0", None, True, "a test"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        m = run.predict(x, t)
        m = 1.5 * m - 0.5 * run.past[-1].m if run.past else m
        return 0.5 * x + 0.5 * m + 0.1 * run.noise(t, s)


def test_solvers_that_look_back_are_refused():
    sde = VP()
    with pytest.raises(ArgumentError, match="step 1 of 'remembers' looks at earlier steps"):
        GaussianChain(ss.plan(Remembers(), sde, inner_grid(sde, 3)))


def test_wrong_shapes_are_refused():
    sde = VP()
    chain = GaussianChain(ss.plan("ddpm", sde, inner_grid(sde, 3)))
    x = normal(generator(0), 4, 2)
    with pytest.raises(ShapeError, match="give \\(4, B, \\*event\\)"):
        chain.log_prob(lambda x, t: -x, x[None].expand(3, 4, 2))
    with pytest.raises(ShapeError, match="two states of one shape"):
        chain.steps[0].log_prob(lambda x, t: -x, x, x[:1])
    with pytest.raises(ArgumentError, match="floating-point"):
        chain.rollout(lambda x, t: -x, x.long(), ss.Philox(0))
