"""A generation of a log: the file that it was between two rotations; under the log's name, renamed, copied or compressed."""

from __future__ import annotations

import errno
import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK_BYTES = 1 << 20

FINGERPRINT_BYTES = 64
"""What stood before the offset is read again, so that a file truncated and grown past it between visits is noticed."""

HEAD_BYTES = 4096
"""What tells one generation from another, wherever it was renamed, copied or compressed to: some thirty lines."""

BESIDE_MAX = 64
"""Rotated files that are looked at, the newest."""

_ROTATED = re.compile(r"[.-]\d[\d._:TZ-]*?(?:\.gz)?")
"""`.1`, `.2.gz`, `-20261121`, `.2026-11-21_02-10`: logrotate, Docker, the kubelet, Python's handlers."""

_DATED = re.compile(r"[.-]\d{4}-?\d\d-?\d\d[\d._:TZ-]*")
"""Before the extension only a date will do: `vllm-8001.log` is the log of another engine."""


class Lines(NamedTuple):
    """A run of whole lines, and where it stands."""

    data: bytes
    offset: int
    number: int
    """Of its first line."""


class Generation:
    """An open file, read up to a place. Raises OSError when it can't be opened."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        state = os.fstat(self._file)
        if not stat.S_ISREG(state.st_mode):
            os.close(self._file)
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        self.identity = (state.st_dev, state.st_ino)
        self.offset: int = 0
        self.line: int = 1
        """The number of the line at the offset; 0: not known."""
        self.moved_at = 0.0
        """When it was last read further, or lost the log's name; by the follower's clock."""
        self.head = b""
        """Its first bytes, of those that were read: kept, for the file may be truncated at any time."""
        self._before = b""
        self._zip = gzip.GzipFile(fileobj=os.fdopen(self._file, "rb", closefd=False)) if _is_zip(path) else None

    def read(self, size: int, offset: int) -> bytes:
        """Return what stands there; of a compressed file that is broken, nothing."""
        if self._zip is None:
            return os.pread(self._file, size, offset)
        try:
            self._zip.seek(offset)
            return self._zip.read(size)
        except (EOFError, OSError, zlib.error):
            return b""

    @property
    def size(self) -> int:
        """Its bytes on disk."""
        return os.fstat(self._file).st_size

    @property
    def is_compressed(self) -> bool:
        """Whether it is read through gzip; then it is whole, and grows no more."""
        return self._zip is not None

    @property
    def content_size(self) -> int:
        """Its bytes; of a compressed file as its end tells them."""
        if self._zip is None:
            return self.size
        return int.from_bytes(os.pread(self._file, 4, max(0, self.size - 4)), "little")

    def begins_with(self, other: Generation) -> bool:
        """Whether all that the other holds stands at the beginning of this one too."""
        size = other.content_size
        at = 0
        while at < size <= self.content_size:
            data = other.read(min(CHUNK_BYTES, HEAD_BYTES + at), at)
            if not data or self.read(len(data), at) != data:
                return False
            at += len(data)
        return size <= self.content_size

    @property
    def left(self) -> int:
        """Bytes not read yet; of a compressed file those on disk."""
        return max(0, self.size - (0 if self._zip else self.offset))

    @property
    def is_intact(self) -> bool:
        """Whether what was read still stands there; otherwise the file was truncated, or is written anew."""
        if self._zip is not None:
            return True
        return self.size >= self.offset and self._stands_before(self.offset) == self._before

    def _stands_before(self, offset: int) -> bytes:
        begin = max(0, offset - FINGERPRINT_BYTES)
        return self.read(offset - begin, begin)

    @property
    def place(self) -> str:
        """How far it was read, for `goes_on_at` in a later life of the program."""
        device, inode = self.identity
        return f"{device}:{inode}:{self.offset}:{self.line}:{self._before.hex()}"

    def is_of(self, place: str) -> bool:
        """Whether a place was told by this very file, or one in its place on the disk."""
        return place.startswith("{}:{}:".format(*self.identity))

    def goes_on_at(self, place: str) -> bool:
        """Stand at a place that was told by this file, or by one that this is a copy of. Raises ValueError."""
        _, _, offset, line, before = place.split(":")
        fingerprint = bytes.fromhex(before)
        if int(offset) < len(fingerprint) or self._stands_before(int(offset)) != fingerprint:
            return False
        self.stand_at(int(offset), int(line))
        return True

    def stand_at(self, offset: int, line: int) -> None:
        """Go on from there."""
        self.offset, self.line = offset, line
        self._before = self._stands_before(offset)
        self.head = self.read(min(HEAD_BYTES, offset), 0)

    def begin_anew(self) -> None:
        """Say that the file was truncated: another generation in the same file."""
        self.offset, self.line = 0, 1
        self._before = self.head = b""

    def news(self, most: int, *, final: bool = False) -> Iterator[Lines]:
        """Yield what was not read yet, at most so many bytes, in whole lines.

        *final*: it grows no more, so that the rest is a line too. A line longer than a chunk comes in parts.
        """
        while most > 0:
            wanted = min(CHUNK_BYTES, most)
            known = 0 if self._zip else len(self._before)
            data = self.read(known + wanted, self.offset - known)
            if not data.startswith(self._before[:known]):
                return  # truncated this moment: the next visit sees to it
            data = data[known:]
            if data and not data.strip(b"\0") and (hole_end := self._after_hole()) > self.offset:
                self.stand_at(hole_end, self.line)
                continue
            end = data.rfind(b"\n") + 1
            if not end:
                if len(data) < wanted and not (final and data):
                    return
                end = len(data)
            lines = Lines(data[:end], self.offset, self.line)
            if self.offset < HEAD_BYTES:
                self.head += lines.data[: HEAD_BYTES - self.offset]
            self.offset += end
            self.line += lines.data.count(b"\n") if self.line else 0
            self._before = (self._before + lines.data[-FINGERPRINT_BYTES:])[-FINGERPRINT_BYTES:]
            most -= end
            yield lines

    def _after_hole(self) -> int:
        """Return where data begins again behind a hole, which truncating leaves under a writer that does not append."""
        try:
            return os.lseek(self._file, self.offset, os.SEEK_DATA)
        except OSError:  # nothing but a hole to the end
            return self.size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def rotated(log: Path) -> list[Path]:
    """Return the files beside *log* that were it once, the oldest first; a plain one rather than its compressed twin."""
    stem, suffix = log.stem, log.suffix
    found: dict[str, tuple[int, Path]] = {}
    try:
        with os.scandir(log.parent) as entries:
            for entry in entries:
                if _is_rotated(entry.name, stem, suffix) and entry.is_file(follow_symlinks=False):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns, log.parent / entry.name
    except OSError:
        return []
    there = sorted(each for name, each in found.items() if name.removesuffix(".gz") == name or name[:-3] not in found)
    return [path for _, path in there[-BESIDE_MAX:]]


def _is_rotated(name: str, stem: str, suffix: str) -> bool:
    """Whether it is called `vllm.log.1` or `vllm-20261121.log`."""
    if not name.startswith(stem) or len(name) <= len(stem) + len(suffix):
        return False
    if _ROTATED.fullmatch(name.removeprefix(stem + suffix)):
        return True
    plain = name.removesuffix(".gz")
    return bool(suffix) and plain.endswith(suffix) and _DATED.fullmatch(plain[len(stem) : -len(suffix)]) is not None


def _is_zip(path: Path) -> bool:
    return path.suffix == ".gz"
