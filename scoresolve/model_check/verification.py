"""How far is a network from a score field? Four quantities, each at several noise levels.

A network is the score of noised data if, and only if, its denoiser x0_hat is E[x0 | x_t]. That
shows in what the data say of it and in what it says of itself:

    denoising       E|x0_hat - x0|^2 is the least possible; the error has no part along eps_hat
    calibration     Cov[x0 | x_t] = (sigma^2/alpha) d x0_hat/dx predicts the size of the errors
    Fokker-Planck   x0_hat at one noise level follows from that at another
    curl            the Jacobian is symmetric

The first two hold for this data alone, the last two for the scores of any data: a network that
fails these has no density, and a network that passes them and fails those has another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresolve.conditions import split_cond
from scoresolve.driving import check_call, warn_of_dropout
from scoresolve.errors import (
    ArgumentError,
    ShapeError,
    check_output,
    check_transforms,
    known_name,
    real_number,
    short,
    whole_number,
)
from scoresolve.model_check.derivatives import (
    Denoised,
    Level,
    check_differentiable,
    fokker_planck_residual,
    jacobian_parts,
)
from scoresolve.model_check.filters import LinearFilter
from scoresolve.model_check.result import Estimate, Finding, ModelVerification, NoiseLevel
from scoresolve.models import Model, as_model
from scoresolve.noise import Philox, Purpose
from scoresolve.precision import doubled, host
from scoresolve.sde import GaussianSDE
from scoresolve.targets import GaussianMixture

__all__ = ["LEVELS", "LIMITS", "QUANTITIES", "verify_model"]

QUANTITIES = ("denoising", "calibration", "fokker_planck", "curl")

LIMITS = {
    "linear": 0.05,
    "exact": 0.05,
    "correlation": 0.1,
    "calibration": 0.2,
    "negative": 0.01,
    "fokker_planck": 0.1,
    "curl": 0.1,
}
"""What a measure may be off beyond three standard errors: ratios of errors above 1, the logarithm
of the calibration and everything else from 0."""

LEVELS = (6.0, -4.0)
"""Ends of the range of levels, log(alpha^2 v / sigma^2) for data of variance v per element."""

_MEASURES = {
    "denoising": ("linear", "exact", "correlation"),
    "calibration": ("calibration", "negative"),
    "fokker_planck": ("fokker_planck",),
    "curl": ("curl",),
}
_EXACT = 16  # up to so many dimensions all basis vectors are cheaper than enough probes
_DIRECTIONS = 8  # random directions per point where the whole Jacobian is known
_PROBES, _POINTS, _EXACT_POINTS = 8, 32, 256  # pairs of probes average better than points
_FEW = 2  # and where it is not asked for
_RESOLVED = 1e-5  # of sigma^2/alpha^2: below it a posterior variance is rounding
_FEWEST = 16


def verify_model(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    data: Tensor,
    *,
    law: GaussianMixture | None = None,
    quantities: Collection[str] = QUANTITIES,
    levels: int | Sequence[float] = 8,
    points: int | None = None,
    probes: int | None = None,
    chunk: int = 128,
    seed: int = 0,
    **cond: Any,
) -> ModelVerification:
    """Measure how far a network is from the score of noised data, level by level.

    The data should be held out: on its own training data a network that has learned them by heart
    denoises well.

    Args:
        score: a model made by `from_eps`, `from_x0`, ... or a plain `score(x, t)`, differentiable
            twice in x and once in t. Denoising alone needs no derivatives.
        sde: the process it is to be used with; a model of another Gaussian process is asked at the
            same log-SNR.
        data: clean data points, [N, *event], N >= 16, as the network takes them; in their dtype
            the residuals are computed.
        law: the law of the data, if it is known; errors are then held against those of the exact
            posterior mean.
        quantities: names of `QUANTITIES` to measure.
        levels: how many noise levels, evenly spaced in log-SNR between `LEVELS`, or their log-SNRs.
        points: data points, the first ones, at which all derivatives are taken, >= 2; the others
            serve denoising and, along two random directions each, calibration. If omitted, 32; or
            256 where divergence and Jacobian are exact.
        probes: random vectors per point and level for divergence and Jacobian, >= 2. If omitted, 8;
            or all D basis vectors, so that both are exact, for D <= 16 event elements. `probes`
            >= D takes the basis too.
        chunk: points given to the network at a time.
        seed: of noise and probes; point i gets the same whatever N and `chunk`.
        **cond: passed on to the network; a tensor whose first axis is N is split with the data.

    Returns:
        A `ModelVerification`; `print` shows it, `.ok` is the verdict at `LIMITS`.

    Raises:
        ArgumentError: the process is not Gaussian, the data are not float32 or float64, not finite,
            too few or all the same; or the network has no derivatives and more than denoising is
            asked.
        ShapeError: `law` is over other events than the data.
        UnknownNameError: a quantity is unknown.

    Source:
        Lai et al. 2023 (2210.04296), for the Fokker-Planck residual of a score; Meng et al. 2021
        (2111.04726), for the posterior covariance; Salimans and Ho 2021, "Should EBMs model the
        energy or the score?", for the asymmetry of the Jacobian.
    """
    check_transforms("verify_model")
    if isinstance(quantities, str | Tensor) or not isinstance(quantities, Iterable):
        raise ArgumentError(f"quantities = {short(quantities)}: give a sequence of names")
    wanted = [known_name("quantity", name, QUANTITIES) for name in quantities]
    if not wanted:
        raise ArgumentError(f"quantities is empty: name some of {', '.join(QUANTITIES)}")
    _check(sde, data, law)
    if cond:
        check_call(score, cond, verify_model)
    model = as_model(score, sde)  # refuses what cannot serve this process
    # in y = x/alpha and sigma/alpha all Gaussian processes are one, so a model is asked in its own
    if isinstance(score, Model) and isinstance(score.sde, GaussianSDE):
        model = score
    warn_of_dropout(score)
    size = math.prod(data.shape[1:])
    exact = size <= _EXACT if probes is None else whole_number("probes", probes, 2) >= size
    usual = _EXACT_POINTS if exact else _POINTS
    count = usual if points is None else whole_number("points", points, 2)
    run = _Run(
        model,
        sde,
        data,
        law,
        tuple(name for name in QUANTITIES if name in wanted),
        min(count, len(data)) if {*wanted} != {"denoising"} else 0,
        None if exact else probes or _PROBES,
        whole_number("chunk", chunk),
        seed,
        cond,
    )
    log_snrs = _log_snrs(levels, sde, run.home, data)
    rows = tuple(run.told(i, log_snr) for i, log_snr in enumerate(log_snrs))
    return ModelVerification(
        process=repr(sde),
        points=len(data),
        derivative_points=run.points,
        probes=run.probes,
        levels=rows,
        findings=tuple(_finding(name, rows) for name in run.quantities),
        evaluations=run.evaluations,
        products=run.products,
    )


def _check(sde: GaussianSDE, data: Tensor, law: GaussianMixture | None) -> None:
    if not isinstance(sde, GaussianSDE):
        raise ArgumentError(f"{sde} is not Gaussian: there is no denoiser to verify")
    if not isinstance(data, Tensor):
        raise ArgumentError(f"data is {type(data).__name__}: give a tensor [N, *event]")
    if not data.is_floating_point() or data.ndim < 2:
        raise ArgumentError(
            f"data is {data.dtype} of shape {tuple(data.shape)}: give floating-point data points, "
            "[N, *event]; integer levels are spread over their bins first"
        )
    if torch.finfo(data.dtype).eps > torch.finfo(torch.float32).eps:
        raise ArgumentError(
            f"data is {data.dtype}, in which errors and derivatives are rounding: give float32; a "
            "network of lower precision is called in its own"
        )
    if len(data) < _FEWEST:
        raise ArgumentError(
            f"{len(data)} data points tell too little: give {_FEWEST} or more, better some hundreds"
        )
    if not bool(torch.isfinite(data).all()) or not bool(data.var(0).any()):
        raise ArgumentError(
            "the data are not finite, or are one point: there is nothing to denoise"
        )
    if law is not None and not isinstance(law, GaussianMixture):
        raise ArgumentError(f"law is {type(law).__name__}: give a GaussianMixture")
    if law is not None and law.event_shape != data.shape[1:]:
        raise ShapeError(
            f"law is over events {tuple(law.event_shape)}, the data over {tuple(data.shape[1:])}"
        )


def _log_snrs(
    levels: int | Sequence[float], sde: GaussianSDE, home: GaussianSDE, data: Tensor
) -> list[float]:
    """Log-SNRs from little noise to much, cut to what the process and the model's own reach."""
    if isinstance(levels, Sequence):
        wanted = host([real_number("levels", level) for level in levels])
    else:
        variance = float(doubled(data).var(0, correction=0).mean())
        wanted = torch.linspace(
            *LEVELS, whole_number("levels", levels, 1, 1000), dtype=torch.float64, device="cpu"
        )
        wanted -= math.log(variance)
    if not len(wanted):
        raise ArgumentError("levels is empty: give at least one log-SNR")
    for process in (sde, home):
        times = process.time_from_log_snr(wanted).clamp(process.t_min, process.T)
        wanted = process.log_snr(times)
    found = {value for value in wanted.tolist() if math.isfinite(value)}
    if not found:
        raise ArgumentError(f"no log-SNR of {sde} at these levels is finite: give others")
    return sorted(found, reverse=True)


