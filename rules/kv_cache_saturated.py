"""The KV cache is full: requests wait for it or are preempted."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, EngineEvent, Source
from doctor.symptoms.engine_log import EngineLog, engine_logs
from doctor.symptoms.traffic import Traffic, long_enough


class Limits(msgspec.Struct, frozen=True):
    """When a full cache is too full."""

    usage_ratio: float = 0.85
    """The single-H100 playbook's threshold for sustained use."""
    window_seconds: float = 120.0
    """Sustained: over this time at least; guess: a burst of long prompts is over by then."""
    lines_min: int = 2
    """In a log alone: so many statistics lines in a row, 10 s apart."""


@rule(
    "kv-cache-saturated",
    "The KV cache is full and requests wait for it",
    severity=Severity.WARNING,
    needs=(Source.ENGINE_METRICS,),
    explains=("ttft-slow",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Ask for sustained use and for its victims: waiting requests or preemptions. A cache full of reusable prefixes has none."""
    told: set[str] = set()
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
        elif (finding := _measured(traffic, limits)) is not None:
            told.add(traffic.engine)
            yield finding
    for log in engine_logs(history):
        if log.engine not in told and (finding := _logged(log, limits)) is not None:
            yield finding


def _measured(traffic: Traffic, limits: Limits) -> Finding | None:
    usage = traffic.gauge(lambda page: page.kv_cache_usage_ratio)
    if not usage or min(usage) < limits.usage_ratio:
        return None
    waiting = traffic.gauge(lambda page: page.waiting)
    preempted = traffic.grown(lambda page: page.preemptions_total) or 0.0
    if not (preempted or (waiting and min(waiting) > 0)):
        return None
    queue = f"{waiting[-1]:.0f} requests wait" if waiting else "requests wait"
    return Finding(
        summary=f"The KV cache has been full for {traffic.seconds:.0f} s: {queue} and {preempted:.0f} were preempted",
        evidence=(
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:kv_cache_usage_perc",
                f"KV cache use {min(usage):.0%} to {max(usage):.0%} over {traffic.seconds:.0f} s, {queue}, {preempted:.0f} preemptions",
            ),
        ),
        subject=Subject(engine=traffic.engine),
        since=traffic.since,
    )


def _logged(log: EngineLog, limits: Limits) -> Finding | None:
    lines = log.having("stats")[-12:]
    full = 0
    for event in reversed(lines):
        ratio, waiting = event.facts.get("kv_cache_usage_ratio", 0), event.facts.get("waiting", 0)
        if float(ratio) < limits.usage_ratio or not int(waiting):
            break
        full += 1
    preempted = [int(e.facts["preemptions"]) for e in lines[-full:] if "preemptions" in e.facts] if full else []
    if log.stopped:
        return None
    if full < limits.lines_min:
        # V0 prints each fiftieth preemption; where statistics lines after it show room again, it was a short peak.
        evicted = log.having("preemption")
        return _evicted(log, evicted) if evicted and (full or not lines) else None
    last = lines[-1].facts
    words = f", {max(preempted)} preemptions" if preempted else ""
    return Finding(
        summary=f"The KV cache is {float(last['kv_cache_usage_ratio']):.0%} full in the last {full} statistics lines, "
        f"{last['waiting']} requests wait{words}",
        evidence=tuple(Evidence(Source.ENGINE_LOG.value, e.where, e.text) for e in (lines[-full], lines[-1])),
        confidence=Confidence.HIGH if preempted else Confidence.MEDIUM,
        subject=Subject(engine=log.engine),
        since=lines[-full].at,
        facts={"log": log.log},
    )


def _evicted(log: EngineLog, evicted: tuple[EngineEvent, ...]) -> Finding:
    """Take the scheduler's own word that it took the cache from running requests."""
    last = evicted[-1]
    total = max(sum(event.count for event in evicted), int(last.facts.get("total", 0)), int(last.facts.get("count", 0)))
    return Finding(
        summary=f"The scheduler took the KV cache from running requests: {total} preemption{'s' if total != 1 else ''}",
        evidence=(Evidence(Source.ENGINE_LOG.value, last.where, last.text),),
        confidence=Confidence.MEDIUM,
        severity=Severity.NOTICE if total == 1 else None,
        subject=Subject(engine=log.engine),
        since=evicted[0].at,
        facts={"log": log.log},
    )
