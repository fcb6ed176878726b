"""What is built can be sent to a process and copied: pickle and deepcopy give the same numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import generator, normal
from torch import Tensor, nn

import scoresolve as ss
from scoresolve import guidance, objectives
from scoresolve.chains import BinaryChain, DiffusionChain
from scoresolve.digits import load_network
from scoresolve.guidance import Measurement
from scoresolve.models import from_eps
from scoresolve.targets import BitMixture
from scoresolve.training import Training

SDE, D = ss.VP(), 3
X, T = normal(generator(0), 4, D), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
LABEL = torch.tensor([0, 1, 1, 0])
SCORE = ss.targets.random_mixture(D, 2).score_model(SDE)
GRID = ss.make_grid("flow", SDE, 4)
TIMES = torch.tensor(GRID.times[:4], dtype=torch.float64)
MATRIX, Y = normal(generator(1), 2, D), torch.ones(2, dtype=torch.float64)
MASK = torch.tensor([True, False, True])


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + label)[:, None]


def log_prob(x: Tensor, t: Tensor) -> Tensor:
    return -x.square().sum(1)


def seen(x: Tensor) -> Tensor:
    return torch.sinh(x[:, :2])


def rising(t: Tensor) -> Tensor:
    return 1 + t


def distance(network: nn.Module, step: int) -> Tensor:
    return (network(X.float()) - step).square().mean()


def asked(t: Tensor = T, **cond: Any) -> Callable[[ss.Model], Tensor]:
    return lambda model: model.predict("x0", X, t, **cond)


EPS, NULL = from_eps(labelled, SDE), {"label": 2}
MATRIX_SEEN, CALL_SEEN = Measurement(MATRIX, 0.3, Y), Measurement(seen, 0.3, Y)
BITS = BitMixture([1.0, 2.0], [[0.1, 0.8], [0.6, 0.3]])
BUILT: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "classifier_free": (guidance.classifier_free(EPS, SDE, 2.0, NULL), asked(label=LABEL)),
    "classifier_free, options": (
        guidance.classifier_free(EPS, SDE, rising, NULL, (0.3, 3.0), 0.5, batched=True),
        asked(label=LABEL, negative_label=1 - LABEL),
    ),
    "classifier_free, two models": (guidance.classifier_free(SCORE, SDE, 2.0, SCORE), asked()),
    "cfg_plus_plus": (
        guidance.cfg_plus_plus(EPS, SDE, GRID, 0.6, NULL),
        asked(TIMES, label=LABEL),
    ),
    "autoguidance": (guidance.autoguidance(EPS, SDE, EPS, 2.0), asked(label=LABEL)),
    "classifier": (guidance.classifier(SCORE, SDE, log_prob), asked()),
    "clip_x0": (guidance.clip_x0(SCORE, SDE, -0.2, 0.2), asked()),
    "dynamic_threshold": (guidance.dynamic_threshold(SCORE, SDE, 0.5, 0.3), asked()),
    "dps": (guidance.dps(SCORE, SDE, CALL_SEEN), asked()),
    "dps_steps": (guidance.dps_steps(SCORE, SDE, MATRIX_SEEN, GRID), asked(TIMES)),
    "pigdm": (guidance.pigdm(SCORE, SDE, CALL_SEEN), asked()),
    "mmps": (guidance.mmps(SCORE, SDE, MATRIX_SEEN), asked()),
    "inpaint": (guidance.inpaint(SCORE, SDE, MASK, X[0]), asked()),
    "nested": (
        guidance.clip_x0(guidance.mmps(SCORE, SDE, MATRIX_SEEN), SDE).on(ss.RectifiedFlow()),
        asked(),
    ),
    **{
        type(law).__name__: (law, lambda law: law.draw(ss.Philox(0), X))
        for law in (
            objectives.UniformTimes(SDE),
            objectives.LogUniformTimes(SDE),
            objectives.LogNormalTimes(SDE),
        )
    },
    "Training": (
        Training(nn.Linear(D, D), distance, 5),
        lambda run: torch.cat([run.advance()[None], run.average.weight.flatten()]),
    ),
    "DigitsNet": (
        load_network(),
        lambda net: net(torch.zeros(2, 1, 8, 8), torch.tensor(0.5)),
    ),
    "DiffusionChain": (
        DiffusionChain([0.1, 0.2, 0.4]),
        lambda chain: chain.sample(labelled, X.shape, label=LABEL),
    ),
    "BinaryChain": (BinaryChain([0.2, 0.5, 1.0]), lambda chain: chain.sample(BITS, (5, 2))),
    "predictor": (
        BinaryChain([0.2, 0.5, 1.0]).predictor(BITS),
        lambda predict: predict(torch.ones(1, 2, dtype=torch.float64), 2),
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_copy_gives_the_same_numbers(name: str) -> None:
    built, ask = BUILT[name]
    copies = [pickle.loads(pickle.dumps(built)), copy.deepcopy(built)]
    expected = ask(built).detach()
    assert bool(torch.isfinite(expected).all())
    for one in copies:
        assert torch.equal(ask(one), expected)
