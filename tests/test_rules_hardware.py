"""The hardware rules: each fires on its failure mode, and stays quiet on what only looks like it."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
from nodes import one, quiet

from doctor.rule import AnyRule, Confidence, Severity
from doctor.snapshot import (
    Absent,
    BlockedTask,
    DriverGpu,
    FabricManager,
    FabricMessage,
    HostMessage,
    Mig,
    NvidiaMessage,
    PciDevice,
    Sample,
    Snapshot,
    Source,
    Sxid,
    Why,
)
from rules import (
    cooling_insufficient,
    driver_unresponsive,
    gpu_lost,
    mig_misconfigured,
    nvlink_degraded,
    nvswitch_fabric_fault,
    pcie_fallback,
    power_transient,
    tp_single_stream_stall,
)
from rules.tables.products import PRODUCTS, product_of
from rules.tables.sxids import SXIDS
from rules.tables.xids import XIDS

MINE = (
    pcie_fallback.RULE,
    nvlink_degraded.RULE,
    nvswitch_fabric_fault.RULE,
    tp_single_stream_stall.RULE,
    cooling_insufficient.RULE,
    power_transient.RULE,
    mig_misconfigured.RULE,
    gpu_lost.RULE,
    driver_unresponsive.RULE,
)


# All of them


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_healthy_node_gets_no_alarm(rule: AnyRule, profile: str, busy: bool) -> None:
    visits = nodes.healthy(profile, busy=busy)
    assert all(f.severity == Severity.NOTICE for f in nodes.found(rule, visits))
    assert nodes.why_blind(rule, visits) is None


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", ["hgx-h100-8", "hgx-h100-4", "dgx-h100-4of8", "hgx-h200-8", "hgx-a100-8"])
def test_a_healthy_nvlink_board_gets_not_even_a_notice(rule: AnyRule, profile: str) -> None:
    assert quiet(rule, nodes.healthy(profile))


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_blindness_is_not_health(rule: AnyRule) -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.unseen(s, Source.NVML, why=Why.FAILED))
    assert nodes.found(rule, visits) == ()
    assert nodes.why_blind(rule, visits) is not None


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_a_node_without_a_driver_is_not_judged(rule: AnyRule) -> None:
    bare = Snapshot(at=nodes.START, unseen=nodes.unseen(Snapshot(at=0), *Source, why=Why.NOT_PRESENT).unseen)
    assert nodes.found(rule, (bare,)) == ()
    why = nodes.why_blind(rule, (bare,))
    assert why is not None
    assert why.why is Why.NOT_PRESENT


# Tables


def test_a_product_is_looked_up_by_its_device_id_and_never_by_part_of_a_name() -> None:
    gpu = nodes.healthy("hgx-h200-8")[0].gpus[0]
    assert product_of(gpu) is not None
    assert product_of(nodes.put(gpu, pci_device_id="10de:ffff")) is None
    named = nodes.put(gpu, pci_device_id=Absent(Why.NOT_ASKED))
    assert product_of(named) == product_of(gpu)
    assert product_of(nodes.put(named, name="NVIDIA GH200 480GB")) != product_of(gpu)
    assert product_of(nodes.put(named, name="NVIDIA H200 something")) is None


def test_every_row_of_a_table_has_its_source() -> None:
    assert all(product.source for product in PRODUCTS)
    assert len({product.device_id for product in PRODUCTS}) == len(PRODUCTS)
    assert {79, 74, 119, 120, 13, 31, 43, 45, 48, 62, 109, 63, 64, 92, 94, 95, 140, 154} <= set(XIDS)
    assert SXIDS[20034].weight == "may-be-fatal"


# gpu-lost


def test_an_xid_79_is_a_lost_gpu_with_its_rank_and_address() -> None:
    visits = nodes.last(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(nodes.lose(s, 2), nodes.xid(79, 2, at=s.at))
    )
    finding = one(gpu_lost.RULE, visits)
    assert finding.subject.gpus == (nodes.uuid(2),)
    assert finding.subject.engine == visits[-1].engines[0].id
    assert finding.confidence is Confidence.HIGH
    assert "GPU 2" in finding.summary
    assert "VLLM::Worker_TP2" in finding.summary
    assert {e.source for e in finding.evidence} == {"kernel-log", "nvml"}
    assert any(nodes.address(2) in line for line in finding.advice)


def test_a_gpu_that_nvml_no_longer_lists_is_lost() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.forget_gpu(s, 5))
    finding = one(gpu_lost.RULE, visits)
    assert nodes.address(5) in finding.summary


def test_a_burst_of_one_xid_is_one_event() -> None:
    lines = [nodes.xid(79, 1, at=nodes.START + i) for i in range(20)]
    shadows = [nodes.xid(45, 1, at=nodes.START + 5, caused_by=79) for _ in range(50)]
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(s, *lines, *shadows))
    finding = one(gpu_lost.RULE, visits)
    assert len(finding.evidence) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: nodes.with_kernel(s, nodes.xid(79, 1, before_boot=True)),
        lambda s: nodes.with_kernel(s, nodes.xid(79, 1, at=nodes.BOOT - 60)),
        lambda s: nodes.with_kernel(s, nodes.xid(79, 1, at=s.at - 3000)),  # NVML has read the GPU since
        lambda s: nodes.with_kernel(
            s,
            nodes.xid(79, 1, at=s.at - 30),
            NvidiaMessage(
                text="loading NVIDIA UNIX x86_64 Kernel Module", where="k:2", at=s.at - 9, kind="module-loaded"
            ),
        ),
        lambda s: nodes.with_kernel(
            s, nodes.xid(79, 1, at=None), HostMessage(text="Linux version 6.8.0", where="k:2", kind="boot")
        ),
        lambda s: nodes.with_kernel(s, nodes.xid(13, 1), nodes.xid(31, 1), nodes.xid(45, 1)),
        lambda s: nodes.with_lines(s, nodes.line("nvml-error", "NVMLError_Unknown: Unknown Error", kind="unknown")),
    ],
    ids=[
        "earlier-boot",
        "before-boot-time",
        "answered-since",
        "driver-reloaded",
        "rebooted",
        "other-xids",
        "nvml-unknown",
    ],
)
def test_what_only_looks_like_a_lost_gpu(change: Any) -> None:
    assert quiet(gpu_lost.RULE, nodes.last(nodes.healthy("hgx-h100-4"), change))


def test_a_gpu_that_came_back_is_a_warning_for_a_while() -> None:
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(s, nodes.xid(79, 1, at=s.at - 300)))
    finding = one(gpu_lost.RULE, visits)
    assert finding.severity is Severity.WARNING
    assert "answers again" in finding.summary


def without_driver(snapshot: Snapshot, driver: Any) -> Snapshot:
    devices = tuple(
        nodes.put(d, driver=driver) if d.address == nodes.address(3) else d for d in snapshot.host.pci_devices or ()
    )
    held = tuple(d for d in snapshot.host.driver_gpus or () if d.pci_address != nodes.address(3))
    return nodes.put(nodes.forget_gpu(snapshot, 3), host__pci_devices=devices, host__driver_gpus=held)


def test_a_gpu_that_no_driver_took_is_missing() -> None:
    unbound = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: without_driver(s, Absent(Why.NOT_PRESENT)))
    assert "no driver is bound" in one(gpu_lost.RULE, unbound).summary
    contained = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: without_driver(s, "nvidia"))
    assert quiet(gpu_lost.RULE, contained)


def test_a_pasted_lspci_shows_more_gpus_than_nvidia_smi() -> None:
    def pasted(snapshot: Snapshot) -> Snapshot:
        return nodes.put(without_driver(snapshot, Absent(Why.NOT_GIVEN)), host__driver_gpus=Absent(Why.NOT_GIVEN))

    assert "PCI tree" in one(gpu_lost.RULE, nodes.each(nodes.healthy("hgx-h100-4"), pasted)).summary


def test_a_gpu_given_to_a_virtual_machine_is_not_lost() -> None:
    def give_away(snapshot: Snapshot) -> Snapshot:
        devices = tuple(
            nodes.put(d, driver="vfio-pci") if d.address == nodes.address(3) else d
            for d in snapshot.host.pci_devices or ()
        )
        return nodes.put(nodes.forget_gpu(snapshot, 3), host__pci_devices=devices)

    assert quiet(gpu_lost.RULE, nodes.each(nodes.healthy("hgx-h100-4"), give_away))


def test_a_container_that_holds_some_gpus_has_lost_none() -> None:
    def contain(snapshot: Snapshot) -> Snapshot:
        given = tuple(DriverGpu(pci_address=nodes.address(i)) for i in range(4))
        for index in range(4, 8):
            snapshot = nodes.forget_gpu(snapshot, index)
        return nodes.put(snapshot, host__driver_gpus=given)

    assert quiet(gpu_lost.RULE, nodes.each(nodes.healthy("hgx-h100-8"), contain))


def test_an_engine_that_meets_unknown_errors_of_cuda_and_nvml_points_to_a_lost_gpu() -> None:
    lines = (
        nodes.line("cuda-error", "torch.AcceleratorError: CUDA error: unknown error", number=1, kind="unknown"),
        nodes.line("nvml-error", "pynvml.NVMLError_Unknown: Unknown Error", number=5, kind="unknown"),
    )
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    finding = one(gpu_lost.RULE, (nodes.with_lines(given, *lines),))
    assert finding.confidence is Confidence.LOW
    started = nodes.with_lines(given, *lines, nodes.line("startup-complete", number=9))
    assert nodes.found(gpu_lost.RULE, (started,)) == ()


def test_fewer_gpus_than_the_site_expects() -> None:
    visits = nodes.healthy("hgx-h100-4")
    assert one(gpu_lost.RULE.but(limits=gpu_lost.Limits(expected_gpus=8)), visits)
    assert quiet(gpu_lost.RULE.but(limits=gpu_lost.Limits(expected_gpus=4)), visits)


# driver-unresponsive


def test_a_hung_driver_under_an_engine_is_critical_at_the_first_visit() -> None:
    finding = one(driver_unresponsive.RULE, (nodes.hung(nodes.healthy("hgx-h100-4")[0], 10.0),))
    assert finding.severity is Severity.CRITICAL
    assert "10 s" in finding.summary
    assert "nvidia-smi" in finding.summary


def test_the_silence_is_counted_over_visits() -> None:
    visits = nodes.healthy("hgx-h100-4", visits=5)
    sick = (*visits[:2], *(nodes.hung(s, 5.0) for s in visits[2:]))
    finding = one(driver_unresponsive.RULE, sick)
    assert finding.since == sick[2].at
    assert "30 s" in finding.summary


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("nvidia-smi",), "nvidia-smi (pid 7) hangs in the kernel"),
        (("nvidia-smi", "vllm", "dcgm"), "nvidia-smi (pid 7) and 2 more hang in the kernel"),
    ],
)
def test_the_tasks_that_hang_with_the_driver_are_counted(names: tuple[str, ...], words: str) -> None:
    tasks = tuple(BlockedTask(pid=7 + i, name=name) for i, name in enumerate(names))
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.put(nodes.hung(s), host__blocked_tasks=tasks))
    assert words in one(driver_unresponsive.RULE, visits).summary


def test_an_xid_119_explains_the_silence() -> None:
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(nodes.hung(s), nodes.xid(119, 1)))
    assert any("119" in e.text for e in one(driver_unresponsive.RULE, visits).evidence)


def test_a_slow_first_start_on_an_idle_node_is_only_a_notice_and_then_nothing() -> None:
    idle = nodes.each(nodes.healthy("hgx-h100-8", busy=False), nodes.without_engine)
    waking = nodes.put(nodes.hung(idle[0], 25.0), host__blocked_tasks=())
    assert one(driver_unresponsive.RULE, (waking,)).severity is Severity.NOTICE
    assert quiet(driver_unresponsive.RULE, (waking, idle[1]))


def test_an_idle_node_that_stays_silent_is_no_longer_waking() -> None:
    idle = nodes.each(nodes.healthy("hgx-h100-8", busy=False, visits=6), nodes.without_engine)
    assert one(driver_unresponsive.RULE, nodes.each(idle, nodes.hung)).severity is Severity.CRITICAL


def test_where_no_driver_is_loaded_none_is_silent() -> None:
    """Seen on a busy node without a GPU: the child that would ask NVML took 8 s to come up."""
    gone = Absent(Why.NOT_PRESENT, "the nvidia kernel module is not loaded")
    sick = nodes.each(
        nodes.healthy("hgx-h100-4", visits=3), lambda s: nodes.put(nodes.hung(s), host__driver_module=gone)
    )
    assert nodes.found(driver_unresponsive.RULE, sick) == ()


def test_a_visit_that_had_no_processor_says_nothing_of_the_driver() -> None:
    """Seen on a machine with a load of 15 on two processors: NVML's child and the visit itself came too late."""
    late = nodes.each(
        nodes.healthy("hgx-h100-4", visits=3), lambda s: nodes.put(nodes.hung(s), nvml_blocked_seconds=0.0)
    )
    assert nodes.found(driver_unresponsive.RULE, late) == ()


