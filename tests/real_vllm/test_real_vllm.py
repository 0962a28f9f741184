"""The daemon watches a real vLLM on the CPU: everything that a night may bring, and no word of alarm before it.

`make test-vllm`: six minutes, and 3 GB of vLLM at the first time. `GPU_DOCTOR_VLLM` names its environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from doctor.diagnose import watch
from doctor.recorder.folder import Folder
from doctor.report import Report, Verdict
from doctor.rule import Finding, Severity
from doctor.snapshot import Engine, EngineMetrics, Snapshot, Source, known
from rules import RULES

ENVIRONMENT = os.environ.get("GPU_DOCTOR_VLLM", "")

if not ENVIRONMENT:
    pytest.skip("GPU_DOCTOR_VLLM names no environment with a vLLM: run `make test-vllm`", allow_module_level=True)

from engine import TOKENS  # noqa: E402 - as the next
from scenario import INTERVAL_SECONDS, REQUESTS, Night  # noqa: E402 - it needs nothing where it is not asked for


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    night = Night(Path(ENVIRONMENT), tmp_path_factory.mktemp("night"))
    night.spend()
    return night


@pytest.fixture(scope="module")
def reports(night: Night) -> tuple[Report, ...]:
    """Every visit of the night as the flight recorder kept it, judged again."""
    snapshots = [entry.snapshot for entry in Folder(night.state).entries()]
    optional = frozenset((Source.NVML, Source.KERNEL_LOG))
    return tuple(watch(snapshots, RULES, 3600.0, optional))


def between(reports: tuple[Report, ...], night: Night, begin: str, end: str) -> tuple[Report, ...]:
    """The reports of visits that began and ended between two moments of the night."""
    since, until = night.times[begin], night.times[end]
    return tuple(r for r in reports if since <= r.at and r.at + 2 * INTERVAL_SECONDS <= until)


def at(reports: tuple[Report, ...], night: Night, moment: str) -> Report:
    """The report that the daemon showed then."""
    return next(r for r in reports if r.at == night.reports[moment]["at"])


def engines_of(report: Report, night: Night) -> list[Engine]:
    """The night's own engine; others may run on the machine."""
    return [engine for engine in report.snapshot.engines if engine.flags.port == night.port]


def engine_of(report: Report, night: Night) -> Engine:
    (engine,) = engines_of(report, night)
    return engine


def pages_of(report: Report, night: Night) -> list[EngineMetrics]:
    return [page for page in report.snapshot.metrics if page.url == f"http://127.0.0.1:{night.port}/metrics"]


def page_of(report: Report, night: Night) -> EngineMetrics:
    (page,) = pages_of(report, night)
    return page


def first_of(report: Report, failure_mode: str) -> Finding:
    (root,) = report.roots
    assert root.finding.failure_mode == failure_mode, root.finding.summary
    return root.finding


def sample(night: Night, moment: str, family: str) -> float:
    mine = (family, f'{family}{{engine="vllm:{night.port}"}}')
    (value,) = (value for name, value in night.pages[moment].items() if name in mine)
    return value


# It finds the engine by itself.


def test_the_engine_is_found_with_its_flags_versions_model_and_log(reports: tuple[Report, ...], night: Night) -> None:
    engine = engine_of(at(reports, night, "ready"), night)
    assert (engine.pid, engine.kind) == (night.pids["first"], "vllm")
    flags = engine.flags
    assert (flags.model, flags.tensor_parallel_size, flags.port) == (str(night.model), 2, night.port)
    assert (flags.max_model_len, flags.max_num_seqs, flags.enforce_eager) == (1024, 8, True)
    assert str(engine.stack.engine).startswith("0.32.0")
    assert str(engine.stack.torch).endswith("+cpu")
    assert (engine.model.architecture, engine.model.layers) == ("LlamaForCausalLM", 4)
    assert engine.model.weights_bytes == (night.model / "model.safetensors").stat().st_size
    assert engine.log == str(night.log)
    assert abs(engine.started_at - night.times["started"]) < 60


