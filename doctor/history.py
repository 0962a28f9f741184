"""The last visits: the only memory that symptoms and rules have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

from doctor.snapshot import EngineEvent, Gpu, KernelEvent, Snapshot

T = TypeVar("T")


class History:
    """The snapshots of the last `keep` seconds, oldest first; never empty, never changed.

    Raises ValueError when made of nothing.
    """

    __slots__ = ("_measured", "keep", "snapshots")

    def __init__(self, snapshots: tuple[Snapshot, ...], keep: float) -> None:
        if not snapshots:
            msg = "a history holds at least one snapshot"
            raise ValueError(msg)
        self.snapshots = snapshots
        self.keep = keep
        self._measured: dict[object, Any] = {}

    def after(self, snapshot: Snapshot) -> History:
        """Return the history that follows when *snapshot* is seen: what is older than `keep` falls out."""
        oldest = snapshot.at - self.keep
        kept = tuple(past for past in self.snapshots if past.at >= oldest)
        return History((*kept, snapshot), self.keep)

    @property
    def latest(self) -> Snapshot:
        """The last visit."""
        return self.snapshots[-1]

    @property
    def now(self) -> float:
        """The time of the last visit, Unix seconds."""
        return self.latest.at

    @property
    def span_seconds(self) -> float:
        """Time from the first visit to the last."""
        return self.now - self.snapshots[0].at

    def window(self, seconds: float) -> tuple[Snapshot, ...]:
        """Return the visits of the last *seconds*, the latest among them."""
        oldest = self.now - seconds
        return tuple(s for s in self.snapshots if s.at >= oldest)

    def kernel_events(self) -> Iterator[KernelEvent]:
        """Yield every kernel event that the history holds, in the order seen."""
        for snapshot in self.snapshots:
            yield from snapshot.kernel

    def engine_events(self) -> Iterator[EngineEvent]:
        """Yield every engine log event that the history holds, in the order seen."""
        for snapshot in self.snapshots:
            yield from snapshot.engine_events

    def of_gpu(self, uuid: str) -> Iterator[tuple[float, Gpu]]:
        """Yield (time, GPU) for each visit that saw this GPU, oldest first."""
        for snapshot in self.snapshots:
            gpu = snapshot.gpu(uuid)
            if gpu is not None:
                yield snapshot.at, gpu

    def measure(self, symptom: Callable[[History], T]) -> T:
        """Return `symptom(self)`, computed once however many rules ask."""
        if symptom not in self._measured:
            self._measured[symptom] = symptom(self)
        return self._measured[symptom]


def measured_once(symptom: Callable[[History], T]) -> Callable[[History], T]:
    """Decorate a symptom that several rules read, so that it is computed once a visit.

    The symptom must return a value that nobody changes (a tuple, a frozen struct), never an iterator.
    """

    @wraps(symptom)
    def ask(history: History) -> T:
        return history.measure(symptom)

    return ask
