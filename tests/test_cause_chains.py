"""One incident, one root: the consequences of a cause hang under it, and strangers do not."""

from __future__ import annotations

import nodes

from doctor.report import Report
from doctor.snapshot import EngineEvent, Snapshot, Source, Why
from rules import RULES


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
