"""Visits of a real node: every collector asked at once, each for as long as its deadline allows, one snapshot each time."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from doctor.collectors.collector import CannotSeeError, Collector, Reading, Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.engine_metrics import MetricsPages
from doctor.collectors.fabric_manager import FabricManagerState
from doctor.collectors.host import HostState
from doctor.collectors.kernel_log import KernelLog
from doctor.collectors.model import ServedModels
from doctor.collectors.nvml import NvmlCollector
from doctor.collectors.placement import identified, placed
from doctor.collectors.processes import Processes
from doctor.collectors.redaction import snapshot_without_secrets
from doctor.collectors.stack import Versions
from doctor.readers.patterns import LogPattern
from doctor.snapshot import Absent, CollectorRun, Engine, Node, Position, Snapshot, Source, Unseen, Why

NEWS = frozenset(("kernel", "engine_events"))
"""Fields that carry their own stamps: what a late answer holds of them is as true at the next visit."""


def collectors(
    root: Path = Path("/"),
    *,
    logs: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
    patterns: Sequence[LogPattern] = (),
    positions: Sequence[Position] = (),
) -> tuple[Collector, ...]:
    """Return the collectors of a node, one a source. *logs*, *metrics* and *patterns* are what the site names itself.

    *positions*: where an earlier life of the program stopped reading.
    """
    others = without_nvml(root, logs=logs, metrics=metrics, patterns=patterns, positions=positions)
    return (NvmlCollector(root=root), *others)


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
    seconds: float, collectors: Sequence[Collector], times: int | None = None, *, node: Node | None = None
) -> Iterator[Snapshot]:
    """Yield a snapshot each *seconds*, *times* times or for ever; the collectors are closed at the end.

    Visits begin at whole multiples of *seconds* after the first, however long each takes; one that is overrun is
    left out. A visit takes no longer than the longest deadline of those that find the engines plus that of the rest.
    """
    node = node or Node(name=socket.gethostname())
    posts = [_Post(collector) for collector in collectors]
    began = time.monotonic()
    made = 0
    try:
        while True:
            snapshot = _visit(posts, node)
            for collector in collectors:
                if isinstance(collector, NvmlCollector):
                    collector.heed(snapshot.kernel)  # law 4: what the driver says is gone is left alone
            yield snapshot
            made += 1
            if times is not None and made >= times:
                return
            behind = time.monotonic() - began
            time.sleep(max(0.0, math.floor(behind / seconds + 1) * seconds - behind))
    finally:
        for collector in collectors:
            collector.close()


class _Answer(msgspec.Struct, frozen=True):
    """What one asking brought."""

    reading: Reading
    why: Absent | None
    """Not None: the whole source was not seen, and this is why."""
    asked_at: float
    """Monotonic."""
    duration_seconds: float


class _Post:
    """A collector at its work: asked in a thread of its own, never twice at the same time."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._done = threading.Event()
        self._done.set()
        self._answer: _Answer | None = None
        self._asked_at = 0.0
        self._late: Reading | None = None

    @property
    def _name(self) -> str:
        return self.collector.source.value

    def ask(self, visit: Visit) -> None:
        """Set to work, unless it is still busy with an earlier visit."""
        if not self._done.is_set():
            return
        if self._answer is not None:  # it came after its visit had gone on
            self._late = self._answer.reading
            self._answer = None
        self._done.clear()
        self._asked_at = time.monotonic()
        # A daemon: a thread that the kernel holds must not hold the program's end.
        threading.Thread(target=self._work, args=(visit, self._asked_at), name=f"see-{self._name}", daemon=True).start()

    def _work(self, visit: Visit, asked_at: float) -> None:
        why: Absent | None = None
        try:
            reading = self.collector.collect(visit)
        except CannotSeeError as e:
            reading, why = Reading(fields=e.fields), e.why
        except Exception as e:  # law 5: a collector never stops a visit
            reading, why = Reading(), Absent(Why.FAILED, f"{type(e).__name__}: {e}")
        self._answer = _Answer(reading, why, asked_at, time.monotonic() - asked_at)
        self._done.set()

    def answer(self) -> _Answer:
        """Return what it saw, waiting until its deadline; else that it has not answered."""
        left = self._asked_at + self.collector.deadline_seconds - time.monotonic()
        if not self._done.wait(max(0.0, left)) or self._answer is None:
            waited = time.monotonic() - self._asked_at
            why = Absent(Why.TIMED_OUT, f"{self._name} has not answered for {waited:.1f} s")
            return _Answer(Reading(), why, self._asked_at, waited)
        answer, self._answer = self._answer, None
        if self._late is not None:
            news = {field: value for field, value in self._late.fields.items() if field in NEWS}
            fields = {**answer.reading.fields}
            for field, value in news.items():
                fields[field] = (*value, *fields.get(field, ()))
            answer = msgspec.structs.replace(answer, reading=msgspec.structs.replace(answer.reading, fields=fields))
            self._late = None
        return answer


def _visit(posts: Sequence[_Post], node: Node) -> Snapshot:
    at = time.time()
    first = [post for post in posts if not post.collector.after_engines]
    then = [post for post in posts if post.collector.after_engines]
    for post in first:
        post.ask(Visit(at=at))
    answers: dict[_Post, _Answer] = {}
    for post in first:
        if post.collector.source is Source.PROCESSES:
            answers[post] = post.answer()
    engines: tuple[Engine, ...] = tuple(
        engine for answer in answers.values() for engine in answer.reading.fields.get("engines", ())
    )
    for post in then:
        post.ask(Visit(at=at, engines=engines))
    for post in posts:
        if post not in answers:
            answers[post] = post.answer()
    return _merged(at, node, [(post.collector.source, answers[post]) for post in posts])


def _merged(at: float, node: Node, answers: Sequence[tuple[Source, _Answer]]) -> Snapshot:
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
        runs.append(CollectorRun(source, answer.why is None, round(answer.duration_seconds, 6)))
        for name, value in answer.reading.fields.items():
            fields[name] = _joined(fields[name], value) if name in fields else value
        for engine_id, more in answer.reading.engine_fields.items():
            of_engines.setdefault(engine_id, {}).update(more)
    fields["engines"] = tuple(
        msgspec.structs.replace(engine, **of_engines.get(engine.id, {})) for engine in fields.get("engines", ())
    )
    snapshot = Snapshot(at=at, seen=tuple(seen), unseen=tuple(unseen), collectors=tuple(runs), **fields)
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
