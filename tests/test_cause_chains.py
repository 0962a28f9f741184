"""One incident, one root: the consequences of a cause hang under it, and strangers do not."""

from __future__ import annotations

import datetime
from itertools import permutations
from pathlib import Path

import drills
import msgspec
import nodes
import pytest
from click.testing import CliRunner
from record_chain_cases import CHAINS

from doctor import cli
from doctor.diagnose import watch
from doctor.feeds import evidence, recording, simulated
from doctor.report import Report
from doctor.rule import Severity
from doctor.simulation.script import UPTIME_SECONDS, EngineScript, kernel_lines
from doctor.snapshot import EngineEvent, Snapshot, Source, Why
from rules import RULES

RECORDED = Path(__file__).parent / "chains"


def chain(report: Report) -> list[tuple[str, int]]:
    return [(f.finding.failure_mode, f.depth) for f in report.findings]


def timeout_lines(at: float) -> tuple[EngineEvent, ...]:
    """A watchdog that gives up on a silent rank, and the engine that dies of it."""
    return (
        nodes.line(
            "watchdog-timeout",
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=77, OpType=ALLREDUCE, Timeout(ms)=600000)",
            number=900,
            at=at,
            op="ALLREDUCE",
            seq=77,
            timeout_ms=600000,
        ),
        nodes.line("engine-dead", "EngineDeadError: EngineCore encountered an issue", number=910, at=at + 1),
    )


def lost_under_load(snapshot: Snapshot) -> Snapshot:
    sick = nodes.with_kernel(nodes.lose(snapshot, 2), nodes.xid(79, 2, at=snapshot.at - 700))
    return nodes.with_lines(sick, *timeout_lines(snapshot.at - 60))


def test_a_lost_gpu_the_timeout_after_it_and_the_engine_that_died_are_one_incident() -> None:
    report = nodes.report(nodes.last(nodes.healthy("hgx-h100-4"), lost_under_load), RULES)
    assert chain(report) == [("gpu-lost", 0), ("nccl-timeout", 1), ("engine-crashed", 2)]
    assert report.findings[1].caused_by == ("gpu-lost",)
    assert report.findings[0].finding.since == report.at - 700


def test_the_same_from_a_kernel_log_and_an_engine_log_alone() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), Source.NVML, Source.HOST, why=Why.NOT_GIVEN)
    pasted = nodes.put(given, seen=(Source.KERNEL_LOG, Source.ENGINE_LOG))
    lines = nodes.with_lines(
        nodes.with_kernel(pasted, nodes.xid(79, 2, at=nodes.START - 700)), *timeout_lines(nodes.START)
    )
    assert chain(nodes.report((lines,), RULES)) == [("gpu-lost", 0), ("nccl-timeout", 1), ("engine-crashed", 2)]


def test_a_timeout_long_before_the_gpu_was_lost_is_not_its_consequence() -> None:
    def later(snapshot: Snapshot) -> Snapshot:
        sick = nodes.with_kernel(nodes.lose(snapshot, 2), nodes.xid(79, 2, at=snapshot.at - 5))
        return nodes.with_lines(sick, *timeout_lines(snapshot.at - 900))

    report = nodes.report(nodes.last(nodes.healthy("hgx-h100-4"), later), RULES)
    assert ("gpu-lost", 0) in chain(report)
    assert ("nccl-timeout", 0) in chain(report)


def test_in_a_mesh_the_peers_of_a_lost_gpu_lose_links_because_of_it() -> None:
    def lost(snapshot: Snapshot) -> Snapshot:
        for peer in (0, 1, 3):
            links = next(g for g in snapshot.gpus if g.index == peer).links or ()
            ends = [link.link for link in links if link.remote_pci_address == nodes.address(2)]
            snapshot = nodes.links_down(snapshot, peer, ends)
        return nodes.lose(snapshot, 2)

    found = chain(nodes.report(nodes.last(nodes.healthy("hgx-h100-4"), lost), RULES))
    assert found[0] == ("gpu-lost", 0)
    assert ("nvlink-degraded", 1) in found


def test_a_dead_fabric_manager_explains_error_802() -> None:
    def dead(snapshot: Snapshot) -> Snapshot:
        line = nodes.line(
            "cuda-error",
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
            number=20,
            at=snapshot.at - 5,
            kind="system-not-initialized",
        )
        failed = nodes.line(
            "engine-core-init-failed", "Engine core initialization failed", number=30, at=snapshot.at - 4
        )
        begun = nodes.line("engine-version", "vLLM API server version 0.22.1", number=10, at=snapshot.at - 20)
        sick = nodes.put(snapshot, fabric_manager__unit_state="failed", fabric_manager__running=False)
        return nodes.with_lines(sick, begun, line, failed)

    report = nodes.report(nodes.last(nodes.healthy("hgx-h100-8"), dead), RULES)
    assert [f.finding.failure_mode for f in report.roots] == ["nvswitch-fabric-fault"]
    assert any("802" in evidence.text for evidence in report.findings[0].finding.evidence)


