"""What is different between visits: each finding that came, changed or went, and each source that was lost or came back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from doctor.report import ReportedFinding
from doctor.snapshot import Absent, Snapshot, Source, Why

CALM_VISITS = 3
"""A finding is gone, or better than it was, when this many visits in a row say so. guess: a value at its limit crosses
it at most of them, and one visit may be blind."""


class Change(msgspec.Struct, frozen=True):
    """A finding that appeared, changed or cleared between two reports."""

    what: Literal["appeared", "changed", "cleared"]
    finding: ReportedFinding


def changes(before: Sequence[ReportedFinding], after: Sequence[ReportedFinding]) -> Iterator[Change]:
    """Yield what is different, in the order of the report; what cleared comes last.

    A finding is the same while its failure mode and its subject are, or overlap; it changes when its severity,
    confidence, subject, causes or silence do. Its sentence may tell new numbers at every visit: that is no change.
    """
    left = list(before)
    for now in after:
        was = next((old for old in left if _same_subject(old, now)), None)
        was = was or next((old for old in left if _may_be_the_same(old, now)), None)
        if was is None:
            yield Change("appeared", now)
            continue
        left.remove(was)
        if _character(was) != _character(now):
            yield Change("changed", now)
    yield from (Change("cleared", old) for old in left)


def _same_subject(one: ReportedFinding, other: ReportedFinding) -> bool:
    a, b = one.finding, other.finding
    return (a.failure_mode, a.subject) == (b.failure_mode, b.subject)


def _may_be_the_same(one: ReportedFinding, other: ReportedFinding) -> bool:
    a, b = one.finding, other.finding
    return a.failure_mode == b.failure_mode and a.subject.overlaps(b.subject)


def _character(reported: ReportedFinding) -> tuple[object, ...]:
    finding = reported.finding
    return (finding.severity, finding.confidence, finding.subject, reported.caused_by, reported.silence)


class Told:
    """What was told of the findings: each that comes, gets worse, changes or goes is told once, however it flaps.

    What is new or worse is told at once; what is gone or otherwise different when it has lasted for `CALM_VISITS`.
    """

    def __init__(self) -> None:
        self._told: list[_Telling] = []

    def go_on(self, findings: Iterable[Sequence[ReportedFinding]]) -> None:
        """Take for told what the visits of an earlier life of the daemon found."""
        for of_visit in findings:
            for _ in self.after(of_visit):
                pass

    def after(self, findings: Sequence[ReportedFinding]) -> Iterator[Change]:
        """Yield what is to be told after a visit that found these."""
        left = list(self._told)
        for now in findings:
            telling = next((old for old in left if _same_subject(old.latest, now)), None)
            telling = telling or next((old for old in left if _may_be_the_same(old.latest, now)), None)
            if telling is None:
                self._told.append(_Telling(now))
                yield Change("appeared", now)
                continue
            left.remove(telling)
            if telling.changed_to(now):
                yield Change("changed", now)
        for telling in left:
            telling.absent += 1
            if telling.absent >= CALM_VISITS:
                self._told.remove(telling)
                yield Change("cleared", telling.latest)


class _Telling:
    """A finding that was told."""

    def __init__(self, finding: ReportedFinding) -> None:
        self.latest = finding
        """As the last visit that had it saw it."""
        self.absent = 0
        """Visits in a row that did not see it."""
        self._told = finding
        self._gpus = set(finding.finding.subject.gpus)
        """All that were told to be concerned."""
        self._alike = 0
        """Visits in a row that saw it as it is now, and not as it was told."""

    def changed_to(self, now: ReportedFinding) -> bool:
        """Take note of how it is now, and return whether that is to be told."""
        self._alike = self._alike + 1 if _character(now) == _character(self.latest) else 1
        self.latest, self.absent = now, 0
        if _character(now) == _character(self._told):
            return False
        worse = (now.finding.severity or 0) > (self._told.finding.severity or 0)
        further = not self._gpus.issuperset(now.finding.subject.gpus)
        if not (worse or further or self._alike >= CALM_VISITS):
            return False
        self._told = now
        self._gpus.update(now.finding.subject.gpus)
        return True


class SourceChange(msgspec.Struct, frozen=True):
    """A source that can't be seen any more, for another reason than before, or again."""

    source: Source
    why: Absent | None
    """None: it is seen."""


class SourcesTold:
    """What was told of the sources: one that is lost is told at once; back, or lost otherwise, when that has lasted."""

    def __init__(self) -> None:
        self._told: dict[Source, Why] = {}
        """Those that were told to be unseen."""
        self._now: dict[Source, tuple[Why | None, int]] = {}
        """How each of these fares now instead, and for how many visits in a row."""

    def after(self, snapshot: Snapshot) -> Iterator[SourceChange]:
        """Yield what is to be told after a visit."""
        for source in Source:
            absent = snapshot.why_unseen(source)
            why = None if absent is None or absent.why is Why.NOT_ASKED else absent.why
            told = self._told.get(source)
            before, alike = self._now.pop(source, (why, 0))
            if why is told:
                continue
            self._now[source] = why, alike + 1 if before is why else 1
            if told is not None and self._now[source][1] < CALM_VISITS:
                continue
            del self._now[source]
            if why is None:
                del self._told[source]
            else:
                self._told[source] = why
            yield SourceChange(source, absent if why is not None else None)
