"""Every recording, and every fault on every simulated node, against every rule: one root cause, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import drills
import pytest
from test_cases import FIRES, HEALTHY, QUIET, name_of

from doctor.diagnose import judge
from doctor.feeds import recording
from doctor.history import History
from doctor.report import Report, ReportedFinding
from doctor.rule import Severity
from doctor.simulation import faults
from doctor.simulation.profiles import PROFILES
from rules import RULES

OTHER_ALARMS = {
    "application-fault/quiet-software": "engine-crashed",
    "application-fault/quiet-timeout": "nccl-timeout",
    "context-does-not-fit/quiet-out-of-memory": "out-of-memory-at-startup",
    "cooling-insufficient/quiet-brake": "power-brake",
    "driver-unresponsive/quiet-lost": "gpu-lost",
    "fp8-block-misaligned/quiet-heads": "tp-heads-indivisible",
    "fp8-block-misaligned/quiet-tile": "tp-heads-indivisible",
    "fp8-not-engaged/quiet-engaged": "tp-single-stream-stall",
    "gpu-hung/quiet-collective": "engine-stalled",
    "gpu-hung/quiet-lost": "gpu-lost",
    "gpu-lost/quiet-driver-hung": "driver-unresponsive",
    "gpu-lost/quiet-other-xid": "application-fault",
    "gpu-memory-faulty/quiet-application": "application-fault",
    "gpu-memory-held/quiet-nobody-else": "out-of-memory-at-startup",
    "launch-refused/quiet-software": "engine-crashed",
    "nccl-timeout/quiet-fault": "application-fault",
    "nvlink-degraded/quiet-mig": "mig-misconfigured",
    "nvlink-errors/quiet-link-down": "nvlink-degraded",
    "out-of-memory-at-startup/quiet-killed-worker": "worker-killed",
    "p2p-blocked/quiet-dead-links": "nvlink-degraded",
    "p2p-blocked/quiet-fabric-in-progress": "nvswitch-fabric-fault",
    "pcie-fallback/quiet-one-link-down": "nvlink-degraded",
    "power-brake/quiet-overheating": "cooling-insufficient",
    "power-capped/quiet-brake": "power-brake",
    "power-transient/quiet-brake-without-steps": "power-brake",
    "quantization-mismatch/quiet-blocks": "fp8-block-misaligned",
    "recovery-pending/quiet-other-xid": "application-fault",
    "shared-memory-too-small/quiet-full-disk": "engine-crashed",
    "shared-memory-too-small/quiet-segmentation-fault": "engine-crashed",
    "stack-mismatch/quiet-fabric-manager": "nvswitch-fabric-fault",
    "tp-exceeds-visible-gpus/quiet-heads": "tp-heads-indivisible",
    "tp-heads-indivisible/quiet-other-assertion": "engine-crashed",
    "tp-heads-indivisible/quiet-too-few-gpus": "tp-exceeds-visible-gpus",
    "worker-killed/quiet-gpu-memory": "out-of-memory-at-startup",
    "worker-killed/quiet-software": "engine-crashed",
    "xid-unclassified/quiet-known": "application-fault",
    "xid-unclassified/quiet-lost-and-shadows": "gpu-lost",
}
"""Near-miss → what is wrong there instead. All others are nodes on which nothing is wrong."""


def judged(path: Path) -> Report:
    """Return the report on the whole recording."""
    return judge(History(tuple(recording.read(path)), keep=3600), RULES)


def with_its_causes(report: Report) -> Iterator[tuple[ReportedFinding, tuple[str, ...]]]:
    """Yield each finding with the failure modes above it, from the root."""
    above: list[str] = []
    for reported in report.findings:
        del above[reported.depth :]
        yield reported, tuple(above)
        above.append(reported.finding.failure_mode)


def alarms(report: Report) -> list[str]:
    """Return the root causes above notice."""
    return [root.finding.failure_mode for root in report.roots if root.finding.severity != Severity.NOTICE]


@pytest.mark.parametrize("path", FIRES, ids=name_of)
def test_every_other_alarm_of_a_case_follows_from_its_own(path: Path) -> None:
    own = path.parent.name
    beside = [
        (reported.finding.failure_mode, reported.finding.summary)
        for reported, causes in with_its_causes(judged(path))
        if own not in (reported.finding.failure_mode, *causes) and reported.finding.severity != Severity.NOTICE
    ]
    assert beside == []


@pytest.mark.parametrize("path", QUIET, ids=name_of)
def test_a_near_miss_raises_at_most_what_it_is_a_case_of(path: Path) -> None:
    report = judged(path)
    expected = OTHER_ALARMS.get(name_of(path))
    assert alarms(report) == ([] if expected is None else [expected])
    assert path.parent.name not in [f.finding.failure_mode for f in report.findings]


@pytest.mark.parametrize("path", HEALTHY, ids=name_of)
def test_a_healthy_node_raises_nothing(path: Path) -> None:
    assert alarms(judged(path)) == []


def test_the_table_of_other_alarms_names_cases() -> None:
    assert set(OTHER_ALARMS) <= {name_of(path) for path in QUIET}


# Every fault on every node that can have it.

FAULTS: dict[str, tuple[str, ...]] = {
    "driver-hung": ("driver-unresponsive",),
    "gpu-lost:gpu=0": ("gpu-lost",),
    "gpu-removed:gpu=0": ("gpu-lost",),
    "nvlink-down:gpu=0,link=0": ("nvlink-degraded",),
    "nvlinks-all-down": ("nvlink-degraded",),
    "nvlink-errors:gpu=0,link=0": ("nvlink-errors",),
    "permission-denied": (),
    "symbol-missing:name=nvmlDeviceGetMarginTemperature": (),
    "driver-old": (),
    "driver-reloaded": (),
    "fabric-manager-restarted": (),
    "pcie-width:gpu=0": ("pcie-link-degraded",),
    "pcie-generation:gpu=0": ("pcie-link-degraded",),
    "p2p-blocked": ("p2p-blocked",),
    "mig-enabled:gpu=0": ("mig-misconfigured",),
    "mig-pending:gpu=0": ("mig-misconfigured",),
    "overheating": ("cooling-insufficient",),
    "power-transient": ("power-transient",),
    "power-brake": ("power-brake",),
    "power-cap": (),
    "ecc-uncorrected:gpu=0": ("gpu-memory-faulty",),
    "remap-pending:gpu=0": ("gpu-memory-faulty",),
    "fabric-incomplete": ("nvswitch-fabric-fault",),
    "fabric-unhealthy:gpu=0": ("nvswitch-fabric-fault",),
    "recovery-action:gpu=0": ("recovery-pending",),
    "nvml-garbage-serial": (),
    "gpu-idle:gpu=0": (),
    "foreign-process:gpu=0": (),
    "nccl-timeout:rank=0": ("nccl-timeout",),
    "engine-stalled": ("engine-stalled",),
    "rank-stopped:rank=0": ("engine-stalled",),
    "rank-blocked:rank=0": ("engine-stalled",),
    "engine-core-busy": (),
    "kernel-hung:gpu=0": ("engine-stalled",),
    "engine-crashed": ("engine-crashed",),
    "application-fault:gpu=0": ("application-fault",),
    "gpu-memory-fault:gpu=0": ("gpu-memory-faulty",),
    "gpu-memory-held:gpu=0": ("gpu-memory-held",),
    "out-of-memory-at-startup": ("out-of-memory-at-startup",),
    "driver-too-old": ("stack-mismatch",),
    "driver-library-mismatch": ("stack-mismatch",),
    "fp8-not-engaged": ("fp8-not-engaged",),
    "single-stream": ("tp-single-stream-stall",),
    "idle": (),
    "no-engine": (),
    "pcie-fallback": ("nvlink-degraded",),
    "fabric-manager-dead": ("nvswitch-fabric-fault",),
    "fabric-manager-dead-at-start": ("nvswitch-fabric-fault",),
    "fabric-manager-version": ("nvswitch-fabric-fault",),
    "oom-kill": ("worker-killed",),
    "xid:code=94,gpu=0": ("gpu-memory-faulty",),
    "sxid:code=20034": ("nvswitch-fabric-fault",),
    "kernel-log-denied": (),
    "engine-log-missing": (),
    "metrics-down": (),
}
"""Fault → its failure mode: the one root cause above notice of a node that has it, within a quarter of a minute.

