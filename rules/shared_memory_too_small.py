"""`/dev/shm` is too small for NCCL and the engine's workers."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source, known
from doctor.symptoms.engine_log import Incident, incidents


@rule(
    "shared-memory-too-small",
    "Shared memory is too small for the engine's workers",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("nccl-timeout", "engine-crashed", "launch-refused", "worker-killed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take NCCL's word, or a bus error, for shared memory that could not be had; add its size where it was seen."""
    for log, incident in incidents(history):
        proof = _proof(incident)
        if proof is None:
            continue
        wanted = proof.facts.get("wanted_bytes")
        size = f" ({int(wanted) / (1 << 20):.0f} MiB more were wanted)" if isinstance(wanted, int) else ""
        certain = proof.signal != "process-signal"
        yield Finding(
            summary="The engine's workers could not get shared memory in /dev/shm" + size
            if certain
            else "A process died of a bus error: most often /dev/shm was full",
            evidence=(Evidence(Source.ENGINE_LOG.value, proof.where, proof.text), *_size(history, log.engine)),
            confidence=Confidence.HIGH if certain else Confidence.LOW,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )


def _proof(incident: Incident) -> EngineEvent | None:
    said = incident.having("nccl-shm-failed") or incident.having("process-signal", kinds=("bus-error",))
    full = tuple(e for e in incident.having("no-space-left") if "shm" in e.text.lower() or "psm_" in e.text)
    return next(iter((*said, *full)), None)


def _size(history: History, engine: str) -> Iterator[Evidence]:
    for found in history.latest.engines:
        total = found.shared_memory.total_bytes
        if found.id == engine and known(total):
            used = found.shared_memory.used_bytes
            text = f"{total / (1 << 20):.0f} MiB" + (f", {used / (1 << 20):.0f} MiB used" if known(used) else "")
            yield Evidence(Source.PROCESSES.value, f"shared memory of {found.pid}", text)
