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
from scoresolve.peers import boxes

__all__ = ["Audit", "Defect", "audit", "audit_page", "certificate_page", "pages"]

REFINEMENTS, BUDGETS = (32, 64, 128, 256), (10, 20, 50)


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
        ArgumentError: it is not installed, or no sampler has such a name.
    """
    chosen = {
        name: box
        for name, box in boxes(library).items()
        if not only or any(re.search(each, name) for each in only)
    }
    if not chosen:
        raise ArgumentError(f"no sampler of {library} has a name like {', '.join(only)}")
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
