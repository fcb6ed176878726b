"""Audits: every sampler of another library, certified as a black box.

Each runs on exact Gaussian and mixture scores, on a grid of ours where its library lets it, and as
its users run it, with its own timesteps, dtype, noise and end. What fails is grouped into defects,
each with what was seen, its cause where the code was read for it, and a program that shows it.
"""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from tqdm import tqdm

from scoresolve.audits.causes import cause_of
from scoresolve.audits.page import audit_page, certificate_page
from scoresolve.audits.report import Audit, Defect, pages
from scoresolve.certificates import Certificate, certify
from scoresolve.errors import ArgumentError
from scoresolve.peers import BlackBox, boxes
from scoresolve.precision import default_on_host

__all__ = [
    "Audit",
    "Defect",
    "audit",
    "audit_page",
    "certificate_page",
    "chosen_boxes",
    "pages",
]

REFINEMENTS, BUDGETS = (32, 64, 128, 256), (10, 20, 50)


@default_on_host()
def audit(
    library: str,
    *,
    only: Sequence[str] = (),
    refinements: Sequence[int] = REFINEMENTS,
    progress: bool = False,
) -> Audit:
    """Certify every sampler of an installed library.

    Args:
        library: one of `scoresolve.peers.LIBRARIES`.
        only: regular expressions; samplers whose name contains a match of any. All if empty.
        refinements: increasing numbers of steps, for samplers that take any.
        progress: show a progress bar (only on a terminal).

    Returns:
        An `Audit`; `print` shows its defects.

    Raises:
        UnknownNameError: no such library.
        ArgumentError: it is not installed, `only` holds no regular expressions, or no sampler has
            such a name.
    """
    chosen = chosen_boxes(library, only)
    bar = tqdm(chosen.items(), disable=None if progress else True, unit="sampler")
    certificates = tuple(
        replace(certify(box, refinements=refinements, budgets=BUDGETS), solver=name)
        for name, box in bar
    )
    return Audit(
        library=library,
        version=metadata.version(library),
        date=datetime.date.today().isoformat(),
        certificates=certificates,
        defects=_defects(library, certificates),
    )


def chosen_boxes(library: str, only: Sequence[str] = ()) -> dict[str, BlackBox]:
    """The samplers that `audit` would certify, by name; raises as it does."""
    if isinstance(only, str):
        raise ArgumentError(f"only = {only!r}: give a sequence of regular expressions")
    try:
        patterns = [re.compile(each) for each in only]
    except (re.error, TypeError) as error:
        raise ArgumentError(f"only = {tuple(only)}: no regular expressions: {error}") from None
    chosen = {
        name: box
        for name, box in boxes(library).items()
        if not patterns or any(pattern.search(name) for pattern in patterns)
    }
    if not chosen:
        raise ArgumentError(f"no sampler of {library} has a name like {', '.join(only)}")
    return chosen


def _defects(library: str, certificates: Sequence[Certificate]) -> tuple[Defect, ...]:
    """Failed checks, joined where their cause is the same, or unknown and the claim the same.

    What only few samplers have comes first.
    """
    found: dict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)
    for certificate in certificates:
        for check in certificate.checks:
            if not check.passed:
                cause = cause_of(library, certificate.solver, check.claim)
                kind = re.sub(r"^order .*", "order", check.claim)
                seen = found[cause, "" if cause else kind]
                seen.setdefault(certificate.solver, (check.claim, check.seen))
    return tuple(
        Defect(
            claim=next(iter(seen.values()))[0],
            samplers=tuple((name, what) for name, (_, what) in seen.items()),
            cause=cause,
            reproduction=_program(library, next(iter(seen))),
        )
        for (cause, _), seen in sorted(found.items(), key=lambda item: len(item[1]))
    )


def _program(library: str, name: str) -> str:
    return (
        "import scoresolve as ss\n"
        "from scoresolve.peers import boxes\n\n"
        f"print(ss.certify(boxes({library!r})[{name!r}]))\n"
    )
