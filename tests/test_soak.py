"""The daemon's path over an hour of faults that come and go, in a turned clock; `benchmarks/soak.py` has the whole daemon."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import drills

from doctor.diagnose import watch
from doctor.rule import Severity
from exporters.prometheus import TEXT, Own, Tally, Writer, families
from exporters.wording import severity_of
from rules import RULES

FAULTS = (
    ("nvlink-down:gpu=2,link=5", "nvlink-degraded"),
    ("pcie-width:gpu=1", "pcie-link-degraded"),
    ("remap-pending:gpu=3", "gpu-memory-faulty"),
    ("rank-stopped:rank=1", "engine-stalled"),
    ("mig-pending:gpu=0", "mig-misconfigured"),
)
EVERY_SECONDS, LASTS_SECONDS, VISIT_SECONDS = 240, 120, 20
ROUND_SECONDS = EVERY_SECONDS * len(FAULTS)
KEEP_SECONDS = 300.0
NOTICED_SECONDS = 3 * VISIT_SECONDS
"""A stalled engine is one after some visits."""
ROUNDS = 2


def test_every_fault_is_found_and_cleared_round_after_round_and_nothing_grows() -> None:
    starts = [
        (begin + place * EVERY_SECONDS, fault, mode)
        for begin in range(EVERY_SECONDS // 2, ROUNDS * ROUND_SECONDS, ROUND_SECONDS)
        for place, (fault, mode) in enumerate(FAULTS)
    ]
    texts = [f"{fault},start={start},end={start + LASTS_SECONDS}" for start, fault, _ in starts]
    seconds = range(0, ROUNDS * ROUND_SECONDS + 1, VISIT_SECONDS)
    tally, writer = Tally(), Writer(TEXT)
    alarms: dict[int, set[str]] = {}
    sizes: list[tuple[int, int, int, int]] = []
    visits = drills.stepped("hgx-h100-4", *texts, seconds=seconds)
    for second, report in zip(seconds, watch(visits, RULES, KEEP_SECONDS), strict=True):
        tally.add(report)
        page = writer.page(families(report, tally, Own(version="0")))
        found = [each.finding for each in report.findings]
        alarms[second] = {f.failure_mode for f in found if severity_of(f) >= Severity.WARNING}
        if second and second % ROUND_SECONDS == 0:
            gc.collect()
            descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
            sizes.append((len(gc.get_objects()), threading.active_count(), descriptors, page.count(b"\n")))
    for start, _, mode in starts:
        there = range(start + NOTICED_SECONDS, start + LASTS_SECONDS, VISIT_SECONDS)
        assert all(mode in alarms[second] for second in there), f"{mode} at {start}"
        gone = range(start + LASTS_SECONDS + NOTICED_SECONDS, start + EVERY_SECONDS, VISIT_SECONDS)
        assert not any(alarms[second] for second in gone if second in alarms), f"{mode} at {start}"
    (before, *counted), (after, *counted_then) = sizes
    assert counted == counted_then
    assert after <= before * 1.01
