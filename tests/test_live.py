"""A visit asks every collector at once, waits for none beyond its deadline, and says what it did not get."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from doctor.collectors.collector import CannotSeeError, Pace, Reading, Visit
from doctor.feeds import live, simulated
from doctor.snapshot import (
    OF_A_NODE,
    Absent,
    Engine,
    EngineEvent,
    FabricManager,
    FabricMessage,
    Gpu,
    Host,
    ModelConfig,
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
    assert time.monotonic() - began < 5.0
    assert snapshot.seen == (Source.STACK,)
    why = snapshot.why_unseen(Source.HOST)
    assert why is not None
    assert why.why is Why.TIMED_OUT
    assert "host has not answered for 0.2 s" in why.detail


def test_hung_collectors_wait_side_by_side(gate: threading.Event) -> None:
    began = time.monotonic()
    one(*(Scripted(source, stuck(gate), deadline=0.8) for source in OF_A_NODE if source is not Source.PROCESSES))
    assert time.monotonic() - began < 6.0, "one after the other they would take 6.4 s"


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


def test_an_overrun_visit_is_left_out_not_made_up_for() -> None:
    clock = TurnedClock()
    naps = [37.0, 0.0, 14.9, 0.0]

    def slow(_visit: Visit) -> Reading:
        clock.steady += naps.pop(0)
        return Reading()

    at = [visit.at for visit in paced(Scripted(Source.HOST, slow), times=4, clock=clock)]
    assert [moment - at[0] for moment in at] == pytest.approx([0, 45, 60, 75])


def test_news_of_a_source_that_is_always_late_come_a_visit_later_each_time(gate: threading.Event) -> None:
    doors = [threading.Event(), threading.Event(), gate]
    numbers = iter(range(3))

    def collect(_visit: Visit) -> Reading:
        number = next(numbers)
        doors[number].wait(20)
        message = FabricMessage(text=f"message {number}", where="log", kind="other")
        event = EngineEvent(signal=f"event {number}", text="", where="log")
        return Reading(fields={"engine_events": (event,), "fabric_manager": FabricManager(messages=(message,))})

    visits = paced(Scripted(Source.FABRIC_MANAGER, collect), times=3, fabric_manager=Pace(deadline_seconds=0.1))
    told: list[Snapshot] = []
    for door in doors:
        told.append(next(visits))
        door.set()
        settle("see-fabric-manager")
    assert [s.seen for s in told] == [()] * 3
    assert [[e.signal for e in s.engine_events] for s in told] == [[], ["event 0"], ["event 1"]]
    assert [[m.text for m in s.fabric_manager.messages] for s in told] == [[], ["message 0"], ["message 1"]]


def test_visits_wait_for_the_next_one_by_the_real_clock() -> None:
    began = time.monotonic()
    at = [visit.at for visit in visits_of(Scripted(Source.HOST), times=4, seconds=0.1)]
    assert time.monotonic() - began >= 0.3
    assert all(later - earlier > 0.0 for earlier, later in pairwise(at))


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


# Each at its own interval


class TurnedClock:
    """Time that passes only while visits wait for the next one; the wall clock can be set."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.set_by = 1_790_000_000.0

    def sleep(self, seconds: float) -> None:
        self.steady += seconds

    @property
    def clocks(self) -> live.Clocks:
        return live.Clocks(lambda: self.steady + self.set_by, lambda: self.steady, self.sleep)


def paced(
    *collectors: Scripted, times: int, clock: TurnedClock | None = None, seconds: float = 15.0, **paces: Pace
) -> Iterator[Snapshot]:
    told = {Source(name.replace("_", "-")): pace for name, pace in paces.items()}
    clock = clock or TurnedClock()
    return live.every(seconds, collectors, times, node=NODE, paces=told, clocks=clock.clocks)


def ages(snapshots: list[Snapshot], source: Source) -> list[float]:
    return [run.age_seconds for s in snapshots for run in s.collectors if run.source is source]


def test_a_slow_source_is_read_at_its_own_interval_and_says_how_old_it_is() -> None:
    stack = Scripted(
        Source.STACK, lambda visit: Reading(fields={"stack": Stack(os=f"{visit.at:.0f}")}), after_engines=True
    )
    host = Scripted(Source.HOST)
    seen = list(paced(stack, host, times=9))
    assert ages(seen, Source.STACK) == [0, 15, 30, 45, 0, 15, 30, 45, 0]
    assert ages(seen, Source.HOST) == [0] * 9
    assert len(stack.visits) == 3
    assert len({s.stack.os for s in seen}) == 3
    assert all(set(s.seen) == {Source.STACK, Source.HOST} for s in seen)


