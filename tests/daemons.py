"""Daemons that run as programs of their own, and how to speak to them."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = str(Path(__file__).parent / "served.py")
"""A daemon over hand-made visits."""

PATIENCE_SECONDS = 20.0


class Daemon:
    """A daemon that runs as a program of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, object]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        bound = str(self.await_event("listening")["address"])
        self.host, _, port = bound.rpartition(":")
        self.host, self.port = self.host.strip("[]"), int(port)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(_event(line))

    def await_event(self, name: str, number: int = 1) -> dict[str, object]:
        found = await_true(lambda: [e for e in self.log if e["event"] == name][number - 1 : number])
        return found[0]

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask(path, method, {k.replace("_", "-"): v for k, v in headers.items()})

    def ask(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None, tls: ssl.SSLContext | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        if tls is None:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        else:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=10, context=tls)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        return code


def _event(line: str) -> dict[str, object]:
    """A line of the daemon's log; one that is no JSON, or torn when the daemon was killed, is an event of that text."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {"event": line}


def await_true(ask: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> object:
    until = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return answer


@contextmanager
def running(*arguments: str) -> Iterator[Daemon]:
    daemon = Daemon(*arguments)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.end()
        assert daemon.process.stderr is not None
        daemon.process.stderr.close()


class Place(NamedTuple):
    """An address of this machine."""

    host: str
    port: int


def free_place() -> Place:
    """Return an address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Place(*probe.getsockname())


@contextmanager
def prometheus(
    folder: Path,
    jobs: Mapping[str, tuple[Daemon | Place, str]],
    more: str = "",
    labels: Mapping[str, str] | None = None,
) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Run a real Prometheus that scrapes daemons each second; the value asks it a query.

    *jobs*: by name the daemon, and what more Prometheus' configuration says of it; *more*: what it says besides;
    *labels*: its external labels.
    The first scrape comes after 5 s, which is a constant of Prometheus.
    """
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{evaluation_interval: 200ms, external_labels: {json.dumps(labels or {})}}}\n{more}scrape_configs:\n"
        + "".join(
            f"  - job_name: {name}\n"
            "    scrape_interval: 1s\n"
            "    scrape_timeout: 1s\n"
            f"    static_configs: [{{targets: ['{daemon.host}:{daemon.port}']}}]\n" + textwrap.indent(more, "    ")
            for name, (daemon, more) in jobs.items()
        )
    )
    place = free_place()
    arguments = (
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={place.host}:{place.port}",
        "--scrape.discovery-reload-interval=100ms",  # else the first scrape may take 10 s to come
        "--rules.alert.resend-delay=200ms",
    )
    with _running(folder / "prometheus.log", "prometheus", *arguments):

        def asked(query: str) -> list[dict[str, Any]]:
            answer = _json_of(place, "/api/v1/query?" + urllib.parse.urlencode({"query": query})) or {}
            return answer.get("data", {}).get("result", [])

        yield asked


ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
"""Debian's name, and that of the project."""


@contextmanager
def alertmanager(folder: Path, config: Path) -> Iterator[Place]:
    """Run a real Alertmanager."""
    assert ALERTMANAGER is not None
    place = free_place()
    arguments = (
        f"--config.file={config}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={place.host}:{place.port}",
        "--cluster.listen-address=",
    )
    with _running(folder / "alertmanager.log", ALERTMANAGER, *arguments):
        await_true(lambda: _json_of(place, "/api/v2/status"))
        yield place


def alerts(place: Place) -> list[dict[str, Any]]:
    """Return the alerts that an Alertmanager holds now."""
    return _json_of(place, "/api/v2/alerts") or []


@contextmanager
def _running(log: Path, *command: str) -> Iterator[None]:
    with log.open("w") as file:
        environment = {"PATH": os.environ["PATH"], "GOMAXPROCS": "1"}
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield
        finally:
            server.terminate()
            server.wait(PATIENCE_SECONDS)


def _json_of(place: Place, path: str) -> Any:
    """Return what a server answers; None: nothing, or no JSON."""
    connection = http.client.HTTPConnection(place.host, place.port, timeout=5)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
