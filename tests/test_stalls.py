"""A stalled engine, told apart: hardware, a collective or software, by what each rank's GPU and process do."""

from __future__ import annotations

from pathlib import Path

import drills
import msgspec
import nodes
import pytest

from doctor.readers import vllm_log, vllm_metrics
from doctor.report import Report
from doctor.rule import Finding, Severity
from doctor.snapshot import NOT_ASKED, Engine, Rank, Snapshot, Source, Why
from doctor.symptoms.stalls import suspicion
from rules import RULES

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "live" / "v0.32.0"
MINUTE = (0, 15, 30, 45, 60, 75)


def stall_of(report: Report) -> Finding:
    (finding,) = [f.finding for f in report.findings if f.finding.failure_mode == "engine-stalled"]
    return finding


KINDS = {
    "engine-stalled:kind=hardware": ("hardware", "move no memory: kernels hang", ()),
    "engine-stalled:kind=collective": ("collective", "GPU 3 is idle (VLLM::Worker_TP3", (2266,)),
    "engine-stalled:kind=software": ("software", "all its GPUs are idle: no kernel runs", ()),
    "rank-stopped:rank=2": ("software", "VLLM::Worker_TP2 (pid 2265) is stopped, by a signal or a debugger", (2265,)),
    "rank-blocked:rank=2": ("hardware", "(pid 2265) hangs in the kernel (state D)", (2265,)),
    "engine-core-busy": ("software", "VLLM::EngineCore (pid 2188) fills a core", (2188,)),
    "kernel-hung:gpu=2": ("hardware", "GPU 2 (", ()),
}


@pytest.mark.parametrize("fault", KINDS)
def test_a_stall_is_told_by_what_its_ranks_do(fault: str) -> None:
    kind, words, pids = KINDS[fault]
    finding = stall_of(nodes.report(drills.visits("hgx-h100-4", fault, seconds=MINUTE), RULES))
    (said,) = [evidence.text for evidence in finding.evidence if evidence.where == "ranks and their GPUs"]
    assert said.startswith(f"{kind}: ")
    assert words in said
    assert finding.subject.pids == pids
    assert finding.severity is Severity.CRITICAL


@pytest.mark.parametrize("fault", KINDS)
def test_a_stall_has_no_other_root(fault: str) -> None:
    report = nodes.report(drills.visits("hgx-h100-4", fault, seconds=MINUTE), RULES)
    expected = "gpu-hung" if fault.startswith("kernel-hung") else "engine-stalled"
    assert [f.finding.failure_mode for f in report.roots] == [expected]


def test_an_engine_that_goes_on_is_no_longer_stalled() -> None:
    visits = drills.visits("hgx-h100-4", "rank-stopped:rank=1,start=-150,end=20", seconds=(0, 15, 30, 45, 60))
    assert stall_of(nodes.report(visits[:2], RULES))
    assert nodes.report(visits, RULES).findings == ()


def unasked(snapshot: Snapshot) -> Snapshot:
    """Nobody asks for anything: no request runs, and none waits for another's answer."""
    return nodes.put(nodes.with_metrics(snapshot, running=0.0, waiting=0.0), engine_events=())


def test_a_process_that_is_stopped_stalls_the_next_request_too() -> None:
    visits = nodes.each(drills.visits("hgx-h100-4", "rank-stopped:rank=2", seconds=MINUTE), unasked)
    told = stall_of(nodes.report(visits, RULES))
    assert told.summary.startswith("The engine makes no step: no token or step was counted for 75 s; it is software")
    assert told.subject.pids == (2265,)
    assert nodes.report(visits[:-2], RULES).findings == ()


def test_a_server_that_is_stopped_answers_nobody() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4", visits=6), lambda s: nodes.with_engine(s, state="stopped"))
    blind = nodes.each(visits, lambda s: nodes.unseen(s, Source.ENGINE_METRICS, why=Why.TIMED_OUT))
    told = stall_of(nodes.report(blind, RULES))
    assert told.summary == (
        "The engine makes no step: a process of it has been stopped for 75 s, and its counters are not seen; it is "
        "software: its server (pid 1000) is stopped, by a signal or a debugger"
    )
    assert (told.severity, told.since, told.subject.pids) == (Severity.CRITICAL, visits[0].at, (1000,))
    assert "engine-stalled" not in [f.finding.failure_mode for f in nodes.report(visits, RULES).findings]
    assert "engine-stalled" not in [f.finding.failure_mode for f in nodes.report(blind[:4], RULES).findings]


def test_an_idle_engine_whose_processes_only_sleep_is_well() -> None:
    visits = nodes.each(drills.visits("hgx-h100-4", "engine-stalled:kind=software", seconds=MINUTE), unasked)
    assert nodes.report(visits, RULES).findings == ()


def test_a_clock_that_stands_still_holds_up_the_others() -> None:
    visits = drills.visits("hgx-h100-4", "engine-stalled:kind=hardware", seconds=MINUTE)
    slow = nodes.each(visits, lambda s: nodes.with_gpu(s, 2, clocks__sm_mhz=345))
    assert "GPU 2 runs at 345 MHz" in stall_of(nodes.report(slow, RULES)).summary


