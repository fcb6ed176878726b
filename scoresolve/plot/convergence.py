"""Errors of solvers against steps and calls, and where grids put their nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from scoresolve.certificates import MEAN, VARIANCE, Certificate, measured_order, shown
from scoresolve.errors import ArgumentError
from scoresolve.grid import make_grid
from scoresolve.metrics import Comparison
from scoresolve.plot.style import (
    COLOURS,
    FAINT,
    colour,
    label,
    label_ends,
    line,
    log_log,
    new_figure,
    on_host,
)
from scoresolve.sampling import plan
from scoresolve.sde import VP, GaussianSDE

__all__ = ["plot_certificate", "plot_grids", "plot_orders", "plot_strong_errors"]


@on_host
def plot_orders(
    solvers: Sequence[str] = ("ddim", "dpmpp_2m", "heun", "ab3_v", "ab4_v", "ddpm"),
    sde: GaussianSDE | None = None,
    steps: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
) -> Figure:
    """Error against steps on Gaussian data, from exact laws.

    The error is the 2-Wasserstein distance between the output law and the exact one, between the
    log-SNR levels -3 and 3 on the angle grid, where `certify` measures orders.

    Args:
        solvers: names of fixed-grid solvers with an exact law.
        sde: the process; `VP()` if omitted.
        steps: increasing numbers of steps, at least two.

    Returns:
        A figure with one line per solver, labelled with its measured order.

    Raises:
        UnknownNameError, ArgumentError: a solver is unknown, or its law is not exact.
    """
    process = sde or VP()
    ends = process.time_from_log_snr(torch.tensor([-3.0, 3.0], dtype=torch.float64)).tolist()
    grids = [make_grid("cosine", process, n, *ends) for n in steps]
    figure, (axes,) = new_figure(6.4, 4.0)
    log_log(axes, steps)
    ends_of = []
    for i, name in enumerate(solvers):
        plans = [plan(name, process, grid) for grid in grids]
        errors = [p.law(MEAN, VARIANCE, start="marginal").wasserstein for p in plans]
        order = measured_order(steps, errors)
        axes.plot(steps, errors, **line(i))
        text = "exact" if math.isinf(order) else f"order {order:.2f}"
        ends_of.append((errors[-1], f"{name}  {text}", colour(i)))
    axes.set_ylim(bottom=1e-13)
    label(axes, "steps", "2-Wasserstein error of the output law")
    label_ends(axes, ends_of)
    return figure


@on_host
def plot_certificate(certificate: Certificate) -> Figure:
    """Errors against steps by quantity, as `certify` measured them.

    Args:
        certificate: one with errors, so of a sampler with fixed steps and an exact law.

    Returns:
        A figure with one line per quantity, labelled with its measured order.

    Raises:
        ArgumentError: the certificate has no errors.
    """
    if not certificate.errors:
        raise ArgumentError(f"the certificate of {certificate.solver} has no errors to draw")
    figure, (axes,) = new_figure(5.6, 3.2)
    log_log(axes, certificate.steps)
    ends = []
    for i, (quantity, errors) in enumerate(certificate.errors.items()):
        seen = [max(e, 1e-16) if math.isfinite(e) else math.nan for e in errors]
        axes.plot(certificate.steps[: len(seen)], seen, **line(i))
        order = shown(certificate.orders[quantity])
        ends.append((seen[-1], f"{quantity}  {order}", colour(i)))
    label(axes, "steps", "error", certificate.solver)
    label_ends(axes, [end for end in ends if math.isfinite(end[0])])
    return figure


@on_host
def plot_grids(
    names: Sequence[str] = (
        "sqrt_angle",
        "cosine",
        "quadratic",
        "flow",
        "shift",
        "karras",
        "log_snr",
        "uniform",
        "beta",
    ),
    sde: GaussianSDE | None = None,
    steps: int = 12,
) -> Figure:
    """Where named grids put their nodes, on the axis of the noise level sigma/alpha.

    Args:
        names: names of `GRIDS` that fit the process.
        sde: the process; `VP()` if omitted.
        steps: steps of each grid, at least 1.

    Returns:
        A figure with one row of nodes per grid.

    Raises:
        UnknownNameError, ArgumentError: a grid is unknown, or does not fit the process.
    """
    process = sde or VP()
    figure, (axes,) = new_figure(6.4, 0.7 + 0.33 * len(names))
    for row, name in enumerate(names):
        times = torch.tensor(make_grid(name, process, steps).times, dtype=torch.float64)
        level = (-process.log_snr(times) / 2).exp().tolist()
        axes.plot(level, [row] * len(level), color=FAINT, linewidth=1.2, zorder=1)
        axes.scatter(level, [row] * len(level), s=26, color=COLOURS[0], linewidth=0, zorder=2)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    label(axes, "noise level σ/α  (noise → data)", "", f"{steps} steps on {process}")
    return figure


@on_host
def plot_strong_errors(comparison: Comparison) -> Figure:
    """Strong error against network calls, on logarithmic axes.

    Args:
        comparison: from `metrics.compare`; stochastic methods have no strong error and are left
            out.

    Returns:
        A figure with two panels, the RMS over the starts and the median.

    Raises:
        ArgumentError: no method of the comparison is deterministic.
    """
    methods = dict.fromkeys(row.method for row in comparison.landings if row.rms is not None)
    if not methods:
        raise ArgumentError("every method draws noise, so none has a strong error: add another")
    figure, row = new_figure(9.6, 4.0, columns=2, share=True)
    budgets = sorted({landing.budget for landing in comparison.landings})
    for axes, kind in zip(row, ("rms", "median"), strict=True):
        log_log(axes, budgets)
        ends = []
        for i, method in enumerate(methods):
            landings = comparison.of(method)
            errors = [getattr(landing, kind) for landing in landings]
            axes.plot([landing.nfe for landing in landings], errors, **line(i, method.is_default))
            name = f"{method} (default)" if method.is_default else str(method)
            ends.append((errors[-1], name, colour(i)))
        what = f"strong error, {'RMS' if kind == 'rms' else 'median'} of {comparison.starts} starts"
        label(axes, "network calls (NFE)", "distance to the exact flow" * (kind == "rms"), what)
    # 1e0 and more is off by whole modes; nothing is to be told apart there
    row[0].set_ylim(top=1.5)
    label_ends(row[1], ends)
    return figure
