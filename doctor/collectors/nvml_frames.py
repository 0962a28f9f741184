"""What the NVML child and its parent say to each other: length-prefixed msgpack frames over pipes."""

from __future__ import annotations

import struct

import msgspec

from doctor.snapshot import Absent, Gpu, GpuPair, Stack, Unseen

LENGTH = struct.Struct("!I")
FRAME_MAX_BYTES = 64 << 20
"""A longer frame is none of ours: a node of 16 GPUs with a minute of samples has less than a megabyte."""


class Ask(msgspec.Struct, frozen=True):
    """What the parent wants: one look at all GPUs."""

    number: int
    left_alone: tuple[str, ...] = ()
    """PCI addresses of GPUs that must not be asked."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child saw. The number is that of the question: an answer that comes too late is known by it."""

    number: int
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    stack: Stack = Stack()
    unseen: tuple[Unseen, ...] = ()
    failure: Absent | None = None
    """Why nothing could be seen; the child ends after it, and a fresh one is started."""
    outdated: bool = False
    """The library on disk is another one by now: a fresh child would load that."""


def frame(message: Ask | Answer) -> bytes:
    """Return a message as it goes through the pipe."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body
