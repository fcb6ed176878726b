"""Chains of bits, held against the enumeration of all words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import scoresolve as ss
from scoresolve.bounds import binary_bound
from scoresolve.chains import BinaryChain
from scoresolve.errors import ArgumentError, ShapeError
from scoresolve.sde import forgetting_betas
from scoresolve.targets import BinaryLaw, BitMixture, HiddenMarkovBits, heartbeat

F64 = torch.float64
LENGTH = 5


def words(length: int = LENGTH) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=length)), dtype=F64)


def numbers(bits: Tensor) -> Tensor:
    """The place of each word in `words`."""
    return (bits @ 2.0 ** torch.arange(bits.shape[1] - 1, -1, -1, dtype=F64)).long()


def random_table(seed: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand([2] * length, generator=generator, dtype=F64) ** 4
    return table / table.sum()


def kernel(keep: float, length: int = LENGTH) -> Tensor:
    """q(x_t | x_0) between all words, [to, from]."""
    all_words = words(length)
    same = (all_words[:, None] == all_words).double()
    return ((1 - keep) / 2 + keep * same).prod(2)


chain_of_bits = HiddenMarkovBits([0.3, 0.7], [[0.9, 0.1], [0.4, 0.6]], [0.0, 1.0], LENGTH)
LAWS: dict[str, BinaryLaw] = {
    "table": BitMixture.from_table(random_table(0)),
    "product": BitMixture([1.0], [[0.9, 0.3, 0.0, 0.5, 1.0]]),
    "mixture": BitMixture([1.0, 3.0], [[0.9, 0.3, 0.0, 0.5, 1.0], [0.2, 0.1, 0.7, 0.7, 0.4]]),
    "chain": chain_of_bits,
    "heartbeat": heartbeat(LENGTH, 3),
}


def frequencies_agree(drawn: Tensor, masses: Tensor) -> bool:
    """Within 4.5 standard errors in every word; 32 words are off by more once in 4,600 times."""
    n = len(drawn)
    found = torch.bincount(numbers(drawn), minlength=len(masses)) / n
    error = (masses * (1 - masses) / n).sqrt()
    return bool(((found - masses).abs() <= 4.5 * error).all())


# Laws


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("keep", [1.0, 0.4, 0.01, 0.0])
def test_everything_known_of_noised_bits_is_that_of_the_enumeration(name: str, keep: float) -> None:
    law, every = LAWS[name], words()
    masses = law.log_prob(every).exp()
    assert float(masses.sum()) == pytest.approx(1, abs=1e-12)
    joint = kernel(keep) * masses
    noised = law.noised(keep).log_prob(every).exp()
    torch.testing.assert_close(noised, joint.sum(1), rtol=1e-12, atol=1e-15)
    possible = joint.sum(1) > 0
    predicted = (joint @ every / joint.sum(1, keepdim=True))[possible]
    torch.testing.assert_close(law.predict(every[possible], keep), predicted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_draws_given_noised_bits_have_their_joint_law(name: str) -> None:
    law, keep = LAWS[name], 0.5
    joint = kernel(keep) * law.log_prob(words()).exp()
    for number in (0, 11, 31):
        x = words()[number].expand(20_000, -1)
        drawn = law.draw(x, keep, ss.Philox(7), 0)
        assert frequencies_agree(drawn, joint[number] / joint[number].sum())


@pytest.mark.parametrize("name", LAWS)
def test_samples_have_the_law_and_do_not_know_their_batch(name: str) -> None:
    law = LAWS[name]
    drawn = law.sample(20_000, seed=2)
    assert frequencies_agree(drawn, law.log_prob(words()).exp())
    assert torch.equal(law.sample(7, seed=2), drawn[:7])


def test_a_table_gives_its_own_masses() -> None:
    table = random_table(4, 3)
    found = BitMixture.from_table(table).log_prob(words(3)).exp()
    torch.testing.assert_close(found, table.flatten(), rtol=1e-12, atol=0)


def test_a_chain_of_bits_is_the_product_of_its_transitions() -> None:
    initial, transition = torch.tensor([0.3, 0.7]), torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    for word in words().long().tolist():
        mass = float(initial[word[0]])
        for a, b in itertools.pairwise(word):
            mass *= float(transition[a, b])
        found = chain_of_bits.log_prob(torch.tensor([word], dtype=F64))
        assert float(found.exp()) == pytest.approx(mass, rel=1e-6)


def test_a_heartbeat_has_one_beat_in_every_period() -> None:
    drawn = heartbeat().sample(200)
    assert drawn.shape == (200, 20)
    assert (drawn.unfold(1, 5, 1).sum(2) == 1).all()
    expected = torch.full((200,), -math.log(5), dtype=F64)
    torch.testing.assert_close(heartbeat().log_prob(drawn), expected, rtol=1e-12, atol=0)


# The chain


def test_the_worked_example_forgets_evenly() -> None:
    """Bern(0.9) over 100 steps: p_t = 1/2 + 0.4 (1 - t/100)."""
    law, chain = BitMixture([1.0], [[0.9]]), BinaryChain(forgetting_betas(100))
    for t, p in {0: 0.9, 10: 0.86, 50: 0.7, 90: 0.54, 98: 0.508, 100: 0.5}.items():
        assert float(law.noised(chain.keep(t)).mean) == pytest.approx(p, abs=1e-12)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8))
def test_steps_compose_to_the_marginal_and_bayes_gives_the_posterior(betas: list[float]) -> None:
    chain = BinaryChain(betas)
    one = torch.ones(1, dtype=F64)
    for x0 in (0 * one, one):
        p = x0
        for t in range(1, chain.T + 1):
            rises, stays = chain.step(0 * one, t), chain.step(one, t)
            joint = torch.stack([(1 - p) * rises, p * stays])  # of x_{t-1} and x_t = 1
            before, p = p, joint.sum(0)
            torch.testing.assert_close(chain.marginal(x0, t), p, rtol=1e-12, atol=1e-15)
            posterior = chain.posterior(one, x0, t)
            torch.testing.assert_close(posterior, joint[1] / p, rtol=1e-10, atol=1e-12)
            fell = before * (1 - stays) / (1 - p)
            torch.testing.assert_close(chain.posterior(0 * one, x0, t), fell, rtol=1e-9, atol=1e-12)


def test_forward_paths_have_the_marginals_of_the_chain() -> None:
    chain, x0 = BinaryChain(forgetting_betas(12)), torch.ones(20_000, 1, dtype=F64)
    for t, x in enumerate(chain.forward(x0, seed=1)):
        p = float(chain.marginal(x0[:1], t))
        assert abs(float(x.mean()) - p) <= 4.5 * math.sqrt(p * (1 - p) / len(x0))


@pytest.mark.parametrize("name", LAWS)
def test_the_joint_reverse_chain_returns_to_the_law(name: str) -> None:
    law, chain = LAWS[name], BinaryChain(forgetting_betas(6))
    drawn = chain.sample(law, (20_000, LENGTH), seed=3)
    assert frequencies_agree(drawn, law.log_prob(words()).exp())


def test_a_chain_of_independent_bits_is_exact_for_a_product_law_alone() -> None:
    chain = BinaryChain(forgetting_betas(6))
    for name, exact in {"product": True, "heartbeat": False}.items():
        law = LAWS[name]
        drawn = chain.sample(chain.predictor(law), (20_000, LENGTH), seed=3)
        assert frequencies_agree(drawn, law.log_prob(words()).exp()) is exact


def test_more_steps_bring_the_independent_chain_to_the_law() -> None:
    law, misses = LAWS["heartbeat"], []
    for steps in (3, 12, 48):
        chain = BinaryChain(forgetting_betas(steps))
        drawn = chain.sample(chain.predictor(law), (10_000, LENGTH), seed=3)
        misses.append(float((law.log_prob(drawn) == -torch.inf).double().mean()))
    assert misses[0] > 2.5 * misses[1] > 6 * misses[2]


def test_a_reverse_sample_does_not_know_its_batch() -> None:
    chain = BinaryChain(forgetting_betas(5))
    for predictor in (LAWS["chain"], chain.predictor(LAWS["chain"])):
        whole = chain.sample(predictor, (40, LENGTH), seed=1)
        assert torch.equal(chain.sample(predictor, (9, LENGTH), seed=1), whole[:9])


# The bound


def test_the_bound_is_tight_for_independent_bits() -> None:
    law, chain = LAWS["product"], BinaryChain(forgetting_betas(30))
    x = law.sample(200)
    bound = binary_bound(chain.predictor(law), chain, x, draws=20)
    gap = float((bound.total + law.log_prob(x)).mean())
    error = float(bound.standard_error.square().mean().sqrt()) / math.sqrt(len(x))
    # each x is off by log q(x_t...) of its own path, whose mean over x is 0 as well
    assert abs(gap) < 4.5 * error
    assert bound.prior.abs().max() == 0 and bound.terms.shape == (200, 29)
    assert bound.nfe == 20 * 30


@pytest.mark.parametrize("name", ["table", "chain", "heartbeat"])
def test_the_bound_is_one_and_tightens_with_the_steps(name: str) -> None:
    law, gaps, errors = LAWS[name], list[float](), list[float]()
    x, masses = words(), law.log_prob(words()).exp()
    x, masses = x[masses > 0], masses[masses > 0]
    entropy = -float(torch.xlogy(masses, masses).sum())
    for steps in (2, 12):
        chain = BinaryChain(forgetting_betas(steps))
        bound = binary_bound(chain.predictor(law), chain, x, draws=60)
        errors.append(float((masses * bound.standard_error).square().sum().sqrt()))
        gaps.append(float((masses * bound.total).sum()) - entropy)
    assert gaps[1] > -4.5 * errors[1]
    assert gaps[0] - gaps[1] > 3 * math.hypot(*errors)


def test_a_chain_that_does_not_forget_pays_for_its_start() -> None:
    law, chain = LAWS["product"], BinaryChain([0.2, 0.3])
    x = law.sample(3)
    keep = 0.8 * 0.7
    p = torch.tensor([(1 + keep) / 2, (1 - keep) / 2], dtype=F64)
    expected = LENGTH * float((p * (2 * p).log()).sum())
    bound = binary_bound(chain.predictor(law), chain, x)
    torch.testing.assert_close(bound.prior, torch.full((3,), expected, dtype=F64))


# Bad input


def test_bad_input_is_refused() -> None:
    chain, x = BinaryChain(forgetting_betas(4)), torch.zeros(3, 2, dtype=F64)
    with pytest.raises(ArgumentError, match="betas"):
        BinaryChain([0.1, 1.0, 0.2])
    with pytest.raises(ArgumentError, match="betas"):
        BinaryChain([])
    with pytest.raises(ArgumentError, match="0 or 1"):
        chain.marginal(x + 0.5, 1)
    with pytest.raises(ArgumentError):
        chain.keep(5)
    with pytest.raises(ShapeError, match="one probability for each bit"):
        chain.sample(lambda x, t: x[:, :1], (3, 2))
    with pytest.raises(ArgumentError, match="outside"):
        chain.sample(lambda x, t: x + 1, (3, 2))
    with pytest.raises(ShapeError, match="give \\[B, \\*event\\]"):
        heartbeat(3, 2).log_prob(x)
    with pytest.raises(ArgumentError, match="rows of transition"):
        HiddenMarkovBits([0.5, 0.5], [[0.5, 0.4], [0.5, 0.5]], [0.0, 1.0], 3)
    with pytest.raises(ArgumentError, match="emissions"):
        HiddenMarkovBits([1.0], [[1.0]], [1.5], 3)
    with pytest.raises(ShapeError):
        BitMixture([1.0, 1.0], [[0.5]])
    with pytest.raises(ArgumentError):
        BitMixture([1.0], [[1.5]])
    with pytest.raises(ShapeError):
        BitMixture.from_table([0.5, 0.25, 0.25])
