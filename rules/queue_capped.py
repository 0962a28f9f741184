"""Requests wait while the KV cache is nearly free: a cap of the scheduler is the limit, not the memory."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, Source, known, or_none
from doctor.symptoms.traffic import Traffic, load_of, long_enough


class Limits(msgspec.Struct, frozen=True):
    """When a queue is a cap's."""

    window_seconds: float = 120.0
    """guess: a burst is over by then."""
    kv_usage_max: float = 0.5
    """guess: nearly free; document 4 calls the cache full at 0.85."""
    pages_ratio: float = 0.8
    """Of the pages must show the queue: the gauges are read on the server's own loop and may read 0 under load."""
    cap_ratio: float = 0.95
    """Running over the cap: requests come and go between two steps. guess."""


DEFAULT_CAPS = (256, 1024)
"""vLLM's `--max-num-seqs` where none is given: 256, and 1024 on GPUs of 70 GiB or more from 0.8.5 on."""


@rule(
    "queue-capped",
    "Requests wait although the KV cache is nearly free",
    severity=Severity.WARNING,
    needs=(Source.ENGINE_METRICS,),
    explains=("ttft-slow",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Ask for a queue that stays, a cache that is nearly free, and a cap that is reached: sequences, or tokens a step."""
    engines = {engine.id: engine for engine in history.latest.engines}
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        waiting = traffic.gauge(lambda page: page.waiting)
        usage = traffic.gauge(lambda page: page.kv_cache_usage_ratio)
        if not waiting or not usage or max(usage) > limits.kv_usage_max or _share(waiting, 1.0) < limits.pages_ratio:
            continue
        reached = _reached(traffic, engines.get(traffic.engine), limits)
        if reached is None:
            continue
        flag, value, words = reached
        yield Finding(
            summary=f"{min(w for w in waiting if w):.0f} to {max(waiting):.0f} requests have waited for {traffic.seconds:.0f} s "
            f"with the KV cache at most {max(usage):.0%} full: {words}",
            evidence=(
                Evidence(
                    Source.ENGINE_METRICS.value,
                    "vllm:num_requests_waiting, vllm:kv_cache_usage_perc",
                    f"waiting {waiting[0]:.0f} to {waiting[-1]:.0f}, KV cache use {min(usage):.0%} to {max(usage):.0%}",
                ),
                Evidence(Source.ENGINE_METRICS.value, flag, words),
            ),
            confidence=Confidence.MEDIUM,
            subject=Subject(engine=traffic.engine),
            since=traffic.since,
            facts={"flag": flag, "value": str(value)},
        )


def _share(values: tuple[float, ...], least: float) -> float:
    return sum(1 for value in values if value >= least) / len(values)


def _reached(traffic: Traffic, engine: Engine | None, limits: Limits) -> tuple[str, int, str] | None:
    """Return the cap that is reached: its flag, its value and what shows it."""
    running = traffic.gauge(lambda page: page.running)
    flags = engine.flags if engine is not None else None
    replicas = (or_none(flags.data_parallel_size) if flags else None) or 1
    given = flags.max_num_seqs if flags else None
    caps = (given,) if given is not None and known(given) else DEFAULT_CAPS
    for cap in caps:
        at_cap = running and max(running) <= cap * replicas
        if at_cap and _share(running, limits.cap_ratio * cap * replicas) >= limits.pages_ratio:
            return "--max-num-seqs", cap, f"{max(running):.0f} requests run, and the cap is {cap * replicas}"
    budget = flags.max_num_batched_tokens if flags else None
    load = load_of(traffic)
    if budget is not None and known(budget) and load is not None:
        tokens = load.streams * (1 + load.computed_tokens / load.generated_tokens)
        if tokens >= limits.cap_ratio * budget:
            return "--max-num-batched-tokens", budget, f"a step takes {tokens:.0f} tokens, and the budget is {budget}"
    return None
