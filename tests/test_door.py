"""The door: what is served, while it is fresh, and to whom."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import reports
from daemons import PROGRAM, Daemon, await_true, prometheus, running
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from doctor.door.address import Address, DoorError, address
from doctor.door.board import Board
from doctor.door.desk import WANTED_SECONDS, Desk, Form, Press, Shown
from doctor.rule import Evidence
from doctor.snapshot import Absent, Source, Unseen, Why
from exporters import html
from exporters.prometheus import OPENMETRICS, Family, Own, Tally, Writer, families


@pytest.fixture(scope="module")
def lost() -> Iterator[Daemon]:
    with running(PROGRAM, "lost", "0.2") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        yield daemon


def test_the_metrics_page_tells_the_finding(lost: Daemon) -> None:
    status, headers, body = lost.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    (finding,) = families["gpu_doctor_finding"].samples
    assert (finding.labels["failure_mode"], finding.labels["gpu"]) == ("gpu-lost", "2")


def test_openmetrics_and_gzip_are_given_to_those_who_ask(lost: Daemon) -> None:
    _, headers, body = lost.get(
        "/metrics", Accept="application/openmetrics-text; version=1.0.0", Accept_Encoding="gzip"
    )
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert headers["content-encoding"] == "gzip"
    assert int(headers["content-length"]) == len(body)
    assert gzip.decompress(body).endswith(b"# EOF\n")


def test_the_report_is_the_json_of_check(lost: Daemon) -> None:
    status, headers, body = lost.get("/report")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["findings"][0]["failure_mode"] == "gpu-lost"


@pytest.mark.parametrize("path", ["//", "/metrics/", "/report.json", "/%6detrics", "/../etc/passwd"])
def test_other_paths_are_not_there(lost: Daemon, path: str) -> None:
    status, _, body = lost.get(path)
    assert status == 404
    assert b"/, /metrics, /healthz and /report" in body


def test_a_query_does_not_matter_and_a_head_has_no_body(lost: Daemon) -> None:
    assert lost.get("/metrics?name[]=up")[0] == 200
    assert lost.get("/healthz", "HEAD")[0::2] == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        status, headers, _ = lost.get("/metrics", method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_client_that_sends_garbage_or_leaves_does_no_harm(lost: Daemon) -> None:
    for garbage in (b"\x00" * 100, b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=x\r\n\r\n"):
        with socket.create_connection((lost.host, lost.port)) as client:
            client.sendall(garbage)
    with socket.create_connection((lost.host, lost.port)):
        assert lost.get("/healthz")[0] == 200


def test_what_is_stale_is_served_no_more() -> None:
    with running(PROGRAM, "lost,stop", "0.3") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        await_true(lambda: daemon.get("/healthz")[0] == 503)
        assert b"the last report is" in daemon.get("/healthz")[2]
        page = daemon.get("/metrics")[2].decode()
        assert "gpu_doctor_build_info" in page
        assert "gpu_doctor_finding" not in page
        assert "celsius" not in page
        assert daemon.get("/report")[0] == 503


def test_a_port_that_is_taken_is_said_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, PROGRAM, "clear", "1", f"127.0.0.1:{port}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr == f"can't listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("text", "made"),
    [("127.0.0.1:9481", Address("127.0.0.1", 9481)), ("[::1]:0", Address("::1", 0)), ("node:1", Address("node", 1))],
)
def test_addresses(text: str, made: Address) -> None:
    assert address(text) == made
    assert str(made) == text


@pytest.mark.parametrize("text", ["", "9481", ":9481", "host:", "host:port", "host:70000", "host:-1", "host:٣"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(DoorError, match="no address to listen on"):
        address(text)


def test_a_report_is_fresh_for_three_intervals() -> None:
    now = 100.0
    board = Board(15.0, clock=lambda: now)
    assert board.fresh() is None
    assert board.age_seconds() is None
    report = reports.clear()
    board.put(report)
    now += 45.0
    assert board.fresh() is report
    now += 0.1
    assert board.fresh() is None
    board.put(report)
    assert board.fresh() is report


def test_a_page_is_made_in_the_forms_that_were_asked_for_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    made: list[object] = []
    press = Press(clock=lambda: now)
    report = reports.clear()
    told = tuple(families(report, Tally(), Own(version="0")))
    really = Writer.page

    def page(writer: Writer, families: Iterable[Family]) -> bytes:
        made.append(writer)
        return really(writer, families)

    monkeypatch.setattr(Writer, "page", page)
    shown = Shown(report, told, press, "0")
    assert not made, "nobody asked yet"
    form = Form(OPENMETRICS, zipped=True)
    press.ask(form)
    first = shown.metrics(form)
    assert (gzip.decompress(first)[-6:], len(made)) == (b"# EOF\n", 1)
    shown = Shown(report, told, press, "0")
    assert len(made) == 2, "made ready"
    assert (shown.metrics(form), len(made)) == (first, 2)
    now += WANTED_SECONDS + 1
    Shown(report, told, press, "0")
    assert len(made) == 2, "forgotten"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on this machine")
def test_a_real_prometheus_scrapes_the_daemon(tmp_path: Path, lost: Daemon) -> None:
    """Debian's Prometheus reads the page every second; the finding is asked back over its API."""
    with prometheus(tmp_path, {"gpu-doctor": (lost, "")}) as asked:
        (finding,) = await_true(lambda: asked('gpu_doctor_finding{failure_mode="gpu-lost"}'))  # type: ignore[misc]
        assert finding["metric"]["uuid"] == reports.uuid(2)
        assert finding["metric"]["severity"] == "critical"
        (up,) = asked('up{job="gpu-doctor"}')
        assert up["value"][1] == "1"
        assert len(asked("gpu_doctor_gpu_temperature_celsius")) == 3, "the lost GPU has no temperature"


