"""The flight recorder can't write: what this node sees now is gone when the daemon ends."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Evidence, Finding, NoLimits, Severity, rule
from doctor.snapshot import Source


@rule(
    "recorder-failing",
    "gpu-doctor's flight recorder can't write to its disk",
    severity=Severity.WARNING,
    needs=(),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Say why, since when, and what is held in memory meanwhile."""
    recorder = history.latest.recorder
    if recorder.failing_since is None:
        return
    seconds = max(0.0, history.now - recorder.failing_since)
    lost = f", and {recorder.lost} were given up" if recorder.lost else ""
    yield Finding(
        summary=f"{recorder.directory}: {recorder.failure}; no visit was recorded for {seconds:.0f} s, "
        f"{recorder.waiting} wait in memory{lost}",
        evidence=(Evidence(Source.RECORDER.value, recorder.directory, recorder.failure),),
        since=recorder.failing_since,
        facts={"directory": recorder.directory},
    )
