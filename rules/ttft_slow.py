"""One request in twenty waits more than half a second for its first token."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.served import served_by
from doctor.symptoms.traffic import Traffic, load_of, long_enough, mean, quantile_at_most, share_above


class Limits(msgspec.Struct, frozen=True):
    """When the first token is late."""

    seconds: float = 0.5
    """Document 4: P95 above 500 ms."""
    share: float = 0.05
    """Of the requests: beyond the P95."""
    window_seconds: float = 600.0
    least_seconds: float = 300.0
    """guess: five minutes are more than one burst."""
    requests_min: float = 100.0
    """guess: then five requests are beyond the P95, and a cold first one is not among what decides."""


@rule(
    "ttft-slow",
    "The first token comes late",
    severity=Severity.WARNING,
    needs=(Source.ENGINE_METRICS,),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Count the requests of the window that surely took longer, and split their time into queue and prefill."""
    for traffic in long_enough(history, limits.window_seconds, limits.least_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        times = traffic.requests(lambda page: page.time_to_first_token_seconds)
        count = times.counts[-1] if times else 0.0
        if times is None or count < limits.requests_min:
            yield Absent(
                Why.NOT_ASKED,
                f"{count:.0f} requests in {traffic.seconds:.0f} s are fewer than the {limits.requests_min:.0f} that a P95 needs",
            )
            continue
        late = share_above(times, limits.seconds)
        if late <= limits.share:
            continue
        p95 = quantile_at_most(times, 1 - limits.share)
        queued, prefilled = _split(traffic)
        long = _is_the_prompts_length(history, traffic, limits)
        parts = [f"{mean(times) or 0:.2f} s in the mean"]
        parts += [f"{queued:.2f} s of it in the queue"] if queued is not None else []
        parts += [f"{prefilled:.2f} s in prefill"] if prefilled is not None else []
        parts += ["the prompts are so long that these GPUs need it"] if long else []
        yield Finding(
            summary=f"{late:.0%} of {count:.0f} requests waited more than {limits.seconds:g} s for their first token: {', '.join(parts)}",
            evidence=(
                Evidence(
                    Source.ENGINE_METRICS.value,
                    "vllm:time_to_first_token_seconds",
                    f"P95 {f'at most {p95:g} s' if p95 is not None else 'beyond the last bound'}, {count:.0f} requests in {traffic.seconds:.0f} s",
                ),
            ),
            confidence=Confidence.HIGH,
            severity=Severity.NOTICE if long else None,
            subject=Subject(engine=traffic.engine),
            facts={"larger-part": "queue" if (queued or 0) >= (prefilled or 0) else "prefill"},
        )


def _split(traffic: Traffic) -> tuple[float | None, float | None]:
    """Return the mean time in the queue and in prefill, where the engine tells."""
    queue = traffic.requests(lambda page: page.queue_seconds)
    prefill = traffic.requests(lambda page: page.prefill_seconds)
    return (mean(queue) if queue else None), (mean(prefill) if prefill else None)


def _is_the_prompts_length(history: History, traffic: Traffic, limits: Limits) -> bool:
    """Whether the mean prompt alone is predicted to take the allowed time, by the arithmetic where it knows the model."""
    one, load = served_by(history, traffic.engine), load_of(traffic)
    if one is None or load is None or isinstance(one.serving, Absent):
        return False
    step = one.serving.prefill(max(1, round(load.computed_tokens)))
    return known(step) and step.seconds >= limits.seconds
