"""The daemon: one report at a time, its changes logged, ended gently."""

from __future__ import annotations

import signal

import msgspec
import pytest
import reports
from daemons import PROGRAM, await_true, running

from doctor.recorder.changes import Change, SourcesTold, Told, changes
from doctor.report import ReportedFinding
from doctor.rule import Confidence, Severity
from doctor.snapshot import Absent, Snapshot, Source, Unseen, Why


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


def flapping(*findings: ReportedFinding) -> list[str]:
    """Return what is told of 200 visits that find each of these by turns, or nothing."""
    told = Told()
    return [change.what for number in range(200) for change in told.after(findings[number % len(findings) :][:1])]


def test_a_finding_that_flaps_is_told_once() -> None:
    assert flapping(LOST, LOST, reported(reports.TIMEOUT)) == ["appeared", "appeared"]
    told = Told()
    visits = [(LOST,), (LOST,), (), ()] * 50
    assert [change.what for visit in visits for change in told.after(visit)] == ["appeared"]
    assert [change.what for _ in range(200) for change in told.after(())] == ["cleared"]


def test_a_finding_whose_values_flap_is_told_once_and_when_it_gets_worse() -> None:
    warning, unsure = altered(reports.LOST, severity=Severity.WARNING), altered(reports.LOST, confidence=Confidence.LOW)
    assert flapping(LOST, altered(reports.LOST, summary="another number")) == ["appeared"]
    assert flapping(LOST, warning) == ["appeared"]
    assert flapping(warning, LOST) == ["appeared", "changed"]
    assert flapping(LOST, unsure, warning) == ["appeared"]


def test_a_finding_that_has_got_better_is_told_when_that_lasts() -> None:
    told = Told()
    warning = altered(reports.LOST, severity=Severity.WARNING)
    visits = [(LOST,), (warning,), (LOST,), (warning,), (warning,), (warning,), (warning,)]
    assert [[change.what for change in told.after(visit)] for visit in visits] == [
        ["appeared"], [], [], [], [], ["changed"], [],
    ]  # fmt: skip


def test_the_gpus_of_a_finding_are_told_as_they_come() -> None:
    def with_gpus(*indices: int) -> ReportedFinding:
        return altered(
            reports.LOST,
            subject=msgspec.structs.replace(reports.LOST.subject, gpus=tuple(reports.uuid(i) for i in indices)),
        )

    told = Told()
    visits = [with_gpus(2), with_gpus(2, 3), with_gpus(2), with_gpus(2, 3), with_gpus(1, 2), with_gpus(2)] * 30
    assert [change.what for visit in visits for change in told.after((visit,))] == ["appeared", "changed", "changed"]


def test_what_was_told_before_a_restart_is_not_told_again_and_what_cleared_meanwhile_is() -> None:
    told = Told()
    told.go_on([(), (LOST,), (LOST,), ()])
    assert list(told.after((LOST,))) == []
    told.go_on([(), ()])
    assert [change.what for change in told.after(())] == ["cleared"]


def test_a_source_that_fails_is_told_once_a_change() -> None:
    def visit(*unseen: tuple[Source, Why]) -> Snapshot:
        sources = tuple(Unseen(source, Absent(why, f"for {len(unseen)} s")) for source, why in unseen)
        return Snapshot(at=0.0, seen=(Source.NVML,) if not unseen else (), unseen=sources)

    told = SourcesTold()
    failed, denied = visit((Source.NVML, Why.FAILED)), visit((Source.NVML, Why.NO_PERMISSION))
    flapping = [failed, denied, visit(), failed] * 25
    visits = [visit(), *[failed] * 50, *flapping, *[denied] * 50, *[visit()] * 50]
    assert [change.why and change.why.why for each in visits for change in told.after(each)] == [
        Why.FAILED, Why.NO_PERMISSION, None,
    ]  # fmt: skip
