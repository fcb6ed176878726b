"""A certificate passes what is right and fails what is broken."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.certificates import certify, measured_order
from scoresolve.certificates.measured import Drawn, law_checks, modes
from scoresolve.certificates.stability import (
    amplification,
    rounding_errors,
    stability_checks,
    stability_of,
)
from scoresolve.errors import ArgumentError, UnknownNameError
from scoresolve.noise import Purpose
from scoresolve.plans import Linear, Run
from scoresolve.sde import TimeLike, as_time
from scoresolve.solvers import (
    REGISTRY,
    SRA1,
    Corrector,
    DPMSolverPP,
    EulerMaruyama,
    PredictorCorrector,
    ShARK,
    Solver,
    get_solver,
)
from scoresolve.solvers.adams import adams_weights
from scoresolve.solvers.forms import get_form

FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
COARSE = (32, 64, 128, 256)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_solver_passes(name: str) -> None:
    certificate = certify(name, budgets=(20,))
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("sde", [ss.EDM(), ss.SubVP()], ids=repr)
@pytest.mark.parametrize("name", ["euler", "heun", "ab3_v", "dpmpp_2m", "ddpm", "stochastic_heun"])
def test_certificates_hold_on_other_processes(name: str, sde: ss.GaussianSDE) -> None:
    certificate = certify(name, sde, budgets=(20,))
    assert certificate.passed, str(certificate)


class Nystroem(Solver):
    """The explicit midpoint method over two steps: y_{n+1} = y_{n-1} + int of a line of slopes."""

    order, remembers, source = 2, True, "Hairer et al. 1993, III.1"

    def __init__(self, form: str = "v", blind: bool = False) -> None:
        self.form, self.blind, self.name = get_form(form), blind, f"nystroem_{form}"
        self.predicts = self.form.prediction
        self.jumps_at_noise = self.form.singular_at_noise

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        form = self.form
        now, end = form.clock(run, t), form.clock(run, s)
        y = x / form.scale(run, t)
        slope = form.slope(run, y, t)
        if not run.past:
            return form.scale(run, s) * (y + (end - now) * slope)
        past = run.past[-1]
        start = form.clock(run, past.t)
        before = form.slope_from(run, past.t, past.x, past.m)
        y_before = past.x / form.scale(run, t if self.blind else past.t)
        return form.scale(run, s) * self.joined(y_before, y, before, slope, (start, now, end))

    def joined(
        self, y_before: Linear, y: Linear, before: Linear, slope: Linear, clock: tuple[float, ...]
    ) -> Linear:
        start, now, end = clock
        w = adams_weights([start, now], start, end)
        return y_before + w[0] * before + w[1] * slope


class Parasite(Nystroem):
    """y_{n+1} = (1 + r) y_n - r y_{n-1} + slopes: consistent, of roots 1 and r."""

    def __init__(self, root: float, form: str = "v") -> None:
        super().__init__(form)
        self.root, self.name = root, f"parasite_{root:g}_{form}"

    def joined(
        self, y_before: Linear, y: Linear, before: Linear, slope: Linear, clock: tuple[float, ...]
    ) -> Linear:
        (start, now, end), r = clock, self.root
        old, new = (adams_weights([start, now], *span) for span in ((start, now), (now, end)))
        flow = (new[0] - r * old[0]) * before + (new[1] - r * old[1]) * slope
        return (1 + r) * y - r * y_before + flow


class ForwardScore(Solver):
    """Euler in time, three times as fast as the flow and back: stable only with short steps."""

    name, predicts, order, source = "forward", "flow", 1, "none"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        ahead = x + 9 * (s - t) * run.predict(x, t)
        return x + (s - t) * run.predict(ahead, s)


def test_a_factor_that_is_one_on_vp_alone_is_seen_by_default() -> None:
    right, wrong = certify(Nystroem()), certify(Nystroem(blind=True))
    assert right.passed, str(right)
    assert not wrong.passed
    on_vp, on_flow = wrong.worlds
    assert on_vp.passed and not on_flow.passed
    assert wrong.orders["path"] == on_flow.orders["path"] < 0.5
    assert wrong.errors["path"] == on_flow.errors["path"]
    seen = next(check.seen for check in wrong.checks if check.claim == "order 2 of the path")
    assert seen.startswith("RectifiedFlow: measured")
    assert (
        certify(Nystroem(blind=True), ss.VP(), refinements=COARSE)
        .not_proved[0]
        .startswith("any process but VP")
    )


STABLE = "does not blow up narrow data or small errors"


@pytest.mark.parametrize(
    "unstable",
    [
        Nystroem("eps"),
        Parasite(-5.0),
        Parasite(1.2),
        Parasite(-1.02),
        Parasite(1.02),
        ForwardScore(),
    ],
    ids=repr,
)
def test_a_consistent_method_that_is_unstable_fails(unstable: Solver) -> None:
    certificate = certify(unstable, refinements=(32, 64, 128), budgets=(20,))
    assert not certificate.passed


def test_a_parasitic_root_is_seen_by_what_it_makes_of_rounding_where_the_law_is_right() -> None:
    certificate = certify(Nystroem("eps"), refinements=(32, 64, 128), budgets=(20,))
    assert min(certificate.orders.values()) > 1.8
    assert [check.claim for check in certificate.checks if not check.passed] == [STABLE]
    weak = certify(Nystroem(), ss.VP(), refinements=COARSE)
    assert any("a network with errors" in what for what in weak.not_proved)


def test_amplification_of_an_exponential_euler_step_is_the_weight_by_hand() -> None:
    """DDIM on EDM: x_s = (s/t) x_t + (1 - s/t) x0, and an error of x0 is -t of that of eps."""
    plan = ss.plan("ddim", ss.EDM(), (4.0, 1.0))
    exact = math.sqrt(1 + 1.0) * (math.asinh(4.0) - math.asinh(1.0))
    assert amplification(plan, [1.0])[0] == pytest.approx(3.0 / exact)
    assert rounding_errors(plan, [1.0])[0] == pytest.approx(0.75 / 512)


def test_a_known_limit_is_stated_and_no_failure() -> None:
    found = [stability_of(ss.plan("stochastic_heun", ss.VP(), steps)) for steps in _grids(10, 50)]
    checks, notes = stability_checks(found, "stochastic_heun", True)
    assert all(check.passed for check in checks) and notes[0].startswith("fewer than 50 calls")
    assert not all(check.passed for check in stability_checks(found, "another", True)[0])


def _grids(*steps: int) -> list[tuple[float, ...]]:
    return [ss.make_grid("flow", ss.VP(), n).times for n in steps]


class NormRule(Corrector):
    """Langevin moves with a step from norms, sample by sample, which do not leave p invariant."""

    name, source, calls = "norms", "none", 1

    def correct(self, x: Linear, t: float, run: Run) -> Linear:
        return run.apply(self, x, t)

    def size(self, x: Tensor, score: Tensor, z: Tensor, t: float) -> Tensor:
        return 2 * (0.16 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2

    def __call__(self, x: Tensor, t: float, predict: Any, noise: Any, draw: int) -> Tensor:
        score = predict("score", x, t)
        z = noise.normal(x, draw, Purpose.CORRECTOR)
        delta = self.size(x, score, z, t)
        return x + delta * score + (2 * delta).sqrt() * z


class ShortMoves(NormRule):
    """The same with one short step for all."""

    name = "short"

    def __init__(self, sde: ss.GaussianSDE) -> None:
        self.sde = sde

    def size(self, x: Tensor, score: Tensor, z: Tensor, t: float) -> Tensor:
        return 0.01 * self.sde.sigma(t) ** 2


@pytest.mark.parametrize("sde", [ss.VP(), ss.RectifiedFlow()], ids=["VP", "RectifiedFlow"])
def test_a_step_that_is_not_linear_has_its_law_measured(sde: ss.GaussianSDE) -> None:
    right = certify(PredictorCorrector(get_solver("dpmpp_2m_sde"), ShortMoves(sde)), sde)
    assert right.passed, str(right)
    wrong = certify(PredictorCorrector(get_solver("dpmpp_2m_sde"), NormRule()), sde)
    failed = {check.claim for check in wrong.checks if not check.passed}
    assert {f"has the right law in {d}" for d in ("1 dimension", "2 dimensions")} <= failed
    assert any("exact law" in what for what in right.not_proved)


class Scaled:
    """x times a number."""

    name, calls = "scaled", 0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor, t: float, predict: Any, noise: Any, draw: int) -> Tensor:
        return self.factor * x


class Opaque(DPMSolverPP):
    """Its steps, handed on by a function that a plan does not see through."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.name, self.factor = "opaque", factor

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        return run.apply(Scaled(self.factor), super().step(x, t, s, run), s)


