"""Commands that prove: solvers, other libraries, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from scoresolve.sde import GaussianSDE

from scoresolve.cli.shared import (
    DATA,
    PAGE,
    PROCESSES,
    REPORT,
    TARGETS,
    overwrite_option,
    process_of,
    read_array,
    target_of,
)
from scoresolve.files import write_whole

__all__ = ["audit", "certify", "distances", "solvers"]


@contextmanager
def _interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Ends the block at a keyboard interrupt and keeps it, so that what is done can be shown."""
    seen: list[KeyboardInterrupt] = []
    try:
        yield seen
    except KeyboardInterrupt as interrupt:
        seen.append(interrupt)


def _process_if_given(name: str | None, options: tuple[str, ...]) -> GaussianSDE | None:
    if name is not None:
        return process_of(name, options)
    if options:
        raise click.UsageError("--sde-option is of a process: give --sde as well")
    return None


@click.command()
@click.argument("solvers", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every solver of the registry.")
@click.option(
    "--sde",
    "process",
    type=click.Choice(list(PROCESSES)),
    help="On this process alone, in place of two that differ in kind.",
)
@click.option("--sde-option", "process_options", multiple=True, metavar="KEY=NUMBER")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--page", type=PAGE, help="Also write a page with pictures.")
@overwrite_option
def certify(
    solvers: tuple[str, ...],
    everything: bool,
    process: str | None,
    process_options: tuple[str, ...],
    as_json: bool,
    page: Path | None,
) -> None:
    """Measure SOLVERS on data whose answer is known; exit code 1 if a claim fails.

    \b
    scoresolve certify dpmpp_2m ab3_v
    """
    from tqdm import tqdm

    import scoresolve as ss
    from scoresolve.solvers import REGISTRY, get_solver

    if everything == bool(solvers):
        raise click.UsageError("name at least one solver, or give --all")
    sde = _process_if_given(process, process_options)
    names = [*REGISTRY] if everything else solvers
    for name in names:
        get_solver(name)
    certificates = []
    with _interrupts() as stopped:
        for name in tqdm(names, disable=None, unit="solver"):
            certificates.append(ss.certify(name, sde))
    if as_json:
        click.echo(json.dumps([json.loads(c.to_json()) for c in certificates], indent=2))
    else:
        click.echo("\n\n".join(map(str, certificates)))
    if page is not None:
        from scoresolve.audits import certificate_page

        write_whole(page, certificate_page(certificates))
    if stopped:
        raise stopped[0]
    if not all(certificate.passed for certificate in certificates):
        raise SystemExit(1)


@click.command()
@click.argument("libraries", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="REGEX", help="Samplers with such a name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--out", type=REPORT, help="Also write the report, as .md, .html or .json.")
@overwrite_option
def audit(
    libraries: tuple[str, ...], only: tuple[str, ...], as_json: bool, out: Path | None
) -> None:
    """Certify every sampler of installed LIBRARIES; exit code 1 if a claim fails.

    \b
    scoresolve audit k-diffusion
    scoresolve audit diffusers --only ddim --out ddim.html
    """
    import scoresolve as ss
    from scoresolve.audits import audit_page, chosen_boxes, pages

    for library in libraries:
        chosen_boxes(library, only)  # refused before any of them is run
    audits = []
    with _interrupts() as stopped:
        for library in libraries:
            audits.append(ss.audit(library, only=only, progress=True))
    text = "[" + ",\n".join(found.to_json() for found in audits) + "]"
    click.echo(text if as_json else "\n\n".join(map(str, audits)))
    if out is not None:
        write = {".md": lambda: pages(audits), ".html": lambda: audit_page(audits)}
        write_whole(out, write.get(out.suffix, lambda: text)())
    if stopped:
        raise stopped[0]
    if not all(found.passed for found in audits):
        raise SystemExit(1)


@click.command()
@click.argument("samples", type=DATA)
@click.option("--target", type=click.Choice(TARGETS), help="The mixture they should be from; or")
@click.option("--reference", type=DATA, help="a file of other samples.")
@click.option(
    "--sde",
    "process",
    type=click.Choice(list(PROCESSES)),
    help="Take the target's law at t_min of this process, where `sample` ends.",
)
@click.option("--sde-option", "process_options", multiple=True, metavar="KEY=NUMBER")
@click.option("--distance", "chosen", multiple=True, help="Only this one; may be repeated.")
@click.option("--draws", type=int, help="Draws of every noise floor, at least 19.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def distances(
    samples: Path,
    target: str | None,
    reference: Path | None,
    process: str | None,
    process_options: tuple[str, ...],
    chosen: tuple[str, ...],
    draws: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """How far SAMPLES, a file, are from a law, each distance beside its noise floor.

    \b
    scoresolve distances samples.safetensors --target ring --sde vp
    """
    import scoresolve as ss

    if (target is None) == (reference is None):
        raise click.UsageError("give --target or --reference")
    if process is not None and target is None:
        raise click.UsageError("--sde is the process of a --target: leave it out")
    sde = _process_if_given(process, process_options)
    against = read_array(reference) if reference is not None else target_of(str(target))
    if sde is not None and isinstance(against, ss.GaussianMixture):
        against = against.marginal(sde, sde.t_min)
    table = ss.compare_samples(read_array(samples), against, chosen or None, draws=draws, seed=seed)
    click.echo(table.to_json() if as_json else str(table))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def solvers(as_json: bool) -> None:
    """List every solver: order, network calls for n steps, source.

    \b
    scoresolve solvers --json
    """
    from scoresolve.solvers import REGISTRY, get_solver, nfe_rule

    rows = []
    for name in REGISTRY:
        solver = get_solver(name)
        rows.append(
            {
                "name": name,
                "order": solver.order,
                "calls": nfe_rule(solver),
                "kind": "SDE" if solver.stochastic else "ODE",
                "source": solver.source,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    shown = [{key: "-" if v is None else str(v) for key, v in row.items()} for row in rows]
    table = [{key: key for key in rows[0]}, *shown]
    widths = {key: max(len(row[key]) for row in table) for key in table[0]}
    for row in table:
        line = "  ".join(cell.ljust(widths[key]) for key, cell in row.items())
        click.echo(line.rstrip())
