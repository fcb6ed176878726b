"""On a GPU as on the CPU: the same noise, the same samples, no wait for the device in a plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import scoresolve as ss
from scoresolve.digits import load_network
from scoresolve.noise import BrownianPath, Philox, Purpose
from scoresolve.solvers import REGISTRY, Solver, get_solver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

F64 = torch.float64
MIXTURE = ss.GaussianMixture(
    [0.3, 0.7], [[-1.0, 0.5, 0.2], [0.8, -0.3, 0.0]], [[0.3, 0.5, 0.4], [0.2, 0.6, 0.5]]
)
SDE = ss.VP()
EXACT = MIXTURE.score_model(SDE)
FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
INTEGRATORS = [name for name in REGISTRY if name not in FIXED]


def start(dtype: torch.dtype = F64, n: int = 64) -> Tensor:
    return Philox(7).normal(torch.empty(n, 3, dtype=dtype), 0, Purpose.START)


def sampled(device: str, name: str, dtype: torch.dtype = F64) -> ss.Samples:
    x = start(dtype).to(device)
    budget = {"nfe": 12} if name in FIXED else {}
    return ss.sample(EXACT, SDE, x=x, solver=name, seed=3, **budget)


def close(gpu: Tensor, cpu: Tensor, tolerance: float = 1e-9) -> None:
    assert gpu.device.type == "cuda"
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_is_made_of_the_same_integers(dtype: torch.dtype) -> None:
    like = torch.empty(1000, 3, dtype=dtype)
    source, there = Philox(5), like.cuda()
    assert torch.equal(source.uniform(there, 1).cpu(), source.uniform(like, 1))
    assert torch.equal(source.signs(there, 1).cpu(), source.signs(like, 1))
    close(source.normal(there, 1), source.normal(like, 1), 8 * torch.finfo(dtype).eps)
    path = BrownianPath(source, 0.0, 1.0)
    close(path.increment(there, 0.2, 0.7), path.increment(like, 0.2, 0.7), 1e-5)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_grid_gives_the_same_sample(name: str) -> None:
    here, there = sampled("cpu", name), sampled("cuda", name)
    assert here.nfe == there.nfe
    close(there.x, here.x, 1e-8)


@pytest.mark.parametrize("name", INTEGRATORS)
def test_an_integrator_gives_the_same_sample(name: str) -> None:
    here, there = sampled("cpu", name), sampled("cuda", name)
    assert here.nfe == there.nfe
    close(there.x, here.x, 1e-6)
    assert torch.equal(there.status.cpu(), here.status)


@pytest.mark.parametrize("name", ["auto", "dpmpp_2m", "ddpm", "uni_pc", "sa_solver", "heun"])
def test_a_plan_never_waits_for_the_device(name: str) -> None:
    plan = ss.plan(name, SDE, ss.make_grid("cosine", SDE, 20))
    x, outputs = start(torch.float32).cuda(), torch.randn(64, 3, device="cuda")
    model = ss.from_v(lambda x, t: outputs, SDE)
    plan.run(model, x, Philox(1))
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run(model, x, Philox(1))
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_likelihood_and_encoding_are_the_same() -> None:
    x = MIXTURE.sample(16, seed=0)
    here, there = (ss.log_likelihood(EXACT, SDE, x.to(d), seed=0) for d in ("cpu", "cuda"))
    close(there.log_prob, here.log_prob, 1e-8)
    close(there.standard_error, here.standard_error, 1e-8)
    encoded = [
        ss.encode(EXACT, SDE, x.to(d), solver="rk4_flow", steps=20).x for d in ("cpu", "cuda")
    ]
    close(encoded[1], encoded[0], 1e-8)


@pytest.mark.parametrize("mode", ["direct", "adjoint"])
def test_gradients_through_a_sampler_are_the_same(mode: str) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        x = start().to(device).requires_grad_()
        options = {"solver": "ab2_v", "steps": 6, "mode": mode}
        out = ss.differentiable_sample(EXACT, SDE, x=x, **options)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    close(gradients[1], gradients[0], 1e-8)


@pytest.mark.parametrize("name", ["auto", "dpmpp_2m_sde"])
def test_a_compiled_plan_gives_the_same_sample(name: str) -> None:
    plan = ss.plan(name, SDE, ss.make_grid("cosine", SDE, 8))
    net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 3)).cuda().requires_grad_(False)
    model = ss.from_v(lambda x, t: net(x), SDE)
    x, compiled = start(torch.float32).cuda(), plan.compile(model, mode="reduce-overhead")
    for _ in range(3):  # the third replays a CUDA graph
        found = compiled(x, Philox(1)).clone()
    torch.testing.assert_close(found, plan.run(model, x, Philox(1)), rtol=1e-4, atol=1e-4)


def test_the_digits_network_gives_the_same_digits() -> None:
    found = []
    for device in ("cpu", "cuda"):
        network, x = load_network().to(device), start(torch.float32, 8 * 22)[:, 0]
        score, sde = ss.from_denoiser(network), ss.EDM()
        x = 80 * x[:128].reshape(2, 1, 8, 8).to(device)
        found.append(ss.sample(score, sde, x=x, nfe=10).x)
    close(found[1], found[0], 1e-3)


def test_a_fitted_grid_is_found_on_the_device() -> None:
    fit = ss.fit_grid(EXACT, SDE, shape=(16, 3), nfe=6, device="cuda", seed=0)
    here = ss.fit_grid(EXACT, SDE, shape=(16, 3), nfe=6, seed=0)
    assert fit.rms == pytest.approx(here.rms, rel=0.05)
