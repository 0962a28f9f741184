"""The KV cache is full: requests wait for it or are preempted."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import EngineEvent, EngineMetrics, Source, known
from doctor.symptoms.engine_log import EngineLog, engine_logs


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
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Ask for sustained use and for its victims: waiting requests or preemptions. A cache full of reusable prefixes has none."""
    found = list(_measured(history, limits))
    yield from found
    told = {finding.subject.engine for finding in found}
    for log in engine_logs(history):
        if log.engine not in told and (finding := _logged(log, limits)) is not None:
            yield finding


def _measured(history: History, limits: Limits) -> Iterator[Finding]:
    pages: dict[str, list[EngineMetrics]] = {}
    for snapshot in history.window(limits.window_seconds):
        for page in snapshot.metrics:
            pages.setdefault(page.engine, []).append(page)
    for engine, mine in pages.items():
        usage = [page.kv_cache_usage_ratio for page in mine if known(page.kv_cache_usage_ratio)]
        long_enough = len(usage) > 2 and mine[-1].at - mine[0].at >= 0.8 * limits.window_seconds
        if not long_enough or min(usage) < limits.usage_ratio:
            continue
        waiting = [page.waiting for page in mine if known(page.waiting)]
        first, last = mine[0].preemptions_total, mine[-1].preemptions_total
        preempted = last - first if known(first) and known(last) else 0.0
        if not (preempted > 0 or (waiting and min(waiting) > 0)):
            continue
        seconds = mine[-1].at - mine[0].at
        queue = f"{waiting[-1]:.0f} requests wait" if waiting else "requests wait"
        text = f"KV cache use {min(usage):.0%} to {max(usage):.0%} over {seconds:.0f} s, {queue}, {preempted:.0f} preemptions"
        yield Finding(
            summary=f"The KV cache has been full for {seconds:.0f} s: {queue} and {preempted:.0f} were preempted",
            evidence=(Evidence(Source.ENGINE_METRICS.value, "vllm:kv_cache_usage_perc", text),),
            subject=Subject(engine=engine),
            since=mine[0].at,
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
