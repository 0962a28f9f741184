"""Daemons that run as programs of their own, and how to speak to them."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
            self.log.append(json.loads(line) if line.startswith("{") else {"event": line})

    def await_event(self, name: str, number: int = 1) -> dict[str, object]:
        found = await_true(lambda: [e for e in self.log if e["event"] == name][number - 1 : number])
        return found[0]

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        return code


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
