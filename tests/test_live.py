"""A visit asks every collector at once, waits for none beyond its deadline, and says what it did not get."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.feeds import live
from doctor.snapshot import (
    OF_A_NODE,
    Absent,
    Engine,
    EngineEvent,
    Host,
    Node,
    Rank,
    Snapshot,
    Source,
    Stack,
    Unseen,
    Why,
)

NODE = Node(name="test")
ENGINE = Engine(pid=100, started_at=1000.0, kind="vllm", ranks=(Rank(pid=101, rank=0),))


class Scripted:
    """A collector that does what it is told."""

    def __init__(
        self,
        source: Source,
        collect: Callable[[Visit], Reading] = lambda _visit: Reading(),
        *,
        deadline: float = 1.0,
        after_engines: bool = False,
    ) -> None:
        self.source = source
        self.deadline_seconds = deadline
        self.after_engines = after_engines
        self._collect = collect
        self.visits: list[Visit] = []
        self.closed = 0

    def collect(self, visit: Visit) -> Reading:
        self.visits.append(visit)
        return self._collect(visit)

    def close(self) -> None:
        self.closed += 1


def fails(error: Exception) -> Callable[[Visit], Reading]:
    def collect(_visit: Visit) -> Reading:
        raise error

    return collect


def visits_of(*collectors: Scripted, times: int = 1, seconds: float = 0.01) -> Iterator[Snapshot]:
    return live.every(seconds, collectors, times, node=NODE)


def one(*collectors: Scripted) -> Snapshot:
    (snapshot,) = visits_of(*collectors)
    return snapshot


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a stuck collector waits for; opened at the end, so that no thread is left."""
    gate = threading.Event()
    yield gate
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("see-"):
            thread.join(2)


def stuck(gate: threading.Event, reading: Reading | None = None) -> Callable[[Visit], Reading]:
    def collect(_visit: Visit) -> Reading:
        gate.wait(10)
        return reading or Reading()

    return collect


def test_what_collectors_see_becomes_one_snapshot() -> None:
    snapshot = one(
        Scripted(Source.HOST, lambda _: Reading(fields={"host": Host(iommu="off")})),
        Scripted(Source.STACK, lambda _: Reading(fields={"stack": Stack(os="Debian")})),
    )
    assert snapshot.seen == (Source.HOST, Source.STACK)
    assert (snapshot.host.iommu, snapshot.stack.os, snapshot.node) == ("off", "Debian", NODE)
    assert [(run.source, run.succeeded) for run in snapshot.collectors] == [(Source.HOST, True), (Source.STACK, True)]
    assert abs(snapshot.at - time.time()) < 5


def test_two_collectors_may_each_tell_a_part_of_a_record() -> None:
    missing = Absent(Why.NOT_PRESENT, "no module")
    snapshot = one(
        Scripted(Source.NVML, lambda _: Reading(fields={"stack": Stack(driver="590.1", nvml="13.590.1")})),
        Scripted(Source.STACK, lambda _: Reading(fields={"stack": Stack(driver=missing, kernel="6.8")})),
        Scripted(Source.HOST, lambda _: Reading(fields={"node": Node(booted_at=5.0)})),
    )
    assert snapshot.stack == Stack(driver="590.1", nvml="13.590.1", kernel="6.8")
    assert snapshot.node == Node(name="test", booted_at=5.0)


def test_a_value_is_taken_from_the_collector_that_has_it() -> None:
    missing = Absent(Why.FAILED, "NVML failed")
    snapshot = one(
        Scripted(Source.NVML, lambda _: Reading(fields={"stack": Stack(driver=missing)})),
        Scripted(Source.STACK, lambda _: Reading(fields={"stack": Stack(driver="590.1")})),
    )
    assert snapshot.stack.driver == "590.1"


def test_engines_are_known_to_the_collectors_that_come_after_them() -> None:
    log = Scripted(
        Source.ENGINE_LOG,
        lambda visit: Reading(engine_fields={visit.engines[0].id: {"log": "/var/log/vllm.log"}}),
        after_engines=True,
    )
    beside = Scripted(Source.HOST)
    snapshot = one(log, Scripted(Source.PROCESSES, lambda _: Reading(fields={"engines": (ENGINE,)})), beside)
    assert log.visits[0].engines == (ENGINE,)
    assert beside.visits[0].engines == ()
    assert snapshot.engines[0].log == "/var/log/vllm.log"


def test_a_source_that_can_t_be_seen_is_said_with_what_it_could_say() -> None:
    why = Absent(Why.NO_PERMISSION, "run as root")
    snapshot = one(Scripted(Source.NVML, fails(CannotSeeError(why, fields={"nvml_blocked_seconds": 7.0}))))
    assert snapshot.seen == ()
    assert snapshot.why_unseen(Source.NVML) == why
    assert snapshot.nvml_blocked_seconds == 7.0
    assert not snapshot.collectors[0].succeeded


