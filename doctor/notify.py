"""What the service manager is told: that the daemon is ready, that it goes on, what it sees, that it ends.

The protocol is that of sd_notify(3): lines of `NAME=value` in one datagram to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager

VISITS_PER_WATCHDOG = 3
"""guess: two visits may be late or left out before the daemon counts as stuck."""

SEND_SECONDS = 1.0
"""guess: a service manager that does not read for so long does without the message."""

STATUS_BYTES = 500
"""`systemctl status` shows one line of it."""


class ServiceManager:
    """Who started the daemon, and wants to hear how it fares. Where nobody listens, nothing is said."""

    def __init__(self, interval_seconds: float, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._patience_us = _patience_us(interval_seconds, environment)
        self._ready = False

    def starting(self) -> None:
        """Tell that the first visit is under way."""
        self._tell(STATUS="first visit")

    def visited(self, sentence: str) -> None:
        """Tell that a visit is done, and what it saw. To be called by the loop itself: this feeds the watchdog."""
        status = sentence.encode(errors="replace")[:STATUS_BYTES].decode(errors="ignore").replace("\n", " ")
        if self._ready:
            self._tell(WATCHDOG="1", STATUS=status)
            return
        self._ready = True
        patience = {} if self._patience_us is None else {"WATCHDOG_USEC": str(self._patience_us)}
        self._tell(READY="1", **patience, STATUS=status)

    def stopping(self) -> None:
        """Tell that the daemon is about to end."""
        self._tell(STOPPING="1", STATUS="ending")

    def _tell(self, **fields: str) -> None:
        if not self._address.startswith(("/", "\0")):
            return
        message = "".join(f"{name}={value}\n" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(SEND_SECONDS)
                channel.sendto(message.encode(), self._address)
        except OSError:  # a visit must not fail because nobody listens; the watchdog acts if that goes on
            return


def _patience_us(interval_seconds: float, environment: Mapping[str, str]) -> int | None:
    """Return how long the watchdog has to wait, where the unit's own time is too short for the interval."""
    told = environment.get("WATCHDOG_USEC", "")
    if not told.isdecimal() or environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    needed = int(VISITS_PER_WATCHDOG * interval_seconds * 1e6)
    return needed if needed > int(told) else None


@contextmanager
def service_manager(interval_seconds: float) -> Generator[ServiceManager]:
    """Tell the service manager that the daemon starts and, on the way out, that it ends."""
    manager = ServiceManager(interval_seconds)
    manager.starting()
    try:
        yield manager
    finally:
        manager.stopping()