def test_silence_is_counted_from_its_first_visit_not_from_when_the_gpus_were_let_go() -> None:
    first, second, third = nodes.healthy("hgx-h100-4", visits=3)
    let_go = nodes.each((first, second), lambda s: nodes.unseen(s, Source.NVML, why=Why.NOT_ASKED))
    finding = one(driver_unresponsive.RULE, (*let_go, nodes.hung(third, 6.0)))
    assert "for 6 s" in finding.summary


def test_a_task_in_state_d_beside_an_answering_driver_is_no_fault() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-4"),
        lambda s: nodes.put(s, host__blocked_tasks=(BlockedTask(pid=7, name="nv_queue"),), nvml_blocked_seconds=0.4),
    )
    assert quiet(driver_unresponsive.RULE, visits)


# nvlink-degraded


@pytest.mark.parametrize(("profile", "full"), [("hgx-h100-8", 18), ("hgx-h100-4", 18), ("hgx-a100-8", 12)])
def test_links_down_on_a_board_that_has_them(profile: str, full: int) -> None:
    visits = nodes.each(nodes.healthy(profile), lambda s: nodes.links_down(s, gpu=2, links=(3, 4)))
    finding = one(nvlink_degraded.RULE, visits)
    assert f"GPU 2: {full - 2} of {full} NVLinks" in finding.summary
    assert finding.subject.links == (f"{nodes.uuid(2)}/3", f"{nodes.uuid(2)}/4")
    assert nodes.uuid(2) in finding.subject.gpus


