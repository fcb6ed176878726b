"""`python -m benchmarks NAME`: run a benchmark, print its table, write its figures as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

import scoresolve
from benchmarks import adaptive, conditioning, likelihood, mcmc, nfe, overhead, tracing
from scoresolve.peers import versions

BENCHMARKS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "adaptive": adaptive.measure,
    "adaptive_full": partial(adaptive.measure, full=True),
    "adaptive_time": adaptive.measure_time,
    "adaptive_time_full": partial(adaptive.measure_time, full=True),
    "conditioning": conditioning.measure,
    "likelihood": likelihood.measure,
    "mcmc": mcmc.measure,
    "mcmc_full": partial(mcmc.measure, steps=1000, repeats=1),
    "mcmc_yield": mcmc.measure_yield,
    "nfe": nfe.measure,
    "nfe_wide": partial(nfe.measure, "wide"),
    "nfe_full": partial(nfe.measure, "full"),
    "overhead": overhead.measure,
    "overhead_cuda": partial(overhead.measure, device="cuda"),
    "tracing": tracing.measure,
}


@click.command()
@click.argument("name", type=click.Choice(list(BENCHMARKS)))
@click.option("--out", type=click.Path(path_type=Path), help="Write figures and versions as JSON.")
def main(name: str, out: Path | None) -> None:
    """Run the benchmark NAME."""
    rows = BENCHMARKS[name]()
    columns = list(rows[0])
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if out is not None:
        machine = {
            "scoresolve": scoresolve.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **versions(),
        }
        out.write_text(json.dumps({"benchmark": name, "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
