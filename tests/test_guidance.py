"""Guidance against exact answers: Gaussians, mixtures and Bayes' rule.

For Gaussians of one covariance the guided law p_0^(1-w) p_1^w is Gaussian with the extrapolated
mean, at every time; a class of a mixture is a sub-mixture, so that the exact class probabilities
must turn the score of the whole into that of the class.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, event_shapes, generator, normal, processes, seeds, times
from torch import Tensor

import scoresolve as ss
from scoresolve import guidance
from scoresolve.errors import ArgumentError, GridError, ShapeError, UnknownNameError
from scoresolve.models import PREDICTIONS, Model, NetworkModel, from_eps, from_x0
from scoresolve.plans import Call
from scoresolve.sde import VP, GaussianSDE, RectifiedFlow

D = 3


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Counted:
    """A score callable with labels 0, 1 (two Gaussians) and 2 (no condition), counting rows."""

    def __init__(self, sde: GaussianSDE, seed: int = 0) -> None:
        rng = generator(seed)
        root = normal(rng, D, D)
        self.means, self.covariance = normal(rng, 3, D), root @ root.mT + 0.1 * torch.eye(D)
        self.models = [
            ss.GaussianMixture([1.0], mean[None], self.covariance[None]).score_model(sde)
            for mean in self.means
        ]
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls.append(len(x))
        every = torch.stack([model(x, t) for model in self.models])
        return every[label, torch.arange(len(x))]

    def extrapolated(self, sde: GaussianSDE, w: float) -> list[Model]:
        return [
            ss.GaussianMixture(
                [1.0], (w * mean + (1 - w) * self.means[2])[None], self.covariance[None]
            ).score_model(sde)
            for mean in self.means[:2]
        ]


LABEL = torch.tensor([0, 1, 1, 0])


def states(sde: GaussianSDE, rows: int = 4, seed: int = 1) -> Tensor:
    return sde.prior_std * normal(generator(seed), rows, D)


@settings(max_examples=10)
@given(sde=processes(), w=st.floats(-2, 8), batched=st.booleans(), data=st.data())
def test_guidance_between_gaussians_of_one_covariance_is_the_extrapolated_gaussian(
    sde, w, batched, data
):
    net = Counted(sde)
    t = data.draw(times(sde, 4, 0.05, 0.95))
    x = states(sde)
    model = guidance.classifier_free(net, sde, w, {"label": 2}, batched=batched)
    truth = net.extrapolated(sde, w)
    for prediction in PREDICTIONS:
        found = model.predict(prediction, x, t, label=LABEL)
        for i, k in enumerate(LABEL.tolist()):
            expected = truth[k].predict(prediction, x[i : i + 1], t[i : i + 1])
            scale = 1 + float(expected.norm())
            close(found[i : i + 1] / scale, expected / scale, 1e-7, 1e-7)


def test_guidance_samples_the_extrapolated_gaussian():
    sde = VP()
    net = Counted(sde)
    model = guidance.classifier_free(net.models[0], sde, 3.0, net.models[2])
    grid = ss.make_grid("flow", sde, 60)
    x = sde.prior_std * normal(generator(2), 8, D)
    found = ss.sample(model, sde, x=x, grid=grid).x
    close(found, ss.sample(net.extrapolated(sde, 3.0)[0], sde, x=x, grid=grid).x)


def test_scale_one_is_conditional_scale_zero_is_not_and_both_cost_one_call():
    sde = VP()
    net, x, t = Counted(sde), states(VP()), torch.tensor(0.4)
    for w, labels in ((1.0, LABEL), (0.0, torch.full((4,), 2))):
        net.calls.clear()
        model = guidance.classifier_free(net, sde, w, {"label": 2})
        close(model(x, t, label=LABEL), net(x, t, labels))
        assert net.calls == [4, 4]
        assert model.cost(0.4) == (1, 0)


@pytest.mark.parametrize("batched", [False, True])
def test_cost_counts_the_evaluations_that_are_made(batched):
    sde = VP()
    net = Counted(sde)
    model = guidance.classifier_free(
        net, sde, 2.0, {"label": 2}, interval=(0.3, 3.0), batched=batched
    )
    plan = ss.plan("heun", sde, ss.make_grid("karras", sde, 7), denoise=True)
    plan.run(model, states(sde), label=LABEL)
    rows = sum(net.calls)
    cost = guidance.network_cost(model, plan)
    assert rows == 4 * cost.forwards
    assert plan.nfe < cost.forwards < 2 * plan.nfe
    assert max(net.calls) == (8 if batched else 4)


def test_interval_is_open_below_closed_above_and_judged_row_by_row():
    sde = ss.EDM()
    net, x = Counted(sde), states(sde)
    t = torch.tensor([0.5, 0.50001, 2.0, 2.00001], dtype=torch.float64)
    model = guidance.classifier_free(net, sde, 4.0, {"label": 2}, interval=(0.5, 2.0))
    plain = guidance.classifier_free(net, sde, 4.0, {"label": 2})
    found, full, bare = model(x, t, label=LABEL), plain(x, t, label=LABEL), net(x, t, LABEL)
    close(found[[1, 2]], full[[1, 2]])
    close(found[[0, 3]], bare[[0, 3]])
    assert [model.cost(float(s)).forwards for s in t] == [1, 2, 2, 1]


def test_rescaling_matches_the_standard_deviation_of_the_conditional_prediction():
    sde = VP()
    x, t = states(sde), torch.tensor(0.4)
    shift = torch.tensor([5.0, -1.0, 2.0], dtype=torch.float64)

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.sin(3 * x) + shift * (label == 2)[:, None]

    good, null = net(x, t, LABEL), net(x, t, torch.full((4,), 2))
    guided = null + 6 * (good - null)
    ratio = good.std(1, keepdim=True) / guided.std(1, keepdim=True)
    for phi in (0.4, 1.0):
        expected = phi * ratio * guided + (1 - phi) * guided
        for wrap, name in ((from_eps, "eps"), (from_x0, "x0")):
            model = guidance.classifier_free(wrap(net, sde), sde, 6.0, {"label": 2}, rescale=phi)
            close(model.predict(name, x, t, label=LABEL), expected)
            same = wrap(lambda x, t, e=expected: e, sde)
            for other in PREDICTIONS:
                close(model.predict(other, x, t, label=LABEL), same.predict(other, x, t))
    even = from_x0(lambda x, t, label: torch.ones_like(x), sde)
    flat = guidance.classifier_free(even, sde, 6.0, {"label": 2}, rescale=1.0)
    close(flat.predict("x0", x, t, label=LABEL), torch.ones_like(x))


def test_negative_conditions_of_a_verb_replace_the_null_and_are_split_with_the_batch():
    sde = VP()
    net = Counted(sde)
    negative = torch.tensor([1, 0, 2, 1])
    for batched in (False, True):
        model = guidance.classifier_free(net, sde, 2.5, {"label": 2}, batched=batched)
        x, options = states(sde), {"steps": 3, "label": LABEL, "negative_label": negative}
        whole = ss.sample(model, sde, x=x, **options).x
        close(ss.sample(model, sde, x=x, chunk=3, **options).x, whole)
        t = torch.tensor(0.3)
        by_hand = 2.5 * net(x, t, LABEL) - 1.5 * net(x, t, negative)
        close(model(x, t, label=LABEL, negative_label=negative), by_hand)


def test_null_broadcasts_to_embeddings_and_passes_other_values_through():
    sde = VP()
    seen = []

    def net(x: Tensor, t: Tensor, text: Tensor, mode: str = "") -> Tensor:
        seen.append((tuple(text.shape), mode))
        return x * text.mean((1, 2))[:, None]

    text = normal(generator(0), 4, 2, 5)
    null = torch.ones(2, 5)
    x, t = states(sde), torch.tensor(0.4)
    for batched in (False, True):
        model = guidance.classifier_free(net, sde, 3.0, {"text": null}, batched=batched)
        close(model(x, t, text=text, mode="a"), 3 * net(x, t, text) - 2 * x)
    without = guidance.classifier_free(
        lambda x, t, y: x if y is None else 2 * x, sde, 3.0, {"y": None}
    )
    close(without(x, t, y=text), 4 * x)
    modes = guidance.classifier_free(net, sde, 3.0, {"text": null, "mode": "b"})
    modes(x, t, text=text, mode="a")
    assert seen[0] == seen[1] == ((4, 2, 5), "a")
    assert seen[3] == ((8, 2, 5), "a")
    assert [mode for _, mode in seen[-2:]] == ["a", "b"]


@given(sde=processes(), w=st.floats(0, 4), seed=seeds(), data=st.data())
def test_classifier_guidance_with_exact_class_probabilities_is_bayes_rule(sde, w, seed, data):
    rng = generator(seed)
    means, covariances = 2 * normal(rng, 4, D), 0.3 + torch.rand(4, D, generator=rng).double()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    whole = ss.GaussianMixture(weights, means, covariances).score_model(sde)
    part = ss.GaussianMixture(weights[:2], means[:2], covariances[:2]).score_model(sde)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return part.log_prob(x, t) - whole.log_prob(x, t)

    t = data.draw(times(sde, 4, 0.05, 0.95))
    x = sde.alpha(t)[:, None] * means + sde.sigma(t)[:, None] * normal(rng, 4, D)
    bayes = guidance.classifier(whole, sde, log_prob)
    strong = guidance.classifier(whole, sde, log_prob, w)
    free = guidance.classifier_free(part, sde, w, whole)
    for prediction in PREDICTIONS:
        truth = part.predict(prediction, x, t)
        scale = 1 + float(truth.norm())
        close(bayes.predict(prediction, x, t) / scale, truth / scale, 1e-7, 1e-7)
        both = strong.predict(prediction, x, t), free.predict(prediction, x, t)
        close(both[0] / scale, both[1] / scale, 1e-7, 1e-7)


def test_classifier_conditions_go_to_the_classifier_and_the_shared_ones_to_both():
    sde = VP()
    seen: dict[str, object] = {}

    def net(x: Tensor, t: Tensor, **cond: object) -> Tensor:
        seen["net"] = sorted(cond)
        return -x

    def log_prob(x: Tensor, t: Tensor, **cond: object) -> Tensor:
        seen["classifier"] = sorted(cond)
        return -x.square().sum(1)

    model = guidance.classifier(net, sde, log_prob, 2.0, shared=("size",))
    x = states(sde)
    close(model(x, 0.4, y=1, size=2), -5 * x)
    assert seen == {"net": ["size"], "classifier": ["size", "y"]}
    assert model.cost(0.4) == (2, 1)
    with pytest.raises(ShapeError, match="log_prob returned shape"):
        guidance.classifier(net, sde, lambda x, t: x)(x, 0.4)


def paper_cfg_plus_plus(
    net: Counted, sde: GaussianSDE, x: Tensor, grid: ss.Grid, scale: float
) -> Tensor:
    """Algorithm 2 of the paper, with alpha and sigma for sqrt(alpha-bar), sqrt(1 - alpha-bar)."""
    for t, s in zip(grid.times, [*grid.times[1:], None], strict=True):
        null = net.models[2].predict("eps", x, t)
        good = net.models[0].predict("eps", x, t)
        x0 = (x - sde.sigma(t) * (null + scale * (good - null))) / sde.alpha(t)
        x = x0 if s is None else sde.alpha(s) * x0 + sde.sigma(s) * null
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(sde=processes().filter(lambda sde: not isinstance(sde, RectifiedFlow)))
def test_cfg_plus_plus_with_ddim_is_the_algorithm_of_the_paper(dtype, sde):
    net = Counted(sde)
    grid = ss.make_grid("uniform", sde, 6, 0.9 * sde.T, 0.05 * sde.T, denoise=True)
    model = guidance.cfg_plus_plus(net.models[0], sde, grid, 0.7, net.models[2])
    x = states(sde)
    found = ss.sample(model, sde, x=x.to(dtype), grid=grid, solver="ddim").x
    tolerance = 1e-8 if dtype is torch.float64 else 2e-3
    truth = paper_cfg_plus_plus(net, sde, x, grid, 0.7)
    close(found.double(), truth, tolerance, tolerance * (1 + float(truth.abs().max())))


def test_cfg_plus_plus_starts_where_there_is_no_signal():
    sde = RectifiedFlow()
    net = Counted(sde)
    grid = ss.make_grid("flow", sde, 5)
    model = guidance.cfg_plus_plus(net.models[0], sde, grid, 0.6, net.models[2])
    blend = guidance.classifier_free(net.models[0], sde, 0.6, net.models[2])
    x = states(sde)
    close(model.predict("flow", x, 1.0), blend.predict("flow", x, 1.0))
    assert bool(ss.sample(model, sde, x=x, grid=grid, solver="euler_flow").ok.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_models_made_for_a_grid_refuse_every_other(dtype):
    sde = RectifiedFlow()
    net, grid = Counted(sde), ss.make_grid("flow", sde, 20)
    seen = guidance.Measurement(torch.eye(D)[:1], 0.1, torch.zeros(1, dtype=torch.float64))
    x = states(sde).to(dtype)
    for model, solver in (
        (guidance.cfg_plus_plus(net.models[0], sde, grid, 0.6, net.models[2]), "euler_flow"),
        (guidance.dps_steps(net.models[0], sde, seen, grid), "ddpm"),
    ):
        assert bool(ss.sample(model, sde, x=x, grid=grid, solver=solver).ok.all())
        t = torch.tensor(grid.times[1:5])  # rounded to float32
        assert bool(model.predict("x0", x, t).isfinite().all())
        for other in ({"nfe": 50, "solver": solver}, {"grid": grid, "solver": "midpoint_flow"}):
            with pytest.raises(GridError, match=r"not among the 21 times from 1 to 0.001 .*grid="):
                ss.sample(model, sde, x=x, **other)
        with pytest.raises(GridError, match=r"t = 0\.5 is not"):
            model.predict("x0", x, torch.tensor([grid.times[0], 0.5, grid.times[1], grid.times[2]]))


def test_autoguidance_extrapolates_past_the_weak_model_under_the_same_conditions():
    sde = VP()
    good, weak = Counted(sde, 0), Counted(sde, 5)
    model = guidance.autoguidance(good, sde, weak, 2.0)
    x, t = states(sde), torch.tensor(0.4)
    close(model(x, t, label=LABEL), 2 * good(x, t, LABEL) - weak(x, t, LABEL))
    assert model.cost(0.4) == (2, 0)


def test_a_scale_may_depend_on_time():
    sde = VP()
    net, x = Counted(sde), states(sde)
    t = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float32)
    model = guidance.classifier_free(net, sde, lambda t: 1 + 10 * t, {"label": 2})
    null = torch.full((4,), 2)
    expected = net(x, t, null) + (1 + 10 * t.double())[:, None] * (
        net(x, t, LABEL) - net(x, t, null)
    )
    close(model(x, t, label=LABEL), expected, 1e-6, 1e-6)
    close(model(x, 0.1, label=LABEL)[0], expected[0], 1e-6, 1e-6)


@given(sde=processes(), data=st.data())
def test_clipping_and_thresholding_act_on_x0_and_nothing_else(sde, data):
    x = 3 * states(sde)
    t = data.draw(times(sde, 4, 0.05, 0.95))
    inner = Counted(sde).models[0]
    x0 = inner.predict("x0", x, t)
    level = torch.quantile(x0.abs(), 0.6, dim=1, keepdim=True).clamp(min=0.5)
    thresholded = torch.minimum(torch.maximum(x0, -level), level) * 0.5 / level
    for model, expected in (
        (guidance.clip_x0(inner, sde, -0.5, 0.8), x0.clamp(-0.5, 0.8)),
        (guidance.dynamic_threshold(inner, sde, 0.6, 0.5), thresholded),
        (guidance.dynamic_threshold(inner, sde, 1.0, 1e9), x0),
    ):
        same = from_x0(lambda x, t, e=expected: e, sde)
        for prediction in PREDICTIONS:
            close(model.predict(prediction, x, t), same.predict(prediction, x, t), 1e-7, 1e-7)
        assert model.cost(0.5) == (1, 0)


@settings(max_examples=10)
@given(shape=event_shapes(), dtype=dtypes(), data=st.data())
def test_every_guided_model_takes_any_event_shape_dtype_and_batch_split(shape, dtype, data):
    sde = data.draw(processes())
    x = normal(generator(3), 4, *shape).to(dtype)
    t = data.draw(times(sde, 4, 0.1, 0.9)).to(dtype)

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x) - y.reshape(-1, *(1,) * (x.ndim - 1)).to(x)

    def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -(x.reshape(len(x), -1).square().sum(1)) * y

    y = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=dtype)
    for model in (
        guidance.classifier_free(net, sde, 2.0, {"y": 0.0}, rescale=0.5, interval=(1e-9, 1e9)),
        guidance.classifier_free(net, sde, 2.0, {"y": 0.0}, batched=True),
        guidance.autoguidance(net, sde, net, 2.0),
        guidance.classifier(net, sde, log_prob, 2.0, shared=("y",)),
        guidance.clip_x0(net, sde),
        guidance.dynamic_threshold(net, sde, 0.8),
    ):
        for prediction in PREDICTIONS:
            whole = model.predict(prediction, x, t, y=y)
            assert whole.shape == x.shape and whole.dtype == dtype
            rows = [
                model.predict(prediction, x[i : i + 1], t[i : i + 1], y=y[i : i + 1])
                for i in range(4)
            ]
            tolerance = 1e-9 if dtype is torch.float64 else 1e-3
            close(
                torch.cat(rows),
                whole,
                tolerance,
                tolerance * (1 + float(whole.detach().abs().max())),
            )


def test_gradients_flow_to_the_network_and_the_state():
    sde = VP()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return weight * torch.sin(x) * (1 + y[:, None])

    def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (weight * x**3).sum(1)

    y, x = torch.arange(4.0).double(), states(sde).requires_grad_()
    for model in (
        guidance.classifier_free(net, sde, 2.0, {"y": 0.0}, rescale=0.3),
        guidance.classifier(net, sde, log_prob, 1.0, shared=("y",)),
    ):

        def total(x: Tensor, model: Model = model) -> Tensor:
            return model.predict("x0", x, 0.4, y=y)

        assert torch.autograd.gradcheck(total, (x,))
        (gradient,) = torch.autograd.grad(total(x).sum(), weight)
        step = 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(sign * step)
                values.append(float(total(x.detach()).sum()))
                weight.sub_(sign * step)
        assert float(gradient) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_guided_models_nest_and_move_to_other_processes():
    sde = VP()
    net = Counted(sde)
    inner = guidance.classifier_free(net, sde, 2.0, {"label": 2})
    model = guidance.clip_x0(inner, sde, -1.0, 1.0)
    assert model.cost(0.3) == (2, 0)
    flow = RectifiedFlow()
    x, t = states(flow), torch.tensor(0.5, dtype=torch.float64)
    home = sde.time_from_log_snr(flow.log_snr(t))
    x_home = x * sde.alpha(home) / flow.alpha(t)
    close(
        model.on(flow).predict("x0", x, t, label=LABEL),
        inner.predict("x0", x_home, home, label=LABEL).clamp(-1, 1),
    )


def test_solvers_get_the_prediction_that_the_network_makes():
    sde = VP()
    eps = from_eps(lambda x, t: torch.tanh(x), sde)
    assert guidance.classifier_free(eps, sde, 2.0, eps).bind("x0")[0] == "eps"
    assert guidance.clip_x0(eps, sde).bind("eps")[0] == "x0"
    assert isinstance(eps, NetworkModel)
    model = guidance.classifier_free(eps, sde, 2.0, eps, rescale=0.5)
    assert model.bind("v")[0] == "eps"
    x = states(sde)
    for solver in ("dpmpp_2m", "ab2_v", "euler_flow", "ddpm"):
        plan = ss.plan(solver, sde, ss.make_grid("flow", sde, 5))
        by_prediction = NetworkModel(lambda x, t: model.predict("eps", x, t), sde, "eps")
        noise = ss.Philox(0), ss.Philox(0)
        close(plan.run(model, x, noise[0]), plan.run(by_prediction, x, noise[1]))
        assert guidance.network_cost(model, plan).forwards == 2 * plan.nfe
        assert plan.nfe == sum(isinstance(stage, Call) for stage in plan.stages)


def nested(x: Tensor, t: Tensor, added: dict[str, Tensor], table: Tensor, mode: str) -> Tensor:
    """Conditions as SDXL nests them, and a table for all rows that is summed over."""
    shift = added["text"].mean(1) + added["ids"].sum(1) + table.sum()
    return torch.tanh(x + (1 if mode == "a" else 2) * shift[:, None])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rows", [2, 4])  # of the table: 4 as the batch, by accident
def test_nested_conditions_follow_their_samples_and_shared_ones_are_not_doubled(batched, rows):
    rng, sde = generator(5), VP()
    added = {"text": normal(rng, 4, 5), "ids": normal(rng, 4, 6)}
    table, x, t = normal(rng, rows, 2), states(sde), torch.tensor(0.4)
    null = {"added": {"text": 0.0}}
    model = guidance.classifier_free(nested, sde, 3.0, null, batched=batched)
    cond = {"table": table, "mode": "a"}
    bare = {**added, "text": torch.zeros(4, 5, dtype=torch.float64)}
    expected = 3 * nested(x, t, added, **cond) - 2 * nested(x, t, bare, **cond)
    close(model(x, t, added=added, **cond), expected)
    other = {"text": normal(rng, 4, 5), "ids": normal(rng, 4, 6)}
    by_hand = 3 * nested(x, t, added, **cond) - 2 * nested(x, t, other, **cond)
    close(model(x, t, added=added, negative_added=other, **cond), by_hand)


def test_one_call_is_made_where_all_that_has_the_rows_of_the_batch_differs():
    calls = []

    def net(x: Tensor, t: Tensor, added: list[Tensor], table: Tensor, size: Tensor) -> Tensor:
        calls.append((len(x), len(added[0]), len(table), size.ndim))
        return x + added[0] + table.sum() + size

    sde, x = VP(), states(VP())
    model = guidance.classifier_free(net, sde, 3.0, {"added": [0.0]}, batched=True)
    table, size = torch.ones(3, 2), torch.tensor(2.0)
    close(model(x, 0.4, added=[x], table=table, size=size), x + 3 * x + 8)
    assert calls == [(8, 8, 3, 0)]
    model(x, 0.4, added=[x], table=torch.ones(4, 2), size=size)
    assert calls[1:] == [(4, 4, 4, 0)] * 2
    model(x, 0.4, added=[x], table=table, size=np.float32(2))  # might have been an array [B]
    assert calls[3:] == [(4, 4, 3, 0)] * 2


def test_a_scale_is_not_rounded_to_the_dtype_of_the_time():
    sde, x = VP(), states(VP())
    good, weak = from_x0(lambda x, t: x, sde), from_x0(lambda x, t: -x, sde)
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.full((4,), 0.5, dtype=dtype)
        for scale in (7.3, lambda t: 7.3):
            model = guidance.autoguidance(good, sde, weak, scale)
            close(model.predict("x0", x, t), 13.6 * x, 1e-12, 0.0)


def test_a_classifier_may_write_into_its_input_and_be_of_another_dtype():
    net = torch.nn.Sequential(
        torch.nn.ReLU(inplace=True), torch.nn.Linear(D, 1), torch.nn.Flatten(0)
    )
    with torch.no_grad():
        net[1].weight.fill_(0.5)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    sde, x = VP(), states(VP())
    before = x.clone()
    score = from_x0(lambda x, t: 0.5 * x, sde)
    found = guidance.classifier(score, sde, Net(), 3.0)(x, 0.4)
    close(found.detach(), score(before, 0.4) + 1.5 * (before > 0), 1e-6, 1e-6)
    assert torch.equal(x, before)


def test_times_too_coarse_for_the_grid_are_refused():
    """In bfloat16 999 is 1000, another time of the grid."""
    sde = ss.DiscreteVP((1 - ss.sde.linear_betas(1000)).cumprod(0))
    net = from_eps(lambda x, t: x, sde)
    model = guidance.cfg_plus_plus(net, sde, [float(t) for t in range(1000, 0, -1)], 0.6, net)
    x = states(VP())
    assert model.predict("x0", x, torch.tensor(999.0)).isfinite().all()
    with pytest.raises(GridError, match="give them in float32"):
        model.predict("x0", x, torch.tensor(999.0, dtype=torch.bfloat16))


def test_an_empty_batch_stays_empty():
    sde, x = VP(), torch.zeros(0, 2, 3)
    net = from_eps(lambda x, t, label: torch.tanh(x), sde)
    for model in (
        guidance.classifier_free(net, sde, 2.0, {"label": 2}, rescale=0.5, batched=True),
        guidance.dynamic_threshold(net, sde),
    ):
        found = model.predict("x0", x, torch.zeros(0), label=torch.zeros(0).long())
        assert found.shape == x.shape


SDE = VP()
NET = Counted(SDE)
CUSTOM = ss.solvers.PredictorCorrector(
    ss.solvers.DDIM(), ss.solvers.KernelCorrector(ss.kernels.ULA(0.05))
)
NULL = {"label": 2}


def asked(null: object, scale: object = 2.0, **cond: Tensor) -> Tensor:
    model = guidance.classifier_free(NET, SDE, scale, null)
    return model(states(SDE), 0.4, label=LABEL, **cond)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: guidance.classifier_free(NET, SDE, math.nan, {"label": 2}),
            ArgumentError,
            "scale",
        ),
        (lambda: guidance.classifier_free(NET, SDE, 2.0, {}), ArgumentError, "null is empty"),
        (
            lambda: guidance.classifier_free(NET, SDE, 2.0, NET, batched=True),
            ArgumentError,
            "one network",
        ),
        (
            lambda: guidance.classifier_free(NET, SDE, 2.0, {"label": 2}, interval=(2.0, 1.0)),
            ArgumentError,
            "interval",
        ),
        (
            lambda: guidance.classifier_free(NET, SDE, 2.0, {"label": 2}, rescale=1.5),
            ArgumentError,
            "rescale",
        ),
        (
            lambda: guidance.classifier_free(NET, SDE, 2.0, {"label": torch.zeros(3)})(
                states(SDE), 0.4, label=LABEL
            ),
            ShapeError,
            "negative_label",
        ),
        (
            lambda: guidance.classifier_free(NET, SDE, 2.0, {"label": 2, "b": "no"}, batched=True)(
                states(SDE), 0.4, label=LABEL, b="yes"
            ),
            ArgumentError,
            "no batch axis",
        ),
        (
            lambda: guidance.classifier_free(NET, ss.Langevin(lambda x: x), 2.0, {"label": 2}),
            ArgumentError,
            "Gaussian process",
        ),
        (lambda: guidance.cfg_plus_plus(NET, SDE, [0.3, 0.5, 0.1], 0.5, NET), GridError, "monoton"),
        (lambda: guidance.cfg_plus_plus(NET, SDE, [0.1, 0.5], 0.5, NET), GridError, "decreasing"),
        (lambda: guidance.classifier(NET, SDE, len, math.inf), ArgumentError, "scale"),
        (lambda: guidance.classifier_free(NET, SDE, "7.5", NULL), ArgumentError, "scale"),
        (lambda: guidance.classifier_free(NET, None, 2.0, NULL), ArgumentError, "sde is None"),
        (lambda: guidance.classifier_free(SDE, NET, 2.0, NULL), ArgumentError, "sde is Counted"),
        (lambda: guidance.classifier_free(NET, SDE, 2.0, NULL, 0.3), ArgumentError, "interval"),
        (lambda: guidance.classifier_free(NET, SDE, 2.0, "null"), ArgumentError, "callable score"),
        (lambda: asked({"label": 2.5}), ArgumentError, "whole numbers"),
        (lambda: asked({"label": "none"}), ArgumentError, "number or tensor"),
        (lambda: asked({"lable": 2}), ArgumentError, "is label= meant"),
        (lambda: asked(NULL, negative_lable=LABEL), ArgumentError, "is label= meant"),
        (lambda: asked(NET.models[0], negative_label=LABEL), ArgumentError, "replaces nothing"),
        (
            lambda: asked(NULL, scale=lambda t: torch.ones(4)),
            ShapeError,
            "one for each time",
        ),
        (lambda: asked(NULL, scale=lambda t: math.nan), ArgumentError, "scale = nan"),
        (lambda: guidance.classifier(NET, SDE, len, shared="size"), ArgumentError, "sequence"),
        (lambda: guidance.classifier(NET, SDE, 2.0), ArgumentError, "log_prob is float"),
        (
            lambda: guidance.classifier(NET.models[0], SDE, lambda x, t: x.detach().sum(1))(
                states(SDE), 0.4
            ),
            ArgumentError,
            "no gradient in x",
        ),
        (lambda: guidance.clip_x0(NET, SDE, "low", 1.0), ArgumentError, "low"),
        (lambda: guidance.clip_x0(NET, SDE, 1.0, -1.0), ArgumentError, "low < high"),
        (lambda: guidance.dynamic_threshold(NET, SDE, 1.2), ArgumentError, "quantile"),
        (lambda: guidance.dynamic_threshold(NET, SDE, bound=0.0), ArgumentError, "bound"),
        (
            lambda: guidance.clip_x0(NET, SDE).predict("epsilon", states(SDE), 0.4),
            UnknownNameError,
            "eps",
        ),
        (
            lambda: guidance.network_cost(
                NET.models[0], ss.plan(CUSTOM, SDE, ss.make_grid("uniform", SDE, 3))
            ),
            ArgumentError,
            "custom kernel",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(build, error, message):
    with pytest.raises(error, match=message):
        build()
