"""`python -m benchmarks NAME` measures; `python -m benchmarks report FILES` draws what was kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from benchmarks import (
    adaptive,
    anchors,
    conditioning,
    digits,
    likelihood,
    mcmc,
    nfe,
    overhead,
    scaling,
    sde,
    tracing,
)
from benchmarks.record import Record, Row, text_table
from benchmarks.report import write_report
from scoresolve.cli.failures import Group
from scoresolve.cli.shared import FOLDER, OutFile, overwrite_option, require_free

Measure = Callable[[], list[Row]]


@dataclass(frozen=True)
class Benchmark:
    """What a name runs.

    Attributes:
        about: one line for the help.
        small: ends in about two minutes.
        full: takes its time.
    """

    about: str
    small: Measure
    full: Measure


BENCHMARKS: dict[str, Benchmark] = {
    "adaptive": Benchmark(
        "Calls of adaptive solvers for a given error, ours and the peers'.",
        partial(adaptive.measure, cases=adaptive.SMALL[:2]),
        partial(adaptive.measure, full=True),
    ),
    "adaptive_time": Benchmark(
        "Wall time of adaptive solvers for a given error.",
        partial(adaptive.measure_time, widths=adaptive.WIDTHS[:1]),
        partial(adaptive.measure_time, full=True),
    ),
    "anchors": Benchmark(
        "Figures of peers that were recorded apart from this package, measured again.",
        anchors.measure,
        partial(anchors.measure, blocks=16, starts=512, best=True),
    ),
    "conditioning": Benchmark(
        "Distance to the exact posterior given linear measurements.",
        partial(conditioning.measure, 250),
        conditioning.measure,
    ),
    "digits": Benchmark(
        "Errors and quality on the trained network, ours and the peers'.",
        digits.measure,
        partial(digits.measure, full=True),
    ),
    "likelihood": Benchmark(
        "Error of the likelihood against its cost, ours and the peers'.",
        partial(likelihood.measure, cases=likelihood.SMALL),
        partial(likelihood.measure, full=True),
    ),
    "mcmc": Benchmark(
        "What a Markov chain costs beside its score calls.",
        mcmc.measure,
        partial(mcmc.measure, steps=1000, repeats=1),
    ),
    "mcmc_yield": Benchmark(
        "Effective samples per score call, ours and BlackJAX's.",
        partial(mcmc.measure_yield, seeds=1),
        mcmc.measure_yield,
    ),
    "nfe": Benchmark(
        "Strong error against calls, ours and the deterministic peers'.",
        partial(nfe.measure, "small"),
        partial(nfe.measure, "wide"),
    ),
    "nfe_peers": Benchmark(
        "The same with every deterministic peer that is installed, not the decisive ones alone.",
        partial(nfe.measure, "one"),
        partial(nfe.measure, "full"),
    ),
    "overhead": Benchmark(
        "The executor against a loop written by hand.",
        partial(overhead.measure, repeats=100),
        partial(overhead.measure, repeats=400),
    ),
    "overhead_cuda": Benchmark(
        "The same on a GPU.",
        partial(overhead.measure, device="cuda"),
        partial(overhead.measure, repeats=1000, device="cuda"),
    ),
    "scaling": Benchmark(
        "Time and memory of a run against batch, dimension and steps.",
        scaling.measure,
        partial(scaling.measure, full=True),
    ),
    "sde": Benchmark(
        "Law of stochastic solvers against calls, ours and the peers'.",
        sde.measure,
        partial(sde.measure, full=True),
    ),
    "tracing": Benchmark(
        "Time to trace a plan and to compute its law.",
        partial(tracing.measure, repeats=1),
        tracing.measure,
    ),
}


@click.group(cls=Group)
def main() -> None:
    """Measure solvers, ours and those of other libraries, and draw what was measured."""


def _command(name: str, benchmark: Benchmark) -> click.Command:
    @click.command(name, help=benchmark.about)
    @click.option("--full", is_flag=True, help="The full setting instead of the small one.")
    @click.option(
        "--json",
        "path",
        type=OutFile(),
        help="Keep the figures, with versions and machine, in this file.",
    )
    @overwrite_option
    def run(full: bool, path: Path | None) -> None:
        begin = time.perf_counter()
        try:
            rows = (benchmark.full if full else benchmark.small)()
        except ImportError as error:
            raise click.ClickException(str(error)) from error
        seconds = round(time.perf_counter() - begin, 1)
        click.echo(text_table(rows))
        if path is not None:
            command = f"python -m benchmarks {name}" + " --full" * full
            Record(name, "full" if full else "small", command, rows, seconds).save(path)

    return run


for _name, _benchmark in BENCHMARKS.items():
    main.add_command(_command(_name, _benchmark))


@main.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option("--out", required=True, type=FOLDER)
@overwrite_option
def report(files: tuple[Path, ...], out: Path) -> None:
    """Tables and plots of the records in FILES, into the folder OUT."""
    try:
        records = [Record.load(path) for path in files]
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    require_free(out, ["report.md"])
    click.echo(write_report(records, out))


if __name__ == "__main__":
    main()
