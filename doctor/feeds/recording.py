"""Recordings: what the visits saw, one JSON snapshot a line, gzip-compressed; written and replayed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from doctor.snapshot import Snapshot

FORMAT = 1
"""Version of the recording format; a reader refuses a newer one."""

LINE_MAX_BYTES = 64 << 20
"""A longer line is no snapshot of ours: refuse it before memory is gone."""


class RecordingError(Exception):
    """The recording can't be read; the message names the file and the place."""


class Header(msgspec.Struct, frozen=True):
    """First line of a recording."""

    recording: int
    program: str


def write(visits: Iterable[Snapshot], path: Path, program: str) -> Iterator[Snapshot]:
    """Write each visit as it comes, and pass it on. The file is whole after each visit.

    Each snapshot is its own gzip member, so that a torn end costs at most one visit.
    """
    encode = msgspec.json.encode
    with path.open("wb") as file:
        file.write(_member(encode(Header(FORMAT, program))))
        for snapshot in visits:
            file.write(_member(encode(snapshot)))
            file.flush()
            yield snapshot


def _member(line: bytes) -> bytes:
    return gzip.compress(line + b"\n", compresslevel=6, mtime=0)


def read(path: Path) -> Iterator[Snapshot]:
    """Yield the visits of a recording. Raises RecordingError when it is not one, or is torn or damaged."""
    try:
        with path.open("rb") as raw:
            magic = raw.read(2)
            raw.seek(0)
            file = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if magic == b"\x1f\x8b" else raw
            yield from _snapshots(file, path)
    except OSError as e:  # gzip.BadGzipFile too
        msg = f"{path}: can't be read: {e.strerror or e}"
        raise RecordingError(msg) from e


def _snapshots(file: BinaryIO, path: Path) -> Iterator[Snapshot]:
    decode = msgspec.json.Decoder(Snapshot).decode
    number = 0
    try:
        while line := file.readline(LINE_MAX_BYTES):
            number += 1
            if number == 1:
                _check(line, path)
            else:
                yield decode(line)
    except (EOFError, zlib.error) as e:
        msg = f"{path}: line {number + 1}: the recording is cut off or damaged; {max(number - 1, 0)} visits before it are whole"
        raise RecordingError(msg) from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        msg = f"{path}: line {number}: not a snapshot: {e}"
        raise RecordingError(msg) from e
    if number == 0:
        msg = f"{path}: line 1: the file is empty, not a recording"
        raise RecordingError(msg)


def _check(line: bytes, path: Path) -> None:
    try:
        header = msgspec.json.decode(line, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        msg = f"{path}: line 1: not a recording of gpu-doctor: {e}"
        raise RecordingError(msg) from e
    if header.recording > FORMAT:
        msg = f"{path}: line 1: recording format {header.recording}; this program reads up to {FORMAT}"
        raise RecordingError(msg)