def test_an_order_that_no_exact_law_can_tell_is_not_proved_and_the_law_measured() -> None:
    right, wrong = certify(Opaque(1.0), ss.VP()), certify(Opaque(1.001), ss.VP())
    assert right.passed and right.nominal_order == 2, str(right)
    assert not right.orders and any("order 2" in what for what in right.not_proved)
    laws = [check.passed for check in wrong.checks if check.claim.startswith("has the right law")]
    assert laws == [False] * 3


def test_a_measured_law_tells_a_third_of_variance_and_a_share_but_not_chance() -> None:
    sde, ends = ss.VP(), (1.0, 1e-3)

    def drawn(change: Any) -> set[bool]:
        def draw(model: ss.Model, x: Tensor) -> Drawn:
            law = modes(x.shape[1]).marginal(sde, ends[1])
            return Drawn(change(law, law.sample(len(x), seed=3)))

        return {check.passed for check in law_checks(draw, sde, ends)[0]}

    def wider(law: ss.GaussianMixture, x: Tensor) -> Tensor:
        near = law.means[(x[:, :1] > 0).long()[:, 0]]
        return near + 1.17 * (x - near)

    assert drawn(lambda law, x: x) == {True}
    assert drawn(wider) == {False}
    assert drawn(lambda law, x: -x) == {False}
    assert drawn(lambda law, x: x + 0.1) == {False}
    assert drawn(lambda law, x: x * math.nan) == {False}


