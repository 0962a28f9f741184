"""GPUs can't reach each other although nothing is wrong with the cabling."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source
from doctor.symptoms.engine_log import EngineLog, engine_logs


@rule(
    "p2p-blocked",
    "GPUs can't reach each other directly",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("pcie-fallback", "allreduce-dominant"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take what stopped the engine; a test that only switched a fast path off is a notice: many boards have no peer access."""
    for log in engine_logs(history):
        if log.incident is not None and (told := _fatal(log.incident.cause)):
            yield _finding(log, log.incident.cause, told, Severity.CRITICAL, log.incident.at)
        elif off := log.having("custom-allreduce-off-p2p"):
            words = "its GPUs have no peer access, or its test of it failed: the custom all-reduce is off"
            yield _finding(log, off[0], words, Severity.NOTICE, off[0].at)


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


def _finding(log: EngineLog, event: EngineEvent, words: str, severity: Severity, since: float | None) -> Finding:
    return Finding(
        summary=f"The engine says: {words}",
        evidence=(Evidence(Source.ENGINE_LOG.value, event.where, event.text),),
        confidence=Confidence.MEDIUM,
        severity=severity,
        subject=Subject(engine=log.engine),
        since=since,
        facts={"log": log.log},
    )
