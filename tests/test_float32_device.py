"""Every verb on a device without float64: it makes none there, and gives the CPU's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from float32_device import DEVICE, Single, float32_device
from torch import Tensor

import scoresolve as ss
from scoresolve.solvers import REGISTRY, Solver, get_solver

pytestmark = pytest.mark.filterwarnings("ignore")

Put = Callable[[Tensor], Tensor]
ROWS, SIZE = 6, 4
X = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))
DATA = torch.randn(80, SIZE, generator=torch.Generator().manual_seed(1))
MIX = ss.GaussianMixture([0.4, 0.6], [[0.0] * SIZE, [1.0] * SIZE], 0.5)


def network(sde: ss.GaussianSDE) -> ss.Model:
    """A denoiser of nearly Gaussian data about c, that asserts what it is handed."""

    def net(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        assert x.dtype == t.dtype == torch.float32 and x.device == t.device
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        middle: Tensor | float = 0.3 if c is None else c[:, None]
        rest = x - alpha * middle
        return middle + 0.5 * alpha * (rest + 0.1 * torch.sin(rest)) / (0.5 * alpha**2 + sigma**2)

    return ss.from_x0(net, sde)


@pytest.fixture
def put() -> Iterator[Put]:
    with float32_device() as move:
        yield move


def numbers(found: object) -> list[Tensor]:
    """The tensors of a result that hold one row for each sample."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, tuple):
        return [part for part in found if isinstance(part, Tensor)]
    names = ("x", "log_prob", "samples", "log_weights", "diffusion")
    parts = [getattr(found, name, None) for name in names]
    return [part for part in parts if isinstance(part, Tensor)]


def agree(run: Callable[[Put], object], put: Put) -> None:
    """The same on both, to what float32 times and states leave of it."""
    there, here = numbers(run(put)), numbers(run(lambda x: x))
    assert len(there) == len(here) > 0
    for one, other in zip(there, here, strict=True):
        assert one.dtype == other.dtype and (one.dtype is torch.float64 or isinstance(one, Single))
        torch.testing.assert_close(one.cpu(), other, rtol=2e-3, atol=2e-3)


def test_the_device_refuses_what_mps_refuses(put: Put) -> None:
    x = put(X)
    assert x.device == DEVICE and torch.equal((2 * x).cpu(), 2 * X)
    for wrong, error in [
        (x.double, TypeError),
        (lambda: torch.zeros(3, dtype=torch.float64, device=DEVICE), TypeError),
        (lambda: X.double().to(DEVICE), TypeError),
        (x.numpy, (TypeError, RuntimeError)),
        (lambda: x + X, RuntimeError),
    ]:
        with pytest.raises(error):
            wrong()


@pytest.mark.parametrize("name", REGISTRY)
def test_every_solver_samples(name: str, put: Put) -> None:
    sde, solver = ss.VP(), get_solver(name)
    options: dict[str, Any] = {"steps": 3} if isinstance(solver, Solver) else {"t_end": 0.6}
    if getattr(solver, "steps", None):
        solver.steps = 5

    def run(move: Put) -> object:
        return ss.sample(network(sde), sde, x=move(X), solver=solver, t_start=0.8, **options)

    agree(run, put)


VERBS: dict[str, Callable[[ss.Model, ss.GaussianSDE, Put], object]] = {
    "auto": lambda model, sde, put: ss.sample(model, sde, x=put(X)),
    "chunks": lambda model, sde, put: ss.sample(model, sde, x=put(X), chunk=4, c=put(X[:, 0])),
    "encode": lambda model, sde, put: ss.encode(model, sde, put(X)),
    "encode in steps": lambda model, sde, put: ss.encode(model, sde, put(X), solver="ddim"),
    "likelihood": lambda model, sde, put: ss.log_likelihood(model, sde, put(X), cost=64),
    "probes": lambda model, sde, put: ss.log_likelihood(
        model, sde, put(X), trace="hutchinson", solver="heun_flow", steps=9, probes=4
    ),
    "adaptive": lambda model, sde, put: ss.log_likelihood(
        model, sde, put(X), solver="dopri5", t_end=0.5 * sde.T
    ),
    "with log_prob": lambda model, sde, put: ss.sample_with_log_prob(
        model, sde, x=put(X), solver="heun_flow", steps=9
    ),
    "noised": lambda model, sde, put: ss.noised(sde, put(X), put(torch.full((ROWS,), 0.5))),
    "drift": lambda model, sde, put: sde.reverse_drift(put(X), 0.5, model),
    "loss": lambda model, sde, put: ss.objectives.denoising_score_matching(
        model, sde, put(X), weighting="eps"
    ),
    "differentiable": lambda model, sde, put: ss.differentiable_sample(
        model, sde, put(X), solver="ddim", steps=5, mode="adjoint"
    ),
    "mala": lambda model, sde, put: ss.run_chains(model, x=put(X), t=0.5, steps=5, warmup=4),
    "hmc": lambda model, sde, put: ss.run_chains(model, x=put(X), t=0.5, steps=5, kernel="hmc"),
    "mixture": lambda model, sde, put: ss.sample(MIX.score_model(sde), sde, x=put(X)),
    "mixture density": lambda model, sde, put: MIX.log_prob(put(X)),
    "bound": lambda model, sde, put: ss.continuous_bound(model, sde, put(X)),
    "importance": lambda model, sde, put: ss.annealed_importance(
        ss.from_energy(lambda x, t: (x - 1).square().sum(1)), MIX, [0.0, 0.5, 1.0], x=put(X)
    ),
    "guided": lambda model, sde, put: ss.sample(
        ss.guidance.classifier_free(model, sde, 2.0, {"c": put(torch.zeros(ROWS))}),
        sde,
        x=put(X),
        steps=5,
        solver="ddim",
        c=put(X[:, 0]),
    ),
}


QUICK = ("auto", "chunks", "encode in steps", "noised", "drift", "loss")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_gives_the_numbers_of_the_cpu(verb: str, put: Put) -> None:
    processes = (ss.VP(), ss.EDM()) if verb in QUICK else (ss.VP(),)
    for sde in processes:
        agree(partial(VERBS[verb], network(sde), sde), put)


def test_a_model_is_checked_and_verified(put: Put) -> None:
    for sde in (ss.VP(), ss.EDM()):
        model, data = network(sde), put(DATA)
        assert str(ss.check_model(model, sde, data)) == str(ss.check_model(model, sde, DATA))
        there, here = (ss.verify_model(model, sde, x, law=MIX, levels=2) for x in (data, DATA))
        assert str(there) == str(here)