def test_it_is_known_since_when_a_link_is_down() -> None:
    visits = nodes.last(nodes.healthy("hgx-h100-8"), lambda s: nodes.links_down(s, gpu=2, links=(3,)))
    assert one(nvlink_degraded.RULE, visits).since == visits[-1].at


def test_the_matrix_alone_shows_the_poor_gpu_beside_its_peers() -> None:
    def matrix_only(snapshot: Snapshot) -> Snapshot:
        sick = nodes.links_down(snapshot, gpu=5, links=(0, 1))
        return nodes.with_gpu(sick, range(8), links=Absent(Why.NOT_GIVEN), pci_device_id=Absent(Why.NOT_GIVEN))

    visits = nodes.each(nodes.healthy("hgx-h100-8"), matrix_only)
    finding = one(nvlink_degraded.RULE, visits)
    assert "GPU 5: 16 of 18" in finding.summary
    unnamed = nodes.each(visits, lambda s: nodes.with_gpu(s, range(8), name="NVIDIA X100"))
    assert "GPU 5: 16 of 18" in one(nvlink_degraded.RULE, unnamed).summary


@pytest.mark.parametrize("profile", nodes.PROFILES)
def test_the_matrix_of_a_healthy_node_is_healthy_whatever_its_gpus_are_called(profile: str) -> None:
    for name in (nodes.PROFILES[profile].product, "NVIDIA X100"):
        visits = nodes.each(
            nodes.healthy(profile),
            lambda s, name=name: nodes.with_gpu(
                s, range(8), links=Absent(Why.NOT_GIVEN), pci_device_id=Absent(Why.NOT_GIVEN), name=name
            ),
        )
        assert nodes.found(nvlink_degraded.RULE, visits) == ()


