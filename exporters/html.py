"""The report as one page for a browser: no scripts, nothing from elsewhere, readable on a phone.

Every text is escaped where it becomes part of an element, so that none can forget it.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from doctor.report import Report, ReportedFinding
from exporters.wording import (
    SOURCE_NAMES,
    counted,
    cut,
    gpu_name,
    headline,
    moment,
    plain,
    remedy,
    severity_of,
    silenced,
    who,
)

PROOFS_MAX = 8
"""Pieces of evidence of one finding; `/report` has all."""

PROOF_WIDTH = 600

STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:52rem;padding:1rem;overflow-wrap:anywhere}"
    "h1{font-size:1.4rem;line-height:1.3;margin:.5rem 0}h2{font-size:1.15rem;margin:0}h3{font-size:1rem;margin:1rem 0 .3rem}"
    "p{margin:.4rem 0}ul,ol{margin:.2rem 0;padding-left:1.4rem}li{margin:.2rem 0}"
    "code,.proof{font:.875em/1.45 ui-monospace,monospace}.proof{display:block}"
    ".finding{border-left:.35rem solid #888;padding:.1rem 0 .1rem .8rem;margin:1.2rem 0}"
    ".critical{border-color:#c62828}.warning{border-color:#e08a00}.notice{border-color:#1e6fc0}.clear{border-color:#2e7d32}"
    ".word{font-weight:700;text-transform:uppercase;font-size:.85rem;letter-spacing:.04em}"
    ".aside{opacity:.75;font-size:.9rem}.consequence{margin-left:1.2rem}nav a{margin-right:1rem}"
)

POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    + "'"
)
"""The Content-Security-Policy under which the page is shown: its own style, and nothing else."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _element(name: str, *children: str, of: str = "", href: str = "") -> Markup:
    """Return an element; children that are no Markup are text, made plain and escaped."""
    attributes = "".join(f' {key}="{escape(value)}"' for key, value in (("class", of), ("href", href)) if value)
    return Markup(f"<{name}{attributes}>{_joined(children)}</{name}>")


def _joined(children: tuple[str, ...]) -> str:
    return "".join(child if isinstance(child, Markup) else escape(plain(child)) for child in children)


def render(report: Report, version: str) -> bytes:
    """Return the page of a report."""
    verdict = report.verdict.value
    return _page(
        f"{verdict}: {report.node.name or 'this node'}",
        version,
        _element(
            "header",
            _element("p", "gpu-doctor on ", _element("b", report.node.name or "this node"), of="aside"),
            _element(
                "div", _element("span", verdict, of="word"), _element("h1", headline(report)), of=f"finding {verdict}"
            ),
            _element("p", f"As of {moment(report.at)}", of="aside"),
        ),
        *(_finding(reported, report) for reported in report.findings),
        _gpus(report),
        _unjudged(report),
        _unseen(report),
        _element("p", f"{counted(len(report.quiet), 'failure mode')} asked about and not present.", of="aside"),
    )


def render_nothing(why: str, version: str) -> bytes:
    """Return the page that says why there is no report."""
    words = _element("span", "no report", of="word"), _element("h1", why)
    return _page("no report", version, _element("div", *words, of="finding"))


def _page(title: str, version: str, *children: str) -> bytes:
    links = [
        _element("a", text, href=href)
        for text, href in (("metrics", "/metrics"), ("report", "/report"), ("health", "/healthz"))
    ]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">'
        f"<title>{escape(plain(title))} · gpu-doctor</title><style>{STYLE}</style></head>"
    )
    footer = _element("footer", _element("nav", *links), _element("p", f"gpu-doctor {version}", of="aside"))
    text = f"{head}<body>{_element('main', *children)}{footer}</body></html>\n"
    return text.encode("utf-8", "replace")


def _finding(reported: ReportedFinding, report: Report) -> Markup:
    finding, severity = reported.finding, severity_of(reported.finding).word
    about, proofs = who(finding, report.snapshot), finding.evidence[:PROOFS_MAX]
    parts = [
        _element("span", f"{severity} · confidence {finding.confidence.word}", of="word"),
        _element("h2", finding.title),
        _element("p", finding.summary),
    ]
    if about or finding.since is not None:
        since = f"since {moment(finding.since)}" if finding.since is not None else ""
        parts.append(_element("p", " · ".join(filter(None, (about, since))), of="aside"))
    if reported.caused_by:
        parts.append(_element("p", f"Follows from {', '.join(reported.caused_by)}", of="aside"))
    if reported.silence is not None:
        parts.append(_element("p", f"Silenced by the site {silenced(reported.silence)}", of="aside"))
    if proofs:
        proof = [
            _element("li", f"{e.source} {e.where}", _element("span", cut(plain(e.text), PROOF_WIDTH), of="proof"))
            for e in proofs
        ]
        if len(finding.evidence) > PROOFS_MAX:
            proof.append(_element("li", f"and {len(finding.evidence) - PROOFS_MAX} more in the report"))
        parts += [_element("h3", "Evidence"), _element("ul", *proof)]
    if finding.advice:
        parts += [
            _element("h3", "Fix"),
            _element("ol", *(_element("li", *_with_code(step)) for step in finding.advice)),
        ]
    parts.append(_element("p", "Runbook: ", _element("code", f"gpu-doctor explain {finding.failure_mode}"), of="aside"))
    return _element("section", *parts, of=f"finding {severity}{' consequence' if reported.depth else ''}")


def _with_code(text: str) -> list[str]:
    """Return a line of a runbook with what stands in backticks as code."""
    return [_element("code", piece) if i % 2 else _flowing(piece) for i, piece in enumerate(text.split("`"))]


def _flowing(text: str) -> str:
    """Return *text* made plain, as Markup; blanks at its ends, which part it from what stands beside it, stay."""
    made = escape(plain(text))
    return Markup(f"{' ' if text[:1] == ' ' else ''}{made.strip()}{' ' if text[-1:] == ' ' and made.strip() else ''}")


def _gpus(report: Report) -> Markup:
    names = [_element("li", gpu_name(gpu.uuid, report.snapshot)) for gpu in report.snapshot.gpus]
    return Markup(
        _element("details", _element("summary", counted(len(names), "GPU")), _element("ul", *names)) if names else ""
    )


def _unjudged(report: Report) -> Markup:
    if not report.unjudged:
        return Markup("")
    rows = [_element("li", _element("code", u.failure_mode), f": {u.why}") for u in report.unjudged]
    return _element("section", _element("h3", "Could not be judged"), _element("ul", *rows))


def _unseen(report: Report) -> Markup:
    if not report.unseen:
        return Markup("")
    rows = [
        _element(
            "li", SOURCE_NAMES[u.source] + (f", {u.what}" if u.what else "") + f": {u.why}. {remedy(u.source, u.why)}"
        )
        for u in report.unseen
    ]
    return _element("section", _element("h3", "Could not be seen"), _element("ul", *rows))
