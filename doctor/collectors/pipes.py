"""Who stands at the other end of a pipe: the log of `vllm serve … | tee vllm.log` is written by `tee`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from doctor.collectors import files

IN_A_ROW = 4
"""Programs that a log goes through at most: `| grep -v health | ts | tee vllm.log`."""

REMEMBERED_MAX = 64


class Pipes:
    """The pipes of a root, each with the process that reads it as its standard input."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._readers: dict[str, int] = {}
        """By the kernel's name of the pipe, as last found."""

    def readers(self, pipe: str) -> Iterator[int]:
        """Yield the process that reads *pipe* (`pipe:[4711]`), the one that reads what that one writes, and so on."""
        for _ in range(IN_A_ROW):
            reader = self._reader(pipe)
            if reader is None:
                return
            yield reader
            pipe = _target(self.root / f"proc/{reader}/fd/1")

    def _reader(self, pipe: str) -> int | None:
        if not pipe.startswith("pipe:"):
            return None
        held = self._readers.pop(pipe, None)
        if held is None or _target(self.root / f"proc/{held}/fd/0") != pipe:
            held = next(_of_input(self.root, pipe), None)
        if held is not None:
            self._readers[pipe] = held
            for oldest in [*self._readers][:-REMEMBERED_MAX]:
                del self._readers[oldest]
        return held


def _of_input(root: Path, pipe: str) -> Iterator[int]:
    with os.scandir(root / "proc") as entries:
        for entry in entries:
            if entry.name.isdigit() and _target(root / f"proc/{entry.name}/fd/0") == pipe:
                yield int(entry.name)


def _target(descriptor: Path) -> str:
    """Return what a descriptor leads to; empty where it is closed, gone, or not ours to see."""
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""


STANDARD_ERROR = 2
"""Of a program that passes a log on, its own complaints."""


def written_by(root: Path, pid: int) -> tuple[int, ...]:
    """Return the descriptors by which a process may pass on what it reads; empty where that is not ours to see."""
    try:
        numbers = sorted(int(entry.name) for entry in (root / f"proc/{pid}/fdinfo").iterdir())
    except (OSError, ValueError):
        return ()
    return tuple(
        number
        for number in numbers
        if number != STANDARD_ERROR and _is_for_writing(root / f"proc/{pid}/fdinfo/{number}")
    )


def _is_for_writing(information: Path) -> bool:
    try:
        facts = dict(line.split(":", 1) for line in files.text_of(information, 4096).splitlines() if ":" in line)
        return int(facts["flags"], 8) & os.O_ACCMODE != os.O_RDONLY  # proc_pid_fdinfo(5): octal
    except (OSError, ValueError, KeyError):
        return False
