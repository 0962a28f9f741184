"""The recorder's folder: segments in the order of their numbers; one daemon writes, anybody reads meanwhile."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from doctor.recorder.frame import Damage, Frame, frames
from doctor.recorder.segment import Entry, Reading, Writing

SEGMENT_MAX_BYTES = 4 << 20
"""Some 700 visits of an 8-GPU node: two hours at 10 s. What falls out of the bounds falls out by segments."""

READ_MAX_BYTES = 64 << 20
"""Of one file: a longer one is no segment of ours."""

BLOCK_BYTES = 4096
"""A small file takes as much of a disk."""

SEGMENTS_MAX = 10_000
"""guess: a daemon that is started anew for ever must not fill a folder with files."""

_NAME = re.compile(r"flight-(\d{12})\.seg")


class RecorderError(Exception):
    """The recorder's folder can't be used; the message says why."""


class Bounds(msgspec.Struct, frozen=True):
    """How much of the past is kept."""

    max_bytes: int
    max_age_seconds: float


class Unread(msgspec.Struct, frozen=True):
    """A part of the recording that could not be read."""

    segment: str
    offset: int
    why: str


class Folder:
    """A folder of segments, for reading. What can't be read is passed over, and told in `unread`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unread: list[Unread] = []

    def segments(self) -> tuple[Path, ...]:
        """Return the segments, oldest first; other files are none. Raises RecorderError when there is no folder."""
        try:
            with os.scandir(self.directory) as found:
                names = sorted(entry.name for entry in found if _NAME.fullmatch(entry.name))
        except OSError as e:
            raise RecorderError(f"{self.directory}: can't be read: {e.strerror}") from e
        return tuple(self.directory / name for name in names)

    def walk(self, wanted: Callable[[Frame], bool]) -> Iterator[tuple[Frame, Entry | None]]:
        """Yield every frame in the order of the visits, with its entry where it is *wanted* and can be told."""
        for segment in self.segments():
            reading = Reading()
            for frame in self._frames(segment):
                if wanted(frame):
                    yield frame, next(self._told(segment, reading, frame), None)
                else:
                    reading.pass_by(frame)
                    yield frame, None

    def entries(self, since: float = float("-inf"), until: float = float("inf")) -> Iterator[Entry]:
        """Yield the visits from *since* to *until*, in the order in which they were made."""
        for _, entry in self.walk(lambda frame: since <= frame.at <= until):
            if entry is not None:
                yield entry

    def tail(self, seconds: float) -> tuple[int, tuple[Entry, ...]]:
        """Return the number of the last visit (0: there is none) and the entries of the last *seconds*.

        They begin with a whole one, so that what was found and counted is among them.
        """
        last = 0
        after: Frame | None = None
        found: list[list[Entry]] = []
        for segment in reversed(self.segments()):
            there = list(self._frames(segment))
            last = max([last, number_of(segment), *(frame.number for frame in there)])
            begin = len(there)
            while begin:
                # A clock that was put back tells no time; it must not make the last hour one of all that is kept.
                passed = 0.0 if after is None else max(0.0, after.at - there[begin - 1].at)
                if passed > seconds:
                    break
                seconds -= passed
                begin -= 1
                after = there[begin]
            is_all = begin > 0
            while begin and not (begin < len(there) and there[begin].is_whole):
                begin -= 1
            reading = Reading()
            found.append([entry for frame in there[begin:] for entry in self._told(segment, reading, frame)])
            if is_all:
                break
        return last, tuple(entry for told in reversed(found) for entry in told)

    def _told(self, segment: Path, reading: Reading, frame: Frame) -> Iterator[Entry]:
        entry = reading.entry(frame)
        if entry is None:
            why = f"visit {frame.number} differs from one that is missing, or is none of this program's"
            self.unread.append(Unread(segment.name, 0, why))
        else:
            yield entry

    def _frames(self, segment: Path) -> Iterator[Frame]:
        try:
            with segment.open("rb") as file:
                data = file.read(READ_MAX_BYTES)
        except FileNotFoundError:  # the daemon has let go of it meanwhile
            return
        except OSError as e:
            self.unread.append(Unread(segment.name, 0, f"can't be read: {e.strerror}"))
            return
        for found in frames(data):
            if isinstance(found, Damage):
                torn = "a record that was broken off" if found.torn else "damaged"
                self.unread.append(Unread(segment.name, found.offset, f"{found.size} bytes: {torn}"))
            else:
                yield found


