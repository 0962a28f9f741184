"""The further hardware rules: hangs, recovery, link errors, PCIe, power limits, sleep, odd Xids and odd GPUs."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
from nodes import one, quiet

from doctor.rule import AnyRule, Severity
from doctor.snapshot import Absent, Snapshot, Source, Why
from rules import (
    gpu_hung,
    gpu_memory_faulty,
    mixed_gpus,
    nvlink_errors,
    pcie_link_degraded,
    persistence_mode_off,
    power_brake,
    power_capped,
    recovery_pending,
    xid_unclassified,
)

MINE = (
    nvlink_errors.RULE,
    pcie_link_degraded.RULE,
    mixed_gpus.RULE,
    power_brake.RULE,
    power_capped.RULE,
    persistence_mode_off.RULE,
    gpu_hung.RULE,
    recovery_pending.RULE,
    xid_unclassified.RULE,
)


def growing(visits: tuple[Snapshot, ...], gpu: int, per_visit: float, field: str) -> tuple[Snapshot, ...]:
    return tuple(nodes.with_gpu(s, gpu, **{field: 9 + i * per_visit}) for i, s in enumerate(visits))


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_healthy_node_gets_not_even_a_notice(rule: AnyRule, profile: str, busy: bool) -> None:
    assert quiet(rule, nodes.healthy(profile, busy=busy, visits=6))


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_blindness_is_not_health(rule: AnyRule) -> None:
    blind = nodes.each(
        nodes.healthy("hgx-h100-8"), lambda s: nodes.unseen(s, Source.NVML, Source.KERNEL_LOG, why=Why.NO_PERMISSION)
    )
    assert nodes.found(rule, blind) == ()
    assert nodes.why_blind(rule, blind) is not None


# gpu-hung


@pytest.mark.parametrize("code", [46, 62, 109, 119, 120])
def test_the_drivers_word_for_a_hang(code: int) -> None:
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(s, nodes.xid(code, 1, at=s.at)))
    finding = one(gpu_hung.RULE, visits)
    assert f"Xid {code}" in finding.summary
    assert finding.subject.gpus == (nodes.uuid(1),)


def test_a_gpu_that_is_busy_for_nothing_alone_among_its_ranks() -> None:
    def stuck(snapshot: Snapshot, gpus: Any = 2) -> Snapshot:
        return nodes.with_gpu(
            snapshot, gpus, activity__gpu_ratio=1.0, activity__memory_ratio=0.0, power__average_watts=120.0
        )

    visits = nodes.healthy("hgx-h100-4", visits=6)
    assert one(gpu_hung.RULE, nodes.each(visits, stuck)).severity is Severity.WARNING
    assert quiet(gpu_hung.RULE, nodes.each(visits, lambda s: stuck(s, range(4))))  # all wait for somebody else
    assert quiet(gpu_hung.RULE, nodes.each(visits[:3], stuck))  # half a minute


def test_a_hang_that_a_reset_ended() -> None:
    visits = nodes.healthy("hgx-h100-4")
    fresh = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(119, 1, at=s.at - 600)))
    assert one(gpu_hung.RULE, fresh).severity is Severity.WARNING
    old = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(119, 1, at=s.at - 6000)))
    assert quiet(gpu_hung.RULE, old)


# gpu-memory-faulty


@pytest.mark.parametrize(
    ("codes", "counters", "severity"),
    [
        ((94,), {}, Severity.WARNING),
        ((94, 94), {"ecc__uncorrected_volatile": 2, "ecc__remap_pending": True}, Severity.WARNING),
        ((94, 48), {}, Severity.CRITICAL),
        ((95,), {}, Severity.CRITICAL),
        ((94,), {"ecc__remap_failed": True}, Severity.CRITICAL),
        ((94,), {"ecc__sram_threshold_exceeded": True}, Severity.CRITICAL),
        ((), {"ecc__uncorrected_volatile": 1}, Severity.CRITICAL),
        ((), {"ecc__remap_pending": True}, Severity.WARNING),
    ],
)
def test_a_contained_error_is_a_warning_unless_something_worse_is_beside_it(
    codes: tuple[int, ...], counters: dict[str, Any], severity: Severity
) -> None:
    visits = nodes.last(
        nodes.healthy("hgx-h100-4"),
        lambda s: nodes.with_kernel(nodes.with_gpu(s, 1, **counters), *(nodes.xid(c, 1, at=s.at) for c in codes)),
    )
    assert one(gpu_memory_faulty.RULE, visits).severity is severity
    unlisted = nodes.last(visits, lambda s: nodes.forget_gpu(s, 1))
    if codes and not counters:
        assert one(gpu_memory_faulty.RULE, unlisted).severity is severity


# recovery-pending


def test_nvmls_word_and_xid_154() -> None:
    visits = nodes.healthy("hgx-h100-4")
    assert (
        "reset"
        in one(
            recovery_pending.RULE, nodes.each(visits, lambda s: nodes.with_gpu(s, 1, recovery_action="reset"))
        ).summary
    )
    older = nodes.each(visits, lambda s: nodes.with_gpu(s, range(4), recovery_action=Absent(Why.MISSING_SYMBOL)))
    told = nodes.last(older, lambda s: nodes.with_kernel(s, nodes.xid(154, 2, recovery_action="reboot")))
    assert "reboot of the node" in one(recovery_pending.RULE, told).summary


def test_none_takes_it_back() -> None:
    visits = nodes.healthy("hgx-h100-4")
    asked = nodes.xid(154, 2, recovery_action="reset")
    assert quiet(recovery_pending.RULE, nodes.last(visits, lambda s: nodes.with_kernel(s, asked)))  # NVML says none now
    older = nodes.each(visits, lambda s: nodes.with_gpu(s, range(4), recovery_action=Absent(Why.MISSING_SYMBOL)))
    back = nodes.xid(154, 2, at=nodes.START + 600, recovery_action="none")
    assert quiet(recovery_pending.RULE, nodes.last(older, lambda s: nodes.with_kernel(s, asked, back)))
    past = nodes.xid(154, 2, recovery_action="reset", before_boot=True)
    assert quiet(recovery_pending.RULE, nodes.last(older, lambda s: nodes.with_kernel(s, past)))


# nvlink-errors


def counting(visits: tuple[Snapshot, ...], gpu: int, **per_visit: int) -> tuple[Snapshot, ...]:
    """Let error counters of link 5 grow."""

    def sick(snapshot: Snapshot, number: int) -> Snapshot:
        links = next(g for g in snapshot.gpus if g.index == gpu).links
        assert not isinstance(links, Absent)
        grown = {name: 7 + number * step for name, step in per_visit.items()}
        return nodes.with_gpu(snapshot, gpu, links=tuple(nodes.put(n, **grown) if n.link == 5 else n for n in links))

    return tuple(sick(s, i) for i, s in enumerate(visits))


def test_replays_and_recoveries_that_grow() -> None:
    finding = one(nvlink_errors.RULE, counting(nodes.healthy("hgx-h100-8"), 3, replay_errors_total=2))
    assert "link 5 had 4 replays" in finding.summary
    assert finding.subject.links == (f"{nodes.uuid(3)}/5",)
    assert one(nvlink_errors.RULE, counting(nodes.healthy("hgx-h100-8"), 3, crc_errors_total=2000))


@pytest.mark.parametrize("steps", [{"replay_errors_total": 0}, {"crc_errors_total": 900}])
def test_counts_that_stand_still_and_rare_crc_errors(steps: dict[str, int]) -> None:
    assert quiet(nvlink_errors.RULE, counting(nodes.healthy("hgx-h100-8"), 3, **steps))


def test_an_xid_74_and_one_that_says_non_fatal() -> None:
    visits = nodes.healthy("hgx-h100-8")
    fatal = nodes.xid(74, 3, severity="fatal", link=14)
    finding = one(nvlink_errors.RULE, nodes.last(visits, lambda s: nodes.with_kernel(s, fatal)))
    assert finding.severity is Severity.CRITICAL
    assert "link 14" in finding.summary
    mild = nodes.xid(145, 3, severity="non-fatal")
    assert quiet(nvlink_errors.RULE, nodes.last(visits, lambda s: nodes.with_kernel(s, mild)))


# pcie-link-degraded


def test_lanes_count_always_and_the_generation_under_load() -> None:
    def narrow(snapshot: Snapshot) -> Snapshot:
        return nodes.with_gpu(snapshot, 1, pcie__width=8)

    def slow(snapshot: Snapshot) -> Snapshot:
        return nodes.with_gpu(snapshot, 1, pcie__generation=1)

    busy, idle = nodes.healthy("rtx4090-4"), nodes.healthy("rtx4090-4", busy=False)
    assert "8 of 16 lanes" in one(pcie_link_degraded.RULE, nodes.each(idle, narrow)).summary
    assert "generation 1 of 4" in one(pcie_link_degraded.RULE, nodes.each(busy, slow)).summary
    assert quiet(pcie_link_degraded.RULE, nodes.each(idle, slow))


def test_replays_count_by_their_rate() -> None:
    visits = nodes.healthy("hgx-h100-8", visits=6)
    assert "40 times a minute" in one(pcie_link_degraded.RULE, growing(visits, 2, 10, "pcie__replays_total")).summary
    assert quiet(pcie_link_degraded.RULE, growing(visits, 2, 5, "pcie__replays_total"))
    assert quiet(pcie_link_degraded.RULE, growing(visits[:3], 2, 10, "pcie__replays_total"))  # half a minute


# power-brake, power-capped


def test_the_brake_counts_while_its_counter_grows() -> None:
    visits = nodes.healthy("hgx-h100-4")
    finding = one(power_brake.RULE, growing(visits, 1, 3.0, "clocks__power_brake_seconds"))
    assert "6.0 of the last 30 s" in finding.summary
    assert quiet(power_brake.RULE, growing(visits, 1, 0.0, "clocks__power_brake_seconds"))
    slowed = nodes.each(visits, lambda s: nodes.with_gpu(s, 1, clocks__event_reasons=("hw-slowdown",)))
    assert quiet(power_brake.RULE, slowed)


def test_a_lowered_limit_is_a_notice_and_among_ranks_a_warning() -> None:
    visits = nodes.healthy("hgx-h100-4")
    lowered = {"power__limit_watts": 350.0, "power__limit_enforced_watts": 350.0}
    every = nodes.each(visits, lambda s: nodes.with_gpu(s, range(4), **lowered))
    assert one(power_capped.RULE, every).severity is Severity.NOTICE
    single = nodes.each(visits, lambda s: nodes.with_gpu(s, 2, **lowered))
    assert one(power_capped.RULE, single).severity is Severity.WARNING
    working = nodes.each(visits, lambda s: nodes.with_gpu(s, range(4), clocks__event_reasons=("sw-power-cap",)))
    assert quiet(power_capped.RULE, working)


# persistence-mode-off


def test_a_driver_that_nobody_keeps_awake() -> None:
    def off(snapshot: Snapshot) -> Snapshot:
        return nodes.with_gpu(snapshot, range(8), persistence_mode=False)

    busy = nodes.each(nodes.healthy("hgx-h100-8"), off)
    assert quiet(persistence_mode_off.RULE, busy)
    assert one(persistence_mode_off.RULE, nodes.each(busy, nodes.without_engine)).severity is Severity.NOTICE


# xid-unclassified


def test_an_xid_of_no_other_rule_tells_nvidias_action_and_who_disagrees() -> None:
    visits = nodes.healthy("hgx-h100-4")
    security = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(110, 1)))
    assert "reset gpu" in one(xid_unclassified.RULE, security).summary
    decoder = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(68, 1)))
    finding = one(xid_unclassified.RULE, decoder)
    assert finding.severity is Severity.NOTICE
    assert "gpud" in finding.summary
    unheard = nodes.last(visits, lambda s: nodes.with_kernel(s, nodes.xid(999, 1)))
    assert one(xid_unclassified.RULE, unheard).severity is Severity.NOTICE


def test_xids_of_other_rules_shadows_and_the_past_are_not_unclassified() -> None:
    lines = (
        nodes.xid(79, 1),
        nodes.xid(45, 1, at=nodes.START + 3, caused_by=79),
        nodes.xid(13, 2),
        nodes.xid(45, 2, at=nodes.START + 60),
        nodes.xid(45, 3, caused_by=31),
        nodes.xid(110, 0, before_boot=True),
    )
    assert quiet(xid_unclassified.RULE, nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(s, *lines)))


def test_an_xid_45_alone_is_a_question_and_no_alarm() -> None:
    visits = nodes.last(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_kernel(s, nodes.xid(45, 1)))
    assert one(xid_unclassified.RULE, visits).severity is Severity.NOTICE


# mixed-gpus


def test_ranks_on_gpus_that_differ() -> None:
    other = {"pci_device_id": "10de:2335", "name": "NVIDIA H200", "memory__total_bytes": 143771 << 20}
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_gpu(s, 3, **other))
    assert "NVIDIA H200" in one(mixed_gpus.RULE, visits).summary
    alone = nodes.each(nodes.healthy("hgx-h100-4", tp=2), lambda s: nodes.with_gpu(s, 3, **other))
    assert quiet(mixed_gpus.RULE, alone)
    vbios = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_gpu(s, 3, vbios_version="96.00.99.00.01"))
    assert one(mixed_gpus.RULE, vbios).severity is Severity.NOTICE
