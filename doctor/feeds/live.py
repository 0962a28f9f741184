"""Visits of a real node: collectors asked side by side, each for as long as its deadline allows, one snapshot each time."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from doctor.collectors import files
from doctor.collectors.collector import INTERVAL_SECONDS, CannotSeeError, Collector, Pace, Reading, Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.engine_metrics import MetricsPages
from doctor.collectors.fabric_manager import FabricManagerState
from doctor.collectors.gpu_access import GpuAccess
from doctor.collectors.host import HostState
from doctor.collectors.kernel_log import KernelLog
from doctor.collectors.model import ServedModels
from doctor.collectors.nvml import NvmlCollector
from doctor.collectors.placement import identified, placed
from doctor.collectors.processes import Processes
from doctor.collectors.redaction import snapshot_without_secrets
from doctor.collectors.stack import Versions
from doctor.readers.patterns import LogPattern
from doctor.snapshot import (
    Absent,
    CollectorRun,
    Engine,
    FabricManager,
    Node,
    Position,
    Snapshot,
    Source,
    Unseen,
    Why,
    or_none,
)

NEWS = frozenset(("kernel", "engine_events"))
"""Fields that carry their own stamps: what a late answer holds of them is as true at the next visit."""

STEP_SECONDS = 0.5
"""Where the wall clock went so much further or less far than the monotonic one between two visits, it was set. NTP slews
by half a thousandth at most: 8 ms in 15 s."""

BOOT_SLACK_SECONDS = 1.5
"""The kernel tells the time of its boot in whole seconds; so much may a process's start be off after a step."""


class Clocks(msgspec.Struct, frozen=True):
    """The time, as visits are paced and stamped by it."""

    wall: Callable[[], float]
    """Unix time, seconds; it may be set."""
    steady: Callable[[], float]
    """Seconds, which nobody sets."""
    sleep: Callable[[float], None]


REAL = Clocks(time.time, time.monotonic, time.sleep)


def node_of(root: Path) -> Node:
    """Return which node it is: by its own /etc/hostname where its root is mounted in a container, which has another name."""
    if root != Path("/"):
        with contextlib.suppress(OSError):
            if name := files.word_of(root / "etc/hostname"):
                return Node(name=name)
    return Node(name=socket.gethostname())


def collectors(
    root: Path = Path("/"),
    *,
    logs: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
    patterns: Sequence[LogPattern] = (),
    positions: Sequence[Position] = (),
    access: GpuAccess | None = None,
) -> tuple[Collector, ...]:
    """Return the collectors of a node, one a source. *logs*, *metrics* and *patterns* are what the site names itself.

    *positions*: where an earlier life of the program stopped reading. *access*: who may have the GPUs let go.
    """
    others = without_nvml(root, logs=logs, metrics=metrics, patterns=patterns, positions=positions)
    return (NvmlCollector(root=root, access=access), *others)


def without_nvml(
    root: Path,
    *,
    logs: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
    kernel_log: KernelLog | None = None,
    patterns: Sequence[LogPattern] = (),
    positions: Sequence[Position] = (),
) -> tuple[Collector, ...]:
    """Return the collectors that read files, programs and pages."""
    return (
        kernel_log or KernelLog(root, patterns=patterns, positions=positions),
        Processes(root),
        EngineLogs(root, logs=logs, patterns=patterns, positions=positions),
        MetricsPages(root, urls=metrics),
        Versions(root),
        ServedModels(root),
        FabricManagerState(root),
        HostState(root),
    )