def test_a_cube_mesh_with_one_and_two_links_a_pair_is_healthy() -> None:
    def cube(snapshot: Snapshot) -> Snapshot:
        pairs = tuple(nodes.put(p, nvlinks=(2, 1, 0)[i % 3]) for i, p in enumerate(snapshot.pairs))
        unknown = nodes.with_gpu(
            snapshot, range(8), links=Absent(Why.NOT_GIVEN), pci_device_id="10de:1db5", name="Tesla V100-SXM2-32GB"
        )
        return nodes.put(unknown, pairs=pairs)

    assert quiet(nvlink_degraded.RULE, nodes.each(nodes.healthy("hgx-h100-8"), cube))


def test_unbridged_cards_show_twelve_dead_links_for_ever() -> None:
    visits = nodes.healthy("h100-pcie-4")
    assert all(link.active is False for gpu in visits[0].gpus for link in gpu.links or ())
    assert quiet(nvlink_degraded.RULE, visits)


def test_a_bridge_that_worked_and_no_longer_does() -> None:
    visits = nodes.last(nodes.healthy("h100-nvl-4"), lambda s: nodes.links_down(s, gpu=1, links=range(12)))
    assert "GPU 1: 0 of 12" in one(nvlink_degraded.RULE, visits).summary


def test_mig_shows_links_as_down_by_design() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8", tp=4), lambda s: nodes.partitioned(s, 7))
    assert quiet(nvlink_degraded.RULE, visits)


def test_two_gpus_of_a_mesh_in_a_virtual_machine_are_healthy() -> None:
    def slice_of(snapshot: Snapshot) -> Snapshot:
        for index in (2, 3):
            snapshot = nodes.forget_gpu(snapshot, index)
        for index in (0, 1):
            snapshot = nodes.links_down(snapshot, index, [n for n in range(18) if n >= 6])
        return nodes.put(nodes.with_pairs(snapshot, nvlinks=6, p2p_nvlink="ok"), host__virtual_machine=True)

    assert quiet(nvlink_degraded.RULE, nodes.each(nodes.healthy("hgx-h100-4", tp=2), slice_of))


# pcie-fallback


def over_pcie(snapshot: Snapshot) -> Snapshot:
    return nodes.with_pairs(snapshot, nvlinks=0, p2p_nvlink="not-supported")


@pytest.mark.parametrize("profile", ["hgx-h100-8", "hgx-h100-4", "dgx-h100-4of8", "hgx-a100-8"])
def test_pcie_between_the_ranks_of_an_nvlink_board_is_a_fault(profile: str) -> None:
    finding = one(pcie_fallback.RULE, nodes.each(nodes.healthy(profile), over_pcie))
    assert finding.severity is Severity.WARNING
    assert "fall back to PCIe" in finding.summary
    assert finding.evidence[0].source == "nvml"


def test_one_pair_of_the_group_is_enough() -> None:
    def one_pair(snapshot: Snapshot) -> Snapshot:
        pairs = tuple(nodes.put(p, nvlinks=0) if i == 0 else p for i, p in enumerate(snapshot.pairs))
        return nodes.put(snapshot, pairs=pairs)

    assert "1 of 6 pairs" in one(pcie_fallback.RULE, nodes.each(nodes.healthy("hgx-h100-4"), one_pair)).summary


def test_the_engine_found_no_nvlink_although_there_is_some_now() -> None:
    line = nodes.line("custom-allreduce-off-pcie", "Custom allreduce is disabled", number=3)
    visits = nodes.healthy("hgx-h100-4")
    sick = (nodes.with_lines(visits[0], line), *visits[1:])
    finding = one(pcie_fallback.RULE, sick)
    assert finding.severity is Severity.WARNING
    assert "restart the engine" in finding.summary
    again = nodes.with_lines(sick[-1], *nodes.startup_lines(4))
    assert quiet(pcie_fallback.RULE, (*sick[:-1], again))


