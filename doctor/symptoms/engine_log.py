"""What an engine's log tells about its life: whether it came up, served, was stopped, and what broke it.

A log is judged in its own time: an error before a successful start is past, an error that the engine outlived is no
outage, and what a process prints while it is being stopped is no error at all. Of what is left, the cause is the first
error over all processes; the lines by which the others report that death are never the cause.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Engine, EngineEvent, HostMessage, known

REPORTS_OF_DEATH = frozenset(
    {
        "engine-fatal",
        "engine-dead",
        "engine-core-init-failed",
        "worker-init-failed",
        "worker-failed",
        "watchdog-exception",
        "watchdog-work",
    }
)
"""Lines that say that something died, and never why (vLLM: "See root cause above")."""

_DEATHS = REPORTS_OF_DEATH - {"worker-failed", "watchdog-work"} | {"worker-died", "process-signal"}
"""Lines after which the engine does not serve on."""

_DECISIVE = frozenset(
    {
        "cuda-error",
        "cuda-out-of-memory",
        "sampler-warmup-out-of-memory",
        "free-memory-below-utilization",
        "host-memory-too-small",
        "memory-profiling-disturbed",
        "no-kv-blocks",
        "kv-cache-too-small",
        "fp8-kernel-missing",
        "library-mismatch",
        "nvml-error",
        "nccl-nvls-failed",
        "nccl-shm-failed",
        "nccl-duplicate-gpu",
        "nccl-driver-too-old",
        "nccl-p2p-disabled",
        "no-space-left",
        "p2p-probe-failed",
        "watchdog-timeout",
    }
)
"""Errors that name a cause in their own words."""

_INDECISIVE = frozenset(
    {
        "engine-start-timeout",
        "rpc-timeout",
        "nccl-error",
        "nccl-peer-lost",
        "nccl-library-missing",
        "watchdog-heartbeat",
    }
)
"""Errors that say what could not be done; a decisive one beside them is the cause."""

_POISONED = frozenset(
    {
        "cuda-error",
        "watchdog-timeout",
        "nccl-error",
        "nccl-nvls-failed",
        "nvml-error",
        "process-signal",
        "worker-died",
        "rpc-timeout",
    }
)
"""Errors that a running engine does not outlive, even where its log ends before it says so."""

KILLED_EXIT_CODES = {-9: "SIGKILL", -11: "SIGSEGV", -7: "SIGBUS", -6: "SIGABRT", -4: "SIGILL", -8: "SIGFPE", 137: "SIGKILL", 139: "SIGSEGV", 135: "SIGBUS", 134: "SIGABRT", 132: "SIGILL", 136: "SIGFPE"}  # fmt: skip
"""Exit codes that tell a signal: Python's negative numbers, and a shell's 128 + n."""

CORE_IS_GONE = ("engine core exited unexpectedly", "Engine core proc ")
"""What the server says when an engine core ended, without knowing how: vLLM 0.32, and before."""

STAMP_SECONDS = 1.0
"""vLLM's stamps are whole seconds, cut."""

_AFTERMATH_TYPES = ("CancelledError", "ConnectionResetError", "BrokenPipeError", "ConnectionRefusedError", "EOFError", "DistNetworkError", "DistStoreError", "ActorDiedError", "ValidationError", "SystemExit", "KeyboardInterrupt", "ZMQError", "CalledProcessError", "ClientDisconnect", "WorkerCrashedError", "RayTaskError")  # fmt: skip
_AFTERMATH_MESSAGES = ("cancelled", "cannot schedule new futures after", "Event loop is closed", "Executor failed", "Event loop stopped")  # fmt: skip
_VAGUE_LAUNCH_ERRORS = ("no-device-type", "model-inspection")


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """What broke an engine and is not over."""

    log: str
    cause: EngineEvent
    """The first error that can be a cause, over all processes, in the order of the log."""
    events: tuple[EngineEvent, ...]
    """Every error of the incident, in the order of the log; the cause among them."""
    fatal: bool
    """Whether the log says that the engine, or a process of it, died."""
    serving: bool
    """Whether the engine had come up before."""
    at: float | None = None
    """When the cause was logged, or the last stamp before it, Unix seconds."""

    def having(self, *signals: str, kinds: Iterable[str] = ()) -> tuple[EngineEvent, ...]:
        """Return its events with one of these signals and, where given, one of these kinds."""
        wanted = frozenset(kinds)
        return tuple(
            event
            for event in self.events
            if event.signal in signals and (not wanted or event.facts.get("kind") in wanted)
        )


