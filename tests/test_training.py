"""The training loop: the published updates, resuming to the same weights, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import scoresolve as ss
from scoresolve.errors import ArgumentError, ScoresolveError
from scoresolve.objectives import LogNormalTimes, denoising_score_matching
from scoresolve.training import Training, seeded

F64 = torch.float64


def network(width: int = 8) -> nn.Module:
    """Dropout and batch statistics, so that a step depends on a generator and on buffers."""
    with seeded(0):
        return nn.Sequential(
            nn.Linear(2, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 2)
        )


def loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 2)
    return (net(x) - x.sin()).square().mean()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight = Training(network(), loss, 9, seed=3)
    straight.run()
    first = Training(network(), loss, 9, seed=3)
    for _ in range(4):
        first.advance()
    first.save(tmp_path / "checkpoint")
    torch.rand(7)
    second = Training(network(), loss, 5, seed=8)
    second.load(tmp_path / "checkpoint")
    assert (second.steps, second.seed, second.step) == (9, 3, 4)
    second.run()
    for name in ("network", "average"):
        assert same(getattr(straight, name), getattr(second, name))
        assert not same(getattr(straight, name), getattr(first, name))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_run_stops_when_time_is_up_and_writes_checkpoints_on_the_way(tmp_path: Path) -> None:
    path, written = tmp_path / "checkpoint", list[int]()
    training = Training(network(), loss, 7)
    assert training.run(path, seconds=0) is training.average and training.step == 0
    save = training.save

    def noted(to: Path) -> None:
        written.append(training.step)
        save(to)

    training.save = noted  # type: ignore[method-assign]
    training.run(path, every=3)
    assert written == [3, 6, 7]
    assert torch.load(path, weights_only=True)["numbers"] == (7, 0, 7)


def test_the_callers_generator_is_left_alone_and_has_no_say() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Training(network(), loss, 3, seed=5)
    first.run()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = (Training(network(), loss, 3, seed=seed) for seed in (5, 6))
    second.run()
    other.run()
    assert same(first.network, second.network) and not same(first.network, other.network)


def test_every_step_draws_numbers_of_its_own_from_seed_and_step() -> None:
    drawn: dict[int, list[float]] = {}

    def noting(net: nn.Module, step: int) -> Tensor:
        drawn[step] = [*drawn.get(step, []), float(torch.rand(()))]
        return loss(net, step)

    Training(network(), noting, 4, seed=1).run()
    Training(network(), noting, 4, seed=1).run()
    assert list(drawn) == [0, 1, 2, 3]
    assert all(first == second for first, second in drawn.values())
    assert len({first for first, _ in drawn.values()}) == 4


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([2.0, -1.0], dtype=F64))


def test_a_step_is_that_of_adamw_on_the_clipped_gradient() -> None:
    """Loshchilov and Hutter, algorithm 2, and the average, written down once more."""
    pull = torch.tensor([3.0, -4.0], dtype=F64)
    training = Training(
        Slope(),
        lambda net, step: (step + 1) * (net.value * pull).sum(),
        5,
        rate=0.1,
        warm_up=2,
        weight_decay=0.2,
        averaging=0.15,
        clip=2.0,
    )
    w = torch.tensor([2.0, -1.0], dtype=F64)
    mean, m, v = w.clone(), torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    for i in range(5):
        rate = 0.1 * min(1.0, (i + 1) / 2) * (1 + math.cos(math.pi * i / 5)) / 2
        assert training.rate() == pytest.approx(rate)
        value = training.advance()
        torch.testing.assert_close(value, (i + 1) * (w * pull).sum())
        g = 2.0 * pull / pull.norm()  # of length 5 (i + 1) before
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        step = (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8)
        w = w - rate * 0.2 * w - rate * step
        kept = min(0.15, (i + 1) / (i + 11))
        mean = kept * mean + (1 - kept) * w
        found, average = training.network.value, training.average.value
        torch.testing.assert_close(found.detach(), w, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-7)


def test_the_average_is_frozen_in_eval_mode_and_has_the_latest_buffers() -> None:
    training = Training(network(), loss, 4)
    average = training.run()
    assert not average.training and training.network.training
    assert not any(p.requires_grad for p in average.parameters())
    kept, latest = (net.state_dict()["1.running_mean"] for net in (average, training.network))
    assert torch.equal(kept, latest) and not torch.equal(kept, torch.zeros_like(kept))


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_weights_of_before() -> None:
    training = Training(
        network(), lambda net, step: loss(net, step) * (math.nan if step == 2 else 1.0), 5
    )
    training.advance()
    training.advance()
    before = copy.deepcopy(training.network)
    with pytest.raises(ScoresolveError, match="the gradient of step 2"):
        training.run()
    parameters = zip(before.parameters(), training.network.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in parameters) and training.step == 2


def test_a_small_network_learns_the_score_of_a_gaussian() -> None:
    """Of the denoiser x s^2/(s^2 + sigma^2), the variance s^2."""
    sde, data = ss.EDM(0.1, 10.0), ss.targets.gaussian(torch.zeros(1, dtype=F64), 0.5)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_variance = nn.Parameter(torch.tensor(1.0, dtype=F64))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            variance = self.log_variance.exp()
            return x * (variance / (variance + sigma[:, None] ** 2))

    def objective(net: nn.Module, step: int) -> Tensor:
        x0 = data.sample(64, first_sample=64 * step)
        model = ss.from_denoiser(net, sde)
        times = LogNormalTimes(sde)
        return denoising_score_matching(
            model, sde, x0, weighting="edm", times=times, draw=step
        ).mean()

    average = Training(Denoiser(), objective, 300, rate=0.1, weight_decay=0, averaging=0.95).run()
    assert float(average.log_variance.exp()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"rate": 0.0}, "rate = 0"),
        ({"warm_up": 0}, "warm_up = 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"averaging": 1.5}, "averaging = 1.5"),
        ({"clip": 0.0}, "clip = 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Training(network(), loss, **{"steps": 3, **options})  # type: ignore[arg-type]


def test_half_precision_weights_and_losses_that_are_no_number_are_refused() -> None:
    with pytest.raises(ArgumentError, match="train in float32"):
        Training(network().bfloat16(), loss, 5)
    with pytest.raises(ArgumentError, match="no parameters"):
        Training(nn.ReLU(), loss, 5)
    with pytest.raises(ArgumentError, match="give a module"):
        Training(loss, network(), 5)
    for bad in (
        lambda net, step: net(torch.ones(3, 2)).sum(1),
        lambda net, step: net(torch.ones(3, 2)).sum().detach(),
        lambda net, step: 0.0,
    ):
        training = Training(network(), bad, 5)
        with pytest.raises(ArgumentError, match="return one number"):
            training.advance()
        assert training.step == 0
