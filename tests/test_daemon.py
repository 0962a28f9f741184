"""The daemon: one report at a time, its changes logged, ended gently."""

from __future__ import annotations

import signal

import msgspec
import pytest
import reports
from daemons import PROGRAM, await_true, running

from doctor.recorder.changes import Change, changes
from doctor.report import ReportedFinding
from doctor.rule import Confidence, Severity


def test_the_log_tells_what_appears_changes_and_clears_and_nothing_twice() -> None:
    with running(PROGRAM, "clear,lost,lost,two,clear", "0.1") as daemon:
        daemon.await_event("finding cleared")
        told = [e for e in daemon.log if str(e["event"]).startswith("finding")]
    assert [e["event"] for e in told] == ["finding appeared", "finding changed", "finding cleared"]
    appeared, changed, cleared = told
    assert appeared["failure_mode"] == "gpu-lost"
    assert appeared["severity"] == "critical"
    assert appeared["gpus"] == [reports.uuid(2)]
    assert str(appeared["summary"]).isprintable()
    assert (appeared["level"], cleared["level"]) == ("warning", "info")
    assert changed["gpus"] == [reports.uuid(2), reports.uuid(3)]
    assert "timestamp" in appeared


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gently(number: int) -> None:
    with running(PROGRAM, "clear", "0.1") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        assert daemon.end(number) == 0
        events = [e["event"] for e in daemon.log]
        assert events[-2:] == ["closed", "ended"], "the feed was closed, and nothing was printed but events"


def reported(finding: object, **more: object) -> ReportedFinding:
    return ReportedFinding(finding=finding, **more)  # type: ignore[arg-type]


def altered(finding: object, **fields: object) -> ReportedFinding:
    return reported(msgspec.structs.replace(finding, **fields))  # type: ignore[type-var]


LOST = reported(reports.LOST)


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (LOST, []),
        (altered(reports.LOST, summary="another number"), []),
        (altered(reports.LOST, severity=Severity.WARNING), ["changed"]),
        (altered(reports.LOST, confidence=Confidence.LOW), ["changed"]),
        (reported(reports.LOST, caused_by=("driver-unresponsive",), depth=1), ["changed"]),
        (reported(reports.TIMEOUT), ["appeared", "cleared"]),
    ],
)
def test_what_counts_as_a_change(after: ReportedFinding, what: list[str]) -> None:
    assert [change.what for change in changes((LOST,), (after,))] == what


def test_findings_about_two_gpus_are_not_mistaken_for_each_other() -> None:
    subject = reports.LOST.subject
    other = altered(reports.LOST, subject=msgspec.structs.replace(subject, gpus=(reports.uuid(3),)))
    assert list(changes((LOST, other), (other, LOST))) == []
    assert list(changes((LOST, other), (other,))) == [Change("cleared", LOST)]
