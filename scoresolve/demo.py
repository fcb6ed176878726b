"""The main job on real data: sample, score and compare on 8x8 handwritten digits.

One run draws digits from the bundled network, states the held-out bits per dimension with its
standard error, and compares solvers on a mixture fitted to the digits, where the exact image of
every start is known. It leaves pictures, all figures as JSON and one report page.
"""

from __future__ import annotations

import base64
import math
import platform
import time
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch

from scoresolve.digits import BIN_WIDTH, load_digits, load_network, to_unit
from scoresolve.files import write_whole
from scoresolve.json_text import json_text
from scoresolve.likelihood import Likelihood, log_likelihood
from scoresolve.metrics import BUDGETS, METHODS, Comparison, Method, class_mixture, compare
from scoresolve.models import from_denoiser
from scoresolve.plot import plot_images, plot_strong_errors, save_figure
from scoresolve.sampling import DEFAULT_SOLVER, sample
from scoresolve.sde import EDM, VP

__all__ = ["FILES", "DemoReport", "DemoSettings", "run_demo"]

FILES = ("report.html", "report.json", "digits.png", "solvers.png")
"""What the demo writes."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        seed: of all noise.
        count: digits to draw.
        nfe: network calls to draw them with.
        held_out: held-out digits whose likelihood is computed, at most 360.
        likelihood_cost: network evaluations and products with the Jacobian for each held-out digit.
        starts: starts of the comparison.
        budgets: network calls of the comparison.
        methods: solvers and grids of the comparison.
    """

    seed: int = 0
    count: int = 100
    nfe: int = 20
    held_out: int = 360
    likelihood_cost: int = 200
    starts: int = 256
    budgets: tuple[int, ...] = BUDGETS
    methods: tuple[Method, ...] = METHODS


@dataclass(frozen=True)
class DemoReport:
    """What the demo found.

    Attributes:
        settings: what was asked.
        nfe: network calls that drew the digits.
        bits_per_dim: mean over the held-out digits.
        bits_error: its standard error over digits and probes.
        probe_error: RMS standard error of one digit's bits by the random probes alone.
        likelihood_cost: network evaluations and products that a digit's likelihood took.
        comparison: solvers on the mixture.
        seconds: by part of the job.
        page: the report page.
    """

    settings: DemoSettings
    nfe: int
    bits_per_dim: float
    bits_error: float
    probe_error: float
    likelihood_cost: float
    comparison: Comparison
    seconds: dict[str, float]
    page: Path

    def summary(self) -> str:
        """A few lines for the terminal."""
        s = self.settings
        lines = [
            f"{s.count} digits drawn with {self.nfe} network calls",
            f"{self.bits_per_dim:.3f} +- {self.bits_error:.3f} bits per dimension on "
            f"{s.held_out} held-out digits ({self.likelihood_cost:.0f} evaluations each)",
            f"{len(s.methods)} solvers compared over {s.budgets[0]} to {s.budgets[-1]} calls on a "
            "mixture fitted to the digits:",
        ]
        for method in s.methods:
            landings = self.comparison.of(method)
            shown = ", ".join(
                f"{landing.rms:.2g} at {landing.nfe}"
                for landing in landings
                if landing.rms is not None and landing.budget in (10, 20, 50)
            )
            if shown:
                lines.append(f"  {method!s:24s} RMS error {shown}")
        lines.append(f"report: {self.page} ({sum(self.seconds.values()):.0f} s)")
        return "\n".join(lines)


