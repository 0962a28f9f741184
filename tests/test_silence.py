"""A silenced finding is told and counted, and the verdict leaves it out: for whom, until when, and no longer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import reports
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from doctor.cli import cli
from doctor.diagnose import judge
from doctor.feeds import recording
from doctor.history import History
from doctor.readers import runbook
from doctor.report import Report, Verdict
from doctor.rule import Finding, NoLimits, Rule, Severity
from doctor.silence import Moment, Silence
from doctor.snapshot import Snapshot
from exporters import console, markdown, nagios
from exporters import json as json_report

LATER, EARLIER = Moment(reports.AT + 86_400), Moment(reports.AT - 1)


class Says(Rule[NoLimits]):
    """A rule that finds what the test says."""

    @property
    def runbook(self):  # type: ignore[override]
        return runbook.read("# Says\n\n## Fix\n\n1. look\n")


def saying(*findings: Finding) -> list[Rule[NoLimits]]:
    def rule(name: str, its: list[Finding]) -> Rule[NoLimits]:
        def judgement(history: History, limits: NoLimits) -> Iterator[Finding]:
            yield from its

        return Says(judgement, id=name, title=its[0].title, severity=Severity.CRITICAL, needs=(), explains=(), limits=NoLimits())  # fmt: skip

    by_name = itertools.groupby(sorted(findings, key=lambda f: f.failure_mode), key=lambda f: f.failure_mode)
    return [rule(name, list(its)) for name, its in by_name]


def silence(rule: str, **more: object) -> Silence:
    return Silence(**({"rule": rule, "until": LATER, "reason": "known, ticket 4711", "by": "night shift"} | more))  # type: ignore[arg-type]


def judged(*silences: Silence, findings: tuple[Finding, ...], visit: Snapshot | None = None) -> Report:
    return judge(History((visit or reports.snapshot(reports.FOUR),), 60), saying(*findings), silences=silences)


INCIDENT = (reports.LOST, reports.TIMEOUT, reports.CRASHED)


def modes(found: object) -> list[str]:
    return [reported.finding.failure_mode for reported in found]  # type: ignore[attr-defined]


def test_a_silenced_finding_is_told_and_the_verdict_leaves_it_out() -> None:
    report = judged(silence("nvlink-degraded"), findings=(reports.DEGRADED,))
    assert report.verdict is Verdict.CLEAR
    assert modes(report.findings) == ["nvlink-degraded"]
    assert (report.open, report.leads) == ((), ())


def test_a_silence_is_of_its_rule_only() -> None:
    report = judged(silence("nvlink-errors"), findings=(reports.DEGRADED,))
    assert report.verdict is Verdict.CRITICAL
    assert report.open == report.findings


def test_a_silenced_root_keeps_its_place_above_what_follows_from_it() -> None:
    report = judged(silence("gpu-lost"), findings=INCIDENT)
    assert [(f.finding.failure_mode, f.depth) for f in report.findings] == [
        ("gpu-lost", 0), ("nccl-timeout", 1), ("engine-crashed", 2),
    ]  # fmt: skip
    assert report.verdict is Verdict.CRITICAL
    assert modes(report.leads) == ["nccl-timeout"]


def test_an_incident_of_which_nothing_is_open_comes_last() -> None:
    report = judged(silence("nvlink-degraded"), findings=(reports.DEGRADED, reports.HINT))
    assert modes(report.findings) == ["tp-single-stream-stall", "nvlink-degraded"]
    assert report.verdict is Verdict.NOTICE


def test_silence_over_everything_does_not_make_a_blind_report_clear() -> None:
    blind = reports.half_blind().snapshot
    assert judged(silence("nvlink-degraded"), findings=(reports.DEGRADED,), visit=blind).verdict is Verdict.INCOMPLETE


@pytest.mark.parametrize(
    "name", [1, "1", reports.uuid(1), reports.uuid(1).upper(), "0000:28:00.0", "00000000:28:00.0", "28:00.0"]
)
def test_a_gpu_goes_by_any_of_its_names(name: int | str) -> None:
    report = judged(silence("nvlink-degraded", gpus=(name,)), findings=(reports.DEGRADED,))
    assert report.open == ()


@pytest.mark.parametrize("name", [0, "2", reports.uuid(3), "0000:38:00.0", "28", "", "gpu 1"])
def test_a_silence_of_one_gpu_is_none_of_another(name: int | str) -> None:
    report = judged(silence("nvlink-degraded", gpus=(name,)), findings=(reports.DEGRADED,))
    assert report.verdict is Verdict.CRITICAL


def of_gpus(*indices: int) -> Finding:
    import msgspec

    subject = msgspec.structs.replace(reports.DEGRADED.subject, gpus=tuple(reports.uuid(i) for i in indices))
    return msgspec.structs.replace(reports.DEGRADED, subject=subject)


def test_news_about_a_further_gpu_is_told() -> None:
    both = of_gpus(1, 2)
    assert judged(silence("nvlink-degraded", gpus=(1,)), findings=(both,)).verdict is Verdict.CRITICAL
    one, other = silence("nvlink-degraded", gpus=(1,)), silence("nvlink-degraded", gpus=(2,), until=Moment(LATER + 5))
    report = judged(one, other, findings=(both,))
    assert report.findings[0].silence == one, "what ends first ends the silence"


def test_a_gpu_that_is_lost_by_now_keeps_its_names() -> None:
    before = reports.snapshot(reports.FOUR, at=reports.AT - 10)
    now = reports.snapshot(reports.FOUR[:2])
    history = History((before, now), 60)
    report = judge(history, saying(reports.LOST), silences=[silence("gpu-lost", gpus=("0000:38:00.0",))])
    assert report.open == ()


@pytest.mark.parametrize(
    "name", ["vllm.service", "vllm", "meta-llama/Llama-3.3-70B-Instruct", "vllm:8000", reports.ENGINE]
)
def test_an_engine_goes_by_its_unit_model_or_port(name: str) -> None:
    report = judged(silence("engine-crashed", engine=name), findings=(reports.CRASHED,))
    assert report.open == ()


@pytest.mark.parametrize("name", ["other.service", "vllm:8001", "llama", "service"])
def test_a_silence_of_one_engine_is_none_of_another(name: str) -> None:
    report = judged(silence("engine-crashed", engine=name), findings=(reports.CRASHED,))
    assert report.verdict is Verdict.CRITICAL


def test_a_silence_of_a_part_is_none_of_the_node() -> None:
    node_wide = Finding(failure_mode="gpu-lost", title="t", summary="s", evidence=reports.LOST.evidence)
    for narrow in (silence("gpu-lost", gpus=(1,)), silence("gpu-lost", engine="vllm.service")):
        assert judged(narrow, findings=(node_wide,)).verdict is Verdict.CRITICAL


def test_a_silence_ends_at_its_moment_and_says_so() -> None:
    ended = silence("nvlink-degraded", until=Moment(reports.AT))
    report = judged(ended, findings=(reports.DEGRADED,))
    assert report.verdict is Verdict.CRITICAL
    assert report.ended_silences == (ended,)
    for told in (console.render(report), markdown.render(report)):
        assert told.count("Silences that have ended") == 1
        assert "known," in told
    (declared,) = json.loads(json_report.render(report))["silences"]
    assert declared["ended"] is True


def test_time_is_that_of_the_visit_and_not_of_the_clock() -> None:
    long_ago = reports.snapshot(reports.FOUR, at=1000.0)
    report = judged(silence("nvlink-degraded", until=Moment(2000.0)), findings=(reports.DEGRADED,), visit=long_ago)
    assert report.open == ()


DECLARED = st.lists(
    st.builds(
        silence,
        st.sampled_from(["gpu-lost", "nccl-timeout", "engine-crashed", "nvlink-degraded"]),
        until=st.sampled_from([LATER, EARLIER, Moment(LATER + 1)]),
        gpus=st.lists(st.sampled_from([1, 2, "1", reports.uuid(2)]), max_size=2).map(tuple),
        engine=st.sampled_from(["", "vllm.service", "x"]),
        reason=st.sampled_from(["a", "b"]),
    ),
    max_size=5,
)


@given(DECLARED, st.randoms())
def test_the_order_of_silences_means_nothing(declared: list[Silence], random: object) -> None:
    shuffled = list(declared)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (judged(*these, findings=(*INCIDENT, of_gpus(1, 2))) for these in (declared, shuffled))
    assert json_report.render(one) == json_report.render(other)
    assert console.render(one) == console.render(other)


@given(DECLARED)
def test_silences_neither_hide_nor_invent_nor_cut_a_chain(declared: list[Silence]) -> None:
    bare, report = judged(findings=INCIDENT), judged(*declared, findings=INCIDENT)
    assert [(f.finding, f.depth, f.caused_by) for f in report.findings] == [
        (f.finding, f.depth, f.caused_by) for f in bare.findings
    ]
    for told in (console.render(report), markdown.render(report), json_report.render(report).decode()):
        assert all(mode in told for mode in ("gpu-lost", "nccl-timeout", "engine-crashed"))


def part() -> Report:
    return judged(silence("gpu-lost"), silence("pcie-fallback", until=EARLIER), findings=INCIDENT)


def whole() -> Report:
    return judged(silence("nvlink-degraded", gpus=(1,)), findings=(reports.DEGRADED,))


@pytest.mark.parametrize(("name", "make"), [("silenced_root", part), ("silenced", whole)])
def test_screens_and_tickets_are_as_they_were_approved(name: str, make: object) -> None:
    report = make()  # type: ignore[operator]
    golden.check(f"{name}.txt", console.render(report))
    golden.check(f"{name}.md", markdown.render(report))


def test_nagios_counts_the_silenced_apart() -> None:
    line = nagios.render(whole())
    assert line.startswith("GPU-DOCTOR OK - ")
    assert "1 silenced finding" in line
    assert "critical=0 warning=0 notice=0 silenced=1" in line
    assert nagios.render(part()).startswith("GPU-DOCTOR CRITICAL - nccl-timeout: ")


@pytest.mark.parametrize("until", ["2099-01-01", '"2099-01-01"', "2099-01-01T00:00:00Z", '"2099-01-01T06:00:00+01:00"'])
def test_a_replay_silences_as_the_live_run_did_to_the_byte(tmp_path: Path, until: str) -> None:
    config, rec = tmp_path / "site.toml", tmp_path / "a.rec"
    config.write_text(f'[[silence]]\nrule = "nvlink-degraded"\ngpus = [2]\nuntil = {until}\nreason = "ordered"\n')
    simulated = ["--simulate", "hgx-h100-8", "--fault", "nvlink-down:gpu=2,link=5,start=0"]
    recorded = CliRunner().invoke(cli, ["record", *simulated, "--for", "1", "-o", str(rec)])
    assert recorded.exit_code == 0, recorded.output
    check = ["check", "--config", str(config), "--format", "json", "--replay", str(rec)]
    one, other = CliRunner().invoke(cli, check), CliRunner().invoke(cli, check)
    assert one.stdout == other.stdout
    found = json.loads(one.stdout)
    (degraded,) = [f for f in found["findings"] if f["failure_mode"] == "nvlink-degraded"]
    assert degraded["silenced"]["reason"] == "ordered"
    assert len(list(recording.read(rec))) == 2
    loud = CliRunner().invoke(cli, ["check", "--replay", str(rec)])
    assert (one.exit_code, loud.exit_code) == (0, 2)