def number_of(segment: Path) -> int:
    """Return the number of the segment's first visit."""
    match = _NAME.fullmatch(segment.name)
    return int(match[1]) if match else 0


class Shelf:
    """The folder as its one writer has it. Every method raises OSError as the disk does."""

    def __init__(self, directory: Path, bounds: Bounds) -> None:
        self.directory = directory
        self.bounds = bounds
        self._lock: int | None = None
        self._file: int | None = None
        self._path = directory
        self._size = 0
        self._writing = Writing()
        self._segment_max = max(64 << 10, min(SEGMENT_MAX_BYTES, bounds.max_bytes // 8))

    def take(self) -> None:
        """Make the folder, and lock it against a second daemon. Raises RecorderError where there is one."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RecorderError(f"{self.directory}: another gpu-doctor daemon records here") from None
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def take_again(self) -> None:
        """Take the folder if it is not held, or somebody removed it. Raises RecorderError as `take` does."""
        if self._lock is None or not self._is_there(self.directory / "lock", self._lock):
            self.close()
            self.take()

    def write(self, entry: Entry, number: int, *, is_start: bool = False) -> None:
        """Write a visit; when this returns, it is on the disk, and a power cut does not cost it."""
        self.take_again()
        if self._file is not None and (self._size >= self._segment_max or not self._is_there(self._path, self._file)):
            self._put_away()
        if self._file is None:
            self._begin(entry, number, is_start=is_start)
            return
        try:
            size = _write_all(self._file, self._writing.frame(entry, number, is_start=is_start))
            os.fdatasync(self._file)
            self._size += size
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)  # what was written of it would be damage
            self._put_away()
            raise

    def _begin(self, entry: Entry, number: int, *, is_start: bool) -> None:
        """Begin a segment: nobody sees it before its first visit is on the disk."""
        self._make_room(entry.snapshot.at)
        self._writing = Writing()
        path = self.directory / f"flight-{number:012}.seg"
        new = path.with_suffix(".new")
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._size = _write_all(file, self._writing.frame(entry, number, is_start=is_start))
            os.fdatasync(file)
            new.rename(path)
            _sync_folder(self.directory)
        except OSError:
            os.close(file)
            with suppress(OSError):
                new.unlink()
            raise
        self._file, self._path = file, path

    def _make_room(self, now: float) -> None:
        """Remove the oldest segments that are over the bounds; of those that are only too old, one.

        A clock that jumps ahead makes all of them too old at once: it must not cost the recording.
        """
        for new in self.directory.glob("flight-*.new"):
            new.unlink()
        segments = Folder(self.directory).segments()
        sizes = [-(-segment.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for segment in segments]
        total = sum(sizes) + self._segment_max
        left = len(segments)
        for segment, size in zip(segments, sizes, strict=True):
            if total <= self.bounds.max_bytes and left < SEGMENTS_MAX:
                break
            segment.unlink()
            total -= size
            left -= 1
        else:
            return
        oldest = segments[len(segments) - left]
        if left > 1 and oldest.stat().st_mtime < now - self.bounds.max_age_seconds:
            oldest.unlink()

    @staticmethod
    def _is_there(path: Path, file: int) -> bool:
        """Whether the name still means the file that is held: somebody may have removed the folder."""
        try:
            return os.path.samestat(path.stat(), os.fstat(file))
        except FileNotFoundError:
            return False

    def _put_away(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Let go of the folder."""
        self._put_away()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _write_all(file: int, data: bytes) -> int:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    return len(data)


def _sync_folder(directory: Path) -> None:
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
