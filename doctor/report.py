"""A report: all findings, quiet rules and rules that could not be judged, after one visit."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

import msgspec

from doctor.rule import Confidence, Finding, Severity, Unjudged
from doctor.silence import Silence
from doctor.snapshot import Absent, Node, Snapshot, Source, Unseen, Why

SCHEMA = 1
"""Version of the JSON report; a field that changes its meaning raises it."""


class Verdict(enum.Enum):
    """The answer in one word."""

    CLEAR = "clear"
    NOTICE = "notice"
    WARNING = "warning"
    CRITICAL = "critical"
    INCOMPLETE = "incomplete"
    """Nothing fired, and an essential source was unseen, or a rule could not be asked at all, or saw what it can't tell."""

    @property
    def exit_code(self) -> int:
        """0 clear or notice, 1 warning, 2 critical, 3 incomplete."""
        return {"clear": 0, "notice": 0, "warning": 1, "critical": 2, "incomplete": 3}[self.value]


class ReportedFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A finding in its place in the chain of causes."""

    finding: Finding
    caused_by: tuple[str, ...] = ()
    """Failure modes of the findings above it that explain it; empty: a root cause."""
    depth: int = 0
    """0 for a root cause, 1 for its consequence, …"""
    silence: Silence | None = None
    """Not None: the site wants no alarm for it. It is told, and the verdict leaves it out."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with the node, why, and what could not be told."""

    at: float
    node: Node
    verdict: Verdict
    findings: tuple[ReportedFinding, ...]
    """Root causes first, worst first; each with its consequences right behind it."""
    unjudged: tuple[Unjudged, ...]
    quiet: tuple[str, ...]
    """Failure modes that were asked about and are not there."""
    switched_off: tuple[str, ...] = ()
    """Failure modes that the site does not want to be asked about."""
    silences: tuple[Silence, ...] = ()
    """All that the site declares, those that have ended too."""
    unseen: tuple[Unseen, ...]
    snapshot: Snapshot
    """The visit that was judged, for an exporter that shows values."""

    @property
    def roots(self) -> tuple[ReportedFinding, ...]:
        """The root cause of each incident."""
        return tuple(f for f in self.findings if f.depth == 0)

    @property
    def open(self) -> tuple[ReportedFinding, ...]:
        """The findings that are not silenced: those that the verdict counts."""
        return tuple(f for f in self.findings if f.silence is None)

    @property
    def leads(self) -> tuple[ReportedFinding, ...]:
        """The open findings that no other open one stands above: the root causes, as far as none is silenced."""
        leads: list[ReportedFinding] = []
        above: int | None = None
        for reported in self.findings:
            if above is None or reported.depth <= above:
                above = None
                if reported.silence is None:
                    leads.append(reported)
                    above = reported.depth
        return tuple(leads)

    @property
    def incidents(self) -> tuple[tuple[ReportedFinding, ...], ...]:
        """The findings by incident: each root cause with its consequences."""
        incidents: list[list[ReportedFinding]] = []
        for reported in self.findings:
            if reported.depth == 0:
                incidents.append([])
            incidents[-1].append(reported)
        return tuple(map(tuple, incidents))

    @property
    def ended_silences(self) -> tuple[Silence, ...]:
        """The silences that hold no more."""
        return tuple(silence for silence in self.silences if not silence.in_force(self.at))


def is_open(incident: Iterable[ReportedFinding]) -> bool:
    """Whether anything of an incident is not silenced."""
    return any(reported.silence is None for reported in incident)


def essential_sources(snapshot: Snapshot) -> frozenset[Source]:
    """Return the sources without which silence says nothing."""
    essential = {Source.NVML, Source.KERNEL_LOG}
    if any(engine.kind == "vllm" for engine in snapshot.engines):
        essential |= {Source.ENGINE_LOG, Source.ENGINE_METRICS}
    return frozenset(essential)


