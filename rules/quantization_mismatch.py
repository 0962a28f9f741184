"""The checkpoint's quantization is not what the flag says, or not what this GPU or engine can run."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_log import incidents

WORDS = {
    "quantization-mismatch": "the checkpoint's quantization is not what the command line asks for",
    "quantization-capability": "this quantization needs a newer GPU",
}


@rule(
    "quantization-mismatch",
    "The checkpoint's quantization does not fit the flag, the GPU or the engine",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's refusal."""
    for log, incident in incidents(history):
        cause = incident.cause
        words = WORDS.get(str(cause.facts.get("kind"))) if cause.signal == "launch-error" else None
        if words is None:
            continue
        facts = cause.facts
        if "checkpoint" in facts and "flag" in facts:
            words += f": {facts['checkpoint']} against {facts['flag']}"
        elif "flag" in facts:
            words += f": {facts['flag']}"
        if "minimum" in facts and "capability" in facts:
            words += f" (capability {facts['minimum']} or newer, this one has {facts['capability']})"
        yield Finding(
            summary=f"The engine refused to start: {words}",
            evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
            confidence=Confidence.HIGH,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )
