"""The kernel log: /dev/kmsg, the journal, dmesg or a log file, whichever can be read; NVML is not needed."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.following import FollowedFile
from doctor.collectors.processes import booted_at
from doctor.collectors.programs import answer_of
from doctor.readers.kernel_log import KernelLogReader, with_boots_marked
from doctor.readers.patterns import LogPattern
from doctor.snapshot import Absent, KernelEvent, Position, Source, Unseen, Why

KMSG = "dev/kmsg"
LOG_FILES = ("var/log/kern.log", "var/log/dmesg")
RECORD_BYTES = 8192
"""A read of /dev/kmsg with a smaller buffer than the record fails with EINVAL (kernel: PRINTKRB_RECORD_MAX is 1 KiB,
extended records up to 8 KiB)."""

READ_SECONDS = 2.5
"""Half of the deadline. What is left is read at the next visits."""

EVENTS_A_VISIT = 300
"""Of a log that is followed, at each visit after the first: an hour of the worst storm stays below 100 MB."""

BATCH_RECORDS = 1000
"""Records that are read together: between two batches the time is looked at."""

FILE_BYTES = 16 << 20
"""Of a log file, at one visit."""

BOOT_SLACK_SECONDS = 5.0
"""/proc/stat tells the boot in whole seconds, and the clock may have been set since."""

LAGS = "it is written faster than it is read: the rest waits for the next visits"

REMEDY = "run as root, give the process CAP_SYSLOG, or add its user to group adm or systemd-journal"

_FACILITY = re.compile(rb"^(\d+),")
_NUMBER = re.compile(rb"^\d+,(\d+),")

Open = Callable[[str, int], int]


class _Way(Protocol):
    """One way to the kernel log. It goes on at a place of an earlier life where it is given one that still holds."""

    @property
    def place(self) -> str:
        """How far it was read; empty: not at all."""
        ...

    @property
    def line(self) -> int:
        """The number of the first line that it gave, where lines are counted; else 1."""
        ...

    @property
    def shortfall(self) -> str:
        """What of the log the last `news` did not give, in the operator's words; empty: nothing."""
        ...

    def news(self, until: float) -> Iterator[bytes]:
        """Yield the records since the last call, whole lines, until that moment of the monotonic clock.

        Raises OSError or CannotSeeError.
        """
        ...

    def close(self) -> None: ...