@pytest.mark.parametrize("profile", ["h100-pcie-4", "l40s-4", "rtx4090-4", "h100-nvl-4"])
def test_on_pcie_cards_it_is_advice(profile: str) -> None:
    finding = one(pcie_fallback.RULE, nodes.healthy(profile))
    assert finding.severity is Severity.NOTICE
    assert "expected" in finding.summary


@pytest.mark.parametrize(("profile", "tp"), [("h100-nvl-4", 2), ("rtx4090-4", 1), ("h100-pcie-4", 1)])
def test_one_rank_or_a_bridged_pair_has_nothing_to_fear(profile: str, tp: int) -> None:
    assert quiet(pcie_fallback.RULE, nodes.healthy(profile, tp=tp))


def test_one_rank_on_a_board_with_dead_links_does_not_care() -> None:
    assert quiet(pcie_fallback.RULE, nodes.each(nodes.healthy("hgx-h100-4", tp=1), over_pcie))


def test_ranks_on_the_good_half_of_a_board_do_not_care_about_the_other() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-8", tp=4), lambda s: nodes.with_pairs(s, (6, 7), nvlinks=0, p2p_nvlink="not-supported")
    )
    assert quiet(pcie_fallback.RULE, visits)


def test_a_log_alone_can_not_tell_the_hardware_and_says_so() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    lines = (
        nodes.line("engine-config", number=1, tensor_parallel_size=4),
        nodes.line("custom-allreduce-off-pcie", "Custom allreduce is disabled", number=2),
        nodes.line("startup-complete", number=3),
    )
    finding = one(pcie_fallback.RULE, (nodes.with_lines(given, *lines),))
    assert finding.severity is Severity.NOTICE
    assert finding.confidence is Confidence.LOW
    assert "SXM" in finding.summary


def test_a_failed_p2p_probe_is_no_proof_of_pcie() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    probe = nodes.line("p2p-probe-failed", "Error happened when batch testing peer-to-peer access")
    assert nodes.found(pcie_fallback.RULE, (nodes.with_lines(given, probe),)) == ()


def test_a_board_without_its_matrix_is_not_judged() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.put(s, pairs=()))
    assert nodes.why_blind(pcie_fallback.RULE, visits) is not None


# nvswitch-fabric-fault


def without_manager(snapshot: Snapshot) -> Snapshot:
    return nodes.put(snapshot, fabric_manager__unit_state="failed", fabric_manager__running=False)


def test_a_dead_manager_on_a_board_with_switches() -> None:
    finding = one(nvswitch_fabric_fault.RULE, nodes.each(nodes.healthy("hgx-h100-8"), without_manager))
    assert finding.severity is Severity.CRITICAL
    assert "not running" in finding.summary
    assert any("nvidia-fabricmanager" in line for line in finding.advice)


def test_completed_registration_does_not_clear_a_dead_manager() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), without_manager)
    assert all(gpu.fabric.state == "completed" for gpu in visits[-1].gpus)
    assert nodes.found(nvswitch_fabric_fault.RULE, visits)


@pytest.mark.parametrize("profile", ["hgx-h100-4", "h100-pcie-4", "l40s-4"])
def test_a_board_without_switches_needs_no_manager(profile: str) -> None:
    nothing = FabricMessage(text="NV_WARN_NOTHING_TO_DO", where="fm.log:1", kind="nothing-to-do")
    visits = nodes.each(
        nodes.healthy(profile),
        lambda s: nodes.put(
            s, fabric_manager=FabricManager(unit_state="failed", running=False, switches=(), messages=(nothing,))
        ),
    )
    assert quiet(nvswitch_fabric_fault.RULE, visits)


def test_a_manager_of_another_version_is_a_warning_while_it_runs() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.put(s, fabric_manager__version="590.44.01"))
    finding = one(nvswitch_fabric_fault.RULE, visits)
    assert finding.severity is Severity.WARNING
    assert "590.44.01" in finding.summary
    assert "590.48.01" in finding.summary


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"fabric__state": "in-progress"}, Severity.CRITICAL),
        ({"fabric__status": "Insufficient Resources"}, Severity.CRITICAL),
        ({"fabric__health": "unhealthy", "fabric__unhealthy": ("route unhealthy",)}, Severity.CRITICAL),
        ({"fabric__health": "limited"}, Severity.WARNING),
    ],
)
def test_a_gpu_that_is_not_in_order_with_the_fabric(changes: dict[str, Any], severity: Severity) -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, 3, **changes))
    finding = one(nvswitch_fabric_fault.RULE, visits)
    assert finding.severity is severity
    assert "GPU 3" in finding.summary


def test_a_health_mask_that_reports_nothing_accuses_nobody() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, range(8), fabric__health="not-reported")
    )
    assert quiet(nvswitch_fabric_fault.RULE, visits)


def test_the_fabric_may_take_minutes_after_boot() -> None:
    def booting(snapshot: Snapshot) -> Snapshot:
        young = nodes.put(
            without_manager(snapshot), node__booted_at=snapshot.at - 60, fabric_manager__unit_state="activating"
        )
        return nodes.with_gpu(young, range(8), fabric__state="in-progress")

    assert quiet(nvswitch_fabric_fault.RULE, nodes.each(nodes.healthy("hgx-h100-8"), booting))