def test_a_part_that_can_t_be_seen_leaves_the_source_seen() -> None:
    part = Unseen(Source.HOST, Absent(Why.NO_PERMISSION), "ACS")
    snapshot = one(Scripted(Source.HOST, lambda _: Reading(unseen=(part,))))
    assert snapshot.unseen == (part,)
    assert snapshot.why_unseen(Source.HOST) is None


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("x"), RecursionError(), MemoryError()])
def test_a_collector_that_breaks_never_stops_a_visit(error: Exception) -> None:
    snapshot = one(Scripted(Source.STACK, fails(error)), Scripted(Source.HOST))
    assert snapshot.seen == (Source.HOST,)
    why = snapshot.why_unseen(Source.STACK)
    assert why is not None
    assert why.why is Why.FAILED
    assert type(error).__name__ in why.detail


def test_a_hung_collector_delays_nobody_beyond_its_deadline(gate: threading.Event) -> None:
    began = time.monotonic()
    snapshot = one(Scripted(Source.HOST, stuck(gate), deadline=0.2), Scripted(Source.STACK))
    assert time.monotonic() - began < 1.0
    assert snapshot.seen == (Source.STACK,)
    why = snapshot.why_unseen(Source.HOST)
    assert why is not None
    assert why.why is Why.TIMED_OUT
    assert "host has not answered for 0.2 s" in why.detail


def test_hung_collectors_wait_side_by_side(gate: threading.Event) -> None:
    began = time.monotonic()
    one(*(Scripted(source, stuck(gate), deadline=0.5) for source in (Source.HOST, Source.STACK, Source.MODEL)))
    assert time.monotonic() - began < 1.2


def test_a_hung_process_table_leaves_the_others_their_time(gate: threading.Event) -> None:
    after = Scripted(Source.MODEL, after_engines=True)
    snapshot = one(Scripted(Source.PROCESSES, stuck(gate), deadline=0.2), after, Scripted(Source.HOST))
    assert snapshot.seen == (Source.MODEL, Source.HOST)
    assert after.visits[0].engines == ()


def test_a_stuck_collector_piles_up_no_threads(gate: threading.Event) -> None:
    collector = Scripted(Source.HOST, stuck(gate), deadline=0.05)
    snapshots = list(visits_of(collector, times=5))
    assert len(collector.visits) == 1
    assert [s.why_unseen(Source.HOST).why for s in snapshots] == [Why.TIMED_OUT] * 5  # type: ignore[union-attr]
    assert [thread.name for thread in threading.enumerate()].count("see-host") == 1


def test_a_collector_that_comes_back_is_asked_again(gate: threading.Event) -> None:
    collector = Scripted(Source.HOST, stuck(gate, Reading(fields={"host": Host(iommu="off")})), deadline=0.05)
    visits = visits_of(collector, times=3, seconds=0.1)
    assert next(visits).seen == ()
    gate.set()
    later = list(visits)
    assert later[-1].seen == (Source.HOST,)
    assert later[-1].host.iommu == "off"


def test_news_that_come_late_are_not_lost_and_states_that_come_late_are() -> None:
    answers: list[tuple[float, dict[str, Any]]] = [
        (0.15, {"engine_events": (EngineEvent(signal="first", text="", where="a:1"),), "stack": Stack(os="old")}),
        (0.0, {"engine_events": (EngineEvent(signal="second", text="", where="a:2"),)}),
    ]

    def collect(_visit: Visit) -> Reading:
        seconds, fields = answers.pop(0)
        time.sleep(seconds)
        return Reading(fields=fields)

    late, then = visits_of(Scripted(Source.ENGINE_LOG, collect, deadline=0.05), times=2, seconds=0.3)
    assert late.seen == ()
    assert [event.signal for event in then.engine_events] == ["first", "second"]
    assert then.stack == Stack()


def test_visits_keep_their_pace_however_long_each_takes() -> None:
    collector = Scripted(Source.HOST, lambda _: time.sleep(0.06) or Reading())
    began = time.monotonic()
    at = [visit.at for visit in visits_of(collector, times=5, seconds=0.1)]
    assert 0.4 <= time.monotonic() - began < 0.8
    assert [round((moment - at[0]) / 0.1) for moment in at] == [0, 1, 2, 3, 4]


def test_an_overrun_visit_is_left_out_not_made_up_for() -> None:
    naps = [0.25, 0.0, 0.0]
    collector = Scripted(Source.HOST, lambda _: time.sleep(naps.pop(0)) or Reading())
    at = [visit.at for visit in visits_of(collector, times=3, seconds=0.1)]
    assert [round((moment - at[0]) / 0.1) for moment in at] == [0, 3, 4]


def test_every_collector_is_closed_at_the_end() -> None:
    collectors = (Scripted(Source.HOST), Scripted(Source.STACK, fails(RuntimeError())))
    one(*collectors)
    assert [collector.closed for collector in collectors] == [1, 1]


def test_whoever_stops_listening_closes_them_too() -> None:
    collector = Scripted(Source.HOST)
    visits = live.every(60, (collector,), node=NODE)
    next(visits)
    visits.close()  # type: ignore[attr-defined]
    assert collector.closed == 1


def test_the_default_collectors_are_one_for_each_source() -> None:
    collectors = live.collectors()
    assert sorted(c.source.value for c in collectors) == sorted(source.value for source in OF_A_NODE)
    for collector in collectors:
        collector.close()