def test_its_processes_are_told_by_rank(reports: tuple[Report, ...], night: Night) -> None:
    engine = engine_of(at(reports, night, "ready"), night)
    assert [(rank.rank, rank.title) for rank in engine.ranks] == [(0, "VLLM::Worker_TP0"), (1, "VLLM::Worker_TP1")]
    assert [core.title for core in engine.cores] == ["VLLM::EngineCore"]
    assert engine.ranks[1].pid == night.pids["worker"]
    assert engine.cores[0].pid == night.pids["core"]


def test_its_metrics_are_found(reports: tuple[Report, ...], night: Night) -> None:
    page = page_of(at(reports, night, "ready"), night)
    assert page.model == "tiny"
    assert known(page.kv_cache_tokens)


def test_an_engine_that_loads_is_neither_dead_nor_stalled(reports: tuple[Report, ...], night: Night) -> None:
    loading = between(reports, night, "started", "ready")
    assert loading
    assert {report.findings for report in loading} == {()}
    blind = [report.verdict for report in loading if engines_of(report, night) and not pages_of(report, night)]
    assert set(blind) == {Verdict.INCOMPLETE}, "its metrics are not there yet"


# It serves, and all is well.


def test_load_is_seen_in_tokens_and_requests(reports: tuple[Report, ...], night: Night) -> None:
    before, after = (page_of(at(reports, night, moment), night) for moment in ("just rotated", "after rotation"))
    assert known(before.requests_succeeded_total)
    assert known(after.requests_succeeded_total)
    assert known(after.generation_tokens_total)
    assert after.requests_succeeded_total >= before.requests_succeeded_total + REQUESTS
    assert after.generation_tokens_total >= after.requests_succeeded_total * TOKENS
    assert sample(night, "after rotation", "gpu_doctor_engine_generation_tokens_total") == after.generation_tokens_total
    under_load = between(reports, night, "ready", "stopped")
    assert any(known(page.running) and page.running > 0 for report in under_load for page in pages_of(report, night))


def test_its_log_is_followed_through_copytruncate(reports: tuple[Report, ...], night: Night) -> None:
    until = night.reports["after rotation"]["at"]
    after = [report for report in reports if night.times["rotated"] <= report.at <= until]
    events = [event for report in after for event in report.snapshot.engine_events if event.log == str(night.log)]
    assert "request-served" in {event.signal for event in events}
    started = [e.signal for r in reports for e in r.snapshot.engine_events if e.log == str(night.log)]
    assert started.count("startup-complete") == 1, "nothing is read twice"


HEALTHY = (
    ("started", "stopped"),
    ("recovered", "core killed"),
    ("ready again", "server killed"),
)  # fmt: skip


@pytest.mark.parametrize(("begin", "end"), HEALTHY)
def test_no_visit_of_a_healthy_engine_finds_anything(
    reports: tuple[Report, ...], night: Night, begin: str, end: str
) -> None:
    visits = between(reports, night, begin, end)
    told = [(r.at, f.finding.failure_mode, f.finding.summary) for r in visits for f in r.findings]
    assert told == []


def test_a_serving_engine_is_clear(night: Night) -> None:
    for moment in ("ready", "loaded", "after rotation", "recovered", "ready again", "loaded again"):
        assert night.reports[moment]["verdict"] == "clear", moment


# A worker is stopped.


def test_a_stopped_worker_is_a_stall_and_is_named(reports: tuple[Report, ...], night: Night) -> None:
    finding = first_of(at(reports, night, "stalled"), "engine-stalled")
    assert finding.severity is Severity.CRITICAL
    assert f"VLLM::Worker_TP1 (pid {night.pids['worker']}) is stopped, by a signal or a debugger" in finding.summary
    assert finding.subject.pids == (night.pids["worker"],)
    assert finding.subject.engine == engine_of(at(reports, night, "stalled"), night).id
    assert finding.since is not None
    assert abs(finding.since - night.times["stopped"]) < 30
    assert f"`py-spy dump --pid {night.pids['worker']}`" in finding.advice[0]


def test_a_daemon_that_was_killed_in_a_stall_still_knows(reports: tuple[Report, ...], night: Night) -> None:
    before = first_of(at(reports, night, "stalled"), "engine-stalled")
    reborn = next(report for report in reports if report.at > night.times["daemon killed"])
    after = first_of(reborn, "engine-stalled")
    assert (after.since, after.subject) == (before.since, before.subject)
    until = night.reports["still stalled"]["at"]
    lasting = [report for report in reports if reborn.at <= report.at <= until]
    assert len(lasting) > 1
    assert {tuple(f.finding.failure_mode for f in report.findings) for report in lasting} == {("engine-stalled",)}


