"""A collective operation between ranks did not finish in time, or failed."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Source
from doctor.symptoms.engine_groups import gpus_of_engine
from doctor.symptoms.engine_log import EngineLog, Incident, incidents
from doctor.symptoms.names import listed

NCCL_ERRORS = {
    "unhandled-cuda-error": "a CUDA call failed inside NCCL",
    "unhandled-system-error": "a system call failed inside NCCL",
    "remote-error": "a peer's process died or its connection broke",
    "internal-error": "an internal check of NCCL failed",
    "other": "NCCL failed",
}
"""By the kind of the signal `nccl-error`; `invalid-usage` is the program's mistake, not a collective's."""

ENVIRONMENT = ("NCCL_TIMEOUT", "TORCH_NCCL_", "NCCL_DEBUG", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS")


@rule(
    "nccl-timeout",
    "A collective operation timed out or failed",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-stalled", "engine-crashed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the watchdog's word for a timeout; else a failure of NCCL that nothing plainer explains.

    The watchdog also reports CUDA errors; those are told by the rule of that error.
    """
    for log, incident in incidents(history):
        timeouts = incident.having("watchdog-timeout")
        if timeouts:
            yield _timed_out(history, log, incident, timeouts)
        elif _is_failure(incident.cause):
            yield _failed(history, log, incident)


def _is_failure(cause: EngineEvent) -> bool:
    if cause.signal == "nccl-error":
        return cause.facts.get("kind") in NCCL_ERRORS
    return cause.signal in ("nccl-peer-lost", "watchdog-heartbeat")


def _timed_out(history: History, log: EngineLog, incident: Incident, timeouts: tuple[EngineEvent, ...]) -> Finding:
    told = next((event for event in timeouts if "op" in event.facts), timeouts[0])
    what = f"Collective {told.facts['op']} (number {told.facts['seq']})" if "op" in told.facts else "A collective"
    after = f" within {_seconds(told.facts['timeout_ms'])}" if "timeout_ms" in told.facts else " in time"
    reporters = sorted({event.rank for event in timeouts if event.rank is not None})
    silent = _silent(log, reporters)
    if silent:
        who = f"rank {listed(map(str, reporters))} waited, rank {listed(map(str, silent))} never reported: look there first"
    elif reporters:
        who = f"reported by rank {listed(map(str, reporters))}; who reports first is not therefore the culprit"
    else:
        who = "no rank is named"
    behind = _behind(incident)
    return Finding(
        summary=f"{what} did not finish{after}; {behind or who}",
        evidence=(
            *_quotes(timeouts[:1]),
            *_quotes(incident.having("watchdog-work")[:2]),
            *_beside(history, log, incident),
        ),
        confidence=Confidence.HIGH,
        subject=Subject(
            engine=log.engine,
            gpus=gpus_of_engine(history, log.engine),
            ranks=tuple(f"rank{rank}" for rank in reporters),
        ),
        since=incident.at,
        facts={"log": log.log},
    )


def _silent(log: EngineLog, reporters: list[int]) -> list[int]:
    """Return the ranks that the log says exist and that reported no timeout, where some did and some did not."""
    sizes = [event.facts.get("world_size") for event in log.having("rank-assigned", "world-size")]
    size = max((size for size in sizes if isinstance(size, int)), default=0)
    if not reporters or len(reporters) * 2 <= size or size > 1024:  # too few spoke to blame the rest
        return []
    return [rank for rank in range(size) if rank not in reporters]


def _behind(incident: Incident) -> str:
    """Say which rank completed fewer operations than the others, from the watchdog's counts."""
    completed: dict[int, int] = {}
    for event in incident.having("watchdog-work"):
        done = event.facts.get("completed")
        if event.rank is not None and isinstance(done, int):
            completed.setdefault(event.rank, done)
    if len(completed) < 2 or min(completed.values()) == max(completed.values()):
        return ""
    last = min(completed, key=lambda rank: completed[rank])
    return f"rank {last} had completed {completed[last]} operations, the others up to {max(completed.values())}: it is behind"


def _failed(history: History, log: EngineLog, incident: Incident) -> Finding:
    cause = incident.cause
    what = NCCL_ERRORS.get(str(cause.facts.get("kind")), "a peer's connection broke")
    if cause.signal == "watchdog-heartbeat":
        what = "the watchdog thread of PyTorch itself hangs in a CUDA or NCCL call"
    warned = incident.having("nccl-warn") or log.having("nccl-warn")
    hint = "" if warned else "; the log has no NCCL WARN line that says why: run again with NCCL_DEBUG=WARN"
    return Finding(
        summary=f"Communication between ranks failed: {what}{hint}",
        evidence=(*_quotes((cause,)), *_beside(history, log, incident)),
        confidence=Confidence.MEDIUM if warned else Confidence.LOW,
        subject=Subject(engine=log.engine, gpus=gpus_of_engine(history, log.engine)),
        since=incident.at,
        facts={"log": log.log},
    )


def _beside(history: History, log: EngineLog, incident: Incident) -> Iterator[Evidence]:
    """Yield the first cause where it is another line, NCCL's warnings, and the settings that bear on timeouts."""
    if incident.cause.signal not in ("watchdog-timeout", "nccl-error"):
        yield from _quotes((incident.cause,))
    yield from _quotes(log.having("nccl-warn")[:2])
    for engine in history.latest.engines:
        if engine.id == log.engine:
            for name, value in sorted(engine.environment.items()):
                if name.startswith(ENVIRONMENT):
                    yield Evidence(Source.PROCESSES.value, f"environment of {engine.pid}", f"{name}={value}")


def _quotes(events: tuple[EngineEvent, ...]) -> Iterator[Evidence]:
    return (Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in events)


def _seconds(milliseconds: object) -> str:
    return f"{int(str(milliseconds)) / 1000:g} s" if str(milliseconds).isdigit() else f"{milliseconds} ms"
