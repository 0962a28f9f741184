"""A process of the engine was killed from outside: by the out-of-memory killer, or by a signal."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import EngineEvent, OomKill, Source
from doctor.symptoms.engine_groups import gpus_of_engine
from doctor.symptoms.engine_log import KILLED_EXIT_CODES, EngineLog, Incident, engine_logs, vanished_core
from doctor.symptoms.names import listed
from doctor.symptoms.orphans import Orphans, orphans
from doctor.symptoms.xids import of_this_boot

TITLES = ("VLLM::", "vllm", "ray::", "sglang")
"""How the kernel names the processes of engines: the first 15 characters of the title, or of the program."""

PLAIN_TITLE = "python"
PLAIN_BYTES = 64 << 30
"""Engines without a title of their own are `python3`. guess: on a node whose engines are not seen, one this large is one."""

BY_WHOM = "by the out-of-memory killer, or by hand"

KILLS = ("SIGKILL",)
"""A process can't ask for this one by its own mistake, unlike SIGSEGV or SIGABRT."""


class Limits(msgspec.Struct, frozen=True):
    """When what is left of an engine is no longer on its way out."""

    settle_seconds: float = 10.0
    """As for `gpu-memory-held`: processes of an engine that is being stopped outlive it by up to 3 s."""


@rule(
    "worker-killed",
    "A process of the engine was killed",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG, Source.KERNEL_LOG),
    explains=("engine-crashed", "nccl-timeout", "engine-stalled", "gpu-memory-held"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Join the exit code in the engine's log with the kernel's out-of-memory kills."""
    kills = [e for e in of_this_boot(history) if isinstance(e, OomKill)]
    ours = [kill for kill in kills if kill.process_name.startswith(TITLES)]
    logs = engine_logs(history)
    if not logs and not history.latest.engines:
        ours += [kill for kill in kills if _may_be_engine(kill)]
    used: set[str] = set()
    for log in logs:
        death = _killed(log.incident) or vanished_core(history, log)
        if log.incident is None or death is None:
            continue
        began = _began(history, log)
        kill = next(
            (
                k
                for k in kills
                if (k in ours or k.pid == death.facts.get("worker_pid")) and (k.at is None or k.at >= began)
            ),
            None,
        )
        if kill is not None:
            used.add(kill.where)
        found = _finding(log, log.incident, death, kill, gpus_of_engine(history, log.engine))
        yield found if kill is not None or _killed(log.incident) else _unnamed(history, log, found)
    for left in orphans(history, limits.settle_seconds):
        log = next((log for log in logs if log.engine == left.server.id), None)
        if log is not None and (log.stopped or log.incident is not None):
            continue
        kill = next((k for k in kills if k.pid == left.server.pid), None)
        if kill is not None:
            used.add(kill.where)
        yield _orphaned(history, left, kill)
    recovered = any(log.serving and log.incident is None for log in logs)
    for kill in ours:
        if kill.where not in used and not recovered:
            yield Finding(
                summary=f"The kernel's out-of-memory killer took {kill.process_name} (pid {kill.pid}){_size(kill)}",
                evidence=(Evidence(Source.KERNEL_LOG.value, kill.where, kill.text),),
                confidence=Confidence.MEDIUM if _may_be_engine(kill) else Confidence.HIGH,
                subject=Subject(pids=(kill.pid,)),
                since=kill.at,
                facts={"pid": str(kill.pid)},
            )


def _orphaned(history: History, left: Orphans, kill: OomKill | None) -> Finding:
    """Return the finding of a server that is gone while its engine core lives on: an orderly end takes the core along."""
    first, several = left.cores[0], len(left.cores) > 1
    pids = tuple(core.pid for core in left.cores)
    cores = f"its engine core{'s' if several else ''} (pid {listed(map(str, pids))})"
    alive = Evidence(
        Source.PROCESSES.value,
        f"/proc/{first.pid}",
        f"{first.command_line[0]} runs; its server, pid {left.server.pid}, does not",
    )
    return Finding(
        summary=f"The engine's server (pid {left.server.pid}) was ended by SIGKILL: {_killer(history, kill)}; "
        f"{cores} {'live' if several else 'lives'} on without it and {'keep' if several else 'keeps'} all memory",
        evidence=(alive, *((Evidence(Source.KERNEL_LOG.value, kill.where, kill.text),) if kill is not None else ())),
        confidence=Confidence.HIGH if kill is not None else Confidence.MEDIUM,
        subject=Subject(engine=left.server.id, gpus=gpus_of_engine(history, left.server.id), pids=pids),
        since=left.since,
        facts={"pid": str(first.pid)} | ({"log": left.server.log} if isinstance(left.server.log, str) else {}),
    )


def _killer(history: History, kill: OomKill | None) -> str:
    """Return who ended a process of an engine that was seen to live."""
    if kill is not None:
        return f"the kernel's out-of-memory killer took it{_size(kill)}"
    if Source.KERNEL_LOG in history.latest.seen:
        return "by hand, or by a supervisor: the kernel log tells of no out-of-memory kill"
    return BY_WHOM


def _began(history: History, log: EngineLog) -> float:
    """Return when the engine of a log was started, where it was seen: what the kernel killed before was another."""
    starts = (e.started_at for s in reversed(history.snapshots) for e in s.engines if e.id == log.engine)
    return next(starts, 0.0)


def _may_be_engine(kill: OomKill) -> bool:
    return kill.process_name.startswith(PLAIN_TITLE) and (kill.rss_bytes or 0) >= PLAIN_BYTES


def _killed(incident: Incident | None) -> EngineEvent | None:
    if incident is None:
        return None
    for event in incident.having("worker-died", "engine-core-init-failed"):
        code = event.facts.get("exit_code")
        if event.facts.get("kind") == "host-memory" or (isinstance(code, int) and KILLED_EXIT_CODES.get(code) in KILLS):
            return event
    # A shell's bare word for the program as a whole: after another error the engine may have ended itself so.
    cause = incident.cause
    return cause if cause.signal == "process-signal" and cause.facts.get("kind") == "killed" else None


def _finding(
    log: EngineLog, incident: Incident, death: EngineEvent, kill: OomKill | None, gpus: tuple[str, ...]
) -> Finding:
    name = death.facts.get("name") or death.facts.get("process") or "A process of the engine"
    if death.facts.get("kind") == "host-memory":
        return _by_ray(log, incident, death)
    by = f"the kernel's out-of-memory killer took it{_size(kill)}" if kill else BY_WHOM
    evidence = [Evidence(Source.ENGINE_LOG.value, death.where, death.text)]
    if kill is not None:
        evidence.append(Evidence(Source.KERNEL_LOG.value, kill.where, kill.text))
    return Finding(
        summary=f"{name} was ended by SIGKILL: {by}",
        evidence=tuple(evidence),
        confidence=Confidence.HIGH if kill is not None else Confidence.MEDIUM,
        subject=Subject(engine=log.engine, gpus=gpus, pids=(kill.pid,) if kill is not None else ()),
        since=incident.at,
        facts={"log": log.log},
    )


def _unnamed(history: History, log: EngineLog, found: Finding) -> Finding:
    """Return the finding of an engine core that was there and is not: no line names the signal."""
    lives = [e.cores or e.ranks for s in history.snapshots for e in s.engines if e.id == log.engine]
    last = next((ranks for ranks in reversed(lives) if ranks), ())
    pids = tuple(rank.pid for rank in last)
    who = f"The engine core (pid {pids[0]})" if len(pids) == 1 else "An engine core"
    looked = Source.KERNEL_LOG in history.latest.seen
    return msgspec.structs.replace(
        found,
        summary=f"{who} was ended from outside: it left no word of an error, as after SIGKILL; {_killer(history, None)}",
        confidence=Confidence.MEDIUM if looked else Confidence.LOW,
        subject=msgspec.structs.replace(found.subject, pids=pids if len(pids) == 1 else ()),
    )


def _by_ray(log: EngineLog, incident: Incident, death: EngineEvent) -> Finding:
    return Finding(
        summary="Ray killed a worker of the engine because the host was running out of memory",
        evidence=(Evidence(Source.ENGINE_LOG.value, death.where, death.text),),
        subject=Subject(engine=log.engine),
        since=incident.at,
        facts={"log": log.log},
    )


def _size(kill: OomKill) -> str:
    return f" at {kill.rss_bytes / (1 << 30):.1f} GiB" if kill.rss_bytes else ""
