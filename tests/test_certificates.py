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
from scoresolve.errors import ArgumentError, UnknownNameError
from scoresolve.plans import Linear, Run
from scoresolve.sde import TimeLike, as_time
from scoresolve.solvers import (
    REGISTRY,
    SRA1,
    DPMSolverPP,
    EulerMaruyama,
    ShARK,
    Solver,
    get_solver,
)

FIXED = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
COARSE = (32, 64, 128, 256)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_solver_passes(name: str) -> None:
    certificate = certify(name, budgets=(20,))
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("sde", [ss.RectifiedFlow(), ss.EDM(), ss.SubVP()], ids=repr)
@pytest.mark.parametrize("name", ["euler", "heun", "ab3_v", "dpmpp_2m", "ddpm", "stochastic_heun"])
def test_certificates_hold_on_other_processes(name: str, sde: ss.GaussianSDE) -> None:
    certificate = certify(name, sde, budgets=(20,))
    assert certificate.passed, str(certificate)


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
