"""The one path: three answers, the verdict, and causes before consequences."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from doctor.diagnose import watch
from doctor.history import History, measured_once
from doctor.report import Report, Verdict
from doctor.rule import AnyRule, Confidence, Evidence, Finding, NoLimits, Rule, Severity, Subject
from doctor.snapshot import NOT_GIVEN, Absent, Engine, LogState, Snapshot, Source, Unseen, Why

ALL_SEEN = (Source.NVML, Source.KERNEL_LOG, Source.ENGINE_LOG, Source.ENGINE_METRICS)


class Stub(Rule[NoLimits]):
    """A rule that answers what the test says, and has a runbook that lies in no file."""

    @property
    def runbook(self):  # type: ignore[override]
        from doctor.readers import runbook

        return runbook.read("# Stub\n\n## Fix\n\n1. look at <gpu-index>\n2. look again\n")


def rule_that(
    *answers: Finding | Absent,
    id: str = "stub",  # noqa: A002
    severity: Severity = Severity.CRITICAL,
    needs: tuple[Source, ...] = (Source.NVML,),
    explains: tuple[str, ...] = (),
) -> AnyRule:
    def judgement(history: History, limits: NoLimits) -> Iterator[Finding | Absent]:
        yield from answers

    return Stub(judgement, id=id, title=id, severity=severity, needs=needs, explains=explains, limits=NoLimits())


def finding(summary: str = "it is so", **more: object) -> Finding:
    return Finding(summary=summary, evidence=(Evidence("nvml", "field", "1"),), **more)  # type: ignore[arg-type]


def report_of(*rules: AnyRule, snapshot: Snapshot | None = None, optional: frozenset[Source] = frozenset()) -> Report:
    (report,) = watch([snapshot or Snapshot(at=1000.0, seen=ALL_SEEN)], rules, 60, optional)
    return report


def test_a_rule_that_yields_nothing_and_saw_what_it_needs_is_quiet() -> None:
    report = report_of(rule_that())
    assert (report.verdict, report.quiet, report.unjudged) == (Verdict.CLEAR, ("stub",), ())


def test_blindness_is_not_health() -> None:
    blind = Snapshot(
        at=1.0,
        seen=(Source.KERNEL_LOG,),
        unseen=(Unseen(Source.NVML, Absent(Why.NO_PERMISSION, "run it as root")),),
    )
    report = report_of(rule_that(), snapshot=blind)
    assert report.quiet == ()
    assert "run it as root" in report.unjudged[0].why.detail
    assert report.verdict is Verdict.INCOMPLETE
    assert report.verdict.exit_code == 3


def test_what_a_blind_rule_finds_in_other_sources_counts() -> None:
    blind = Snapshot(at=1.0, unseen=(Unseen(Source.NVML, Absent(Why.TIMED_OUT)),))
    report = report_of(rule_that(finding()), snapshot=blind)
    assert (report.verdict, report.unjudged) == (Verdict.CRITICAL, ())


def test_a_rule_may_say_itself_that_it_cannot_judge() -> None:
    report = report_of(rule_that(Absent(Why.NOT_SUPPORTED, "MIG hides the counters")))
    assert report.quiet == ()
    assert report.unjudged[0].why.detail == "MIG hides the counters"


def test_evidence_that_was_not_given_is_no_reason_for_incomplete() -> None:
    pasted = Snapshot(at=1.0, unseen=tuple(Unseen(source, NOT_GIVEN) for source in Source))
    report = report_of(rule_that(), snapshot=pasted)
    assert (report.verdict, report.quiet) == (Verdict.CLEAR, ())
    assert report.unjudged[0].why.why is Why.NOT_GIVEN


def test_an_optional_source_unseen_leaves_the_report_complete_and_still_says_so() -> None:
    blind = Snapshot(at=1.0, seen=(Source.NVML,), unseen=(Unseen(Source.KERNEL_LOG, Absent(Why.NO_PERMISSION)),))
    assert report_of(snapshot=blind).verdict is Verdict.INCOMPLETE
    report = report_of(snapshot=blind, optional=frozenset({Source.KERNEL_LOG}))
    assert report.verdict is Verdict.CLEAR
    assert report.unseen == blind.unseen


def test_the_engine_s_log_is_essential_only_where_an_engine_runs() -> None:
    without = Snapshot(at=1.0, seen=(Source.NVML, Source.KERNEL_LOG))
    assert report_of(snapshot=without).verdict is Verdict.CLEAR
    engine = Engine(pid=1, started_at=0.0, kind="vllm")
    assert report_of(snapshot=msgspec.structs.replace(without, engines=(engine,))).verdict is Verdict.INCOMPLETE


@pytest.mark.parametrize(
    ("severity", "verdict", "code"),
    [
        (Severity.NOTICE, Verdict.NOTICE, 0),
        (Severity.WARNING, Verdict.WARNING, 1),
        (Severity.CRITICAL, Verdict.CRITICAL, 2),
    ],
)
def test_the_verdict_is_the_worst_finding_s(severity: Severity, verdict: Verdict, code: int) -> None:
    report = report_of(rule_that(finding(), id="a", severity=severity), rule_that(id="b"))
    assert (report.verdict, report.verdict.exit_code) == (verdict, code)


def test_a_notice_does_not_hide_that_something_essential_was_unseen() -> None:
    blind = Snapshot(at=1.0, unseen=(Unseen(Source.NVML, Absent(Why.FAILED)),))
    report = report_of(rule_that(finding(), severity=Severity.NOTICE), snapshot=blind)
    assert report.verdict is Verdict.INCOMPLETE


def chain(report: Report) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(f.finding.failure_mode, f.depth, f.caused_by) for f in report.findings]


def test_causes_stand_before_their_consequences() -> None:
    report = report_of(
        rule_that(finding(since=30.0), id="engine-crashed"),
        rule_that(finding(since=20.0), id="nccl-timeout", explains=("engine-crashed",)),
        rule_that(finding(since=10.0), id="gpu-lost", explains=("nccl-timeout", "engine-crashed")),
        rule_that(finding(), id="unrelated", severity=Severity.WARNING),
    )
    assert chain(report) == [
        ("gpu-lost", 0, ()),
        ("nccl-timeout", 1, ("gpu-lost",)),
        ("engine-crashed", 2, ("gpu-lost", "nccl-timeout")),
        ("unrelated", 0, ()),
    ]
    assert [root.finding.failure_mode for root in report.roots] == ["gpu-lost", "unrelated"]


def test_a_mild_cause_of_a_grave_consequence_leads_its_incident() -> None:
    report = report_of(
        rule_that(finding(), id="grave"),
        rule_that(finding(), id="mild", severity=Severity.WARNING, explains=("grave",)),
        rule_that(finding(), id="other", severity=Severity.WARNING),
    )
    assert [name for name, *_ in chain(report)] == ["mild", "grave", "other"]


def test_what_comes_long_after_is_no_cause() -> None:
    report = report_of(
        rule_that(finding(since=10.0), id="effect"),
        rule_that(finding(since=5000.0), id="later", explains=("effect",)),
    )
    assert [depth for _, depth, _ in chain(report)] == [0, 0]


def test_a_fault_of_another_gpu_is_no_cause() -> None:
    report = report_of(
        rule_that(finding(subject=Subject(gpus=("A",))), id="effect"),
        rule_that(finding(subject=Subject(gpus=("B",))), id="cause", explains=("effect",)),
    )
    assert [depth for _, depth, _ in chain(report)] == [0, 0]


def test_two_rules_that_explain_each_other_do_not_loop() -> None:
    report = report_of(
        rule_that(finding(), id="a", explains=("b",), severity=Severity.WARNING),
        rule_that(finding(), id="b", explains=("a",)),
    )
    assert sorted(name for name, *_ in chain(report)) == ["a", "b"]


def test_advice_is_filled_in_and_an_unknown_placeholder_stays() -> None:
    known = report_of(rule_that(finding(facts={"gpu-index": "3"}))).findings[0].finding
    assert known.advice == ("look at 3", "look again")
    assert report_of(rule_that(finding())).findings[0].finding.advice[0] == "look at <gpu-index>"


def test_the_history_forgets_what_is_older_than_keep() -> None:
    seen: list[list[float]] = []

    def judgement(history: History, limits: NoLimits) -> Iterator[Finding]:
        seen.append([s.at for s in history.snapshots])
        return iter(())

    spy = Stub(judgement, id="spy", title="", severity=Severity.NOTICE, needs=(), explains=(), limits=NoLimits())
    list(watch([Snapshot(at=t) for t in (0.0, 10.0, 20.0, 30.0)], [spy], keep=15))
    assert seen == [[0.0], [0.0, 10.0], [10.0, 20.0], [20.0, 30.0]]


def test_a_symptom_is_measured_once_a_visit() -> None:
    asked: list[float] = []

    @measured_once
    def symptom(history: History) -> int:
        asked.append(history.now)
        return len(history.snapshots)

    history = History((Snapshot(at=1.0),), keep=60)
    assert (symptom(history), symptom(history), asked) == (1, 1, [1.0])
    assert symptom(history.after(Snapshot(at=2.0))) == 2


def test_what_was_read_only_in_part_is_said() -> None:
    cut = Snapshot(at=1.0, seen=ALL_SEEN, logs=(LogState(log="vllm.log", lines=9, long_lines=1, dropped=7),))
    assert [(u.what, u.why.detail) for u in report_of(rule_that(), snapshot=cut).unseen] == [
        ("part of vllm.log", "over-long lines of which only the beginning was read: 1"),
        ("part of vllm.log", "further lines that matter, counted and not kept: 7"),
    ]
    whole = Snapshot(at=1.0, seen=ALL_SEEN, logs=(LogState(log="vllm.log", lines=9),))
    assert report_of(rule_that(), snapshot=whole).unseen == ()


def test_a_finding_s_own_severity_overrides_its_rule_s() -> None:
    report = report_of(rule_that(finding(severity=Severity.NOTICE, confidence=Confidence.LOW)))
    assert report.verdict is Verdict.NOTICE
