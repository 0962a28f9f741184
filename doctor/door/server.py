"""The server: one thread, one event loop, few guests at a time; the guest that has waited longest makes room for a new one.

A scrape takes milliseconds, so an honest client is never the one that has waited longest, however many slow ones come.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from doctor.door import cost, login, request
from doctor.door.address import Address, DoorError
from doctor.door.board import Board
from doctor.door.desk import PLAIN, SAFE, Answer, Desk, Shown, sentence
from doctor.door.request import HEAD_BYTES_MAX, RefusedError, Request
from doctor.door.web_config import WebConfig, WebConfigFile
from doctor.report import Report
from doctor.snapshot import Source
from exporters.prometheus import Own, Tally
from exporters.wording import plain

GUESTS_MAX = 64
"""Connections at a time. guess: two Prometheus, a browser and a probe have ten; a TLS connection holds 0.3 MB."""

REQUEST_SECONDS = 10.0
"""For a handshake, for a question, and for taking the answer: Prometheus gives up after this time by default."""

IDLE_SECONDS = 75.0
"""How long a connection may wait for its next question: longer than Prometheus' default interval of a minute."""

PARTING_SECONDS = 1.0
"""How long what a client still sends is thrown away, so that the answer reaches it before the end does."""

WRITE_BYTES = 16 << 10
"""An answer goes out in such pieces; a client that takes none holds one, not a page of its own."""

FOLLOW_SECONDS = 2.0
"""How often the web configuration is looked at."""


class Door:
    """Serves the last report that it was shown. Raises DoorError where its web configuration is bad."""

    def __init__(
        self,
        listen: Address,
        tally: Tally,
        *,
        interval_seconds: float,
        version: str,
        log: Any,
        optional: frozenset[Source] = frozenset(),
        web_config: Path | None = None,
    ) -> None:
        self._listen = listen
        self._version = version
        self._optional = optional
        self._log = log
        self._board: Board[Shown] = Board(interval_seconds)
        self._desk = Desk(self._board, tally, self._own, optional)
        self._config = WebConfigFile(web_config)
        self._server = _Server(self._desk, self._config, log)
        self._started_at = time.time()
        self._loop_lag_seconds: float | None = None

    def show(self, report: Report) -> None:
        """Serve this report from now on."""
        age = self._board.age_seconds()
        self._loop_lag_seconds = None if age is None else max(0.0, age - self._board.interval_seconds)
        self._desk.show(report)

    @contextmanager
    def opened(self) -> Generator[Address]:
        """Answer requests in the background; the value is the address with the port that was bound. Raises DoorError."""
        with self._bound() as listening:
            ends = threading.Event()
            loop = asyncio.new_event_loop()
            stop = asyncio.Event()

            def serve() -> None:
                try:
                    loop.run_until_complete(self._server.serve(listening, stop))
                finally:
                    loop.close()
                    ends.set()

            thread = threading.Thread(target=serve, name="http", daemon=True)
            thread.start()
            try:
                yield Address(self._listen.host, listening.getsockname()[1])
            finally:
                with suppress(RuntimeError):  # the loop has ended by itself
                    loop.call_soon_threadsafe(stop.set)
                thread.join(2 * PARTING_SECONDS)

    def _bound(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._listen.host else socket.AF_INET
        # asyncio turns Nagle's delay off only where a socket says that it speaks TCP: 40 ms an answer
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self._listen.host, self._listen.port))
            listening.listen(128)
            listening.setblocking(False)
        except OSError as e:
            listening.close()
            raise DoorError(f"can't listen on {self._listen}: {e.strerror or e}") from e
        return listening

    def _own(self) -> Own:
        return Own(
            version=self._version,
            optional=self._optional,
            started_at=self._started_at,
            costs=cost.costs(),
            threads=cost.number_of_threads(),
            open_fds=cost.number_of_open_fds(),
            loop_lag_seconds=self._loop_lag_seconds,
            http_loop_lag_seconds=self._server.loop_lag_seconds,
            responses=dict(self._server.responses),
            dropped=dict(self._server.dropped),
            logins_failed=self._server.logins_failed if self._config.current.users else None,
            web_config_loaded=self._config.loaded,
            web_config_loaded_at=self._config.loaded_at,
        )