class _Run:
    """One verification: what it measures with, and the count of its work."""

    def __init__(
        self,
        model: Model,
        sde: GaussianSDE,
        data: Tensor,
        law: GaussianMixture | None,
        quantities: tuple[str, ...],
        points: int,
        probes: int | None,
        chunk: int,
        seed: int,
        cond: dict[str, Any],
    ) -> None:
        assert isinstance(model.sde, GaussianSDE)
        self.home = model.sde
        self.model, self.sde, self.data, self.law = model, sde, data.detach(), law
        self.quantities, self.points, self.probes, self.chunk = quantities, points, probes, chunk
        self.noise, self.cond = Philox(seed), cond
        self.linear = LinearFilter(self.data)
        self.evaluations = self.products = 0

    def told(self, index: int, log_snr: float) -> NoiseLevel:
        """`measure`; what the network raises gets a note of where."""
        try:
            return self.measure(index, log_snr)
        except Exception as error:
            shape, dtype = tuple(self.data.shape[1:]), self.data.dtype
            error.add_note(
                f"verify_model was at log-SNR {log_snr:.2f}, level {index + 1}, with points of "
                f"shape {shape} in {dtype}, at most {self.chunk} at a time"
            )
            raise

    def measure(self, index: int, log_snr: float) -> NoiseLevel:
        """Everything at one level, whose noise is draw `index`."""
        at_home = self.home.time_from_log_snr(host(log_snr))
        level = Level.at(self.home, float(at_home.clamp(self.home.t_min, self.home.T)))
        y = self.data + level.k * self.noise.normal(self.data, index, Purpose.OBJECTIVE)
        if index == 0 and self.points:
            self._check_differentiable(level, level.alpha * y[:2])
        x0, parts = [], []
        for rows in self._chunks():
            cond = split_cond(self.cond, rows, len(y))
            x = level.alpha * y[rows]
            self.evaluations += len(x)
            if rows.start < self.points or "calibration" in self.quantities:
                denoised = Denoised(self.model, x, level, cond)
                x0.append(denoised.x0.detach())
                parts.append(self._derivatives(denoised, rows, index))
            else:
                x0.append(_predict(self.model, x, level, cond))
        error = torch.cat(x0) - self.data
        found: dict[str, Estimate] = {}
        if "denoising" in self.quantities:
            found |= self._denoising(error, y, level)
        if parts:
            found |= self._derived(
                {name: torch.cat([p[name] for p in parts if name in p]) for name in parts[0]}, error
            )
        t = float(self.sde.time_from_log_snr(host(log_snr)))
        return NoiseLevel(log_snr=log_snr, t=t, **found)

    def _chunks(self) -> list[slice]:
        """Rows for one call each: first those at which derivatives are taken, then the rest."""
        ends = (0, self.points), (self.points, len(self.data))
        return [
            slice(first, min(first + self.chunk, end))
            for start, end in ends
            for first in range(start, end, self.chunk)
        ]

    def _check_differentiable(self, level: Level, x: Tensor) -> None:
        noisier = self.home.time_from_log_snr(-2 * math.log(level.k) - 1.0)
        self.evaluations += check_differentiable(
            self.model,
            x,
            (level.t, float(noisier)),
            split_cond(self.cond, slice(0, len(x)), len(self.data)),
            "fokker_planck" in self.quantities,
        )

    def _denoising(self, error: Tensor, y: Tensor, level: Level) -> dict[str, Estimate]:
        wide = doubled(error).flatten(1)
        square = wide.square().sum(1)
        predicted = doubled(y - self.data - error).flatten(1)  # k eps_hat
        found = {
            "linear": _ratio(square, self.linear.errors(self.data, y, level.k)),
            "correlation": _correlation(wide, predicted),
        }
        if self.law is not None:
            exact = self.law.score_model(self.home)
            x0 = _predict(exact, level.alpha * y, level, {})
            least = doubled(x0 - self.data).flatten(1).square().sum(1)
            excess = doubled(self.data + error - x0).flatten(1).square().sum(1)
            ratio = _ratio(excess, least)
            found["exact"] = Estimate(1 + ratio.value, ratio.standard_error)
        return found

    def _derivatives(self, denoised: Denoised, rows: slice, index: int) -> dict[str, Tensor]:
        """What the derivatives at some points are made into, a number per point for each name."""
        x, found = denoised.x.detach(), {}
        if rows.start >= self.points:
            directions = self._directions(x, rows, index, _FEW)
            pulled = torch.stack([denoised.pull_back(v) for v in directions])
            self.products += _FEW * len(x)
            return self._calibration(denoised, rows, directions, pulled)
        exact = self.probes is None
        vectors = _basis(x) if exact else self._directions(x, rows, index, self.probes or 0)
        self.products += len(vectors) * len(x)
        if "fokker_planck" in self.quantities:
            found["residual"], products = fokker_planck_residual(denoised, vectors, exact)
            self.products += (len(vectors) + 3) * len(x)
        else:
            products = torch.stack([denoised.pull_back(v) for v in vectors])
        if "curl" in self.quantities:
            found["curl"], found["whole"] = jacobian_parts(products, vectors, exact)
        if "calibration" in self.quantities:
            directions, pulled = vectors, products
            if exact:  # J^T v of any v is known
                directions = self._directions(x, rows, index, _DIRECTIONS)
                whole = products.flatten(2)
                pulled = torch.einsum("dni,inj->dnj", directions.flatten(2), whole)
            found |= self._calibration(denoised, rows, directions, pulled)
        return {name: doubled(value) for name, value in found.items()}

    def _directions(self, x: Tensor, rows: slice, index: int, count: int) -> Tensor:
        """Random vectors of covariance I, [count, n, *event]: normal in few dimensions, else signs,
        whose divergences vary less.
        """
        noise = self.noise.rows(rows)
        draw = noise.normal if self.probes is None else noise.signs
        first = index * (_DIRECTIONS if self.probes is None else self.probes)
        return torch.stack([draw(x, first + j, Purpose.PROBE) for j in range(count)])

    def _calibration(
        self, denoised: Denoised, rows: slice, directions: Tensor, pulled: Tensor
    ) -> dict[str, Tensor]:
        """Means over directions v, [n] each, from J^T v."""
        level, v = denoised.level, directions.flatten(2)
        error = (denoised.x0.detach() - self.data[rows]).flatten(1)
        variance = level.sigma**2 / level.alpha * (pulled.flatten(2) * v).sum(2)
        floor = _RESOLVED * level.k**2 * v.square().sum(2)
        resolved = variance > floor
        square = torch.where(resolved, (v * error).sum(2).square() / variance, 0.0)
        found = {"square": square, "resolved": resolved, "negative": variance < -floor}
        return {name: doubled(value).mean(0) for name, value in found.items()}

    def _derived(self, columns: dict[str, Tensor], error: Tensor) -> dict[str, Estimate]:
        found = {}
        if "residual" in columns:
            square = doubled(error[: self.points]).flatten(1).square().sum(1)
            found["fokker_planck"] = _root(_ratio(columns["residual"], square))
        if "curl" in columns:
            found["curl"] = _root(_ratio(columns["curl"], columns["whole"]))
        if "negative" in columns:
            found["calibration"] = _ratio(columns["square"], columns["resolved"])
            found["negative"] = _ratio(columns["negative"], torch.ones_like(columns["negative"]))
        return found


