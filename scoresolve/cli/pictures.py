"""Commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    pass

from scoresolve.cli.shared import FOLDER, MOVING, overwrite_option, require_free

__all__ = ["demo", "plot"]


@click.command()
@click.argument("name", required=False)
@click.option("--out", type=MOVING, help="Where to write it [NAME.png]; some move as .gif or .mp4.")
@overwrite_option
@click.option("--list", "listed", is_flag=True, help="List the pictures.")
def plot(name: str | None, out: Path | None, listed: bool) -> None:
    """Draw the picture NAME.

    \b
    scoresolve plot --list
    scoresolve plot orders --out orders.png
    scoresolve plot flow --out flow.gif
    """
    from scoresolve.errors import known_name
    from scoresolve.plot import PICTURES, save_picture

    if listed:
        for known, each in PICTURES.items():
            click.echo(f"{known:10s} {each.text}")
        return
    if name is None:
        raise click.UsageError("name a picture; --list shows them")
    known_name("picture", name, PICTURES)
    path = out or MOVING.convert(f"{name}.png", None, click.get_current_context())
    save_picture(name, path)
    click.echo(f"{name} drawn in {path}")


@click.command()
@click.option("--out", type=FOLDER, default="scoresolve-demo", show_default=True)
@overwrite_option
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """The main job on real data: draw digits, state bits per dimension, compare solvers.

    Writes pictures, figures as JSON and one report page into the folder --out.

    \b
    scoresolve demo --out my-report
    """
    import torch

    from scoresolve.demo import FILES, DemoSettings, run_demo

    require_free(out, FILES)

    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    report = run_demo(out, DemoSettings(seed=seed))
    click.echo(report.summary())