def test_a_fault_is_a_metric_one_visit_later() -> None:
    with running(PROGRAM, "clear,clear,clear,lost", "0.3") as daemon:

        def is_told() -> bool:
            """Whether the fault of the fourth visit is on the page; it is there when that visit is, and not before."""
            page = daemon.get("/metrics")[2]
            found = b'failure_mode="gpu-lost"' in page
            if b"\ngpu_doctor_report_timestamp_seconds " in page:
                visits = page.partition(b"\ngpu_doctor_visits_total ")[2].partition(b"\n")[0]
                assert found == (float(visits) >= 4)
            return found

        await_true(is_told)


def test_the_page_for_people_shows_the_report_and_runs_nothing(lost: Daemon) -> None:
    status, headers, body = lost.get("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    text = body.decode()
    assert "<script" not in text
    assert "A GPU has fallen off the bus" in text
    assert "gpu-doctor explain gpu-lost" in text
    assert 'href="/report"' in text


NOT_GIVEN = Unseen(Source.NVML, Absent(Why.NOT_PRESENT, "no NVIDIA driver is loaded"))
DENIED = Unseen(Source.KERNEL_LOG, Absent(Why.NO_PERMISSION, "/dev/kmsg"))


@pytest.mark.parametrize(
    ("unseen", "optional", "why"),
    [
        ((), frozenset[Source](), None),
        ((NOT_GIVEN,), frozenset[Source](), None),
        ((NOT_GIVEN, DENIED), frozenset[Source](), "blind: NVML ("),
        ((NOT_GIVEN, DENIED), frozenset({Source.KERNEL_LOG}), "blind: NVML ("),
        ((NOT_GIVEN, DENIED), frozenset({Source.KERNEL_LOG, Source.NVML}), None),
    ],
)
def test_a_daemon_that_sees_nothing_that_matters_is_not_healthy(
    unseen: tuple[Unseen, ...], optional: frozenset[Source], why: str | None
) -> None:
    blind = {each.source for each in unseen}
    visit = reports.snapshot(
        (), engines=(), unseen=unseen, seen=tuple(source for source in Source if source not in blind)
    )
    desk = Desk(Board(15.0), Tally(), lambda: Own(version="0"), optional)
    assert "no report yet" in (desk.why_ill() or "")
    desk.show(reports.report(visit))
    said = desk.why_ill()
    assert said is None if why is None else said is not None and said.startswith(why) and "no NVIDIA driver" in said


def test_hostile_text_stays_text_on_the_page() -> None:
    page = html.render(reports.hostile(), "0.0.0").decode()
    body = page.partition("<body>")[2]
    assert "<b> " not in body
    assert "&lt;b&gt;" in body
    assert all(character.isprintable() or character == "\n" for character in page)


ELEMENTS = set(
    re.findall(
        r"[a-z1-6]+",
        """html head meta title style body main header footer nav section div p h1 h2 h3
    b a span ul ol li code details summary""",
    )
)


@given(st.text(max_size=60))
def test_no_text_becomes_an_element(text: str) -> None:
    finding = msgspec.structs.replace(
        reports.LOST, summary=text, title=text, advice=(text, f"`{text}`"), evidence=(Evidence("nvml", text, text),)
    )
    names: list[str] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names.append(tag)

    page = html.render(reports.report(reports.snapshot(reports.FOUR), finding), text).decode()
    Elements().feed(page)
    assert set(names) <= ELEMENTS
