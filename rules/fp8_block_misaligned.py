"""A shard of the model is not a whole number of quantization blocks."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_log import incidents


@rule(
    "fp8-block-misaligned",
    "A shard is not a whole number of quantization blocks",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's refusal, with the shard's width and the block's."""
    for log, incident in incidents(history):
        cause = incident.cause
        if cause.signal != "launch-error" or cause.facts.get("kind") not in ("fp8-block", "quantization-group"):
            continue
        size, block = cause.facts.get("size"), cause.facts.get("block")
        tensor_parallel = log.fact("tensor_parallel_size")
        under = f" at tensor-parallel size {tensor_parallel}" if tensor_parallel else ""
        word = "block" if cause.facts.get("kind") == "fp8-block" else "group"
        width = f" of width {size}" if size else ""
        multiple = f" of {block}" if block else ""
        yield Finding(
            summary=f"A shard{width}{under} is not a multiple of the quantization {word}{multiple}: the weights can't be split so",
            evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
            confidence=Confidence.HIGH,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )
