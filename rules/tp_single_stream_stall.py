"""A wide tensor-parallel group serves one stream, and half as many ranks would serve it no more slowly."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, Source, Why, known
from doctor.symptoms.decode import Decoding, bytes_read_per_token, context_tokens, decoding, kv_bytes_per_token
from doctor.symptoms.engine_groups import rank_groups
from rules.tables.products import Product, product_of

GIB = 1 << 30


class Limits(msgspec.Struct, frozen=True):
    """When a stream is single, and what a rank could do."""

    window_seconds: float = 600.0
    """guess: a load that was single for ten minutes is the service's load."""
    least_seconds: float = 30.0
    least_tokens: float = 200.0
    """guess: below these a window proves nothing."""
    streams_max: float = 1.5
    """Tokens a step; two streams that come and go stay below 2. guess."""
    runtime_bytes: float = 5.0 * GIB
    """A card's activations, graphs and runtime (combo page: about 5 GB a card at 32K context)."""
    utilization: float = 0.9
    """Of a card's memory, where the command line does not say (vLLM's default before 0.20; 0.92 since)."""
    bandwidth_ratio: float = 0.7
    """Of the data sheet's memory bandwidth that decoding reaches. guess: 60 to 80 % is what decode kernels report."""
    allreduce_seconds: float = 10e-6
    """One small all-reduce among two to eight ranks over NVLink, launch included. guess: 5 to 15 µs."""


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
    models, so a latency that two ranks could not reach even in theory clears the group.
    """
    for group in rank_groups(history):
        engine = next((e for e in history.latest.engines if e.id == group.engine), None)
        if engine is None or group.size < 4:
            continue
        load = decoding(history, engine.id, limits.window_seconds)
        if load is None:
            yield Absent(
                Why.NOT_ASKED, f"the metrics of engine {engine.pid} were not seen twice: its streams can't be counted"
            )
        elif load.tokens and load.streams <= limits.streams_max and load.running_most <= 2 and not load.waiting_most:
            yield from _single(history, engine, group.size, load, limits)


def _single(history: History, engine: Engine, size: int, load: Decoding, limits: Limits) -> Iterator[Finding | Absent]:
    if load.seconds < limits.least_seconds or load.tokens < limits.least_tokens:
        yield Absent(
            Why.NOT_ASKED, f"{load.tokens:.0f} tokens in {load.seconds:.0f} s are too few to judge a single stream by"
        )
        return
    product = next((p for gpu in history.latest.gpus if (p := product_of(gpu)) is not None), None)
    half = size // 2
    fits = _fits(engine, half, product, limits)
    if fits is None:
        yield Absent(
            Why.NOT_ASKED,
            f"whether the model of engine {engine.pid} fits on {half} GPUs can't be told from its configuration",
        )
    elif fits:
        yield from _judged(engine, size, load, product, limits)


def _fits(engine: Engine, ranks: int, product: Product | None, limits: Limits) -> bool | None:
    """Return whether weights, runtime and one request of the longest context fit on so many GPUs; None: can't be told."""
    weights, per_token, context = engine.model.weights_bytes, kv_bytes_per_token(engine), context_tokens(engine)
    if product is None or product.memory_mib is None or not known(weights) or per_token is None or context is None:
        return None
    share = engine.flags.gpu_memory_utilization
    usable = (share if known(share) else limits.utilization) * product.memory_mib * (1 << 20)
    return (weights + per_token * context) / ranks + limits.runtime_bytes <= usable


def _judged(engine: Engine, size: int, load: Decoding, product: Product | None, limits: Limits) -> Iterator[Finding]:
    half, measured = size // 2, load.inter_token_seconds
    read = bytes_read_per_token(engine.model)
    best = predicted = None
    if product is not None and read is not None and known(engine.model.layers):
        best = read / (half * product.memory_bandwidth_bytes_per_second)
        predicted = best / limits.bandwidth_ratio + 2 * engine.model.layers * limits.allreduce_seconds
    if measured is not None and best is not None and measured < best:
        return  # two ranks could not do this even at full memory bandwidth: the width pays
    slower = measured is not None and predicted is not None and measured >= predicted
    took = f"a token takes {measured * 1e3:.1f} ms" if measured is not None else "how long a token takes was not seen"
    would = f"; TP={half} is predicted at {predicted * 1e3:.1f} ms" if predicted is not None else ""
    yield Finding(
        summary=f"TP={size} has served {load.streams:.1f} streams at a time for {load.seconds:.0f} s, {took}{would}, and the "
        f"model fits on {half} GPUs: {size // half} replicas of TP={half} serve one stream each, and more in all",
        evidence=(
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:generation_tokens_total, vllm:iteration_tokens_total_count",
                f"{load.tokens:.0f} tokens in {load.steps:.0f} steps; at most {load.running_most:.0f} requests running",
            ),
            Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(size)),
        ),
        confidence=Confidence.MEDIUM if slower else Confidence.LOW,
        severity=None if slower else Severity.NOTICE,
        subject=Subject(engine=engine.id),
        facts={"tensor-parallel-size": str(half), "replicas": str(size // half)},
    )
