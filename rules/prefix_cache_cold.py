"""Prompts that used to be found in the prefix cache no longer are."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.traffic import long_enough


class Limits(msgspec.Struct, frozen=True):
    """When a cache has gone cold."""

    warm_ratio: float = 0.7
    """Document 1: prompts with a stable beginning are found to more than 70 %."""
    cold_ratio: float = 0.35
    """guess: half of it is far below."""
    tokens_min: float = 100_000.0
    """Asked of the cache, within the window and before it. guess: a hundred prompts of a thousand tokens."""
    window_seconds: float = 600.0
    least_seconds: float = 300.0
    """guess: five minutes are more than one odd batch."""


@rule(
    "prefix-cache-cold",
    "The prefix cache no longer finds the prompts",
    severity=Severity.NOTICE,
    needs=(Source.ENGINE_METRICS,),
    explains=("ttft-slow",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare the window with the engine's life before it.

    No counter tells whether prompts share a beginning. That they were found before is the proof that they can be.
    """
    for traffic in long_enough(history, limits.window_seconds, limits.least_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        first = traffic.pages[0]
        asked_before, found_before = first.prefix_cache_queries_total, first.prefix_cache_hits_total
        asked = traffic.grown(lambda page: page.prefix_cache_queries_total)
        found = traffic.grown(lambda page: page.prefix_cache_hits_total)
        if asked is None or found is None or not (known(asked_before) and known(found_before)):
            yield Absent(Why.NOT_ASKED, "the engine's page has no prefix cache counters")
        elif min(asked, asked_before) < limits.tokens_min:
            yield Absent(
                Why.NOT_ASKED,
                f"{asked:.0f} tokens asked of the prefix cache now and {asked_before:.0f} before are too few to compare",
            )
        elif found_before / asked_before >= limits.warm_ratio and found / asked < limits.cold_ratio:
            yield Finding(
                summary=f"The prefix cache found {found / asked:.0%} of the prompt tokens in the last {traffic.seconds:.0f} s, "
                f"and {found_before / asked_before:.0%} before",
                evidence=(
                    Evidence(
                        Source.ENGINE_METRICS.value,
                        "vllm:prefix_cache_hits_total, vllm:prefix_cache_queries_total",
                        f"{found:.0f} of {asked:.0f} tokens; before: {found_before:.0f} of {asked_before:.0f}",
                    ),
                ),
                confidence=Confidence.MEDIUM,
                subject=Subject(engine=traffic.engine),
                since=traffic.since,
            )
