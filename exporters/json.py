"""The report as JSON: for programs, stable, described by `docs/report.schema.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from doctor.report import SCHEMA, Report, ReportedFinding, Verdict
from doctor.rule import Confidence, Severity
from doctor.silence import Silence
from doctor.snapshot import or_none
from exporters.wording import plain, severity_of


def _one_of(words: Iterable[str]) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema={"enum": list(words)})


VerdictWord = Annotated[str, _one_of(verdict.value for verdict in Verdict)]
SeverityWord = Annotated[str, _one_of(severity.word for severity in Severity)]
ConfidenceWord = Annotated[str, _one_of(confidence.word for confidence in Confidence)]
UnixTime = Annotated[float, msgspec.Meta(description="Unix time, seconds")]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """Which machine was judged."""

    name: str
    booted_at: UnixTime | None
    simulated: bool


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of proof: which source, where in it, what it says there."""

    source: str
    where: str
    text: str


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Who a finding is about; all empty: the node."""

    gpus: Annotated[list[str], msgspec.Meta(description="UUIDs; `index:N` where the evidence tells none")]
    links: Annotated[list[str], msgspec.Meta(description="`UUID/link`")]
    ranks: Annotated[list[str], msgspec.Meta(description="As the engine names them: `TP2`")]
    engine: Annotated[str, msgspec.Meta(description="`pid@start time`, or the log file in triage")]
    pids: list[int]


class Silenced(msgspec.Struct, frozen=True, kw_only=True):
    """Why a finding raises no alarm: the site said so."""

    until: UnixTime
    reason: str
    by: str


class DeclaredSilence(Silenced, frozen=True, kw_only=True):
    """A silence that the site declares."""

    failure_mode: str
    gpus: Annotated[list[str], msgspec.Meta(description="As declared: UUIDs, PCI addresses or indices; empty: any")]
    engine: Annotated[str, msgspec.Meta(description="As declared; empty: any")]
    ended: Annotated[bool, msgspec.Meta(description="It holds no more: renew it or remove it")]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A failure mode that is present."""

    failure_mode: str
    severity: SeverityWord
    confidence: ConfidenceWord
    title: str
    summary: str
    subject: Subject
    evidence: Annotated[list[Evidence], msgspec.Meta(description="The strongest first")]
    caused_by: Annotated[list[str], msgspec.Meta(description="Failure modes that explain it; empty: a root cause")]
    since: UnixTime | None
    advice: Annotated[list[str], msgspec.Meta(description="What to try, in this order")]
    runbook: Annotated[str, msgspec.Meta(description="The command that shows the runbook")]
    silenced: Annotated[Silenced | None, msgspec.Meta(description="Not null: the verdict leaves it out")]


class Unjudged(msgspec.Struct, frozen=True, kw_only=True):
    """A failure mode that could not be judged, and why."""

    failure_mode: str
    why: str


class Unseen(msgspec.Struct, frozen=True, kw_only=True):
    """A source, or a part of one, that the last visit could not see."""

    source: str
    what: Annotated[str, msgspec.Meta(description="The part; empty: the whole source")]
    why: str


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A report of gpu-doctor: what is wrong with the node, why, and what could not be told."""

    schema: Annotated[int, msgspec.Meta(description="Version; a field that changes its meaning raises it")]
    at: UnixTime
    node: Node
    verdict: VerdictWord
    findings: Annotated[
        list[Finding], msgspec.Meta(description="Root causes first, worst first; consequences right behind their cause")
    ]
    unjudged: list[Unjudged]
    quiet: Annotated[list[str], msgspec.Meta(description="Failure modes that were asked about and are not there")]
    switched_off: Annotated[list[str], msgspec.Meta(description="Failure modes that the site does not ask about")]
    silences: Annotated[list[DeclaredSilence], msgspec.Meta(description="All that the site declares, by their end")]
    unseen: list[Unseen]


def render(report: Report) -> bytes:
    """Return the report as one JSON document with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(document(report)), indent=2) + b"\n"


def schema() -> bytes:
    """Return the JSON Schema of a report, as it stands in `docs/report.schema.json`."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(Document)
    return msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"


def document(report: Report) -> Document:
    """Return the report as the values that are written."""
    return Document(
        schema=SCHEMA,
        at=report.at,
        node=Node(
            name=plain(report.node.name),
            booted_at=or_none(report.node.booted_at),
            simulated=report.node.simulated,
        ),
        verdict=report.verdict.value,
        findings=[_finding(reported) for reported in report.findings],
        unjudged=[Unjudged(failure_mode=u.failure_mode, why=plain(str(u.why))) for u in report.unjudged],
        quiet=list(report.quiet),
        switched_off=list(report.switched_off),
        silences=[_declared(silence, report.at) for silence in report.silences],
        unseen=[Unseen(source=u.source.value, what=plain(u.what), why=plain(str(u.why))) for u in report.unseen],
    )


def _finding(reported: ReportedFinding) -> Finding:
    finding = reported.finding
    subject = finding.subject
    return Finding(
        failure_mode=finding.failure_mode,
        severity=severity_of(finding).word,
        confidence=finding.confidence.word,
        title=finding.title,
        summary=plain(finding.summary),
        subject=Subject(
            gpus=[plain(uuid) for uuid in subject.gpus],
            links=[plain(link) for link in subject.links],
            ranks=[plain(rank) for rank in subject.ranks],
            engine=plain(subject.engine),
            pids=list(subject.pids),
        ),
        evidence=[Evidence(source=plain(e.source), where=plain(e.where), text=plain(e.text)) for e in finding.evidence],
        caused_by=list(reported.caused_by),
        since=finding.since,
        advice=[plain(advice) for advice in finding.advice],
        runbook=f"gpu-doctor explain {finding.failure_mode}",
        silenced=_silenced(reported.silence),
    )


def _silenced(silence: Silence | None) -> Silenced | None:
    if silence is None:
        return None
    return Silenced(until=float(silence.until), reason=plain(silence.reason), by=plain(silence.by))


def _declared(silence: Silence, at: float) -> DeclaredSilence:
    return DeclaredSilence(
        failure_mode=silence.rule,
        gpus=[plain(str(name)) for name in silence.gpus],
        engine=plain(silence.engine),
        until=float(silence.until),
        reason=plain(silence.reason),
        by=plain(silence.by),
        ended=not silence.in_force(at),
    )
