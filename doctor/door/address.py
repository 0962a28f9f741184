"""Where the door is."""

from __future__ import annotations

import msgspec


class DoorError(Exception):
    """The door can't be opened; the message says why."""


class Address(msgspec.Struct, frozen=True):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """Parse `127.0.0.1:9481` or `[::1]:9481`. Raises DoorError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= 0xFFFF):
        raise DoorError(f"{text!r} is no address to listen on; 127.0.0.1:9481 is one")
    return Address(host, int(port))
