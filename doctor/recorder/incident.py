"""A moment of the past, judged again: the worst visit of a window, with the hour that the rules remember before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from doctor.recorder.folder import Folder, RecorderError
from doctor.report import Report
from doctor.snapshot import Absent, Snapshot, Source, Unseen, Why

Watch = Callable[[Iterable[Snapshot], Sequence[Snapshot]], Iterator[Report]]
"""The one path, from visits and those before them to reports."""


def worst_report(folder: Folder, at: float, window_seconds: float, keep_seconds: float, watch: Watch) -> Report:
    """Return the report of the worst visit in the window around *at*, the nearest where several are as bad.

    What of the recording could not be read is unseen in it. Raises RecorderError where the window holds no visit.
    """
    begin, end = at - window_seconds / 2, at + window_seconds / 2
    snapshots = [entry.snapshot for entry in folder.entries(begin - keep_seconds, end)]
    first = next((place for place, snapshot in enumerate(snapshots) if snapshot.at >= begin), len(snapshots))
    past, visits = snapshots[:first], snapshots[first:]
    if not visits:
        raise RecorderError(
            f"{folder.directory}: no visit was recorded in that window; `gpu-doctor history` shows the gaps"
        )

    def badness(report: Report) -> tuple[int, int, int, float]:
        severities = [reported.finding.severity or 0 for reported in report.open]
        return (max(severities, default=0), sum(severities), len(report.findings), -abs(report.at - at))

    # Where the clock was put back, a time comes twice, and visits of before the window stand between those in it.
    worst = max((report for report in watch(visits, past) if report.at >= begin), key=badness)
    if not folder.unread:
        return worst
    why = Absent(Why.PASSED_OVER, f"places of the recording that could not be read: {len(folder.unread)}")
    return msgspec.structs.replace(worst, unseen=(*worst.unseen, Unseen(Source.RECORDER, why, "part of the recording")))