class WrongSigma(DPMSolverPP):
    """sigma_t in both places of the ratio."""

    name = "wrong_sigma"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        right = super().step(x, t, s, run)
        return right + (1 - run.sigma(s) / run.sigma(t)) * 0.1 * x


class WrongFactor(DPMSolverPP):
    """The slope's 1/2 is missing."""

    name = "wrong_factor"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        m, h = run.predict(x, t), run.log_snr_half(s) - run.log_snr_half(t)
        slope = (h / run.past[-1].h) * (m - run.past[-1].m) if run.past else 0.0 * m
        decay = run.sigma(s) / run.sigma(t)
        return decay * x - run.alpha(s) * math.expm1(-h) * (m + slope)


class HalfNoise(EulerMaruyama):
    """The noise variance is half of what it should be."""

    name = "half_noise"

    def step(self, x: Linear, t: float, s: float, run: Run) -> Linear:
        quiet = super().step(x, t, s, run)
        g = run.diffusion(t) * math.sqrt(t - s)
        return quiet + (math.sqrt(0.5) - 1) * g * Linear({max(quiet.terms): 1.0})


@pytest.mark.parametrize("broken", [WrongSigma(), WrongFactor(), HalfNoise()], ids=repr)
def test_a_broken_solver_fails(broken: Solver) -> None:
    certificate = certify(broken, refinements=COARSE)
    assert not certificate.passed
    assert any("order" in check.claim and not check.passed for check in certificate.checks)


