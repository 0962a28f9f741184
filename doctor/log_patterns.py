"""Rules made of a site's `[[log_patterns]]`: the lines that the readers kept for them, counted and told."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.readers.patterns import LogPattern
from doctor.rule import AnyRule, Confidence, Evidence, Finding, Rule, Severity, Subject
from doctor.snapshot import EngineEvent, HostMessage, Source

EVIDENCE_MAX = 5
"""Lines that a finding shows: the first and the last ones."""


class Limits(msgspec.Struct, frozen=True):
    """What the section says, for `[rules.<id>]` to change."""

    at_least: int
    window_seconds: float | None


class _Line(msgspec.Struct, frozen=True):
    text: str
    where: str
    log: str
    at: float | None
    count: int = 1


def rule_of(pattern: LogPattern) -> AnyRule:
    """Return the rule that a pattern stands for."""
    source = Source(pattern.source)

    def judgement(history: History, limits: Limits) -> Iterator[Finding]:
        by_log: dict[str, list[_Line]] = {}
        for line in _lines(pattern, history, limits.window_seconds):
            by_log.setdefault(line.log, []).append(line)
        engines = {engine.log: engine.id for engine in history.latest.engines if isinstance(engine.log, str)}
        for log, lines in by_log.items():
            number = sum(line.count for line in lines)
            if number >= limits.at_least:
                yield _finding(pattern, lines, number, Subject(engine=engines.get(log, log)))

    rule = Rule(
        judgement,
        id=pattern.id,
        title=pattern.title,
        severity=Severity[pattern.severity.upper()],
        needs=(source,),
        explains=pattern.explains,
        limits=Limits(pattern.at_least, pattern.window_seconds),
    )
    rule.page = _runbook(pattern)
    return rule


def _lines(pattern: LogPattern, history: History, window_seconds: float | None) -> Iterator[_Line]:
    oldest = float("-inf") if window_seconds is None else history.now - window_seconds
    for visit in history.snapshots:
        for event in (*visit.engine_events, *visit.kernel):
            if (visit.at if event.at is None else event.at) < oldest:
                continue
            if isinstance(event, EngineEvent) and event.signal == pattern.signal:
                yield _Line(event.text, event.where, event.log, event.at, event.count)
            elif isinstance(event, HostMessage) and event.kind == pattern.signal and not event.before_boot:
                yield _Line(event.text, event.where, "", event.at)


def _finding(pattern: LogPattern, lines: list[_Line], number: int, subject: Subject) -> Finding:
    last = lines[-1]
    shown = lines if len(lines) <= EVIDENCE_MAX else [lines[0], *lines[1 - EVIDENCE_MAX :]]
    log = "engine's log" if pattern.source == "engine-log" else "kernel log"
    told = f"{number} lines of the {log} tell it, the last" if number > 1 else f"A line of the {log} tells it"
    return Finding(
        summary=f"{told}: {last.text}",
        evidence=tuple(Evidence(pattern.source, line.where, line.text) for line in shown),
        confidence=Confidence.MEDIUM,
        subject=subject,
        since=next((line.at for line in lines if line.at is not None), None),
        facts=pattern.facts_in(last.text) or {},
    )


def _runbook(pattern: LogPattern) -> str:
    meaning = f"{pattern.title}. A pattern of this site's configuration: the {pattern.source} says `{pattern.text}`."
    steps = "\n".join(f"{number}. {' '.join(step.split())}" for number, step in enumerate(pattern.fix, 1))
    return f"# {pattern.title}\n\n## Meaning\n\n{meaning}\n\n## Fix\n\n{steps or 'The site names no fix.'}\n"
