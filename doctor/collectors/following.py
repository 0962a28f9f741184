"""A growing file, read from where the last visit stopped: across rotation, truncation and restart, never whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from doctor.collectors.generation import CHUNK_BYTES, FINGERPRINT_BYTES, HEAD_BYTES, Generation, Lines, rotated

COUNTED_BYTES = 256 << 20
"""Lines before the first piece are counted in a file up to this size: a tenth of a second."""

OUTLIVES_SECONDS = 60.0
"""A renamed file is held until it has not grown for so long. guess: programs open their log anew seconds after the
rotation tells them to."""

HELD_MAX = 8
"""Renamed files that are read to their end and held all the same: a log that is rotated every second."""

BACKLOG_BYTES = 4 << 30
"""What waits to be read at most: rotated files that are held take room on the disk although they were removed, and what
is told an hour late helps nobody. guess: a minute and a half of 50 MB/s."""

REMEMBERED_MAX = 128
"""Generations of which it is known how far they were read."""

TRUNCATED_MAX = 8
"""Truncated generations whose copies are waited for: one that was truncated without a copy has none."""

UNPACKED_MAX = 4
"""Compressed files that are searched for the place where an earlier life of the program stopped: each is unpacked."""


class Piece(msgspec.Struct, frozen=True):
    """A run of whole lines; only a line that is longer than a chunk comes in several."""

    data: bytes
    offset: int
    """Where it stands in the file."""
    joins: bool
    """Whether it follows the piece before without a gap. Otherwise a reader starts afresh."""
    line: int = 0
    """The number of its first line; 0: not known, the file is too large to count."""


class _Known(msgspec.Struct, frozen=True):
    """A rotated file that holds no news: it was read, or is from before our time."""

    identity: tuple[int, int]
    size: int
    head: bytes

    def is_of(self, file: Generation, head: bytes) -> bool:
        """Whether *file* is this one, to which more may have been written, or holds the same compressed."""
        grown = file.identity == self.identity and file.content_size >= self.size and head.startswith(self.head)
        return grown or (file.is_compressed and head == self.head and file.content_size == self.size)


class _Truncated(msgspec.Struct, frozen=True):
    """A generation that was truncated: what it still held may stand in a copy."""

    head: bytes
    offset: int
    place: str
    was_told: bool
    """The last piece was of it."""

    def is_copied_by(self, file: Generation, head: bytes) -> bool:
        """Whether *file* is a copy; one that goes on stands at the place then."""
        short = min(len(head), len(self.head))
        if head[:short] != self.head[:short]:
            return False
        return file.content_size < self.offset or _goes_on(file, self.place)


class FollowedFile:
    """A log file under a name. The name's file may be renamed away, truncated, or replaced at any time.

    The first reading takes the head (what a program says of itself at its start) and the tail; with *marker*, the
    head is the last place that holds it, searched for backwards through at most *search_bytes*. *most_bytes* are read
    at one visit; the rest waits for the next. *beside*: where the log stands among its rotated files, if not at *path*.
    """

    def __init__(
        self,
        path: Path,
        *,
        beside: Path | None = None,
        head_bytes: int = 256 << 10,
        tail_bytes: int = 8 << 20,
        marker: bytes = b"",
        search_bytes: int = 256 << 20,
        most_bytes: int = 4 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.beside = beside or path
        self.head_bytes = head_bytes
        self.tail_bytes = tail_bytes
        self.marker = marker
        self.search_bytes = search_bytes
        self.most_bytes = most_bytes
        self._clock = clock
        self._generations: list[Generation] = []
        """Those that are read or may still grow, the oldest first; the last one bears the name, or bore it last."""
        self.passed_over_bytes = 0
        """Of what the last reading found, more than may wait: it is not read."""
        self._behind: Generation | None = None
        """The one in which the last reading stopped before its end."""
        self._told: Generation | None = None
        """The one of the last piece."""
        self._is_unsettled = False
        """A rotation was under way at the last look."""
        self._known: list[_Known] = []
        self._truncated: list[_Truncated] = []
        self._copies: dict[Generation, list[_Known]] = {}
        """Of the generations that are held."""

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file that bears the name, or bore it last; None: none was read yet."""
        return self._generations[-1].identity if self._generations else None

    @property
    def place(self) -> str:
        """How far it was read, in whole lines: for `go_on`, in a later life of the program; empty: not at all."""
        generation = self._behind or (self._generations[-1] if self._generations else None)
        return generation.place if generation else ""

    @property
    def behind_bytes(self) -> int:
        """What the last reading left for the next, because it was more than one may read."""
        begin = self._generations.index(self._behind) if self._behind in self._generations else None
        return 0 if begin is None else sum(generation.left for generation in self._generations[begin:])

    def go_on(self, places: Iterable[str]) -> None:
        """Begin where an earlier life of the program stopped, if one of *places* is of this file.

        Renamed, copied or compressed meanwhile, it is looked for beside its name: what it still holds comes first, then
        what came between, then the new one.
        """
        told = [place for place in places if place.count(":") == 4]
        if not told:
            return
        there = rotated(self.beside)
        plain = [self.path, *(path for path in reversed(there) if path.suffix != ".gz")]
        packed = [path for path in reversed(there) if path.suffix == ".gz"][:UNPACKED_MAX]

        def is_it(file: Generation) -> bool:
            return any(file.is_of(place) and _goes_on(file, place) for place in told)

        def is_a_copy(file: Generation) -> bool:
            return any(_tells_much(place) and _goes_on(file, place) for place in told)

        def was_truncated(file: Generation) -> bool:
            return any(file.is_of(place) for place in told)

        begun = self._begun_at(plain, is_it) or self._begun_at([*plain, *packed], is_a_copy)
        begun = begun or self._begun_at(plain, was_truncated)  # all of it is new
        if begun is not None:
            older = there[: there.index(begun)] if begun in there else there
            self._pass_by(older, self._generations[0])

    def _begun_at(self, paths: Iterable[Path], is_it: Callable[[Generation], bool]) -> Path | None:
        """Hold the first of the files that is it, and return its path."""
        for path in paths:
            generation = _opened(path)
            if generation is not None and is_it(generation):
                self._generations = [generation]
                return path
            if generation is not None:
                generation.close()
        return None

    def pieces(self, until: float = math.inf) -> Iterator[Piece]:
        """Yield what is new, until that moment of the clock; each file is read a little at least.

        What older generations still held comes first. Raises OSError when the name can't be opened.
        """
        refusal: OSError | None = None
        left = self.most_bytes
        if not self._generations:
            for head in self._begun():
                left -= len(head.data)
                yield head
        else:
            try:
                self._follow()
            except OSError as e:
                refusal = e
        self._behind = None
        self.passed_over_bytes = self._pass_over_the_oldest()
        for generation in tuple(self._generations):
            final = self._is_over(generation)
            for lines in generation.news(left, final=final):
                generation.moved_at = self._clock()
                left -= len(lines.data)
                yield self._piece(generation, lines)
                if left <= 0 or self._clock() >= until:
                    self._behind = generation
                    return
            if final:
                self._let_go(generation)
        if refusal is not None:
            raise refusal

    def close(self) -> None:
        """Let go of the file; the next reading begins anew."""
        for generation in self._generations:
            generation.close()
        self._generations, self._behind, self._told = [], None, None
        self._known, self._truncated, self._copies = [], [], {}

    def _pass_over_the_oldest(self) -> int:
        """Give up what is more than may wait, and return how many bytes that was."""
        waiting = {generation: generation.left for generation in self._generations}
        over = given_up = sum(waiting.values()) - BACKLOG_BYTES
        for generation, left in waiting.items():
            if over <= 0:
                break
            if generation is self._generations[-1] or generation.is_compressed or left > over:
                end = generation.offset + min(over, left)
                generation.stand_at(end + generation.read(CHUNK_BYTES, end).find(b"\n") + 1, 0)
                self._told = None
            else:
                self._let_go(generation)
            over -= left
        return max(0, given_up)

    def _piece(self, generation: Generation, lines: Lines) -> Piece:
        joins = self._told is generation
        self._told = generation
        return Piece(lines.data, lines.offset, joins, lines.number)

    def _is_over(self, generation: Generation) -> bool:
        """Whether a generation without the name has come to its end."""
        place = self._generations.index(generation)
        newer = len(self._generations) - 1 - place
        return newer > HELD_MAX or (newer > 0 and self._clock() - generation.moved_at > OUTLIVES_SECONDS)

    def _let_go(self, generation: Generation) -> None:
        copies = self._copies.pop(generation, [])
        self._remember(*copies, _known(generation, generation.read(HEAD_BYTES, 0)))
        self._generations.remove(generation)
        generation.close()

    # Where the log went ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """See what became of the file since the last look, and take in what came after it. Raises OSError."""
        now = self._clock()
        current = self._generations[-1]
        if not current.is_intact:  # copytruncate, or a program that writes its log anew
            was_told = self._told is current
            self._truncated.append(_Truncated(current.head, current.offset, current.place, was_told))
            del self._truncated[:-TRUNCATED_MAX]
            current.begin_anew()
            self._told, self._is_unsettled = None, True
        named = self._named(current)
        if named is None and not self._is_unsettled and current.offset:
            return
        if named is not None:
            current.moved_at = now
        between = list(self._between(named or current))
        for generation in between:
            generation.moved_at = now
        older = self._generations if named is not None else self._generations[:-1]
        self._generations = [*older, *between, named or current]

    def _named(self, current: Generation) -> Generation | None:
        """Return what bears the name now, if it is another file. A name without a file may get one soon: None."""
        try:
            state = self.path.stat()
            return None if (state.st_dev, state.st_ino) == current.identity else Generation(self.path)
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return None

    def _between(self, named: Generation) -> Iterator[Generation]:
        """Yield what bore the name since the last look and lost it again, or holds the rest of what was truncated."""
        self._is_unsettled, self._copies = False, {}
        for path in rotated(self.beside):
            generation = _opened(path)
            if generation is None:  # renamed or compressed this moment
                self._is_unsettled = True
            elif self._is_news(generation, [*self._generations, named]):
                yield generation
            else:
                generation.close()

    def _is_news(self, file: Generation, held: list[Generation]) -> bool:
        """Whether a rotated file holds what was not read; if so, it stands where that begins."""
        head = file.read(HEAD_BYTES, 0)
        if not head or any(own.identity == file.identity for own in held):
            return False
        if any(known.is_of(file, head) for known in self._known):
            return False
        copied = next((own for own in held if own.begins_with(file)), None)
        if copied is not None:  # for now, the copy holds nothing that the file itself does not hold
            self._copies.setdefault(copied, []).append(_known(file, head))
            self._is_unsettled = True
            return False
        self._remember(_known(file, head))
        truncated = next((each for each in self._truncated if each.is_copied_by(file, head)), None)
        if truncated is None:
            return True
        self._truncated.remove(truncated)
        self._told = file if truncated.was_told and self._told is None else self._told
        return file.offset > 0

    def _pass_by(self, paths: Iterable[Path], named: Generation) -> None:
        """Take note of files from before our time, but of no copy in the making of the one that is followed."""
        for path in paths:
            file = _opened(path)
            if file is not None:
                if not named.begins_with(file):
                    self._remember(_known(file, file.read(HEAD_BYTES, 0)))
                file.close()

    def _remember(self, *known: _Known) -> None:
        self._known = [*self._known, *known][-REMEMBERED_MAX:]

    # The first reading -----------------------------------------------------------------------------------------------

    def _begun(self) -> Iterator[Piece]:
        """Open the file, and yield the head of a large one. Raises OSError."""
        generation = Generation(self.path)
        self._generations = [generation]
        self._pass_by(rotated(self.beside), generation)
        size = generation.size
        if size <= self.head_bytes + self.tail_bytes:
            return
        tail = size - self.tail_bytes
        at = self._last_marker(generation, tail) if self.marker else None
        at = 0 if at is None else at
        data = generation.read(min(self.head_bytes, tail - at), at)
        yield Piece(data[: data.rfind(b"\n") + 1], at, joins=False, line=_line_at(generation, at))
        tail += generation.read(CHUNK_BYTES, tail).find(b"\n") + 1
        generation.stand_at(tail, _line_at(generation, tail))

    def _last_marker(self, generation: Generation, tail: int) -> int | None:
        """Return the beginning of the last line before *tail* that holds the marker."""
        end = tail
        while end > max(0, tail - self.search_bytes):
            begin = max(0, end - CHUNK_BYTES)
            data = generation.read(end - begin + len(self.marker), begin)
            found = data.rfind(self.marker)
            if found >= 0:
                return begin + data.rfind(b"\n", 0, found) + 1
            end = begin
        return None


def _known(file: Generation, head: bytes) -> _Known:
    return _Known(file.identity, file.content_size, head)


def _opened(path: Path) -> Generation | None:
    try:
        return Generation(path)
    except OSError:
        return None


def _goes_on(generation: Generation, place: str) -> bool:
    """Let the file stand at the place, if it was read there."""
    try:
        return generation.goes_on_at(place)
    except (OSError, ValueError, OverflowError):
        return False


def _tells_much(place: str) -> bool:
    """Whether a place has enough of what was read to know a copy by it."""
    return len(place.rpartition(":")[2]) == 2 * FINGERPRINT_BYTES


def _line_at(generation: Generation, offset: int) -> int:
    """Return the number of the line that begins at *offset*, or 0 where counting would take long."""
    if offset > COUNTED_BYTES:
        return 0
    return 1 + sum(generation.read(CHUNK_BYTES, at)[: offset - at].count(b"\n") for at in range(0, offset, CHUNK_BYTES))