class Blind(SRA1):
    """Without the area of the path."""

    name, areas = "blind", (0.0, 0.0)


class Misled(ShARK):
    """The area of the wrong sign."""

    name, areas = "misled", (-1.0, -1.0)


@pytest.mark.parametrize("broken", [Blind(), Misled()], ids=repr)
def test_an_order_along_paths_that_is_not_there_is_seen(broken: Solver) -> None:
    certificate = certify(broken, refinements=COARSE, budgets=(20,))
    failed = {check.claim for check in certificate.checks if not check.passed}
    assert "order 1.5 along Brownian paths" in failed
    assert certificate.orders["strong"] < 1.2


def test_only_noise_that_belongs_to_the_steps_has_an_order_along_paths() -> None:
    orders = {name: certify(name, refinements=COARSE).orders for name in ("ddpm", "edm_churn")}
    assert 0.8 < orders["ddpm"]["strong"] < 1.3 and "strong" not in orders["edm_churn"]


@dataclass
class OwnProcess(ss.GaussianSDE):
    """A user's, which as a dataclass that is not frozen has no hash."""

    T: float = 1.0
    t_min: float = 1e-3

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.cos(1.5 * as_time(t))

    def sigma(self, t: TimeLike) -> Tensor:
        return torch.sin(1.5 * as_time(t))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_process_without_a_hash_is_certified(name: str) -> None:
    certificate = certify(name, OwnProcess(), refinements=COARSE, budgets=(20,))
    assert certificate.passed, str(certificate)


def test_claiming_too_high_an_order_fails() -> None:
    solver = DPMSolverPP()
    solver.order = 3
    certificate = certify(solver, refinements=COARSE)
    assert not certificate.passed
    assert 1.8 < certificate.orders["path"] < 2.2


def test_measured_order_of_known_errors() -> None:
    steps = (10, 20, 40)
    assert measured_order(steps, [n**-3.0 for n in steps]) == pytest.approx(3)
    assert math.isinf(measured_order(steps, [1e-14, 1e-15, 1e-15]))
    assert measured_order(steps, [1e-2, 1e-4, 1e-15]) == pytest.approx(math.log2(100))


def test_biases_are_reported_within_budget_and_shrink() -> None:
    certificate = certify("heun", budgets=(1, 10, 20, 50))
    assert [row.nfe for row in certificate.bias] == [10, 20, 50]
    errors = [row.path_error for row in certificate.bias]
    assert errors == sorted(errors, reverse=True)


def test_a_certificate_prints_and_saves() -> None:
    certificate = certify("ddim", refinements=COARSE)
    text = str(certificate)
    assert "PASSED" in text
    assert "order 1 of the path" in text
    data = json.loads(certificate.to_json())
    assert data["passed"] is True
    assert data["solver"] == "ddim"
    assert [world["passed"] for world in data["worlds"]] == [True, True]
    assert "RectifiedFlow" in certificate.process and "[not proved]" in str(
        certify("ddim", ss.VP(), refinements=(8, 16))
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="dpmpp_2m"):
        certify("dpmpp2m")
    with pytest.raises(ArgumentError, match="increasing"):
        certify("ddim", refinements=(64, 32))
    with pytest.raises(ArgumentError, match="not Gaussian"):
        certify("ddim", ss.Langevin(lambda x: -x))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"refinements": 8},
        {"refinements": "abc"},
        {"refinements": (8.5, 16)},
        {"refinements": (1, 2)},
        {"budgets": 20},
        {"budgets": (0,)},
        {"margin": math.nan},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        certify("euler", **options)


def test_json_has_no_numbers_that_json_lacks() -> None:
    text = certify("euler", refinements=(8, 16), budgets=()).to_json()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["orders"]["mean"] == "inf"
