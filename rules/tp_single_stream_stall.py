"""A wide tensor-parallel group serves one stream, and half as many ranks would serve it no more slowly."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.machine.weights import read_bytes_per_gpu
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, Source, Why, known
from doctor.symptoms.decoding import Decoding, decoding, lifetime
from doctor.symptoms.served import port_of, served


class Limits(msgspec.Struct, frozen=True):
    """When a stream is single, and how much slower than predicted is slow."""

    window_seconds: float = 600.0
    """guess: a load that was single for ten minutes is the service's load."""
    least_seconds: float = 30.0
    least_tokens: float = 200.0
    """guess: below these a window proves nothing."""
    streams_max: float = 1.5
    """Tokens a step; two streams that come and go stay below 2. guess."""
    slower_ratio: float = 1.33
    """Measured over what half of the ranks are predicted to need. The prediction is right within about a third."""


@rule(
    "tp-single-stream-stall",
    "One stream is spread over more ranks than make it faster",
    severity=Severity.WARNING,
    needs=(Source.NVML, Source.PROCESSES, Source.ENGINE_METRICS),
    explains=("throughput-below-reference",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Ask of each group of four ranks or more: is the stream single, does half fit, what would half reach.

    The documents say that TP=4 is always slower for one stream than TP=2. Memory bandwidth says otherwise for large
    models, so a latency that half of the ranks could not reach even in theory clears the group.
    """
    for one in served(history):
        if one.group is None or one.group.size < 4:
            continue
        load = _load(history, one.engine, limits)
        if load is None:
            yield _unknown(f"the metrics of engine {one.engine.pid} were not seen: its streams can't be counted")
        elif not load.tokens or load.streams > limits.streams_max or load.running_most > 2 or load.waiting_most:
            continue
        elif not _is_enough(load, limits):
            yield _unknown(f"{load.tokens:.0f} tokens in {load.seconds:.0f} s are too few to judge a single stream by")
        elif isinstance(one.serving, Absent):
            yield one.serving
        elif _fits_on_half(one.serving):
            yield from _judged(one.engine, one.serving, load, limits)


def _unknown(why: str) -> Absent:
    return Absent(Why.NOT_ASKED, why)


def _load(history: History, engine: Engine, limits: Limits) -> Decoding | None:
    """Return what the engine did over the window; where that is too short, and was single, over its life."""
    recent = decoding(history, engine.id, limits.window_seconds)
    if recent is not None and (_is_enough(recent, limits) or not recent.tokens or recent.streams > limits.streams_max):
        return recent
    return lifetime(history, engine)


def _is_enough(load: Decoding, limits: Limits) -> bool:
    return load.seconds >= limits.least_seconds and load.tokens >= limits.least_tokens


def _fits_on_half(serving: Serving) -> bool:
    """Return whether half of the GPUs can share the model and hold one request of its longest context."""
    half = len(serving.gpus) // 2
    return not serving.obstacles(half) and serving.room(half).holds(serving.context or 1)


def _judged(engine: Engine, serving: Serving, load: Decoding, limits: Limits) -> Iterator[Finding]:
    ranks, half, measured = len(serving.gpus), len(serving.gpus) // 2, load.inter_token_seconds
    ideal = read_bytes_per_gpu(serving.model, half, 1) / serving.card.memory_bytes_per_second
    if measured is not None and measured < ideal:
        return  # half of the ranks could not do this even at full memory bandwidth: the width pays
    wide, narrow = serving.decode(), serving.decode(tp=half)
    slower = measured is not None and known(narrow) and measured >= limits.slower_ratio * narrow.seconds
    took = f"a token takes {measured * 1e3:.1f} ms" if measured is not None else "how long a token takes was not seen"
    would = (
        f" (predicted: {wide.seconds * 1e3:.1f} ms, and {narrow.seconds * 1e3:.1f} ms on TP={half})"
        if known(wide) and known(narrow)
        else ""
    )
    yield Finding(
        summary=f"TP={ranks} has served {load.streams:.1f} streams at a time for {load.seconds:.0f} s, {took}{would}, "
        f"and the model fits on {half} GPUs: two replicas of TP={half} serve one stream each",
        evidence=(
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:generation_tokens_total, vllm:iteration_tokens_total_count",
                f"{load.tokens:.0f} tokens in {load.steps:.0f} steps; at most {load.running_most:.0f} requests running",
            ),
            Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(ranks)),
        ),
        confidence=Confidence.MEDIUM if slower else Confidence.LOW,
        severity=None if slower else Severity.NOTICE,
        subject=Subject(engine=engine.id),
        facts={"tensor-parallel-size": str(half), "replicas": "2", "port": port_of(engine)},
    )
