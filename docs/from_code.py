"""What the pages take from the code: tables, help texts, and docstrings as reStructuredText.

    solver-table          every row of the registry of solvers, with what it measures
    face-table            every name of `import scoresolve as ss`, with its first sentence
    command-help NAME...  what `scoresolve NAME... --help` prints
    picture FILE          what `scoresolve plot NAME --out FILE` draws, under its command

Docstrings are plain text with indented formulas; `as_rst` makes the formulas literal blocks and
escapes what reStructuredText would take for markup.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from click.testing import CliRunner
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import scoresolve
from scoresolve.certificates import Certificate, certify
from scoresolve.cli import main
from scoresolve.metrics import Landing, Method, class_mixture, compare
from scoresolve.plot import PICTURES, save_picture
from scoresolve.sde import VP
from scoresolve.solvers import (
    ALIASES,
    REGISTRY,
    Integrator,
    Solver,
    nfe_rule,
    noise_rule,
)
from scoresolve.targets import ring

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Source|Yields):$")


class SolverTable(SphinxDirective):
    """Every row of the registry: what it claims, what it costs and, with fixed steps, measures.

    The smallest of each measured column among solvers of the same kind is bold.
    """

    budgets = (10, 20, 50)

    def run(self) -> list[nodes.Node]:
        solvers = {name: make() for name, make in REGISTRY.items()}
        fixed = {name: row for name, row in solvers.items() if isinstance(row, Solver)}
        measured = self.measured(list(fixed))
        parts: list[nodes.Node] = []
        for stochastic in (False, True):
            kind = {name: row for name, row in fixed.items() if row.stochastic == stochastic}
            error = "log-density gap" if stochastic else "RMS error"
            heads = [
                "order: claimed; measured of mean, covariance, path",
                *(f"variance error at {budget} calls" for budget in self.budgets),
                f"{error} at 20 calls, ring",
                "64-D",
            ]
            best = [min(measured[name][1][i] for name in kind) for i in range(len(heads) - 1)]
            cells = {
                name: [
                    measured[name][0],
                    *(
                        bold(v, v <= least)
                        for v, least in zip(measured[name][1], best, strict=True)
                    ),
                ]
                for name in kind
            }
            parts += self.table(kind, heads, cells)
        others = {name: row for name, row in solvers.items() if name not in fixed}
        orders = {name: [claimed(row.order)] for name, row in others.items()}
        return parts + self.table(others, ["order: claimed"], orders)

    def measured(self, names: Sequence[str]) -> dict[str, tuple[str, list[float]]]:
        """Orders as text and errors as numbers, of every fixed-grid solver."""
        methods = [Method(name) for name in names]
        landed = [
            {
                landing.method.solver: landing
                for landing in compare(mixture, VP(), methods, budgets=(20,), starts=64).landings
            }
            for mixture in (ring(), class_mixture())
        ]
        found = {}
        for name in names:
            certificate = certify(name, VP(), budgets=self.budgets)
            errors = [*errors_of(certificate, self.budgets), *landings_of(name, landed)]
            found[name] = orders_of(certificate), errors
        return found

    def table(
        self,
        solvers: Mapping[str, Solver | Integrator],
        heads: Sequence[str],
        cells: Mapping[str, Sequence[str]],
    ) -> list[nodes.Node]:
        rows = [
            f"| name | {' | '.join(heads)} | calls for n steps | noise | predicts | source |",
            "|---" * (len(heads) + 5) + "|",
        ]
        for name, row in solvers.items():
            known = (name, *(alias for alias, target in ALIASES.items() if target == name))
            facts = [
                " = ".join(f"`{each}`" for each in known),
                *cells[name],
                nfe_rule(row),
                noise_rule(row),
                row.predicts if isinstance(row, Solver) else "-",
                row.source,
            ]
            rows.append(f"| {' | '.join(facts)} |")
        return self.parse_text_to_nodes("\n".join(rows))


def claimed(order: float | None) -> str:
    """The nominal order."""
    return "none" if order is None else f"{order:g}"


def orders_of(certificate: Certificate) -> str:
    """The claimed and the measured orders."""
    orders = (p for name, p in certificate.orders.items() if name != "strong")
    measured = ("exact" if math.isinf(order) else f"{order:.1f}" for order in orders)
    return f"{claimed(certificate.nominal_order)}; {', '.join(measured) or '-'}"


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


class Drawn(SphinxDirective):
    """A picture, drawn when the pages are built, under the command that draws it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path("_pictures") / self.arguments[0]
        file = Path(self.env.srcdir) / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            save_picture(file.stem, file)
        command = f"$ scoresolve plot {file.stem} --out {file.name}"
        text = PICTURES[file.stem].text
        return [
            nodes.literal_block(text=command, language="console"),
            nodes.image(uri=f"/{path}", alt=text),
        ]


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
    app.add_directive("face-table", FaceTable)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("picture", Drawn)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    return {"parallel_read_safe": True}
