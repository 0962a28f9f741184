"""The tensor-parallel size does not divide the model's attention heads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source
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
        if not _is_refusal(cause):
            continue
        heads, size = cause.facts.get("heads"), cause.facts.get("tensor_parallel_size")
        summary = "The tensor-parallel size does not divide the model's attention heads, or another of its dimensions"
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


_ASSERTED = re.compile(r"\bassert .*% (?:self\.)?(?:tp_size|tp_world_size|tensor_model_parallel_world_size)\b")
"""The line of code of an assertion without words, as the models have them (`assert self.total_num_heads % tp_size == 0`)."""


def _is_refusal(cause: EngineEvent) -> bool:
    if cause.signal == "launch-error":
        return cause.facts.get("kind") == "heads-indivisible"
    return cause.signal == "exception" and _ASSERTED.match(str(cause.facts.get("code", ""))) is not None
