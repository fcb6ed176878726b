"""Error of the likelihood against its cost, on mixtures whose density is known in closed form."""

from __future__ import annotations

import scoresolve as ss
from scoresolve.solvers import DormandPrince

__all__ = ["measure"]


def measure(
    tolerances: tuple[float, ...] = (1e-4, 3e-5, 1e-5), count: int = 256
) -> list[dict[str, object]]:
    """RMS error in nats and mean cost per sample of the exact-trace likelihood on a 2-D ring.

    Cost is network evaluations plus vector-Jacobian products, counted per sample.

    Args:
        tolerances: of the adaptive solver; 1e-5 is the default.
        count: data points.

    Returns:
        One row per tolerance: `target`, `tolerance`, `cost`, `rms`, `worst`.
    """
    mixture, sde = ss.targets.ring(), ss.VP()
    x = mixture.sample(count)
    exact = mixture.log_prob(x)
    rows: list[dict[str, object]] = []
    for tolerance in tolerances:
        found = ss.log_likelihood(
            mixture.score_model(sde), sde, x, solver=DormandPrince(tolerance, tolerance)
        )
        error = found.log_prob - exact
        rows.append(
            {
                "target": "ring",
                "tolerance": tolerance,
                "cost": round(float((found.forwards + found.products).double().mean()), 1),
                "rms": float(f"{float(error.square().mean().sqrt()):.2e}"),
                "worst": float(f"{float(error.abs().max()):.2e}"),
            }
        )
    return rows
