"""The server: answers a request from the last report, and never touches the hardware."""

from __future__ import annotations

import gzip
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from doctor.door.address import Address, DoorError
from doctor.door.board import Board
from doctor.report import Report
from exporters import json as json_report
from exporters.prometheus import Page, Tally
from exporters.wording import plain

REQUEST_SECONDS = 10.0
"""How long a client may take to ask: Prometheus gives up after this time by default (scrape_timeout)."""


class Door:
    """Serves the last report that it was shown."""

    def __init__(self, listen: Address, tally: Tally, *, interval_seconds: float, version: str, log: Any) -> None:
        self._listen = listen
        self._board = Board(interval_seconds)
        self._registry = CollectorRegistry()
        self._registry.register(Page(self._board.fresh, tally, version))
        self._log = log

    def show(self, report: Report) -> None:
        """Serve this report from now on."""
        self._board.put(report)

    @contextmanager
    def opened(self) -> Generator[Address]:
        """Answer requests in the background; the value is the address with the port that was bound. Raises DoorError."""
        server = _Server(self._listen, self._board, self._registry, self._log)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True)
        thread.start()
        try:
            yield server.bound
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    """Listens. Raises DoorError where it can't."""

    daemon_threads = True

    def __init__(self, listen: Address, board: Board, registry: CollectorRegistry, log: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self.board = board
        self.registry = registry
        self.log = log
        try:
            super().__init__((listen.host, listen.port), _Requests)
        except OSError as e:
            raise DoorError(f"can't listen on {listen}: {e.strerror or e}") from e
        self.bound = Address(listen.host, self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - socketserver's signature
        """Log what went wrong in an answer; a client that went away is no event of ours."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.log.error("request failed", error=plain(repr(error)))


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
