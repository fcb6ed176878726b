"""Error of the likelihood against its cost, ours and the peers', on mixtures of known density.

    rms = sqrt(mean_i (log p_found(x_i) - log p(x_i))^2) in nats,
    cost = network evaluations + products with the Jacobian, per sample.

All start where VP is at t = 1e-5, sigma/alpha = 0.001, and end where it is at T = 1. k-diffusion's
`log_likelihood` and torchdiffeq's `dopri5` hold one Rademacher probe fixed along the path; the
latter is also run with the exact trace. A cost of ours includes its share of what a call spends
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import util

import torch
from torch import Tensor

import scoresolve as ss
from benchmarks.absent import absent
from scoresolve.divergence import exact_divergence, hutchinson
from scoresolve.metrics import class_mixture
from scoresolve.peers.from_k_diffusion import k_sampling
from scoresolve.sde import EDM, VP, GaussianSDE, RectifiedFlow
from scoresolve.targets import GaussianMixture, LowRank, random_mixture, ring

__all__ = ["CASES", "low_rank_mixture", "measure"]

LOW, HIGH = 1e-3, 152.0
COSTS = (200, 460, 1100)
Found = tuple[Tensor, float, Tensor | None]


def low_rank_mixture(
    size: int = 256, components: int = 5, rank: int = 16, std: float = 0.5, rest: float = 0.05
) -> GaussianMixture:
    """Components of low rank plus `rest`^2 I, of standard deviation about `std` in all."""
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = 0.7 * std * normal(components, size)
    factor = 0.7 * std / math.sqrt(rank) * normal(components, size, rank)
    variances = torch.full((components,), rest**2, dtype=torch.float64)
    return GaussianMixture(torch.ones(components), means, LowRank(factor, variances))


def _scaled(mixture: GaussianMixture, std: float) -> GaussianMixture:
    scale = std / float(mixture.covariance.diagonal().mean().sqrt())
    means = scale * (mixture.means - mixture.mean)
    return GaussianMixture(mixture.weights, means, scale**2 * mixture.covariances)


CASES: dict[str, tuple[Callable[[], GaussianMixture], GaussianSDE, int]] = {
    "ring 2-D, VP": (ring, VP(), 256),
    "few 16-D std 1, VP": (lambda: _scaled(random_mixture(16, 4, seed=9), 1.0), VP(), 256),
    "uneven 32-D std .5, EDM": (
        lambda: _scaled(random_mixture(32, 5, seed=5, stds=(0.05, 1.0)), 0.5),
        EDM(),
        256,
    ),
    "digits 64-D, VP": (class_mixture, VP(), 256),
    "digits 64-D, flow": (class_mixture, RectifiedFlow(), 256),
    "ten 64-D, VP": (lambda: random_mixture(64, 10, seed=7), VP(), 256),
    "low rank 256-D, VP": (low_rank_mixture, VP(), 256),
    "low rank 3072-D, VP": (lambda: low_rank_mixture(3072, 1, 8, rest=0.2), VP(), 16),
}

SMALL = ("ring 2-D, VP", "few 16-D std 1, VP", "digits 64-D, VP")


def measure(full: bool = False, cases: Sequence[str] = tuple(CASES)) -> list[dict[str, object]]:
    """RMS error in nats and mean cost per sample, a row for each case and method.

    Args:
        cases: names of `CASES`.
        full: all costs of ours, and the exact trace of torchdiffeq also above 16 dimensions (many
            minutes), instead of two costs.

    Returns:
        Rows with `case`, `method`, `cost`, `rms`, `median`, and for ours `error_bar`, the root
        mean square of the standard errors, and `within`, the share of errors within one.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    absent(["torchdiffeq", "k-diffusion"])
    for case in cases:
        make, sde, count = CASES[case]
        mixture = make()
        x = mixture.sample(count, seed=11)
        truth = mixture.log_prob(x)
        size = math.prod(x.shape[1:])
        methods: dict[str, Callable[[], Found]] = {}
        if util.find_spec("k_diffusion") and util.find_spec("torchdiffeq"):
            methods["k-diffusion log_likelihood"] = lambda: _k_diffusion(mixture, x)  # noqa: B023
        if util.find_spec("torchdiffeq"):
            methods["torchdiffeq dopri5, one probe"] = lambda: _torchdiffeq(mixture, x, False)  # noqa: B023
            if full or size <= 16:
                methods["torchdiffeq dopri5, exact"] = lambda: _torchdiffeq(mixture, x, True)  # noqa: B023
        for cost in COSTS if full else COSTS[:2]:
            methods[f"scoresolve, cost={cost}"] = lambda cost=cost: _ours(mixture, sde, x, cost)  # type: ignore[misc] # noqa: B023
        for method, run in methods.items():
            found, spent, bar = run()
            error = (found - truth).abs()
            rows.append(
                {
                    "case": case,
                    "method": method,
                    "cost": round(spent, 1),
                    "rms": _short(float(error.square().mean().sqrt())),
                    "median": _short(float(error.median())),
                    "error_bar": "" if bar is None else _short(float(bar.square().mean().sqrt())),
                    "within": "" if bar is None else round(float((error < bar).double().mean()), 2),
                }
            )
    return rows


def _ours(mixture: GaussianMixture, sde: GaussianSDE, x: Tensor, cost: int) -> Found:
    found = ss.log_likelihood(mixture.score_model(sde), sde, x, cost=cost)
    bar = found.standard_error
    return found.log_prob, float(found.cost.mean()), bar if bool((bar > 0).any()) else None


def _k_diffusion(mixture: GaussianMixture, x: Tensor) -> Found:
    torch.manual_seed(0)
    model = mixture.score_model(EDM())

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        return model.predict("x0", y, sigma[0])

    found, info = k_sampling().log_likelihood(denoise, x, LOW, HIGH)
    return found, 2.0 * info["fevals"], None


def _torchdiffeq(mixture: GaussianMixture, x: Tensor, exact: bool) -> Found:
    """x and the integral as one state over t of VP, at tolerance 1e-5."""
    from torchdiffeq import odeint

    sde, calls, size = VP(), 0, math.prod(x.shape[1:])
    model = mixture.score_model(sde)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1

    def drift(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1

        def flow(y: Tensor) -> Tensor:
            return model.predict("flow", y, t)

        if exact:
            return exact_divergence(flow, state[0])
        velocity, terms = hutchinson(flow, state[0], probe[None])
        return velocity, terms[0].sum(1)

    times = torch.tensor([1e-5, 1.0], dtype=x.dtype)
    state = (x, x.new_zeros(len(x)))
    ends = odeint(drift, state, times, method="dopri5", rtol=1e-5, atol=1e-5)
    latent, integral = ends[0][-1], ends[1][-1]
    found = sde.prior(x.shape, dtype=x.dtype).log_prob(latent).reshape(len(x), -1)[:, 0] + integral
    return found, calls * (1.0 + (size if exact else 1)), None


def _short(value: float) -> float:
    return float(f"{value:.2g}")
