"""Certificates and audits as one HTML page, pictures included."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from scoresolve.audits.report import Audit
from scoresolve.certificates import Certificate
from scoresolve.plot import plot_certificate

__all__ = ["audit_page", "certificate_page"]


def certificate_page(certificates: Sequence[Certificate]) -> str:
    """Certificates as an HTML page."""
    passed = sum(certificate.passed for certificate in certificates)
    lead = f"{passed} of {len(certificates)} passed every check. Made by scoresolve certify."
    return _page("Certificates", lead, "".join(map(_certificate, certificates)))


def audit_page(audits: Sequence[Audit]) -> str:
    """Audits as an HTML page: the defects, then the certificate of every sampler."""
    lead = "Samplers of other libraries, run as black boxes. Made by scoresolve audit."
    return _page("Audit", lead, "".join(map(_audit, audits)))


def _page(title: str, lead: str, body: str) -> str:
    template = Template((files("scoresolve.audits") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=title, lead=escape(lead), body=body)


def _audit(audit: Audit) -> str:
    parts = [
        f"<h2>{escape(audit.library)} {escape(audit.version)}, {audit.date}</h2>",
        f"<p>{len(audit.certificates)} samplers, {len(audit.defects)} defects.</p><ol>",
    ]
    for defect in audit.defects:
        names = ", ".join(f"<code>{escape(name)}</code>" for name, _ in defect.samplers)
        cause = f"<br>Cause: {escape(defect.cause)}." if defect.cause else ""
        parts.append(
            f"<li>Claimed: {escape(defect.claim)}. Seen: {escape(defect.samplers[0][1])}.{cause}"
            f"<br>In {names}.<pre>{escape(defect.reproduction)}</pre></li>"
        )
    return "".join([*parts, "</ol>", *map(_certificate, audit.certificates)])


def _certificate(certificate: Certificate) -> str:
    verdict = "passed" if certificate.passed else "failed"
    kind = "ok" if certificate.passed else "fail"
    order = "none" if certificate.nominal_order is None else f"{certificate.nominal_order:g}"
    checks = "".join(
        f'<tr><td class="{"ok" if check.passed else "fail"}">{"ok" if check.passed else "fails"}'
        f'</td><td>{escape(check.claim)}</td><td class="seen">{escape(check.seen)}</td></tr>'
        for check in certificate.checks
    )
    return (
        f'<h3>{escape(certificate.solver)} <span class="{kind}">{verdict}</span></h3>'
        f"<p>On {escape(certificate.process)}. Claimed order {order}; calls for n steps: "
        f"{escape(certificate.nfe)}.</p>{_picture(certificate)}{_biases(certificate)}"
        f'<div class="scroll"><table>{checks}</table></div>'
    )


def _picture(certificate: Certificate) -> str:
    if not certificate.errors:
        return ""
    file = io.BytesIO()
    plot_certificate(certificate).savefig(file, format="png", dpi=100)
    image = base64.b64encode(file.getvalue()).decode()
    text = f"errors of {escape(certificate.solver)} against steps"
    return f'<img src="data:image/png;base64,{image}" alt="{text}">'


def _biases(certificate: Certificate) -> str:
    if not certificate.bias:
        return ""
    rows = "".join(
        f"<tr><td>{row.nfe}</td><td>{row.mean_error:.1e}</td><td>{row.variance_error:.1e}</td>"
        f"<td>{'-' if row.path_error is None else f'{row.path_error:.1e}'}</td></tr>"
        for row in certificate.bias
    )
    heads = "<th>calls</th><th>mean error</th><th>variance error</th><th>path error</th>"
    return f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>'