def every(
    seconds: float,
    collectors: Sequence[Collector],
    times: int | None = None,
    *,
    node: Node | None = None,
    paces: Mapping[Source, Pace] | None = None,
    clocks: Clocks = REAL,
) -> Iterator[Snapshot]:
    """Yield a snapshot each *seconds*, *times* times or for ever; the collectors are closed at the end.

    Visits begin at whole multiples of *seconds* after the first by the steady clock, however long each takes; one that
    is overrun is left out. A visit takes no longer than the longest deadline of those that find the engines plus that of
    the rest. *paces*: the site's own intervals and deadlines.
    """
    crew = _Crew(seconds, collectors, node or Node(name=socket.gethostname()), paces or {}, clocks)
    began = clocks.steady()
    made = 0
    try:
        while True:
            snapshot = crew.visit()
            for collector in collectors:
                if isinstance(collector, NvmlCollector):
                    collector.heed(snapshot)  # law 4: what the driver says is gone is left alone
            yield snapshot
            made += 1
            if times is not None and made >= times:
                return
            behind = clocks.steady() - began
            clocks.sleep(max(0.0, math.floor(behind / seconds + 1) * seconds - behind))
    finally:
        for collector in collectors:
            collector.close()


class _Answer(msgspec.Struct, frozen=True):
    """What one asking brought."""

    reading: Reading
    why: Absent | None
    """Not None: the whole source was not seen, and this is why."""
    asked_at: float
    """By the steady clock."""
    duration_seconds: float
    age_seconds: float = 0.0
    """Not 0: it was read for an earlier visit, so long before this one."""


