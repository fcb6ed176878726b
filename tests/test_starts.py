"""Where runs begin: priors inside the process, runs that go on, encodings, budgets, shapes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresolve as ss
from scoresolve.errors import ArgumentError, GridError, ModelWarning, ShapeError
from scoresolve.noise import NoiseSource, Purpose, Times, first_draw
from scoresolve.sde import GaussianSDE
from scoresolve.tuning import PriorMismatch, data_at_start

PROCESSES = [ss.VP(), ss.VE(), ss.EDM(), ss.RectifiedFlow()]
TARGET = ss.targets.gaussian([0.0], 0.25)
each_process = pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)


def variance(x: Tensor) -> tuple[float, float]:
    """Of numbers about 0, and four standard errors of it."""
    found = float(x.double().square().mean())
    return found, 4 * found * (2 / x.numel()) ** 0.5


@pytest.mark.parametrize(
    ("solver", "sde"),
    [(s, sde) for s in ("ddpm", "euler_maruyama", "er_sde", "pc") for sde in PROCESSES]
    + [("adaptive_sde", ss.VP()), ("adaptive_sde", ss.RectifiedFlow())],
    ids=str,
)
def test_a_run_that_goes_on_with_the_same_seed_meets_new_noise(
    solver: str, sde: GaussianSDE
) -> None:
    score = TARGET.score_model(sde)
    times = ss.make_grid("flow", sde, 24).times
    middle, n = times[8], 1000 if solver == "adaptive_sde" else 20_000
    if solver == "adaptive_sde":
        rough = ss.solvers.AdaptiveSDE(0.1, 0.1)
        begin = 0.999 * sde.T if isinstance(sde, ss.RectifiedFlow) else sde.T
        options: dict[str, Any] = {"solver": rough, "t_start": begin}
        first = ss.sample(score, sde, shape=(n, 1), t_end=middle, **options).x
        second = ss.sample(score, sde, x=first, solver=rough, t_start=middle).x
        law = float(TARGET.marginal(sde, sde.t_min).covariance)
        slack = 0.1 * law  # of its tolerance; the first noise again makes it a half more
    else:
        first = ss.sample(score, sde, shape=(n, 1), solver=solver, grid=times[:9]).x
        second = ss.sample(score, sde, x=first, solver=solver, grid=times[8:]).x
        law = float(ss.plan(solver, sde, times).law(0.0, 0.25).output_variance)
        slack = 1e-3 * law
    found, error = variance(second)
    assert abs(found - law) < error + slack


@each_process
def test_samples_that_are_noised_and_taken_down_again_keep_their_law(sde: GaussianSDE) -> None:
    score, n = TARGET.score_model(sde), 20_000
    t = float(sde.time_from_log_snr(0.0))
    options: dict[str, Any] = {"solver": "ddpm", "steps": 40}
    x = ss.sample(score, sde, shape=(n, 1), **options).x
    y = ss.noised(sde, x, t)
    eps = (y - sde.alpha(t) * x) / sde.sigma(t)
    # the correlation of independent numbers has standard error n^(-1/2)
    assert abs(float((x * eps).mean() / x.std() / eps.std())) < 4 / n**0.5
    again = ss.sample(score, sde, x=y, t_start=t, **options).x
    law = ss.plan("ddpm", sde, ss.make_grid("flow", sde, 40, t_start=t)).law(0.0, 0.25)
    expected = float(law.gain**2 * y.var() + law.noise_variance)
    found, error = variance(again)
    assert abs(found - expected) < error


def test_noise_of_runs_has_its_own_place_for_any_source() -> None:
    seen: list[float] = []

    class Spy(NoiseSource):
        def normal(
            self,
            like: Tensor,
            draw: int,
            purpose: Purpose = Purpose.SOLVER,
            times: Times | None = None,
        ) -> Tensor:
            seen.append(draw)
            return ss.Philox(0).normal(like, draw, purpose)

        def rows(self, index: slice | Tensor) -> NoiseSource:
            return self

    sde, score = ss.VP(), TARGET.score_model(ss.VP())
    times = ss.make_grid("cosine", sde, 8).times
    x = ss.sample(score, sde, x=torch.ones(2, 1), solver="ddpm", grid=times[:5], noise=Spy()).x
    ss.sample(score, sde, x=x, solver="ddpm", grid=times[4:], noise=Spy())
    assert seen[:4] == [0, 1, 2, 3] and seen[4:] == [first_draw(times[4]) + i for i in range(4)]
    assert 2**31 <= first_draw(times[4]) < 2**31 + 2**30


@each_process
def test_a_start_inside_has_the_noise_of_its_time(sde: GaussianSDE) -> None:
    t, seen = 0.3 * sde.T, []

    def score(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return TARGET.score_model(sde)(x, t)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ss.sample(score, sde, shape=(8000, 1), t_start=t, solver="ddim", steps=2)
    shows = bool(sde.log_snr(t).exp() > 0.01)
    assert [w.category for w in told] == [ModelWarning] * shows
    assert not shows or "still holds the data" in str(told[0].message)
    wanted = float(sde.prior_std * sde.sigma(t) / sde.sigma(sde.T))
    assert float(seen[0].std()) == pytest.approx(wanted, rel=4 / 16000**0.5)
    assert ss.plan("ddim", sde, (t, t / 2)).prior_std == pytest.approx(wanted)


def test_a_prior_that_does_not_drown_the_data_is_told() -> None:
    sde = ss.VE(0.01, 1.0)
    data = ss.targets.gaussian([0.0] * 4, 4.0).score_model(sde)
    small = ss.targets.gaussian([0.0] * 4, 1e-4).score_model(sde)
    far = ss.targets.gaussian([100.0] * 4, 0.25)
    with pytest.warns(ModelWarning, match=r"standard deviation of 2\.2. "):
        ss.sample(lambda x, t: data(x, t), sde, shape=(4, 4))
    with pytest.warns(ModelWarning, match="still holds the data"):
        ss.sample(lambda x, t: far.score_model(ss.EDM())(x, t), ss.EDM(), shape=(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.sample(lambda x, t: small(x, t), sde, shape=(4, 4))
        ss.sample(lambda x, t: -x, ss.VP(), shape=(4, 4))


FIXED = ("dpmpp_2m", "heun", "adams", "dopri5", "ddpm")


def told_of(sde: GaussianSDE, mean: float, std: float, count: int, **options: Any) -> list[str]:
    """What a run from the prior warns of, for Gaussian data of which the model says nothing."""
    data = ss.targets.gaussian([mean] * 2, std**2).score_model(sde)
    model = ss.from_x0(lambda x, t: data.predict("x0", x, t), sde)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = ss.sample(model, sde, shape=(count, 2), **options)
    again = len(told) if options.get("solver") in ("adams", "dopri5") else 0
    assert "chunk" in options or out.calls == out.nfe + again
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize(
    ("sde", "mean", "std"), [(ss.EDM(sigma_max=10), 10, 1), (ss.VP(), 100, 1), (ss.EDM(), 0, 80)]
)
def test_every_solver_tells_of_data_that_the_prior_does_not_drown(
    sde: GaussianSDE, mean: float, std: float, solver: str
) -> None:
    for count in (2, 64):
        (text,) = told_of(sde, mean, std, count, solver=solver)
        assert "still holds the data there" in text
    if mean:  # which a single sample shows too
        assert told_of(sde, mean, std, 1, solver=solver)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize(
    ("sde", "mean", "std"),
    [
        (ss.VP(), 0, 1),
        (ss.VP(), 2, 3),
        (ss.EDM(), 0, 1),
        (ss.EDM(sigma_max=10), 0, 1),
        (ss.RectifiedFlow(), 30, 9),
    ],
)
def test_no_solver_tells_of_data_that_are_drowned(
    sde: GaussianSDE, mean: float, std: float, solver: str
) -> None:
    for count in (1, 2, 64):
        assert told_of(sde, mean, std, count, solver=solver) == []
    assert told_of(sde, mean, std, 8, solver=solver, chunk=1) == []
    for seed in range(20 if solver == "dpmpp_2m" else 3):  # the starts are the same for all
        assert told_of(sde, mean, std, 1, solver=solver, seed=seed) == []


@pytest.mark.parametrize(
    ("sde", "std"), [(ss.VP(beta_max=5), 0.5), (ss.VP(beta_max=5), 2), (ss.EDM(sigma_max=10), 2)]
)
def test_samples_whose_std_is_off_by_two_per_cent_are_told_of(sde: GaussianSDE, std: float) -> None:
    (text,) = told_of(sde, 0, std, 8000, solver="dpmpp_2m")
    assert "still holds the data there" in text


def test_a_network_that_errs_at_the_start_is_not_taken_for_far_data() -> None:
    def noisy(x: Tensor, t: Tensor) -> Tensor:
        rate = 0.6 * (7919 * x).sin()  # 0.42 of the noise, another one for every sample
        return ss.VP().sigma(t).to(x)[:, None] * x + rate

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.sample(lambda x, t: -x, ss.VP(), shape=(3,), solver="ddim", dtype=torch.float64)
        for count in (2, 64):
            ss.sample(ss.from_eps(noisy, ss.VP()), ss.VP(), shape=(count, 64), solver="ddim")


def test_noise_of_a_network_is_no_mean_of_the_data() -> None:
    """64 answers off by 0.5 at random have a mean of 0.06, which is not that of the data."""
    sde, starts = ss.VP(), torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 2
    far = torch.full((64, 64), 300.0)

    def found(mean: float, share: float) -> PriorMismatch | None:
        """Of answers share x + (1 - share) mean, as they are where x keeps a share of the data."""
        kept = 1 - share
        model = ss.from_eps(lambda x, t: kept * (x - mean) - errors, sde)
        return data_at_start(model, sde, (1.0, 1e-3), far, lambda: (starts, {}))[0]

    assert found(0.0, 0.0) is None
    for share in (0.0, 0.3):
        mismatch = found(0.3, share)
        assert mismatch is not None and mismatch.mean == pytest.approx(0.3, abs=0.03)
        assert mismatch.std == pytest.approx((1 - share) ** -0.5, rel=0.02)


def test_samples_of_a_later_time_are_data_shrunk_by_alpha() -> None:
    sde, model = ss.VP(), ss.from_eps(lambda x, t: x, ss.VP())
    shrunk = float(sde.alpha(0.5))
    for mean, asked in ((1.0, 0), (10.0, 64)):  # 0.01 and 0.07 of the noise at T
        x = torch.full((64, 2), mean * shrunk)
        rows = data_at_start(model, sde, (1.0, 0.5), x, lambda: (torch.zeros(64, 2), {}))[1]
        assert rows == asked


def test_far_means_that_follow_a_condition_are_told() -> None:
    sde, sign = ss.EDM(sigma_max=10), torch.tensor([1.0, -1.0]).repeat(8)

    def denoiser(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        share = 1 / (1 + sigma**2)[:, None]
        return share * x + (1 - share) * where[:, None]

    for far in (True, False):
        cond = ss.per_sample(10.0 * sign if far else sign / 10)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ss.sample(
                ss.from_denoiser(denoiser, sde), sde, shape=(16, 2), solver="heun", where=cond
            )
        assert len(told) == far


def test_densities_of_samples_from_a_prior_that_does_not_drown_the_data_are_told() -> None:
    sde, far = ss.EDM(sigma_max=10), ss.targets.gaussian([10.0, 10.0], 1.0)
    model = far.score_model(sde)
    with pytest.warns(ModelWarning, match="still holds the data"):
        out = ss.sample_with_log_prob(model, sde, (64, 2), solver="dopri5")
    assert out.shared == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # whose nodes begin at infinity: the mean is within four standard errors
        drawn = ss.sample_with_log_prob(lambda x, t: model(x, t), sde, (256, 2)).x
    assert drawn is not None and float((drawn.mean(0) - 10).abs().max()) < 4 / 16


def test_a_start_of_a_process_without_schedule_is_asked_for() -> None:
    class Drifting(ss.SDE):
        has_prior = True

        def drift(self, x: Tensor, t: Any) -> Tensor:
            return -x

        def diffusion(self, t: Any) -> Tensor:
            return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))

        def from_normals(self, z: Tensor) -> Tensor:
            return z

    options: dict[str, Any] = {"shape": (2, 2), "solver": "euler_flow", "steps": 2}
    assert ss.sample(lambda x, t: -x, Drifting(), **options).x.shape == (2, 2)
    with pytest.raises(ArgumentError, match=r"t_start = 0\.5 is not known: give the start x="):
        ss.sample(lambda x, t: -x, Drifting(), t_start=0.5, **options)


def test_encoding_rises_and_integer_grids_are_turned_round() -> None:
    abar = (1 - ss.sde.linear_betas(1000)).cumprod(0)
    chain = ss.DiscreteVP(abar)
    model, x = TARGET.score_model(chain), TARGET.sample(6)
    for grid in ("leading", "linspace", "trailing"):
        z = ss.encode(model, chain, x, solver="ddim", grid=grid, steps=200)
        down = ss.make_grid(grid, chain, 200, denoise=False).times
        assert z.times == down[::-1]
        back = ss.sample(model, chain, x=z.x, solver="ddim", grid=down).x
        torch.testing.assert_close(back, x, rtol=0, atol=0.05)  # first order, 200 steps each way
        with pytest.raises(GridError, match="leave out t_start"):
            ss.encode(model, chain, x, solver="ddim", grid=grid, steps=20, t_end=500.0)
    vp = TARGET.score_model(ss.VP())
    for falling in ({"grid": [0.9, 0.5, 0.1]}, {"t_start": 0.9, "t_end": 0.1}):
        with pytest.raises(GridError, match="times that rise"):
            ss.encode(vp, ss.VP(), x, solver="ddim", **falling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nfe": 10**9}, ArgumentError, "at most 1,000,000"),
        ({"nfe": "10"}, ArgumentError, "nfe = '10'"),
        ({"dtype": "float32"}, ArgumentError, r"torch\.float32"),
        ({"device": "cud"}, ArgumentError, "device = 'cud'"),
        ({"shape": (10**12, 10**6)}, ShapeError, "no memory"),
        ({"shape": "52"}, ShapeError, "positive whole numbers"),
        ({"shape": None, "x": torch.ones(5, 0)}, ShapeError, "no elements"),
        ({"shape": None, "x": torch.ones(5, 2).to("meta")}, ArgumentError, "meta"),
        ({"shape": None, "x": torch.ones(5, 2).to_sparse()}, ArgumentError, "dense"),
        (
            {"shape": None, "x": torch.ones(5, 2).to(torch.float8_e4m3fn)},
            ArgumentError,
            "give float16",
        ),
        ({"sde": None}, ArgumentError, "sde is None"),
        ({"sde": ss.VP}, ArgumentError, "class VP"),
        ({"t_start": "0.5"}, ArgumentError, "t_start = '0.5'"),
        ({"device": "cuda:99"}, ArgumentError, "cannot be used here"),
    ],
    ids=str,
)
def test_careless_arguments_are_refused_before_the_first_call(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises(error, match=message):
        ss.sample(never, **({"sde": ss.VP(), "shape": (5, 2)} | options))  # type: ignore[arg-type]


def test_shapes_may_be_tensors_and_arrays() -> None:
    for shape in (torch.tensor([5, 2]), np.array([5, 2]), torch.Size([5, 2])):
        assert ss.sample(lambda x, t: -x, ss.VP(), shape=shape, nfe=8).x.shape == (5, 2)  # type: ignore[arg-type]


def test_sampling_can_be_mapped_by_torch_func() -> None:
    x = torch.ones(3, 5, 2, dtype=torch.float64)
    run = lambda y: ss.sample(lambda x, t: -x, ss.VP(), x=y, solver="ddim", nfe=5).x  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(run)(x), torch.stack([run(y) for y in x]))