def test_dead_links_explain_that_the_ranks_talk_over_pcie() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.links_down(s, 4, range(18)))
    assert chain(nodes.report(visits, RULES)) == [("nvlink-degraded", 0), ("pcie-fallback", 1)]


def test_a_dead_manager_explains_links_that_are_down() -> None:
    def dead(snapshot: Snapshot) -> Snapshot:
        for gpu in range(8):
            snapshot = nodes.links_down(snapshot, gpu, range(18))
        return nodes.put(snapshot, fabric_manager__unit_state="failed", fabric_manager__running=False)

    report = nodes.report(nodes.each(nodes.healthy("hgx-h100-8"), dead), RULES)
    assert [f.finding.failure_mode for f in report.roots] == ["nvswitch-fabric-fault"]
    assert {f.finding.failure_mode for f in report.findings} >= {"nvlink-degraded", "pcie-fallback"}


def test_mig_under_tensor_parallelism_is_the_only_thing_wrong() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.partitioned(s, range(4)))
    report = nodes.report(visits, RULES)
    assert {f.finding.failure_mode for f in report.roots} == {"mig-misconfigured"}


def test_a_silent_processor_explains_the_silent_driver() -> None:
    visits = nodes.last(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(nodes.hung(s), nodes.xid(119, 1, at=s.at - 60))
    )
    assert chain(nodes.report(visits, RULES))[:2] == [("gpu-hung", 0), ("driver-unresponsive", 1)]


def test_heat_explains_the_loss_of_that_gpu_and_of_no_other() -> None:
    def burnt(hot: int) -> list[tuple[str, int]]:
        visits = [
            nodes.with_gpu(s, hot, clocks__hw_thermal_seconds=i * 5.0)
            for i, s in enumerate(nodes.healthy("hgx-h100-4"))
        ]
        lost = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(79, 1, at=s.at)))
        return chain(nodes.report(lost, RULES))

    assert burnt(1)[:2] == [("cooling-insufficient", 0), ("gpu-lost", 1)]
    assert set(burnt(3)) >= {("cooling-insufficient", 0), ("gpu-lost", 0)}


# Whole incidents, as `record_chain_cases.py` recorded them.

INCIDENTS = {
    "gpu-lost": [("gpu-lost", 0), ("nccl-timeout", 1), ("engine-crashed", 2), ("recovery-pending", 1)],
    "fabric-manager-dead": [("nvswitch-fabric-fault", 0)],
    "out-of-memory-killer": [("worker-killed", 0)],
    "memory-error": [("gpu-memory-faulty", 0), ("engine-crashed", 1), ("recovery-pending", 1)],
    "thermal-slowdown": [("cooling-insufficient", 0), ("throughput-below-reference", 1), ("ttft-slow", 2)],
    "memory-held": [("gpu-memory-held", 0), ("out-of-memory-at-startup", 1)],
    "pcie-fallback": [("pcie-fallback", 0), ("throughput-below-reference", 1)],
    "pcie-fallback-of-dead-links": [
        ("nvlink-degraded", 0),
        ("pcie-fallback", 1),
        ("throughput-below-reference", 2),
        ("allreduce-dominant", 2),
    ],
    "mig": [("mig-misconfigured", 0)],
}
"""Chain → its one incident. Where one finding joins the whole chain, `LINKS` says what it must quote."""

LINKS = {
    "gpu-lost": ("Xid (PCI:0000:3a:00): 79", "GPU_IS_LOST", "Watchdog caught collective operation timeout"),
    "fabric-manager-dead": ("no process; its unit is inactive", "Error 802: system not yet initialized"),
    "out-of-memory-killer": ("(exit code: -9)", "Killed process 2264"),
    "memory-error": ("Xid (PCI:0000:3a:00): 95", "uncorrectable ECC error encountered", "unhandled cuda error"),
    "thermal-slowdown": ("for 330.0 of the last 330 s",),
    "memory-held": (
        "pid 9377 (/usr/bin/python3) holds 20.0 GiB",
        "on startup is less than desired GPU memory utilization",
    ),
    "pcie-fallback": ("Custom allreduce is disabled",),
    "pcie-fallback-of-dead-links": ("0 of 18 links active", "Custom allreduce is disabled"),
    "mig": ("current mode is enabled", "no NVLink is up", "P2P read: not supported", "Custom allreduce is disabled"),
}

TWO = {
    "two-lost-gpu-and-fault-elsewhere": {"gpu-lost", "application-fault"},
    "two-lost-gpu-and-timeout-elsewhere": {"gpu-lost", "nccl-timeout"},
    "two-memory-error-and-a-narrow-slot": {"gpu-memory-faulty", "pcie-link-degraded"},
    "two-heat-and-a-narrow-slot": {"cooling-insufficient", "pcie-link-degraded"},
    "two-held-memory-and-a-brake": {"gpu-memory-held", "power-brake"},
    "two-slow-slot-and-own-error": {"pcie-link-degraded", "engine-crashed"},
}


