"""Solvers of general equations as their users run them on a probability flow or a reverse SDE."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scoresolve.models import Model
from scoresolve.peers.black_box import BlackBox, Normals
from scoresolve.sde import EDM, VP, RectifiedFlow

__all__ = [
    "BOXES",
    "flow_matching_solver",
    "scipy_solver",
    "torchdiffeq_solver",
    "torchode_solver",
    "torchsde_solver",
]

TOLERANCE = 1e-5


def _run_torchdiffeq(method: str, model: Model, x: Tensor, n: Any, noise: Normals) -> Tensor:
    from torchdiffeq import odeint

    sde: Any = model.sde
    times = torch.tensor((sde.T, sde.t_min) if isinstance(n, int) else n, dtype=torch.float64)
    options = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": method}
    y: Tensor = odeint(lambda t, y: model.predict("flow", y, t), x, times, **options)
    return y[-1]


def torchdiffeq_solver(method: str, order: float, adaptive: bool = False) -> BlackBox:
    """`torchdiffeq.odeint` with a method, on the probability flow in time, as a black box.

    Args:
        method: as "rk4".
        order: order of accuracy it claims.
        adaptive: whether it chooses its own steps; else it takes those of the grid.
    """
    sde = EDM() if adaptive else None
    run = partial(_run_torchdiffeq, method)
    return BlackBox(run, method, order, gridded=not adaptive, adaptive=adaptive, sde=sde)


class _Reverse:
    """The reverse SDE in the time that has passed, as torchsde takes it."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sde: Any = model.sde

    def f(self, tau: Tensor, x: Tensor) -> Tensor:
        t = self.sde.T - tau
        drift: Tensor = self.sde.drift(x, t) - self.sde.diffusion(t) ** 2 * self.model(x, t)
        return -drift

    def g(self, tau: Tensor, x: Tensor) -> Tensor:
        size: Tensor = self.sde.diffusion(self.sde.T - tau)
        return size.expand_as(x)


def _run_torchsde(method: str, model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
    from torchsde import sdeint

    sde: Any = model.sde
    way = sde.T - sde.t_min
    times = torch.tensor([0.0, way], dtype=x.dtype)
    y: Tensor = sdeint(_Reverse(model), x, times, dt=way / n, method=method)
    return y[-1]


def torchsde_solver(method: str, order: float | None) -> BlackBox:
    """`torchsde.sdeint` with a method and its own Brownian motion, on the reverse SDE of VP.

    Args:
        method: as "euler".
        order: weak order of accuracy it claims; None for srk, which is not linear in its noise.
    """
    run = partial(_run_torchsde, method)
    return BlackBox(
        run, method, order, stochastic=True, refinements=(32, 64, 128), sde=VP(T=0.5, t_min=0.1)
    )


def _run_torchode(method: str, model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
    torchode = importlib.import_module("torchode")
    sde: Any = model.sde

    def slope(tau: Tensor, y: Tensor) -> Tensor:
        return -model.predict("flow", y, (sde.T - tau).clamp(sde.t_min, sde.T))

    term = torchode.ODETerm(slope)
    control = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    stepper = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}[method](term=term)
    times = torch.tensor([0.0, sde.T - sde.t_min], dtype=x.dtype).repeat(len(x), 1)
    problem = torchode.InitialValueProblem(y0=x, t_eval=times)
    y: Tensor = torchode.AutoDiffAdjoint(stepper, control).solve(problem).ys
    return y[:, -1]


def torchode_solver(method: str, order: float) -> BlackBox:
    """torchode with a method ("dopri5", "tsit5"), on the probability flow of VP in time."""
    return BlackBox(partial(_run_torchode, method), method, order, adaptive=True, sde=VP())


def _run_scipy(method: str, model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
    from scipy.integrate import solve_ivp

    def slope(t: float, flat: Any) -> Any:
        return model.predict("flow", torch.from_numpy(flat).reshape(x.shape), t).flatten().numpy()

    sde: Any = model.sde
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about what is not a number
        found = solve_ivp(
            slope,
            (sde.T, sde.t_min),
            x.flatten().numpy(),
            method=method,
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
    return torch.from_numpy(np.array(found.y[:, -1])).reshape(x.shape)


def scipy_solver(method: str, order: float) -> BlackBox:
    """`scipy.integrate.solve_ivp` on all rows as one vector, as score_sde calls it, on VP."""
    return BlackBox(partial(_run_scipy, method), method, order, adaptive=True, sde=VP())


def _run_flow_matching(method: str, model: Model, x: Tensor, n: int, noise: Normals) -> Tensor:
    solver = importlib.import_module("flow_matching.solver").ODESolver
    wrapper = importlib.import_module("flow_matching.utils").ModelWrapper
    sde: Any = model.sde

    class Velocity(wrapper):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return -model.predict("flow", x, 1 - t)

    ends = torch.tensor([1 - sde.T, 1 - sde.t_min], dtype=x.dtype)
    step = None if n is None else float(ends[1] - ends[0]) / n
    out: Tensor = solver(velocity_model=Velocity(nn.Identity())).sample(
        x_init=x, step_size=step, method=method, time_grid=ends, atol=TOLERANCE, rtol=TOLERANCE
    )
    return out


def flow_matching_solver(method: str, order: float) -> BlackBox:
    """`flow_matching.solver.ODESolver` with a fixed-step method, as a black box."""
    sde = RectifiedFlow(T=0.99, t_min=0.01)
    return BlackBox(partial(_run_flow_matching, method), method, order, sde=sde)


def _torchdiffeq_boxes() -> list[BlackBox]:
    fixed = (("euler", 1), ("midpoint", 2), ("rk4", 4))
    return [
        *(torchdiffeq_solver(method, order) for method, order in fixed),
        torchdiffeq_solver("dopri5", 5, adaptive=True),
    ]


BOXES: dict[str, Callable[[], list[BlackBox]]] = {
    "torchdiffeq": _torchdiffeq_boxes,
    "torchsde": lambda: [torchsde_solver("euler", 1), torchsde_solver("srk", None)],
    "torchode": lambda: [torchode_solver("dopri5", 5), torchode_solver("tsit5", 5)],
    "scipy": lambda: [scipy_solver("RK45", 5), scipy_solver("DOP853", 8)],
    "flow_matching": lambda: [
        flow_matching_solver("euler", 1),
        flow_matching_solver("midpoint", 2),
        flow_matching_solver("heun3", 3),
    ],
}
"""The solvers that are audited, by library."""
