"""The flight recorder of a daemon: it writes beside the visits, and holds in memory what the disk does not take."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from doctor.recorder.folder import Bounds, Folder, RecorderError, Shelf
from doctor.recorder.segment import Entry
from doctor.snapshot import Position, Recorder, Source

WAITING_MAX = 512
"""Visits held until the disk takes them. The history shares those of its hour, so that they cost little."""

PATIENCE_SECONDS = 10.0
"""guess: a disk that has not written a few kilobytes by then is not slow but hung."""

FAREWELL_SECONDS = 5.0
"""How long the end of the program waits for the last visits to be written."""


class FlightRecorder:
    """Writes every visit that it is given, in a thread of its own: a hung disk must not hold the daemon.

    Raises RecorderError where another daemon records into the same folder. A disk that refuses is no error: it is
    told in `state`, and asked again at each visit. *simulated*: whether the visits are of a simulated node. A drill and
    the real node may share a folder, and neither takes the other's past for its own.
    """

    def __init__(
        self,
        directory: Path,
        bounds: Bounds,
        *,
        keep_seconds: float,
        simulated: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.past: tuple[Entry, ...] = ()
        """The entries of the last *keep_seconds* before the daemon started, oldest first, until somebody takes them."""
        self.damaged = 0
        """Places of the recording that could not be read back."""
        self._clock = clock
        self._simulated = simulated
        self._shelf = Shelf(directory, bounds)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Entry]] = deque()
        self._number = 0
        """Visits of this life."""
        self._before: int | None = None
        """Visits of earlier lives; None: the folder could not be read yet, and nothing may be written before it is."""
        self._refusal: RecorderError | None = None
        self._failing_since: float | None = None
        self._failure = ""
        self._lost = 0
        self._writing_since: float | None = clock()
        self._starts = True
        self._ends = False
        self._thread = threading.Thread(target=self._work, args=(keep_seconds,), name="flight-recorder", daemon=True)
        self._thread.start()
        with self._changed:  # a disk that hangs must not hold the start either: then it is one without a past
            self._changed.wait_for(lambda: not self._starts, PATIENCE_SECONDS)
            self._starts = False
            if self._refusal is not None:
                raise self._refusal

    @property
    def positions(self) -> tuple[Position, ...]:
        """How far each source was read when the daemon ended."""
        of_source: dict[Source, tuple[Position, ...]] = {}
        for entry in self.past:
            told = entry.snapshot.positions
            of_source |= {source: tuple(p for p in told if p.source is source) for source in {p.source for p in told}}
        return tuple(position for positions in of_source.values() for position in positions)

    def keep(self, entry: Entry) -> None:
        """Write this visit when the disk takes it. Returns at once."""
        with self._changed:
            self._number += 1
            self._waiting.append((self._number, entry))
            if len(self._waiting) > WAITING_MAX:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify()

    def state(self) -> Recorder:
        """Return how it fares, for the next snapshot."""
        with self._changed:
            since, failure = self._failing_since, self._failure
            busy = self._writing_since
            if busy is not None and self._clock() - busy > PATIENCE_SECONDS and self._waiting:
                since = since or self._waiting[0][1].snapshot.at
                failure = f"a write has not returned for {self._clock() - busy:.0f} s"
            return Recorder(
                directory=str(self.directory),
                failing_since=since,
                failure=failure,
                waiting=len(self._waiting) if since is not None else 0,
                lost=self._lost,
                damaged=self.damaged,
            )

    def close(self) -> None:
        """Write what waits, and let go of the folder."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join(FAREWELL_SECONDS)

    def _work(self, keep_seconds: float) -> None:
        self._begin(keep_seconds)
        with self._changed:
            self._writing_since = None
            self._starts = False
            self._changed.notify_all()
        while self._refusal is None:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if not self._waiting:
                    break
                number, entry = self._waiting[0]
                self._writing_since = self._clock()
            failure = self._written(number, entry)
            with self._changed:
                self._writing_since = None
                if not failure:
                    if self._waiting and self._waiting[0][0] == number:  # else it was given up meanwhile
                        self._waiting.popleft()
                    if not self._waiting:
                        self._failing_since, self._failure = None, ""
                    continue
                if self._failing_since is None:
                    self._failing_since = entry.snapshot.at
                self._failure = failure
                if self._ends:
                    break
                self._changed.wait()  # for the next visit
        self._shelf.close()

    def _begin(self, keep_seconds: float) -> None:
        """Take the folder, and read the past from it; what can't be done now is tried again at the first visit."""
        try:
            self._shelf.take()
        except RecorderError as e:
            self._refusal = e
            return
        except OSError:
            return
        folder = Folder(self.directory)
        try:
            before, past = folder.tail(keep_seconds)
        except (OSError, RecorderError):
            return
        with self._changed:
            self._before = before
            if self._starts:
                self.past = tuple(e for e in past if e.snapshot.node.simulated is self._simulated)
                self.damaged = len(folder.unread)

    def _written(self, number: int, entry: Entry) -> str:
        """Write, and return why it failed; empty: it did not."""
        try:
            if self._before is None:
                self._shelf.take_again()
                self._before, _ = Folder(self.directory).tail(0)
            self._shelf.write(entry, self._before + number, is_start=number == 1)
        except OSError as e:
            return e.strerror or str(e)
        except RecorderError as e:
            return str(e)
        return ""
