"""GPUs can't reach each other although nothing is wrong with the cabling."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source
from doctor.symptoms.engine_log import EngineLog, Incident, incidents


@rule(
    "p2p-blocked",
    "GPUs can't reach each other directly",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("pcie-fallback", "allreduce-dominant"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take what stopped the engine. That vLLM turned its own all-reduce off for want of peer access is `pcie-fallback`."""
    for log, incident in incidents(history):
        if told := _fatal(incident.cause):
            yield _finding(log, incident, told)


def _fatal(cause: EngineEvent) -> str:
    if cause.signal == "p2p-probe-failed":
        return (
            "its test of peer access between GPUs failed to run; that is no proof that peer access is broken: "
            "the lines behind it say what the test program died of"
        )
    if cause.signal == "nccl-p2p-disabled":
        first, second = cause.facts.get("first"), cause.facts.get("second")
        return f"GPUs {first} and {second} are joined by NVLink and may not reach each other"
    if cause.signal == "cuda-error" and cause.facts.get("kind") == "peer-unsupported":
        return "CUDA has no peer access between two of its GPUs"
    return ""


def _finding(log: EngineLog, incident: Incident, words: str) -> Finding:
    event = incident.cause
    return Finding(
        summary=f"The engine says: {words}",
        evidence=(Evidence(Source.ENGINE_LOG.value, event.where, event.text),),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=log.engine),
        since=incident.at,
        facts={"log": log.log},
    )
