"""The board at the door: what was made of the last report, shown while it is fresh."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

STALE_AFTER_INTERVALS = 3
"""What is older than this many intervals is shown no more. guess: one visit may be slow, one may fail."""

T = TypeVar("T")


class Board(Generic[T]):
    """The last thing put here, and how old it is."""

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_seconds = interval_seconds
        self._clock = clock
        self._last: tuple[float, T] | None = None

    def put(self, thing: T) -> None:
        """Show this from now on."""
        self._last = (self._clock(), thing)

    def age_seconds(self) -> float | None:
        """Return how long ago the last one came; None: there was none yet."""
        return None if self._last is None else self._clock() - self._last[0]

    def fresh(self) -> T | None:
        """Return the last one, or None where there is none or it is stale."""
        last, age = self._last, self.age_seconds()
        stale_after = STALE_AFTER_INTERVALS * self.interval_seconds
        return last[1] if last is not None and age is not None and age <= stale_after else None