def test_a_site_may_choose_another_interval_and_deadline() -> None:
    stack = Scripted(Source.STACK, after_engines=True)
    seen = list(paced(stack, times=5, stack=Pace(interval_seconds=0.0, deadline_seconds=7.0)))
    assert ages(seen, Source.STACK) == [0] * 5
    assert stack.deadline_seconds == 7.0


def test_another_engine_has_its_model_read_at_once() -> None:
    other = Engine(pid=200, started_at=2000.0, kind="vllm")
    running = iter([(ENGINE,), (ENGINE,), (ENGINE, other), (other,), (other,), ()])
    processes = Scripted(Source.PROCESSES, lambda _: Reading(fields={"engines": next(running)}))

    def look(visit: Visit) -> Reading:
        if not visit.engines:
            raise CannotSeeError(Absent(Why.NOT_PRESENT, "no serving engine runs here"))
        return Reading(engine_fields={e.id: {"model": ModelConfig(path=f"/{e.pid}")} for e in visit.engines})

    model = Scripted(Source.MODEL, look, after_engines=True)
    seen = list(paced(processes, model, times=6))
    assert [[e.model.path for e in s.engines] for s in seen] == [
        ["/100"], ["/100"], ["/100", "/200"], ["/200"], ["/200"], [],
    ]  # fmt: skip
    assert [len(v.engines) for v in model.visits] == [1, 2, 1, 0]
    assert seen[-1].why_unseen(Source.MODEL) == Absent(Why.NOT_PRESENT, "no serving engine runs here")


def test_what_hangs_on_the_gpus_and_the_driver_is_read_again_in_the_visit_that_sees_others() -> None:
    here = iter(["GPU-a", "GPU-a", "GPU-b", "GPU-b"])
    module = iter(["590.1", "590.1", "590.1", "595.2"])
    nvml = Scripted(Source.NVML, lambda _: Reading(fields={"gpus": (Gpu(uuid=next(here), index=0),)}))
    host = Scripted(Source.HOST, lambda _: Reading(fields={"host": Host(driver_module=next(module))}))
    stack = Scripted(Source.STACK, after_engines=True)
    seen = list(paced(nvml, host, stack, times=4))
    assert ages(seen, Source.STACK) == [0, 15, 0, 0]


def test_what_failed_since_hides_behind_no_earlier_value() -> None:
    answers = iter(
        [Reading(fields={"stack": Stack(os="Debian")}), RuntimeError("gone"), RuntimeError("gone"), Reading()]
    )

    def look(_visit: Visit) -> Reading:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    stack = Scripted(Source.STACK, look, after_engines=True)
    seen = list(paced(stack, times=8))
    assert [Source.STACK in s.seen for s in seen] == [True] * 4 + [False, False, True, True]
    assert seen[4].stack == Stack()
    assert seen[4].why_unseen(Source.STACK) == Absent(Why.FAILED, "RuntimeError: gone")
    assert len(stack.visits) == 4, "a failure is asked again at the next visit"


def test_what_is_not_there_is_not_looked_for_at_every_visit() -> None:
    model = Scripted(Source.MODEL, fails(CannotSeeError(Absent(Why.NOT_PRESENT, "none"))), after_engines=True)
    seen = list(paced(model, times=4))
    assert [s.why_unseen(Source.MODEL) for s in seen] == [Absent(Why.NOT_PRESENT, "none")] * 4
    assert [run.succeeded for s in seen for run in s.collectors] == [False] * 4
    assert len(model.visits) == 1


def test_a_slow_answer_is_told_at_the_next_visit_with_its_age(gate: threading.Event) -> None:
    model = Scripted(Source.MODEL, stuck(gate), after_engines=True)
    visits = paced(model, times=3, model=Pace(deadline_seconds=0.1))
    late = next(visits)
    gate.set()
    settle("see-model")
    then = next(visits)
    assert (late.why_unseen(Source.MODEL).why, then.seen) == (Why.TIMED_OUT, (Source.MODEL,))  # type: ignore[union-attr]
    assert ages([then], Source.MODEL) == [15]
    assert len(model.visits) == 1


def test_which_engines_run_is_unknown_while_the_process_table_is() -> None:
    processes = Scripted(Source.PROCESSES, fails(RuntimeError("no /proc")))
    model = Scripted(Source.MODEL, fails(CannotSeeError(Absent(Why.NOT_PRESENT, "no engine"))), after_engines=True)
    snapshot = one(processes, model)
    assert snapshot.why_unseen(Source.MODEL) == Absent(
        Why.NOT_ASKED, "which engines run is unknown (RuntimeError: no /proc)"
    )


def test_a_system_without_a_thread_left_costs_the_sources_of_one_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    visits = visits_of(Scripted(Source.HOST), times=2)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        without = next(visits)
    assert without.why_unseen(Source.HOST) == Absent(Why.FAILED, "can't start new thread")
    assert next(visits).seen == (Source.HOST,)