class _Guest:
    """A connection."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.since = time.monotonic()
        """When it came, or its last question was complete."""
        self.task: asyncio.Task[None] | None = None


class _Server:
    """Accepts, hears out and answers."""

    def __init__(self, desk: Desk, config: WebConfigFile, log: Any) -> None:
        self.responses: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter({"slow": 0, "crowded-out": 0, "no-handshake": 0})
        self.loop_lag_seconds: float | None = None
        """How much later than due the event loop last woke."""
        self._desk = desk
        self._config = config
        self._log = log
        self._guests: set[_Guest] = set()
        self._doorkeeper: login.Doorkeeper | None = None

    @property
    def logins_failed(self) -> int:
        """Requests with a wrong user or password."""
        return self._doorkeeper.failed if self._doorkeeper else 0

    async def serve(self, listening: socket.socket, stop: asyncio.Event) -> None:
        """Serve until *stop* is set."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        self._doorkeeper = login.Doorkeeper()
        tasks = {asyncio.create_task(self._accept(listening)), asyncio.create_task(self._follow())}
        await stop.wait()
        tasks |= {guest.task for guest in self._guests if guest.task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=PARTING_SECONDS)
        self._doorkeeper.close()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # noqa: ARG002 - asyncio's signature
        """Log what went wrong; a client that went away is no event of ours."""
        error = context.get("exception")
        if error is not None and not isinstance(error, OSError):
            self._log.error("request failed", error=plain(repr(error)))

    async def _follow(self) -> None:
        """Take up the web configuration when it changes; a bad one is told once and changes nothing. Watch the loop, too."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + FOLLOW_SECONDS
            await asyncio.sleep(FOLLOW_SECONDS)
            self.loop_lag_seconds = max(0.0, loop.time() - due)
            try:
                if self._config.loaded is not None and await loop.run_in_executor(None, self._config.reread):
                    self._log.info("web configuration read again")
            except DoorError as e:
                self._log.error("web configuration is bad, the one before stays in force", error=plain(str(e)))

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, peer = await loop.sock_accept(listening)
            except OSError:  # no descriptor or no memory left: one guest less, and again
                self._crowd_out_one()
                await asyncio.sleep(0.1)
                continue
            if len(self._guests) >= GUESTS_MAX:
                self._crowd_out_one()
            guest = _Guest(str(peer[0]))
            self._guests.add(guest)
            guest.task = asyncio.create_task(self._attend(guest, client))
            guest.task.add_done_callback(partial(self._gone, guest, client))
            await asyncio.sleep(0)  # however many knock, those inside are served in between

    def _crowd_out_one(self) -> None:
        """Make room: of the host with the most connections, the one that has waited longest goes."""
        if self._guests:
            crowd = Counter(guest.host for guest in self._guests)
            longest = min(self._guests, key=lambda guest: (-crowd[guest.host], guest.since))
            self._guests.discard(longest)
            self.dropped["crowded-out"] += 1
            if longest.task is not None:
                longest.task.cancel()

    async def _attend(self, guest: _Guest, client: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        config = self._config.current
        try:
            try:
                reader, writer = await asyncio.wait_for(_streams(client, config.tls), REQUEST_SECONDS)
            except (OSError, EOFError, asyncio.TimeoutError):
                self.dropped["no-handshake"] += 1
                return
            if _has_a_name_of(writer, config):
                while await self._converse(guest, reader, writer):
                    pass
                with suppress(OSError, EOFError, asyncio.TimeoutError):
                    await asyncio.wait_for(_part(reader, writer), PARTING_SECONDS)
        except asyncio.TimeoutError:
            self.dropped["slow"] += 1
        except (OSError, EOFError):
            pass  # it went away
        finally:
            if writer is not None:
                writer.transport.abort()  # what was written is out, or nobody takes it

    def _gone(self, guest: _Guest, client: socket.socket, task: asyncio.Task[None]) -> None:
        """Forget a guest; one that was crowded out before its task had begun, too."""
        self._guests.discard(guest)
        client.close()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._log.error("request failed", error=plain(repr(error)))

    async def _converse(self, guest: _Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Hear one question and answer it; return whether there may be another."""
        first = await asyncio.wait_for(reader.readexactly(1), IDLE_SECONDS)
        asked: Request | None = None
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS)
            guest.since = time.monotonic()
            asked = request.read((first + head).lstrip(b"\r\n"))
            answer = await asyncio.wait_for(self._answer(asked, guest), REQUEST_SECONDS)
        except RefusedError as e:
            answer = sentence(e.status, str(e))
        except asyncio.LimitOverrunError:
            answer = sentence(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has {HEAD_BYTES_MAX} bytes at most"
            )
        self.responses[str(answer.status.value)] += 1
        stays = asked is not None and asked.keep_alive
        bodiless = asked is not None and asked.method == "HEAD"
        headers = {**SAFE, **answer.headers, **self._config.current.headers}
        await asyncio.wait_for(_send(writer, answer, headers, stays, bodiless), REQUEST_SECONDS)
        return stays

    async def _answer(self, asked: Request, guest: _Guest) -> Answer:
        users = self._config.current.users
        if users:
            assert self._doorkeeper is not None
            said = await self._doorkeeper.answer(asked.headers.get("authorization", ""), users, guest.host)
            if said is login.Answer.BUSY:
                busy = "too many passwords are being checked; ask again"
                return sentence(HTTPStatus.TOO_MANY_REQUESTS, busy, Retry_After="5")
            if said is login.Answer.WRONG:
                challenge = 'Basic realm="gpu-doctor", charset="UTF-8"'
                return sentence(HTTPStatus.UNAUTHORIZED, "a user and a password are needed", WWW_Authenticate=challenge)
        try:
            return self._desk.answer(asked)
        except Exception as e:
            self._log.error("request failed", path=plain(asked.path)[:200], error=plain(repr(e)))
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, PLAIN, b"this is a bug of gpu-doctor\n")


