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

from scoresolve.errors import ArgumentError, real_number, whole_number
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

    name, predicts, order, stochastic, jumps_at_noise = "edm_churn", "eps", 2, True, True
    source = "Karras et al. 2022 (2206.00364), algorithm 2"

    def __init__(
        self,
        churn: float = 40.0,
        low: float = 0.05,
        high: float = 50.0,
        inflation: float = 1.0,
    ) -> None:
        self.churn = real_number("churn", churn, least=0)
        self.low = real_number("low", low, least=0)
        self.high = real_number("high", high, above=self.low)
        self.inflation = real_number("inflation", inflation, above=0)

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form, level = get_form("eps"), math.exp(-run.log_snr_half(t))
        y = x / form.scale(run, t)
        if self.low <= level <= self.high:
            room = math.expm1(run.log_snr_half(t) - run.log_snr_half(run.times[0]))
            gamma = min(self.churn / (len(run.times) - 1), math.sqrt(2) - 1, room)
            if gamma > 0:
                std = self.inflation * level * math.sqrt(gamma * (2 + gamma))
                t, y = form.time(run, level * (1 + gamma)), y + std * run.noise(t, t)
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
    jumps_at_noise, jumps_at_data = True, True
    source = "Xu et al. 2023 (2306.14878), algorithm 1"

    def __init__(self, low: float = 0.3, high: float = 1.0, repeats: int = 2) -> None:
        self.low = real_number("low", low, above=0)
        self.high = real_number("high", high, above=self.low)
        self.repeats = whole_number("repeats", repeats)

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
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

    The last step is taken once. It is meant for models of `guidance.inpaint`: each pass tells the
    unknown part more of the known one.

    Args:
        solver: a fixed-grid solver of one step; one of several would remember undone ones.
        times: how often each step is taken, >= 1.

    Raises:
        ArgumentError: the solver is none, or of several steps.

    Source:
        Lugmayr et al. 2022 (2201.09865), algorithm 1.
    """

    def __init__(self, solver: Solver, times: int = 10) -> None:
        if not isinstance(solver, Solver) or solver.remembers:
            raise ArgumentError(f"{solver!r} cannot take a step again: give a solver of one step")
        self.solver, self.times = solver, whole_number("times", times)
        self.predicts, self.order, self.stochastic = solver.predicts, solver.order, True
        self.jumps_at_noise, self.jumps_at_data = solver.jumps_at_noise, solver.jumps_at_data
        self.grid = solver.grid
        self.name = "repaint" if solver.name == "ddpm" else f"repaint({solver.name})"
        self.source = f"Lugmayr et al. 2022 (2201.09865), algorithm 1; {solver.source}"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        for again in range(1 if run.last else self.times):
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
