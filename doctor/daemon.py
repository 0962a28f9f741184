"""The daemon: walks the one path for ever, shows each report at the door, and logs each finding that comes, changes or goes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
import structlog

from doctor.diagnose import watch
from doctor.door.address import Address
from doctor.door.server import Door
from doctor.report import ReportedFinding
from doctor.rule import AnyRule
from doctor.silence import Silence
from doctor.snapshot import Snapshot, Source
from exporters.prometheus import Tally
from exporters.wording import plain, severity_of, silenced


class Change(msgspec.Struct, frozen=True):
    """A finding that appeared, changed or cleared between two reports."""

    what: Literal["appeared", "changed", "cleared"]
    finding: ReportedFinding


def changes(before: Sequence[ReportedFinding], after: Sequence[ReportedFinding]) -> Iterator[Change]:
    """Yield what is different, in the order of the report; what cleared comes last.

    A finding is the same while its failure mode and its subject are, or overlap; it changes when its severity,
    confidence, subject, causes or silence do. Its sentence may tell new numbers at every visit: that is no change.
    """
    left = list(before)
    for now in after:
        was = next((old for old in left if _same_subject(old, now)), None)
        was = was or next((old for old in left if _may_be_the_same(old, now)), None)
        if was is None:
            yield Change("appeared", now)
            continue
        left.remove(was)
        if _character(was) != _character(now):
            yield Change("changed", now)
    yield from (Change("cleared", old) for old in left)


def _same_subject(one: ReportedFinding, other: ReportedFinding) -> bool:
    a, b = one.finding, other.finding
    return (a.failure_mode, a.subject) == (b.failure_mode, b.subject)


def _may_be_the_same(one: ReportedFinding, other: ReportedFinding) -> bool:
    a, b = one.finding, other.finding
    return a.failure_mode == b.failure_mode and a.subject.overlaps(b.subject)


def _character(reported: ReportedFinding) -> tuple[object, ...]:
    finding = reported.finding
    return (severity_of(finding), finding.confidence, finding.subject, reported.caused_by, reported.silence)


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
) -> None:
    """Judge every visit and serve the last report until SIGTERM or SIGINT. Raises DoorError where it can't."""
    log, tally = _log(), Tally()
    door = Door(
        listen,
        tally,
        interval_seconds=interval_seconds,
        version=version,
        log=log,
        optional=optional,
        web_config=web_config,
    )
    before: tuple[ReportedFinding, ...] = ()
    try:
        with _ended_by_signals(), closing(visits), door.opened() as bound:
            log.info("listening", address=str(bound), version=version)
            for report in watch(visits, rules, keep_seconds, optional, silences):
                tally.add(report)
                door.show(report)
                for change in changes(before, report.findings):
                    _tell(log, change)
                before = report.findings
    except KeyboardInterrupt:
        log.info("ended", visits=tally.visits)


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
