"""The board at the door: the last report, shown while it is fresh."""

from __future__ import annotations

import time
from collections.abc import Callable

from doctor.report import Report

STALE_AFTER_INTERVALS = 3
"""A report older than this many intervals is shown no more. guess: one visit may be slow, one may fail."""


class Board:
    """The last report, shown while it is fresh."""

    def __init__(self, interval_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_after = STALE_AFTER_INTERVALS * interval_seconds
        self._clock = clock
        self._last: tuple[float, Report] | None = None

    def put(self, report: Report) -> None:
        """Show this report from now on."""
        self._last = (self._clock(), report)

    def age_seconds(self) -> float | None:
        """Return how long ago the last report came; None: there was none yet."""
        return None if self._last is None else self._clock() - self._last[0]

    def fresh(self) -> Report | None:
        """Return the last report, or None where there is none or it is stale."""
        last, age = self._last, self.age_seconds()
        return last[1] if last is not None and age is not None and age <= self._stale_after else None
