"""What the daemon and its children cost, from /proc."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from exporters.prometheus import Cost

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def costs() -> dict[str, Cost]:
    """Return the cost of this process as `daemon` and that of its descendants, together, as `children`.

    What ended children used counts on, so that the sum never falls. Without /proc, or without the kernel's list of
    children, what is not known is left out.
    """
    of_self, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Cost] = {}
    try:
        own = os.getpid()
        found["daemon"] = Cost(of_self.ru_utime + of_self.ru_stime, _resident_bytes(own), _proportional_bytes(own))
        living = [_cost(pid) for pid in _descendants(own)]
        cpu = ended.ru_utime + ended.ru_stime + sum(cost.cpu_seconds for cost in living)
        parts = [cost.proportional_bytes for cost in living if cost.proportional_bytes is not None]
        proportional = sum(parts) if len(parts) == len(living) else None
        found["children"] = Cost(cpu, sum(cost.resident_bytes for cost in living), proportional)
    except OSError:
        pass  # not Linux as we know it; the rest of the page is no worse for it
    return found


def number_of_threads() -> int | None:
    """Return how many threads this process has, those of libraries too."""
    return _entries(PROC / "self/task")


def number_of_open_fds() -> int | None:
    """Return how many file descriptors this process holds."""
    return _entries(PROC / "self/fd")


def _entries(folder: Path) -> int | None:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return None


def _descendants(pid: int) -> Iterator[int]:
    for thread in list((PROC / str(pid) / "task").iterdir()):
        try:
            children = (thread / "children").read_text().split()
        except FileNotFoundError:
            if pid == os.getpid() and thread.name == str(pid):
                raise  # the main thread is there, so the kernel keeps no such list
            continue
        for child in map(int, children):
            yield child
            try:
                yield from _descendants(child)
            except OSError:
                continue  # it ended meanwhile


def _cost(pid: int) -> Cost:
    try:
        words = (PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
        seconds = (int(words[11]) + int(words[12])) / TICKS_PER_SECOND
        return Cost(seconds, _resident_bytes(pid), _proportional_bytes(pid))
    except (OSError, ValueError, IndexError):
        return Cost(0.0, 0, 0)  # it ended meanwhile


def _proportional_bytes(pid: int) -> int | None:
    """Return the memory of a process in which pages that several share count in part for each (proc_pid_smaps(5))."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None  # before Linux 4.14, or the kernel was built without it
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), None)


def _resident_bytes(pid: int) -> int:
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE_BYTES