def visits_of(name: str) -> tuple[Snapshot, ...]:
    return tuple(recording.read(RECORDED / f"{name}.rec"))


def roots(report: Report) -> list[str]:
    return [f.finding.failure_mode for f in report.roots]


def test_every_chain_is_recorded_and_told() -> None:
    assert {path.stem for path in RECORDED.glob("*.rec")} == set(CHAINS) == {*INCIDENTS, *TWO}
    assert set(LINKS) == set(INCIDENTS)


@pytest.mark.parametrize("name", INCIDENTS)
def test_an_incident_is_one_and_its_root_comes_first(name: str) -> None:
    report = nodes.report(visits_of(name), RULES)
    assert chain(report) == INCIDENTS[name]
    assert {piece for piece in LINKS[name] for f in report.findings for e in f.finding.evidence if piece in e.text} == {
        *LINKS[name]
    }


@pytest.mark.parametrize("name", TWO)
def test_two_unrelated_faults_stay_two_incidents(name: str) -> None:
    report = nodes.report(visits_of(name), RULES)
    assert sorted(roots(report)) == sorted(TWO[name])


MISSING = (Source.KERNEL_LOG, Source.ENGINE_LOG, Source.NVML, Source.ENGINE_METRICS, Source.PROCESSES)


@pytest.mark.parametrize("name", INCIDENTS)
@pytest.mark.parametrize("source", MISSING, ids=lambda source: source.value)
def test_with_a_part_missing_nothing_else_becomes_the_root(name: str, source: Source) -> None:
    blind = nodes.each(visits_of(name), lambda s: nodes.unseen(s, source, why=Why.NO_PERMISSION))
    report = nodes.report(blind, RULES)
    found = [f.finding.failure_mode for f in report.findings if f.finding.severity != Severity.NOTICE]
    expected = [failure_mode for failure_mode, _ in INCIDENTS[name]]
    assert set(found) <= set(expected)
    assert sorted(found, key=expected.index)[:1] == found[:1], "what is left of the chain begins with its first link"


# The same as pasted evidence: what the node's kernel and its engine wrote.

PASTED = {
    "gpu-lost": (["gpu-lost"], ["nccl-timeout"], ["gpu-lost"]),
    "fabric-manager-dead": ([], ["nvswitch-fabric-fault"], ["nvswitch-fabric-fault"]),
    "out-of-memory-killer": (["worker-killed"], ["worker-killed"], ["worker-killed"]),
    "memory-error": (["gpu-memory-faulty"], ["gpu-memory-faulty"], ["gpu-memory-faulty"]),
    "memory-held": ([], ["out-of-memory-at-startup"], ["out-of-memory-at-startup"]),
    "pcie-fallback": ([], ["pcie-fallback"], ["pcie-fallback"]),
}
"""Chain → the roots by the kernel's log alone, by the engine's log alone, and by both."""


def pasted(name: str, folder: Path, begins: float = drills.BEGINS) -> tuple[Path, Path]:
    """Write what `dmesg -T` and the engine's log hold at the end of the drill; return both files."""
    seconds, profile, faults = CHAINS[name]
    drill = msgspec.structs.replace(simulated.drill_of(profile, faults), started_at=begins)

    def stamped(second: float) -> str:
        at = datetime.datetime.fromtimestamp(begins + max(second, -UPTIME_SECONDS), datetime.timezone.utc)
        return f"[{at:%a %b %d %H:%M:%S %Y}]"

    dmesg, log = folder / "dmesg.txt", folder / "serve.log"
    dmesg.write_text("".join(f"{stamped(line.seconds)} {line.text}\n" for line in kernel_lines(drill)))
    told = [line for line in EngineScript(drill, 8000).lines() if line.seconds <= seconds[-1]]
    log.write_text("".join(f"{line.text}\n" for line in told))
    return dmesg, log


@pytest.mark.parametrize("name", PASTED)
def test_a_pasted_incident_has_the_same_root_whatever_is_missing(name: str, tmp_path: Path) -> None:
    dmesg, log = pasted(name, tmp_path)

    def of(*files: Path) -> list[str]:
        (*_, report) = watch(evidence.read(files, now=drills.BEGINS + 600), RULES, keep=3600)
        return roots(report)

    by_kernel, by_engine, by_both = PASTED[name]
    assert of(dmesg) == by_kernel
    assert of(log) == by_engine
    assert [of(*order) for order in permutations((dmesg, log))] == [by_both, by_both]


# As the engineer on call reads it.


@pytest.mark.parametrize(("name", "code"), [("gpu-lost", 2), ("thermal-slowdown", 2), ("mig", 1)])
def test_a_replay_tells_the_incident_from_the_top(name: str, code: int) -> None:
    result = CliRunner().invoke(cli.cli, ["check", "--replay", str(RECORDED / f"{name}.rec")])
    assert result.exit_code == code
    places = [result.output.find(failure_mode) for failure_mode, _ in INCIDENTS[name]]
    assert -1 not in places
    assert places == sorted(places)