def sxid(code: int, severity: str | None, **fields: Any) -> Sxid:
    return Sxid(
        text=f"SXid (PCI:{nodes.switch_address(0)}): {code}, {severity}, Link 30 something",
        where="/dev/kmsg:9",
        at=nodes.START,
        code=code,
        switch=nodes.switch_address(0),
        severity=severity,
        **fields,
    )


def test_a_fatal_sxid_counts_and_a_corrected_one_does_not() -> None:
    visits = nodes.healthy("hgx-h100-8")
    fatal = nodes.last(visits, lambda s: nodes.with_kernel(s, sxid(20034, "fatal", link=30)))
    assert "20034" in one(nvswitch_fabric_fault.RULE, fatal).summary
    for mild in (
        sxid(20034, "non-fatal"),
        sxid(12028, "non-fatal"),
        sxid(11012, None),
        sxid(22003, "fatal", before_boot=True),
    ):
        assert quiet(nvswitch_fabric_fault.RULE, nodes.last(visits, lambda s, mild=mild: nodes.with_kernel(s, mild)))


def test_cuda_802_in_a_log_alone_is_the_fabric() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    line = nodes.line("cuda-error", "Error 802: system not yet initialized", kind="system-not-initialized")
    assert "802" in one(nvswitch_fabric_fault.RULE, (nodes.with_lines(given, line),)).summary


def test_multicast_that_can_not_be_bound_is_the_fabric_unless_memory_ran_out() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    bind = nodes.line("nccl-nvls-failed", "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 2097152")
    assert one(nvswitch_fabric_fault.RULE, (nodes.with_lines(given, bind),)).confidence is Confidence.MEDIUM
    memory = nodes.line("nccl-nvls-failed", "transport/nvls.cc NCCL WARN Cuda failure 2 'out of memory'")
    assert nodes.found(nvswitch_fabric_fault.RULE, (nodes.with_lines(given, memory),)) == ()


def test_no_multicast_is_a_fault_only_where_there_are_switches() -> None:
    line = nodes.line("symm-mem-no-multicast", "symmetric memory multicast operations are not supported", number=9)
    board = nodes.last(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_lines(s, line))
    assert one(nvswitch_fabric_fault.RULE, board).severity is Severity.WARNING
    mesh = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_lines(s, line))
    assert quiet(nvswitch_fabric_fault.RULE, mesh)


def test_a_board_with_switches_whose_manager_nobody_saw_is_not_judged() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-8"), lambda s: nodes.unseen(s, Source.FABRIC_MANAGER, why=Why.NO_PERMISSION)
    )
    assert nodes.why_blind(nvswitch_fabric_fault.RULE, visits) is not None


def test_the_matrix_alone_tells_that_there_are_switches() -> None:
    def pasted(snapshot: Snapshot) -> Snapshot:
        blind = nodes.unseen(without_manager(snapshot), Source.HOST, why=Why.NOT_GIVEN)
        return nodes.with_gpu(
            nodes.put(blind, fabric_manager__switches=Absent(Why.NOT_GIVEN)), range(8), links=Absent(Why.NOT_GIVEN)
        )

    board = nodes.each(nodes.healthy("hgx-h100-8"), pasted)
    assert one(nvswitch_fabric_fault.RULE, board).severity is Severity.CRITICAL
    mesh = nodes.each(nodes.healthy("hgx-h100-4"), pasted)
    assert one(nvswitch_fabric_fault.RULE, mesh).confidence is Confidence.LOW


# mig-misconfigured


def test_mig_under_tensor_parallelism() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.partitioned(s, 1))
    finding = one(mig_misconfigured.RULE, visits)
    assert "4 tensor-parallel ranks" in finding.summary
    assert finding.subject.engine == visits[0].engines[0].id


@pytest.mark.parametrize("later", [True, False])
def test_a_mode_that_waits_for_a_reset(later: bool) -> None:
    pending = Mig(enabled=not later, enabled_after_reset=later, devices=(), device_slots=7)
    visits = nodes.each(nodes.healthy("hgx-h100-8", tp=4), lambda s: nodes.with_gpu(s, 6, mig=pending))
    assert "waits for a reset" in one(mig_misconfigured.RULE, visits).summary


def test_memory_in_no_instance() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8", tp=4), lambda s: nodes.partitioned(s, 6, ("3g.40gb",)))
    assert "40 of its 80 GiB belong to no instance" in one(mig_misconfigured.RULE, visits).summary


def test_instances_left_over_beside_an_engine_that_spreads_over_the_others() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8", tp=4), lambda s: nodes.partitioned(s, 6))
    finding = one(mig_misconfigured.RULE, visits)
    assert finding.severity is Severity.NOTICE
    assert "still partitioned" in finding.summary


