r"""What the derivatives of a denoiser say of it, at states x = alpha x0 + sigma eps.

In y = x/alpha and k = sigma/alpha every Gaussian process is the heat equation, and the
Fokker-Planck equation of log p, whose score is s = (D - y)/k^2 for the denoiser
D(y, k) = E[x0 | y], reads

    d log p/dk = k (div s + |s|^2)     so that     dD/d(log k) = k^2 grad div D + 2 J^T (D - y)

with J = dD/dy. The difference of both sides is k^3 times that of the equation for the score,
ds/dk = k grad(div s + |s|^2), and, where the field is a gradient, k^2 alpha dt/d(log k) times
that in x and t,

    ds/dt = grad(-div f - f.s + g^2/2 (div s + |s|^2)).

J is also Cov[x0 | y] / k^2 (Tweedie), so it is symmetric and has no negative direction.

Source:
    Lai et al. 2023 (2210.04296), for the equation of the score; Meng et al. 2021
    (2111.04726), for the second moment; Hutchinson 1990 for the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, check_output
from scoresolve.models import Model
from scoresolve.sde import GaussianSDE

__all__ = [
    "Denoised",
    "Level",
    "check_differentiable",
    "fokker_planck_residual",
    "jacobian_parts",
]


@dataclass(frozen=True)
class Level:
    """One time of the process a model lives in.

    Attributes:
        t: the time.
        alpha, sigma: of the process at `t`.
        alpha_rate: d alpha / d log k.
        time_rate: dt / d log k.
    """

    t: float
    alpha: float
    sigma: float
    alpha_rate: float
    time_rate: float

    @classmethod
    def at(cls, sde: GaussianSDE, t: float) -> Level:
        """The level of `sde` at time `t`, where neither alpha nor sigma vanishes."""
        alpha, sigma, alpha_dot, sigma_dot = (float(value) for value in sde.point(t))
        time_rate = 1 / (sigma_dot / sigma - alpha_dot / alpha)
        return cls(t, alpha, sigma, alpha_dot * time_rate, time_rate)

    @property
    def k(self) -> float:
        """The noise level sigma/alpha."""
        return self.sigma / self.alpha


class Denoised:
    """The denoiser at some states, with a graph from which derivatives are taken.

    Args:
        model: of a Gaussian process.
        x: states of that process, [n, *event].
        level: their time.
        cond: conditions for the model, for these rows.
    """

    def __init__(self, model: Model, x: Tensor, level: Level, cond: dict[str, Any]) -> None:
        self.level = level
        with torch.enable_grad():
            self.x = x.detach().clone().requires_grad_()
            self.t = torch.tensor(level.t, dtype=x.dtype, device=x.device, requires_grad=True)
            x0 = model.predict("x0", self.x.clone(), self.t.expand(len(x)), **cond)
        check_output(x0, x)
        self.x0 = x0

    def pull_back(self, vector: Tensor, again: bool = False) -> Tensor:
        """(dx0/dx)^T times `vector`, shape of x; with a graph of its own if `again`."""
        return self._gradient(self.x0, vector, again)

    def second(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """(dx0/dx)^T v and the gradient of v^T (dx0/dx) v in x, for the vector v."""
        product = self.pull_back(vector, again=True)
        if not product.requires_grad:  # the denoiser is linear in x
            return product, torch.zeros_like(product)
        return product.detach(), self._gradient(product, vector)

    def per_log_k(self) -> Tensor:
        """The derivative of x0 in log k at a fixed y = x/alpha, shape of x.

        Reverse mode twice: the products of all cotangents with the direction, then their gradient
        in the cotangents. Unlike forward mode it passes through scores that are gradients.
        """
        cotangent = torch.zeros_like(self.x0, requires_grad=True)
        by_x, by_t = torch.autograd.grad(
            self.x0,
            (self.x, self.t),
            cotangent,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        level = self.level
        along = (by_x * self.x.detach()).sum() * (level.alpha_rate / level.alpha)
        (rate,) = torch.autograd.grad(
            along + by_t * level.time_rate, cotangent, retain_graph=True, materialize_grads=True
        )
        found: Tensor = rate
        return found

    def _gradient(self, value: Tensor, vector: Tensor, again: bool = False) -> Tensor:
        (gradient,) = torch.autograd.grad(
            value,
            self.x,
            vector,
            retain_graph=True,
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
        found: Tensor = gradient
        return found


def fokker_planck_residual(denoised: Denoised, vectors: Tensor, exact: bool) -> tuple[Tensor, ...]:
    """How far the denoiser is from the equation above, in units of the data.

    Args:
        denoised: the denoiser at n points.
        vectors: [K, n, *event]: all basis vectors if `exact`, else probes of covariance I, K >= 2.
        exact: which of both.

    Returns:
        The mean square of the residual's elements, times D, [n], and the products J_x^T v,
        [K, n, *event]. With probes its expectation is exact, and it may be negative: the mean of
        r_i . r_j over pairs of independent estimates.
    """
    level = denoised.level
    products, curvature = zip(*(denoised.second(v) for v in vectors), strict=True)
    x0 = denoised.x0.detach()
    known = denoised.per_log_k() - 2 * denoised.pull_back(level.alpha * x0 - denoised.x.detach())
    gradients = level.sigma**2 * torch.stack(curvature)
    if exact:
        square = (known - gradients.sum(0)).flatten(1).square().sum(1)
    else:
        residuals = (known - gradients).flatten(2)
        count = len(residuals)
        own = residuals.square().sum((0, 2))
        square = (residuals.sum(0).square().sum(1) - own) / (count * (count - 1))
    return square, torch.stack(products)


def jacobian_parts(products: Tensor, vectors: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """|J - J^T|^2 and |J|^2 in the Frobenius norm, [n] each, from products J^T v.

    Args:
        products: J^T v, [K, n, *event].
        vectors: v, [K, n, *event]: all basis vectors if `exact`, else K >= 2 independent probes
            of covariance I, over whose pairs E (v^T J w - w^T J v)^2 = |J - J^T|^2.
        exact: which of both.
    """
    a, v = products.flatten(2).transpose(0, 1), vectors.flatten(2).transpose(0, 1)
    forms = a @ v.mT  # v_i^T J v_j, [n, K, K]
    antisymmetric = (forms - forms.mT).square().sum((1, 2))
    whole, count = a.square().sum((1, 2)), len(products)
    if exact:
        return antisymmetric, whole
    return antisymmetric / (count * (count - 1)), whole / count


def check_differentiable(
    model: Model,
    x: Tensor,
    times: tuple[float, float],
    cond: dict[str, Any],
    in_time: bool,
) -> int:
    """Raise unless the network itself, not its conversion alone, has derivatives in x and in t.

    Args:
        model: in the process it lives in.
        x: some states, [n, *event].
        times: two times; a network that differs between them must have a derivative in time.
        cond: conditions for these rows.
        in_time: whether a derivative in time is needed.

    Returns:
        How many points the network was evaluated at.

    Raises:
        ArgumentError: a derivative is missing.
        ShapeError: the network returns no tensor.
    """
    network: Callable[..., Tensor] = model.bind("x0")[1]
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        t = torch.tensor(times[0], dtype=x.dtype, device=x.device, requires_grad=True)
        value = network(leaf.clone(), t.expand(len(x)), **cond)
        if not isinstance(value, Tensor):
            raise ShapeError(f"the model returned {type(value).__name__}: return a tensor")
        found: tuple[Tensor | None, ...] = (None, None)
        if value.requires_grad:
            found = torch.autograd.grad(value.sum(), (leaf, t), allow_unused=True)
    if found[0] is None:
        raise ArgumentError(
            "the network's output has no gradient in x (it runs under no_grad, or is constant): "
            'let it build a graph, or give quantities=("denoising",), which needs none'
        )
    if in_time and (found[1] is None or not bool(found[1].any())):
        with torch.no_grad():
            other = network(x.clone(), torch.full_like(t, times[1]).expand(len(x)), **cond)
        if not torch.allclose(other, value, equal_nan=True):
            raise ArgumentError(
                "the network's output has no derivative in its time (rounded timesteps, or an "
                'embedding by table): leave "fokker_planck" out of quantities'
            )
        return 2 * len(x)
    return len(x)
