r"""The Gaussian diffusion chain: data that is shrunk and noised step by step.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),
    q(x_{t-1} | x_t, x_0) = N(mu(x_t, x_0), beta_tilde_t I),
    beta_tilde_t = (1 - alpha_bar_{t-1})/(1 - alpha_bar_t) beta_t.

The reverse chain puts a model's prediction x0(x_t, t) for x_0, with variance beta_tilde_t or
beta_t. At integer times all of this is the process `DiscreteVP`, so that every solver, bound and
likelihood of the package applies to the chain; with ever more and ever smaller steps it is the SDE
dx = -beta/2 x dt + sqrt(beta) dw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, known_name, whole_number
from scoresolve.models import Model, as_model
from scoresolve.noise import Philox, Purpose
from scoresolve.plans import Plan, check_state, trace
from scoresolve.sde import DiscreteVP, VariancePreserving, sampled_betas
from scoresolve.solvers import DDPM

__all__ = ["DiffusionChain"]

_SOLVERS: Final = {"posterior": "posterior", "beta": "forward"}


class DiffusionChain:
    """A chain that shrinks and noises its data, and its reverse.

    Args:
        betas: variance of the noise of each step, [T], in (0, 1); the last may be 1.

    Attributes:
        betas, alpha_bars: beta_t and alpha_bar_t at index t - 1, float64.
        sde: the chain as a process, whose time is t: for models, verbs and bounds.

    Raises:
        ArgumentError: a beta is out of range.

    Source:
        Sohl-Dickstein et al. 2015 (1503.03585), section 2; Ho et al. 2020 (2006.11239), section 2.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        self.betas = torch.as_tensor(betas, dtype=torch.float64).flatten()
        inner = bool(((self.betas > 0) & (self.betas < 1))[:-1].all())
        if not (self.betas.numel() and inner and 0 < float(self.betas[-1]) <= 1):
            raise ArgumentError("betas must lie in (0, 1), or (0, 1] for the last")
        self.alpha_bars = (1 - self.betas).cumprod(0)
        self.sde = DiscreteVP(self.alpha_bars)

    @classmethod
    def near(cls, sde: VariancePreserving, steps: int) -> DiffusionChain:
        """The chain with `sampled_betas(sde, steps)`, which tends to `sde`: t/steps is its t/T."""
        return cls(sampled_betas(sde, steps))

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def alpha_bar(self, t: int) -> float:
        """The share of the data's variance that is left at step `t` in 0..T."""
        t = whole_number("t", t, 0, self.T)
        return float(self.alpha_bars[t - 1]) if t else 1.0

    def step(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean, shape of `x`, and standard deviation [] of q(x_t | x_{t-1} = `x`), t in 1..T."""
        check_state(x)
        beta = self.betas[whole_number("t", t, 1, self.T) - 1]
        return (1 - beta).sqrt().to(x) * x, beta.sqrt().to(x)

    def marginal(self, x0: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean, shape of `x0`, and standard deviation [] of q(x_t | x_0 = `x0`), t in 0..T."""
        check_state(x0)
        return self.sde.marginal(x0, float(whole_number("t", t, 0, self.T)))

    def posterior(self, x: Tensor, x0: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation sqrt(beta_tilde_t) of q(x_{t-1} | x_t = `x`, x_0 = `x0`).

        Args:
            x, x0: of one shape, [B, *event].
            t: the step, in 1..T; at 1 the standard deviation is 0.

        Returns:
            Mean, shape of `x`, and standard deviation, [].
        """
        t = whole_number("t", t, 1, self.T)
        check_state(x)
        if x.shape != x0.shape:
            raise ShapeError(
                f"x of shape {tuple(x.shape)} and x0 of shape {tuple(x0.shape)}: give one shape"
            )
        return self.sde.posterior(x, x0, float(t - 1), float(t))

    def reverse(
        self,
        score: Model | Callable[..., Tensor],
        x: Tensor,
        t: int,
        variance: str = "posterior",
        **cond: Any,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of p(x_{t-1} | x_t = `x`), one network call.

        Args:
            score: a `Model` of `sde`, whatever it predicts, or a callable `score(x, t, **cond)`.
            x: [B, *event].
            t: the step, in 1..T.
            variance: "posterior" for beta_tilde_t, right for data that is one point, or "beta" for
                beta_t, right for data that is N(0, I).
            **cond: passed on to the model.

        Returns:
            Mean, shape of `x`, and standard deviation, [].

        Raises:
            UnknownNameError: another variance.

        Source:
            Ho et al. 2020 (2006.11239), section 3.2.
        """
        known_name("variance", variance, _SOLVERS)
        t = whole_number("t", t, 1, self.T)
        check_state(x)
        x0 = as_model(score, self.sde).predict("x0", x, float(t), **cond)
        mean, std = self.posterior(x, x0, t)
        return mean, std if variance == "posterior" else self.step(x, t)[1]

    def plan(self, variance: str = "posterior") -> Plan:
        """The reverse chain as a plan: steps T, ..., 1, and x0(x_1) at the end, T network calls.

        It is the solver "ddpm" or, for "beta", "ddpm_forward" at every step of the chain; the
        last step adds no noise. Its exact law on Gaussian data is `plan.law`, its transition
        densities are those of `scoresolve.GaussianChain(plan)`.

        Raises:
            UnknownNameError: another variance than "posterior" and "beta".
        """
        known_name("variance", variance, _SOLVERS)
        times = [float(t) for t in range(self.T, 0, -1)]
        return trace(DDPM(_SOLVERS[variance]), self.sde, times, denoise=True)

    def forward(self, x0: Tensor, seed: int = 0) -> Iterator[Tensor]:
        """A path x_0, x_1, ..., x_T, each [B, *event]; sample i depends on i alone.

        Half precision is rounded from a path in float32: factors sqrt(1 - beta_t) that are nearly
        1 would be 1 in it, so that the noise of many steps piled up.
        """
        check_state(x0)
        noise, x = Philox(seed), x0.to(torch.promote_types(x0.dtype, torch.float32))
        yield x0
        for t in range(1, self.T + 1):
            mean, std = self.step(x, t)
            x = mean + std * noise.normal(x, t)
            yield x.to(x0.dtype)

    def sample(
        self,
        score: Model | Callable[..., Tensor],
        shape: Sequence[int],
        variance: str = "posterior",
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        **cond: Any,
    ) -> Tensor:
        """The end x_0 of the reverse chain from N(0, I), which is `plan(variance).run`.

        Args:
            score: as in `reverse`.
            shape: [B, *event].
            variance: as in `reverse`.
            seed: sample i depends on it and on i alone.
            dtype: of the state, floating.
            device: of the state; the CPU if omitted.
            **cond: passed on to the model.

        Returns:
            Samples of that shape.
        """
        noise, like = Philox(seed), torch.empty(tuple(shape), dtype=dtype, device=device)
        model = as_model(score, self.sde)
        start = noise.normal(like, 0, Purpose.START)
        return self.plan(variance).run(model, start, noise, **cond)
