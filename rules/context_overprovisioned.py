"""The engine promises a context many times longer than any request needs, and one such request could take the cache."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, EngineMetrics, Source, Why, known
from doctor.symptoms.traffic import long_enough, quantile_at_most


class Limits(msgspec.Struct, frozen=True):
    """When a promise is too large."""

    times: float = 4.0
    """guess: the promise over about the P99 of requests; document 4 goes from 128K to 32K, a quarter."""
    requests_min: float = 1000.0
    """guess: then ten requests are beyond the P99."""
    cache_share_min: float = 0.5
    """Of the KV cache that one request of the promised length could take. guess: half of it starves all others."""
    window_seconds: float = 60.0
    """guess: three visits show that the counters are the present engine's."""


@rule(
    "context-overprovisioned",
    "The promised context is far longer than the requests",
    severity=Severity.NOTICE,
    needs=(Source.ENGINE_METRICS, Source.PROCESSES),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare the promise with the requests since the engine started, and ask what one request at the promise would cost.

    A long context that is never used costs little by itself: the cache is handed out in blocks. So the rule speaks only
    where one request at the promise could take half of the cache from all others.
    """
    engines = {engine.id: engine for engine in history.latest.engines}
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        page, engine = traffic.pages[-1], engines.get(traffic.engine)
        promised = _promised(engine) if engine is not None else None
        longest = _longest(page, limits)
        if isinstance(longest, Absent):
            yield longest
        elif engine is None or promised is None or not known(page.kv_cache_tokens):
            yield Absent(Why.NOT_ASKED, "the promised context or the size of the KV cache was not seen")
        elif promised >= limits.times * longest and promised >= limits.cache_share_min * page.kv_cache_tokens:
            yield Finding(
                summary=f"Engine {engine.pid} promises {promised} tokens of context, 99 % of its requests need at most {longest:.0f}: "
                f"one request at the promise would take {promised / page.kv_cache_tokens:.0%} of the KV cache",
                evidence=(
                    Evidence(
                        Source.ENGINE_METRICS.value,
                        "vllm:request_prompt_tokens, vllm:request_generation_tokens",
                        f"P99 of prompt and answer together at most {longest:.0f} tokens",
                    ),
                    Evidence(Source.PROCESSES.value, "--max-model-len", str(promised)),
                    Evidence(
                        Source.ENGINE_METRICS.value, "vllm:cache_config_info", f"{page.kv_cache_tokens:.0f} tokens"
                    ),
                ),
                confidence=Confidence.MEDIUM,
                subject=Subject(engine=engine.id),
                facts={"max-model-len": str(round(longest))},
            )


def _promised(engine: Engine) -> int | None:
    for length in (engine.flags.max_model_len, engine.model.max_position_embeddings):
        if known(length) and length > 0:
            return length
    return None


def _longest(page: EngineMetrics, limits: Limits) -> float | Absent:
    """Return about the P99 of prompt and answer together: the sum of both, which is never less."""
    longest = 0.0
    for histogram in (page.request_prompt_tokens, page.request_generation_tokens):
        if not known(histogram):
            return histogram
        if histogram.counts[-1] < limits.requests_min:
            return Absent(
                Why.NOT_ASKED,
                f"{histogram.counts[-1]:.0f} requests are fewer than the {limits.requests_min:.0f} that a P99 needs",
            )
        longest += quantile_at_most(histogram, 0.99) or float("inf")
    return longest