None: it is a notice (`power-cap`, `foreign-process`), shows after a minute or more (`engine-core-busy`, `gpu-idle`), is
no fault, or leaves the node half unseen.
"""

WITHOUT_LINKS = {"h100-pcie-4", "h100-nvl-4", "l40s-4", "rtx4090-4"}
QUIET_ON: dict[str, set[str]] = {
    "gpu-removed:gpu=0": {*WITHOUT_LINKS, "hgx-h100-4"},  # gone before the first look, and nothing says so
    "nvlink-down:gpu=0,link=0": {"h100-nvl-4"},  # of a bridged pair nobody knows how many links it should have
    "nvlinks-all-down": WITHOUT_LINKS,  # nor whether it should be bridged
    "p2p-blocked": WITHOUT_LINKS,  # it was PCIe before: advice
    "pcie-fallback": WITHOUT_LINKS,
    "power-transient": {"h100-nvl-4"},  # two of four GPUs: the node stays below its limits
    "ecc-uncorrected:gpu=0": {"rtx4090-4"},  # no ECC
    "remap-pending:gpu=0": {"rtx4090-4"},
    "fp8-not-engaged": {
        "hgx-a100-8",
        "l40s-4",
        "rtx4090-4",
    },  # weight-only is the best that they can do, or that this engine has for them: a notice
    "single-stream": WITHOUT_LINKS,  # advice, or TP=2, which is right
}
"""Fault → the nodes on which it is no alarm, and why."""


def can_have(profile: str, fault: str) -> bool:
    try:
        faults.parse(fault, PROFILES[profile])
    except faults.FaultError:
        return False
    return True


NODES = [(profile, fault) for fault in FAULTS for profile in PROFILES if can_have(profile, fault)]


@pytest.mark.parametrize(("profile", "fault"), NODES)
def test_a_fault_raises_its_failure_mode_and_nothing_that_does_not_follow_from_it(profile: str, fault: str) -> None:
    report = judge(History(drills.visits(profile, fault, seconds=(0, 15)), keep=3600), RULES)
    expected = () if profile in QUIET_ON.get(fault, ()) else FAULTS[fault]
    assert tuple(alarms(report)) == expected


def test_every_fault_that_can_be_simulated_is_in_the_matrix() -> None:
    assert {fault.partition(":")[0] for fault in FAULTS} == set(faults.KINDS)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("fault", [(), ("idle",), ("no-engine",)], ids=["loaded", "idle", "no-engine"])
def test_a_healthy_simulated_node_raises_nothing(profile: str, fault: tuple[str, ...]) -> None:
    report = judge(History(drills.visits(profile, *fault, seconds=range(0, 361, 30)), keep=3600), RULES)
    assert alarms(report) == []
    assert report.verdict.exit_code == 0