def _basis(x: Tensor) -> Tensor:
    """The basis vectors of one event for every row of `x` [n, *event], [D, n, *event]."""
    size = x[0].numel()
    basis = torch.eye(size, dtype=x.dtype, device=x.device)
    return basis[:, None].expand(size, len(x), size).reshape(size, *x.shape)


@torch.no_grad()
def _predict(model: Model, x: Tensor, level: Level, cond: dict[str, Any]) -> Tensor:
    t = torch.full((len(x),), level.t, dtype=x.dtype, device=x.device)
    x0 = model.predict("x0", x.clone(), t, **cond)
    check_output(x0, x)
    return x0


def _ratio(numerator: Tensor, denominator: Tensor) -> Estimate:
    """sum a / sum b over points and its standard error to first order."""
    total = float(denominator.sum())
    if not total > 0:
        return Estimate(math.nan, math.nan)
    value = float(numerator.sum()) / total
    return Estimate(value, _spread(numerator - value * denominator) / total)


def _correlation(a: Tensor, b: Tensor) -> Estimate:
    """sum a.b / sqrt(sum |a|^2 sum |b|^2) for rows [n, D], and its standard error."""
    both, first, second = (a * b).sum(1), a.square().sum(1), b.square().sum(1)
    norm = math.sqrt(float(first.sum()) * float(second.sum()))
    if not norm > 0:
        return Estimate(math.nan, math.nan)
    value = float(both.sum()) / norm
    shares = first / first.sum() + second / second.sum()
    return Estimate(value, _spread(both / norm - value / 2 * shares))


