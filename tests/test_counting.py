"""What a step costs beside the network, counted: it may not grow unnoticed.

A run of twenty steps on [4, 3, 8, 8] in float32 is counted once it is warm: network calls, torch
operations (a kernel launch each on a GPU), allocations, and operations after which the host waits
for the device. The network returns tensors that exist already, so every count is the library's.
Counts do not depend on the machine; a version of torch may change them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.counting import Counting
from scoresolve.models import NetworkModel
from scoresolve.solvers import AdaptiveAdams, Solver

SHAPE, STEPS = (4, 3, 8, 8), 20
SDE = ss.VP()

EXPECTED: dict[tuple[str, bool], tuple[int, int, int]] = {
    ("euler", False): (20, 40, 1),
    ("heun", False): (40, 101, 22),
    ("dpmpp_2m", False): (20, 60, 2),
    ("auto", False): (20, 205, 7),
    ("uni_pc", False): (20, 95, 2),
    ("ddpm", False): (20, 841, 192),
    ("dpmpp_2m_sde", False): (20, 861, 193),
    ("euler", True): (20, 40, 40),
    ("heun", True): (40, 101, 101),
    ("dpmpp_2m", True): (20, 60, 60),
    ("auto", True): (20, 205, 205),
    ("uni_pc", True): (20, 95, 95),
    ("ddpm", True): (20, 841, 251),
    ("dpmpp_2m_sde", True): (20, 861, 271),
}
"""(solver, with gradients) to the most (calls, operations, allocations) of twenty steps."""

ADAPTIVE = 172
"""Operations a network call of the adaptive Adams method; by far the most are small and per row."""
MALA = 98
"""Operations a step of a Metropolis-adjusted Langevin chain on one Gaussian, its score included."""
MEANT = (
    "If a change to the library is meant to cost this, say why in its commit and put the new "
    "figure into the table; if not, find the operation that was added."
)


def outputs(with_gradients: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that answers with one of three tensors in turn, at no operation."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    turn = itertools.cycle([m.requires_grad_(with_gradients) for m in made])
    return lambda x, t: next(turn)


def counted(run: Callable[[], object]) -> Counting:
    """The counts of the second run; the first fills what is kept between runs."""
    run()
    with Counting() as counting:
        run()
    return counting


@pytest.mark.parametrize(("name", "with_gradients"), EXPECTED)
def test_a_run_takes_no_more_calls_operations_and_allocations(
    name: str, with_gradients: bool
) -> None:
    solver = ss.get_solver(name)
    assert isinstance(solver, Solver)
    plan = ss.plan(solver, SDE, ss.make_grid("cosine", SDE, STEPS))
    model = NetworkModel(outputs(with_gradients), SDE, solver.predicts)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(with_gradients):
        counting = counted(lambda: plan.run(model, x, ss.Philox(0)))
    found = (plan.nfe, len(counting.operations), counting.allocations)
    most = EXPECTED[name, with_gradients]
    assert all(a <= b for a, b in zip(found, most, strict=True)), (
        f"{name}: (calls, operations, allocations) = {found}, at most {most} so far. {MEANT}"
    )
    assert counting.waits == 0, f"{name}: the host waits {counting.waits} times for the device"


def test_an_adaptive_step_takes_no_more_operations() -> None:
    network = NetworkModel(lambda x, t: x, SDE, "eps")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    calls = ss.sample(network, SDE, x=x, solver=AdaptiveAdams(1e-3, 1e-3)).nfe
    counting = counted(lambda: ss.sample(network, SDE, x=x, solver=AdaptiveAdams(1e-3, 1e-3)))
    found = len(counting.operations) / calls
    assert found <= ADAPTIVE, f"{found:.0f} operations a call, at most {ADAPTIVE} so far. {MEANT}"


def test_a_step_of_mala_takes_no_more_operations() -> None:
    target = ss.targets.gaussian([0.0, 0.0], 1.0)
    x = torch.zeros(4, 2, dtype=torch.float64)

    def operations(steps: int) -> int:
        kernel = ss.kernels.MALA(0.1)
        run = counted(lambda: ss.run_chains(target, x=x, kernel=kernel, steps=steps))
        return len(run.operations)

    found = (operations(20) - operations(10)) / 10
    assert found <= MALA, f"{found:g} operations a step, at most {MALA} so far. {MEANT}"


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: bool((x > 0).all())])
def test_a_wait_for_the_device_is_seen(wait: Callable[[Tensor], object]) -> None:
    with Counting() as counting:
        wait(torch.ones(3))
    assert counting.waits == 1


def test_memory_is_counted_until_it_is_freed() -> None:
    x = torch.zeros(1000)
    with Counting() as counting:
        y = x + 1
        y.mul_(2)
        z = y.view(10, 100) + 1
        del y
        z = z + 1
    assert counting.operations == ["add", "mul_", "view", "add", "add"]
    assert (counting.allocations, counting.held, counting.peak) == (3, 4000, 8000)
    del z
    assert counting.held == 0
