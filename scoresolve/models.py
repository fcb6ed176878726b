"""Models: what a network predicts, and how to read it as anything else.

Every prediction in use is a combination m = p x0 + q eps of the clean data and the noise in
x_t = alpha x0 + sigma eps:

    x0: (1, 0)   eps: (0, 1)   v: (-sigma, alpha)   flow: (alpha', sigma')   score: (0, -1/sigma)

Two of x_t, m fix x0 and eps, so m_b = u x_t + w m_a; `conversion` gives u and w. In expectation
over x0 given x_t this is Tweedie's identity (Efron 2011; Vincent 2011).
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from scoresolve.errors import (
    ArgumentError,
    ModelWarning,
    ScoresolveError,
    ShapeError,
    UnknownNameError,
    check_output,
    is_transformed,
    known_name,
    short,
    yes_or_no,
)
from scoresolve.precision import host
from scoresolve.sde import (
    EDM,
    SDE,
    DiscreteVP,
    GaussianSDE,
    SchedulePoint,
    TimeLike,
    as_time,
    expand,
)

__all__ = [
    "PREDICTIONS",
    "EnergyModel",
    "Model",
    "NetworkModel",
    "as_model",
    "check_energy",
    "combine",
    "conversion",
    "from_denoiser",
    "from_discrete",
    "from_energy",
    "from_eps",
    "from_flow",
    "from_v",
    "from_x0",
    "prediction_rows",
    "scale_of_data",
]

PREDICTIONS = ("score", "eps", "x0", "v", "flow")
Number = float | Tensor
Prediction = str | tuple[Number, Number]


def prediction_rows(prediction: Prediction, at: SchedulePoint) -> tuple[Number, Number]:
    """p and q of the prediction m = p x0 + q eps at one point of the schedule.

    For the score, which is eps / -sigma, they are those of eps, so that sigma may vanish.

    Args:
        prediction: one of `PREDICTIONS`, or p and q themselves.
        at: the point.

    Raises:
        UnknownNameError: `prediction` is not in `PREDICTIONS`.
    """
    if isinstance(prediction, tuple):
        return prediction
    if prediction == "x0":
        return 1.0, 0.0
    if prediction in ("eps", "score"):
        return 0.0, 1.0
    if prediction == "v":
        return -at.sigma, at.alpha
    if prediction == "flow":
        return at.alpha_dot, at.sigma_dot
    raise UnknownNameError("prediction", prediction, PREDICTIONS)


def _ratio(numerator: Number, denominator: Number) -> Number:
    if isinstance(denominator, float) and isinstance(numerator, float) and denominator == 0:
        return 0.0 if numerator == 0 else math.copysign(math.inf, numerator)
    return numerator / denominator


def conversion(
    source: str, target: Prediction, at: SchedulePoint, target_at: SchedulePoint | None = None
) -> tuple[Number, Number]:
    """Coefficients u, w of m_target = u x + w m_source.

    No term divides by alpha or sigma unless the target truly cannot be had from the source
    there (x0 from eps at alpha = 0, eps from x0 at sigma = 0); then a coefficient is not finite.

    Args:
        source, target: names of `PREDICTIONS`; the target may also be any p and q.
        at: the schedule where `x` and the source prediction live.
        target_at: the schedule of the target prediction, at the same log-SNR; `at` if omitted.

    Returns:
        u and w, numbers, tensors or arrays as in `at`.

    Raises:
        UnknownNameError: a name is not in `PREDICTIONS`.

    Source:
        Salimans and Ho 2022 (2202.00512), appendix D, and Lipman et al. 2022 (2210.02747),
        section 4, are special cases.
    """
    target_at = target_at or at
    p_a, q_a = prediction_rows(source, at)
    p_b, q_b = prediction_rows(target, target_at)
    if source == target and (target_at is at or source in ("x0", "eps")):
        return 0.0, 1.0
    u: Number = 0.0
    w: Number = 1.0
    noises = ("eps", "score")
    if not (source in noises and target in noises):
        determinant = at.alpha * q_a - at.sigma * p_a
        u = _ratio(p_b * q_a - q_b * p_a, determinant)
        w = _ratio(at.alpha * q_b - at.sigma * p_b, determinant)
    if source == "score":
        w = -at.sigma * w
    if target == "score":
        u, w = _ratio(-1.0 * u, target_at.sigma), _ratio(-w, target_at.sigma)
    return u, w


def combine(u: Number, x: Tensor, w: Number, m: Tensor, t: TimeLike) -> Tensor:
    """u x + w m for states [B, *event], with coefficients made at time `t` [] or [B]."""
    result = m if isinstance(w, float) and w == 1 else _factor(w, x, t) * m
    if isinstance(u, float) and u == 0:
        return result
    return _factor(u, x, t) * x + result


def _factor(c: Number, x: Tensor, t: TimeLike) -> Tensor:
    """A coefficient that multiplies `x`; a Python number keeps its 53 bits."""
    given = c if isinstance(c, Tensor) else host(c)
    return expand(given, x, t)


def check_energy(energy: object, x: Tensor) -> Tensor:
    """`energy` itself.

    Raises:
        ArgumentError: it is no tensor, or not real floating point.
        ShapeError: it is not [B] for `x` [B, *event].
    """
    if not isinstance(energy, Tensor):
        raise ArgumentError(f"the energy is {type(energy).__name__}: return a tensor [B]")
    if not energy.is_floating_point():
        raise ArgumentError(f"the energy is {energy.dtype}: return real floating-point numbers")
    if energy.shape != x.shape[:1]:
        raise ShapeError(
            f"the energy returned shape {tuple(energy.shape)} for x of shape {tuple(x.shape)}: "
            "return one energy per sample, [B]"
        )
    return energy


def scale_of_data(std: float, dimension: int) -> float:
    """About the noise level sigma/alpha at which the modes of data part: 0.55 std D^0.4.

    Modes of data of that standard deviation per coordinate lie some std D^(1/2) apart, and noise
    hides them when it is a fraction of that. Factor and exponent are fitted to mixtures of 1 to
    128 dimensions and standard deviations of 0.2 to 3.

    Args:
        std: root of the mean variance of a coordinate, > 0.
        dimension: D >= 1.
    """
    return float(0.55 * std * dimension**0.4)


class Model(ABC):
    """A score model: callable as `score(x, t, **cond)`, readable as any prediction.

    Attributes:
        sde: the process whose time the model lives in; None if it is at home in any.
        data_scale: noise level sigma/alpha where the modes of the data part, as `scale_of_data`
            estimates it; None if it is not known. The default solver reads it.
    """

    sde: SDE | None
    data_scale: float | None = None

    @abstractmethod
    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        """The named prediction at state `x` [B, *event] and time `t` [] or [B], shape of `x`."""

    def __call__(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        return self.predict("score", x, t, **cond)

    def bind(self, prediction: str) -> tuple[str, Callable[..., Tensor]]:
        """The cheapest function to get `prediction` from: its own prediction's name and it."""
        return prediction, partial(self.predict, prediction)

    def on(self, sde: SDE) -> Model:
        """This model as a model of another Gaussian process, matched at equal log-SNR.

        Raises:
            ArgumentError: the model has a process of its own, and one of the two is not Gaussian.
        """
        if self.sde == sde:
            return self
        if self.sde is None:
            bound = copy.copy(self)
            bound.sde = sde
            return bound
        if not isinstance(self.sde, GaussianSDE) or not isinstance(sde, GaussianSDE):
            raise ArgumentError(
                f"a model of {self.sde} cannot be used with {sde}: only Gaussian processes "
                "can be matched by their log-SNR"
            )
        return _TransportedModel(self, sde)


