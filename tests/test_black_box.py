"""Any function that samples is certified by its answers alone, and each kind of fault is seen."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.certificates import MEAN, VARIANCE, Certificate, Draws, NotAffine, affine_law
from scoresolve.certificates.probes import Watched
from scoresolve.certificates.stability import stability_of, stability_of_box
from scoresolve.errors import ArgumentError
from scoresolve.noise import CallableNoise
from scoresolve.peers import BlackBox, diffusers_scheduler, edm_sampler, installed
from scoresolve.targets import gaussian

F64 = torch.float64
QUICK: dict[str, Any] = {"refinements": (32, 64), "budgets": (10,)}
Run = Callable[..., Tensor]


def ours(name: str) -> Run:
    """A solver of the registry behind the interface of a function."""

    def run(model: ss.Model, x: Tensor, times: Sequence[float], noise: Any) -> Tensor:
        source = CallableNoise(lambda like, t, s: noise(like))
        return ss.plan(name, model.sde, times).run(model, x, source)

    return run


def box(run: Run, **claims: Any) -> BlackBox:
    return BlackBox(run, gridded=True, **claims)


def failed(certificate: Certificate) -> set[str]:
    return {check.claim for check in certificate.checks if not check.passed}


# --- the exact law -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun_flow", "ddpm", "dpmpp_sde", "dpmpp_2m_sde"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=["VP", "EDM"])
def test_answers_to_unit_vectors_give_the_law_that_the_plan_has(
    name: str, sde: ss.GaussianSDE
) -> None:
    grid = ss.make_grid("log_snr", sde, 9)
    target = gaussian(MEAN, VARIANCE)
    model, ends = Watched(target.score_model(sde)), (grid.times[0], grid.times[-1])
    found = affine_law(box(ours(name)), model, target, sde, grid.times, ends)
    plan = ss.plan(name, sde, grid)
    law = plan.law(MEAN, VARIANCE, start="marginal")
    torch.testing.assert_close(found.output_mean, law.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.covariance, law.covariance, rtol=1e-10, atol=1e-12)
    assert found.calls == plan.nfe
    assert found.path_error == pytest.approx(law.path_error, rel=1e-8) or plan.stochastic
    assert found.lowest == pytest.approx(grid.times[-2]) or name in ("heun_flow", "dpmpp_sde")


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "ddpm", "ab2_v"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=["VP", "EDM"])
def test_answers_give_the_stability_that_the_plan_has(name: str, sde: ss.GaussianSDE) -> None:
    times = ss.make_grid("log_snr", sde, 12).times
    found = stability_of_box(box(ours(name)), sde, times, (times[0], times[-1]))
    assert found == pytest.approx(stability_of(ss.plan(name, sde, times)), rel=1e-9)


def test_a_consistent_sampler_that_is_unstable_fails() -> None:
    """Dahlquist's example: of order 3, and with a root of -5, which only errors set off."""

    def of_two_steps(model: ss.Model, x: Tensor, n: int, noise: Run) -> Tensor:
        times, before, slope = torch.linspace(1.0, 1e-3, n + 1).tolist(), x, torch.zeros_like(x)
        for t, s in itertools.pairwise(times):
            last, slope = slope, model.predict("flow", x, t)
            if t == times[0]:
                before, x = x, x + (s - t) * slope
            else:
                before, x = x, 5 * before - 4 * x + (s - t) * (4 * slope + 2 * last)
        return x

    found = ss.certify(BlackBox(of_two_steps), ss.VP(), **QUICK)
    assert failed(found) >= {"does not blow up narrow data or small errors"}


