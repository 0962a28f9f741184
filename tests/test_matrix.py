"""Every recording against every rule: one incident gives one root cause, and nothing else is raised beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cases import FIRES, HEALTHY, QUIET, name_of

from doctor.diagnose import judge
from doctor.feeds import recording
from doctor.history import History
from doctor.report import Report, ReportedFinding
from doctor.rule import Severity
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