@pytest.mark.parametrize(
    "layout", [("3g.40gb", "4g.40gb"), ("1g.10gb",) * 7, ("3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb")]
)
def test_a_deliberate_partition_is_nobodys_business(layout: tuple[str, ...]) -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4", tp=1), lambda s: nodes.partitioned(s, range(4), layout))
    assert quiet(mig_misconfigured.RULE, visits)


def test_an_engine_that_can_not_read_the_name_of_its_instance() -> None:
    given = nodes.unseen(Snapshot(at=nodes.START), *Source, why=Why.NOT_GIVEN)
    text = "ValueError: invalid literal for int() with base 10: 'MIG-11111111-2222-3333-4444-555555555555'"
    named = nodes.line("launch-error", text, kind="mig-uuid")
    assert one(mig_misconfigured.RULE, (nodes.with_lines(given, named),)).severity is Severity.CRITICAL
    gpu = nodes.line("launch-error", text.replace("MIG-", "GPU-"), kind="gpu-uuid")
    assert nodes.found(mig_misconfigured.RULE, (nodes.with_lines(given, gpu),)) == ()


# cooling-insufficient


def heated(
    visits: tuple[Snapshot, ...], gpus: Any, per_visit: float, kind: str = "sw", **changes: Any
) -> tuple[Snapshot, ...]:
    return tuple(
        nodes.with_gpu(s, gpus, **{f"clocks__{kind}_thermal_seconds": 100 + i * per_visit}, **changes)
        for i, s in enumerate(visits)
    )


def test_time_in_thermal_slowdown_is_insufficient_cooling() -> None:
    hot = heated(nodes.healthy("hgx-h100-8"), 4, 6.0, thermal__gpu_celsius=86.0, thermal__margin_celsius=-0.0)
    finding = one(cooling_insufficient.RULE, hot)
    assert finding.severity is Severity.WARNING
    assert "12.0 of the last 30 s" in finding.summary
    assert "hotter than the median of its neighbours" in finding.summary


def test_hardware_slowdown_is_critical_and_names_every_hot_gpu() -> None:
    finding = one(cooling_insufficient.RULE, heated(nodes.healthy("hgx-h100-8"), range(8), 1.0, "hw"))
    assert finding.severity is Severity.CRITICAL
    assert "8 of 8 GPUs" in finding.summary


def test_a_check_of_one_second_sees_a_slowdown_that_lasts() -> None:
    visits = nodes.healthy("hgx-h100-4", visits=2, every=1.0)
    assert nodes.found(cooling_insufficient.RULE, heated(visits, 1, 0.9))


def test_a_single_look_takes_the_reason_that_is_set() -> None:
    sick = nodes.with_gpu(nodes.healthy("l40s-4")[0], 0, clocks__event_reasons=("sw-thermal-slowdown",))
    assert one(cooling_insufficient.RULE, (sick,)).confidence is Confidence.MEDIUM


def test_close_to_the_limit_for_long_is_a_notice_by_margin_or_on_older_boards_by_temperature() -> None:
    near = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, 1, thermal__margin_celsius=-1.0))
    assert one(cooling_insufficient.RULE, near).severity is Severity.NOTICE
    old = nodes.each(nodes.healthy("hgx-a100-8"), lambda s: nodes.with_gpu(s, 1, thermal__gpu_celsius=88.0))
    assert one(cooling_insufficient.RULE, old).severity is Severity.NOTICE


@pytest.mark.parametrize(
    "changes",
    [
        {"thermal__gpu_celsius": 86.0},  # hot to look at, with its margin intact
        {"thermal__margin_celsius": 5.0},
        {"clocks__sw_thermal_seconds": 12345.0, "clocks__hw_thermal_seconds": 99.0},  # long ago
        {"clocks__event_reasons": ("hw-slowdown", "sw-power-cap")},
    ],
)
def test_what_only_looks_like_heat(changes: dict[str, Any]) -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, 2, **changes))
    assert quiet(cooling_insufficient.RULE, visits)


def test_a_counter_that_starts_anew_with_the_driver_is_no_slowdown() -> None:
    visits = nodes.healthy("hgx-h100-8")
    sick = (nodes.with_gpu(visits[0], 0, clocks__hw_thermal_seconds=5000.0), *visits[1:])
    assert quiet(cooling_insufficient.RULE, sick)


# power-transient


