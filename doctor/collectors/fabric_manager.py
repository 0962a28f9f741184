"""NVIDIA's fabric manager: unit, process, version and log, and the NVSwitches that it manages."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.following import FollowedFile
from doctor.collectors.programs import answer_of
from doctor.collectors.tasks import Task, Tasks, task_of
from doctor.readers import fabric_manager_log
from doctor.snapshot import Absent, FabricManager, FabricMessage, Maybe, NvSwitch, Source, Unseen, Why

UNIT = "nvidia-fabricmanager.service"
UNIT_FOLDERS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
PROGRAM = "nv-fabricmanager"
COMM = PROGRAM[:15]
LOG = "var/log/fabricmanager.log"
LOG_BYTES = 1 << 20
"""Of the log's end; an inband message of a multicast team is some 400 bytes."""

MOST_MESSAGES = 200
"""Of one visit, the last ones: a flood of non-fatal errors repeats itself."""

_PACKAGE = re.compile(
    r"^Package: (?:nvidia-fabricmanager|cuda-drivers-fabricmanager)[^\n]*\nStatus: install ok installed\n(?:.+\n)*?"
    r"Version: (?:\d+:)?(\d+(?:\.\d+)+)",
    re.MULTILINE,
)


def _is_the_manager(task: Task | None) -> bool:
    return task is not None and task.name == COMM


class FabricManagerState:
    """The fabric manager and the NVSwitches. A node that has neither is seen all the same: it has none."""

    source = Source.FABRIC_MANAGER
    deadline_seconds = 4.0
    after_engines = False

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._log = FollowedFile(root / LOG, head_bytes=0, tail_bytes=LOG_BYTES, most_bytes=4 * LOG_BYTES)
        self._lines = 0
        self._version: str | None = None
        """Of the process that last wrote to the log."""
        self._tasks = Tasks(root)
        self._folder: str | None = None
        """Of /proc: the fabric manager's, when it was last seen."""

    def collect(self, visit: Visit) -> Reading:  # noqa: ARG002 - the protocol's
        """Look once. Raises CannotSeeError when /proc can't be read."""
        try:
            running = self._runs()
        except OSError as e:
            raise CannotSeeError(files.why_not(e, self.root / "proc")) from e
        unseen: list[Unseen] = []
        try:
            messages = self._messages()
        except OSError as e:
            messages = ()
            if not isinstance(e, FileNotFoundError):
                unseen.append(Unseen(self.source, files.why_not(e, self.root / LOG), "log"))
        state = FabricManager(
            unit_state=self._unit_state(running),
            running=running,
            version=self._version or self._installed_version(),
            switches=switches(self.root),
            messages=messages,
        )
        return Reading(fields={"fabric_manager": state}, unseen=tuple(unseen))

    def _runs(self) -> bool:
        """Whether there is such a process. Raises OSError."""
        if not (self._folder and _is_the_manager(task_of(self._folder))):
            manager = next(filter(_is_the_manager, self._tasks), None)
            self._folder = f"{self.root}/proc/{manager.pid}" if manager else None
        return self._folder is not None

    def _messages(self) -> tuple[FabricMessage, ...]:
        messages: list[FabricMessage] = []
        rest = b""
        for piece in self._log.pieces():
            if not piece.joins:
                rest, self._lines = b"", piece.line - 1
            data, newline, rest = (rest + piece.data).rpartition(b"\n")
            text = (data + newline).decode("utf-8", "replace")
            messages += fabric_manager_log.read(
                text, self._log.path.name, first_line=self._lines + 1, utc_offset_seconds=_utc_offset_seconds()
            )
            self._version = fabric_manager_log.version(text) or self._version
            self._lines += text.count("\n")
        return tuple(messages[-MOST_MESSAGES:])

    def _unit_state(self, running: bool) -> Maybe[str]:
        """Return systemd's word; of a foreign root, or without systemd, what files and processes imply."""
        if self.root != Path("/") or not Path("/run/systemd/system").exists():
            if running:
                return "active"
            there = any((self.root / folder / UNIT).exists() for folder in UNIT_FOLDERS)
            return "inactive" if there else Absent(Why.NOT_PRESENT, f"there is no unit {UNIT}")
        try:
            answer = answer_of(["systemctl", "show", "--property=LoadState,ActiveState", UNIT], 2.0)
        except CannotSeeError as e:
            return e.why
        facts = dict(line.split("=", 1) for line in answer.decode("utf-8", "replace").splitlines() if "=" in line)
        if facts.get("LoadState") == "not-found":
            return Absent(Why.NOT_PRESENT, f"there is no unit {UNIT}")
        return facts.get("ActiveState") or Absent(Why.FAILED, "systemctl does not tell the unit's state")

    def _installed_version(self) -> Maybe[str]:
        try:
            match = _PACKAGE.search(files.text_of(self.root / "var/lib/dpkg/status", 64 << 20))
        except OSError:
            match = None
        if match:
            return match[1]
        if self.root == Path("/"):
            try:
                said = fabric_manager_log.version(answer_of([PROGRAM, "--version"], 2.0).decode("utf-8", "replace"))
            except CannotSeeError as e:
                return e.why
            if said:
                return said
        return Absent(Why.NOT_PRESENT, "no fabric manager is installed, or its log and package don't tell its version")

    def close(self) -> None:
        """Let go of the log."""
        self._log.close()


def switches(root: Path) -> Maybe[tuple[NvSwitch, ...]]:
    """Return the NVSwitches that the driver has bound."""
    devices = files.informations(root / "proc/driver/nvidia-nvswitch/devices")
    if isinstance(devices, Absent):
        return devices
    return tuple(_switch(address, facts) for address, facts in devices)


def _switch(address: str, facts: Maybe[dict[str, str]]) -> NvSwitch:
    if isinstance(facts, Absent):
        return NvSwitch(pci_address=address, bios_version=facts, uuid=facts)
    not_told = Absent(Why.FAILED, "the driver does not tell")
    return NvSwitch(
        pci_address=address, bios_version=facts.get("BIOS Version", not_told), uuid=facts.get("UUID", not_told)
    )


def _utc_offset_seconds() -> float:
    offset = datetime.datetime.now().astimezone().utcoffset()
    return offset.total_seconds() if offset else 0.0