def test_a_hung_a_failing_and_a_slow_source_leave_the_others_their_visits(tmp_path: Path) -> None:
    """The model lies on a pipe that nobody writes to, as on a file server that is gone."""
    drill = simulated.drill_of("dgx-h100-4of8")
    world = simulated.World(drill, tmp_path)
    world.advance()
    (config,) = tmp_path.rglob("config.json")
    config.unlink()
    os.mkfifo(config)
    sick = (
        Scripted(Source.STACK, fails(RuntimeError("boom"))),
        Scripted(Source.FABRIC_MANAGER, lambda _: time.sleep(0.3) or Reading()),
    )
    ours = {collector.source for collector in sick}
    well = [collector for collector in world.collectors if collector.source not in ours]
    try:
        paces = {Source.MODEL: Pace(deadline_seconds=0.2)}
        seen = list(live.every(0.5, (*sick, *well), 4, node=NODE, paces=paces))
    finally:
        writer = os.open(config, os.O_RDWR)
        os.write(writer, b"{}")
        os.close(writer)
        settle("see-model")
        world.close()
    for snapshot in seen:
        assert set(snapshot.seen) >= {Source.PROCESSES, Source.KERNEL_LOG, Source.HOST, Source.FABRIC_MANAGER}
        assert {Source.ENGINE_LOG, Source.ENGINE_METRICS} <= set(snapshot.seen)
        assert len(snapshot.engines) == 1
        assert snapshot.why_unseen(Source.MODEL).why is Why.TIMED_OUT  # type: ignore[union-attr]
        assert snapshot.why_unseen(Source.STACK).why is Why.FAILED  # type: ignore[union-attr]


def settle(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(20)


# The clocks


def test_visits_do_not_drift_and_a_set_clock_does_not_move_them() -> None:
    clock = TurnedClock()
    begun: list[float] = []

    def slow(_visit: Visit) -> Reading:
        begun.append(clock.steady)
        clock.steady += 0.7 * (len(begun) % 3)  # a visit takes its time
        clock.set_by += {3: 3600.0, 5: -7200.0}.get(len(begun), 0.0)
        return Reading()

    seen = list(paced(Scripted(Source.HOST, slow), times=8, clock=clock))
    assert [moment - begun[0] for moment in begun] == pytest.approx([15.0 * n for n in range(8)])
    assert [s.clock_stepped_seconds for s in seen] == [0, 0, 0, 3600, 0, -7200, 0, 0]
    assert [b.at - a.at - b.clock_stepped_seconds for a, b in pairwise(seen)] == pytest.approx([15.0] * 7)


def test_a_clock_that_is_slewed_is_no_set_clock() -> None:
    clock = TurnedClock()

    def drift(_visit: Visit) -> Reading:
        clock.set_by += 0.0075  # 500 ppm of 15 s
        return Reading()

    assert {s.clock_stepped_seconds for s in paced(Scripted(Source.HOST, drift), times=20, clock=clock)} == {0.0}


@pytest.mark.parametrize("step", [3600.4, -86400.0, 1.5])
def test_an_engine_keeps_its_name_when_the_clock_is_set(step: float) -> None:
    """The kernel tells when it booted in whole seconds, and that moves with the clock."""
    clock = TurnedClock()
    boot = 1_780_000_000.0

    def processes(_visit: Visit) -> Reading:
        moved = float(int(clock.set_by - 1_790_000_000.0))
        return Reading(fields={"engines": (Engine(pid=100, started_at=boot + moved + 12.34, kind="vllm"),)})

    log = Scripted(Source.ENGINE_LOG, after_engines=True)
    visits = paced(Scripted(Source.PROCESSES, processes), log, times=5, clock=clock)
    first = next(visits)
    clock.set_by += step
    second, third = next(visits), next(visits)
    clock.set_by -= step
    back = next(visits)
    assert {s.engines[0].id for s in (first, second, third, back)} == {first.engines[0].id}
    assert {v.engines[0].id for v in log.visits} == {first.engines[0].id}
    assert second.engines[0].started_at != first.engines[0].started_at


def test_an_engine_that_is_restarted_when_the_clock_is_set_has_another_name() -> None:
    clock = TurnedClock()
    started = iter([1000.0, 1030.0 + 3600])
    processes = Scripted(
        Source.PROCESSES, lambda _: Reading(fields={"engines": (Engine(pid=7, started_at=next(started), kind="vllm"),)})
    )
    visits = paced(processes, times=2, clock=clock)
    first = next(visits)
    clock.set_by += 3600
    assert next(visits).engines[0].id != first.engines[0].id
