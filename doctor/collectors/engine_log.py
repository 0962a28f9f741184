"""Each engine's log: found by itself or named by the site, followed across rotation, truncation and restart."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import stat
import time
import zoneinfo
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from doctor.collectors import files, pipes
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.following import FollowedFile
from doctor.collectors.processes import environment_of
from doctor.collectors.programs import answer_of
from doctor.collectors.redaction import text_without_secrets
from doctor.readers.patterns import LogPattern
from doctor.readers.vllm_log import LogReader, LogReading
from doctor.snapshot import Absent, Engine, EngineEvent, LogState, Position, Source, Unseen, Why, known

MOST_LOGS = 16
"""Followed at once. The log of an engine that is gone is followed on: it tells of what the engine died."""

IDENTITY_MARKER = b"non-default args:"
"""Stands near the beginning of what vLLM says of itself at each start (0.9 and newer)."""

READ_SECONDS = 3.0
"""For all logs of a visit together: half of its deadline. What is left is read at the next visits."""

REMEDY = 'name it in the configuration: [engine] logs = ["/path/of/the.log"]'

CONTAINER_LOGS = (
    "var/lib/docker/containers/{id}/{id}-json.log",
    "var/lib/containers/storage/overlay-containers/{id}/userdata/ctr.log",
)
"""Docker's json-file driver; Podman's k8s-file driver."""

_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")

_FIELD = re.compile(r"[A-Z_][A-Z0-9_]*=")
"""systemd.journal-fields(7)."""

_CURSOR = re.compile(rb"^-- cursor: (\S+)\s*$", re.MULTILINE)


class _Log(Protocol):
    """A log that is followed."""

    name: str
    """As `Engine.log` says it."""

    def read(self, at: float, seconds: float) -> LogReading:
        """Return what is new, as much of it as can be read in this time. Raises OSError or CannotSeeError."""
        ...

    @property
    def behind_bytes(self) -> int:
        """What was left for the next reading."""
        ...

    @property
    def passed_over_bytes(self) -> int:
        """What the last reading gave up, because it was more than may wait."""
        ...

    @property
    def place(self) -> str:
        """How far it was read; empty: not at all."""
        ...

    def close(self) -> None: ...


class _FileLog:
    """A log in a file."""

    def __init__(
        self,
        name: str,
        shown: str,
        path: Path,
        utc_offset_seconds: float,
        *,
        beside: Path | None = None,
        patterns: Sequence[LogPattern],
        places: Iterable[str],
    ) -> None:
        self.name = name
        self.file = FollowedFile(path, beside=beside, marker=IDENTITY_MARKER)
        self.file.go_on(places)
        self._shown = Path(shown).name
        self._utc_offset_seconds = utc_offset_seconds
        self._patterns = patterns
        self._reader = self._begun(1)
        self._told: list[LogReading] = []
        """What was read of earlier files, and not taken yet: the one that followed could not be opened."""

    def _begun(self, line: int) -> LogReader:
        shown = self._shown if line else f"end of {self._shown}"
        return LogReader(
            self.name,
            name=shown,
            first_line=max(line, 1),
            utc_offset_seconds=self._utc_offset_seconds,
            patterns=self._patterns,
        )

    def read(self, at: float, seconds: float) -> LogReading:
        for piece in self.file.pieces(time.monotonic() + seconds):
            if not piece.joins:
                self._told.append(self._reader.finish())
                self._reader = self._begun(piece.line)
            self._reader.feed(piece.data, at)
        told, self._told = self._told, []
        return _one([*told, self._reader.take()])

    @property
    def place(self) -> str:
        return self.file.place

    @property
    def behind_bytes(self) -> int:
        return self.file.behind_bytes

    @property
    def passed_over_bytes(self) -> int:
        return self.file.passed_over_bytes

    def is_of(self, path: Path) -> bool:
        """Whether this is the log of *path*: by its name, or because both names mean one file."""
        if path == self.file.path:
            return True
        state = _state_of(path)
        if state is None:
            return False
        identity = (state.st_dev, state.st_ino)
        if self.file.identity is not None:
            return self.file.identity == identity
        own = _state_of(self.file.path)
        return own is not None and (own.st_dev, own.st_ino) == identity

    def close(self) -> None:
        self.file.close()


def _state_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


class _JournalLog:
    """The lines of a systemd unit in the journal, or those of which a field says something (`CONTAINER_NAME=vllm`)."""

    behind_bytes = passed_over_bytes = 0

    def __init__(self, whose: str, directory: Path | None, patterns: Sequence[LogPattern], cursor: str) -> None:
        self.name = f"journal:{whose}"
        self._reader = LogReader(self.name, patterns=patterns)  # journalctl is asked for UTC
        self._arguments = ["journalctl", "--quiet", "--no-pager", "--utc", "--output=short", "--show-cursor"]
        self._arguments += [whose if _FIELD.match(whose) else f"--unit={whose}"]
        self._arguments += [f"--directory={directory}"] if directory else []
        self._cursor: str | None = cursor or None

    def read(self, at: float, seconds: float) -> LogReading:  # noqa: ARG002 - the protocol's
        since = [f"--after-cursor={self._cursor}"] if self._cursor else ["--boot=0", "--lines=50000"]
        answer = answer_of([*self._arguments, *since], 4.0)
        cursor = _CURSOR.search(answer)
        if cursor:
            self._cursor = cursor[1].decode("ascii", "replace")
            answer = answer[: cursor.start()]
        elif self._cursor is None:
            remedy = REMEDY if os.geteuid() == 0 else "run as root or add the user to systemd-journal"
            why = Why.NOT_PRESENT if os.geteuid() == 0 else Why.NO_PERMISSION
            raise CannotSeeError(Absent(why, f"{self.name} shows no line: {remedy}"))
        self._reader.feed(answer, at)
        return self._reader.take()

    @property
    def place(self) -> str:
        return self._cursor or ""

    def close(self) -> None: ...


def _one(readings: list[LogReading]) -> LogReading:
    """Return several readings of one log as one."""
    last = readings[-1].state
    stamps = [reading.state.last_at for reading in readings if reading.state.last_at is not None]
    state = LogState(
        log=last.log,
        lines=sum(reading.state.lines for reading in readings),
        bytes=sum(reading.state.bytes for reading in readings),
        dropped=sum(reading.state.dropped for reading in readings),
        last_at=stamps[-1] if stamps else None,
        long_lines=sum(reading.state.long_lines for reading in readings),
    )
    return LogReading(tuple(event for reading in readings for event in reading.events), state)


class EngineLogs:
    """The logs of the engines that run or ran here.

    *logs*: paths, `journal:UNIT` or `journal:FIELD=value`, that the site names; they are read whether an engine runs or
    not. *patterns*: of lines that the site wants kept. *positions*: where an earlier life of the program stopped.
    """

    source = Source.ENGINE_LOG
    deadline_seconds = 6.0
    after_engines = True

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        logs: tuple[str, ...] = (),
        patterns: Sequence[LogPattern] = (),
        positions: Sequence[Position] = (),
    ) -> None:
        self.root = root
        self.logs = logs
        self.patterns = patterns
        self._positions = tuple(position for position in positions if position.source is self.source)
        self._followed: list[_Log] = []
        self._pipes = pipes.Pipes(root)

    def collect(self, visit: Visit) -> Reading:
        """Read what is new in every log. Raises CannotSeeError when there is none to read."""
        unseen: list[Unseen] = []
        wanted = list(self._named(visit.at))
        fields: dict[str, dict[str, object]] = {}
        for engine in visit.engines:
            found = self._found(engine, wanted, visit.at)
            if isinstance(found, Absent):
                unseen.append(Unseen(self.source, found, f"log of engine {engine.pid}"))
                fields[engine.id] = {"log": found}
            else:
                wanted += [log for log in found if log not in wanted]
                fields[engine.id] = {"log": found[0].name}
        self._followed = [*wanted, *(log for log in self._followed if log not in wanted)]
        for log in self._followed[MOST_LOGS:]:
            log.close()
        del self._followed[MOST_LOGS:]
        until = time.monotonic() + READ_SECONDS
        # What the others leave of the time is for those that lagged at the last visit.
        queue = sorted(self._followed, key=lambda log: log.behind_bytes)
        readings = {
            log: self._read(log, visit.at, (until - time.monotonic()) / (len(queue) - place), unseen)
            for place, log in enumerate(queue)
        }
        seen = [reading for log in self._followed if (reading := readings[log]) is not None]
        if not seen:
            raise CannotSeeError(
                unseen[0].why
                if unseen
                else Absent(Why.NOT_PRESENT, "no serving engine runs here, and the configuration names no log")
            )
        events = tuple(_without_secrets(event) for reading in seen for event in reading.events)
        return Reading(
            fields={
                "engine_events": events,
                "logs": tuple(reading.state for reading in seen),
                "positions": tuple(Position(self.source, log.name, log.place) for log in self._followed if log.place),
            },
            engine_fields=fields,
            unseen=tuple(unseen),
        )

    def _read(self, log: _Log, at: float, seconds: float, unseen: list[Unseen]) -> LogReading | None:
        try:
            reading = log.read(at, seconds)
        except OSError as e:
            unseen.append(Unseen(self.source, files.why_not(e, log.name), f"log {log.name}"))
        except CannotSeeError as e:
            unseen.append(Unseen(self.source, e.why, f"log {log.name}"))
        else:
            if log.behind_bytes:
                left = f"written faster than it is read: {log.behind_bytes / 1e6:.0f} MB wait for the next visits"
                unseen.append(Unseen(self.source, Absent(Why.PASSED_OVER, left), f"end of {log.name}"))
            if log.passed_over_bytes:
                over = f"more waited than may wait: the oldest {log.passed_over_bytes / 1e6:.0f} MB are not read"
                unseen.append(Unseen(self.source, Absent(Why.PASSED_OVER, over), f"part of {log.name}"))
            return reading
        return None

    def _named(self, at: float) -> Iterator[_Log]:
        """Yield the logs that the site names."""
        for name in self.logs:
            held = next((log for log in self._followed if log.name == name), None)
            if held is not None:
                yield held
            elif name.startswith("journal:"):
                yield self._journal(name.removeprefix("journal:"))
            else:
                path, offset = files.within(self.root, name), utc_offset_seconds(self.root, None, at)
                yield _FileLog(name, name, path, offset, patterns=self.patterns, places=self._places())

    def _journal(self, whose: str, wanted: Sequence[_Log] = ()) -> _Log:
        """Return the log of these lines of the journal, the one that is held already where there is one."""
        name = f"journal:{whose}"
        held = next((log for log in (*wanted, *self._followed) if log.name == name), None)
        if held is not None:
            return held
        directory = None if self.root == Path("/") else self.root / "var/log/journal"
        cursor = next((position.place for position in self._positions if position.of == name), "")
        return _JournalLog(whose, directory, self.patterns, cursor)

    def _places(self) -> list[str]:
        return [position.place for position in self._positions]

    def _found(self, engine: Engine, wanted: list[_Log], at: float) -> list[_Log] | Absent:
        """Return the engine's logs: its output files, else its container's, else its unit's, else the site's."""
        outputs = self._outputs(engine.pid)
        sources = [] if isinstance(outputs, Absent) else [source for source in outputs if source.path is not None]
        sources = sources or list(_of_container(self.root, engine))
        if sources:
            offset = utc_offset_seconds(self.root, engine.pid, at)
            return [self._followed_file(sources[0].name, source, offset, wanted) for source in sources]
        # systemd gives a unit a socket to the journal; any other output leads elsewhere.
        to_journal = isinstance(outputs, Absent) or any(source.name.startswith("socket:") for source in outputs)
        if to_journal and known(engine.unit) and not known(engine.container):
            return [self._journal(engine.unit, wanted)]
        if wanted:  # the site names logs because the search does not find them
            return [wanted[0]]
        if known(engine.container) and shutil.which("journalctl"):  # where Podman writes, and Docker's journald driver
            return [self._journal(f"CONTAINER_ID_FULL={engine.container}", wanted)]
        if isinstance(outputs, Absent):
            return outputs
        where = ", ".join(sorted({_kind(source.name) for source in outputs})) or "nowhere"
        return Absent(Why.NOT_PRESENT, f"its output goes to {where}; {REMEDY}")

    def _outputs(self, pid: int) -> list[_Output] | Absent:
        """Return where the output of an engine goes, or why that can't be told; through pipes to the file behind them."""
        outputs = _outputs(self.root, pid)
        return outputs if isinstance(outputs, Absent) else [self._behind(output) for output in outputs]

    def _behind(self, output: _Output) -> _Output:
        for reader in self._pipes.readers(output.name):
            written = _outputs(self.root, reader, pipes.written_by(self.root, reader))
            ends = [] if isinstance(written, Absent) else [end for end in written if end.path is not None]
            if ends:  # a lock or a state that is held open beside the log is empty
                return next((end for end in ends if _size(end) > 0), ends[0])
        return output

    def _followed_file(self, name: str, source: _Output, offset: float, wanted: list[_Log]) -> _Log:
        """Return the log of a file, the one that is held already where the file is the same.

        *name*: of the engine's first log; its standard error in another file counts to the same log.
        """
        assert source.path is not None
        for log in (*wanted, *self._followed):
            if isinstance(log, _FileLog) and log.is_of(source.path):
                return log
        return _FileLog(
            name, source.name, source.path, offset, beside=source.beside, patterns=self.patterns, places=self._places()
        )

    def close(self) -> None:
        """Let go of every log."""
        for log in self._followed:
            log.close()
        self._followed = []


