"""A token takes more than twice as long as this model should need on this machine at this load."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.machine.step import loaded_token_seconds
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, or_none
from doctor.symptoms.engine_groups import rank_groups
from doctor.symptoms.links import pairs_among
from doctor.symptoms.served import Served, port_of, served_by
from doctor.symptoms.traffic import Load, Traffic, load_of, long_enough, mean
from rules.tables.products import product_of

BEYOND_ARITHMETIC = (
    "--enable-lora",
    "--cpu-offload-gb",
    "--speculative-config",
    "--speculative-model",
    "-sc",
    "--kv-transfer-config",
    "--enable-dbo",
)
"""Flags whose cost, or gain, the arithmetic does not know."""


class Limits(msgspec.Struct, frozen=True):
    """When slow is slow."""

    window_seconds: float = 600.0
    least_seconds: float = 300.0
    """guess: five minutes hold the ups and downs of a load."""
    tokens_min: float = 5000.0
    """guess: fewer tokens are too small a load to measure by."""
    slower_ratio: float = 2.0
    """Measured over predicted; predictions are right within about a third (docs/arithmetic.md), so a factor of two."""
    slower_seconds: float = 0.010
    """guess: of a token beyond the prediction; small models are bound by the host, which the arithmetic only guesses."""


@rule(
    "throughput-below-reference",
    "Decoding is slower than this node and model should be",
    severity=Severity.WARNING,
    needs=(Source.NVML, Source.PROCESSES, Source.ENGINE_METRICS, Source.MODEL),
    explains=("ttft-slow", "kv-cache-saturated", "queue-capped"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare the inter-token latency, which a small load does not lower, with the roofline of this node at this batch."""
    for traffic in long_enough(history, limits.window_seconds, limits.least_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        one, load = served_by(history, traffic.engine), load_of(traffic)
        if one is None:
            yield Absent(Why.NOT_ASKED, "whose metrics these are was not seen")
        elif load is None or load.tokens < limits.tokens_min:
            tokens = load.tokens if load else 0
            yield Absent(
                Why.NOT_ASKED, f"{tokens:.0f} tokens in {traffic.seconds:.0f} s are too small a load to measure by"
            )
        elif why := _why_not(history, one):
            yield Absent(Why.NOT_SUPPORTED, why)
        elif isinstance(one.serving, Absent):
            yield one.serving
        else:
            yield from _judged(one, _as_built(history, one, one.serving), traffic, load, limits)


def _why_not(history: History, one: Served) -> str:
    if one.has_argument(*BEYOND_ARITHMETIC):
        return "there is no arithmetic for speculative decoding, adapters, offloading or split prefill"
    mine = set(one.group.gpus) if one.group else set[str]()
    if any(mine & set(group.gpus) for group in rank_groups(history) if group.engine != one.engine.id):
        return "two engines share GPUs"
    return ""


def _as_built(history: History, one: Served, serving: Serving) -> Serving:
    """Return the engine with the NVLinks that its board has, where a pair has none: that is what it should reach."""
    gpu = history.latest.gpu(serving.gpus[0])
    product = product_of(gpu) if gpu is not None else None
    pairs = pairs_among(history.latest, serving.gpus)
    if product is None or not product.has_board_nvlink or all(pair.nvlinks for pair in pairs):
        return serving
    built = tuple(pair if pair.nvlinks else msgspec.structs.replace(pair, nvlinks=product.nvlinks) for pair in pairs)
    custom = or_none(one.engine.flags.disable_custom_all_reduce) is not True
    return msgspec.structs.replace(serving, pairs=built, custom=custom)


def _judged(one: Served, serving: Serving, traffic: Traffic, load: Load, limits: Limits) -> Iterator[Finding | Absent]:
    latencies = traffic.requests(lambda page: page.inter_token_seconds)
    measured = mean(latencies) if latencies else None
    step = serving.decode(load.batch, load.context)
    prompt = serving.prefill(max(1, round(load.computed_tokens)))
    if measured is None:
        yield Absent(Why.NOT_ASKED, "the engine's page has no inter-token latency")
    elif isinstance(step, Absent):
        yield step
    elif isinstance(prompt, Absent):
        yield prompt
    else:
        predicted = loaded_token_seconds(step, prompt, load.generated_tokens)
        if measured < limits.slower_ratio * predicted or measured - predicted < limits.slower_seconds:
            return
        eager = or_none(one.engine.flags.enforce_eager) is True
        why = ": CUDA graphs are off (--enforce-eager)" if eager else ""
        yield Finding(
            summary=f"A token takes {measured * 1e3:.0f} ms at {load.streams:.0f} streams, and {predicted * 1e3:.0f} ms are "
            f"predicted for {len(serving.gpus)} × {serving.card.name}: {load.streams / measured:.0f} tokens a second "
            f"where {load.streams / predicted:.0f} should be{why}",
            evidence=(
                Evidence(
                    Source.ENGINE_METRICS.value,
                    "vllm:inter_token_latency_seconds",
                    f"mean {measured * 1e3:.1f} ms of {load.tokens:.0f} tokens in {traffic.seconds:.0f} s, "
                    f"{load.prompt_tokens:.0f} tokens in and {load.generated_tokens:.0f} out a request",
                ),
                Evidence(
                    Source.MODEL.value,
                    "config.json",
                    f"a step: {step.memory_seconds * 1e3:.1f} ms memory, {step.all_reduce_seconds * 1e3:.1f} ms all-reduce, "
                    f"{step.overhead_seconds * 1e3:.1f} ms overhead; prompts between: {(predicted - step.seconds) * 1e3:.1f} ms a token",
                ),
            ),
            confidence=Confidence.MEDIUM,
            severity=Severity.NOTICE if eager else None,
            subject=Subject(engine=one.engine.id, gpus=serving.gpus),
            facts={"port": port_of(one.engine)},
        )
