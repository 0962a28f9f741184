"""The tensor-parallel size does not divide the model's attention heads."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_log import incidents


@rule(
    "tp-heads-indivisible",
    "The tensor-parallel size does not divide the attention heads",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's refusal, and name the sizes that divide."""
    for log, incident in incidents(history):
        cause = incident.cause
        if cause.signal != "launch-error" or cause.facts.get("kind") != "heads-indivisible":
            continue
        heads, size = cause.facts.get("heads"), cause.facts.get("tensor_parallel_size")
        summary = "The tensor-parallel size does not divide the model's attention heads"
        if isinstance(heads, int) and isinstance(size, int) and heads > 0:
            fits = [n for n in range(1, 17) if heads % n == 0]
            summary = f"{heads} attention heads can't be split over {size} GPUs; {', '.join(map(str, fits))} would do"
        yield Finding(
            summary=summary,
            evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
            confidence=Confidence.HIGH,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )
