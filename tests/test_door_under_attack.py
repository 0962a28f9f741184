"""Slow, huge, malformed and many clients don't hurt the door: a scrape goes through while they try."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
from daemons import PROGRAM, Daemon, await_true, running
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.door import request, server
from doctor.door.address import Address
from doctor.door.server import Door
from exporters.prometheus import Tally


class Log:
    """What a door logs."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **facts: object) -> None:
        self.events.append((event, facts))

    error = warning = info


class Opened:
    """A door in this process."""

    def __init__(self, door: Door, address: Address, log: Log) -> None:
        self.door, self.address, self.log = door, (address.host, address.port), log

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(self.address, timeout=10, source_address=(source, 0))

    def status(self, raw: bytes) -> int | None:
        """Return the status of the answer to these bytes; None: the connection was ended without one."""
        with self.connect() as client, contextlib.suppress(OSError):
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(65536)
            return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None
        return None

    def scrape(self, source: str = "127.0.0.1") -> None:
        """Ask for the metrics, with Prometheus' patience."""
        connection = http.client.HTTPConnection(*self.address, timeout=10, source_address=(source, 0))
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        assert b"gpu_doctor_verdict" in response.read()
        connection.close()

    def dropped(self, reason: str) -> int:
        return self.door._server.dropped[reason]


@contextlib.contextmanager
def opened() -> Iterator[Opened]:
    log = Log()
    door = Door(Address("127.0.0.1", 0), Tally(), interval_seconds=600, version="0.0.0", log=log)
    with door.opened() as bound:
        door.show(reports.lost_gpu())
        yield Opened(door, bound, log)


@pytest.fixture
def door() -> Iterator[Opened]:
    with opened() as it:
        yield it


@pytest.fixture(scope="module")
def lasting() -> Iterator[Opened]:
    with opened() as it:
        yield it


GOOD = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
        (b"\r\nGET /healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET /healthz?x=1 HTTP/1.1\r\nA: 1\r\nA: 2\r\n\r\n", 200),
        (b"BREW / HTTP/1.1\r\n\r\n", 405),
        (b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"get /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /me\x00trics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nName : value\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: b\r\n continued\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: \x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40, None),
    ],
)
def test_a_malformed_request_gets_its_status_and_no_more(lasting: Opened, raw: bytes, status: int | None) -> None:
    assert lasting.status(raw) == status


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_hurt(lasting: Opened, noise: bytes, ended: bool) -> None:
    status = lasting.status(noise + b"\r\n\r\n" * ended)
    assert status in (None, 200, 400, 404, 405)
    assert not lasting.log.events


@settings(max_examples=150)
@given(st.binary(max_size=300))
def test_any_head_is_read_or_refused(head: bytes) -> None:
    for raw in (head, b"GET / HTTP/1.1\r\n" + head, b"GET / HTTP/1.1\r\nAccept: " + head):
        with contextlib.suppress(request.RefusedError):
            assert request.read(raw).method