def _root(square: Estimate) -> Estimate:
    """The square root, 0 of what chance made negative, and how far one standard error moves it."""
    value = math.sqrt(square.value) if not square.value < 0 else 0.0
    return Estimate(value, math.sqrt(value**2 + square.standard_error) - value, rooted=True)


def _spread(influence: Tensor) -> float:
    """Standard error of a sum whose parts are independent and of mean 0, [n]."""
    count = len(influence)
    return float(influence.square().sum().mul(count / (count - 1)).sqrt())


def _off(measure: str, low: float, high: float) -> float:
    """How far what lies between two bounds must be from the value of a score, over its limit."""
    if measure == "calibration":
        low, high = (math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
    elif measure in ("linear", "exact"):
        low, high = low - 1, math.inf
    return max(low, -high) / LIMITS[measure]


def _finding(quantity: str, rows: tuple[NoiseLevel, ...]) -> Finding:
    found = []
    for row in rows:
        for measure in _MEASURES[quantity]:
            estimate = getattr(row, measure)
            if estimate is not None:
                excess = _off(measure, *estimate.bounds())
                # what is not a number is off by all there is
                excess = math.inf if math.isnan(excess) else max(excess, 0.0)
                found.append((excess, _off(measure, *estimate.bounds(0)), measure, row))
    # a number that is beyond its limit says more than one that does not exist
    excess, _, measure, row = max(found, key=lambda each: (1 < each[0] < math.inf, *each[:2]))
    text = _TEXTS[measure][excess > 1].replace("*", str(getattr(row, measure)))
    return Finding(
        quantity=quantity,
        ok=all(each[0] <= 1 for each in found),
        log_snr=row.log_snr,
        excess=max(each[0] for each in found),
        verdict=f"{_NAMES[quantity]}: {text} at log-SNR {row.log_snr:.2f}",
    )


_NAMES = {
    "denoising": "denoising",
    "calibration": "calibration",
    "fokker_planck": "Fokker-Planck",
    "curl": "curl",
}
_TEXTS = {
    "linear": (
        "the error is at most * of a linear filter's",
        "worse than a linear filter: the error is * of that one's",
    ),
    "exact": (
        "the error is at most * of the least possible",
        "the error is * of the least possible",
    ),
    "correlation": (
        "no part of the error is along eps_hat: correlation at worst *",
        "part of the error is along eps_hat, so it is scaled wrongly: correlation *",
    ),
    "calibration": (
        "errors are as large as the posterior covariance says: variance ratio at worst *",
        "errors are not as large as the posterior covariance says: variance ratio *",
    ),
    "negative": (
        "at most * of the posterior variances are negative",
        "* of the posterior variances are negative",
    ),
    "fokker_planck": (
        "levels follow from one another: residual at most * of the error",
        "levels do not follow from one another: residual * of the error",
    ),
    "curl": (
        "a gradient field: at most * of the Jacobian is antisymmetric",
        "no gradient field: * of the Jacobian is antisymmetric",
    ),
}
