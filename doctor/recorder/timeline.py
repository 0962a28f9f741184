"""What the recording tells of a span of time: which findings came and went, and when nobody looked."""

from __future__ import annotations

from typing import Literal

import msgspec

from doctor.recorder.changes import changes
from doctor.recorder.folder import Folder, Unread
from doctor.recorder.frame import Frame, Mark
from doctor.report import ReportedFinding

PAUSE_INTERVALS = 3.0
"""Visits this many intervals apart leave a gap. guess: one visit may be slow, one may fail; as the daemon's page has it."""

PAUSE_MIN_SECONDS = 30.0
"""guess: a shorter gap is nobody's blind spot."""


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """A finding from its first visit to its last."""

    finding: ReportedFinding
    """As it was told last."""
    appeared_at: float
    cleared_at: float | None = None
    """None: it was present at the last visit."""
    changed_at: tuple[float, ...] = ()
    """When its severity, confidence, subject, causes or silence changed."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Time without a visit on record."""

    begin: float
    """The last visit before it."""
    end: float
    """The first one after it; before `begin` where the clock was put back."""
    why: Literal["daemon started", "visits lost", "no visits", "clock put back"]
    visits: int = 0
    """How many visits were made and are not on record."""


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A span of the recording."""

    since: float | None = None
    """The first visit; None: there is none."""
    until: float | None = None
    visits: int = 0
    episodes: tuple[Episode, ...] = ()
    """In the order in which they appeared; those that began before the span and reach into it are among them."""
    gaps: tuple[Gap, ...] = ()
    unread: tuple[Unread, ...] = ()


def timeline(folder: Folder, since: float = float("-inf"), until: float = float("inf")) -> Timeline:
    """Return what the folder tells of the time from *since* to *until*. Raises RecorderError."""
    present: list[Episode] = []
    past: list[Episode] = []
    gaps: list[Gap] = []
    before: Frame | None = None
    first: float | None = None
    last: float | None = None
    visits = 0
    usual = 0.0
    for frame, entry in folder.walk(lambda frame: Mark.FINDINGS in frame.marks):
        inside = since <= frame.at <= until
        if before is not None and inside:
            gaps += _gap(before, frame, usual)
        if before is not None and frame.number == before.number + 1 and Mark.START not in frame.marks:
            seconds = abs(frame.at - before.at)
            usual = 0.9 * usual + 0.1 * min(seconds, 2 * usual) if usual else seconds
        before = frame
        if inside:
            first = frame.at if first is None else first
            last = frame.at
            visits += 1
        if entry is not None and entry.findings is not None and frame.at <= until:
            present = _after(present, entry.findings, frame.at, past)
    told = [e for e in (*past, *present) if e.cleared_at is None or e.cleared_at >= since]
    return Timeline(
        since=first,
        until=last,
        visits=visits,
        episodes=tuple(sorted(told, key=lambda episode: episode.appeared_at)) if visits else (),
        gaps=tuple(gaps),
        unread=tuple(folder.unread),
    )


def _gap(before: Frame, after: Frame, usual: float) -> list[Gap]:
    seconds = after.at - before.at
    lost = after.number - before.number - 1
    if Mark.START in after.marks:
        return [Gap(begin=before.at, end=after.at, why="daemon started")]
    if lost > 0:
        return [Gap(begin=before.at, end=after.at, why="visits lost", visits=lost)]
    if seconds < 0:
        return [Gap(begin=before.at, end=after.at, why="clock put back")]
    if usual and seconds > max(PAUSE_INTERVALS * usual, PAUSE_MIN_SECONDS):
        return [Gap(begin=before.at, end=after.at, why="no visits")]
    return []


def _after(
    present: list[Episode], findings: tuple[ReportedFinding, ...], at: float, past: list[Episode]
) -> list[Episode]:
    """Return the episodes that are present after *findings* were told; those that ended go to *past*."""
    left = list(present)
    now: list[Episode] = []
    for finding in findings:
        episode = next(
            (e for e in left if not any(c.what == "appeared" for c in changes([e.finding], [finding]))), None
        )
        if episode is None:
            now.append(Episode(finding=finding, appeared_at=at))
            continue
        left.remove(episode)
        changed = any(changes([episode.finding], [finding]))
        moments = (*episode.changed_at, at) if changed else episode.changed_at
        now.append(msgspec.structs.replace(episode, finding=finding, changed_at=moments))
    past += [msgspec.structs.replace(episode, cleared_at=at) for episode in left]
    return now
