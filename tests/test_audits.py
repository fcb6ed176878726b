"""The audit finds by itself what is known to be wrong with other libraries' samplers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_unpackaged_defects import diff_sampler_rhoab, unipc_vary_coeff

import scoresolve as ss
from scoresolve.audits import Audit, Defect, audit_page, certificate_page, pages
from scoresolve.audits.causes import cause_of
from scoresolve.certificates import Check
from scoresolve.cli import main
from scoresolve.errors import ArgumentError, UnknownNameError
from scoresolve.peers import LIBRARIES, BlackBox, boxes, installed

FEW = (32, 64, 128)

KNOWN = [
    ("azula", r"^REAB2$", "order 2 of the mean"),
    ("azula", r"ddim\(eta=0\), as", "draws no random numbers"),
    ("diffusers", r"^flow_match_euler\(stochastic\)$", "order 1 of the covariance"),
    ("diffusers", r"ddim\(trailing\), as", "order 1 of the mean"),
    ("diffusers", r"2M\(leading\), as", "order 2 of its last jump"),
    ("diffusers", r"^sde-dpmsolver\+\+ 3M", "order 3 of the covariance"),
    ("diffusers", r"unipc2\(bh1\), as", "order 2 of the path"),
    ("diffusers", r"sde_ve with", "keeps samples apart"),
    ("k-diffusion", r"^dpmpp_sde$", "order 2 of the covariance"),
    ("k-diffusion", r"^dpmpp_3m_sde$", "order 3 of the covariance"),
    ("k-diffusion", r"^dpm_fast$", "no refinement makes it worse"),
    ("k-diffusion", r"^heun, as", "draws no random numbers"),
    ("k-diffusion", r"dpm_adaptive", "keeps a NaN row to itself"),
    ("k-diffusion", r"dpmpp_2m, as", "keeps the variance of narrow data at its end"),
    ("torchdiffeq", r"dopri5", "stays inside the interval"),
    ("torchdiffeq", r"midpoint", "refuses a model of the wrong shape"),
    ("torchode", r"dopri5", "keeps a NaN row to itself"),
    ("torchsde", r"euler", "gives the same sample in any batch"),
    ("scipy", r"RK45", "keeps a NaN row to itself"),
]


@pytest.mark.parametrize(("library", "sampler", "claim"), KNOWN, ids=lambda value: str(value))
def test_the_audit_finds_what_is_known(library: str, sampler: str, claim: str) -> None:
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    found = ss.audit(library, only=[sampler], refinements=FEW)
    claims = {check.claim for c in found.certificates for check in c.checks if not check.passed}
    assert claim in claims, str(found)
    assert cause_of(library, found.certificates[0].solver, claim)


def test_float32_cancellation_in_deis_of_order_three_is_found() -> None:
    if not installed("diffusers"):
        pytest.skip("diffusers is not installed")
    (found,) = (made for name, made in boxes("diffusers").items() if name == "deis3, as shipped")
    claims = {check.claim for check in ss.certify(found, budgets=(10,)).checks if not check.passed}
    assert "no refinement makes it worse" in claims


@pytest.mark.parametrize(
    ("run", "order", "sde", "claim"),
    [
        (unipc_vary_coeff(complete=False), 3, ss.VP(), "order 3 of the path"),
        (diff_sampler_rhoab(3), 3, ss.EDM(), "has an exact law"),
        (diff_sampler_rhoab(4), 4, ss.EDM(), "order 4 of the path"),
    ],
    ids=["unipc vary_coeff", "rhoab 3", "rhoab 4"],
)
def test_unpackaged_defects_are_found(
    run: Callable[..., Any], order: int, sde: ss.GaussianSDE, claim: str
) -> None:
    def with_its_model(model: ss.Model, x: Any, times: Sequence[float], noise: Any) -> Any:
        return run(times, x, noise, model)

    made = BlackBox(with_its_model, order=order, gridded=True)
    certificate = ss.certify(made, sde, refinements=FEW, budgets=(10,))
    assert claim in {check.claim for check in certificate.checks if not check.passed}


def score_sde_ancestral(model: ss.Model, x: Any, n: int, noise: Any) -> Any:
    """The VP ancestral predictor of score_sde at n times, beta from .1/n to 20/n."""
    betas = torch.linspace(0.1 / n, 20.0 / n, n, dtype=x.dtype)
    for t in torch.linspace(1.0, 1e-3, n, dtype=x.dtype):
        beta = betas[int(t * (n - 1))]
        x = (x + beta * model(x, t)) / (1 - beta).sqrt() + beta.sqrt() * noise(x)
    return x


def test_a_sampler_that_is_not_a_number_at_few_steps_is_found() -> None:
    made = BlackBox(score_sde_ancestral, order=1, stochastic=True, sde=ss.VP())
    certificate = ss.certify(made, refinements=(40, 80, 160), budgets=(10, 20, 50))
    infinite = [bias.nfe for bias in certificate.bias if bias.variance_error == float("inf")]
    assert infinite == [10, 20]
    assert "is finite at every budget" in {c.claim for c in certificate.checks if not c.passed}


def gotta_go_fast(model: ss.Model, x: Any, n: int, noise: Any) -> Any:
    """Adaptive steps of the reverse SDE, a size a row, until no row is on its way any more.

    Source:
        Jolicoeur-Martineau et al. 2021 (arXiv 2105.14080), algorithm 1, with the loop of
        github.com/AlexiaJM/score_sde_fast_sampling: `sde_sampling_torch.py`.
    """
    sde, tolerance, end = model.sde, 0.01, 1e-3

    def change(x: Any, t: Any, h: Any, z: Any) -> Any:
        return h.sqrt() * sde.diffusion(t) * z - h * sde.reverse_drift(x, t[:, 0], model)

    t, h, before = torch.full_like(x[:, :1], sde.T), torch.full_like(x[:, :1], 0.01), x
    while bool(((t - end).abs() > 1e-6).any()):
        z = noise(x)
        first = change(x, t, h, z)
        second = change(x + first, t - h, h, z)
        allowed = tolerance * torch.maximum(before.abs(), (x + first).abs()).clamp(min=1.0)
        error = ((second - first) / 2 / allowed).square().mean(1, keepdim=True).sqrt()
        accepted = error <= 1
        before = torch.where(accepted, x + first, before)
        x = torch.where(accepted, x + (first + second) / 2, x)
        t = torch.where(accepted, t - h, t)
        factor = torch.where(h == 0, h, 0.9 * error.pow(-0.9))
        h = torch.minimum((t - end).clamp(min=0), h * factor)
    return x


def test_gotta_go_fast_with_a_row_that_is_not_a_number_is_found_not_to_return() -> None:
    made = BlackBox(gotta_go_fast, stochastic=True, adaptive=True, end=1e-3, sde=ss.VP())
    failed = {check.claim: check.seen for check in ss.certify(made).checks if not check.passed}
    assert failed["keeps a NaN row to itself"].startswith("has not returned"), failed


@pytest.mark.parametrize(
    ("library", "sampler", "claim", "word"),
    [
        ("diffusers", "plms, as shipped", "keeps the variance of narrow data", "set_alpha_to_one"),
        ("diffusers", "euler, as shipped", "keeps the variance of narrow data", "jumps to sigma"),
        ("diffusers", "lcm", "keeps the variance of narrow data", "consistency model"),
        ("k-diffusion", "dpm_adaptive, as shipped", "draws no random numbers", "eta is 0"),
        ("k-diffusion", "dpm_adaptive, as shipped", "keeps a NaN row to itself", "for ever"),
    ],
)
def test_a_cause_is_that_of_the_sampler_and_not_of_its_neighbours(
    library: str, sampler: str, claim: str, word: str
) -> None:
    assert word in cause_of(library, sampler, claim)


# --- reports -------------------------------------------------------------------------------------


def small_audit() -> Audit:
    certificate = ss.certify("ddim", refinements=(8, 16), budgets=(10,))
    bad = Check("order 2 of the path", False, "measured 1.00 <of course>")
    defect = Defect(bad.claim, (("ddim", bad.seen),), "a cause", "print()\n")
    return Audit("library", "1.0", "2026-01-01", (certificate,), (defect,))


def test_reports_say_what_was_found() -> None:
    found = small_audit()
    assert "1 defects" in str(found) and "cause: a cause" in str(found)
    text = pages([found, found])
    assert text.count("## library 1.0") == 2 and "Cause: a cause." in text and "`ddim`" in text
    page = audit_page([found])
    assert "&lt;of course&gt;" in page and "data:image/png;base64," in page
    assert json.loads(found.to_json())["defects"][0]["samplers"] == {"ddim": bad_seen(found)}


def bad_seen(found: Audit) -> str:
    return found.defects[0].samplers[0][1]


def test_a_page_of_certificates_shows_every_check() -> None:
    certificate = ss.certify("ddim", refinements=(8, 16), budgets=(10,))
    page = certificate_page([certificate])
    assert all(check.claim in page for check in certificate.checks)


def test_a_page_holds_a_sampler_whose_every_error_is_infinite() -> None:
    lost = BlackBox(lambda model, x, n, noise: x * float("nan"), "lost", order=1)
    certificate = ss.certify(lost, refinements=(8, 16), budgets=(8,))
    assert set(certificate.errors["mean"]) == {float("inf")}
    assert "errors of lost against steps" in certificate_page([certificate])


def test_bad_requests_are_refused() -> None:
    for only in ("RK45", ("(",), (3,)):
        with pytest.raises(ArgumentError, match="regular expressions"):
            ss.audit("scipy", only=only)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="diffusers"):
        ss.audit("difusers")
    with pytest.raises(ArgumentError, match="no sampler"):
        ss.audit("scipy", only=["nothing like it"])
    for library in LIBRARIES:
        if not installed(library):
            with pytest.raises(ArgumentError, match="not installed"):
                ss.audit(library)


def test_the_command_writes_a_report_and_fails_where_a_claim_does(tmp_path: Any) -> None:
    out = tmp_path / "audit.md"
    result = CliRunner().invoke(main, ["audit", "scipy", "--only", "RK45", "--out", str(out)])
    assert result.exit_code == 1
    assert "keeps a NaN row to itself" in result.output
    assert "## scipy" in out.read_text()
