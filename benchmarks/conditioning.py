"""How far methods for linear measurements land from the exact posterior of a mixture.

A mixture given y = A x + s n is a mixture again, so exact samples, mean and covariance are known.
Distance is sliced Wasserstein-2 between equal numbers of samples, in units of the posterior's
standard deviation; "exact samples" is a second exact set, the floor of the measure, and "exact
score" the solver's own error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import scoresolve as ss
from scoresolve import guidance
from scoresolve.guidance import Measurement
from scoresolve.metrics import class_mixture
from scoresolve.models import Model

__all__ = ["measure"]


@dataclass(frozen=True)
class Task:
    """A mixture and a measurement of one of its samples.

    Attributes:
        name: what it is called in the table.
        mixture: the data.
        operator: A, [M, D].
        std: s.
        y: the measurement, [M].
        posterior: the exact law of x given y.
    """

    name: str
    mixture: ss.GaussianMixture
    operator: Tensor
    std: float
    y: Tensor
    posterior: ss.GaussianMixture

    @classmethod
    def of(cls, name: str, mixture: ss.GaussianMixture, operator: Tensor, std: float) -> Task:
        x = mixture.sample(1, seed=1).reshape(1, -1)
        n = ss.Philox(2).normal(operator.new_empty(1, len(operator)), 0)
        y = (x @ operator.mT + std * n)[0]
        return cls(name, mixture, operator, std, y, mixture.condition(operator, y, std))


def tasks() -> list[Task]:
    """A Gaussian, a mixture, and digits seen as 2x2 averages or by their upper half."""
    digits = class_mixture()
    pixels = torch.eye(64, dtype=torch.float64)
    pooled = torch.nn.functional.avg_pool2d(pixels.reshape(64, 1, 8, 8), 2).reshape(64, 16).mT
    mixed = ss.Philox(3).normal(torch.empty(3, 8, dtype=torch.float64), 0)
    return [
        Task.of("gaussian 8-D", ss.targets.random_mixture(8, 1, seed=4), mixed, 0.3),
        Task.of("mixture 8-D", ss.targets.random_mixture(8, 4, seed=5), mixed, 0.3),
        Task.of("digits pooled", digits, pooled, 0.1),
        Task.of("digits upper half", digits, pixels[:32], 0.1),
    ]


def runs(task: Task, sde: ss.GaussianSDE) -> list[tuple[str, Model, str, ss.Grid]]:
    """Each method's model of the posterior, the solver that it is run with, and the grid."""
    prior, seen = task.mixture.score_model(sde), Measurement(task.operator, task.std, task.y)
    short, long = (ss.make_grid("flow", sde, steps) for steps in (100, 1000))
    exact, five = task.posterior.score_model(sde), guidance.mmps(prior, sde, seen)
    pseudo = guidance.pigdm(prior, sde, seen, float(task.mixture.covariance.diagonal().mean()))
    result: list[tuple[str, Model, str, ss.Grid]] = [
        ("exact score", exact, "ab2_v", short),
        ("exact score", exact, "ddpm", short),
        ("mmps, 5 iterations", five, "ab2_v", short),
        ("mmps, 5 iterations", five, "ddpm", short),
        ("mmps, 1 iteration", guidance.mmps(prior, sde, seen, 1), "ddpm", short),
        ("pigdm", pseudo, "ab2_v", short),
        ("pigdm", pseudo, "ddpm", short),
        ("dps", guidance.dps(prior, sde, seen), "ddpm", short),
        ("dps", guidance.dps(prior, sde, seen), "ddpm", long),
        ("dps_steps, 0.5", guidance.dps_steps(prior, sde, seen, short, 0.5), "ddpm", short),
    ]
    chosen = task.operator.bool()
    if bool(((task.operator == 0) | (task.operator == 1)).all() and (chosen.sum(1) == 1).all()):
        mask = chosen.any(0).reshape(task.mixture.event_shape)
        y = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, task.y)
        filled = guidance.inpaint(prior, sde, mask, y)
        result += [("inpaint", filled, solver, short) for solver in ("ab2_v", "ddpm", "repaint")]
    return result


def measure(count: int = 1000) -> list[dict[str, object]]:
    """Distance to the exact posterior, and errors of its mean and covariance, for every method.

    Args:
        count: samples per method.

    Returns:
        One row per task and method: `task`, `method`, `solver`, `forwards` and `products` (of the
        network), `distance`, `mean` (error over the posterior's standard deviation), `covariance`
        (Frobenius error over its norm).
    """
    torch.set_num_threads(1)
    sde, rows = ss.VP(), list[dict[str, object]]()
    for task in tasks():
        law = task.posterior.marginal(sde, sde.t_min)
        report = _reporter(task.name, law, law.sample(count, seed=10).flatten(1))
        free = guidance.Cost(0, 0)
        rows.append(report("exact samples", "-", free, law.sample(count, seed=11)))
        shape = (count, *task.mixture.event_shape)
        for name, model, solver, grid in runs(task, sde):
            out = ss.sample(model, sde, shape=shape, grid=grid, solver=solver, dtype=torch.float64)
            cost = guidance.network_cost(model, ss.plan(solver, sde, grid))
            rows.append(report(name, solver, cost, out.x))
    return rows


def _reporter(
    task: str, law: ss.GaussianMixture, truth: Tensor
) -> Callable[[str, str, guidance.Cost, Tensor], dict[str, object]]:
    covariance, mean = law.covariance, law.mean.flatten()
    scale = float(covariance.diagonal().mean().sqrt())

    def report(method: str, solver: str, cost: guidance.Cost, x: Tensor) -> dict[str, object]:
        rows = x.flatten(1)
        errors = {
            "distance": sliced_wasserstein(rows, truth) / scale,
            "mean": float((rows.mean(0) - mean).square().mean().sqrt()) / scale,
            "covariance": float((torch.cov(rows.mT) - covariance).norm() / covariance.norm()),
        }
        return {
            "task": task,
            "method": method,
            "solver": solver,
            "forwards": cost.forwards,
            "products": cost.products,
            **{name: float(f"{error:.2g}") for name, error in errors.items()},
        }

    return report


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 200) -> float:
    """Root mean square over random directions of the Wasserstein-2 distance of projections.

    Args:
        x, y: [N, D], equally many.
        directions: how many, the same in each call.
    """
    u = ss.Philox(7).normal(x.new_empty(directions, x.shape[1]), 0)
    u = torch.nn.functional.normalize(u, dim=1)
    gap = (x @ u.mT).sort(0).values - (y @ u.mT).sort(0).values
    return float(gap.square().mean().sqrt())
