"""The wall clock is set in the middle of a watch: windows, `since`, names and counters stay what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import drills
import msgspec
import nodes
import pytest
import reports

from doctor.diagnose import watch
from doctor.history import History
from doctor.report import Report
from doctor.snapshot import OomKill, Snapshot
from doctor.snapshot.clock import in_new_time
from exporters.prometheus import Tally
from rules import RULES

DAYS_30 = 30 * 86400.0
STEPS = pytest.mark.parametrize("step", [7200.4, -7200.0])


@cache
def drilled(profile: str, fault: str) -> tuple[Snapshot, ...]:
    return drills.visits(profile, fault, seconds=range(0, 121, 20))


def numbers(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(part, f"{path}.{name}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from numbers(part, f"{path}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


@STEPS
@pytest.mark.parametrize(
    ("profile", "fault"),
    [("hgx-h100-4", "gpu-lost:gpu=2,start=20"), ("hgx-h100-4", "oom-kill"), ("hgx-h100-8", "sxid:code=20034")],
)
def test_every_time_in_a_snapshot_moves_with_the_clock_and_nothing_else(profile: str, fault: str, step: float) -> None:
    for snapshot in drilled(profile, fault)[:3]:
        before = dict(numbers(msgspec.to_builtins(snapshot)))
        after = dict(numbers(msgspec.to_builtins(in_new_time(snapshot, step))))
        assert before.keys() == after.keys()
        times = {path for path, value in before.items() if abs(value - snapshot.at) < DAYS_30}
        assert times
        for path, value in before.items():
            assert after[path] == pytest.approx(value + (step if path in times else 0.0), abs=1e-6), path


def with_set_clock(visits: Sequence[Snapshot], number: int, step: float) -> list[Snapshot]:
    """The same visits, as they are seen when the clock is set before one of them."""
    later = [in_new_time(visit, step) for visit in visits[number:]]
    later[0] = msgspec.structs.replace(later[0], clock_stepped_seconds=step)
    return [*visits[:number], *later]


def told(report: Report) -> list[tuple[str, str, str, float | None]]:
    return [
        (f.finding.failure_mode, f.finding.summary, f.finding.subject.engine, f.finding.since and report.at - f.finding.since)
        for f in report.findings
    ]  # fmt: skip


@STEPS
@pytest.mark.parametrize(
    ("profile", "fault"),
    [
        ("hgx-h100-4", "gpu-lost:gpu=2,start=20"),
        ("hgx-h100-4", "engine-stalled:start=20"),
        ("hgx-h100-4", "power-transient:start=5"),
    ],
)
def test_the_findings_are_those_of_a_clock_that_nobody_set(profile: str, fault: str, step: float) -> None:
    visits = drilled(profile, fault)
    plain = list(watch(visits, RULES, keep=3600))
    stepped = list(watch(with_set_clock(visits, 4, step), RULES, keep=3600))
    assert [report.findings for report in plain][-1], "the drill shows something"
    for one, other in zip(plain, stepped, strict=True):
        assert [t[:3] for t in told(other)] == [t[:3] for t in told(one)]
        assert [t[3] for t in told(other)] == pytest.approx([t[3] for t in told(one)])
        assert (other.quiet, other.unjudged) == (one.quiet, one.unjudged)


@STEPS
def test_a_window_holds_as_many_visits_as_before(step: float) -> None:
    history: History | None = None
    for snapshot in with_set_clock(nodes.healthy("hgx-h100-4", visits=12, every=10.0), 6, step):
        history = history.after(snapshot) if history else History((snapshot,), keep=70.0)
    assert history is not None
    assert len(history.snapshots) == 8
    assert history.span_seconds == pytest.approx(70.0)
    assert len(history.window(30.0)) == 4


def test_a_past_that_lies_in_the_future_is_forgotten_where_nobody_knows_the_step() -> None:
    """The clock was set back while the daemon was down."""
    history = History((Snapshot(at=5000.0),), keep=3600).after(Snapshot(at=1000.0))
    assert [snapshot.at for snapshot in history.snapshots] == [1000.0]


@STEPS
def test_counters_and_stalls_go_on(step: float) -> None:
    visits = [
        reports.snapshot(
            reports.FOUR, at=1000.0 + 15 * n, kernel=(OomKill(text="", where="", pid=n, process_name="x"),)
        )
        for n in range(4)
    ]
    visits = [
        msgspec.structs.replace(v, metrics=tuple(msgspec.structs.replace(m, at=v.at) for m in v.metrics))
        for v in visits
    ]
    plain, stepped = Tally(), Tally()
    for one, other in zip(visits, with_set_clock(visits, 2, step), strict=True):
        plain.add(reports.report(one))
        stepped.add(reports.report(other))
    engine = visits[0].metrics[0].engine
    assert stepped.stall_seconds(engine) == pytest.approx(plain.stall_seconds(engine))
    assert plain.stall_seconds(engine) == 45.0
    assert (stepped.oom_kills, stepped.visits) == (plain.oom_kills, plain.visits) == (4, 4)
