"""Whether this program may have the GPUs open: not while somebody resets one or unloads the driver."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doctor.collectors import files
from doctor.snapshot import Absent, Why

HOLD_SECONDS = 600.0
"""How long access is let go where nobody says. guess: a reset takes a minute, a new driver some."""
HOLD_MAX_SECONDS = 4 * 3600.0
"""guess: a maintenance window. It is never let go for ever: a forgotten one would leave the node unwatched."""


_GPU = re.compile(r"^/dev/nvidia\d+$")


class GpuAccess:
    """Lets go of the GPUs when an operator asks for it, and says when they may be opened again.

    Its methods may be called by any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tell: Callable[..., Any] = _nobody
        """Where an event goes: called with its name and its facts."""
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None
        self._why = Absent(Why.NOT_ASKED)
        self._retaken = False
        self._let_go: Callable[[], int | None] | None = None

    def held_by(self, let_go: Callable[[], int | None]) -> None:
        """Take note of who has the GPUs open: *let_go* closes them, and returns the pid of a process that could not."""
        self._let_go = let_go

    @property
    def is_held(self) -> bool:
        """Whether there is anybody who could let go."""
        return self._let_go is not None

    def release(self, seconds: float, by: str) -> int | None:
        """Let go of the GPUs for so long. Return the pid of a process that still has them open; None: there is none."""
        seconds = min(seconds, HOLD_MAX_SECONDS)
        with self._lock:
            self._until = self._clock() + seconds
            self._why = Absent(
                Why.NOT_ASKED,
                f"GPU access was let go for {words_of(seconds)} (by {by}); `gpu-doctor retake-gpu` takes it up again earlier",
            )
        held = self._let_go() if self._let_go is not None else None
        self.tell("gpu access let go", seconds=seconds, by=by, **({} if held is None else {"held_by": held}))
        return held

    def retake(self, by: str) -> bool:
        """Let the GPUs be opened again; return whether they had been let go."""
        with self._lock:
            was, self._until = self._until, None
            self._retaken |= was is not None
        if was is not None:
            self.tell("gpu access taken up", by=by)
        return was is not None

    def why_not(self) -> Absent | None:
        """Return why the GPUs may not be opened now; None: they may."""
        with self._lock:
            until, why = self._until, self._why
        if until is None:
            return None
        if self._clock() < until:
            return why
        self.retake("the time is over")
        return None

    def was_retaken(self) -> bool:
        """Whether the GPUs had been let go since this was last asked, and may be opened again."""
        with self._lock:
            retaken, self._retaken = self._retaken, False
        return retaken


def _nobody(event: str, **facts: object) -> None:
    """Listen to no event."""


def holders(root: Path = Path("/")) -> list[str]:
    """Return the processes that have a GPU open, as far as this user may see: `nv-hostengine (pid 1633)`."""
    pids = sorted(int(name) for name in files.names_in(root / "proc") if name.isdecimal())
    return [f"{_name_of(root, pid)} (pid {pid})" for pid in pids if _has_gpu_open(root / f"proc/{pid}/fd")]


def _has_gpu_open(descriptors: Path) -> bool:
    try:
        names = files.names_in(descriptors)
    except OSError:  # it is gone, or another user's
        return False
    return any(_GPU.match(_target_of(descriptors / name)) for name in names)


def _target_of(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # it was closed while we looked
        return ""


def _name_of(root: Path, pid: int) -> str:
    try:
        return files.word_of(root / f"proc/{pid}/comm")
    except OSError:
        return "a process"


def words_of(seconds: float) -> str:
    """Return a span of time in words."""
    for name, length in (("hour", 3600), ("minute", 60)):
        if seconds >= length and seconds % length == 0:
            number = round(seconds / length)
            return f"{number} {name}{'s' if number > 1 else ''}"
    return f"{seconds:.0f} seconds"