class _Output(msgspec.Struct, frozen=True):
    """Where an engine's output goes."""

    name: str
    """A path, or the kernel's name of what is no file: `pipe:[4711]`."""
    path: Path | None = None
    """None: to something that is no file."""
    beside: Path | None = None
    """Where it stands among its rotated files, if not at the path."""


def _kind(name: str) -> str:
    """Return a path as it is, and of anything else what it is: `pipe`."""
    return name if name.startswith("/") else name.partition(":")[0]


def _size(output: _Output) -> int:
    state = _state_of(output.path) if output.path is not None else None
    return state.st_size if state is not None else 0


def _outputs(root: Path, pid: int, descriptors: Iterable[int] = (1, 2)) -> list[_Output] | Absent:
    """Return where descriptors of a process (its standard output and error) lead, or why that can't be told."""
    found: dict[str, _Output] = {}
    real = os.path.ismount(root / "proc")
    for number in descriptors:
        descriptor = root / f"proc/{pid}/fd/{number}"
        try:
            target = str(descriptor.readlink())
        except PermissionError:
            return Absent(Why.NO_PERMISSION, f"where the engine's output goes: run as root, or {REMEDY}")
        except OSError:  # closed
            continue
        if not target.startswith("/"):  # a pipe, a socket
            found.setdefault(target, _Output(target))
            continue
        name = target.removesuffix(" (deleted)")
        inside = files.within(root / f"proc/{pid}/root", name)
        # The kernel's link leads to the open file itself, wherever it was renamed to, and out of any container.
        path = descriptor if real else inside
        state = _state_of(path)
        if state is not None and stat.S_ISREG(state.st_mode):
            found.setdefault(target, _Output(name, path, inside))
        else:
            found.setdefault(target, _Output(target))
    return list(found.values())


