"""The bundled digits, the denoiser trained on them and the way it is trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import scoresolve.digits.train as train_module
from scoresolve.digits import (
    BIN_WIDTH,
    CLASSES,
    LEVELS,
    DigitsNet,
    bits_per_dim,
    load_digits,
    load_network,
    to_image,
    to_levels,
    to_unit,
)
from scoresolve.digits.network import SIGMA_DATA, _patches
from scoresolve.digits.train import denoising_loss, digits_training, held_out_losses, main
from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.metrics import class_mixture
from scoresolve.sde import EDM

FOLDER = Path(train_module.__file__).parent


@pytest.fixture(scope="module")
def network() -> DigitsNet:
    return load_network(dtype=torch.float64)


def dequantised(split: str) -> Tensor:
    levels = load_digits(split).levels
    noise = torch.rand(levels.shape, dtype=torch.float64, generator=generator())
    return to_unit(levels, noise)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def untrained(scale: float = 1.0) -> DigitsNet:
    """A network whose output layer is not zero, in float64."""
    torch.manual_seed(0)
    network = DigitsNet().double().eval()
    torch.nn.init.normal_(network.head.weight, std=scale)
    return network.requires_grad_(False)


# The data


def test_splits_are_disjoint_balanced_and_together_everything() -> None:
    whole, train, test = (load_digits(split) for split in ("all", "train", "test"))
    assert (len(whole), len(train), len(test)) == (1797, 1437, 360)
    assert test.labels.bincount().tolist() == [36] * 10
    images = [{tuple(row) for row in part.levels.flatten(1).tolist()} for part in (train, test)]
    assert not images[0] & images[1]
    assert len(images[0] | images[1]) == len(whole)


def test_levels_are_the_integers_from_0_to_16() -> None:
    whole = load_digits()
    assert whole.levels.shape == (1797, 1, 8, 8)
    assert whole.levels.dtype == whole.labels.dtype == torch.int64
    assert sorted(set(whole.levels.flatten().tolist())) == list(range(LEVELS))
    assert sorted(set(whole.labels.tolist())) == list(range(CLASSES))


def test_images_are_those_of_scikit_learn() -> None:
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = load_digits()
    assert torch.equal(ours.levels[:, 0].double(), torch.from_numpy(theirs.images))
    assert torch.equal(ours.labels, torch.from_numpy(theirs.target))


def test_unknown_split_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        load_digits("trian")


@given(st.integers(0, 16), st.floats(1e-9, 1 - 1e-9))
def test_levels_survive_dequantisation(level: int, noise: float) -> None:
    k = torch.tensor([level])
    x = to_unit(k, torch.tensor([noise], dtype=torch.float64))
    assert -1 <= x.item() < 1
    assert torch.equal(to_levels(x), k)


def test_noise_of_another_shape_or_dtype_is_refused() -> None:
    levels = torch.zeros(3, 1, 8, 8, dtype=torch.int64)
    for noise in (torch.rand(1, 8, 8), torch.zeros_like(levels)):
        with pytest.raises(ArgumentError, match="one uniform number per level"):
            to_unit(levels, noise)


def test_uniform_density_costs_log2_17_bits_per_dimension() -> None:
    uniform = torch.tensor(-64 * math.log(2), dtype=torch.float64)
    assert bits_per_dim(uniform).item() == pytest.approx(math.log2(17), abs=1e-14)
    one_bin = torch.tensor(-64 * math.log(BIN_WIDTH), dtype=torch.float64)
    assert bits_per_dim(one_bin).item() == pytest.approx(0, abs=1e-14)


def test_picture_places_digits_row_by_row() -> None:
    x = torch.arange(3).view(3, 1, 1, 1).expand(3, 1, 8, 8) - 1.0
    page = to_image(x, columns=2)
    assert page.shape == (16, 16)
    corners = page[::8, ::8].tolist()
    assert corners == [[0, 128], [255, 0]]
    with pytest.raises(ArgumentError, match="at least one column"):
        to_image(x, columns=0)


# The network


def test_trained_network_is_small_frozen_and_in_eval_mode(network: DigitsNet) -> None:
    assert (FOLDER / "digits.safetensors").stat().st_size <= 2_000_000
    assert (FOLDER / "digits.npz").stat().st_size <= 100_000
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert {p.dtype for p in load_network().parameters()} == {torch.float32}


@pytest.mark.parametrize("sigma", [1e-4, 2e-3, 0.5, 80.0])
def test_scalar_and_batched_sigma_agree(network: DigitsNet, sigma: float) -> None:
    x = dequantised("test")[:5] * (1 + sigma)
    results = [
        network(x, sigma),
        network(x, torch.tensor(sigma, dtype=torch.float64)),
        network(x, torch.full((5,), sigma, dtype=torch.float64)),
        torch.cat([network(row[None], sigma) for row in x]),
        network(x, sigma, torch.full((5,), CLASSES)),
    ]
    for result in results:
        assert result.shape == x.shape
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


def test_denoiser_is_the_identity_at_vanishing_noise(network: DigitsNet) -> None:
    x = dequantised("test")[:50]
    for sigma in (1e-2, 1e-3, 1e-4):
        assert (network(x, sigma) - x).abs().max() < 6 * sigma


def test_denoiser_forgets_the_image_at_overwhelming_noise(network: DigitsNet) -> None:
    noise = torch.randn(200, 1, 8, 8, dtype=torch.float64, generator=generator())
    mean = dequantised("train").mean(0)
    for sigma in (40.0, 80.0):
        assert (network(sigma * noise, sigma).mean(0) - mean).abs().max() < 0.1


def test_preconditioning_is_that_of_edm() -> None:
    network = untrained(scale=0.0)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator())
    sigma = torch.tensor([1e-3, 0.1, 1.0, 50.0], dtype=torch.float64)
    skip = (SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(network(x, sigma), skip * x)
    torch.nn.init.constant_(network.head.bias, 1.0)
    out = (sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()).view(-1, 1, 1, 1)
    torch.testing.assert_close(network(x, sigma), skip * x + out)


def test_sigma_data_is_the_deviation_of_the_training_images() -> None:
    assert dequantised("train").std().item() == pytest.approx(SIGMA_DATA, abs=1e-3)


def test_every_patch_returns_to_its_place() -> None:
    x = torch.arange(128, dtype=torch.float64).view(2, 1, 8, 8)
    patches = _patches(x)
    assert patches[1, 5].tolist() == [
        64 + 8 * 2 + 2,
        64 + 8 * 2 + 3,
        64 + 8 * 3 + 2,
        64 + 8 * 3 + 3,
    ]


def test_directional_derivative_matches_central_differences(network: DigitsNet) -> None:
    x = dequantised("test")[:3]
    v = torch.randn(x.shape, dtype=torch.float64, generator=generator())
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    label = torch.tensor([0, 5, 10])

    def denoise(y: Tensor) -> Tensor:
        out: Tensor = network(y, sigma, label)
        return out

    forward = torch.func.jvp(denoise, (x,), (v,))[1]
    central = (denoise(x + 1e-5 * v) - denoise(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-7)
    w = torch.randn(x.shape, dtype=torch.float64, generator=generator())
    (backward,) = torch.func.vjp(denoise, x)[1](w)
    torch.testing.assert_close((backward * v).sum(), (w * forward).sum())


def test_vmapped_jacobian_is_that_of_each_image(network: DigitsNet) -> None:
    x, sigma = dequantised("test")[:2], torch.tensor([0.1, 1.0], dtype=torch.float64)

    def denoise(one: Tensor, level: Tensor) -> Tensor:
        out: Tensor = network(one[None], level)
        return out[0]

    both = torch.func.vmap(torch.func.jacrev(denoise))(x, sigma)
    each = torch.stack([torch.func.jacrev(denoise)(x[i], sigma[i]) for i in range(2)])
    assert both.shape == (2, 1, 8, 8, 1, 8, 8)
    torch.testing.assert_close(both, each)


def test_wrong_shapes_are_refused(network: DigitsNet) -> None:
    x = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"noisy images \[B, 1, 8, 8\]"):
        network(x.flatten(1), 1.0)
    with pytest.raises(ShapeError, match="one noise level"):
        network(x, torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(ShapeError, match="one class per image"):
        network(x, 1.0, torch.tensor([3]))


def test_missing_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no weights at"):
        load_network(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ArgumentError, match="does not hold the weights"):
        load_network(tmp_path / "other.safetensors")


# The training


@pytest.mark.parametrize(("sigma", "share"), [(0.05, 0.9), (0.3, 0.8), (2.0, 1.1)])
def test_held_out_digits_are_denoised_better_than_by_their_mixture(
    network: DigitsNet, sigma: float, share: float
) -> None:
    """The optimal denoiser of ten Gaussians fitted to the classes is the rival.

    It is all but optimal where noise hides the strokes, so there the network may only match it.
    """
    mixture = class_mixture().score_model(EDM())
    x0 = dequantised("test")
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator())
    level = torch.full((len(x0),), sigma, dtype=torch.float64)

    def rival(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return mixture.predict("x0", x, sigma)

    ours, theirs = (denoising_loss(d, x0, level, noise) for d in (network, rival))
    assert ours < share * theirs


def test_class_helps_the_denoiser(network: DigitsNet) -> None:
    x0, labels = dequantised("test"), load_digits("test").labels
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator())
    level = torch.ones(len(x0), dtype=torch.float64)
    right, none, wrong = (
        denoising_loss(network, x0, level, noise, label)
        for label in (labels, None, (labels + 1) % CLASSES)
    )
    assert right < 0.95 * none < 0.9 * wrong


def test_loss_of_an_ideal_denoiser_on_gaussian_data_is_known() -> None:
    def linear(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return x * (SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)).view(-1, 1, 1, 1)

    n, draw = 4000, generator()
    x0 = SIGMA_DATA * torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=draw)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=draw)
    sigma = torch.logspace(-2, 1, n, dtype=torch.float64)
    loss = denoising_loss(linear, x0, sigma, noise)  # type: ignore[arg-type]
    assert abs(loss - 1) < 5 * math.sqrt(2 / (64 * n))


def test_the_run_is_the_one_that_made_the_bundled_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a short run, as the training gave them before its loop was made a room."""
    monkeypatch.setattr(train_module, "BATCH", 8)
    training = digits_training(steps=4, seed=3)
    average = training.run().state_dict()
    total, size = (
        sum(float(measure(value.double())) for value in average.values())
        for measure in (torch.sum, lambda value: value.abs().sum())
    )
    assert (total, size) == pytest.approx((113.551061, 10755.875854), rel=1e-7)


