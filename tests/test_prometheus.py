"""The report as Prometheus metrics."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

import golden
import msgspec
import pytest
import reports
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from doctor.report import Report
from doctor.snapshot import (
    Absent,
    Gpu,
    NvLink,
    Power,
    Rank,
    Recorder,
    Sample,
    Snapshot,
    Source,
    Sxid,
    Thermal,
    Why,
    Xid,
)
from exporters.prometheus import OPENMETRICS, SERIES_MAX, TEXT, Cost, Family, Own, Tally, Writer, families

OWN = Own(
    version="0.0.0",
    optional=frozenset({Source.ENGINE_METRICS}),
    started_at=reports.AT - 3600,
    costs={"daemon": Cost(12.5, 40_000_000, 36_000_000), "children": Cost(3.25, 30_000_000, 17_000_000)},
    threads=4,
    open_fds=17,
    loop_lag_seconds=0.25,
    http_loop_lag_seconds=0.001,
    responses={"200": 240, "404": 1},
    dropped={"crowded-out": 0, "no-handshake": 0, "slow": 2},
    logins_failed=3,
    web_config_loaded=True,
    web_config_loaded_at=reports.AT - 3600,
)


def page(report: Report | None, tally: Tally | None = None) -> str:
    return written(metrics(report, tally))


def written(told: Iterable[Family], content_type: str = TEXT) -> str:
    return Writer(content_type).page(told).decode()


def metrics(report: Report | None, tally: Tally | None = None) -> tuple[Family, ...]:
    if tally is None:
        tally = Tally()
        if report is not None:
            tally.add(report)
    return tuple(families(report, tally, OWN))


def test_the_page_is_as_it_was_approved() -> None:
    golden.check("metrics.prom", page(reports.lost_gpu()))


@pytest.mark.parametrize("name", reports.ALL)
def test_a_client_reads_the_page_back(name: str) -> None:
    report = reports.ALL[name]()
    read = {family.name: family for family in text_string_to_metric_families(page(report))}
    verdicts = {s.labels["verdict"]: s.value for s in read["gpu_doctor_verdict"].samples}
    assert [word for word, value in verdicts.items() if value] == [report.verdict.value]


@pytest.mark.parametrize("name", reports.ALL)
def test_both_formats_say_the_same(name: str) -> None:
    told = metrics(reports.ALL[name]())
    openmetrics = written(told, OPENMETRICS)
    read = [
        {(s.name, *sorted(s.labels.items())): s.value for family in page for s in family.samples}
        for page in (text_string_to_metric_families(written(told)), openmetrics_families(openmetrics))
    ]
    assert read[0] == read[1]
    assert openmetrics.endswith("# EOF\n")


@pytest.mark.parametrize("content_type", [TEXT, OPENMETRICS])
def test_a_page_after_others_is_as_if_it_were_the_first(content_type: str) -> None:
    """What is not written anew is what is as it was."""
    writer = Writer(content_type)
    for name in (*reports.ALL, *reports.ALL, "clear"):
        told = metrics(reports.ALL[name]())
        assert writer.page(told).decode() == written(told, content_type)
    assert writer.page(metrics(None)).decode() == written(metrics(None), content_type)


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
    assert (
        'confidence="high",failure_mode="nccl-timeout",gpu="",root_cause="false",severity="critical",silenced="false"'
        in text
    )
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
    own = ("build_info", "optional", "process_", "http_", "web_config_", "loop_lag", "series_left_out")
    counted = ("visits_total", "xids_total", "nccl_timeouts_total", "oom_kills_total", "engine_log_lines_")
    assert {name for name in names if not name.removeprefix("gpu_doctor_").startswith((*own, *counted))} == set()
    assert "gpu_doctor_xids_total" in names


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
    series = [{line.rpartition(" ")[0] for line in text.splitlines()} for text in (before, after)]
    assert series[0] == series[1]


def test_two_engines_of_one_name_are_two_series() -> None:
    engine = msgspec.structs.replace(reports.snapshot(()).engines[0], unit=Absent(Why.NOT_PRESENT))
    twin = msgspec.structs.replace(engine, pid=4712)
    text = page(reports.report(reports.snapshot(reports.FOUR, engines=(engine, twin), metrics=())))
    assert 'engine="vllm:8000"' in text
    assert 'engine="vllm:8000#2"' in text


def every_family() -> list[Family]:
    return list(families(None, Tally(), Own(version="0.0.0")))


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


def test_a_metric_has_a_bounded_number_of_samples_and_the_rest_is_counted() -> None:
    forged = tuple(f"GPU-{n}" for n in range(SERIES_MAX + 5))
    finding = msgspec.structs.replace(reports.LOST, subject=msgspec.structs.replace(reports.LOST.subject, gpus=forged))
    text = page(reports.report(reports.snapshot(reports.FOUR), finding))
    assert text.count("\ngpu_doctor_finding{") == SERIES_MAX
    assert "\ngpu_doctor_series_left_out 5.0\n" in text


def test_a_hostile_log_makes_no_page_without_end() -> None:
    tally = Tally()
    for visit in range(20):
        kernel = tuple(
            Xid(text="", where="", code=n, pci_address=f"{visit:04x}:{n % 256:02x}:00.0") for n in range(1000)
        )
        switches = tuple(Sxid(text="", where="", code=n, switch="x" * 4000) for n in range(1000))
        report = reports.report(reports.snapshot(reports.FOUR, kernel=(*kernel, *switches)))
        tally.add(report)
    assert len(page(report, tally)) < 400_000


def moved(at: float, steps: float, running: float = 3.0) -> Report:
    """Four GPUs and an engine with this many steps behind it."""
    metrics = msgspec.structs.replace(reports.snapshot(()).metrics[0], at=at, running=running, steps_total=steps)
    return reports.report(reports.snapshot(reports.FOUR, at=at, metrics=(metrics,)))


def test_an_engine_that_runs_requests_and_makes_no_step_stalls() -> None:
    tally, stalls = Tally(), []
    for report in (moved(0, 10), moved(15, 20), moved(30, 20), moved(45, 20), moved(60, 20, running=0), moved(75, 21)):
        tally.add(report)
        stalls.append(tally.stall_seconds(reports.ENGINE))
    assert stalls == [0, 0, 15, 30, 0, 0]
    tally.add(reports.report(reports.snapshot(reports.FOUR, metrics=())))
    assert tally.stall_seconds(reports.ENGINE) is None, "its page was not seen"


def test_a_rank_is_told_with_its_gpu_and_whether_it_is_held() -> None:
    engine = msgspec.structs.replace(
        reports.snapshot(()).engines[0],
        ranks=(
            Rank(pid=1, rank=0, gpu=reports.uuid(0), state="sleeping", cpu_seconds=5.0),
            Rank(pid=2, rank=1, gpu=reports.uuid(1), state="stopped"),
        ),
    )
    text = page(reports.report(reports.snapshot(reports.FOUR, engines=(engine,))))
    assert f'engine_rank_info{{engine="vllm.service",gpu="1",rank="1",uuid="{reports.uuid(1)}"}} 1.0' in text
    assert 'engine_rank_held{engine="vllm.service",rank="0"} 0.0' in text
    assert 'engine_rank_held{engine="vllm.service",rank="1"} 1.0' in text
    assert 'engine_rank_cpu_seconds_total{engine="vllm.service",rank="0"} 5.0' in text
    assert 'engine_rank_cpu_seconds_total{engine="vllm.service",rank="1"}' not in text


def test_the_node_draws_what_its_gpus_draw_together() -> None:
    samples = ((100.0, 300.0, 100.0), (100.0, 700.0, 100.0))
    gpus = tuple(
        msgspec.structs.replace(
            reports.gpu(i),
            power=Power(
                instant_watts=each[-1],
                limit_watts=700.0,
                samples=tuple(Sample(reports.AT + 0.1 * n, watts) for n, watts in enumerate(each)),
            ),
        )
        for i, each in enumerate(samples)
    )
    text = page(reports.report(reports.snapshot(gpus)))
    for line in ("power_watts 200.0", "power_peak_watts 1000.0", "power_step_watts 800.0", "power_limit_watts 1400.0"):
        assert f"\ngpu_doctor_node_{line}\n" in text
    silent = msgspec.structs.replace(gpus[0], power=Power(instant_watts=Absent(Why.FAILED)))
    assert "node_power_watts" not in page(reports.report(reports.snapshot((silent, gpus[1])))), "half a sum is none"


def test_a_recorder_that_fails_says_so_and_where_there_is_none_nothing_does() -> None:
    assert "gpu_doctor_recorder_" not in page(reports.clear())
    state = Recorder(directory="/var/lib/gpu-doctor", failing_since=reports.AT, waiting=7)
    text = page(reports.report(reports.snapshot(reports.FOUR, recorder=state)))
    for line in ("failing 1.0", "waiting_visits 7.0", "lost_visits_total 0.0"):
        assert f"\ngpu_doctor_recorder_{line}\n" in text
