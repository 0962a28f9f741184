"""The daemon: walks the one path for ever, serves the last report, and logs each finding that comes, changes or goes.

A request reads the last report and never the hardware. When that report is too old its values vanish.
"""

from __future__ import annotations

import gzip
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from doctor.diagnose import watch
from doctor.report import Report, ReportedFinding
from doctor.rule import AnyRule
from doctor.snapshot import Snapshot, Source
from exporters import json as json_report
from exporters.prometheus import Page, Tally
from exporters.wording import plain, severity_of

STALE_AFTER_INTERVALS = 3
"""A report older than this many intervals is shown no more. guess: one visit may be slow, one may fail."""

REQUEST_SECONDS = 10.0
"""How long a client may take to ask: Prometheus gives up after this time by default (scrape_timeout)."""


class DaemonError(Exception):
    """The daemon can't start; the message says why."""


class Address(msgspec.Struct, frozen=True):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """Parse `127.0.0.1:9481` or `[::1]:9481`. Raises DaemonError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= 0xFFFF):
        raise DaemonError(f"{text!r} is no address to listen on; 127.0.0.1:9481 is one")
    return Address(host, int(port))


class Board:
    """The last report, shown while it is fresh."""

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after = STALE_AFTER_INTERVALS * interval_seconds
        self._clock = clock
        self._last: tuple[float, Report] | None = None

    def put(self, report: Report) -> None:
        """Show this report from now on."""
        self._last = (self._clock(), report)

    def age_seconds(self) -> float | None:
        """Return how long ago the last report came; None: there was none yet."""
        return None if self._last is None else self._clock() - self._last[0]

    def fresh(self) -> Report | None:
        """Return the last report, or None where there is none or it is stale."""
        last, age = self._last, self.age_seconds()
        return last[1] if last is not None and age is not None and age <= self._stale_after else None


class Change(msgspec.Struct, frozen=True):
    """A finding that appeared, changed or cleared between two reports."""

    what: Literal["appeared", "changed", "cleared"]
    finding: ReportedFinding


def changes(before: Sequence[ReportedFinding], after: Sequence[ReportedFinding]) -> Iterator[Change]:
    """Yield what is different, in the order of the report; what cleared comes last.

    A finding is the same while its failure mode and its subject are, or overlap; it changes when its severity,
    confidence, subject or causes do. Its sentence may tell new numbers at every visit: that is no change.
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
    return (severity_of(finding), finding.confidence, finding.subject, reported.caused_by)


def run(  # the one function that ties feed, path, page and log together
    visits: Generator[Snapshot, None, None],
    rules: Sequence[AnyRule],
    *,
    listen: Address,
    interval_seconds: float,
    keep_seconds: float,
    version: str,
    optional: frozenset[Source] = frozenset(),
) -> None:
    """Judge every visit and serve the last report until SIGTERM or SIGINT. Raises DaemonError where it can't listen."""
    log = _log()
    board, tally = Board(interval_seconds), Tally()
    registry = CollectorRegistry()
    registry.register(Page(board.fresh, tally, version))
    before: tuple[ReportedFinding, ...] = ()
    try:
        with _ended_by_signals(), closing(visits), _serving(_Server(listen, board, registry, log)) as bound:
            log.info("listening", address=str(bound), version=version)
            for report in watch(visits, rules, keep_seconds, optional):
                tally.add(report)
                board.put(report)
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
    tell = log.info if change.what == "cleared" else log.warning
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


class _Server(ThreadingHTTPServer):
    """Listens. Raises DaemonError where it can't."""

    daemon_threads = True

    def __init__(self, listen: Address, board: Board, registry: CollectorRegistry, log: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self.board = board
        self.registry = registry
        self.log = log
        try:
            super().__init__((listen.host, listen.port), _Requests)
        except OSError as e:
            raise DaemonError(f"can't listen on {listen}: {e.strerror or e}") from e
        self.bound = Address(listen.host, self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's signature
        """Log what went wrong in an answer; a client that went away is no event of ours."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.log.error("request failed", error=plain(repr(error)))


@contextmanager
def _serving(server: _Server) -> Generator[Address]:
    """Answer requests in the background; the value is the address with the port that was bound."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True)
    thread.start()
    try:
        yield server.bound
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


TEXT = "text/plain; charset=utf-8"


class _Requests(BaseHTTPRequestHandler):
    """Answers `/metrics`, `/healthz` and `/report`, and nothing else."""

    timeout = REQUEST_SECONDS
    server_version = "gpu-doctor"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        assert isinstance(self.server, _Server)
        answers = {"/metrics": self._metrics, "/healthz": self._health, "/report": self._report}
        answer = answers.get(urlsplit(self.path).path)
        if answer is None:
            self._send(HTTPStatus.NOT_FOUND, TEXT, b"gpu-doctor serves /metrics, /healthz and /report\n")
        else:
            answer(self.server)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _metrics(self, server: _Server) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._send(HTTPStatus.OK, content_type, encode(server.registry))

    def _health(self, server: _Server) -> None:
        age = server.board.age_seconds()
        if server.board.fresh() is not None:
            self._send(HTTPStatus.OK, TEXT, b"ok\n")
        else:
            last = "no report yet" if age is None else f"the last report is {age:.0f} s old"
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{last}\n".encode())

    def _report(self, server: _Server) -> None:
        report = server.board.fresh()
        if report is None:
            self._health(server)
        else:
            self._send(HTTPStatus.OK, "application/json", json_report.render(report))

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        zipped = gzip_accepted(self.headers.get("Accept-Encoding", ""))
        body = gzip.compress(body, compresslevel=1) if zipped else body
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Vary", "Accept, Accept-Encoding")
        if zipped:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Say nothing: a scrape every few seconds is no event."""
