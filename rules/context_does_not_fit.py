"""The KV cache that is left beside the weights can't hold one request of the longest context."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_log import incidents

GIB = 1 << 30


@rule(
    "context-does-not-fit",
    "The KV cache is too small for one request of the longest context",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's own word: it refuses to start, with both numbers."""
    for log, incident in incidents(history):
        cause = incident.cause
        if cause.signal not in ("kv-cache-too-small", "no-kv-blocks"):
            continue
        facts = {"log": log.log}
        if "estimated_max_model_len" in cause.facts:
            facts["max-model-len"] = str(cause.facts["estimated_max_model_len"])
        yield Finding(
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