def stepping(snapshot: Snapshot, low: float, high: float, gpus: Any = range(8), period: int = 10) -> Snapshot:
    times = [snapshot.at - nodes.EVERY + i * 0.1 for i in range(150)]
    samples = tuple(Sample(t, high if i // period % 2 else low) for i, t in enumerate(times))
    return nodes.with_gpu(snapshot, gpus, power__samples=samples)


def test_a_common_peak_above_the_limits() -> None:
    finding = one(power_transient.RULE, nodes.each(nodes.healthy("hgx-h100-4"), lambda s: stepping(s, 300.0, 980.0)))
    assert finding.severity is Severity.WARNING
    assert "3.92 kW" in finding.summary
    assert "140%" in finding.summary


def test_the_power_brake_beside_common_steps() -> None:
    visits = tuple(
        nodes.with_gpu(stepping(s, 300.0, 690.0), 1, clocks__power_brake_seconds=float(i))
        for i, s in enumerate(nodes.healthy("hgx-h100-4"))
    )
    finding = one(power_transient.RULE, visits)
    assert "power brake" in finding.summary
    assert finding.evidence[0].where == "GPU 1: hw-power-brake"


def test_common_steps_within_the_limits_are_a_notice() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: stepping(s, 200.0, 690.0))
    assert one(power_transient.RULE, visits).severity is Severity.NOTICE


@pytest.mark.parametrize(
    "change",
    [
        lambda s: stepping(s, 600.0, 735.0),  # the jitter of a loaded H100
        lambda s: stepping(s, 300.0, 900.0, gpus=1),  # one GPU alone
        lambda s: nodes.with_gpu(s, 1, clocks__power_brake_seconds=77.0),  # long ago
        lambda s: stepping(s, 70.0, 650.0, period=200),  # idle all along
        lambda s: stepping(s, 70.0, 650.0, period=60),  # a request now and then
    ],
)
def test_what_only_looks_like_a_transient(change: Any) -> None:
    assert quiet(power_transient.RULE, nodes.each(nodes.healthy("hgx-h100-4"), change))


def test_averages_alone_can_not_show_a_transient() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_gpu(s, 2, power__samples=()))
    assert nodes.why_blind(power_transient.RULE, visits) is not None


# tp-single-stream-stall


def single(
    itl_seconds: float, *, streams: float = 1.0, fp8: bool = True, tp: int = 4, context: int = 8192
) -> tuple[Snapshot, ...]:
    """One stream of a 70B model for a minute."""

    def serve(snapshot: Snapshot, number: int) -> Snapshot:
        steps = number * nodes.EVERY / itl_seconds
        page = {
            "running": streams,
            "steps_total": 1e4 + steps,
            "generation_tokens_total": 1e4 + steps * streams,
            "inter_token_seconds": nodes.inter_token(itl_seconds, 1e4 + steps * streams),
        }
        quantized = {"model__quantization_method": "fp8", "model__weights_bytes": 72_700_000_000} if fp8 else {}
        engine = nodes.with_engine(snapshot, flags__max_model_len=context, **quantized)
        return nodes.with_metrics(engine, **page)

    visits = nodes.healthy("hgx-h100-4", visits=5, tp=tp)
    return tuple(serve(s, i) for i, s in enumerate(visits))


def test_one_stream_over_four_ranks_that_two_could_serve() -> None:
    finding = one(tp_single_stream_stall.RULE, single(0.025))
    assert finding.severity is Severity.WARNING
    assert "25.0 ms" in finding.summary
    assert "predicted: 12.3 ms, and 18.4 ms on TP=2" in finding.summary
    assert any("--tensor-parallel-size 2" in line for line in finding.advice)


def test_a_check_of_two_visits_judges_a_stream_by_the_engines_life() -> None:
    before, after = single(0.025)[-2:]
    soon = nodes.with_metrics(nodes.put(after, at=before.at + 1), at=before.at + 1)
    assert "for 3646 s" in one(tp_single_stream_stall.RULE, (before, soon)).summary


def test_a_latency_near_the_ideal_is_only_a_notice_and_one_beyond_it_is_nothing() -> None:
    best = 70e9 / (2 * 3.35e12)
    assert one(tp_single_stream_stall.RULE, single(best * 1.1)).severity is Severity.NOTICE
    assert quiet(tp_single_stream_stall.RULE, single(best * 0.9))


@pytest.mark.parametrize(
    "visits",
    [
        single(0.025, streams=24.0),
        single(0.025, fp8=False, context=65536),  # needs all four
        single(0.025, tp=2),
        nodes.healthy("hgx-h100-4", busy=False),
    ],
    ids=["many-streams", "needs-all-gpus", "two-ranks", "no-traffic"],
)
def test_what_only_looks_like_a_single_stream_stall(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(tp_single_stream_stall.RULE, visits)


def test_too_few_tokens_or_an_unknown_model_are_not_judged() -> None:
    young = nodes.each(
        single(0.025)[:2],
        lambda s: nodes.with_engine(
            nodes.with_metrics(
                s, generation_tokens_total=90.0 + s.at - nodes.START, steps_total=90.0 + s.at - nodes.START
            ),
            started_at=s.at - 20,
        ),
    )
    same = nodes.each(young, lambda s: nodes.with_metrics(s, engine=s.engines[0].id))
    assert nodes.why_blind(tp_single_stream_stall.RULE, same) is not None
    unknown = nodes.each(single(0.025), lambda s: nodes.with_engine(s, model__hidden_size=Absent(Why.FAILED)))
    assert nodes.why_blind(tp_single_stream_stall.RULE, unknown) is not None


def test_a_device_of_the_pci_tree_that_is_no_gpu_is_no_lost_gpu() -> None:
    nic = PciDevice(address="0000:99:00.0", device_id="10de:22a3", kind="nvswitch", driver="nvidia-nvswitch")
    visits = nodes.each(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.put(s, host__pci_devices=(*(s.host.pci_devices or ()), nic))
    )
    assert quiet(gpu_lost.RULE, visits)