def test_the_stability_of_a_sampler_that_asks_row_by_row_is_not_proved() -> None:
    def by_row(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
        return torch.cat([ours("ddim")(model, row[None], times, noise) for row in x])

    found = ss.certify(box(by_row, order=1, sde=ss.VP()), **QUICK)
    assert any(text.startswith("stability: ") for text in found.not_proved), found.not_proved


def test_a_process_wired_in_is_seen_on_another_unless_the_sampler_names_it() -> None:
    def of_vp(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
        for t, s in itertools.pairwise(times):
            sigma_t, sigma_s = (float(model.sde.sigma(u)) for u in (t, s))
            alpha_s = max(0.0, 1 - sigma_s**2) ** 0.5
            eps = model.predict("eps", x, t)
            x0 = (x - sigma_t * eps) / max(1e-9, 1 - sigma_t**2) ** 0.5
            x = alpha_s * x0 + sigma_s * eps
        return x

    right, everywhere = (
        ss.certify(BlackBox(of_vp, gridded=True, order=1, sde=sde), **QUICK)
        for sde in (ss.VP(), None)
    )
    assert failed(right) == {"refuses a model of the wrong shape"}
    assert "any process but VP" in right.not_proved[0]
    on = {world.process.partition("(")[0]: failed(world) for world in everywhere.worlds}
    assert on["VP"] == failed(right) and "order 1 of the path" in on["EDM"]


def test_a_sampler_that_is_not_affine_has_no_exact_law() -> None:
    def rounded(model: ss.Model, x: Tensor, times: Sequence[float], noise: Any) -> Tensor:
        return ours("ddim")(model, x, times, noise).clamp(-1, 1)

    target, sde = gaussian(MEAN, VARIANCE), ss.VP()
    model, times = Watched(target.score_model(sde)), ss.make_grid("log_snr", sde, 4).times
    with pytest.raises(NotAffine, match="apart"):
        affine_law(box(rounded), model, target, sde, times, (times[0], times[-1]))


def test_draws_of_torch_are_answered_by_the_state_of_their_generator() -> None:
    with Draws(lambda like, index: torch.full_like(like, float(index))) as draws:
        first = torch.randn(2), torch.randn_like(torch.zeros(2)), torch.empty(2).normal_(1.0, 2.0)
        generator = torch.Generator().manual_seed(3)
        again = torch.randn(2, generator=generator)
        generator.manual_seed(3)
        same = torch.randn((2,), generator=generator)
        torch.rand(3)
    assert [float(z[0]) for z in first] == [0.0, 1.0, 5.0]
    assert torch.equal(again, same) and float(same[0]) == 3.0
    assert (draws.normals, draws.others) == (4, 1)


# --- right samplers pass, and each fault is seen by the check that is made for it ----------------


@pytest.mark.parametrize("name", ["heun", "ab2_v"])
def test_a_right_deterministic_function_passes(name: str) -> None:
    certificate = ss.certify(box(ours(name), order=2), **QUICK)
    assert failed(certificate) == set(), str(certificate)
    assert certificate.nfe == ("2n" if name == "heun" else "n")


def test_a_right_stochastic_function_fails_only_where_its_noise_knows_no_samples() -> None:
    certificate = ss.certify(box(ours("dpmpp_2m_sde"), order=2, stochastic=True), **QUICK)
    assert failed(certificate) == {"gives the same sample in any batch"}, str(certificate)


def ddim(model: ss.Model, x: Tensor, times: Sequence[float], step: Run) -> Tensor:
    """DDIM by hand, where `step(x0, eps, alpha, sigma)` makes the next state."""
    sde: Any = model.sde
    for t, s in itertools.pairwise(times):
        eps = model.predict("eps", x, t)
        x = step((x - sde.sigma(t) * eps) / sde.alpha(t), eps, sde.alpha(s), sde.sigma(s))
    return x


@functools.cache
def found_in(run: Run) -> set[str]:
    """The claims of order 1 that fail."""
    return failed(ss.certify(box(run, order=1), **QUICK))


def sound(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    return ddim(model, x, times, plain)


def plain(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * x0 + sigma * eps


def draws_for_nothing(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    torch.randn_like(x)
    return ddim(model, x, times, plain)


def mixes_samples(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    return ddim(model, x, times, plain) + 1e-3 * x.square().mean()


def asks_beyond_the_end(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    model.predict("x0", x, times[-1] / 2)
    return ddim(model, x, times, plain)


def hides_what_is_not_a_number(
    model: ss.Model, x: Tensor, times: Sequence[float], noise: Run
) -> Tensor:
    return ddim(model, x, times, plain).nan_to_num(0.0)


def tries_for_ever(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    while not bool(model.predict("x0", x, times[0]).isfinite().all()):
        pass
    return ddim(model, x, times, plain)


def jumps_to_the_data(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    return model.predict("x0", ddim(model, x, times, plain), times[-1])


def shrinks_at_every_step(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
    return ddim(model, x, times, lambda x0, eps, a, s: a * x0 + (1 - 1 / len(times)) * s * eps)


@pytest.mark.parametrize(
    ("run", "claim"),
    [
        (draws_for_nothing, "draws no random numbers"),
        (mixes_samples, "keeps samples apart"),
        (asks_beyond_the_end, "stays inside the interval"),
        (hides_what_is_not_a_number, "keeps a NaN row to itself"),
        (tries_for_ever, "keeps a NaN row to itself"),
        (jumps_to_the_data, "keeps the variance of narrow data at its end"),
        (shrinks_at_every_step, "order 1 of the covariance"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_is_seen(run: Run, claim: str) -> None:
    assert found_in(sound) == {"refuses a model of the wrong shape"}
    assert claim in found_in(run)


def ancestral(share: float) -> Run:
    """DDPM's step with a share of its variance."""

    def run(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
        sde: Any = model.sde
        for t, s in itertools.pairwise(times):
            x0, eps = (model.predict(kind, x, t) for kind in ("x0", "eps"))
            ratio = sde.alpha(t) * sde.sigma(s) / (sde.alpha(s) * sde.sigma(t))
            added = sde.sigma(s) * (1 - ratio**2).sqrt()
            kept = (sde.sigma(s) ** 2 - added**2).sqrt()
            x = sde.alpha(s) * x0 + kept * eps + math.sqrt(share) * added * noise(x)
        return x

    return run


def test_half_the_noise_does_not_converge() -> None:
    right, wrong = (
        ss.certify(box(ancestral(share), order=1, stochastic=True), **QUICK) for share in (1.0, 0.5)
    )
    assert "order 1 of the covariance" not in failed(right)
    assert "order 1 of the covariance" in failed(wrong)
    assert wrong.errors["covariance"][-1] > 0.2


def test_a_jump_to_zero_that_shrinks_too_slowly_is_seen() -> None:
    """Of order 2 inside, but the last level is 1/(n + 1)."""

    def run(model: ss.Model, x: Tensor, n: int, noise: Run) -> Tensor:
        times = ss.make_grid("log_snr", model.sde, 2 * n, 0.9, 1 / (n + 1)).times
        return model.predict("x0", ours("heun")(model, x, times, noise), times[-1])

    made = BlackBox(run, order=2, start=0.9, end=0.0)
    certificate = ss.certify(made, refinements=(16, 32), budgets=(4,))
    assert "order 2 of its last jump" in failed(certificate)


def test_what_a_sampler_raises_is_its_finding() -> None:
    def broken(model: ss.Model, x: Tensor, times: Sequence[float], noise: Run) -> Tensor:
        raise IndexError("list index out of range")

    certificate = ss.certify(box(broken, order=1), **QUICK)
    assert {"has an exact law", "runs"} <= failed(certificate)
    assert "IndexError: list index" in str(certificate)


def edm(
    net: Any,
    latents: Tensor,
    num_steps: int,
    randn_like: Run,
    S_churn: float = 0.0,
) -> Tensor:
    """Algorithm 2 of Karras et al. 2022 with rho = 7, s_noise = 1 and no bounds on the churn."""
    low, high = net.sigma_min ** (1 / 7), net.sigma_max ** (1 / 7)
    ramp = torch.arange(num_steps, dtype=F64) / (num_steps - 1)
    t = torch.cat([net.round_sigma((high + ramp * (low - high)) ** 7), torch.zeros(1, dtype=F64)])
    x = latents * t[0]
    for now, after in itertools.pairwise(t):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
        hat = now + gamma * now
        if gamma > 0:
            x = x + (hat**2 - now**2).sqrt() * randn_like(x)
        slope = (x - net(x, hat)) / hat
        y = x + (after - hat) * slope
        if after > 0:
            y = x + (after - hat) * (slope + (y - net(y, after)) / after) / 2
        x = y
    return x


def test_a_sampler_with_the_interface_of_edm_is_certified() -> None:
    made = edm_sampler(edm)
    certificate = ss.certify(made, refinements=(16, 32), budgets=(18,))
    assert certificate.nfe == "2n - 1"
    assert "keeps the variance of narrow data at its end" in failed(certificate)  # it jumps to 0
    assert "order 2 of the path" not in failed(certificate)
    churned = ss.certify(edm_sampler(edm, S_churn=10.0), refinements=(16, 32), budgets=(18,))
    assert churned.errors["covariance"][-1] < 0.1


def test_bad_claims_are_refused() -> None:
    with pytest.raises(ArgumentError, match="give a function"):
        BlackBox(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="above 0"):
        BlackBox(plain, order=-1)
    with pytest.raises(ArgumentError, match="give no times"):
        BlackBox(plain, gridded=True, end=0.0)
    with pytest.raises(ArgumentError, match="made for"):
        ss.certify(BlackBox(plain, sde=ss.EDM()), ss.VP())


# --- what anyone may hand in ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "returned NoneType"),
        (lambda x: (x,), "returned tuple"),
        (lambda x: x.numpy(), "returned ndarray"),
        (lambda x: x[:, :1], r"returned shape \(7, 1\) for a start of shape \(7, 3\)"),
        (lambda x: x[:1], r"returned shape \(1, 3\)"),
    ],
)
def test_a_sampler_that_returns_no_samples_fails_its_run(
    answer: Callable[[Tensor], Any], message: str
) -> None:
    def run(model: ss.Model, x: Tensor, times: Sequence[float], noise: Any) -> Any:
        return answer(ours("ddim")(model, x, times, noise))

    found = ss.certify(box(run, order=1), **QUICK)
    assert {"has an exact law", "runs"} <= failed(found)
    (ran,) = (check for check in found.checks if check.claim == "runs")
    assert re.search(message, ran.seen)


def test_a_sampler_that_passes_a_wrong_shape_on_does_not_refuse_it() -> None:
    def x0(model: ss.Model, x: Tensor, n: int, noise: Any) -> Tensor:
        return model.predict("x0", x, 1.0)

    found = ss.certify(BlackBox(x0), **QUICK)
    assert "refuses a model of the wrong shape" in failed(found)


def test_a_sampler_may_write_into_its_start() -> None:
    def run(model: ss.Model, x: Tensor, n: int, noise: Any) -> Tensor:
        times = torch.linspace(1.0, 1e-3, n + 1, dtype=x.dtype)
        for t, s in itertools.pairwise(times):
            x += (s - t) * model.predict("flow", x, t)
        return x

    def pure(model: ss.Model, x: Tensor, n: int, noise: Any) -> Tensor:
        return run(model, x.clone(), n, noise)

    found, expected = (
        ss.certify(BlackBox(each, "euler", order=1), **QUICK) for each in (run, pure)
    )
    assert found == expected
    assert "strong" in found.orders


def test_draws_from_numpy_are_seen_and_the_callers_generators_left_alone() -> None:
    def run(model: ss.Model, x: Tensor, times: Sequence[float], noise: Any) -> Tensor:
        drawn = torch.from_numpy(np.random.standard_normal(tuple(x.shape)))
        return ours("ddim")(model, x, times, noise) + 0 * drawn + 0 * random.random()

    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    found = ss.certify(box(run), **QUICK)
    after = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    assert "draws no random numbers" in failed(found)
    assert after == before


def signs(x: Tensor) -> Tensor:
    return torch.randint(0, 2, x.shape).to(x) * 2 - 1


def row_by_row(x: Tensor) -> Tensor:
    return torch.stack([torch.randn_like(row) for row in x])


@pytest.mark.parametrize("draw", [signs, row_by_row])
def test_draws_that_cannot_be_held_do_not_blame_the_neighbours(
    draw: Callable[[Tensor], Tensor],
) -> None:
    def run(model: ss.Model, x: Tensor, times: Sequence[float], noise: Any) -> Tensor:
        first, second = draw(x), draw(x)  # the second begins where the first of this batch ended
        return ours("ddim")(model, x, times, noise) + 0.1 * (first + second)

    found = ss.certify(box(run, stochastic=True), **QUICK)
    claims = {check.claim for check in found.checks}
    assert "keeps samples apart" not in claims
    assert "gives the same sample in any batch" in failed(found)


@pytest.mark.parametrize(
    "claims",
    [
        {"order": "2"},
        {"order": math.nan},
        {"dtype": torch.int64},
        {"end": -1.0},
        {"start": math.nan},
        {"refinements": (8, 4)},
        {"refinements": (8,)},
        {"refinements": (2.5, 4)},
    ],
    ids=str,
)
def test_claims_that_cannot_be_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(claims))):
        BlackBox(lambda model, x, n, noise: x, **claims)


def test_a_sampler_that_does_not_return_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: ss.Model, x: Tensor, n: int, noise: Any) -> Tensor:
        while True:
            model.predict("x0", x, 1.0)

    for module in ("conduct", "orders"):
        monkeypatch.setattr(f"scoresolve.certificates.{module}.ENDLESS", 300)
    for adaptive in (True, False):
        found = ss.certify(BlackBox(run, adaptive=adaptive), **QUICK)
        (ran,) = (check for check in found.checks if check.claim == "runs")
        assert (ran.passed, ran.seen) == (False, "Endless: more than 300 calls")


def test_an_adapter_takes_what_has_no_name_and_refuses_what_is_no_sampler() -> None:
    assert edm_sampler(functools.partial(ours, "ddim")).name == "edm_sampler"
    with pytest.raises(ArgumentError, match="sampler"):
        edm_sampler(3)  # type: ignore[arg-type]
    if installed("diffusers"):
        for path, options in (("ddim.Nope", {}), ("ddim", {}), ("ddim.DDIMScheduler", {"q": 1})):
            with pytest.raises(ArgumentError, match="diffusers makes no scheduler"):
                diffusers_scheduler(path, **options)


def test_a_run_without_calls_is_told_as_such() -> None:
    found = ss.certify(BlackBox(lambda model, x, n, noise: x), **QUICK)
    (inside,) = (c for c in found.checks if c.claim == "stays inside the interval")
    assert inside.seen == "no calls"