def test_its_counters_go_on_after_it_was_killed(night: Night) -> None:
    for family in ("gpu_doctor_visits_total", "gpu_doctor_engine_log_lines_total"):
        assert sample(night, "stalled", family) <= sample(night, "remembered", family), family


def test_a_worker_that_goes_on_ends_the_stall(night: Night) -> None:
    assert night.reports["recovered"]["findings"] == []


# The engine core is killed.


def test_an_engine_core_that_is_killed_is_the_one_root_cause(reports: tuple[Report, ...], night: Night) -> None:
    engine = engine_of(at(reports, night, "recovered"), night).id
    for moment in ("core dead", "core buried"):
        report = at(reports, night, moment)
        finding = first_of(report, "worker-killed")
        assert f"The engine core (pid {night.pids['core']}) was ended from outside" in finding.summary
        assert finding.subject.engine == engine
        assert finding.severity is Severity.CRITICAL
        assert [f.finding.failure_mode for f in report.findings] == ["worker-killed"]


# Another engine takes its place.


def test_a_restarted_engine_is_followed_and_its_log_found_behind_tee(reports: tuple[Report, ...], night: Night) -> None:
    engine = engine_of(at(reports, night, "ready again"), night)
    assert engine.pid == night.pids["second"]
    assert engine.log == str(night.teed)
    again = between(reports, night, "ready again", "server killed")
    events = [e for report in again for e in report.snapshot.engine_events if e.log == str(night.teed)]
    assert {"stats", "request-served"} <= {event.signal for event in events}


def test_what_the_old_engine_died_of_stays_until_the_new_one_serves(reports: tuple[Report, ...], night: Night) -> None:
    loading = between(reports, night, "restarted", "ready again")
    told = [tuple(f.finding.failure_mode for f in report.findings) for report in loading]
    assert told[0] == ("worker-killed",)
    assert set(told) <= {("worker-killed",), ()}
    assert night.reports["ready again"]["findings"] == []


def test_the_new_engines_figures_are_its_own(reports: tuple[Report, ...], night: Night) -> None:
    old, new = (page_of(at(reports, night, moment), night) for moment in ("recovered", "loaded again"))
    assert new.engine == engine_of(at(reports, night, "loaded again"), night).id != old.engine
    assert known(new.requests_succeeded_total)
    assert known(old.requests_succeeded_total)
    assert new.requests_succeeded_total >= REQUESTS
    assert sample(night, "loaded again", "gpu_doctor_engine_requests_succeeded_total") == new.requests_succeeded_total


# Its server is killed.


def test_what_a_killed_server_leaves_behind_is_told(reports: tuple[Report, ...], night: Night) -> None:
    finding = first_of(at(reports, night, "orphaned"), "worker-killed")
    assert f"The engine's server (pid {night.pids['second']}) was ended by SIGKILL" in finding.summary
    assert f"its engine core (pid {night.pids['second core']}) lives on without it" in finding.summary
    assert finding.subject.engine == engine_of(at(reports, night, "loaded again"), night).id


def test_nothing_is_left_in_the_end(night: Night) -> None:
    assert night.reports["over"]["findings"] == []


# What was said is what is kept.


def test_the_recorder_tells_the_night_as_the_door_did(reports: tuple[Report, ...], night: Night) -> None:
    def told(findings: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(found["failure_mode"], found["summary"]) for found in findings]

    for moment, shown in night.reports.items():
        kept = at(reports, night, moment)
        assert told(shown["findings"]) == [(f.finding.failure_mode, f.finding.summary) for f in kept.findings], moment


def test_no_visit_failed_to_look(reports: tuple[Report, ...]) -> None:
    def blind(snapshot: Snapshot) -> set[Source]:
        return {unseen.source for unseen in snapshot.unseen if not unseen.what}

    ours = {Source.PROCESSES, Source.HOST, Source.STACK}
    failed = [(report.at, blind(report.snapshot) & ours) for report in reports if blind(report.snapshot) & ours]
    assert len(failed) <= len(reports) // 10, failed