async def _streams(
    client: socket.socket, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return the two directions of a connection, once the handshake is made. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=HEAD_BYTES_MAX, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    timeout = REQUEST_SECONDS if tls is not None else None
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, client, ssl=tls, ssl_handshake_timeout=timeout)
    transport.set_write_buffer_limits(high=WRITE_BYTES)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _has_a_name_of(writer: asyncio.StreamWriter, config: WebConfig) -> bool:
    """Whether the client's certificate bears a name that the configuration allows."""
    certificate: dict[str, tuple[tuple[str, str], ...]] = writer.get_extra_info("peercert") or {}
    names = {name for _, name in certificate.get("subjectAltName", ())}
    return not config.client_names or not names.isdisjoint(config.client_names)


async def _send(
    writer: asyncio.StreamWriter, answer: Answer, headers: dict[str, str], stays: bool, bodiless: bool
) -> None:
    told = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Connection": "keep-alive" if stays else "close",
        **{name: value for name, value in headers.items() if value},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    writer.write(f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n{lines}\r\n".encode("latin-1"))
    body = memoryview(b"" if bodiless else answer.body)
    for begin in range(0, len(body), WRITE_BYTES):
        writer.write(body[begin : begin + WRITE_BYTES])
        await writer.drain()
    await writer.drain()


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes, and hear out what the client still sends: a sudden end would cost it the answer."""
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()
        await writer.wait_closed()
    while await reader.read(HEAD_BYTES_MAX):
        pass
