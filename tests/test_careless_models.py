"""Networks that write into their inputs, live in half precision, change their answer, or raise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import generator, normal
from torch import Tensor, nn

import scoresolve as ss
from scoresolve.errors import ArgumentError, ModelWarning, ScoresolveError, ShapeError

SDE = ss.VP()
DOUBLE = nn.Linear(2, 2).double()
WEIGHT = normal(generator(3), 2, 2).float()


class Net(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.act, self.last = nn.ReLU(inplace=inplace), nn.Linear(2, 2)
        self.last.weight.data, self.last.bias.data = WEIGHT.clone(), torch.zeros(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(x))
        return out


VERBS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        solver: lambda net, x, solver=solver: ss.sample(net, SDE, x=x, solver=solver).x  # type: ignore[misc]
        for solver in ("auto", "ddim", "ddpm", "heun", "dpmpp_2m", "dopri5", "adaptive_sde", "pc")
    },
    "gradients": lambda net, x: ss.sample(net, SDE, x=x, solver="ddim", gradients=True).x,
    "encode": lambda net, x: ss.encode(net, SDE, x).x,
    "log_likelihood": lambda net, x: ss.log_likelihood(net, SDE, x).log_prob,
    "torchdiffeq": lambda net, x: ss.sample(net, SDE, x=x, solver="torchdiffeq_rk4").x,
    "edm": lambda net, x: ss.sample(ss.from_denoiser(net), ss.EDM(), x=80 * x, nfe=10).x,
}


@pytest.mark.filterwarnings("ignore::scoresolve.errors.ModelWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_a_network_that_writes_into_its_input_spoils_nothing(verb: str) -> None:
    x = normal(generator(0), 5, 2).float()
    kept = x.clone()
    found, wanted = VERBS[verb](Net(True), x), VERBS[verb](Net(False), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("solver", ["auto", "ddpm", "dopri5"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_network_that_writes_into_its_condition_spoils_nothing(
    solver: str, chunk: int | None
) -> None:
    def net(x: Tensor, t: Tensor, y: dict[str, Any], write: bool = True) -> Tensor:
        scale = y["scale"].mul_(0.5) if write else y["scale"] * 0.5
        return -x / (1 + scale[:, None] ** 2)

    x = normal(generator(0), 5, 2)
    y = {"scale": torch.linspace(0.5, 2, 5, dtype=x.dtype), "name": "kept"}
    kept, given = y["scale"].clone(), ss.per_sample(y["scale"])
    cond = {"y": {"scale": given, "name": "kept"}, "solver": solver, "chunk": chunk}
    with pytest.warns(ModelWarning, match="writes into its input"):
        found = ss.sample(net, SDE, x=x, **cond).x
    assert torch.equal(y["scale"], kept)
    torch.testing.assert_close(found, ss.sample(net, SDE, x=x, write=False, **cond).x)


def test_one_warning_tells_of_writes_and_a_late_one_is_refused() -> None:
    x = normal(generator(0), 5, 2).float()
    with pytest.warns(ModelWarning, match="writes into its input in place") as seen:
        ss.sample(Net(True), SDE, x=x, solver="ddim", nfe=5)
    assert len(seen) == 1
    calls = []

    def late(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x.neg_() if len(calls) > 2 else -x

    with pytest.raises(ArgumentError, match="did not do at its first call"):
        ss.sample(late, SDE, x=x, solver="ddim", nfe=5)


class Timed(nn.Module):
    """Keeps the times it is asked at; its parameters are half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(1, dtype=dtype)), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(t[0].clone())
        return -x * self.scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_get_times_that_are_not_rounded(dtype: torch.dtype) -> None:
    abar = (1 - ss.sde.linear_betas(1000)).cumprod(0)
    net, chain = Timed(dtype), ss.DiscreteVP(abar)
    x = torch.ones(2, 2)
    ss.sample(ss.from_discrete(net, abar), chain, x=x, solver="ddim", grid="trailing", steps=50)
    assert [float(t) for t in net.seen] == [999.0 - 20 * i for i in range(50)]
    assert {t.dtype for t in net.seen} == {torch.float32}
    asked = Timed(dtype)
    ss.sample(ss.from_eps(asked, SDE, time_dtype=dtype), SDE, x=x, solver="ddim", nfe=3)
    assert {t.dtype for t in asked.seen} == {dtype}
    with pytest.raises(ArgumentError, match="floating-point dtype"):
        ss.from_eps(asked, SDE, time_dtype=torch.int64)