class NetworkModel(Model):
    """A network together with what it predicts.

    Args:
        net: callable `net(x, t, **cond)` returning the prediction, shape of `x`; its attribute
            `data_scale`, if it has one, becomes the model's.
        sde: its process; None for a plain score that is at home in any process.
        prediction: one of `PREDICTIONS`.
        time_dtype: of the times that the network gets, floating; if omitted that of its
            parameters or float32, whichever is wider, as bfloat16 has not the digits for times.

    Raises:
        ArgumentError: a prediction other than the score for a process that is not Gaussian, or
            `time_dtype` is not floating.
        UnknownNameError: `prediction` is not in `PREDICTIONS`.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: SDE | None,
        prediction: str,
        time_dtype: torch.dtype | None = None,
    ) -> None:
        known_name("prediction", prediction, PREDICTIONS)
        if not callable(net):
            raise ArgumentError(f"the network is {type(net).__name__}: give a callable net(x, t)")
        if isinstance(net, type):
            raise ArgumentError(
                f"the network is the class {net.__name__} itself: give an instance of it"
            )
        if prediction != "score" and not isinstance(sde, GaussianSDE):
            raise ArgumentError(
                f"{prediction!r} is defined for Gaussian processes only, not for {sde}: "
                "give the score"
            )
        floating = isinstance(time_dtype, torch.dtype) and time_dtype.is_floating_point
        if time_dtype is not None and not floating:
            raise ArgumentError(f"time_dtype = {short(time_dtype)}: give a floating-point dtype")
        self.net, self.sde, self.prediction = net, sde, prediction
        self.time_dtype = time_dtype
        self.data_scale = getattr(net, "data_scale", None)
        self._writes: bool | None = None  # into its arguments; None before the first call
        self._writes_cond = False

    def native(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        """The network's own prediction at `x` [B, *event] and `t` [] or [B], in `x`'s dtype.

        An `nn.Module` is called in the dtype of its parameters, with times of at least float32.
        """
        parameter = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        state = x
        if parameter is not None and parameter.dtype != x.dtype:
            state = x.to(parameter.dtype)
            if isinstance(t, Tensor) and t.is_floating_point() and parameter.is_floating_point():
                t = t.to(torch.promote_types(parameter.dtype, torch.float32))
        prediction = self.asked(state, t, **cond)
        check_output(prediction, x)
        result: Tensor = prediction.to(x.dtype)
        return result

    def asked(self, x: Tensor, t: TimeLike, **cond: Any) -> Any:
        """What the network returns; whatever it does to its arguments, they stay the same.

        Of an object that is no tensor, the prediction that it holds as its `.sample`.

        The first call gets copies and tells whether the network writes into them; one that does
        gets copies ever after.

        Raises:
            ArgumentError: a network wrote into its arguments that did not at its first call, or
                its first call meets another dtype than that of its parameters, or fails where a
                condition has other rows than the batch.
        """
        if self.time_dtype is not None and isinstance(t, Tensor) and t.is_floating_point():
            t = t.to(self.time_dtype)
        if torch.compiler.is_compiling():  # copies that nobody writes into cost nothing there
            copied = t.clone() if isinstance(t, Tensor) else t
            return _prediction(self.net(x.clone(), copied, **cond))
        try:
            if self._writes is False:
                if x.is_inference():
                    return _prediction(self.net(x, t, **cond))
                arguments = (x, t, *tree_leaves(cond)) if cond else (x, t)
                watched = [a for a in arguments if isinstance(a, Tensor) and not a.is_inference()]
                seen = [each._version for each in watched]
                out: Any = self.net(x, t, **cond)
                if seen != [each._version for each in watched]:
                    raise ArgumentError(
                        "the network wrote into its input in place, which it did not do at its "
                        "first call: the state is lost; let it work on a copy, as in "
                        "`lambda x, t: net(x.clone(), t)`"
                    )
                return _prediction(out)
            return _prediction(self._asked_with_copies(x, t, cond))
        except ScoresolveError:
            raise
        except Exception as error:
            if self._writes is None and isinstance(error, RuntimeError) and _of_dtypes(error):
                raise ArgumentError(
                    f"the network cannot take x in {x.dtype} ({error}): give the nn.Module itself, "
                    "whose dtype is then followed, or states in its dtype"
                ) from error
            misfit = isinstance(error, RuntimeError | ValueError | IndexError)
            strange = _of_other_rows(cond, len(x)) if misfit and self._writes is None else ""
            if strange:
                raise ArgumentError(
                    f"the network failed at its first call, with {strange} for a batch of "
                    f"{len(x)} ({error}): give one row for each sample, or one for all"
                ) from error
            _note(error, x, t)
            raise

    def _asked_with_copies(self, x: Tensor, t: TimeLike, cond: dict[str, Any]) -> Any:
        first = self._writes is None
        given, time = x.clone(), _copy(t)
        told = tree_map(_copy, cond) if cond and (first or self._writes_cond) else cond
        if not first:
            return self.net(given, time, **told)
        before, after = ([*tree_leaves(c)] for c in (cond, told))
        seen = [_version(copied) for copied in (given, time, *after)]
        out = self.net(given, time, **told)
        # .data, NumPy and inference mode leave the version as it is
        wrote = [
            _version(copied) != version or not _same(copied, kept)
            for copied, kept, version in zip(
                (given, time, *after), (x, t, *before), seen, strict=True
            )
        ]
        self._writes, self._writes_cond = any(wrote), any(wrote[2:])
        if self._writes:
            warnings.warn(
                "the network writes into its input in place, as nn.ReLU(inplace=True) does as "
                "a first layer: every call is given a copy",
                ModelWarning,
                stacklevel=2,
            )
        return out

    def bind(self, prediction: str) -> tuple[str, Callable[..., Tensor]]:
        plain = type(self) is NetworkModel and not isinstance(self.net, nn.Module)
        return self.prediction, self.asked if plain else self.native

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        known_name("prediction", prediction, PREDICTIONS)
        m = self.native(x, t, **cond)
        if prediction == self.prediction:
            return m
        if isinstance(self.sde, GaussianSDE):
            time = as_time(t, x)
            u, w = conversion(self.prediction, prediction, self.sde.point(time))
            return combine(u, x, w, m, time)
        if prediction == "flow" and self.sde is not None:
            return self.sde.probability_flow_drift(x, t, lambda *_: m)
        raise ArgumentError(f"{prediction!r} needs a Gaussian process, got {self.sde}")


def _prediction(out: Any) -> Any:
    """The tensor in what a network returns, as diffusers' outputs hold it."""
    return out if isinstance(out, Tensor) else getattr(out, "sample", out)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _version(value: object) -> int:
    """How often a tensor was written to, where that is counted."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _same(a: object, b: object) -> bool:
    """Whether a copy still has the values that it was made of; what is no tensor was not copied."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.device.type == "meta":
        return True
    if is_transformed(a):
        return True  # whose values cannot be asked for
    return bool(((a == b) | b.isnan()).all())


