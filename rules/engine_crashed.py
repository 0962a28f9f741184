"""The engine died of its own software error: the first error of its log, quoted."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source
from doctor.symptoms.engine_groups import gpus_of_engine
from doctor.symptoms.engine_log import (
    KILLED_EXIT_CODES,
    REPORTS_OF_DEATH,
    EngineLog,
    Incident,
    incidents,
    vanished_core,
)

TOLD_BY_OTHERS = frozenset(
    {
        "free-memory-below-utilization",
        "host-memory-too-small",
        "sampler-warmup-out-of-memory",
        "memory-profiling-disturbed",
        "no-kv-blocks",
        "kv-cache-too-small",
        "fp8-kernel-missing",
        "library-mismatch",
        "nccl-shm-failed",
        "nccl-driver-too-old",
        "nccl-nvls-failed",
        "p2p-probe-failed",
    }
)
"""Causes that are refusals to start or name their own failure mode: their rule says it all."""

KINDS_TOLD_BY_OTHERS = {
    "cuda-error": frozenset(
        {
            "no-kernel-image",
            "invalid-kernel-image",
            "unsupported-toolchain",
            "old-gpu",
            "system-not-initialized",
            "driver-mismatch",
            "compat-unsupported",
            "driver-too-old",
            "no-driver",
            "peer-unsupported",
        }
    ),
    "nvml-error": frozenset({"driver-library-mismatch", "not-loaded", "library-not-found"}),
    "launch-error": frozenset(
        {
            "heads-indivisible",
            "gpu-uuid",
            "dtype",
            "fp8-block",
            "world-size",
            "quantization-mismatch",
            "quantization-capability",
            "quantization-group",
            "mig-uuid",
            "port-in-use",
            "bad-flag",
            "bad-value",
            "bad-model-files",
            "model-not-found",
            "no-access",
            "unsupported-architecture",
        }
    ),
    "process-signal": frozenset({"bus-error", "killed"}),
    "worker-died": frozenset({"host-memory"}),
}

WORDS = {
    "rpc-timeout": "a worker did not answer a call in time, and nothing in the log says what it was doing",
    "cuda-out-of-memory": "a GPU ran out of memory while serving",
    "no-space-left": "a disk that it writes to is full",
    "engine-start-timeout": "the engine core took longer to start than its front waits (VLLM_ENGINE_READY_TIMEOUT_S)",
}


@rule(
    "engine-crashed",
    "The engine died of an error of its own",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Quote the first error over all processes, unless it is a failure mode of its own.

    Where a deeper cause is known (a lost GPU, a fault, a timeout), this is how the engine met it, and hangs below it.
    """
    for log, incident in incidents(history):
        if _is_told(incident) or vanished_core(history, log) is not None:
            continue
        yield _finding(log, incident, gpus_of_engine(history, log.engine))


def _is_told(incident: Incident) -> bool:
    cause = incident.cause
    kind = str(cause.facts.get("kind", ""))
    if cause.signal in TOLD_BY_OTHERS or kind in KINDS_TOLD_BY_OTHERS.get(cause.signal, ()):
        return True
    if cause.signal == "cuda-out-of-memory":
        return not incident.serving
    code = cause.facts.get("exit_code")
    if cause.signal == "worker-died" and isinstance(code, int) and KILLED_EXIT_CODES.get(code) == "SIGKILL":
        return True  # by worker-killed; any other signal is the program's own mistake
    # A fault or a timeout of which no process died yet is told by its own rule alone.
    own_rules = ("cuda-error", "watchdog-timeout", "nccl-error", "nccl-peer-lost", "watchdog-heartbeat")
    return cause.signal in own_rules and kind not in _NO_RULE and not incident.fatal


_NO_RULE = frozenset({"stream-capture", "unknown", "invalid-usage", "illegal-state", "invalid-device", "busy", "no-device", "initialization", "cublas", "cudnn", "other", "nvlink"})  # fmt: skip
"""Kinds of CUDA and NCCL errors that are no failure mode of their own: quoted here."""


def _finding(log: EngineLog, incident: Incident, gpus: tuple[str, ...]) -> Finding:
    cause = incident.cause
    when = "while serving" if incident.serving else "while starting" if incident.fatal else "at its start or at work"
    vague = cause.signal in REPORTS_OF_DEATH
    words = WORDS.get(cause.signal, "")
    if vague:
        text = "its log holds only the reports of the death, not the first error: look for it above the part that was given"
    elif words:
        text = f"{words} ({_quoted(cause)})"
    else:
        text = f"the first error is {_quoted(cause)}"
    version = log.fact("version")
    facts = {"log": log.log, "version": version} if version else {"log": log.log}
    return Finding(
        summary=f"The engine died {when}: {text}{_place(cause)}",
        evidence=(
            Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),
            *(Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in _others(incident)),
        )[:4],
        confidence=Confidence.LOW if vague or cause.signal == "rpc-timeout" else Confidence.MEDIUM,
        subject=Subject(
            engine=log.engine,
            gpus=gpus,
            ranks=(f"rank{cause.rank}",) if cause.rank is not None else (),
            pids=(cause.pid,) if cause.pid is not None else (),
        ),
        since=incident.at,
        facts=facts,
    )


def _others(incident: Incident) -> tuple[EngineEvent, ...]:
    """Return the errors beside the cause: the first of each kind before more of the same."""
    firsts = {event.signal: event for event in reversed(incident.events)}
    alike = [event for event in incident.events[:8] if event is not firsts[event.signal]]
    kinds = sorted(firsts.values(), key=incident.events.index)
    return tuple(event for event in (*kinds, *alike) if event is not incident.cause)


def _quoted(cause: EngineEvent) -> str:
    text = cause.text if len(cause.text) <= 200 else cause.text[:199] + "…"
    return f'"{text}"'


def _place(cause: EngineEvent) -> str:
    within, file = str(cause.facts.get("within", "")), str(cause.facts.get("file", ""))
    return f", in {within.rpartition(' > ')[2]} of {file}" if within and file else ""
