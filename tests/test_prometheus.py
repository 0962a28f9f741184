"""The report as Prometheus metrics."""

from __future__ import annotations

import re
import shutil
import subprocess

import golden
import msgspec
import pytest
import reports
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from doctor.report import Report
from doctor.snapshot import Absent, Gpu, NvLink, Power, Snapshot, Thermal, Why, Xid
from exporters.prometheus import Family, Page, Tally, families


def page(report: Report | None, tally: Tally | None = None) -> str:
    return generate_latest(registry(report, tally)).decode()


def registry(report: Report | None, tally: Tally | None = None) -> CollectorRegistry:
    if tally is None:
        tally = Tally()
        if report is not None:
            tally.add(report)
    made = CollectorRegistry()
    made.register(Page(lambda: report, tally, "0.0.0"))
    return made


def test_the_page_is_as_it_was_approved() -> None:
    golden.check("metrics.prom", page(reports.lost_gpu()))


@pytest.mark.parametrize("name", reports.ALL)
def test_a_client_reads_the_page_back(name: str) -> None:
    report = reports.ALL[name]()
    read = {family.name: family for family in text_string_to_metric_families(page(report))}
    verdicts = {s.labels["verdict"]: s.value for s in read["gpu_doctor_verdict"].samples}
    assert [word for word, value in verdicts.items() if value] == [report.verdict.value]
    assert generate_openmetrics(registry(report)).endswith(b"# EOF\n")


@pytest.mark.parametrize("name", reports.ALL)
def test_promtool_accepts_the_page(name: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on this machine; Debian's package prometheus brings it")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=page(reports.ALL[name]()), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_findings_name_the_gpu_and_whether_they_are_the_root() -> None:
    text = page(reports.lost_gpu())
    lost = next(line for line in text.splitlines() if 'failure_mode="gpu-lost"' in line)
    assert 'gpu="2"' in lost
    assert f'uuid="{reports.uuid(2)}"' in lost
    assert 'root_cause="true"' in lost
    assert 'failure_mode="nccl-timeout",gpu="",root_cause="false"' in text
    assert 'gpu_doctor_unjudged{failure_mode="nvswitch-fabric-fault",reason="no-permission"} 1.0' in text


def test_an_absent_value_is_absent_and_never_zero() -> None:
    gpu = Gpu(
        uuid="GPU-1",
        index=0,
        thermal=Thermal(gpu_celsius=Absent(Why.LOST)),
        power=Power(average_watts=Absent(Why.NOT_SUPPORTED)),
        links=(NvLink(link=0, active=Absent(Why.FAILED), replay_errors_total=Absent(Why.NOT_SUPPORTED)),),
    )
    text = page(reports.report(Snapshot(at=reports.AT, gpus=(gpu,))))
    assert "gpu_doctor_gpu_info" in text
    for name in ("temperature", "power", "nvlink_up", "nvlink_errors", "gpu_lost", "mig", "collector"):
        assert name not in text


def test_nothing_is_told_where_there_is_no_fresh_report() -> None:
    """What remains is the daemon's own: its version and what it counted."""
    tally = Tally()
    tally.add(reports.lost_gpu())
    names = {line.split("{")[0].split()[0] for line in page(None, tally).splitlines() if not line.startswith("#")}
    assert names == {
        "gpu_doctor_build_info",
        "gpu_doctor_visits_total",
        "gpu_doctor_nccl_timeouts_total",
        "gpu_doctor_xids_total",
    }


def test_events_are_counted_over_visits() -> None:
    tally = Tally()
    quiet = reports.clear()
    tally.add(quiet)
    assert tally.nccl_timeouts is None, "no engine's log was seen yet: unknown, not zero"
    tally.add(reports.lost_gpu())
    tally.add(quiet)
    tally.add(reports.lost_gpu())
    assert tally.visits == 4
    assert tally.nccl_timeouts == 6
    assert tally.xids == {("79", "0000:38:00.0"): 2}


def test_an_xid_of_an_earlier_boot_is_not_counted() -> None:
    tally = Tally()
    old = msgspec.structs.replace(reports.XID, before_boot=True)
    tally.add(reports.report(reports.snapshot(reports.FOUR, kernel=(old,))))
    assert not tally.xids


def test_forged_log_lines_can_not_fill_the_memory() -> None:
    tally = Tally()
    forged = tuple(Xid(text="", where="", code=n, pci_address="0000:00:00.0") for n in range(5000))
    tally.add(reports.report(reports.snapshot(reports.FOUR, kernel=forged)))
    assert len(tally.xids) == 512


def test_an_engine_keeps_its_series_across_a_restart() -> None:
    before, after = (
        page(reports.report(reports.snapshot(reports.FOUR, engines=(engine,), metrics=(metrics,))))
        for engine, metrics in (
            (reports.snapshot(()).engines[0], reports.snapshot(()).metrics[0]),
            (
                msgspec.structs.replace(reports.snapshot(()).engines[0], pid=9, started_at=1.0),
                msgspec.structs.replace(reports.snapshot(()).metrics[0], engine="9@1"),
            ),
        )
    )
    assert 'gpu_doctor_engine_requests_running{engine="vllm.service"} 12.0' in before
    assert before == after


def test_two_engines_of_one_name_are_two_series() -> None:
    engine = msgspec.structs.replace(reports.snapshot(()).engines[0], unit=Absent(Why.NOT_PRESENT))
    twin = msgspec.structs.replace(engine, pid=4712)
    text = page(reports.report(reports.snapshot(reports.FOUR, engines=(engine, twin), metrics=())))
    assert 'engine="vllm:8000"' in text
    assert 'engine="vllm:8000#2"' in text


def every_family() -> list[Family]:
    return list(families(None, Tally(), "0.0.0"))


def test_names_say_their_unit_and_help_says_what_they_are() -> None:
    names = [family.name for family in every_family()]
    assert len(names) == len(set(names))
    for family in every_family():
        assert re.fullmatch(r"gpu_doctor_[a-z0-9_]+", family.name)
        assert family.help.endswith("."), family.name
        assert not {"ms", "mhz", "mib", "percent", "milliseconds"} & set(family.name.split("_"))


HOSTILE = st.text(alphabet=st.characters(), max_size=40)


@settings(max_examples=50)
@given(HOSTILE, HOSTILE)
def test_any_name_gives_a_page_that_can_be_read(uuid: str, name: str) -> None:
    report = reports.report(Snapshot(at=reports.AT, gpus=(Gpu(uuid=uuid, index=0, name=name, lost=True),)))
    assert list(text_string_to_metric_families(page(report)))
