"""Logins: basic authentication against bcrypt hashes, such that wrong passwords can't burn the CPU.

A check takes 50 ms of a core at bcrypt's cost 10 and half a second at 13. So each right and each wrong password is
checked once and remembered by a keyed hash; checks are made one at a time, by a thread that rests nine times as long
as it worked; and of each client host only one may wait.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import enum
import hmac
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

REMEMBERED_MAX = 1024
"""How many passwords are remembered, right and wrong. guess: a scraper has one."""

WAITING_MAX = 8
"""How many checks may wait. At cost 10 the last one waits for 4 s, less than a scrape may take."""

REST_FACTOR = 9.0
"""Rest after a check, as a multiple of its time: a tenth of a core at most goes into passwords."""

PASSWORD_BYTES = 72
"""What bcrypt reads of a password."""


class Answer(enum.Enum):
    """What the doorkeeper says."""

    WELCOME = enum.auto()
    WRONG = enum.auto()
    BUSY = enum.auto()
    """Too many passwords are being checked."""


class Doorkeeper:
    """Checks who may come in. One event loop owns it."""

    def __init__(self) -> None:
        self.failed = 0
        """Requests with a wrong user or password."""
        self._key = os.urandom(32)
        self._remembered: OrderedDict[bytes, bool] = OrderedDict()
        self._waiting: set[str] = set()
        self._turn = asyncio.Lock()
        self._rested_at = 0.0
        self._thread = ThreadPoolExecutor(1, "bcrypt")

    async def answer(self, authorization: str, users: Mapping[str, bytes], host: str) -> Answer:
        """Return whether this Authorization header is one of the users'."""
        given = _credentials(authorization)
        if given is None:
            return Answer.WRONG
        name, password = given
        # An unknown user costs what a known one does, so that the time tells no names.
        right = users.get(name) or _nobody(users)
        digest = self._digest(name, right, password)
        known = self._remembered.get(digest)
        if known is None:
            if host in self._waiting or len(self._waiting) >= WAITING_MAX:
                return Answer.BUSY
            known = await self._checked(password, right, host) and name in users
            self._remembered[digest] = known
            if len(self._remembered) > REMEMBERED_MAX:
                self._forget_one()
        self.failed += not known
        return Answer.WELCOME if known else Answer.WRONG

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _digest(self, name: str, right: bytes, password: bytes) -> bytes:
        """Return what a login is remembered by. Nobody who lacks the key can make use of the time that a look-up takes."""
        parts = (name.encode("utf-8", "surrogateescape"), right, password)
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, message, "sha256")

    def _forget_one(self) -> None:
        """Forget the oldest wrong password, so that guessing does not drive out the right ones."""
        wrong = next((digest for digest, right in self._remembered.items() if not right), None)
        if wrong is None:
            self._remembered.popitem(last=False)
        else:
            del self._remembered[wrong]

    async def _checked(self, password: bytes, right: bytes, host: str) -> bool:
        import bcrypt

        self._waiting.add(host)
        try:
            async with self._turn:
                await asyncio.sleep(max(0.0, self._rested_at - time.monotonic()))
                began = time.monotonic()
                try:
                    return await asyncio.get_running_loop().run_in_executor(
                        self._thread, bcrypt.checkpw, password[:PASSWORD_BYTES], right
                    )
                except ValueError:
                    return False  # a NUL in the password, say
                finally:
                    now = time.monotonic()
                    self._rested_at = now + REST_FACTOR * (now - began)
        finally:
            self._waiting.discard(host)


def _credentials(authorization: str) -> tuple[str, bytes] | None:
    scheme, _, coded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(coded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (name.decode("utf-8", "surrogateescape"), password) if colon else None


def _nobody(users: Mapping[str, bytes]) -> bytes:
    """Return a hash that no password has, at the highest cost of the users'."""
    cost = max((right[4:6] for right in users.values()), default=b"10")
    return b"$2b$" + cost + b"$" + b"." * 53
