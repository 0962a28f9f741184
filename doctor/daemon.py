"""The daemon: walks the one path for ever, shows each report at the door, and logs each finding that comes, changes or goes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import structlog

from doctor.collectors.gpu_access import HOLD_SECONDS, GpuAccess
from doctor.control import control
from doctor.diagnose import watch
from doctor.door.address import Address
from doctor.door.server import Door
from doctor.notify import service_manager
from doctor.recorder.changes import Change, SourceChange, SourcesTold, Told
from doctor.recorder.flight import FlightRecorder
from doctor.recorder.segment import Entry
from doctor.report import ReportedFinding
from doctor.rule import AnyRule
from doctor.silence import Silence
from doctor.snapshot import Snapshot, Source, Why
from exporters.prometheus import Tally
from exporters.wording import headline, plain, severity_of, silenced


def run(  # the one function that ties feed, path, page and log together
    visits: Generator[Snapshot, None, None],
    rules: Sequence[AnyRule],
    *,
    listen: Address,
    interval_seconds: float,
    keep_seconds: float,
    version: str,
    optional: frozenset[Source] = frozenset(),
    silences: Sequence[Silence] = (),
    web_config: Path | None = None,
    recorder: FlightRecorder | None = None,
    access: GpuAccess | None = None,
    control_folder: Path | None = None,
) -> None:
    """Judge every visit and serve the last report until SIGTERM or SIGINT. Raises DoorError where it can't.

    *access*: to the GPUs, which signals let go of and take up again, and requests to a socket in *control_folder*.
    """
    log = _log()
    past = recorder.past if recorder else ()
    tally = _tally_of(past[-1].counted) if past else Tally()
    door = Door(
        listen,
        tally,
        interval_seconds=interval_seconds,
        version=version,
        log=log,
        optional=optional,
        web_config=web_config,
    )
    told, sources_told = Told(), SourcesTold()
    told.go_on(_found(past))
    try:
        with (
            _ended_by_signals(),
            closing(visits),
            door.opened() as bound,
            service_manager(interval_seconds) as manager,
            _told_to_let_go(access, control_folder, log),
        ):
            log.info("listening", address=str(bound), version=version)
            if past:
                log.info("recording read", visits=len(past), last_at=past[-1].snapshot.at)
            if recorder and recorder.damaged:
                log.warning("recording damaged", places=recorder.damaged)
            del past  # the history keeps what it needs
            for report in watch(
                _recorded(visits, recorder), rules, keep_seconds, optional, silences, past=_handed_over(recorder)
            ):
                tally.add(report)
                door.show(report)
                for lost in sources_told.after(report.snapshot):
                    _tell_of_source(log, lost)
                for change in told.after(report.findings):
                    _tell(log, change)
                if recorder:
                    counted = msgspec.msgpack.encode(tally)
                    recorder.keep(Entry(snapshot=report.snapshot, findings=report.findings, counted=counted))
                manager.visited(f"{report.verdict.value}: {headline(report)}")
    except KeyboardInterrupt:
        log.info("ended", visits=tally.visits)
    finally:
        if recorder:
            recorder.close()


def _recorded(visits: Generator[Snapshot, None, None], recorder: FlightRecorder | None) -> Iterator[Snapshot]:
    """Yield each visit with what the flight recorder says of itself then."""
    for snapshot in visits:
        yield msgspec.structs.replace(snapshot, recorder=recorder.state()) if recorder else snapshot


def _handed_over(recorder: FlightRecorder | None) -> Iterator[Snapshot]:
    """Yield what an earlier life of the daemon saw, and let go of it."""
    if recorder is None:
        return
    entries = list(reversed(recorder.past))
    recorder.past = ()
    while entries:
        yield entries.pop().snapshot


def _found(past: Sequence[Entry]) -> Iterator[Sequence[ReportedFinding]]:
    """Yield what each visit found."""
    findings: Sequence[ReportedFinding] = ()
    for entry in past:
        findings = findings if entry.findings is None else entry.findings
        yield findings


def _tally_of(counted: bytes) -> Tally:
    """Return the counters as they were recorded; another version's that don't fit begin anew."""
    try:
        return msgspec.msgpack.decode(counted, type=Tally, dec_hook=lambda wanted, value: wanted(value))
    except (msgspec.DecodeError, TypeError, ValueError):
        return Tally()


def _tell(log: Any, change: Change) -> None:
    finding = change.finding.finding
    event = {
        "failure_mode": finding.failure_mode,
        "severity": severity_of(finding).word,
        "confidence": finding.confidence.word,
        "summary": plain(finding.summary),
        "gpus": [plain(uuid) for uuid in finding.subject.gpus],
        "engine": plain(finding.subject.engine),
        "caused_by": change.finding.caused_by,
    }
    if change.finding.silence is not None:
        event["silenced"] = silenced(change.finding.silence)
    tell = log.info if change.what == "cleared" or "silenced" in event else log.warning
    tell(f"finding {change.what}", **event)


def _tell_of_source(log: Any, change: SourceChange) -> None:
    if change.why is None:
        log.info("source seen again", source=change.source.value)
    elif change.why.why is Why.NOT_PRESENT:
        log.info("source not present", source=change.source.value, why=plain(str(change.why)))
    else:
        log.warning("source unseen", source=change.source.value, why=plain(str(change.why)))


def _log() -> Any:
    """Return a logger that writes one JSON object a line to standard error."""
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )


@contextmanager
def _told_to_let_go(access: GpuAccess | None, folder: Path | None, log: Any) -> Generator[None]:
    """Let SIGUSR1 have the GPUs let go and SIGUSR2 have them taken up again, and whoever asks at the socket."""
    if access is None:
        yield
        return

    def told(number: int, _frame: object) -> None:  # in a thread: NVML's child takes its time to end
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            threading.Thread(target=access.release, args=(HOLD_SECONDS, name), daemon=True).start()
        else:
            threading.Thread(target=access.retake, args=(name,), daemon=True).start()

    access.tell = log.info
    before = {one: signal.signal(one, told) for one in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        with ExitStack() as leaving:
            if folder is not None:
                leaving.enter_context(control(folder, access, log))
            yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _ended_by_signals() -> Generator[None]:
    """Turn the first SIGTERM or SIGINT into KeyboardInterrupt, so that feeds are closed on the way out."""
    ends = (signal.SIGTERM, signal.SIGINT)

    def end(_number: int, _frame: object) -> NoReturn:
        for one in ends:
            signal.signal(one, signal.SIG_IGN)  # a second one must not break off the closing
        raise KeyboardInterrupt

    before = {one: signal.signal(one, end) for one in ends}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
