"""Speculative decoding drafts tokens that are mostly refused: even for free it could not give what it is for."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.traffic import long_enough


class Limits(msgspec.Struct, frozen=True):
    """When a draft is not worth its cost."""

    gain_min: float = 0.30
    """More tokens a step, at the most: document 4 expects 30 to 50 % of a draft model, document 1 80 % of an MTP head."""
    drafted_min: float = 10_000.0
    """guess: of so many drafts a rate is no accident."""
    window_seconds: float = 600.0
    least_seconds: float = 300.0
    """guess: acceptance changes with what is asked; five minutes are a mixture."""


@rule(
    "speculation-ineffective",
    "Speculative decoding gains too little",
    severity=Severity.NOTICE,
    needs=(Source.ENGINE_METRICS,),
    explains=("throughput-below-reference",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Take the upper bound of the gain: of N tokens, A accepted ones needed no step of their own, so it is N / (N - A)."""
    asked = {e.id for e in history.latest.engines if known(e.flags.speculative) and e.flags.speculative}
    for traffic in long_enough(history, limits.window_seconds, limits.least_seconds):
        if isinstance(traffic, Absent):
            if any(known(page.draft_tokens_total) for page in history.latest.metrics) or asked:
                yield traffic
            continue
        drafted = traffic.grown(lambda page: page.draft_tokens_total)
        accepted = traffic.grown(lambda page: page.accepted_tokens_total)
        tokens = traffic.grown(lambda page: page.generation_tokens_total)
        if drafted is None or accepted is None or tokens is None:
            if traffic.engine in asked:
                yield Absent(Why.NOT_ASKED, "the engine speculates, and its page has no acceptance counters")
        elif drafted < limits.drafted_min:
            if drafted or traffic.engine in asked:
                yield Absent(Why.NOT_ASKED, f"{drafted:.0f} drafted tokens are too few to judge by")
        elif accepted < tokens and (gain := tokens / (tokens - accepted) - 1) < limits.gain_min:
            yield Finding(
                summary=f"{accepted / drafted:.0%} of {drafted:.0f} drafted tokens were accepted in {traffic.seconds:.0f} s: "
                f"at most {gain:.0%} more tokens a step, before the cost of drafting",
                evidence=(
                    Evidence(
                        Source.ENGINE_METRICS.value,
                        "vllm:spec_decode_num_draft_tokens_total, vllm:spec_decode_num_accepted_tokens_total",
                        f"{drafted:.0f} drafted, {accepted:.0f} accepted, {tokens:.0f} tokens generated",
                    ),
                ),
                confidence=Confidence.MEDIUM,
                subject=Subject(engine=traffic.engine),
            )
