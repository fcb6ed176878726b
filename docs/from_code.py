"""What the pages take from the code: tables, help texts, and docstrings as reStructuredText.

    solver-table          every row of the registry of solvers
    measured-table        what every fixed-grid solver measures
    face-table            every name of `import scoresolve as ss`, with its first sentence
    command-help NAME...  what `scoresolve NAME... --help` prints

Docstrings are plain text with indented formulas; `as_rst` makes the formulas literal blocks and
escapes what reStructuredText would take for markup.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from click.testing import CliRunner
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import scoresolve
from scoresolve.certificates import Certificate, certify
from scoresolve.cli import main
from scoresolve.metrics import Landing, Method, class_mixture, compare
from scoresolve.sde import VP
from scoresolve.solvers import (
    ALIASES,
    REGISTRY,
    Integrator,
    Solver,
    get_solver,
    nfe_rule,
    noise_rule,
)
from scoresolve.targets import ring

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Source|Yields):$")


class SolverTable(SphinxDirective):
    """A table of all solvers; names that differ in their form alone share a row."""

    def run(self) -> list[nodes.Node]:
        methods: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
        for name, make in REGISTRY.items():
            solver = make()
            adaptive = isinstance(solver, Integrator)
            key = (
                "none" if solver.order is None else f"{solver.order:g}",
                nfe_rule(solver),
                noise_rule(solver),
                solver.source,
            )
            names, predictions = methods.setdefault(key, ([], []))
            aliases = [alias for alias, row in ALIASES.items() if row == name]
            names.append(" = ".join(f"`{known}`" for known in (name, *aliases)))
            if not adaptive:
                predictions.append(solver.predicts)
        rows = [
            "| name | order | calls for n steps | noise | predicts | source |",
            "|---" * 6 + "|",
        ]
        rows += [
            f"| {', '.join(names)} | {order} | {calls} | {noise} | "
            f"{', '.join(dict.fromkeys(predictions))} | {source} |"
            for (order, calls, noise, source), (names, predictions) in methods.items()
        ]
        return self.parse_text_to_nodes("\n".join(rows))


class MeasuredTable(SphinxDirective):
    """What every fixed-grid solver measures: orders, exact errors, errors on two mixtures.

    The smallest of each column among solvers of the same kind is bold.
    """

    budgets = (10, 20, 50)

    def run(self) -> list[nodes.Node]:
        names = [name for name in REGISTRY if isinstance(get_solver(name), Solver)]
        methods = [Method(name) for name in names]
        landed = [
            {
                landing.method.solver: landing
                for landing in compare(mixture, VP(), methods, budgets=(20,), starts=64).landings
            }
            for mixture in (ring(), class_mixture())
        ]
        certificates = {
            name: certify(name, refinements=(64, 128, 256, 512), budgets=self.budgets)
            for name in names
        }
        parts: list[nodes.Node] = []
        for stochastic in (False, True):
            figures = {
                name: [*errors_of(certificates[name], self.budgets), *landings_of(name, landed)]
                for name in names
                if get_solver(name).stochastic == stochastic
            }
            best = [min(column) for column in zip(*figures.values(), strict=True)]
            error = "log-density gap" if stochastic else "RMS error"
            rows = [
                "| name | order: claimed; measured of mean, covariance, path | "
                "variance error at 10 calls | 20 calls | 50 calls | "
                f"{error} at 20 calls, ring | 64-D |",
                "|---" * 7 + "|",
            ]
            for name, row in figures.items():
                cells = [
                    bold(value, value <= least) for value, least in zip(row, best, strict=True)
                ]
                rows.append(f"| `{name}` | {orders_of(certificates[name])} | {' | '.join(cells)} |")
            parts += self.parse_text_to_nodes("\n".join(rows))
        return parts


def orders_of(certificate: Certificate) -> str:
    """The claimed and the measured orders."""
    claimed = "none" if certificate.nominal_order is None else f"{certificate.nominal_order:g}"
    orders = certificate.orders.values()
    measured = ("exact" if math.isinf(order) else f"{order:.1f}" for order in orders)
    return f"{claimed}; {', '.join(measured) or '-'}"


def errors_of(certificate: Certificate, budgets: Sequence[int]) -> list[float]:
    """Variance error at each budget; infinite where a step costs more."""
    errors = [bias.variance_error for bias in certificate.bias]
    return [math.inf] * (len(budgets) - len(errors)) + errors


def landings_of(name: str, landed: Sequence[dict[str, Landing]]) -> list[float]:
    """RMS error, or size of the log-density gap, in each place."""
    landings = (place[name] for place in landed)
    return [abs(landing.gap) if landing.rms is None else landing.rms for landing in landings]


def bold(value: float, best: bool) -> str:
    """A cell of a table."""
    text = "-" if math.isinf(value) else f"{value:.1e}"
    return f"**{text}**" if best else text


class FaceTable(SphinxDirective):
    """A table of the names of the package itself, linked to their rooms."""

    def run(self) -> list[nodes.Node]:
        rows = ["| name | what it is |", "|---|---|"]
        for name in sorted(scoresolve.__all__, key=str.lower):
            value = getattr(scoresolve, name)
            if inspect.ismodule(value):
                link = f"{{py:mod}}`ss.{name} <scoresolve.{name}>`"
            elif inspect.isclass(value) or inspect.isfunction(value):
                room = ".".join(value.__module__.split(".")[:2])
                link = f"{{py:obj}}`ss.{name} <{room}.{name}>`"
            else:
                rows.append(f"| `ss.{name}` | {', '.join(map(escaped, value))} |")
                continue
            rows.append(f"| {link} | {first_sentence(value)} |")
        return self.parse_text_to_nodes("\n".join(rows))


class CommandHelp(SphinxDirective):
    """The help text of a command."""

    optional_arguments = 9
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        result = CliRunner().invoke(main, [*self.arguments, "--help"], prog_name="scoresolve")
        if result.exit_code:
            raise self.error(result.output)
        return [nodes.literal_block(text=result.output, language="text")]


def first_sentence(value: object) -> str:
    """The first sentence of a docstring, safe in a table cell."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return escaped(re.split(r"(?<=[^.]\.) (?=[A-Z])", text)[0])


def as_rst(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Rewrite the lines of a docstring in place, before napoleon reads its sections."""
    result: list[str] = []
    head, literal = "", False
    for line in lines:
        if head == "Returns:":  # napoleon would take what stands before a colon for a type
            line = line.replace(": ", " — ", 1)
        indented = line.startswith("    ")
        if line and not indented:
            head, literal = line, False
        elif indented and not literal and result and not result[-1] and not SECTION.match(head):
            result += ["::", ""]
            literal = True
        result.append(line if literal else escaped(line))
    lines[:] = result


def escaped(line: str) -> str:
    """The line with `*`, `|` and trailing underscores escaped outside backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*|]|_(?![A-Za-z0-9]))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("solver-table", SolverTable)
    app.add_directive("measured-table", MeasuredTable)
    app.add_directive("face-table", FaceTable)
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    return {"parallel_read_safe": True}
