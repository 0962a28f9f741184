"""engine-cpu-starved: quotas that stop an engine, processors that others use, and what only looks like it."""

from __future__ import annotations

import nodes
import pytest
import test_rules_choices as choices
from nodes import one, quiet

from doctor.rule import Confidence, Severity
from doctor.snapshot import Absent, Snapshot, Why
from rules import engine_cpu_starved

POD = "/kubepods.slice/kubepods-pod1.slice"


def stopped(ratio: float, *, gpu_ratio: float = 0.4, running: float = 20.0, begin: int = 0) -> tuple[Snapshot, ...]:
    """Return visits at which an engine of four cores is stopped in this part of its periods, from visit *begin* on."""

    def held(i: int, snapshot: Snapshot) -> Snapshot:
        periods = 10_000 + i * int(nodes.EVERY * 10)
        return nodes.with_engine(
            snapshot,
            cpu_share__cgroup=POD,
            cpu_share__quota_cores=4.0,
            cpu_share__periods_total=periods,
            cpu_share__throttled_periods_total=5_000 + int(max(0, i - begin) * nodes.EVERY * 10 * ratio),
            cpu_share__throttled_seconds_total=1e4 + max(0, i - begin) * nodes.EVERY * 2 * ratio,
        )

    return tuple(held(i, s) for i, s in enumerate(choices.hot(0.5, gpu_ratio, running)))


def crowded(engine: float, *, node: float | None = 0.9, gpu_ratio: float = 0.4) -> tuple[Snapshot, ...]:
    """Return visits at which a task of the engine waits this part of the time."""
    of_node = Absent(Why.NOT_PRESENT) if node is None else node
    return nodes.each(
        choices.hot(0.5, gpu_ratio),
        lambda s: nodes.put(nodes.with_engine(s, cpu_share__pressure_ratio=engine), host__cpu_pressure_ratio=of_node),
    )


def test_a_quota_that_stops_the_engine_is_told_with_its_numbers() -> None:
    finding = one(engine_cpu_starved.RULE, stopped(0.6))
    assert finding.severity is Severity.WARNING
    assert finding.confidence is Confidence.HIGH
    assert "may use 4 cores and was stopped in 60% of the periods of 120 s" in finding.summary
    assert finding.evidence[0].where == f"{POD}/cpu.stat"
    assert finding.facts["cgroup"] == POD


def test_processors_that_others_use_are_told_beside_the_nodes_pressure() -> None:
    finding = one(engine_cpu_starved.RULE, crowded(0.7))
    assert "waited 70% of the time, one of the whole node 90%" in finding.summary
    assert finding.confidence is Confidence.MEDIUM
    assert "whole node" not in one(engine_cpu_starved.RULE, crowded(0.7, node=None)).summary


def test_a_quota_explains_the_pressure_that_it_makes() -> None:
    both = nodes.each(stopped(0.6), lambda s: nodes.with_engine(s, cpu_share__pressure_ratio=0.9))
    finding = one(engine_cpu_starved.RULE, both)
    assert "control group" in finding.summary
    assert len(finding.evidence) == 2


@pytest.mark.parametrize(
    "visits",
    [
        stopped(0.2),
        stopped(0.6, gpu_ratio=0.95),
        stopped(0.6, running=0.0),
        stopped(0.0),
        stopped(0.6, begin=99),
        crowded(0.2),
        crowded(0.8, gpu_ratio=0.95),
    ],
    ids=["seldom", "the GPUs are busy", "no requests", "never", "long ago", "little pressure", "busy under pressure"],
)
def test_what_only_looks_like_it_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(engine_cpu_starved.RULE, visits)


def test_counters_that_begin_anew_with_the_container_do_not_count_as_throttling() -> None:
    def moved(i: int, snapshot: Snapshot) -> Snapshot:
        return snapshot if i < 6 else nodes.with_engine(snapshot, cpu_share__cgroup="/elsewhere")

    visits = tuple(moved(i, s) for i, s in enumerate(stopped(0.6)))
    assert quiet(engine_cpu_starved.RULE, visits)


def test_two_visits_of_a_check_are_too_few() -> None:
    assert nodes.why_blind(engine_cpu_starved.RULE, stopped(0.9)[:2]) is not None
