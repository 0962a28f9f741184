"""Requests run and no step advances, while the engine still answers /health."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_groups import gpus_of_engine
from doctor.symptoms.engine_log import EngineLog, engine_logs
from doctor.symptoms.stalls import Flat, Halted, Suspicion, Waits, flat_engines, halted_engines, suspicion, waits

KINDS = {"hardware": "the hardware", "collective": "a collective", "software": "software"}
"""Where an engine hangs, by the kind of suspicion, in words."""


class Limits(msgspec.Struct, frozen=True):
    """When silence is a stall."""

    window_seconds: float = 60.0
    """Counters must stand still this long. vLLM's own warning interval (VLLM_RINGBUFFER_WARNING_INTERVAL); in live
    captures of stopped workers the counters stood still from the first second."""
    start_waits_min: int = 3
    """So many while the engine starts are worth a notice: loading and compiling take minutes, a hang at start lasts."""
    waits_min: int = 2
    """So many waits of 60 s since the last progress; one may be a long compilation."""


@rule(
    "engine-stalled",
    "Requests run and the engine makes no step",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG, Source.ENGINE_METRICS),
    explains=("engine-crashed", "ttft-slow", "throughput-below-reference"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Join the counters that stand still with the processes that say that they wait."""
    logs = engine_logs(history)
    flat = {stall.engine: stall for stall in flat_engines(history, limits.window_seconds)}
    told: set[str] = set()
    for log in logs:
        waited = waits(log)
        stall = flat.pop(log.engine, None)
        if stall is not None or _is_stall(log, waited, limits):
            told.add(log.engine)
            yield _finding(history, log.engine, log, waited, stall)
        elif waited.count and not waited.starting and _asked_for_work(waited) and not log.runs:
            # One wait at the end of a log that was given: what came after it, only somebody else knows.
            yield msgspec.structs.replace(
                _finding(history, log.engine, log, waited, None), severity=Severity.NOTICE, confidence=Confidence.LOW
            )
        elif waited.starting and waited.count >= limits.start_waits_min and not log.stopped:
            yield _starting(log, waited)
    for engine, stall in flat.items():
        yield _finding(history, engine, None, None, stall)
    for halted in halted_engines(history, limits.window_seconds):
        if halted.engine not in told:
            yield _finding(history, halted.engine, None, None, None, halted=halted)


def _is_stall(log: EngineLog, waited: Waits, limits: Limits) -> bool:
    count = waited.count
    timed_out = log.incident is not None and bool(log.incident.having("rpc-timeout"))
    if not count or waited.starting or log.stopped:
        return False
    if timed_out:
        return True
    if count < limits.waits_min:
        return False
    return _asked_for_work(waited)


def _asked_for_work(waited: Waits) -> bool:
    """Whether the waits are no idleness.

    Before vLLM 0.11 an idle worker waited aloud too; the engine core waits only for an answer that it asked for.
    """
    core = any(event.process.startswith("EngineCore") for event in waited.events)
    return core or waited.running is None or waited.running > 0


def _starting(log: EngineLog, waited: Waits) -> Finding:
    return Finding(
        summary=f"The engine has waited {waited.count} minutes or longer for a process of its own while starting: it loads or "
        "compiles, or it hangs",
        evidence=tuple(Evidence(Source.ENGINE_LOG.value, e.where, e.text) for e in waited.events[-1:]),
        severity=Severity.NOTICE,
        confidence=Confidence.LOW,
        subject=Subject(engine=log.engine),
        since=waited.events[0].at,
        facts={"log": log.log},
    )


def _finding(
    history: History,
    subject: str,
    log: EngineLog | None,
    waited: Waits | None,
    stall: Flat | None,
    *,
    halted: Halted | None = None,
) -> Finding:
    engine = next((e for e in history.latest.engines if e.id == subject), None)
    guess = suspicion(history, engine) if engine is not None else Suspicion("unknown", "")
    parts: list[str] = []
    evidence: list[Evidence] = []
    if stall is not None:
        held = f"{stall.running:g} requests run and " if stall.running else ""
        parts.append(f"{held}no token or step was counted for {stall.seconds:.0f} s")
        counters = f"running {stall.running:g}, steps {_shown(stall.steps)}, generated tokens {_shown(stall.tokens)}: unchanged for {stall.seconds:.0f} s"
        evidence.append(Evidence(Source.ENGINE_METRICS.value, "vllm:iteration_tokens_total_count", counters))
    if waited is not None and waited.events:
        names = sorted({event.process for event in waited.events if event.process})
        who = f" ({', '.join(names[:4])})" if names else ""
        parts.append(f"processes of the engine{who} have waited for others {waited.count} times a minute or longer")
        ends = waited.events[:: max(1, len(waited.events) - 1)]
        evidence += [Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in ends]
    if log is not None and log.incident is not None and (timeouts := log.incident.having("rpc-timeout")):
        parts.append(f"until a call timed out ({timeouts[0].where})")
        evidence.append(Evidence(Source.ENGINE_LOG.value, timeouts[0].where, timeouts[0].text))
    if halted is not None:
        parts.append(f"a process of it has been stopped for {halted.seconds:.0f} s, and its counters are not seen")
    if guess.text:
        parts.append(guess.text if guess.kind == "unknown" else f"it is {KINDS[guess.kind]}: {guess.text}")
        evidence.append(Evidence(Source.PROCESSES.value, "ranks and their GPUs", f"{guess.kind}: {guess.text}"))
    both = stall is not None and waited is not None and bool(waited.events)
    began = stall or halted
    first_wait = waited.events[0].at if waited is not None and waited.events else None
    return Finding(
        summary="The engine makes no step: " + "; ".join(parts),
        evidence=tuple(evidence),
        confidence=Confidence.HIGH
        if both or (began is not None and guess.kind != "unknown")
        else _alone(waited, stall),
        subject=Subject(
            engine=subject, ranks=guess.ranks, gpus=gpus_of_engine(history, subject) or guess.gpus, pids=guess.pids
        ),
        since=began.since if began is not None else first_wait,
        facts=({"log": log.log} if log is not None else {}) | ({"pid": str(guess.pids[0])} if guess.pids else {}),
    )


def _alone(waited: Waits | None, stall: Flat | None) -> Confidence:
    if stall is not None or (waited is not None and waited.serving):
        return Confidence.MEDIUM
    return Confidence.LOW


def _shown(counter: float | None) -> str:
    return f"{counter:.0f}" if counter is not None else "unknown"
