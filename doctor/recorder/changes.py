"""What is different between the findings of two visits: each finding that came, changed or went is told once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from doctor.report import ReportedFinding


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
