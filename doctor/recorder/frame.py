"""Frames: records of bytes in a file that may be torn or damaged anywhere; each says its length and proves itself."""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator

import msgspec

MAGIC = b"\xd6gd1"
"""Begins every frame: the first byte is none of UTF-8's, so that text is not taken for one. The last is the version."""

_PROVED = struct.Struct("<IQQdB")
"""Length of the payload, number, number of the whole one, time, marks."""
_PROOF_OFFSET = len(MAGIC)
_PROVED_OFFSET = _PROOF_OFFSET + 4
_HEADER_BYTES = _PROVED_OFFSET + _PROVED.size
"""The magic, the CRC-32 of all that follows it, and what it proves."""

PAYLOAD_MAX_BYTES = 16 << 20
"""A longer one is no visit of ours: a length that damage has made must not take the memory."""


class Mark(enum.IntFlag):
    """What a frame holds, told without reading it."""

    FINDINGS = 1
    """The findings that were present after the visit."""
    START = 2
    """The first visit of a daemon's life."""


class Frame(msgspec.Struct, frozen=True):
    """One record."""

    number: int
    """Grows by one with each visit, over every restart, whatever the clock does."""
    whole: int
    """The number of the frame that this one differs from; its own where it is whole."""
    at: float
    """The visit's time, Unix seconds."""
    marks: Mark
    payload: bytes

    @property
    def is_whole(self) -> bool:
        """Whether it is a visit by itself."""
        return self.whole == self.number


class Damage(msgspec.Struct, frozen=True):
    """Bytes that are no frame."""

    offset: int
    size: int
    torn: bool
    """Whether it is the end of the file: a write that was broken off, or is under way."""


def packed(frame: Frame) -> bytes:
    """Return the frame as it is written."""
    proved = _PROVED.pack(len(frame.payload), frame.number, frame.whole, frame.at, frame.marks)
    return MAGIC + zlib.crc32(frame.payload, zlib.crc32(proved)).to_bytes(4, "little") + proved + frame.payload


def frames(data: bytes) -> Iterator[Frame | Damage]:
    """Yield every whole frame, in order, and what lies between them. It never raises."""
    at = 0
    while at < len(data):
        begin = at
        while (found := _frame_at(data, at)) is None:
            at = data.find(MAGIC, at + 1)
            if at < 0:
                yield Damage(begin, len(data) - begin, torn=True)
                return
        if at > begin:
            yield Damage(begin, at - begin, torn=False)
        yield found
        at += _HEADER_BYTES + len(found.payload)


def _frame_at(data: bytes, offset: int) -> Frame | None:
    begin = offset + _HEADER_BYTES
    if begin > len(data) or not data.startswith(MAGIC, offset):
        return None
    size, number, whole, at, marks = _PROVED.unpack_from(data, offset + _PROVED_OFFSET)
    if size > PAYLOAD_MAX_BYTES or begin + size > len(data):
        return None
    proof = int.from_bytes(data[offset + _PROOF_OFFSET : offset + _PROVED_OFFSET], "little")
    if zlib.crc32(memoryview(data)[offset + _PROVED_OFFSET : begin + size]) != proof:
        return None
    return Frame(number, whole, at, Mark(marks), data[begin : begin + size])