class _Post:
    """A collector at its work: asked in a thread of its own, never twice at the same time."""

    def __init__(self, collector: Collector, pace: Pace, visit_seconds: float) -> None:
        self.collector = collector
        wanted = pace.interval_seconds
        interval = INTERVAL_SECONDS.get(collector.source, 0.0) if wanted is None else wanted
        self._stands_seconds = interval - visit_seconds / 2
        """How long what it saw may be told again: what gets too old half way to the next visit is read anew at this one."""
        if pace.deadline_seconds is not None:
            collector.deadline_seconds = pace.deadline_seconds
        self._done = threading.Event()
        self._done.set()
        self._answer: _Answer | None = None
        self.asked_at = -math.inf
        """By the steady clock."""
        self._began = 0.0
        self._engines: tuple[str, ...] = ()
        """The engines that it was last asked about."""
        self._kept: _Answer | None = None
        """What it last saw, where that may be told again."""
        self.of_node: object = None
        """What the node was like when that was read."""
        self._late: Reading | None = None

    @property
    def source(self) -> Source:
        """What it looks at."""
        return self.collector.source

    def carried(self, now: float, engines: tuple[str, ...]) -> _Answer | None:
        """Return what it saw for an earlier visit, while that is young enough and of these engines; None: ask it."""
        if not self._done.is_set():
            return None
        late = self._answer
        if late is not None and late.why is None and self._stands_seconds > 0:  # it counts, with its age
            self._kept, self._answer = late, None
        kept = self._kept
        if kept is None or engines != self._engines or now - kept.asked_at >= self._stands_seconds:
            return None
        return msgspec.structs.replace(kept, age_seconds=now - kept.asked_at)

    def ask(self, visit: Visit, now: float) -> None:
        """Set to work, unless it is still busy with an earlier visit."""
        if not self._done.is_set():
            return
        if self._answer is not None:  # it came after its visit had gone on
            self._late = self._answer.reading
            self._answer = None
        self._done.clear()
        self._kept = None
        self._engines = tuple(engine.id for engine in visit.engines)
        self.asked_at = now
        self._began = time.monotonic()
        # A daemon: a thread that the kernel holds must not hold the program's end.
        thread = threading.Thread(target=self._work, args=(visit, now), name=f"see-{self.source.value}", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # the system has no thread left
            self._answer = _Answer(Reading(), Absent(Why.FAILED, str(e)), now, 0.0)
            self._done.set()

    def _work(self, visit: Visit, asked_at: float) -> None:
        began = time.monotonic()
        why: Absent | None = None
        try:
            reading = self.collector.collect(visit)
        except CannotSeeError as e:
            reading, why = Reading(fields=e.fields), e.why
        except Exception as e:  # law 5: a collector never stops a visit
            reading, why = Reading(), Absent(Why.FAILED, f"{type(e).__name__}: {e}")
        self._answer = _Answer(reading, why, asked_at, time.monotonic() - began)
        self._done.set()

    def answer(self) -> _Answer:
        """Return what it saw, waiting until its deadline; else that it has not answered."""
        left = self._began + self.collector.deadline_seconds - time.monotonic()
        if not self._done.wait(max(0.0, left)) or self._answer is None:
            waited = time.monotonic() - self._began
            why = Absent(Why.TIMED_OUT, f"{self.source.value} has not answered for {waited:.1f} s")
            return self._with_late_news(_Answer(Reading(), why, self.asked_at, waited))
        answer, self._answer = self._answer, None
        answer = self._with_late_news(answer)
        if self._stands_seconds > 0 and (answer.why is None or answer.why.why in LASTING):
            self._kept = answer
        return answer

    def _with_late_news(self, answer: _Answer) -> _Answer:
        """Return an answer, itself late perhaps, with the news of the one before that came after its visit."""
        late, self._late = self._late, None
        if late is None:
            return answer
        fields = {**answer.reading.fields}
        for name, value in late.fields.items():
            if name in NEWS:
                fields[name] = (*value, *fields.get(name, ()))
            elif isinstance(value, FabricManager):
                now: FabricManager = fields.get(name, FabricManager())
                fields[name] = msgspec.structs.replace(now, messages=(*value.messages, *now.messages))
        return msgspec.structs.replace(answer, reading=msgspec.structs.replace(answer.reading, fields=fields))


LASTING = frozenset((Why.NOT_PRESENT, Why.NOT_SUPPORTED, Why.NO_PERMISSION))
"""Why a source may be unseen for longer: it is asked again at its own interval. One that failed is asked at each visit."""


class _Crew:
    """The collectors at their visits, and what is known from one visit to the next."""

    def __init__(
        self, seconds: float, collectors: Sequence[Collector], node: Node, paces: Mapping[Source, Pace], clocks: Clocks
    ) -> None:
        self._posts = [_Post(collector, paces.get(collector.source, Pace()), seconds) for collector in collectors]
        self._node = node
        self._clocks = clocks
        self._before: tuple[float, float] | None = None
        """When the last visit began, by both clocks."""
        self._stepped = 0.0
        """How far the wall clock was set since the first visit."""
        self._named: dict[int, tuple[Engine, float]] = {}
        """By pid: each engine of the last visit that saw any, and how far the clock had been set by then."""

    def visit(self) -> Snapshot:
        """Look once."""
        at, now = self._clocks.wall(), self._clocks.steady()
        step = self._step_seconds(at, now)
        first = [post for post in self._posts if not post.collector.after_engines]
        for post in first:
            post.ask(Visit(at=at), now)
        answers: dict[Source, _Answer] = {
            post.source: self._with_names(post.answer()) for post in first if post.source is Source.PROCESSES
        }
        engines = answers[Source.PROCESSES].reading.fields.get("engines", ()) if answers else ()
        visit = Visit(at=at, engines=engines)
        ids = tuple(engine.id for engine in engines)
        for post in self._posts:
            if post.collector.after_engines:
                kept = post.carried(now, ids)
                if kept is None:
                    post.ask(visit, now)
                else:
                    answers[post.source] = kept
        carried = [post for post in self._posts if post.source in answers and post.source is not Source.PROCESSES]
        for post in self._posts:
            if post.source not in answers:
                answers[post.source] = post.answer()
        of_node = _kind_of_node(answers)
        changed = [post for post in carried if post.of_node != of_node]
        for post in changed:  # what it tells is of another GPU or driver
            post.ask(visit, now)
        for post in changed:
            answers[post.source] = post.answer()
        for post in self._posts:
            if post.asked_at == now:
                post.of_node = of_node
        return _merged(at, step, self._node, _with_unknown_engines(self._posts, answers))

    def _step_seconds(self, at: float, now: float) -> float:
        """Return how far the wall clock was set since the last visit."""
        before, self._before = self._before, (at, now)
        if before is None:
            return 0.0
        step = (at - before[0]) - (now - before[1])
        if abs(step) < STEP_SECONDS and at >= before[0]:
            return 0.0
        step = round(step, 1)  # whole tenths: power is laid over each other in tenths
        self._stepped += step
        return step

    def _with_names(self, answer: _Answer) -> _Answer:
        """Return the answer with the names that its engines had before the clock was set: their starts moved with it."""
        engines: tuple[Engine, ...] = answer.reading.fields.get("engines", ())
        if not engines:
            return answer
        named = tuple(self._with_name(engine) for engine in engines)
        self._named = {engine.pid: (engine, self._stepped) for engine in named}
        fields = {**answer.reading.fields, "engines": named}
        return msgspec.structs.replace(answer, reading=msgspec.structs.replace(answer.reading, fields=fields))

    def _with_name(self, engine: Engine) -> Engine:
        before, stepped = self._named.get(engine.pid, (engine, self._stepped))
        moved = engine.started_at - before.started_at - (self._stepped - stepped)
        same = engine.id != before.id and abs(moved) <= (BOOT_SLACK_SECONDS if self._stepped else 0.0)
        return msgspec.structs.replace(engine, identity=before.id) if same else engine


def _kind_of_node(answers: Mapping[Source, _Answer]) -> object:
    """Return what the answers of the other sources hang on: which GPUs and which driver there are."""
    nvml, host = answers.get(Source.NVML), answers.get(Source.HOST)
    gpus = frozenset(gpu.uuid for gpu in nvml.reading.fields.get("gpus", ())) if nvml else frozenset[str]()
    state = host.reading.fields.get("host") if host else None
    return gpus, or_none(state.driver_module) if state else None


def _with_unknown_engines(
    posts: Sequence[_Post], answers: Mapping[Source, _Answer]
) -> Iterator[tuple[Source, _Answer]]:
    """Yield each source's answer. While nobody knows which engines run, "there is none" is not what was seen."""
    unknown = answers[Source.PROCESSES].why if Source.PROCESSES in answers else None
    for post in posts:
        answer = answers[post.source]
        if unknown and post.collector.after_engines and answer.why and answer.why.why is Why.NOT_PRESENT:
            why = Absent(Why.NOT_ASKED, f"which engines run is unknown ({unknown.detail or unknown.why.value})")
            answer = msgspec.structs.replace(answer, why=why)
        yield post.source, answer


def _merged(at: float, step: float, node: Node, answers: Iterable[tuple[Source, _Answer]]) -> Snapshot:
    fields: dict[str, Any] = {"node": node}
    of_engines: dict[str, dict[str, Any]] = {}
    seen: list[Source] = []
    unseen: list[Unseen] = []
    runs: list[CollectorRun] = []
    for source, answer in answers:
        if answer.why is None:
            seen.append(source)
        else:
            unseen.append(Unseen(source, answer.why))
        unseen += answer.reading.unseen
        age = round(answer.age_seconds, 3)
        runs.append(CollectorRun(source, answer.why is None, round(answer.duration_seconds, 6), age))
        for name, value in answer.reading.fields.items():
            fields[name] = _joined(fields[name], value) if name in fields else value
        for engine_id, more in answer.reading.engine_fields.items():
            of_engines.setdefault(engine_id, {}).update(more)
    fields["engines"] = tuple(
        msgspec.structs.replace(engine, **of_engines.get(engine.id, {})) for engine in fields.get("engines", ())
    )
    snapshot = Snapshot(
        at=at, clock_stepped_seconds=step, seen=tuple(seen), unseen=tuple(unseen), collectors=tuple(runs), **fields
    )
    return snapshot_without_secrets(placed(identified(snapshot)))


def _joined(one: Any, other: Any) -> Any:
    """Return what two collectors say of the same thing: of a record each its fields, of a list all."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return (*cast("tuple[Any, ...]", one), *cast("tuple[Any, ...]", other))
    if isinstance(one, msgspec.Struct) and type(one) is type(other):
        defaults = type(one)()
        told = {
            name: getattr(other, name)
            for name in one.__struct_fields__
            if isinstance(getattr(one, name), Absent) or getattr(one, name) == getattr(defaults, name)
        }
        return msgspec.structs.replace(
            one, **{name: value for name, value in told.items() if value != getattr(defaults, name)}
        )
    return other