def run_demo(out: Path, settings: DemoSettings | None = None) -> DemoReport:
    """Do the main job and write its report.

    Args:
        out: folder for `report.html`, `report.json`, `digits.png` and `solvers.png`; made if
            it is missing.
        settings: what to do; the full job if omitted.

    Returns:
        A `DemoReport`; `print(report.summary())` shows it.
    """
    job = settings or DemoSettings()
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    model = from_denoiser(load_network())

    begin = time.perf_counter()
    ours, usual = (
        sample(
            model,
            EDM(),
            shape=(job.count, 1, 8, 8),
            nfe=job.nfe,
            solver=solver,
            grid=grid,
            seed=job.seed,
        )
        for solver, grid in ((DEFAULT_SOLVER, None), ("dpmpp_2m", "karras"))
    )
    pages = {
        f"{DEFAULT_SOLVER}: {ours.nfe} calls": ours.x,
        f"dpmpp_2m, karras: {usual.nfe} calls": usual.x,
    }
    digits = plot_images(pages)
    seconds["sampling"] = time.perf_counter() - begin

    begin = time.perf_counter()
    likelihood = _held_out_likelihood(job)
    bits = likelihood.bits_per_dim.double()
    probe = likelihood.standard_error.double() / (likelihood.dimension * math.log(2))
    seconds["likelihood"] = time.perf_counter() - begin

    begin = time.perf_counter()
    comparison = compare(
        class_mixture(), EDM(), job.methods, job.budgets, starts=job.starts, seed=job.seed
    )
    solvers = plot_strong_errors(comparison)
    seconds["comparison"] = time.perf_counter() - begin

    report = DemoReport(
        settings=job,
        nfe=ours.nfe,
        bits_per_dim=float(bits.mean()),
        bits_error=float(bits.std()) / math.sqrt(len(bits)),
        probe_error=float(probe.square().mean().sqrt()),
        likelihood_cost=float(likelihood.cost.mean()),
        comparison=comparison,
        seconds=seconds,
        page=out / "report.html",
    )
    save_figure(digits, out / "digits.png")
    save_figure(solvers, out / "solvers.png")
    write_whole(out / "report.json", json_text({**asdict(report), "page": str(report.page)}))
    write_whole(report.page, _page(report, out))
    return report


def _held_out_likelihood(job: DemoSettings) -> Likelihood:
    """Of held-out digits; matched to VP, whose flow takes fewer calls than that of EDM."""
    x = to_unit(load_digits("test").levels[: job.held_out], 0.0)
    return log_likelihood(
        from_denoiser(load_network()),
        VP(),
        x,
        cost=job.likelihood_cost,
        dequantise=BIN_WIDTH,
        seed=job.seed,
    )


def _page(report: DemoReport, out: Path) -> str:
    job, comparison = report.settings, report.comparison
    template = Template((files("scoresolve") / "demo.html").read_text(encoding="utf-8"))
    return template.substitute(
        count=job.count,
        nfe=report.nfe,
        solver=DEFAULT_SOLVER,
        digits=_inline(out / "digits.png"),
        bits=f"{report.bits_per_dim:.3f}",
        error=f"{report.bits_error:.3f}",
        probe_error=f"{report.probe_error:.3f}",
        held_out=job.held_out,
        likelihood_cost=f"{report.likelihood_cost:.0f}",
        uniform=f"{-math.log2(BIN_WIDTH / 2):.2f}",
        starts=comparison.starts,
        reference=f"{comparison.reference_error:.0e}",
        solvers=_inline(out / "solvers.png"),
        errors=_table(report, "rms"),
        medians=_table(report, "median"),
        gaps=_table(report, "gap"),
        seed=job.seed,
        seconds=", ".join(f"{part} {taken:.0f} s" for part, taken in report.seconds.items()),
        versions=escape(f"Python {platform.python_version()}, torch {torch.__version__}"),
    )


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _table(report: DemoReport, quantity: str) -> str:
    """One quantity of the comparison: a row for each method, a column for each budget."""
    budgets = report.settings.budgets
    head = "".join(f"<th>{budget}</th>" for budget in budgets)
    rows = []
    for method in report.settings.methods:
        landings = {landing.budget: landing for landing in report.comparison.of(method)}
        values = [getattr(landings.get(budget), quantity, None) for budget in budgets]
        if any(value is not None for value in values):
            cells = "".join(f"<td>{'' if v is None else format(v, '.2g')}</td>" for v in values)
            mark = " class='default'" if method.is_default else ""
            rows.append(f"<tr{mark}><th>{escape(str(method))}</th>{cells}</tr>")
    return f"<table><tr><th>calls</th>{head}</tr>{''.join(rows)}</table>"
