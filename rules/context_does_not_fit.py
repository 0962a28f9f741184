"""The KV cache that is left beside the weights can't hold one request of the longest context."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.engine_log import EngineLog, Incident, incidents
from doctor.symptoms.served import BEYOND_ROOM, Served, unexplained

GIB = 1 << 30


@rule(
    "context-does-not-fit",
    "The KV cache is too small for one request of the longest context",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Take the engine's own word: it refuses to start, with both numbers. Before it does, compute them."""
    for log, incident in incidents(history):
        if incident.cause.signal in ("kv-cache-too-small", "no-kv-blocks"):
            yield _refused(log, incident)
    for one in unexplained(history):
        yield from _predicted(one)


def _refused(log: EngineLog, incident: Incident) -> Finding:
    cause = incident.cause
    facts = {"log": log.log}
    if "estimated_max_model_len" in cause.facts:
        facts["max-model-len"] = str(cause.facts["estimated_max_model_len"])
    return Finding(
        summary=_what(cause.facts, none_at_all=cause.signal == "no-kv-blocks"),
        evidence=(
            Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),
            *(Evidence(Source.ENGINE_LOG.value, e.where, e.text) for e in log.having("kv-cache-memory")[:1]),
        ),
        confidence=Confidence.HIGH,
        subject=Subject(engine=log.engine),
        since=incident.at,
        facts=facts,
    )


def _predicted(one: Served) -> Iterator[Finding | Absent]:
    serving = one.serving
    if one.has_argument("--max-model-len") and not known(one.engine.flags.max_model_len):
        return  # `auto`: the engine takes what fits
    if one.has_argument(*BEYOND_ROOM) or known(one.engine.model.sliding_window):
        yield Absent(
            Why.NOT_SUPPORTED, "there is no arithmetic for what its flags or its sliding window do to the KV cache"
        )
        return
    if isinstance(serving, Absent):
        yield serving
        return
    room, context = serving.room(), serving.context
    if context is None:
        yield Absent(Why.NOT_ASKED, "neither a flag nor config.json tells the longest context")
    elif room.kv_bytes_at_most <= 0 or serving.obstacles() or room.holds(context):
        return  # either nothing fits, which other rules say, or this does
    elif room.may_hold(context):
        yield Absent(
            Why.NOT_ASKED,
            f"one request of {context} tokens is too close to tell: {room.kv_tokens} are expected to fit, {room.kv_tokens_at_most} "
            "at best",
        )
    else:
        yield _too_long(one, serving, context)


def _too_long(one: Served, serving: Serving, context: int) -> Finding:
    room = serving.room()
    needed, most = context * room.kv_bytes_per_token, room.kv_bytes_beside_weights
    given = known(one.engine.flags.max_model_len)
    fits = max(room.kv_tokens, room.kv_tokens_at_most // 2) // 1024 * 1024
    return Finding(
        summary=f"One request of {context} tokens needs {needed / GIB:.1f} GiB of KV cache a GPU, and {room.budget_bytes / GIB:.1f} GiB "
        f"less {room.weight_bytes / GIB:.1f} GiB of weights leave {room.kv_bytes_at_most / GIB:.1f} GiB at best: "
        "the engine will not start (computed from config.json)",
        evidence=(
            Evidence(
                Source.MODEL.value,
                f"{one.config}: num_hidden_layers, num_key_value_heads, head_dim",
                f"{room.kv_bytes_per_token:.0f} bytes of KV cache a token and GPU at TP={len(serving.gpus)}",
            ),
            Evidence(Source.PROCESSES.value, "--max-model-len", str(context))
            if given
            else Evidence(Source.MODEL.value, f"{one.config}: max_position_embeddings", str(context)),
            Evidence(
                Source.NVML.value,
                "memory, PCI device id",
                f"{serving.card.name}, {serving.utilization:g} of {serving.card.memory_bytes / GIB:.1f} GiB",
            ),
            *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in one.last_words),
        ),
        confidence=Confidence.MEDIUM if needed > most else Confidence.LOW,
        subject=Subject(engine=one.name, gpus=serving.gpus),
        facts={"max-model-len": str(fits)} if fits else {},
    )


def _what(facts: dict[str, int | float | str], *, none_at_all: bool) -> str:
    if "needed_bytes" in facts and "available_bytes" in facts:
        needed, available = float(facts["needed_bytes"]) / GIB, float(facts["available_bytes"]) / GIB
        fits = (
            f"; about {facts['estimated_max_model_len']} tokens would fit" if "estimated_max_model_len" in facts else ""
        )
        return (
            f"One request of {facts['max_model_len']} tokens needs {needed:.2f} GiB of KV cache and {available:.2f} GiB "
            f"are left beside the weights{fits}"
        )
    if "tokens" in facts:
        return f"The KV cache holds {facts['tokens']} tokens, one request may be {facts['max_model_len']} long"
    if "max_model_len" in facts:
        return f"The KV cache can't hold one request of {facts['max_model_len']} tokens"
    if none_at_all:
        return "Weights and activations leave no memory for any KV cache block"
    return "The KV cache that is left can't hold one request of the longest context"