def passed_over(snapshot: Snapshot) -> tuple[Unseen, ...]:
    """Return what of the logs was read only in part: an over-long line, matching lines over the visit's bound."""
    return tuple(
        Unseen(Source.ENGINE_LOG, Absent(Why.PASSED_OVER, why), f"part of {log.log}")
        for log in snapshot.logs
        for number, why in (
            (log.long_lines, f"over-long lines of which only the beginning was read: {log.long_lines}"),
            (log.dropped, f"further lines that matter, counted and not kept: {log.dropped}"),
            (log.passed_over_bytes, f"earlier lives of the engine, not read: {log.passed_over_bytes >> 20} MiB"),
        )
        if number
    )


def verdict_of(
    findings: Iterable[Finding],
    snapshot: Snapshot,
    optional: frozenset[Source],
    unjudged: Iterable[Unjudged] = (),
) -> Verdict:
    """Return the verdict: the worst finding's, else whether something essential was unseen or a rule could not tell."""
    worst = max((f.severity for f in findings if f.severity is not None), default=None)
    if worst is not None and worst > Severity.NOTICE:
        return Verdict.CRITICAL if worst is Severity.CRITICAL else Verdict.WARNING
    for source in essential_sources(snapshot) - optional:
        why = snapshot.why_unseen(source)
        if why is not None and why.why is not Why.NOT_GIVEN:
            return Verdict.INCOMPLETE
    if any(answer.why.why in (Why.BROKEN, Why.NOT_KNOWN) for answer in unjudged):
        return Verdict.INCOMPLETE
    return Verdict.CLEAR if worst is None else Verdict.NOTICE


SIMULTANEOUS_SECONDS = 120.0
"""A cause may be seen this much later than its consequence: log stamps, kernel stamps and visits differ.

guess: two visits of the slowest collector."""


def _may_cause(cause: Finding, consequence: Finding) -> bool:
    if consequence.failure_mode not in cause.explains or not cause.subject.overlaps(consequence.subject):
        return False
    if cause.since is None or consequence.since is None:
        return True
    return cause.since <= consequence.since + SIMULTANEOUS_SECONDS


Rank = tuple[bool, int, int, float, str, str]
"""Open before silenced, worse before better, sure before unsure, early before late."""


def in_order_of_cause(
    findings: Sequence[Finding], silences: Sequence[Silence | None] = ()
) -> tuple[ReportedFinding, ...]:
    """Put root causes first, worst first, each with its consequences behind it, depth first.

    *silences*: what each finding is under. An incident of which nothing is open comes last.
    """
    silences = silences or [None] * len(findings)
    causes = {
        i: [j for j, cause in enumerate(findings) if j != i and _may_cause(cause, f)] for i, f in enumerate(findings)
    }

    def rank(i: int) -> Rank:
        f = findings[i]
        since = f.since if f.since is not None else float("inf")
        severity, confidence = f.severity or Severity.NOTICE, f.confidence or Confidence.LOW
        return (silences[i] is not None, -severity, -confidence, since, f.failure_mode, f.summary)

    placed: dict[int, ReportedFinding] = {}

    def place(i: int, depth: int) -> None:
        if i in placed:
            return
        caused_by = tuple(sorted({findings[j].failure_mode for j in causes[i]})) if depth else ()
        placed[i] = ReportedFinding(finding=findings[i], caused_by=caused_by, depth=depth, silence=silences[i])
        follow = sorted((j for j in causes if i in causes[j]), key=lambda j: rank(j)[1:])  # silence moves no link
        for j in follow:
            if not any(k in causes[j] and j not in causes[k] and k not in placed for k in follow):
                place(j, depth + 1)  # else it hangs below the nearer cause, which comes here too
        for j in follow:
            place(j, depth + 1)

    def weight(i: int) -> tuple[tuple[bool, int], Rank]:
        """Rank an incident by its worst member, so that a notice that explains an outage comes first."""
        reached, todo = {i}, [i]
        while todo:
            step = todo.pop()
            for j, of_j in causes.items():
                if step in of_j and j not in reached:
                    reached.add(j)
                    todo.append(j)
        return (min(rank(j)[:2] for j in reached), rank(i))

    for i in sorted((i for i in causes if not causes[i]), key=weight):
        place(i, 0)
    for i in sorted(causes, key=weight):  # two rules that explain each other: the worse one leads
        place(i, 0)
    return tuple(placed.values())