def _of_dtypes(error: RuntimeError) -> bool:
    """Whether torch complains of two dtypes that do not go together."""
    text = str(error)
    return any(words in text for words in ("same dtype", "scalar type", "Input type"))


def _of_other_rows(cond: dict[str, Any], batch: int) -> str:
    """The conditions whose rows are neither those of the batch nor a single one, in words."""
    found = []
    for name, value in cond.items():
        rows = {len(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim}
        found += [f"{name}= of {count} rows" for count in sorted(rows - {1, batch})]
    return ", ".join(found)


def _note(error: Exception, x: Tensor, t: TimeLike) -> None:
    """Say in the traceback of a network's own exception where it happened."""
    times = torch.as_tensor(t).detach().flatten()
    if times.device.type == "meta" or not times.numel():
        where = "a time that has no value"
    else:
        low, high = float(times.min()), float(times.max())
        where = f"t = {low:g}" if low == high else f"times from {low:g} to {high:g}"
    error.add_note(f"raised by the network at {where}, for x of shape {tuple(x.shape)}")


class EnergyModel(NetworkModel):
    """A model given by its energy: score = -grad_x energy(x, t).

    Args:
        energy: callable `energy(x, t, **cond)` returning [B], differentiable in `x`;
            p_t(x) is proportional to exp(-energy).
    """

    def __init__(self, energy: Callable[..., Tensor]) -> None:
        super().__init__(energy, None, "score")
        self.energy = energy

    def native(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        return self.log_prob_and_score(x, t, **cond)[1]

    def log_prob_and_score(self, x: Tensor, t: TimeLike, **cond: Any) -> tuple[Tensor, Tensor]:
        """-energy [B] and its gradient, shape of `x` [B, *event], by one call of the energy."""
        keep_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():
                x = x.clone()
            if isinstance(t, Tensor) and t.is_inference():
                t = t.clone()
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            # a copy that is no leaf, into which the energy may write
            energy = check_energy(self.energy(leaf.clone(), t, **cond), x)
            if not energy.requires_grad:
                raise ArgumentError(
                    "the energy has no gradient in x: compute it from x by differentiable "
                    "operations"
                )
            (gradient,) = torch.autograd.grad(
                energy.sum(), leaf, create_graph=keep_graph, materialize_grads=True
            )
        return -(energy if keep_graph else energy.detach()), -gradient


class _TimestepModel(NetworkModel):
    """A network of integer timesteps, one below the time of its `DiscreteVP`."""

    def __init__(
        self,
        net: Callable[..., Any],
        sde: DiscreteVP,
        prediction: str,
        quantize: bool,
        time_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(net, sde, prediction, time_dtype)
        self.quantize, self.last = yes_or_no("quantize", quantize), int(sde.T) - 1

    def native(self, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        timestep = (as_time(t, x) - 1).expand(x.shape[0])
        if self.quantize:
            timestep = timestep.round().long().clamp(0, self.last)
        return super().native(x, timestep, **cond)


class _TransportedModel(Model):
    """`model` read in the time and scale of another process `sde` with the same log-SNR."""

    def __init__(self, model: Model, sde: GaussianSDE) -> None:
        self.model, self.sde = model, sde
        self.data_scale = model.data_scale

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: Any) -> Tensor:
        home, sde = self.model.sde, self.sde
        assert isinstance(home, GaussianSDE) and isinstance(sde, GaussianSDE)
        time = as_time(t, x)
        home_time = home.time_from_log_snr(sde.log_snr(time)).clamp(0, home.T)
        here, there = sde.point(time), home.point(home_time)
        # alpha_home/alpha, written so that it stays finite where alpha vanishes
        scale = ((there.alpha**2 + there.sigma**2) / (here.alpha**2 + here.sigma**2)) ** 0.5
        source, function = self.model.bind(prediction)
        x_home = expand(scale, x, time) * x
        m = function(x_home, home_time.to(time.dtype), **cond)
        check_output(m, x)
        u, w = conversion(source, prediction, there, here)
        return combine(u, x_home, w, m, time)


def as_model(score: Model | Callable[..., Tensor], sde: SDE) -> Model:
    """Any score callable as a `Model` of `sde`; a model of another Gaussian process is matched."""
    if isinstance(score, Model):
        return score.on(sde)
    if not callable(score):
        raise ArgumentError(f"score is {type(score).__name__}: give a callable score(x, t)")
    if isinstance(score, type):
        raise ArgumentError(f"score is the class {score.__name__} itself: give an instance of it")
    return NetworkModel(score, sde, "score")


def from_eps(
    net: Callable[..., Tensor], sde: GaussianSDE, *, time_dtype: torch.dtype | None = None
) -> Model:
    """A network that predicts the noise: net(x_t, t) = E[eps | x_t].

    Args:
        net: callable `net(x, t, **cond)`, shape of `x`; `t` is the time of `sde`.
        sde: the process it was trained on.
        time_dtype: see `NetworkModel`.

    Source:
        Ho et al. 2020 (2006.11239), eq. 14.
    """
    return NetworkModel(net, sde, "eps", time_dtype)


def from_x0(
    net: Callable[..., Tensor], sde: GaussianSDE, *, time_dtype: torch.dtype | None = None
) -> Model:
    """A network that predicts the clean data: net(x_t, t) = E[x_0 | x_t].

    Args:
        net: callable `net(x, t, **cond)`, shape of `x`; `t` is the time of `sde`.
        sde: the process it was trained on.
        time_dtype: see `NetworkModel`.
    """
    return NetworkModel(net, sde, "x0", time_dtype)


def from_v(
    net: Callable[..., Tensor], sde: GaussianSDE, *, time_dtype: torch.dtype | None = None
) -> Model:
    """A network that predicts v = alpha eps - sigma x_0.

    Args:
        net: callable `net(x, t, **cond)`, shape of `x`; `t` is the time of `sde`.
        sde: the process it was trained on.
        time_dtype: see `NetworkModel`.

    Source:
        Salimans and Ho 2022 (2202.00512), section 4 and appendix D.
    """
    return NetworkModel(net, sde, "v", time_dtype)


def from_flow(
    net: Callable[..., Tensor], sde: GaussianSDE, *, time_dtype: torch.dtype | None = None
) -> Model:
    """A network that predicts the velocity dx_t/dt = alpha' x_0 + sigma' eps.

    Time runs from data (0) to noise; a network of the opposite convention is
    `lambda x, t: -net(x, 1 - t)`.

    Args:
        net: callable `net(x, t, **cond)`, shape of `x`; `t` is the time of `sde`.
        sde: the process it was trained on, usually `RectifiedFlow()`.
        time_dtype: see `NetworkModel`.

    Source:
        Lipman et al. 2022 (2210.02747), section 4.
    """
    return NetworkModel(net, sde, "flow", time_dtype)


def from_denoiser(
    net: Callable[..., Tensor], sde: EDM | None = None, *, time_dtype: torch.dtype | None = None
) -> Model:
    """A denoiser D(x_0 + sigma eps, sigma) = E[x_0 | x] of EDM or k-diffusion.

    It lives in the process `EDM`, whose time is sigma; with another process the verbs match
    it by log-SNR.

    Args:
        net: callable `net(x, sigma, **cond)`, shape of `x`.
        sde: the range of sigma it was trained on; `EDM()` if omitted.
        time_dtype: see `NetworkModel`.

    Source:
        Karras et al. 2022 (2206.00364), eq. 2-3.
    """
    return NetworkModel(net, EDM() if sde is None else sde, "x0", time_dtype)


def from_energy(energy: Callable[..., Tensor]) -> EnergyModel:
    """The score -grad_x energy(x, t) of p_t proportional to exp(-energy).

    Args:
        energy: callable `energy(x, t, **cond)` returning [B], differentiable in `x`.
    """
    return EnergyModel(energy)


def from_discrete(
    net: Callable[..., object],
    alphas_cumprod: Sequence[float] | Tensor,
    prediction: str = "eps",
    quantize: bool = False,
    *,
    time_dtype: torch.dtype | None = None,
) -> Model:
    """A network with integer timesteps 0..N-1, as a model of `DiscreteVP(alphas_cumprod)`.

    Args:
        net: callable `net(x, timestep, **cond)` returning a tensor of the shape of `x`, or an
            object that holds it as `.sample`; `timestep` is [B], one below the process's time.
        alphas_cumprod: [N], decreasing in (0, 1); the last may be 0.
        prediction: what the network predicts, one of `PREDICTIONS`.
        quantize: round timesteps to the nearest integer and pass int64; otherwise a time
            between two integers is passed as it is.
        time_dtype: of timesteps that are not rounded, see `NetworkModel`.

    Source:
        Ho et al. 2020 (2006.11239), section 2.
    """
    return _TimestepModel(net, DiscreteVP(alphas_cumprod), prediction, quantize, time_dtype)
