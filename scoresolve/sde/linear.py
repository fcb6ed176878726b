"""Linear processes whose coefficients are matrices, and critically damped Langevin diffusion.

A state holds m parts, [B, m, *event], which A mixes, the same way at every place of the event:

    du = beta(t) A u dt + sqrt(beta(t)) G dw,    G diagonal.

With b = int_s^t beta the transition is u_t | u_s ~ N(Phi u_s, Q), where (Van Loan 1978)

    expm(b [[A, G G^T], [0, -A^T]]) = [[Phi, F], [0, Phi^-T]],    Q = F Phi^T.

Any other G is diagonal in rotated parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, real_number, short
from scoresolve.precision import host, widest
from scoresolve.sde.base import SDE, TimeLike, as_rows, as_time, expand

__all__ = ["CriticallyDampedLangevin", "LinearSDE"]


class LinearSDE(SDE):
    """du = beta(t) A u dt + sqrt(beta(t)) G dw on states of m parts, [B, m, *event].

    The first part is the data at t = 0, the others are Gaussian there, and all have a stationary
    law, which is the prior.

    Args:
        matrix: A, m rows of m numbers, all its eigenvalues with a negative real part.
        noise: diagonal of G, m numbers >= 0.
        start_std: standard deviations of the parts at t = 0, given the data; the first is 0.
        beta_min, beta_max: beta(t) = beta_min + t/T (beta_max - beta_min), > 0.
        T: end time, > 0.
        t_min: where sampling stops unless told otherwise, in [0, T).

    Raises:
        ArgumentError: sizes do not fit, a number is out of its range, or A is not stable.

    Source:
        Dockhorn et al. 2022 (2112.07068), appendix A; Van Loan 1978, "Computing integrals involving
        the matrix exponential", theorem 1.
    """

    has_prior = True

    def __init__(
        self,
        matrix: Sequence[Sequence[float]],
        noise: Sequence[float],
        start_std: Sequence[float],
        beta_min: float = 1.0,
        beta_max: float = 1.0,
        T: float = 1.0,
        t_min: float = 1e-5,
    ) -> None:
        self.matrix = _finite("matrix", matrix)
        self.noise, self.start_std = _finite("noise", noise), _finite("start_std", start_std)
        m = len(self.noise) if self.noise.ndim == 1 else 0
        if self.matrix.shape != (m, m) or self.start_std.shape != (m,) or m < 1:
            raise ArgumentError(
                f"A of shape {tuple(self.matrix.shape)}, {self.noise.numel()} numbers of noise and "
                f"{self.start_std.numel()} of start_std: give m rows of m numbers, m and m"
            )
        if bool((self.noise < 0).any() or (self.start_std < 0).any() or self.start_std[0] != 0):
            raise ArgumentError("noise and start_std are at least 0, and start_std[0] is 0")
        if not bool((torch.linalg.eigvals(self.matrix).real < 0).all()):
            raise ArgumentError(
                "A has an eigenvalue whose real part is not negative: no stationary law"
            )
        self.beta_min = real_number("beta_min", beta_min, above=0)
        self.beta_max = real_number("beta_max", beta_max, above=0)
        self.T, self.t_min = real_number("T", T, above=0), real_number("t_min", t_min, least=0)
        if not self.t_min < self.T:
            raise ArgumentError(f"t_min = {t_min}: give one below T = {T}")
        self.stationary = torch.from_numpy(
            solve_continuous_lyapunov(self.matrix.numpy(), -np.diag(self.noise.numpy() ** 2))
        )
        self._factor, info = torch.linalg.cholesky_ex(self.stationary)
        if int(info):
            raise ArgumentError(
                "the noise does not reach every part: the stationary law is singular"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.matrix.tolist()}, {self.noise.tolist()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearSDE) and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._numbers)

    @property
    def _numbers(self) -> tuple[float, ...]:
        tensors = (self.matrix, self.noise, self.start_std)
        numbers = (self.beta_min, self.beta_max, self.T, self.t_min)
        return (*(v for each in tensors for v in each.flatten().tolist()), *numbers)

    @property
    def parts(self) -> int:
        """m."""
        return len(self.noise)

    def beta(self, t: TimeLike) -> Tensor:
        """beta(t), shape of `t`."""
        return self.beta_min + as_time(t) / self.T * (self.beta_max - self.beta_min)

    def clock(self, t: TimeLike) -> Tensor:
        """int_0^t beta, shape of `t`."""
        t = as_time(t)
        return self.beta_min * t + t.square() / (2 * self.T) * (self.beta_max - self.beta_min)

    def time(self, clock: float) -> float:
        """The time at which `clock(t)` has the given value."""
        slope = (self.beta_max - self.beta_min) / (2 * self.T)
        return 2 * clock / (self.beta_min + math.sqrt(self.beta_min**2 + 4 * slope * clock))

    def drift(self, x: Tensor, t: TimeLike) -> Tensor:
        self._check(x)
        return expand(self.beta(t), x, t) * mixed(self.matrix, x)

    def diffusion(self, t: TimeLike) -> Tensor:
        """sqrt(beta) G's diagonal, [*t.shape, m]."""
        beta = self.beta(t)
        return beta.sqrt()[..., None] * self.noise.to(beta)

    def transition(self, s: TimeLike, t: TimeLike) -> tuple[Tensor, Tensor]:
        """Phi and Q of u_t | u_s, [*shape, m, m] float64, for s <= t."""
        at_t, at_s = self.clock(t), self.clock(s)
        device = at_t.device if at_t.ndim else at_s.device
        phi, q = van_loan(self.matrix, self.noise, at_t.cpu().double() - at_s.cpu().double())
        return phi.to(device, widest(device)), q.to(device, widest(device))

    def marginal(self, x0: Tensor, t: TimeLike) -> tuple[Tensor, Tensor]:
        """Mean and covariance of u_t given clean data.

        Args:
            x0: data [B, *event].
            t: time, [] or [B].

        Returns:
            Mean [B, m, *event], and covariance of the parts, [m, m] or [B, m, m], float64.
        """
        phi, covariance = self.kernel(as_rows(t, x0))
        shape = (-1, self.parts, *(1,) * (x0.ndim - 1))
        return phi.to(x0).reshape(shape) * x0[:, None], covariance

    def kernel(self, t: TimeLike) -> tuple[Tensor, Tensor]:
        """What the data are multiplied by in u_t, [*t.shape, m], and the covariance of the rest."""
        phi, q = self.transition(0.0, t)
        start = phi * self.start_std.to(phi)
        return phi[..., 0], q + start @ start.mT

    def from_normals(self, z: Tensor) -> Tensor:
        self._check(z)
        return mixed(self._factor, z)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log-density of the stationary law at `x` [B, m, *event], [B]."""
        self._check(x)
        white = mixed(torch.linalg.inv(self._factor), x).flatten(1)
        places = white.shape[1] / self.parts
        log_det = places * float(self._factor.diagonal().log().sum())
        return -white.square().sum(1) / 2 - log_det - white.shape[1] / 2 * math.log(2 * math.pi)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.parts:
            raise ShapeError(
                f"state of shape {tuple(x.shape)}: its {self.parts} parts are stacked as "
                f"[B, {self.parts}, *event]"
            )


class CriticallyDampedLangevin(LinearSDE):
    """Critically damped Langevin diffusion of data x and velocity v, stacked as [B, 2, *event].

        dx = beta v/M dt,    dv = -beta (x + Gamma v/M) dt + sqrt(2 Gamma beta) dw,

    with Gamma = 2 sqrt(M), v ~ N(0, gamma M I) at t = 0 and x ~ N(0, I), v ~ N(0, M I) in the end.
    Noise reaches the data through the velocity alone: a model need only know the score in v.

    Args:
        mass: M > 0.
        gamma: variance of the starting velocity over M, >= 0.
        beta: > 0.
        T: end time, > 0.
        t_min: where sampling stops unless told otherwise.

    Raises:
        ArgumentError: a number is out of its range.

    Source:
        Dockhorn et al. 2022 (2112.07068), eq. 5 and section 3.
    """

    def __init__(
        self,
        mass: float = 0.25,
        gamma: float = 0.04,
        beta: float = 4.0,
        T: float = 1.0,
        t_min: float = 1e-3,
    ) -> None:
        self.mass, self.gamma = (
            real_number("mass", mass, above=0),
            real_number("gamma", gamma, least=0),
        )
        mass, gamma = self.mass, self.gamma
        friction = 2 * math.sqrt(mass)
        super().__init__(
            [[0.0, 1 / mass], [-1.0, -friction / mass]],
            [0.0, math.sqrt(2 * friction)],
            [0.0, math.sqrt(gamma * mass)],
            beta,
            beta,
            T,
            t_min,
        )


def _finite(name: str, values: object) -> Tensor:
    try:
        numbers = host(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} = {short(values)}: give numbers") from error
    if not bool(numbers.isfinite().all()):
        raise ArgumentError(f"{name} = {short(values)}: give finite numbers")
    return numbers


def mixed(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix [m, m] or [B, m, m] applied to the parts of `x` [B, m, *event], in its dtype."""
    matrix = matrix.to(x)
    return (
        (matrix @ x.flatten(2)).reshape(x.shape) if x.ndim > 2 else (matrix @ x[..., None])[..., 0]
    )


def van_loan(matrix: Tensor, noise: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Phi and Q of du = A u db + G dw over lengths b [*shape] >= 0, [*shape, m, m] float64."""
    m = len(noise)
    block = host(np.zeros((2 * m, 2 * m)))
    block[:m, :m], block[m:, m:] = matrix, -matrix.mT
    block[:m, m:] = noise.square().diag()
    # F holds exp(|A| b) and Phi its inverse: over long lengths no digit of the product is left
    longest = float(matrix.abs().sum(1).max() * b.max()) if b.numel() else 0.0
    doublings = max(0, math.ceil(math.log2(max(longest, 1.0))))
    whole = torch.linalg.matrix_exp((b / 2**doublings)[..., None, None] * block)
    phi = whole[..., :m, :m]
    q = whole[..., :m, m:] @ phi.mT
    for _ in range(doublings):
        q, phi = q + phi @ q @ phi.mT, phi @ phi
    return phi, (q + q.mT) / 2
