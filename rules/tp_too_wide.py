"""A chat load is spread over eight ranks, and two replicas of four would make more tokens of the same GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.served import Served, served, served_by
from doctor.symptoms.traffic import Load, Traffic, load_of, long_enough, quantile_at_most


class Limits(msgspec.Struct, frozen=True):
    """What is wide, what is a chat load, and what gain is worth a word."""

    ranks_min: int = 8
    """Document 3 compares 4 with 8."""
    context_max: int = 32768
    """Document 3: a chat product at 32K context; 128K contexts need the width."""
    requests_min: float = 1000.0
    """guess: of so many requests ten are beyond the P99, which stands for the context where no flag limits it."""
    window_seconds: float = 600.0
    """guess: ten minutes of load are the service's load."""
    streams_min: float = 8.0
    """guess: below, latency is what the width was bought for (tp-single-stream-stall looks at one stream)."""
    gain_min: float = 1.2
    """Predicted tokens a second of two halves over the whole, each at the load of a replica; document 3: 300/200.
    guess: less than a fifth is not worth the change."""
    kv_share_max: float = 0.85
    """Of the halves' KV cache that today's use may take: document 4's threshold."""


@rule(
    "tp-too-wide",
    "A chat load is spread over more ranks than it needs",
    severity=Severity.NOTICE,
    needs=(Source.NVML, Source.PROCESSES, Source.ENGINE_METRICS, Source.MODEL),
    explains=("allreduce-dominant",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare one replica with two of half the width, where the context and the KV cache in use allow them."""
    if not any(one.group is not None and one.group.size >= limits.ranks_min for one in served(history)):
        return
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        one = served_by(history, traffic.engine)
        if one is None or one.group is None or one.group.size < limits.ranks_min:
            continue
        load, context = load_of(traffic), _context(one, traffic, limits)
        if load is None or load.streams < limits.streams_min or (context is not None and context > limits.context_max):
            continue
        if context is None:
            yield Absent(Why.NOT_ASKED, "how long the engine's requests are is told by no flag and by too few requests")
        elif isinstance(one.serving, Absent):
            yield one.serving
        elif (used := _tokens_in_use(one.serving, traffic)) is None:
            yield Absent(Why.NOT_ASKED, "how full the engine's KV cache is was not seen")
        elif _halves_hold(one.serving, context, used, limits):
            yield from _compared(one.serving, traffic, load, (context, used), limits)


def _context(one: Served, traffic: Traffic, limits: Limits) -> int | None:
    """Return the longest request: by the flag, else about the P99 of those since the engine started."""
    if known(one.engine.flags.max_model_len) and one.engine.flags.max_model_len > 0:
        return one.engine.flags.max_model_len
    page = traffic.pages[-1]
    longest = 0.0
    for histogram in (page.request_prompt_tokens, page.request_generation_tokens):
        if not known(histogram) or histogram.counts[-1] < limits.requests_min:
            return None
        longest += quantile_at_most(histogram, 0.99) or float(limits.context_max + 1)
    return round(longest)


def _tokens_in_use(serving: Serving, traffic: Traffic) -> float | None:
    used = max(traffic.gauge(lambda page: page.kv_cache_usage_ratio), default=None)
    if used is None:
        return None
    capacity = traffic.pages[-1].kv_cache_tokens
    return used * (capacity if known(capacity) else serving.room().kv_tokens)


def _halves_hold(serving: Serving, context: int, used: float, limits: Limits) -> bool:
    """Whether two groups of half the width hold the longest request each, and together what is in use today."""
    half = len(serving.gpus) // 2
    room = serving.room(half)
    return not serving.obstacles(half) and room.holds(context) and used <= limits.kv_share_max * 2 * room.kv_tokens


def _compared(
    serving: Serving, traffic: Traffic, load: Load, tokens: tuple[int, float], limits: Limits
) -> Iterator[Finding | Absent]:
    """Yield the gain; *tokens*: the longest request, and what the KV cache holds at most."""
    context, used = tokens
    ranks = len(serving.gpus)
    half = ranks // 2
    wide, narrow = serving.decode(load.batch, load.context), serving.decode(load.batch, load.context, half)
    if isinstance(wide, Absent) or isinstance(narrow, Absent):
        yield Absent(Why.NOT_ASKED, "how the engine's GPUs are linked was not seen")
        return
    gain = 2 * narrow.tokens_per_second / wide.tokens_per_second
    if gain < limits.gain_min:
        return
    yield Finding(
        summary=f"TP={ranks} serves requests of at most {context} tokens that fit TP={half}: at {load.batch} streams a replica, "
        f"two replicas of TP={half} are predicted to make {2 * narrow.tokens_per_second:.0f} tokens a second where one of "
        f"TP={ranks} makes {wide.tokens_per_second:.0f} ({gain:.2f} times), at {narrow.seconds * 1e3:.0f} ms a token instead of "
        f"{wide.seconds * 1e3:.0f}",
        evidence=(
            Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(ranks)),
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:generation_tokens_total, vllm:kv_cache_usage_perc",
                f"{load.streams:.1f} tokens a step over {traffic.seconds:.0f} s; at most {used:.0f} tokens of KV cache in use, "
                f"and each half holds {serving.room(half).kv_tokens}",
            ),
        ),
        confidence=Confidence.LOW,
        subject=Subject(engine=traffic.engine, gpus=serving.gpus),
        facts={"tensor-parallel-size": str(half), "replicas": "2"},
    )
