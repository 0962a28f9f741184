"""The engine's front process fills one core while its GPUs wait."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import NOT_ASKED, Absent, Engine, Maybe, Source, Why, known
from doctor.symptoms.growth import Growth, growth
from doctor.symptoms.names import names_of
from doctor.symptoms.served import Served, served
from doctor.symptoms.traffic import too_short


class Limits(msgspec.Struct, frozen=True):
    """What a full core and a waiting GPU are."""

    window_seconds: float = 120.0
    """guess: longer than the burst of a batch's arrival."""
    cores_min: float = 0.95
    """CPU seconds a second. The server's event loop is one thread: more than one core can't be had."""
    cores_max: float = 1.25
    """guess: beyond it other threads work too, and one full core can't be told from them."""
    gpu_ratio_max: float = 0.7
    """Mean utilisation of its GPUs; guess: a loaded engine shows above 0.9."""


@rule(
    "engine-cpu-starved",
    "The engine's own process is the bottleneck",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.NVML, Source.ENGINE_METRICS),
    explains=("throughput-below-reference", "ttft-slow"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Join the front process's CPU time with the utilisation of its GPUs, while requests run.

    Workers spin while they wait for each other, so their CPU time says nothing.
    """
    for one in served(history):
        spent = growth((s.at, _cpu_seconds(s.engines, one)) for s in history.window(limits.window_seconds))
        if spent is None or spent.seconds < 0.8 * limits.window_seconds:
            yield too_short(spent.seconds if spent else 0.0)
            continue
        if not limits.cores_min <= spent.per_second <= limits.cores_max or not _runs(history, one, limits):
            continue
        busy = _gpu_ratio(history, one, limits)
        if busy is None:
            yield Absent(Why.NOT_ASKED, f"how busy the GPUs of engine {one.engine.pid} are was not seen")
        elif busy <= limits.gpu_ratio_max:
            yield _finding(history, one, spent, busy)


def _cpu_seconds(engines: tuple[Engine, ...], one: Served) -> Maybe[float]:
    return next((engine.cpu_seconds for engine in engines if engine.id == one.engine.id), NOT_ASKED)


def _runs(history: History, one: Served, limits: Limits) -> bool:
    """Whether requests ran at most visits of the window."""
    pages = [m for s in history.window(limits.window_seconds) for m in s.metrics if m.engine == one.engine.id]
    return bool(pages) and 2 * sum(1 for m in pages if known(m.running) and m.running > 0) > len(pages)


def _gpu_ratio(history: History, one: Served, limits: Limits) -> float | None:
    mine = set(one.group.gpus) if one.group is not None else set[str]()
    ratios = [
        gpu.activity.gpu_ratio
        for snapshot in history.window(limits.window_seconds)
        for gpu in snapshot.gpus
        if gpu.uuid in mine and known(gpu.activity.gpu_ratio)
    ]
    return sum(ratios) / len(ratios) if ratios else None


def _finding(history: History, one: Served, spent: Growth, busy: float) -> Finding:
    gpus = one.group.gpus if one.group is not None else ()
    return Finding(
        summary=f"The engine's front process (pid {one.engine.pid}) has filled {spent.per_second:.2f} cores for {spent.seconds:.0f} s "
        f"while {names_of(history.latest, gpus)} were {busy:.0%} busy: one thread feeds them too slowly",
        evidence=(
            Evidence(
                Source.PROCESSES.value,
                f"/proc/{one.engine.pid}/stat",
                f"{spent.amount:.0f} CPU seconds in {spent.seconds:.0f} s",
            ),
            Evidence(Source.NVML.value, "utilisation", f"mean {busy:.0%}"),
        ),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=one.engine.id, pids=(one.engine.pid,)),
        facts={"pid": str(one.engine.pid)},
    )
