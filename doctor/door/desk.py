"""The desk: answers a request from the last report, and never touches the hardware."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from http import HTTPStatus

import msgspec

from doctor.door.board import Board
from doctor.door.request import Request, accepted
from doctor.report import Report, essential_sources
from doctor.snapshot import Snapshot, Source
from exporters import html
from exporters import json as json_report
from exporters.prometheus import OPENMETRICS, TEXT, Family, Own, Tally, Writer, families
from exporters.wording import SOURCE_NAMES, listed, plain

PLAIN = "text/plain; charset=utf-8"

WANTED_SECONDS = 300.0
"""How long a form of the metrics counts as wanted: Prometheus' own patience with a series (its lookback delta)."""

SAFE = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "deny",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What every answer says to browsers and proxies, unless the web configuration says otherwise."""


class Answer(msgspec.Struct, frozen=True):
    """What is sent back."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


def sentence(status: HTTPStatus, text: str, **headers: str) -> Answer:
    """Return an answer of one line; underscores in the names of headers are hyphens."""
    return Answer(
        status, PLAIN, f"{text}\n".encode(), {name.replace("_", "-"): value for name, value in headers.items()}
    )


def zipped(page: bytes) -> bytes:
    """Return a page compressed, at the level that costs least."""
    return gzip.compress(page, compresslevel=1, mtime=0)


class Form(msgspec.Struct, frozen=True):
    """How the metrics can be had."""

    content_type: str
    zipped: bool


class Press:
    """Makes pages of metrics in the forms that clients want. The visits and the door share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._writers = {TEXT: Writer(TEXT), OPENMETRICS: Writer(OPENMETRICS)}
        self._lock = threading.Lock()  # a writer remembers its last page
        self._asked_at: dict[Form, float] = {}

    def page(self, families: Sequence[Family], content_type: str) -> bytes:
        """Return a page of these metrics."""
        with self._lock:
            return self._writers[content_type].page(families)

    def ask(self, form: Form) -> None:
        """Take note that somebody wants pages of this form."""
        self._asked_at[form] = self._clock()

    def wanted(self) -> tuple[Form, ...]:
        """Return the forms that were asked for of late: they are made ready before somebody asks again."""
        since = self._clock() - WANTED_SECONDS
        return tuple(form for form, at in tuple(self._asked_at.items()) if at >= since)


class Shown:
    """What is made of one report: of the metrics the forms that are wanted, the rest when somebody asks for it."""

    def __init__(self, report: Report, families: tuple[Family, ...], press: Press, version: str) -> None:
        self.report = report
        self._families = families
        self._press = press
        self._version = version
        self._pages: dict[Form, bytes] = {}
        for form in press.wanted():
            self.metrics(form)

    def metrics(self, form: Form) -> bytes:
        """Return the metrics in one form."""
        page = self._pages.get(form)
        if page is None:
            if form.zipped:
                page = zipped(self.metrics(Form(form.content_type, zipped=False)))
            else:
                page = self._press.page(self._families, form.content_type)
            self._pages[form] = page
        return page

    @cached_property
    def json(self) -> bytes:
        """The report as `check --format json` prints it."""
        return json_report.render(self.report)

    @cached_property
    def html(self) -> bytes:
        """The report for a browser."""
        return html.render(self.report, self._version)


class Desk:
    """Shows reports, and answers requests from the last one while it is fresh."""

    def __init__(
        self, board: Board[Shown], tally: Tally, own: Callable[[], Own], optional: frozenset[Source] = frozenset()
    ) -> None:
        self._board = board
        self._tally = tally
        self._own = own
        self._optional = optional
        self._press = Press()

    def show(self, report: Report) -> None:
        """Answer from this report from now on."""
        own = self._own()
        told = tuple(families(report, self._tally, own))
        self._board.put(Shown(report, told, self._press, own.version))

    def why_ill(self) -> str | None:
        """Return why the daemon does not judge this node, in a sentence; None: it does."""
        shown, age, interval = self._board.fresh(), self._board.age_seconds(), self._board.interval_seconds
        if age is None:
            return "no report yet: the first visit has not ended"
        if shown is None:
            return f"the last report is {age:.0f} s old, and one is due every {interval:g} s"
        return _blindness(shown.report.snapshot, self._optional)

    def answer(self, request: Request) -> Answer:
        """Return the answer to a request of somebody who may come in."""
        answers = {"/": self._page, "/metrics": self._metrics, "/healthz": self._health, "/report": self._report}
        answer = answers.get(request.path)
        if answer is None:
            return sentence(HTTPStatus.NOT_FOUND, "gpu-doctor serves /, /metrics, /healthz and /report")
        if request.method not in ("GET", "HEAD"):
            return sentence(HTTPStatus.METHOD_NOT_ALLOWED, "gpu-doctor only shows: GET and HEAD", Allow="GET, HEAD")
        return answer(request)

    def _metrics(self, request: Request) -> Answer:
        kind = accepted(request.headers.get("accept", ""), (TEXT, OPENMETRICS)) or TEXT
        coding = accepted(request.headers.get("accept-encoding", "identity"), ("gzip", "identity"))
        form = Form(kind, zipped=coding == "gzip")
        shown = self._board.fresh()
        if shown is None:  # only what the daemon knows of itself is left, and that as of now
            # Before the first report, the counters are those on record: a visit behind what an earlier life of the
            # daemon may have shown. A counter that goes back would count everything once more.
            counted = None if self._board.age_seconds() is None else self._tally
            page = Writer(kind).page(families(None, counted, self._own()))
            page = zipped(page) if form.zipped else page
        else:
            self._press.ask(form)
            page = shown.metrics(form)
        coded = {"Content-Encoding": "gzip"} if form.zipped else {}
        return Answer(HTTPStatus.OK, kind, page, {"Vary": "Accept, Accept-Encoding", **coded})

    def _health(self, request: Request) -> Answer:  # noqa: ARG002 - like the others
        ill = self.why_ill()
        return sentence(HTTPStatus.OK, "ok") if ill is None else sentence(HTTPStatus.SERVICE_UNAVAILABLE, ill)

    def _report(self, request: Request) -> Answer:
        shown = self._board.fresh()
        return self._health(request) if shown is None else Answer(HTTPStatus.OK, "application/json", shown.json)

    def _page(self, request: Request) -> Answer:  # noqa: ARG002 - like the others
        shown = self._board.fresh()
        if shown is None:
            status, body = (
                HTTPStatus.SERVICE_UNAVAILABLE,
                html.render_nothing(self.why_ill() or "", self._own().version),
            )
        else:
            status, body = HTTPStatus.OK, shown.html
        return Answer(status, "text/html; charset=utf-8", body, {"Content-Security-Policy": html.POLICY})


def _blindness(snapshot: Snapshot, optional: frozenset[Source]) -> str | None:
    """Return why nothing of what matters could be seen; None: something was."""
    essential = [source for source in Source if source in essential_sources(snapshot) - optional]
    blind = [(source, why) for source in essential if (why := snapshot.why_unseen(source)) is not None]
    if not essential or len(blind) < len(essential):
        return None
    return f"blind: {listed(f'{SOURCE_NAMES[source]} ({plain(str(why))})' for source, why in blind)} could not be seen"
