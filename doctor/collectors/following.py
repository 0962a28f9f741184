"""A growing file, read from where the last visit stopped: across rotation, truncation and restart, never whole."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

CHUNK_BYTES = 1 << 20
FINGERPRINT_BYTES = 64
"""What stood before the offset is read again, so that a file truncated and grown past it between visits is noticed."""


BESIDE_MAX = 64
"""Files beside a log that are looked at for the one it was before its rotation."""

COUNTED_BYTES = 256 << 20
"""Lines before the first piece are counted in a file up to this size: a tenth of a second."""


class Piece(msgspec.Struct, frozen=True):
    """A run of bytes."""

    data: bytes
    offset: int
    """Where it stands in the file."""
    joins: bool
    """Whether it follows the piece before without a gap. Otherwise a reader starts afresh."""
    line: int = 0
    """The number of its first line; 0: not known, the file is too large to count."""


class FollowedFile:
    """A log file under a name. The name's file may be renamed away, truncated, or replaced at any time.

    The first reading takes the head (what a program says of itself at its start) and the tail; with *marker*, the
    head is the last place that holds it, searched for backwards through at most *search_bytes*.
    """

    def __init__(
        self,
        path: Path,
        *,
        head_bytes: int = 256 << 10,
        tail_bytes: int = 8 << 20,
        marker: bytes = b"",
        search_bytes: int = 256 << 20,
        most_bytes: int = 256 << 20,
    ) -> None:
        self.path = path
        self.head_bytes = head_bytes
        self.tail_bytes = tail_bytes
        self.marker = marker
        self.search_bytes = search_bytes
        self.most_bytes = most_bytes
        """Read at one visit; the rest waits for the next."""
        self._file: int | None = None
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._fingerprint = b""
        self._whole = 0
        """Where the first line begins that is not whole yet."""
        self._goes_on = False

    @property
    def place(self) -> str:
        """How far the file was read, in whole lines: for `go_on`, in a later life of the program; empty: not at all."""
        if self._file is None or self._identity is None:
            return ""
        device, inode = self._identity
        return f"{device}:{inode}:{self._whole}:{_before(self._file, self._whole).hex()}"

    def go_on(self, places: Iterable[str]) -> None:
        """Begin where an earlier life of the program stopped, if one of *places* is of this file.

        Renamed meanwhile, the file is looked for beside its name: what it still holds comes first, then the new one.
        """
        told = {place.rsplit(":", 2)[0]: place for place in places if place.count(":") == 3}
        if not told:
            return
        beside = (p for p in sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}?*")))
        for path in (self.path, *itertools.islice(beside, BESIDE_MAX)):
            with contextlib.suppress(OSError, ValueError):
                state = path.stat()  # before it is opened: a device must not be
                place = told.get(f"{state.st_dev}:{state.st_ino}")
                if place is not None and stat.S_ISREG(state.st_mode) and self._stands_at(path, place):
                    return

    def _stands_at(self, path: Path, place: str) -> bool:
        """Open the file at *place*, if it still is what was read there."""
        device, inode, offset, before = place.split(":")
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if os.fstat(file).st_size < int(offset) or _before(file, int(offset)).hex() != before:
            os.close(file)
            return False
        self._file, self._identity = file, (int(device), int(inode))
        self._offset = self._whole = int(offset)
        self._fingerprint, self._goes_on = bytes.fromhex(before), True
        return True

    def pieces(self) -> Iterator[Piece]:
        """Yield what is new. Raises OSError when the name can't be opened; what a renamed file still held comes first."""
        left = self.most_bytes
        if self._file is not None:
            named = self._is_named()  # asked first: what is written before the renaming is then read below
            joins, self._goes_on = not self._goes_on, False
            for piece in self._new(self._file, left, joins=joins):
                left -= len(piece.data)
                yield piece
            if left <= 0 or named:
                return
            self._let_go()
        file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        first = self._identity is None
        self._file = file
        state = os.fstat(file)
        self._identity = (state.st_dev, state.st_ino)
        self._offset, self._fingerprint, self._whole = 0, b"", 0
        if first and state.st_size > self.head_bytes + self.tail_bytes:
            yield from self._head(file, state.st_size)
        yield from self._new(file, left, joins=False)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file that is held, or was held last."""
        return self._identity

    def close(self) -> None:
        """Let go of the file; the next reading begins anew."""
        self._let_go()
        self._identity = None

    def _let_go(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_named(self) -> bool:
        """Whether the name still means the file that is held. A name without a file may get one soon: keep holding."""
        try:
            state = self.path.stat()
        except OSError:
            return True
        return (state.st_dev, state.st_ino) == self._identity

    def _new(self, file: int, most: int, *, joins: bool = True) -> Iterator[Piece]:
        size = os.fstat(file).st_size
        if size < self._offset or _before(file, self._offset) != self._fingerprint:
            self._offset, self._whole, joins = 0, 0, False  # copytruncate, or a program that writes its log anew
        while self._offset < size and most > 0:
            data = os.pread(file, min(CHUNK_BYTES, most), self._offset)
            if not data:
                return
            if not data.strip(b"\0"):  # a hole, left by truncating under a writer that does not append
                self._offset = self._whole = _after_hole(file, self._offset, size)
                self._fingerprint = _before(file, self._offset)
                joins = False
                continue
            piece = Piece(data, self._offset, joins, 0 if joins else _line_at(file, self._offset))
            newline = data.rfind(b"\n")
            self._whole = self._offset + newline + 1 if newline >= 0 else self._whole
            self._offset += len(data)
            self._fingerprint = _before(file, self._offset)
            most -= len(data)
            joins = True
            yield piece

    def _head(self, file: int, size: int) -> Iterator[Piece]:
        """Yield the head of a large file, and stand at its tail."""
        tail = size - self.tail_bytes
        at = self._last_marker(file, tail) if self.marker else None
        if at is None:
            at = 0
        data = os.pread(file, min(self.head_bytes, tail - at), at)
        yield Piece(data[: data.rfind(b"\n") + 1], at, joins=False, line=_line_at(file, at))
        skipped = os.pread(file, CHUNK_BYTES, tail)
        self._offset = self._whole = tail + skipped.find(b"\n") + 1
        self._fingerprint = _before(file, self._offset)

    def _last_marker(self, file: int, tail: int) -> int | None:
        """Return the beginning of the last line before *tail* that holds the marker."""
        end = tail
        while end > max(0, tail - self.search_bytes):
            begin = max(0, end - CHUNK_BYTES)
            data = os.pread(file, end - begin + len(self.marker), begin)
            found = data.rfind(self.marker)
            if found >= 0:
                return begin + data.rfind(b"\n", 0, found) + 1
            end = begin
        return None


def _line_at(file: int, offset: int) -> int:
    """Return the number of the line that begins at *offset*, or 0 where counting would take long."""
    if offset > COUNTED_BYTES:
        return 0
    return 1 + sum(os.pread(file, CHUNK_BYTES, at)[: offset - at].count(b"\n") for at in range(0, offset, CHUNK_BYTES))


def _before(file: int, offset: int) -> bytes:
    begin = max(0, offset - FINGERPRINT_BYTES)
    return os.pread(file, offset - begin, begin)


def _after_hole(file: int, offset: int, size: int) -> int:
    try:
        return max(os.lseek(file, offset, os.SEEK_DATA), offset + 1)
    except OSError:  # nothing but a hole to the end
        return size