class _Kmsg:
    """The kernel's own buffer, one record a read; the open file remembers its place."""

    line = 1

    def __init__(self, path: Path, open_file: Open, every_facility: bool, boot: str, place: str) -> None:
        self._every_facility = every_facility
        self._boot = boot
        before, _, number = place.partition(":")
        self._last = int(number) if before == boot and number.isdecimal() else -1
        self.shortfall = ""
        self._file = open_file(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def place(self) -> str:
        return f"{self._boot}:{self._last}" if self._last >= 0 else ""

    def news(self, until: float) -> Iterator[bytes]:
        self.shortfall = ""
        overwritten = 0
        while batch := list(self._batch()):
            data = b""
            for record in batch:
                found = _NUMBER.match(record)
                number = int(found[1]) if found else self._last + 1
                if number > self._last:
                    overwritten += number - self._last - 1 if self._last >= 0 else 0
                    self._last = number if found else self._last
                    data += record if self._every_facility or _of_kernel(record) else b""
            yield data
            if overwritten:
                self.shortfall = f"records that the kernel overwrote before they were read: {overwritten}"
            if len(batch) < BATCH_RECORDS:
                return
            if time.monotonic() > until:
                self.shortfall = self.shortfall or LAGS
                return

    def _batch(self) -> Iterator[bytes]:
        for _ in range(BATCH_RECORDS):
            try:
                record = os.read(self._file, RECORD_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno == errno.EPIPE:  # records were overwritten before we came: go on with the oldest left
                    continue
                raise
            if not record:
                return
            yield record if record.endswith(b"\n") else record + b"\n"

    def close(self) -> None:
        os.close(self._file)


def _of_kernel(record: bytes) -> bool:
    """Whether the kernel itself wrote it: anyone who may write to /dev/kmsg can invent an Xid, with another facility."""
    match = _FACILITY.match(record)
    return match is None or int(match[1]) >> 3 == 0


class _File:
    """A file with the kernel's lines, in the form of /dev/kmsg or of syslog."""

    def __init__(self, path: Path, open_file: Open, every_facility: bool, place: str) -> None:
        os.close(open_file(str(path), os.O_RDONLY | os.O_CLOEXEC))
        self._file = FollowedFile(path, head_bytes=0, tail_bytes=FILE_BYTES, most_bytes=FILE_BYTES)
        self._file.go_on([place])
        self._every_facility = every_facility
        self.line = 1

    @property
    def place(self) -> str:
        return self._file.place

    @property
    def shortfall(self) -> str:
        return LAGS if self._file.behind_bytes else ""

    def news(self, until: float) -> Iterator[bytes]:
        for piece in self._file.pieces(until):
            if not piece.joins:
                self.line = max(piece.line, 1)
            if self._every_facility:
                yield piece.data
            else:
                yield b"".join(line for line in piece.data.splitlines(keepends=True) if _of_kernel(line))

    def close(self) -> None:
        self._file.close()


class _Journal:
    """`journalctl -k`, of this boot and the one before, so that history is told from news."""

    _CURSOR = re.compile(rb"^-- cursor: (\S+)\s*$", re.MULTILINE)

    line = 1
    shortfall = ""

    def __init__(self, arguments: Iterable[str], place: str) -> None:
        self._arguments = ["journalctl", "--dmesg", "--quiet", "--no-pager", "--output=json", "--show-cursor"]
        self._arguments += ["--output-fields=MESSAGE,_BOOT_ID", *arguments]
        self._cursor: str | None = place or None

    @property
    def place(self) -> str:
        return self._cursor or ""

    def news(self, until: float) -> Iterator[bytes]:  # noqa: ARG002 - one answer
        since = [f"--after-cursor={self._cursor}"] if self._cursor else ["--boot=0", "--lines=50000"]
        answer = answer_of([*self._arguments, *since], 3.0)
        cursor = self._CURSOR.search(answer)
        if cursor:
            self._cursor = cursor[1].decode("ascii", "replace")
            answer = answer[: cursor.start()]
        elif self._cursor is None and not answer.strip():
            raise CannotSeeError(Absent(Why.NO_PERMISSION, f"the journal shows no kernel line: {REMEDY}"))
        yield answer

    def close(self) -> None: ...


class _Dmesg:
    """`dmesg`, which always tells everything: what was told before is left out by its time since boot."""

    _UPTIME = re.compile(rb"^\[ *(\d+\.\d+)\]")
    line = 1
    shortfall = ""

    def __init__(self, boot: str, place: str) -> None:
        self._boot = boot
        before, _, uptime = place.partition(":")
        self._last = float(uptime) if before == boot else -1.0

    @property
    def place(self) -> str:
        return f"{self._boot}:{self._last}"

    def news(self, until: float) -> Iterator[bytes]:  # noqa: ARG002 - one answer
        fresh: list[bytes] = []
        last = self._last
        for line in answer_of(["dmesg", "--kernel"], 3.0).splitlines(keepends=True):
            uptime = self._UPTIME.match(line)
            if uptime is None or float(uptime[1]) > self._last:
                fresh.append(line)
            if uptime:
                last = max(last, float(uptime[1]))
        self._last = last
        yield b"".join(fresh)

    def close(self) -> None: ...


class KernelLog:
    """The kernel log of a root.

    *every_facility*: take what other programs wrote into /dev/kmsg for the kernel's, for tests of a whole node.
    *open_file* opens the log: a drill refuses there what a real kernel would refuse. *patterns*: of lines that the site
    wants kept.
    """

    source = Source.KERNEL_LOG
    deadline_seconds = 5.0
    after_engines = False

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        every_facility: bool = False,
        open_file: Open = os.open,
        patterns: Sequence[LogPattern] = (),
        positions: Sequence[Position] = (),
    ) -> None:
        self.root = root
        self._places = {position.of: position.place for position in positions if position.source is self.source}
        self._name = ""
        self.every_facility = every_facility
        self.open_file = open_file
        self.patterns = patterns
        self._way: _Way | None = None
        self._reader: KernelLogReader | None = None

    def collect(self, visit: Visit) -> Reading:
        """Return the events since the last visit. Raises CannotSeeError when no way to the log is open."""
        try:
            boot: float | None = booted_at(self.root)
        except (OSError, ValueError):
            boot = None
        until = time.monotonic() + READ_SECONDS
        if self._way is None or self._reader is None:
            self._way, self._reader, first = self._opened(boot, visit.at, until)
            for data in first:
                self._reader.follow(data)
        else:
            self._reader.booted_at, self._reader.now = boot, visit.at
            try:
                for data in self._way.news(until):
                    self._reader.follow(data)
            except OSError as e:
                self.close()
                raise CannotSeeError(files.why_not(e, "the kernel log", REMEDY)) from e
            except CannotSeeError:
                self.close()
                raise
        events = self._reader.take()
        self._reader.events_max = EVENTS_A_VISIT
        fields: dict[str, object] = {"kernel": _of_this_boot(events, boot)}
        if self._way.place:
            self._places[self._name] = self._way.place
            fields["positions"] = (Position(self.source, self._name, self._way.place),)
        short = self._way.shortfall
        unseen = (Unseen(self.source, Absent(Why.PASSED_OVER, short), "part of the kernel log"),) if short else ()
        return Reading(fields=fields, unseen=unseen)

    def _opened(self, boot: float | None, now: float, until: float) -> tuple[_Way, KernelLogReader, list[bytes]]:
        refusals: list[Absent] = []
        for name, open_way in self._ways():
            opened = _tried(name, open_way, until)
            if not isinstance(opened, Absent):
                kmsg = name == KMSG
                shown = f"/{KMSG}" if kmsg else Path(name).name
                reader = KernelLogReader(shown, booted_at=boot, now=now, sequence_numbers=kmsg, patterns=self.patterns)
                reader.lines = opened[0].line - 1
                self._name = name
                return opened[0], reader, opened[1]
            refusals.append(opened)
        refused = next((why for why in refusals if why.why is Why.NO_PERMISSION), None)
        raise CannotSeeError(refused or refusals[0])

    def _ways(self) -> Iterator[tuple[str, Callable[[], _Way]]]:
        """Yield the ways to the log, the best first."""
        kmsg = self.root / KMSG
        boot = _boot_id(self.root)

        def place(name: str) -> str:
            return self._places.get(name, "")

        def open_kmsg() -> _Way:
            if stat.S_ISCHR(kmsg.stat().st_mode):
                return _Kmsg(kmsg, self.open_file, self.every_facility, boot, place(KMSG))
            return _File(kmsg, self.open_file, self.every_facility, place(KMSG))

        yield KMSG, open_kmsg
        if self.root == Path("/"):
            yield "journal", lambda: _Journal((), place("journal"))
        elif (journal := self.root / "var/log/journal").is_dir():
            yield "journal", lambda: _Journal((f"--directory={journal}",), place("journal"))
        # Of a node's root in a container, too: the device is barred there, and its kernel is ours.
        if self.root == Path("/") or (boot and boot == _boot_id(Path("/"))):
            yield "dmesg", lambda: _Dmesg(boot, place("dmesg"))
        for name in LOG_FILES:
            yield name, lambda name=name: _File(self.root / name, self.open_file, self.every_facility, place(name))

    def close(self) -> None:
        """Let go of the log; the next visit begins anew."""
        if self._way is not None:
            self._way.close()
        self._way = self._reader = None


def _boot_id(root: Path) -> str:
    """Return what this boot is called; empty where that can't be told."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _tried(name: str, open_way: Callable[[], _Way], until: float) -> tuple[_Way, list[bytes]] | Absent:
    """Return the way and what the log holds already, or why this way is closed."""
    try:
        way = open_way()
        return way, list(way.news(until))
    except OSError as e:
        return files.why_not(e, f"/{name}", REMEDY)
    except CannotSeeError as e:
        return e.why


def _of_this_boot(events: list[KernelEvent], boot: float | None) -> tuple[KernelEvent, ...]:
    """Mark what belongs to an earlier boot: what stands before a boot's marker, or is stamped before it."""
    marked = with_boots_marked(events)
    if boot is None:
        return marked
    before = boot - BOOT_SLACK_SECONDS
    return tuple(
        msgspec.structs.replace(event, before_boot=True) if event.at is not None and event.at < before else event
        for event in marked
    )
