"""The report as a Nagios plugin says it: one status line with performance data; its exit code is the verdict's."""

from __future__ import annotations

from collections import Counter

from doctor.report import Report, Verdict
from doctor.rule import Severity
from exporters.wording import cut, headline, plain, severity_of

STATUS = {
    Verdict.CLEAR: "OK",
    Verdict.NOTICE: "OK",
    Verdict.WARNING: "WARNING",
    Verdict.CRITICAL: "CRITICAL",
    Verdict.INCOMPLETE: "UNKNOWN",
}
"""The plugin interface's words; the exit codes 0 to 3 of a verdict are its codes."""

SUMMARY_WIDTH = 300
"""A notification by text message still shows it."""


def render(report: Report) -> str:
    """Return the status line with a newline at its end."""
    text = headline(report)
    if report.leads and report.verdict is not Verdict.INCOMPLETE:
        first = report.leads[0].finding
        text = f"{first.failure_mode}: {cut(plain(first.summary), SUMMARY_WIDTH)} ({text})"
    severities = Counter(severity_of(reported.finding) for reported in report.open)
    data = {severity.word: severities[severity] for severity in reversed(Severity)}
    data |= {"silenced": len(report.findings) - len(report.open), "unjudged": len(report.unjudged)}
    data |= {"quiet": len(report.quiet), "gpus": len(report.snapshot.gpus)}
    performance = " ".join(f"{name}={value}" for name, value in data.items())
    return f"GPU-DOCTOR {STATUS[report.verdict]} - {text.replace('|', '/')} | {performance}\n"
