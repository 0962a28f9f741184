"""Processes and threads, as /proc/PID/stat tells of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from doctor.collectors import files

KERNEL_THREAD = 0x00200000
"""PF_KTHREAD in a task's flags (include/linux/sched.h)."""

STAT_BYTES = 4096

PASSED_OVER_SECONDS = 60.0
"""guess: a pid comes back only after all others (32768 at least) were given."""


class Task(msgspec.Struct, frozen=True):
    """What stat says of a process or a thread, as far as somebody here reads it (proc_pid_stat(5))."""

    pid: int
    name: str
    """The kernel's `comm`; it may hold blanks and brackets."""
    state: str
    """A letter."""
    parent: int
    flags: int
    cpu_ticks: int
    start_ticks: int
    """After boot."""

    @property
    def is_of_kernel(self) -> bool:
        """Whether it is a thread of the kernel itself: it runs no program, and never will."""
        return bool(self.flags & KERNEL_THREAD)


def task_of(folder: str) -> Task | None:
    """Return the task of a folder of /proc, or None when it is gone or not understood."""
    try:
        stat = files.piece_of(f"{folder}/stat", STAT_BYTES).decode("utf-8", "backslashreplace")
        pid, _, rest = stat.partition(" (")
        name, _, fields = rest.rpartition(") ")
        words = fields.split(None, 20)
        return Task(
            pid=int(pid),
            name=name,
            state=words[0],
            parent=int(words[1]),
            flags=int(words[6]),
            cpu_ticks=int(words[11]) + int(words[12]),
            start_ticks=int(words[19]),
        )
    except (OSError, ValueError, IndexError):
        return None


class Tasks:
    """The processes of a root, look after look.

    Most processes of a large machine are threads of its kernel, thousands, and to read them all at every visit costs more
    than all else. Those that are of no interest are passed over, for a minute, because a pid may be given anew.
    """

    def __init__(
        self,
        root: Path,
        *,
        of_kernel: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare. *of_kernel*: whether a thread of the kernel is of interest, by its name; None: none is."""
        self._proc = root / "proc"
        self._of_kernel = of_kernel
        self._clock = clock
        self._passed_over: set[str] = set()
        self._until = -math.inf

    def __iter__(self) -> Iterator[Task]:
        """Look, and yield what there is. Raises OSError when /proc can't be read."""
        if self._clock() >= self._until:
            self._passed_over.clear()
            self._until = self._clock() + PASSED_OVER_SECONDS
        for name in files.names_in(self._proc):
            task = task_of(f"{self._proc}/{name}") if name.isdigit() and name not in self._passed_over else None
            if task is None:
                continue
            if task.is_of_kernel and not (self._of_kernel and self._of_kernel(task.name)):
                self._passed_over.add(name)
            else:
                yield task
