"""What the flight recorder tells: which findings came and went, and when nobody looked."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.recorder.timeline import Episode, Gap, Timeline
from doctor.rule import Severity
from exporters.terminal import Terminal
from exporters.wording import counted, cut, moment, plain, severity_of

GAP_WORDS = {
    "daemon started": "the daemon was down, or started anew",
    "visits lost": "visits are not on record",
    "no visits": "no visit was made",
    "clock put back": "the clock was put back",
}


def render(timeline: Timeline, terminal: Terminal) -> str:
    """Return one line a finding or a gap, in the order of time; what is still present is marked."""
    if timeline.since is None or timeline.until is None:
        return "The recording holds no visit of that time.\n" + "".join(_unread(timeline))
    head = f"{counted(timeline.visits, 'visit')} from {moment(timeline.since)} to {moment(timeline.until)}"
    rows = [(e.appeared_at, _episode(e, terminal)) for e in timeline.episodes]
    rows += [(g.begin, terminal.dim(_gap(g))) for g in timeline.gaps]
    lines = [line for _, line in sorted(rows, key=lambda row: row[0])] or ["no finding and no gap"]
    return "\n".join([terminal.bold(head), *lines]) + "\n" + "".join(_unread(timeline))


def _episode(episode: Episode, terminal: Terminal) -> str:
    finding = episode.finding.finding
    severity = severity_of(finding)
    colour = {Severity.CRITICAL: terminal.red, Severity.WARNING: terminal.yellow}.get(severity, terminal.dim)
    if episode.cleared_at is None:
        lasted = "still present"
    else:
        lasted = f"cleared after {_lasted(episode.cleared_at - episode.appeared_at)}"
    if episode.changed_at:
        lasted += f", changed {counted(len(episode.changed_at), 'time')}"
    who = cut(plain(finding.summary), 200)
    return f"{moment(episode.appeared_at)}  {colour(severity.word)}  {finding.failure_mode} ({lasted}): {who}"


def _gap(gap: Gap) -> str:
    lost = f" ({gap.visits})" if gap.visits else ""
    return f"{moment(gap.begin)}  {_lasted(abs(gap.end - gap.begin))} gap: {GAP_WORDS[gap.why]}{lost}"


def _lasted(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _unread(timeline: Timeline) -> Iterator[str]:
    if timeline.unread:
        first = timeline.unread[0]
        yield f"{counted(len(timeline.unread), 'place')} of the recording could not be read; "
        yield f"the first: {first.segment}, byte {first.offset}: {first.why}\n"


def render_json(timeline: Timeline) -> bytes:
    """Return the same as JSON, times in Unix seconds."""
    told = {
        "since": timeline.since,
        "until": timeline.until,
        "visits": timeline.visits,
        "findings": [
            {
                "failure_mode": e.finding.finding.failure_mode,
                "severity": severity_of(e.finding.finding).word,
                "summary": plain(e.finding.finding.summary),
                "gpus": [plain(uuid) for uuid in e.finding.finding.subject.gpus],
                "engine": plain(e.finding.finding.subject.engine),
                "caused_by": e.finding.caused_by,
                "appeared_at": e.appeared_at,
                "changed_at": e.changed_at,
                "cleared_at": e.cleared_at,
            }
            for e in timeline.episodes
        ],
        "gaps": timeline.gaps,
        "unread": timeline.unread,
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"
