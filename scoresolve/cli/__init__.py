"""The command line: the verbs, certificates and pictures for a shell.

Exit codes: 0 done, 1 a certificate, a model or a sample failed, 2 the call cannot be right,
130 interrupted.
"""

from __future__ import annotations

import warnings
from typing import Any

import click

from scoresolve.cli.models import likelihood, sample, verify
from scoresolve.cli.pictures import demo, plot
from scoresolve.cli.proof import audit, certify, distances, solvers

__all__ = ["main"]


class _Group(click.Group):
    """Shows the package's own errors and all warnings as one line; errors exit with code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        from scoresolve.errors import ScoresolveError

        def warn(message: Warning | str, *_: object, **__: object) -> None:
            click.echo(f"scoresolve: warning: {message}", err=True)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = warn
                return super().invoke(ctx)
        except ScoresolveError as error:
            click.echo(f"scoresolve: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("scoresolve: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scoresolve")
def main() -> None:
    """Samples, likelihoods and proofs for score models.

    \b
    scoresolve demo                                  the main job, on real digits
    scoresolve sample --target ring --count 500      samples of a known distribution
    scoresolve certify dpmpp_2m                      what a solver does, measured exactly
    """


for command in (sample, likelihood, verify, certify, audit, distances, solvers, plot, demo):
    main.add_command(command)
