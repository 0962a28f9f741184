"""Daemons that run as programs of their own, and how to speak to them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def prometheus(folder: Path, jobs: dict[str, tuple[Daemon, str]]) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Run a real Prometheus that scrapes daemons each second; the value asks it a query.

    *jobs*: by name the daemon, and what more Prometheus' configuration says of it.
    """
    config = folder / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n"
        + "".join(
            f"  - job_name: {name}\n"
            "    scrape_interval: 1s\n"
            "    scrape_timeout: 1s\n"
            f"    static_configs: [{{targets: ['{daemon.host}:{daemon.port}']}}]\n" + textwrap.indent(more, "    ")
            for name, (daemon, more) in jobs.items()
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--scrape.discovery-reload-interval=100ms",  # else the first scrape takes 5 s to come
            ],
            stdout=log, stderr=log, env={"PATH": os.environ["PATH"], "GOMAXPROCS": "1"},
        )  # fmt: skip

        def asked(query: str) -> list[dict[str, Any]]:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
                body = connection.getresponse().read()
                connection.close()
            except OSError:
                return []
            return json.loads(body).get("data", {}).get("result", []) if body.startswith(b"{") else []

        try:
            yield asked
        finally:
            server.terminate()
            server.wait(PATIENCE_SECONDS)