class EngineLog(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's log, as far as the history holds it."""

    log: str
    engine: str
    """`Engine.id` of the engine that wrote it last, or that an incident broke; the log where none was seen."""
    runs: bool
    """Whether a process writes it that was seen alive; an engine that pasted evidence tells of has no start time."""
    events: tuple[EngineEvent, ...]
    """Those of its present life: since it was started last."""
    serving: bool
    """Whether this life came up, or is seen at work."""
    stopped: bool
    """Whether somebody asked it to stop."""
    incident: Incident | None

    def having(self, *signals: str) -> tuple[EngineEvent, ...]:
        """Return the events of the present life with one of these signals."""
        return tuple(event for event in self.events if event.signal in signals)

    def fact(self, name: str) -> str:
        """Return what the engine says of its own configuration, in words; empty where it says nothing.

        The effective configuration line outranks the arguments.
        """
        for signal in ("engine-config", "engine-version", "non-default-args"):
            for event in self.having(signal):
                if name in event.facts and str(event.facts[name]) != "None":
                    return str(event.facts[name])
        return ""


@measured_once
def engine_logs(history: History) -> tuple[EngineLog, ...]:
    """Return every engine log of the history."""
    by_log: dict[str, list[EngineEvent]] = {}
    for event in history.engine_events():
        by_log.setdefault(event.log, []).append(event)
    writers = _writers(history)
    living = {engine.id for engine in history.latest.engines}
    logs = tuple(_engine_log(log, events, writers.get(log, ()), living) for log, events in by_log.items())
    heirs = _that_came_up(history, logs)
    return tuple(
        msgspec.structs.replace(log, incident=None) if _is_succeeded(log, writers.get(log.log, ()), heirs) else log
        for log in logs
    )


def _that_came_up(history: History, logs: tuple[EngineLog, ...]) -> tuple[Engine, ...]:
    """Return the engines that served at some time: their page was there, or their log says so."""
    up = {log.engine for log in logs if log.serving}
    up |= {page.engine for snapshot in history.snapshots for page in snapshot.metrics}
    return tuple({e.id: e for s in history.snapshots for e in s.engines if e.id in up and not e.is_left_over}.values())


def _is_succeeded(log: EngineLog, writers: tuple[Engine, ...], heirs: tuple[Engine, ...]) -> bool:
    """Whether an engine that was started after this log's incident, with another log, served in the broken one's place."""
    broken = next((engine for engine in writers if engine.id == log.engine), None)
    if broken is None or log.incident is None or log.incident.at is None:
        return False
    since = log.incident.at
    return any(heir.started_at > since and heir.log != log.log and _stands_for(heir, broken) for heir in heirs)


def _stands_for(heir: Engine, engine: Engine) -> bool:
    """Whether an engine serves the same model at the same port and, where they are known, on the same GPUs."""
    flags, others = heir.flags, engine.flags
    gpus = set(heir.visible_gpus) if known(heir.visible_gpus) else set[str]()
    its = set(engine.visible_gpus) if known(engine.visible_gpus) else set[str]()
    return (flags.model, flags.port) == (others.model, others.port) and not (gpus and its and gpus.isdisjoint(its))


def _writers(history: History) -> dict[str, tuple[Engine, ...]]:
    """Return the engines that wrote each log, the latest last. What is left of one counts to it."""
    found: dict[str, dict[str, Engine]] = {}
    for snapshot in history.snapshots:
        for engine in snapshot.engines:
            if isinstance(engine.log, str):
                of_log = found.setdefault(engine.log, {})
                if not (engine.is_left_over and of_log):
                    of_log[engine.id] = engine
    return {log: tuple(sorted(of_log.values(), key=lambda e: e.started_at)) for log, of_log in found.items()}


def incidents(history: History) -> tuple[tuple[EngineLog, Incident], ...]:
    """Return the incidents that are not over, with their logs."""
    return tuple((log, log.incident) for log in engine_logs(history) if log.incident is not None)


def vanished_core(history: History, log: EngineLog) -> EngineEvent | None:
    """Return the server's word that its engine core is gone, where the core itself said none and did not fault.

    Of an engine that was seen to live only: a pasted log may begin after the core's last words.
    """
    cause = log.incident.cause if log.incident is not None else None
    if cause is None or cause.signal != "worker-died" or "exit_code" in cause.facts:
        return None
    if not any(words in cause.text for words in CORE_IS_GONE):
        return None
    lives = [e for s in history.snapshots for e in s.engines if e.id == log.engine and e.started_at > 0]
    pids = {rank.pid for engine in lives for rank in (*engine.cores, *engine.ranks)}
    faulted = any(
        isinstance(e, HostMessage) and e.kind == "segfault" and e.pid in pids for e in history.kernel_events()
    )
    return None if faulted or not lives else cause


def is_progress(event: EngineEvent) -> bool:
    """Whether this line shows the engine at work: an answered request, or tokens generated."""
    if event.signal == "request-served":
        return True
    return event.signal == "stats" and (_number(event, "generation_tokens_per_second") > 0)


def _number(event: EngineEvent, name: str) -> float:
    value = event.facts.get(name, 0)
    return value if isinstance(value, int | float) else 0.0


def _engine_log(log: str, events: list[EngineEvent], writers: tuple[Engine, ...], living: set[str]) -> EngineLog:
    runs = bool(writers) and writers[-1].id in living and writers[-1].started_at > 0
    life_start = 0
    serving = stopped = False
    errors: list[EngineEvent] = []
    stamp: float | None = None
    stamps: dict[str, float | None] = {}
    seen_running = False
    for i, event in enumerate(events):
        stamp = event.at if event.at is not None else stamp
        stamps[event.where] = stamp
        if event.signal in ("engine-version", "engine-config", "non-default-args"):
            if seen_running:
                life_start, serving, stopped, seen_running = i, False, False, False
        elif event.signal == "startup-complete":
            errors, serving, stopped, seen_running = [], True, False, True
        elif event.signal == "shutdown":
            seen_running = True
            if _is_orderly(errors, serving):
                errors, stopped = [], True
        elif is_progress(event):
            seen_running = True
            if not stopped:
                serving = True
            if not any(error.signal in _DEATHS for error in errors):
                errors = []
        elif _is_error(event):
            seen_running = True
            if not stopped:
                errors.append(event)
    incident = _incident(log, errors, stamps, serving=serving, runs=runs)
    return EngineLog(
        log=log,
        engine=_writer(writers, incident).id if writers else log,
        runs=runs,
        events=tuple(events[life_start:]),
        serving=serving,
        stopped=stopped,
        incident=incident,
    )


def _writer(writers: tuple[Engine, ...], incident: Incident | None) -> Engine:
    """Return the latest engine or, while it has not come up since an earlier one's incident, that earlier one."""
    if incident is None or incident.at is None:
        return writers[-1]
    until = incident.at + STAMP_SECONDS
    return next((engine for engine in reversed(writers) if engine.started_at <= until), writers[-1])


def _is_orderly(errors: list[EngineEvent], serving: bool) -> bool:
    """Whether a stop that follows these errors was asked for from outside, rather than their consequence."""
    if not errors:
        return True
    return serving and not any(error.signal in _DEATHS | _POISONED for error in errors)


def _is_error(event: EngineEvent) -> bool:
    if event.signal in REPORTS_OF_DEATH | _DECISIVE | _INDECISIVE:
        return True
    if event.signal == "multicast-unsupported":  # logged as a warning where the engine goes on without
        return "type" in event.facts
    return event.signal in ("exception", "worker-died", "process-signal", "launch-error")


def _incident(
    log: str, errors: list[EngineEvent], stamps: dict[str, float | None], *, serving: bool, runs: bool
) -> Incident | None:
    fatal = any(error.signal in _DEATHS for error in errors)
    if not fatal and (serving or runs):
        errors = [error for error in errors if error.signal in _POISONED]
    if all(_is_reason(error) for error in errors):
        return None
    cause = _cause_among(errors)
    return Incident(
        log=log, cause=cause, events=tuple(errors), fatal=fatal, serving=serving, at=stamps.get(cause.where)
    )


def _cause_among(errors: list[EngineEvent]) -> EngineEvent:
    candidates = [error for error in errors if error.signal not in REPORTS_OF_DEATH]
    first = next((error for error in candidates if not _is_reason(error)), None)
    if first is None:
        return errors[0]
    if not _is_vague(first):
        return _end_of_chain(candidates[candidates.index(first) :])
    decisive = _DECISIVE | (
        {"launch-error", "exception", "process-signal"} if first.signal in _GIVES_WAY else frozenset[str]()
    )
    return next((e for e in candidates if e.signal in decisive and not _is_vague(e)), first)


_GIVES_WAY = frozenset({"exception", "launch-error", "worker-died", "process-signal"})
"""Where a vague line of these comes first, any plain error after it is the better cause."""


def _is_reason(error: EngineEvent) -> bool:
    """Whether this line may give the reason of a vague failure, and is none by itself: what was only tried may fail."""
    if error.signal == "library-mismatch" and error.facts.get("kind") == "undefined-symbol" and "vllm._C" in error.text:
        return False  # its own kernels: without them no engine runs, though it only warns
    return error.level == "DEBUG" or (error.level == "WARNING" and error.signal in ("library-mismatch", "nvml-error"))


def _end_of_chain(candidates: list[EngineEvent]) -> EngineEvent:
    """Return the first error or, where Python chained a plainer one to it in the same process, that one.

    A plainer one right behind it, unstamped, is the rest of a message that was wrapped when it was pasted.
    """
    first = candidates[0]
    if not _is_plain(first):
        return first
    for error in candidates[1:]:
        wrapped = error.at is None and not error.level and 0 < _line(error) - _line(first) <= _WRAPPED_LINES
        if (error.process, error.pid) != (first.process, first.pid) or not (wrapped or "chained" in error.facts):
            break
        if not _is_plain(error):
            return error
    return first


def _is_plain(error: EngineEvent) -> bool:
    """Whether the reader's table knows no more of it than that it is an error."""
    return error.signal == "exception" or error.facts.get("kind") == "bad-value"


_WRAPPED_LINES = 2


def _line(event: EngineEvent) -> int:
    number = event.where.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def _is_vague(error: EngineEvent) -> bool:
    """Whether this error gives way to a decisive one beside it."""
    facts = error.facts
    match error.signal:
        case "exception":
            message = str(facts.get("message", ""))
            aftermath = message.startswith(_AFTERMATH_MESSAGES) or "Connection closed by peer" in message
            return aftermath or str(facts.get("type", "")).endswith(_AFTERMATH_TYPES)
        case "worker-died":
            return facts.get("exit_code") not in KILLED_EXIT_CODES and "kind" not in facts
        case "process-signal":
            return facts.get("kind") == "abort"
        case "launch-error":
            return facts.get("kind") in _VAGUE_LAUNCH_ERRORS
        case signal:
            return signal in _INDECISIVE or signal in REPORTS_OF_DEATH
