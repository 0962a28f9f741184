"""What the service manager hears: from a real socket, of a daemon that runs as a program of its own."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import PROGRAM, running

from doctor.notify import STATUS_BYTES, ServiceManager


class Listener:
    """A service manager's end of the socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.socket.settimeout(20)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(65536).decode().splitlines())

    def heard_within(self, seconds: float) -> list[dict[str, str]]:
        self.socket.settimeout(seconds)
        heard = []
        try:
            while True:
                heard.append(self.next())
        except TimeoutError:
            return heard


@contextmanager
def listening(path: str) -> Iterator[Listener]:
    listener = Listener(path)
    with listener.socket:
        yield listener


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with listening(path) as listener:
        yield listener


def test_it_is_ready_after_the_first_report_then_fed_by_each_visit_and_says_that_it_ends(listener: Listener) -> None:
    with running(PROGRAM, "clear,lost", "0.1") as daemon:
        assert listener.next() == {"STATUS": "first visit"}
        first = listener.next()
        assert first["READY"] == "1"
        assert first["STATUS"].startswith("clear: ")
        second = listener.next()
        assert (second["WATCHDOG"], "READY" in second) == ("1", False)
        assert second["STATUS"].startswith("critical: ")
        assert second["STATUS"].isprintable()
        assert daemon.end(signal.SIGTERM) == 0
    *_, last = listener.heard_within(0.1)
    assert last["STOPPING"] == "1"


def test_visits_that_come_no_more_feed_no_watchdog_though_the_door_still_answers(listener: Listener) -> None:
    with running(PROGRAM, "clear,clear,stop", "0.1") as daemon:
        listener.next()
        assert "READY" in listener.next()
        assert "WATCHDOG" in listener.next()
        daemon.get("/")
        assert listener.heard_within(1.0) == []


def test_a_loop_that_fails_says_that_it_ends(listener: Listener) -> None:
    with running(PROGRAM, "clear,unknown", "0.1") as daemon:
        assert daemon.process.wait(20) != 0
    *_, last = listener.heard_within(0.1)
    assert last["STOPPING"] == "1"


def environment(path: str, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": path, **more}


def test_an_abstract_socket_is_found() -> None:
    name = f"gpu-doctor-test-{time.monotonic_ns()}"
    with listening("\0" + name) as listener:
        ServiceManager(15, environment("@" + name)).starting()
        assert listener.next() == {"STATUS": "first visit"}


@pytest.mark.parametrize(
    ("interval", "told", "asked"),
    [
        (15, {"WATCHDOG_USEC": "120000000"}, None),
        (60, {"WATCHDOG_USEC": "120000000"}, "180000000"),
        (60, {}, None),
        (60, {"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": "1"}, None),
    ],
    ids=["enough", "too-short", "no-watchdog", "another-process"],
)
def test_a_watchdog_too_quick_for_the_interval_is_asked_to_wait(
    interval: float, told: dict[str, str], asked: str | None, tmp_path: Path
) -> None:
    path = str(tmp_path / "notify")
    with listening(path) as listener:
        ServiceManager(interval, environment(path, **told)).visited("clear")
        assert listener.next().get("WATCHDOG_USEC") == asked


def test_a_status_is_one_line_and_bounded(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with listening(path) as listener:
        ServiceManager(15, environment(path)).visited("é\nREADY=0 " * 1000)
        heard = listener.next()
    assert set(heard) == {"READY", "STATUS"}
    assert heard["READY"] == "1"
    assert 400 < len(heard["STATUS"].encode()) <= STATUS_BYTES


@pytest.mark.parametrize("address", ["", "/nobody/listens/here", "vsock:2:1234"])
def test_where_nobody_listens_nothing_is_said_and_nothing_fails(address: str) -> None:
    manager = ServiceManager(15, {"NOTIFY_SOCKET": address})
    manager.starting()
    manager.visited("clear")
    manager.stopping()


def test_a_service_manager_that_does_not_read_holds_nobody_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doctor.notify.SEND_SECONDS", 0.01)
    path = str(tmp_path / "notify")
    with listening(path):
        manager = ServiceManager(15, environment(path))
        began = time.monotonic()
        for _ in range(50):  # far more than net.unix.max_dgram_qlen
            manager.visited("clear")
        assert time.monotonic() - began < 10