@settings(max_examples=150)
@given(st.text(max_size=80))
def test_any_accept_header_has_an_answer(header: str) -> None:
    assert request.accepted(header, ("text/plain", "a/b")) in ("text/plain", "a/b", None)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "openmetrics"),
        ("text/plain;version=0.0.4;q=0.5, application/openmetrics-text;q=0.2", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;q=0, */*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=0.0.1;q=0.75,application/openmetrics-text;version=1.0.0", "openmetrics"),
        ("image/png", None),
    ],
)
def test_the_format_that_is_wanted_most_is_given(header: str, wanted: str | None) -> None:
    offered = ("text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0")
    given_ = request.accepted(header, offered)
    assert given_ == (offered[1] if wanted == "openmetrics" else wanted)


def test_a_connection_serves_many_requests_and_what_follows_a_body_is_no_request(door: Opened) -> None:
    connection = http.client.HTTPConnection(*door.address, timeout=10)
    for _ in range(20):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
    connection.request("GET", "/healthz", body=GOOD)
    response = connection.getresponse()
    assert (response.status, response.headers["connection"]) == (200, "close")
    connection.close()


def test_a_client_that_asks_drop_by_drop_is_shown_out(door: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with door.connect() as slow:

        def is_shown_out() -> bool:
            with contextlib.suppress(OSError):
                slow.sendall(b"G")
            return door.dropped("slow") == 1

        await_true(is_shown_out)


def test_an_idle_connection_is_ended_in_time(door: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    with door.connect() as silent:
        assert silent.recv(1) == b""


def test_a_client_that_takes_no_answer_is_shown_out(door: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(door.address)
        with contextlib.suppress(OSError):
            greedy.sendall(GOOD * 200)
        await_true(lambda: door.dropped("slow") == 1)


def test_a_crowd_of_slow_clients_does_not_keep_a_scrape_out(door: Opened) -> None:
    """Twenty times as many as there is room for, none of them ever finishing its request."""
    crowd: list[socket.socket] = []
    try:
        for n in range(20 * server.GUESTS_MAX):
            client = door.connect()
            with contextlib.suppress(OSError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            crowd.append(client)
            if n % 200 == 199:
                door.scrape()
        # The last of the crowd may still wait in the kernel's queue when the loop above ends.
        await_true(lambda: door.dropped("crowded-out") >= 18 * server.GUESTS_MAX)
    finally:
        for client in crowd:
            client.close()


def test_a_crowd_from_one_host_costs_a_quiet_client_of_another_nothing(door: Opened) -> None:
    with door.connect("127.0.0.2") as quiet:
        crowd = [door.connect() for _ in range(3 * server.GUESTS_MAX)]
        try:
            quiet.sendall(GOOD)
            assert quiet.recv(15) == b"HTTP/1.1 200 OK"
        finally:
            for client in crowd:
                client.close()


def resident_kb(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def hammer(daemon: Daemon, until: threading.Event, blows: list[int]) -> None:
    """Do everything at once that a bad client does, until told to stop."""
    noises = (GOOD * 50, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 50_000, b"GET /report HTTP/1.1\r\nA: ", b"")
    n = 0
    while not until.is_set():
        n += 1
        with contextlib.suppress(OSError), socket.create_connection((daemon.host, daemon.port), timeout=2) as client:
            client.sendall(noises[n % len(noises)])
            if n % 3 == 0:
                client.settimeout(0.1)
                client.recv(1000)
        blows.append(n)


def test_memory_and_descriptors_are_flat_under_attack_and_scrapes_go_through() -> None:
    with running(PROGRAM, "lost", "0.2") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        until = threading.Event()
        blows: list[int] = []
        attackers = [threading.Thread(target=hammer, args=(daemon, until, blows)) for _ in range(4)]
        for attacker in attackers:
            attacker.start()
        try:
            await_true(lambda: len(blows) > 150)
            before = resident_kb(daemon)
            for number in range(200, 700, 50):
                assert daemon.get("/metrics")[0] == 200, "within Prometheus' patience"
                await_true(lambda number=number: len(blows) > number)
            after = resident_kb(daemon)
        finally:
            until.set()
            for attacker in attackers:
                attacker.join()
        assert after - before < 6_000, "kB"
        fds = Path(f"/proc/{daemon.process.pid}/fd")
        await_true(lambda: len(list(fds.iterdir())) < 20)
        assert daemon.end() == 0
        assert {e["event"] for e in daemon.log} <= {"listening", "finding appeared", "closed", "ended"}


def test_running_out_of_descriptors_ends_nothing() -> None:
    with running("-c", LIMITED, PROGRAM, "lost", "0.2") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        crowd = [socket.create_connection((daemon.host, daemon.port)) for _ in range(40)]
        assert daemon.get("/healthz")[0] == 200
        for client in crowd:
            client.close()
        assert daemon.end() == 0


LIMITED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
runpy.run_path(sys.argv[0], run_name='__main__')
"""
