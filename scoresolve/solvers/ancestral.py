"""Ancestral steps: a deterministic step to a level too low, then fresh noise up to the right one.

In k = sigma/alpha, from k_t to k_s,

    k_up = eta k_s sqrt(1 - k_s^2/k_t^2),   k_down = sqrt(k_s^2 - k_up^2).

With one deterministic call this is DDIM with eta; the methods here take two.
"""

from __future__ import annotations

import math

from scoresolve.errors import real_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver

__all__ = ["DPM2Ancestral", "DPMSolverPP2SAncestral"]


class _Ancestral(Solver):
    order, stochastic, jumps_at_noise, jumps_at_data = 2, True, True, True
    base: str

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = real_number("eta", eta, above=0, most=1)
        self.name = self.base if eta == 1 else f"{self.base}(eta={eta:g})"

    def levels(self, t: float, s: float, run: Run) -> tuple[float, float, float, float]:
        """k_t, k_down, k_up and the time of the level halfway in log k from k_t to k_down."""
        k_t, k_s = (math.exp(-run.log_snr_half(time)) for time in (t, s))
        up = self.eta * k_s * math.sqrt(1 - (k_s / k_t) ** 2)
        down = k_s * math.sqrt(1 - self.eta**2 + (self.eta * k_s / k_t) ** 2)
        return k_t, down, up, run.time(-math.log(k_t * down) / 2)


class DPM2Ancestral(_Ancestral):
    """DPM-Solver-2 (midpoint in log k) down, then noise up.

    Args:
        eta: in (0, 1]; 1 is ancestral.

    Raises:
        ArgumentError: another eta.

    Source:
        Karras et al. 2022 (2206.00364), algorithm 2 with another split; Lu et al. 2022
        (2206.00927), algorithm 1.
    """

    base, predicts = "dpm_2_ancestral", "eps"
    source = "Lu et al. 2022 (2206.00927), algorithm 1, with ancestral noise"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        k_t, down, up, middle = self.levels(t, s, run)
        k_middle, y = math.exp(-run.log_snr_half(middle)), x / run.alpha(t)
        half = y + (k_middle - k_t) * run.predict(x, t)
        slope = run.predict(run.alpha(middle) * half, middle)
        return run.alpha(s) * (y + (down - k_t) * slope + up * run.noise(t, s))


class DPMSolverPP2SAncestral(_Ancestral):
    """DPM-Solver++ (2S) down, then noise up.

    Args:
        eta: in (0, 1]; 1 is ancestral.

    Raises:
        ArgumentError: another eta.

    Source:
        Lu et al. 2022 (2211.01095), algorithm 1, with ancestral noise.
    """

    base, predicts = "dpmpp_2s_ancestral", "x0"
    source = "Lu et al. 2022 (2211.01095), algorithm 1, with ancestral noise"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        k_t, down, up, middle = self.levels(t, s, run)
        k_middle, y = math.exp(-run.log_snr_half(middle)), x / run.alpha(t)
        x0 = run.predict(x, t)
        x0 = run.predict(run.alpha(middle) * (x0 + k_middle / k_t * (y - x0)), middle)
        return run.alpha(s) * (x0 + down / k_t * (y - x0) + up * run.noise(t, s))
