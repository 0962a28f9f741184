"""The first requests after a start paid for the warm-up."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Histogram, Source, Why, known
from doctor.symptoms.traffic import Traffic, mean, traffics


class Limits(msgspec.Struct, frozen=True):
    """What is a slow beginning."""

    first_max: float = 3.0
    """Requests that count as the first; guess: what arrives before the first answer."""
    later_min: float = 20.0
    """guess: requests that show what is usual."""
    times: float = 5.0
    """guess: warm-up (kernels compiled, tuned, loaded) takes seconds, a usual first token a fraction of one."""
    seconds: float = 1.0
    """guess: what a user notices; document 4 alarms at half of it."""


@rule(
    "cold-first-request",
    "The first request paid for the warm-up",
    severity=Severity.NOTICE,
    needs=(Source.ENGINE_METRICS,),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare the first requests of an engine that was watched from its first one with those that followed."""
    for traffic in traffics(history, history.keep):
        first = _first(traffic, limits)
        if first is None:
            continue
        if isinstance(first, Absent):
            yield first
            continue
        later = traffic.pages[-1].time_to_first_token_seconds
        if not known(later) or (count := later.counts[-1] - first.counts[-1]) < limits.later_min:
            yield Absent(Why.NOT_ASKED, f"fewer than {limits.later_min:.0f} requests followed the first")
            continue
        cold, usual = mean(first) or 0.0, (later.sum - first.sum) / count
        if cold < limits.seconds or cold < limits.times * usual:
            continue
        yield Finding(
            summary=f"The first {first.counts[-1]:.0f} requests waited {cold:.1f} s for their first token, the {count:.0f} after "
            f"them {usual:.2f} s: send one of your own after each start",
            evidence=(
                Evidence(
                    Source.ENGINE_METRICS.value,
                    "vllm:time_to_first_token_seconds",
                    f"{first.sum:.1f} s for {first.counts[-1]:.0f}, then {later.sum - first.sum:.1f} s for {count:.0f}",
                ),
            ),
            confidence=Confidence.HIGH,
            subject=Subject(engine=traffic.engine),
            since=traffic.since,
        )


def _first(traffic: Traffic, limits: Limits) -> Histogram | Absent | None:
    """Return the histogram of the first requests, from the first page that counts any; None for an engine long warm."""
    pages = [page.time_to_first_token_seconds for page in traffic.pages]
    if not all(known(histogram) for histogram in pages):
        return Absent(Why.NOT_ASKED, "the engine's page has no time to first token")
    first = next((histogram for histogram in pages if known(histogram) and histogram.counts[-1]), None)
    if first is None:
        return Absent(Why.NOT_ASKED, "the engine has served no request yet")
    return first if first.counts[-1] <= limits.first_max else None