def test_training_leaves_the_callers_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "BATCH", 8)
    before = torch.get_rng_state()
    digits_training(steps=1).advance()
    held_out_losses(lambda x, sigma, label: x, draws=1)  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())


def test_command_trains_stops_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "BATCH", 4)
    monkeypatch.setattr(train_module, "held_out_losses", lambda network: [(0.1, 1.0, 0.5)])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = CliRunner().invoke
    assert run(main, ["--out", str(parts), "--resume"]).exit_code == 2
    assert run(main, ["--out", str(whole), "--steps", "2"]).exit_code == 0
    assert (
        "0 of 2 steps" in run(main, ["--out", str(parts), "--steps", "2", "--minutes", "0"]).output
    )
    assert "2 of 2 steps" in run(main, ["--out", str(parts), "--resume"]).output
    ours, theirs = load_file(whole), load_file(parts)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert isinstance(load_network(whole), DigitsNet)


def test_what_is_no_grey_level_has_none() -> None:
    """The integer of a NaN hangs on the machine."""
    x = torch.full((1, 1, 8, 8), torch.nan)
    with pytest.raises(ArgumentError, match="NaN"):
        to_levels(x)
    assert int(to_image(x, 1).max()) == 0
    for level in (-1, 17):
        with pytest.raises(ArgumentError, match=r"0\.\.16"):
            to_unit(torch.tensor([0, level]))
    with pytest.raises(ArgumentError, match="classes as integers"):
        load_network()(torch.zeros(1, 1, 8, 8), 1.0, torch.zeros(1))


def test_half_precision_does_not_round_the_noise_level() -> None:
    """In bfloat16 17.3 would be 17.25, for which the exact answer is another."""
    low, full = load_network(dtype=torch.bfloat16), load_network()
    seen = list[float]()
    low.condition.register_forward_hook(lambda _, given, __: seen.append(float(given[0][0])))
    full.condition.register_forward_hook(lambda _, given, __: seen.append(float(given[0][0])))
    x = torch.zeros(1, 1, 8, 8)
    found, expected = low(x.bfloat16(), 17.3), full(x, 17.3)
    assert seen[0] == seen[1] and found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
