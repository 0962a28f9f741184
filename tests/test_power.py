"""Power between visits: sampled of all GPUs at one moment, ten times a second, so that a common step of 100 ms is seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import drills
import msgspec
import pytest
from daemons import await_true
from hypothesis import given
from hypothesis import strategies as st

from doctor.collectors.collector import Visit
from doctor.collectors.nvml import NvmlCollector
from doctor.collectors.nvml_child import REST_FACTOR, SAMPLE_SECONDS, next_sample_at, tenth_at
from doctor.diagnose import watch
from doctor.history import History
from doctor.simulation import faults
from doctor.simulation.physics import Drill
from doctor.simulation.profiles import PROFILES
from doctor.snapshot import Sample, Snapshot
from doctor.symptoms.draw import node_draw
from rules import RULES

STEP = "power-transient:peak=1.6,period=0.5"
"""A fifth of half a second: 100 ms high, 400 ms low."""
LIMIT = 8 * 700.0


@contextmanager
def sampled(*texts: str) -> Iterator[NvmlCollector]:
    """NVML's real child on a simulated node."""
    fault = faults.parse_all(texts, PROFILES["hgx-h100-8"])
    spec = msgspec.json.encode(Drill(profile="hgx-h100-8", started_at=time.time(), faults=fault)).decode()
    collector = NvmlCollector(root=None, library="doctor.simulation.nvml", spec=spec, patience_seconds=20.0)
    try:
        yield collector
    finally:
        collector.close()


def visit(collector: NvmlCollector) -> Snapshot:
    at = time.time()
    return Snapshot(at=at, **collector.collect(Visit(at=at)).fields)


def samples(snapshot: Snapshot) -> list[tuple[Sample, ...]]:
    return [gpu.power.samples for gpu in snapshot.gpus]


def peak(snapshots: list[Snapshot]) -> float:
    history = History(tuple(snapshots[:1]), keep=3600)
    for snapshot in snapshots[1:]:
        history = history.after(snapshot)
    draw = node_draw(history)
    return draw.peak.watts if draw else 0.0


def test_every_gpu_is_sampled_at_the_same_tenths_and_none_is_told_twice() -> None:
    with sampled() as collector:
        visit(collector)
        seen: list[Snapshot] = []

        def enough() -> bool:
            time.sleep(0.25)
            seen.append(visit(collector))  # a question is answered in the middle of the sampling
            return sum(len(samples(snapshot)[0]) for snapshot in seen) >= 10

        await_true(enough)
    stamps = [sample.at for snapshot in seen for sample in samples(snapshot)[0]]
    for snapshot in seen:
        assert len({tuple(sample.at for sample in of_gpu) for of_gpu in samples(snapshot)}) == 1
        assert all(sample.at <= snapshot.at + SAMPLE_SECONDS for sample in samples(snapshot)[0])
    for earlier, later in pairwise(stamps):
        tenths = (later - earlier) / SAMPLE_SECONDS
        assert tenths == pytest.approx(round(tenths), abs=1e-3)
        assert round(tenths) >= 1


def test_a_common_step_of_a_tenth_of_a_second_is_in_the_nodes_peak() -> None:
    with sampled(STEP) as collector:
        visit(collector)
        seen: list[Snapshot] = []

        def whole() -> bool:
            time.sleep(0.5)
            seen.append(visit(collector))
            return peak(seen) == pytest.approx(1.6 * LIMIT)

        await_true(whole)


def test_the_step_of_one_gpu_alone_is_no_step_of_the_node() -> None:
    with sampled(f"{STEP},gpu=3") as collector:
        visit(collector)
        seen: list[Snapshot] = []

        def stepped() -> bool:
            time.sleep(0.5)
            seen.append(visit(collector))
            return any(sample.value > 1000.0 for s in seen for sample in s.gpus[3].power.samples)

        await_true(stepped)
    assert 1120.0 < peak(seen) < LIMIT


def alarmed(*texts: str) -> list[str]:
    *_, report = watch(drills.stepped("hgx-h100-8", *texts, seconds=range(0, 75, 15)), RULES, keep=3600)
    return [f.finding.failure_mode for f in report.findings]


def test_only_a_common_step_is_a_finding() -> None:
    assert alarmed(STEP) == ["power-transient"]
    assert alarmed(f"{STEP},gpu=3") == []


class TestPace:
    @given(st.floats(1e5, 1e7), st.floats(0, 0.02))
    def test_a_quick_round_is_followed_by_the_next_tenth(self, began: float, took: float) -> None:
        due = next_sample_at(began, began + took)
        assert tenth_at(due) in (tenth_at(began) + 1, tenth_at(began) + 2)
        assert due == pytest.approx(tenth_at(due) * SAMPLE_SECONDS)

    @given(st.floats(1e5, 1e7), st.floats(0, 60))
    def test_a_slow_driver_gets_a_rest(self, began: float, took: float) -> None:
        due = next_sample_at(began, began + took)
        assert due >= began + took + REST_FACTOR * took - 1e-6
        assert due <= began + took * (1 + REST_FACTOR) + 2 * SAMPLE_SECONDS

    @given(st.floats(1e5, 1e7), st.floats(0, 60))
    def test_no_tenth_is_sampled_twice(self, began: float, took: float) -> None:
        assert tenth_at(next_sample_at(began, began + took)) > tenth_at(began)