def from_third(change: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    calls = []

    def net(x: Tensor, t: Tensor) -> Any:
        calls.append(1)
        return -x if len(calls) < 3 else change(-x)

    return net


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda m: m.T,
    "reshaped": lambda m: m.reshape(-1, 1),
    "one row": lambda m: m[:1],
    "tuple": lambda m: (m,),
    "complex": lambda m: torch.complex(m, m),
    "integer": lambda m: m.long(),
    "bool": lambda m: m > 0,
    "meta": lambda m: m.to("meta"),
    "sparse": lambda m: m.to_sparse(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dopri5"])
def test_an_answer_that_changes_at_the_third_call_is_refused(change: str, solver: str) -> None:
    if (change, solver) in (
        ("meta", "ddim"),
        ("sparse", "ddim"),
        ("meta", "ddpm"),
        ("sparse", "ddpm"),
    ):
        pytest.skip("a plan looks at layout and device of its first two answers alone")
    with pytest.raises((ShapeError, ArgumentError), match="returned"):
        ss.sample(from_third(CHANGES[change]), SDE, shape=(5, 2), solver=solver)


def test_an_exception_of_the_network_keeps_its_type_and_says_where() -> None:
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return -x if len(calls) < 4 else -x / 0 if 1 // 0 else x

    with pytest.raises(ZeroDivisionError) as caught:
        ss.sample(net, SDE, shape=(5, 2), solver="ddim", nfe=10)
    notes = " ".join(caught.value.__notes__)
    assert "t = " in notes and "(5, 2)" in notes and "call 4 of the 10" in notes


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (nn.Linear, "class Linear itself"),
        (lambda x: -x, "cannot be called as net"),
        (nn.Linear(2, 2).double().forward, "cannot be called as net"),
        (lambda x, t: DOUBLE(x), "cannot take x in torch.float32"),
        (3, "give a callable"),
    ],
)
def test_what_is_no_score_is_refused_at_once(score: Any, message: str) -> None:
    with pytest.raises(ScoresolveError, match=message):
        ss.sample(score, SDE, shape=(5, 2), dtype=torch.float32, solver="ddim")


def test_misspelt_arguments_do_not_vanish_in_a_network() -> None:
    def net(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return -x

    with pytest.warns(ModelWarning, match="did you mean steps= for stepz="):
        ss.sample(net, SDE, shape=(2, 2), solver="ddim", stepz=5)
    with pytest.warns(ModelWarning, match="did you mean probes="):
        ss.log_likelihood(net, SDE, torch.ones(2, 2), n_probes=8)
    with pytest.raises(ArgumentError, match="did you mean steps="):
        ss.sample(lambda x, t: -x, SDE, shape=(2, 2), step=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.sample(net, SDE, shape=(2, 2), solver="ddim", y=1, scale=2.0, context=3, class_labels=4)


def test_an_energy_may_write_and_be_asked_in_inference_mode() -> None:
    def energy(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = x.square_().sum(1) / 2
        return out

    plain = ss.sample(ss.from_energy(lambda x, t: x.square().sum(1) / 2), SDE, shape=(4, 2)).x
    with torch.inference_mode():
        found = ss.sample(ss.from_energy(energy), SDE, shape=(4, 2)).x
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for bad, message in ((lambda x, t: 1.0, "float"), (lambda x, t: x.detach().sum(1), "no grad")):
        with pytest.raises(ArgumentError, match=message):
            ss.sample(ss.from_energy(bad), SDE, shape=(4, 2), solver="ddim")
