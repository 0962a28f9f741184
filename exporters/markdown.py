"""The report as Markdown: to paste into an incident ticket."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.report import Report, ReportedFinding, is_open
from doctor.rule import Evidence
from doctor.snapshot import Snapshot, or_none
from exporters.wording import (
    SOURCE_NAMES,
    counted,
    headline,
    listed,
    moment,
    plain,
    severity_of,
    silence_subject,
    silenced,
    who,
)

_SPECIAL = re.compile(r"[\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w)")
_CODE = re.compile(r"(`[^`]+`)")


def render(report: Report) -> str:
    """Return the report as a Markdown document that ends with a newline."""
    return "\n".join([*_head(report), *_findings(report), *_silenced(report), *_blind_spots(report)]) + "\n"


def prose(text: str) -> str:
    """Return text from outside so that Markdown shows it as it is."""
    return _SPECIAL.sub(r"\\\g<0>", plain(text))


def advice_of(text: str) -> str:
    """Return a line of a runbook: its Markdown stands, a placeholder that was not filled in stays visible."""
    return "".join(part if part.startswith("`") else part.replace("<", "\\<") for part in _CODE.split(plain(text)))


def _head(report: Report) -> Iterator[str]:
    snapshot = report.snapshot
    yield f"# {report.verdict.value.capitalize()}: {prose(headline(report))}"
    yield ""
    yield f"- Node: {prose(report.node.name) or 'not told'}{' (simulated)' if report.node.simulated else ''}"
    yield f"- Time: {moment(report.at)}"
    for gpu in snapshot.gpus:
        told = (or_none(gpu.name), or_none(gpu.pci_address), gpu.uuid)
        yield f"- GPU {gpu.index}: {', '.join(prose(word) for word in told if word)}"
    driver = {"driver": snapshot.stack.driver, "CUDA of the driver": snapshot.stack.cuda_driver}
    versions = [f"{name} {prose(version)}" for name, value in driver.items() if (version := or_none(value))]
    if versions:
        yield f"- Stack: {', '.join(versions)}"
    for engine in snapshot.engines:
        stack = engine.stack
        told = {"": stack.engine, "PyTorch": stack.torch, "NCCL": stack.nccl, "model": engine.flags.model}
        words = [f"{name} {prose(str(value))}".strip() for name, of in told.items() if (value := or_none(of))]
        yield f"- Engine: {prose(engine.kind)} {', '.join(words)} (pid {engine.pid})"


def _findings(report: Report) -> Iterator[str]:
    number = 0
    shown = [reported for incident in report.incidents if is_open(incident) for reported in incident]
    for reported in shown:
        finding = reported.finding
        yield ""
        if reported.depth == 0:
            number += 1
            yield f"## {number}. {prose(finding.title)} (`{finding.failure_mode}`)"
        else:
            yield f"### Consequence: {prose(finding.title)} (`{finding.failure_mode}`)"
        yield ""
        yield prose(finding.summary)
        yield ""
        yield from _facts(reported, report.snapshot)
        yield ""
        yield "Proof:"
        yield ""
        yield from _fenced(finding.evidence)
        if finding.advice and reported.depth == 0:
            yield ""
            yield "What to try:"
            yield ""
            yield from (f"{step}. {advice_of(advice)}" for step, advice in enumerate(finding.advice, 1))


def _facts(reported: ReportedFinding, snapshot: Snapshot) -> Iterator[str]:
    finding, caused_by = reported.finding, reported.caused_by
    about = who(finding, snapshot)
    if about:
        yield f"- Who: {prose(about)}"
    yield f"- Severity: {severity_of(finding).word}, {finding.confidence.word} confidence"
    if reported.silence is not None:
        yield f"- Silenced by the site {prose(silenced(reported.silence))}"
    if caused_by:
        yield f"- Because of: {listed(f'`{cause}`' for cause in caused_by)}"
    if finding.since is not None:
        yield f"- Since: {moment(finding.since)}"
    yield f"- Runbook: `gpu-doctor explain {finding.failure_mode}`"


def _fenced(evidence: tuple[Evidence, ...]) -> Iterator[str]:
    lines = [f"{plain(e.source)} {plain(e.where)}: {plain(e.text)}" for e in evidence]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}text"
    yield from lines
    yield fence


def _silenced(report: Report) -> Iterator[str]:
    quiet = [reported for incident in report.incidents if not is_open(incident) for reported in incident]
    if quiet:
        yield ""
        yield f"## Silenced by the site: {counted(len(quiet), 'finding')}, not in the verdict"
        yield ""
    for reported in quiet:
        if reported.silence is not None:
            finding = reported.finding
            yield f"- `{finding.failure_mode}` ({severity_of(finding).word}), {prose(silenced(reported.silence))}"
            yield f"  {prose(finding.summary)}"
    if report.ended_silences:
        yield ""
        yield "## Silences that have ended: renew or remove them"
        yield ""
        yield from (f"- {prose(f'{silence_subject(s)}, {silenced(s)}')}" for s in report.ended_silences)


def _blind_spots(report: Report) -> Iterator[str]:
    if report.unjudged:
        yield ""
        yield f"## Could not be judged: {counted(len(report.unjudged), 'failure mode')}"
        yield ""
        yield from (f"- `{unjudged.failure_mode}`: {prose(str(unjudged.why))}" for unjudged in report.unjudged)
    if report.unseen:
        yield ""
        yield "## Not seen"
        yield ""
        for unseen in report.unseen:
            part = f", {prose(unseen.what)}" if unseen.what else ""
            yield f"- {SOURCE_NAMES[unseen.source]}{part}: {prose(str(unseen.why))}"
    if report.quiet:
        yield ""
        yield f"Asked about and not present: {', '.join(f'`{failure_mode}`' for failure_mode in report.quiet)}."
    if report.switched_off:
        yield ""
        yield f"Switched off by the site: {', '.join(f'`{failure_mode}`' for failure_mode in report.switched_off)}."