def _of_container(root: Path, engine: Engine) -> Iterator[_Output]:
    """Yield the log file that the container's runtime writes, the newest first."""
    if not known(engine.container):
        return
    for form in CONTAINER_LOGS:
        path = root / form.format(id=engine.container)
        if path.exists():
            yield _Output(f"docker:{engine.container[:12]}", path)
            return
    pod = _POD.search(engine.cgroup) if known(engine.cgroup) else None
    patterns = [f"var/log/containers/*-{engine.container}.log"]
    if pod:
        patterns.append(f"var/log/pods/*_{pod[1].replace('_', '-')}/*/*.log")
    for pattern in patterns:
        logs = sorted(root.glob(pattern), key=lambda path: path.lstat().st_mtime, reverse=True)
        if logs:
            shown = f"/{logs[0].relative_to(root)}"
            yield _Output(shown, files.within(root, shown))
            return


def utc_offset_seconds(root: Path, pid: int | None, at: float) -> float:
    """Return how far east of UTC the clock stands that stamps the log: the engine's own zone, else the root's."""
    inside = root if pid is None else root / f"proc/{pid}/root"
    zone: datetime.tzinfo | None = None
    try:
        name = environment_of(root, pid).get("TZ", "").lstrip(":") if pid is not None else ""
        if name:
            zone = zoneinfo.ZoneInfo(name)
        else:
            with files.within(inside, "/etc/localtime").open("rb") as file:
                zone = zoneinfo.ZoneInfo.from_file(file)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        zone = datetime.timezone.utc  # what containers without a zone have
    offset = datetime.datetime.fromtimestamp(at, zone).utcoffset()
    return offset.total_seconds() if offset else 0.0


def _without_secrets(event: EngineEvent) -> EngineEvent:
    return msgspec.structs.replace(
        event,
        text=text_without_secrets(event.text),
        facts={
            name: text_without_secrets(value) if isinstance(value, str) else value
            for name, value in event.facts.items()
        },
    )
