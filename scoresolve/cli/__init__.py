"""The command line: the verbs, certificates and pictures for a shell.

`failures` lists the exit codes.
"""

from __future__ import annotations

import click

from scoresolve.cli.failures import Group
from scoresolve.cli.models import likelihood, sample, verify
from scoresolve.cli.pictures import demo, plot
from scoresolve.cli.proof import audit, certify, distances, solvers

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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
