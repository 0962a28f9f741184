"""A wide tensor-parallel group serves one stream, and half as many ranks would serve it no more slowly."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.card import Card, card_of
from doctor.machine.fabric import fabric_between
from doctor.machine.fit import UTILIZATION, room, why_tp_impossible
from doctor.machine.step import decode_step
from doctor.machine.weights import HALF_BYTES, Model, kv_element_bytes, model_of, read_bytes_per_gpu
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, Source, Why, known, or_none
from doctor.symptoms.decoding import Decoding, decoding, lifetime
from doctor.symptoms.engine_groups import RankGroup, rank_groups


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


class Stream(msgspec.Struct, frozen=True):
    """A single stream over a group that half of its ranks could hold."""

    engine: Engine
    group: RankGroup
    load: Decoding
    model: Model
    card: Card


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
    for group in rank_groups(history):
        engine = next((e for e in history.latest.engines if e.id == group.engine), None)
        if engine is None or group.size < 4:
            continue
        load = _load(history, engine, limits)
        if load is None:
            yield _unknown(f"the metrics of engine {engine.pid} were not seen: its streams can't be counted")
        elif load.tokens and load.streams <= limits.streams_max and load.running_most <= 2 and not load.waiting_most:
            yield from _single(history, engine, group, load, limits)


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


def _single(
    history: History, engine: Engine, group: RankGroup, load: Decoding, limits: Limits
) -> Iterator[Finding | Absent]:
    gpu = next((gpu for gpu in history.latest.gpus if gpu.uuid in group.gpus), None)
    card = card_of(gpu) if gpu else _unknown("the engine's GPUs were not seen")
    model = model_of(engine.model, or_none(engine.flags.quantization))
    if not _is_enough(load, limits):
        yield _unknown(f"{load.tokens:.0f} tokens in {load.seconds:.0f} s are too few to judge a single stream by")
    elif not known(card):
        yield card
    elif not known(model):
        yield model
    elif _fits(engine, model, card, group.size // 2):
        yield from _judged(history, Stream(engine, group, load, model, card), limits)


def _fits(engine: Engine, model: Model, card: Card, ranks: int) -> bool:
    """Return whether so many GPUs can share the model and hold one request of its longest context."""
    flags = engine.flags
    share = flags.gpu_memory_utilization
    asked = (flags.max_model_len, engine.model.max_position_embeddings)
    element = kv_element_bytes(or_none(flags.kv_cache_dtype))
    left = room(
        model,
        card,
        ranks,
        utilization=share if known(share) else UTILIZATION,
        kv_element_bytes=element if known(element) else HALF_BYTES,
    )
    return not why_tp_impossible(model, ranks) and left.holds(next((n for n in asked if known(n)), 1))


def _judged(history: History, stream: Stream, limits: Limits) -> Iterator[Finding]:
    engine, group, load = stream.engine, stream.group, stream.load
    half, measured = group.size // 2, load.inter_token_seconds
    ideal = read_bytes_per_gpu(stream.model, half, 1) / stream.card.memory_bytes_per_second
    if measured is not None and measured < ideal:
        return  # half of the ranks could not do this even at full memory bandwidth: the width pays
    predicted = _predicted(history, group.gpus[:half], stream.model, stream.card)
    slower = measured is not None and predicted is not None and measured >= limits.slower_ratio * predicted
    took = f"a token takes {measured * 1e3:.1f} ms" if measured is not None else "how long a token takes was not seen"
    would = f"; TP={half} is predicted at {predicted * 1e3:.1f} ms" if predicted is not None else ""
    yield Finding(
        summary=f"TP={group.size} has served {load.streams:.1f} streams at a time for {load.seconds:.0f} s, {took}{would}, "
        f"and the model fits on {half} GPUs: two replicas of TP={half} serve one stream each",
        evidence=(
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:generation_tokens_total, vllm:iteration_tokens_total_count",
                f"{load.tokens:.0f} tokens in {load.steps:.0f} steps; at most {load.running_most:.0f} requests running",
            ),
            Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(group.size)),
        ),
        confidence=Confidence.MEDIUM if slower else Confidence.LOW,
        severity=None if slower else Severity.NOTICE,
        subject=Subject(engine=engine.id),
        facts={"tensor-parallel-size": str(half), "replicas": "2"}
        | ({"port": str(engine.flags.port)} if known(engine.flags.port) else {}),
    )


def _predicted(history: History, gpus: tuple[str, ...], model: Model, card: Card) -> float | None:
    """Return the inter-token latency of one stream over these GPUs, seconds; None where their links were not seen."""
    fabric = fabric_between(card, history.latest.pairs, gpus)
    return decode_step(model, card, fabric, len(gpus)).seconds if known(fabric) else None
