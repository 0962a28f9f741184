"""The engine's processes are the bottleneck: one fills a core, or they are kept from the processors, while GPUs wait."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import NOT_ASKED, Absent, Engine, Maybe, Source, Why, known
from doctor.symptoms.growth import growth
from doctor.symptoms.names import names_of
from doctor.symptoms.processors import cpu_pressure, host_cpu_pressure, throttling
from doctor.symptoms.served import Served, served
from doctor.symptoms.traffic import too_short


class Limits(msgspec.Struct, frozen=True):
    """What a full core, a binding quota, a crowded node and a waiting GPU are."""

    window_seconds: float = 120.0
    """guess: longer than the burst of a batch's arrival."""
    cores_min: float = 0.95
    """CPU seconds a second. The server's event loop is one thread: more than one core can't be had."""
    cores_max: float = 1.25
    """guess: beyond it other threads work too, and one full core can't be told from them."""
    throttled_ratio: float = 0.25
    """Of the periods of its quota: what the alert CPUThrottlingHigh of kubernetes-mixin takes (25 %)."""
    pressure_ratio: float = 0.4
    """Of the time some task of the engine waits for a processor; guess: an engine with cores to spare shows a few percent."""
    gpu_ratio_max: float = 0.7
    """Mean utilisation of its GPUs; guess: a loaded engine shows above 0.9."""


class Cause(msgspec.Struct, frozen=True):
    """One thing that keeps the engine from feeding its GPUs."""

    text: str
    evidence: Evidence
    confidence: Confidence
    severity: Severity = Severity.NOTICE


@rule(
    "engine-cpu-starved",
    "The engine's own process is the bottleneck",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.NVML, Source.ENGINE_METRICS),
    explains=("throughput-below-reference", "ttft-slow"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Join what the engine's processes get of the processors with the utilisation of its GPUs, while requests run."""
    for one in served(history):
        spent = growth((s.at, _cpu_seconds(s.engines, one)) for s in history.window(limits.window_seconds))
        if spent is None or spent.seconds < 0.8 * limits.window_seconds:
            yield too_short(spent.seconds if spent else 0.0)
            continue
        causes = [*_quota(history, one, limits), *_pressure(history, one, limits), *_full_core(history, one, limits)]
        if not causes or not _runs(history, one, limits):
            continue
        busy = _gpu_ratio(history, one, limits)
        if busy is None:
            yield Absent(Why.NOT_ASKED, f"how busy the GPUs of engine {one.engine.pid} are was not seen")
        elif busy <= limits.gpu_ratio_max:
            yield _finding(history, one, causes, busy)


def _quota(history: History, one: Served, limits: Limits) -> Iterator[Cause]:
    held = throttling(history, one.engine.id, limits.window_seconds)
    if held is not None and held.period_ratio >= limits.throttled_ratio and held.seconds >= 0.8 * limits.window_seconds:
        text = f"stopped in {held.period_ratio:.0%} of the periods of {held.seconds:.0f} s, {held.stopped_seconds:.0f} s in all"
        yield Cause(
            f"The engine's control group may use {held.quota_cores:g} cores and was {text}",
            Evidence(Source.HOST.value, f"{held.cgroup}/cpu.stat", text),
            Confidence.HIGH,
            Severity.WARNING,
        )


def _pressure(history: History, one: Served, limits: Limits) -> Iterator[Cause]:
    """Yield that others want the processors too; where a quota binds, it makes the same pressure."""
    waited = cpu_pressure(history, one.engine.id, limits.window_seconds)
    if waited is None or waited < limits.pressure_ratio or next(_quota(history, one, limits), None) is not None:
        return
    node = host_cpu_pressure(history, limits.window_seconds)
    text = f"a task of it waited {waited:.0%} of the time"
    beside = f", one of the whole node {node:.0%}" if node is not None else ""
    yield Cause(
        f"The engine's processes wait for processors that others use: {text}{beside}",
        Evidence(Source.HOST.value, "cpu.pressure, some avg60", text + beside),
        Confidence.MEDIUM,
        Severity.WARNING,
    )


def _full_core(history: History, one: Served, limits: Limits) -> Iterator[Cause]:
    """Yield a front process at one core. Workers spin while they wait for each other: their CPU time says nothing."""
    spent = growth((s.at, _cpu_seconds(s.engines, one)) for s in history.window(limits.window_seconds))
    if spent is not None and limits.cores_min <= spent.per_second <= limits.cores_max:
        yield Cause(
            f"The engine's front process (pid {one.engine.pid}) has filled {spent.per_second:.2f} cores for {spent.seconds:.0f} s",
            Evidence(
                Source.PROCESSES.value,
                f"/proc/{one.engine.pid}/stat",
                f"{spent.amount:.0f} CPU seconds in {spent.seconds:.0f} s",
            ),
            Confidence.MEDIUM,
        )


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


def _finding(history: History, one: Served, causes: list[Cause], busy: float) -> Finding:
    gpus = one.group.gpus if one.group is not None else ()
    first = causes[0]
    share = one.engine.cpu_share
    group = share.cgroup if known(share.cgroup) else one.engine.cgroup
    return Finding(
        summary=f"{first.text} while {names_of(history.latest, gpus)} were {busy:.0%} busy: the GPUs wait for the host",
        evidence=(
            *(cause.evidence for cause in causes),
            Evidence(Source.NVML.value, "utilisation", f"mean {busy:.0%}"),
        ),
        confidence=first.confidence,
        severity=first.severity,
        subject=Subject(engine=one.engine.id, pids=(one.engine.pid,)),
        facts={"pid": str(one.engine.pid)} | ({"cgroup": group} if known(group) else {}),
    )
