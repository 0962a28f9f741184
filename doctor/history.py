"""The last visits: the only memory that symptoms and rules have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import unwrap
from typing import Any, TypeVar

from msgspec.structs import replace

from doctor.snapshot import EngineEvent, Gpu, KernelEvent, Snapshot
from doctor.snapshot.clock import in_new_time
from doctor.snapshot.sharing import shared

T = TypeVar("T")

SAMPLES_SECONDS = 900.0
"""How long fast samples are remembered: an hour of them would take half of the daemon's memory. The symptom that reads
them looks back over 600 s."""


class History:
    """The snapshots of the last `keep` seconds, oldest first; never empty, never changed.

    Fast samples are remembered for `SAMPLES_SECONDS`. What did not change from one visit to the next is held once.
    Raises ValueError when made of nothing.
    """

    __slots__ = ("_by_gpu", "_measured", "_measured_before", "keep", "snapshots")

    def __init__(self, snapshots: tuple[Snapshot, ...], keep: float) -> None:
        if not snapshots:
            msg = "a history holds at least one snapshot"
            raise ValueError(msg)
        self.snapshots = snapshots
        self.keep = keep
        self._measured: dict[object, Any] = {}
        self._measured_before: dict[object, Any] = {}
        self._by_gpu: dict[float | None, dict[str, list[tuple[float, Gpu]]]] = {}

    def after(self, snapshot: Snapshot) -> History:
        """Return the history that follows when *snapshot* is seen: what is older than `keep` falls out.

        Where the wall clock was set in between, the past is told in the new time; where nobody knows by how much (the
        daemon was down meanwhile), what seems to lie in the future falls out, too.
        """
        oldest, stepped = snapshot.at - self.keep, snapshot.clock_stepped_seconds
        past = tuple(in_new_time(before, stepped) for before in self.snapshots) if stepped else self.snapshots
        kept = tuple(before for before in past if oldest <= before.at <= snapshot.at)
        sampled_since = snapshot.at - SAMPLES_SECONDS
        kept = tuple(_without_samples(before) if before.at < sampled_since else before for before in kept)
        following = History((*kept, shared(snapshot, self.latest)), self.keep)
        following._measured_before = {} if stepped else self._measured
        return following

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

    def of_gpu(self, uuid: str, seconds: float | None = None) -> Sequence[tuple[float, Gpu]]:
        """Return (time, GPU) for each visit that saw this GPU, oldest first; of the last *seconds* where given."""
        if seconds not in self._by_gpu:
            by_gpu: dict[str, list[tuple[float, Gpu]]] = {}
            for snapshot in self.snapshots if seconds is None else self.window(seconds):
                for gpu in snapshot.gpus:
                    by_gpu.setdefault(gpu.uuid, []).append((snapshot.at, gpu))
            self._by_gpu[seconds] = by_gpu
        return self._by_gpu[seconds].get(uuid, ())

    def measure(self, symptom: Callable[[History], T]) -> T:
        """Return `symptom(self)`, computed once however many rules ask."""
        if symptom not in self._measured:
            self._measured[symptom] = symptom(self)
        return self._measured[symptom]

    def measured_before(self, symptom: Callable[[History], T]) -> T | None:
        """Return what a symptom (`measured_once`) returned at the visit before, so that it need not begin anew.

        None: nothing. It may only save work: a history alone, without the one before, must give the same.
        """
        return self._measured_before.get(unwrap(symptom))


def _without_samples(snapshot: Snapshot) -> Snapshot:
    if not any(gpu.power.samples for gpu in snapshot.gpus):
        return snapshot
    bare = tuple(replace(gpu, power=replace(gpu.power, samples=())) for gpu in snapshot.gpus)
    return replace(snapshot, gpus=bare)


def measured_once(symptom: Callable[[History], T]) -> Callable[[History], T]:
    """Decorate a symptom that several rules read, so that it is computed once a visit.

    The symptom must return a value that nobody changes (a tuple, a frozen struct), never an iterator.
    """

    @wraps(symptom)
    def ask(history: History) -> T:
        return history.measure(symptom)

    return ask