def test_a_process_that_reads_a_disk_for_a_moment_hangs_nowhere() -> None:
    visits = drills.visits("hgx-h100-4", "engine-stalled:kind=software", seconds=MINUTE)

    def reading(snapshot: Snapshot) -> Snapshot:
        (engine,) = snapshot.engines
        first = msgspec.structs.replace(engine.ranks[0], state="disk-sleep")
        return nodes.put(snapshot, engines=(msgspec.structs.replace(engine, ranks=(first, *engine.ranks[1:])),))

    assert "no kernel runs" in stall_of(nodes.report(nodes.last(visits, reading), RULES)).summary


@pytest.mark.parametrize("source", [Source.NVML, Source.KERNEL_LOG])
def test_a_stall_whose_gpus_were_not_seen_says_so(source: Source) -> None:
    visits = drills.visits("hgx-h100-4", "engine-stalled:kind=software", seconds=MINUTE)
    blind = nodes.each(visits, lambda s: nodes.unseen(s, source, why=Why.NO_PERMISSION))
    told = stall_of(nodes.report(blind, RULES)).summary
    assert ("what its GPUs do was not seen" in told) is (source is Source.NVML)


# Live: a real vLLM 0.32.0 on CPUs, of which only log, page and processes are known.

needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not beside this checkout")
STATES = {"S": "sleeping", "R": "running", "T": "stopped", "Z": "zombie", "D": "disk-sleep"}
BEGAN = 1_795_248_125.0
"""When that engine was started: 08:02:05 UTC."""


def live_engine(processes: str) -> Engine:
    rows = [line.split(None, 7) for line in processes.splitlines()[1:]]
    of = {
        row[7].split()[0]: Rank(pid=int(row[0]), title=row[7], state=STATES[row[3][0]])
        for row in rows
        if "::" in row[7]
    }
    ranks = tuple(rank for title, rank in sorted(of.items()) if "Worker" in title)
    cores = tuple(rank for title, rank in sorted(of.items()) if "EngineCore" in title)
    return Engine(pid=int(rows[0][0]), started_at=BEGAN, kind="vllm", ranks=ranks, cores=cores, log="server.log")


def live_visit(run: Path, page: str, processes: str, at: float) -> Snapshot:
    engine = live_engine((run / processes).read_text())
    metrics = vllm_metrics.read((run / page).read_text(), engine=engine.id, at=at)
    assert metrics is not None
    seen = (Source.PROCESSES, Source.ENGINE_METRICS, Source.ENGINE_LOG)
    blank = nodes.unseen(Snapshot(at=at, seen=tuple(Source)), *set(Source) - set(seen), why=Why.NOT_PRESENT)
    return nodes.put(blank, engines=(engine,), metrics=(metrics,))


@needs_samples
def test_a_live_engine_whose_worker_was_stopped_names_it() -> None:
    run = SAMPLES / "tp2_stall_worker_resume"
    pages = {"load": 67.0, "stall010": 77.0, "stall030": 97.0, "stall060": 127.0, "stall120": 187.0, "resumed": 222.0}
    visits = [
        live_visit(run, f"metrics_{name}.prom", "ps_stall.txt" if "stall" in name else "ps_ready.txt", BEGAN + seconds)
        for name, seconds in pages.items()
    ]
    told = stall_of(nodes.report(visits[:-1], RULES))
    assert "is software: VLLM::Worker_TP1 (pid 30465) is stopped, by a signal or a debugger" in told.summary
    assert told.subject.pids == (30465,)
    assert nodes.report(visits[:1], RULES).findings == ()
    resumed = nodes.report(visits, RULES)
    assert "engine-stalled" not in [f.finding.failure_mode for f in resumed.findings]


HEALTHY = ("normal_tiny", "normal_small", "tp2_normal", "apiservers2", "debug_logs")
"""The healthy runs of which pages were kept; the logs of the others are judged in `test_serving_samples.py`."""


def pages_of(run: Path) -> list[Path]:
    series = sorted((run / "metrics_series").glob("*")) if (run / "metrics_series").is_dir() else []
    return series or [
        *run.glob("metrics_idle.prom"),
        *sorted(run.glob("metrics_load*.prom")),
        *run.glob("metrics_after.prom"),
    ]


@needs_samples
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_live_run_raises_nothing_page_by_page(name: str) -> None:
    run = SAMPLES / name
    began = 1_795_248_000.0
    log = vllm_log.read((run / "server.log").read_bytes(), "server.log", began)
    visits: list[Snapshot] = []
    for number, path in enumerate(pages_of(run)):
        at = began + 2.0 * number
        engine = Engine(pid=7, started_at=began - 60, kind="vllm", log="server.log")
        metrics = vllm_metrics.read(path.read_text(), engine=engine.id, at=at)
        assert metrics is not None, path
        events = log.events if number == 0 else ()
        visits.append(
            nodes.put(Snapshot(at=at, seen=tuple(Source)), engines=(engine,), metrics=(metrics,), engine_events=events)
        )
        report = nodes.report(visits, RULES)
        loud = [f.finding.summary for f in report.findings if f.finding.severity != Severity.NOTICE]
        assert loud == [], path.name
    assert visits


def test_what_the_gpus_of_an_engine_without_ranks_do_is_unknown() -> None:
    snapshot = nodes.healthy("hgx-h100-4")[-1]
    engine = Engine(pid=1, started_at=1.0, kind="vllm", ranks=(Rank(pid=2, gpu=NOT_ASKED),))
    assert suspicion(nodes.history((snapshot,)), engine).kind == "unknown"
