"""Samplers that go back up: fresh noise that no reverse process asks for, and a solver downward.

    churn         before each step, up by a factor 1 + gamma in sigma/alpha
    restart       at the low end of an interval, up to its high end, several times
    resampling    after each step, back to where it began, several times
    consistency   after each prediction of x0, up to the next level

The noise is fresh each time: it belongs to no interval of a Brownian path.
"""

from __future__ import annotations

import itertools
import math

from scoresolve.errors import ArgumentError, whole_number
from scoresolve.plans import Linear, Run
from scoresolve.solvers.base import Solver
from scoresolve.solvers.forms import get_form
from scoresolve.solvers.runge_kutta import HEUN, advance

__all__ = ["Churn", "Consistency", "Resampling", "Restart"]


class Churn(Solver):
    """The stochastic sampler of EDM: noise up by gamma, then Heun down, in k = sigma/alpha.

        k^ = k_t (1 + gamma),   gamma = min(churn/N, sqrt(2) - 1) where low <= k_t <= high.

    At most up to the grid's first level: no call is made outside the grid.

    Args:
        churn: S_churn, over all N steps, >= 0.
        low, high: S_tmin and S_tmax, levels of sigma/alpha.
        inflation: S_noise, standard deviation of the noise added, > 0.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Karras et al. 2022 (2206.00364), algorithm 2.
    """

    name, predicts, order, stochastic = "edm_churn", "eps", 2, True
    source = "Karras et al. 2022 (2206.00364), algorithm 2"

    def __init__(
        self,
        churn: float = 40.0,
        low: float = 0.05,
        high: float = 50.0,
        inflation: float = 1.0,
    ) -> None:
        if not (churn >= 0 and 0 <= low <= high and inflation > 0):
            raise ArgumentError(
                f"churn = {churn}, low = {low}, high = {high}, inflation = {inflation}: "
                "need churn >= 0, 0 <= low <= high and inflation > 0"
            )
        self.churn, self.low, self.high, self.inflation = churn, low, high, inflation

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form, level = get_form("eps"), math.exp(-run.log_snr_half(t))
        y = x / form.scale(run, t)
        if self.low <= level <= self.high:
            gamma = min(self.churn / (len(run.times) - 1), math.sqrt(2) - 1)
            top = math.exp(-run.log_snr_half(run.times[0]))
            raised = min(level * (1 + gamma), top)
            if raised > level:
                std = self.inflation * math.sqrt(raised**2 - level**2)
                t, y = form.time(run, raised), y + std * run.noise(t, t)
        if run.sigma(s) == 0:
            return run.jump(form.scale(run, t) * y, t, s)
        y, _ = advance(HEUN, form, y, t, s, run)
        return form.scale(run, s) * y


class Restart(Solver):
    """Restart: Heun down; at the low end of an interval, noise up and down again, several times.

    Args:
        low, high: ends of the interval, levels of sigma/alpha; its ends are the last grid time at
            or above `low` and the first at or below `high`, and the ways down take the grid's
            own times between.
        repeats: K, times to go up.

    Raises:
        ArgumentError: a value out of range.

    Source:
        Xu et al. 2023 (2306.14878), algorithm 1, appendix B.
    """

    name, predicts, order, stochastic = "restart", "eps", 2, True
    source = "Xu et al. 2023 (2306.14878), algorithm 1"

    def __init__(self, low: float = 0.3, high: float = 1.0, repeats: int = 2) -> None:
        if not 0 < low < high:
            raise ArgumentError(f"low = {low}, high = {high}: need 0 < low < high")
        self.low, self.high, self.repeats = low, high, whole_number("repeats", repeats)

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        if run.sigma(s) == 0:
            return run.jump(x, t, s)
        form = get_form("eps")
        y, _ = advance(HEUN, form, x / form.scale(run, t), t, s, run)

        def level(index: int) -> float:
            return math.exp(-run.log_snr_half(run.times[index]))

        end = run.index + 1
        if level(end) < self.low or (not run.last and level(end + 1) >= self.low):
            return form.scale(run, s) * y
        start = next(index for index in range(end + 1) if level(index) <= self.high or index == end)
        inside = run.times[start : end + 1]
        if start == end:
            return form.scale(run, s) * y
        raised = math.sqrt(level(start) ** 2 - level(end) ** 2)
        for _ in range(self.repeats):
            y = run.hold(y + raised * run.noise(s, s))
            for before, after in itertools.pairwise(inside):
                y = run.hold(advance(HEUN, form, y, before, after, run)[0])
        return form.scale(run, s) * y


class Resampling(Solver):
    """RePaint's resampling: each step is taken several times, with noise back up in between.

    Args:
        solver: a fixed-grid solver of one step; steps of several would remember undone ones.
        times: how often each step is taken, >= 1.

    Source:
        Lugmayr et al. 2022 (2201.09865), algorithm 1.
    """

    def __init__(self, solver: Solver, times: int = 10) -> None:
        self.solver, self.times = solver, whole_number("times", times)
        self.predicts, self.order, self.stochastic = solver.predicts, solver.order, True
        self.jumps_at_ends = solver.jumps_at_ends
        self.name = "repaint" if solver.name == "ddpm" else f"repaint({solver.name})"
        self.source = f"Lugmayr et al. 2022 (2201.09865), algorithm 1; {solver.source}"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        for again in range(self.times):
            if again:
                scale, std = run.transition(s, t)
                x = scale * x + std * run.noise(t, t)
            x = self.solver.step(x, t, s, run)
        return x


class Consistency(Solver):
    """Multistep consistency sampling: x_s = alpha_s x0 + sigma_s z, all noise fresh.

    Right for a model that predicts where the flow ends; with a score model it does not converge.

    Source:
        Song et al. 2023 (2303.01469), algorithm 1; Luo et al. 2023 (2310.04378), algorithm 3.
    """

    name, predicts, order, stochastic = "consistency", "x0", None, True
    source = "Song et al. 2023 (2303.01469), algorithm 1"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        return run.alpha(s) * run.predict(x, t) + run.sigma(s) * run.noise(t, t)
