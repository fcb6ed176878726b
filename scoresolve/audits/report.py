"""What an audit found, and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from scoresolve.certificates import Certificate
from scoresolve.json_text import json_text

__all__ = ["Audit", "Defect", "pages"]


@dataclass(frozen=True)
class Defect:
    """A claim that failed, for all the samplers of a library in which it failed alike.

    Attributes:
        claim: what was to hold.
        samplers: names of the samplers, each with what was seen.
        cause: why, where it is known.
        reproduction: a program that shows the first of them.
    """

    claim: str
    samplers: tuple[tuple[str, str], ...]
    cause: str
    reproduction: str


@dataclass(frozen=True)
class Audit:
    """The certificates of a library's samplers, and the defects they add up to.

    Attributes:
        library, version: what was audited.
        date: of the audit, as YYYY-MM-DD.
        certificates: one for each sampler.
        defects: what failed; causes that differ are different defects.
    """

    library: str
    version: str
    date: str
    certificates: tuple[Certificate, ...]
    defects: tuple[Defect, ...]

    @property
    def passed(self) -> bool:
        """Whether every sampler passed every check."""
        return all(certificate.passed for certificate in self.certificates)

    def __str__(self) -> str:
        sound = sum(certificate.passed for certificate in self.certificates)
        lines = [
            f"{self.library} {self.version}, {self.date}: {len(self.certificates)} samplers, "
            f"{sound} without a finding, {len(self.defects)} defects"
        ]
        for number, defect in enumerate(self.defects, 1):
            names = [name for name, _ in defect.samplers]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"{number:3d}. {shown}")
            lines.append(f"     claimed: {defect.claim}; seen: {defect.samplers[0][1]}")
            if defect.cause:
                lines.append(f"     cause: {defect.cause}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The audit as JSON text."""
        return json_text(
            {
                "library": self.library,
                "version": self.version,
                "date": self.date,
                "passed": self.passed,
                "defects": [
                    {
                        "claim": defect.claim,
                        "cause": defect.cause,
                        "samplers": dict(defect.samplers),
                        "reproduction": defect.reproduction,
                    }
                    for defect in self.defects
                ],
                "certificates": [json.loads(c.to_json()) for c in self.certificates],
            },
        )

    def to_markdown(self) -> str:
        """The audit as a chapter in Markdown."""
        sound = sum(certificate.passed for certificate in self.certificates)
        parts = [
            f"## {self.library} {self.version}",
            f"{self.date}: {len(self.certificates)} samplers, {sound} without a finding, "
            f"{len(self.defects)} defects.",
        ]
        for number, defect in enumerate(self.defects, 1):
            names = ", ".join(f"`{name}`" for name, _ in defect.samplers)
            why = f"\n\nCause: {defect.cause}." if defect.cause else ""
            parts += [
                f"### {self.library} {number}: {_headline(defect)}",
                f"Claimed: {defect.claim}. Seen: {_seen(defect)}.{why}",
                f"In {names}.",
                f"```text\n{defect.reproduction}```",
            ]
        parts += [f"### Every sampler of {self.library}", _table(self.certificates)]
        return "\n\n".join(parts) + "\n"


def _headline(defect: Defect) -> str:
    name = defect.samplers[0][0]
    rest = len(defect.samplers) - 1
    return f"`{name}`" + (f" and {rest} more" if rest else "")


def _seen(defect: Defect) -> str:
    return defect.samplers[0][1].rstrip(".")


def _table(certificates: Sequence[Certificate]) -> str:
    rows = [
        "| sampler | order: claimed; measured of mean, covariance, path, strong | variance error "
        "at 10, 20, 50 steps | calls for n steps | failed checks |",
        "|---|---|---|---|---|",
    ]
    for certificate in certificates:
        claimed = "none" if certificate.nominal_order is None else f"{certificate.nominal_order:g}"
        failed = "; ".join(check.claim for check in certificate.checks if not check.passed) or "-"
        errors = ", ".join(f"{bias.variance_error:.1e}" for bias in certificate.bias[:3]) or "-"
        orders = ", ".join(certificate.shown_orders) or "-"
        rows.append(
            f"| `{certificate.solver}` | {claimed}; {orders} | {errors} | {certificate.nfe} "
            f"| {failed} |"
        )
    return "\n".join(rows)


def pages(audits: Sequence[Audit]) -> str:
    """Several audits as one document in Markdown, without its title."""
    return "\n".join(audit.to_markdown() for audit in audits)
