"""`systemctl status nvidia-fabricmanager`: the state of the unit and the last lines of its journal."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.readers import fabric_manager_log
from doctor.snapshot import Absent, FabricManager, Maybe, Why

_UNIT = re.compile(r"^(?:(\S{1,3}) )?nvidia-fabricmanager\.service(?: - .*)?$", re.MULTILINE)
_NO_UNIT = re.compile(r"^Unit nvidia-fabricmanager\.service could not be found", re.MULTILINE)
_SYMBOLS = {"×": "failed", "○": "inactive"}
"""What the sign before the name says; `●` is both active and, before systemd 249, failed."""
_START_FAILED = re.compile(
    r"(?P<journal>Failed to start )(?:nvidia-fabricmanager|NVIDIA fabric manager)|Job for nvidia-fabricmanager\.service failed"
)
_STARTED = re.compile(r"Started (?:nvidia-fabricmanager|NVIDIA fabric manager)")
_ACTIVE = re.compile(r"^[ \t]+Active: ([a-z-]+)", re.MULTILINE)
_MAIN = re.compile(r"^[ \t]+Main PID: \d+ (?:\(nv-fabricmanage)?", re.MULTILINE)
_EXITED = re.compile(r"^[ \t]+Main PID: \d+ \(code=", re.MULTILINE)
_BODY = re.compile(r"^(?:\s|$|[A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d |TriggeredBy:|Warning: |Hint: |lines \d)")


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each status of the fabric manager's unit in *text*."""
    for begin in sorted([*_UNIT.finditer(text), *_NO_UNIT.finditer(text)], key=lambda match: match.start()):
        end = position = min(begin.end() + 1, len(text))
        while position < len(text):
            newline = text.find("\n", position)
            following = len(text) if newline < 0 else newline + 1
            line = text[position:following]
            if not _BODY.match(line):
                break
            position = following
            if line.strip():
                end = position
        yield begin.start(), end


def read(text: str, name: str = "systemctl status", first_line: int = 1) -> FabricManager:
    """Return what the status says; `not-present` where there is no such unit."""
    if _NO_UNIT.search(text):
        return FabricManager(unit_state=Absent(Why.NOT_PRESENT, "there is no unit nvidia-fabricmanager"), running=False)
    unit, active = _UNIT.search(text), _ACTIVE.search(text)
    word = active[1] if active else _SYMBOLS.get(unit[1] or "") if unit else None
    if word is None:
        state: Maybe[str] = Absent(Why.NOT_GIVEN, "the status is cut")
        running: Maybe[bool] = state
    else:
        state = word
        running = word == "active" and _MAIN.search(text) is not None and _EXITED.search(text) is None
    version = fabric_manager_log.version(text)
    return FabricManager(
        unit_state=state,
        running=running,
        version=version or Absent(Why.NOT_GIVEN, "the status does not tell the version"),
        messages=fabric_manager_log.read(text, name, first_line=first_line),
    )


def start_failed(text: str) -> bool:
    """Return whether the last that *text* tells of a start of the unit is that it failed.

    That it was stopped proves nothing: every shutdown does that.
    """
    failures = list(_START_FAILED.finditer(text))
    if not failures:
        return False
    if any(match["journal"] is None for match in failures):  # systemctl's answer, newer than a journal printed after it
        return True
    return _STARTED.search(text, failures[-1].end()) is None


def with_more(manager: FabricManager, more: FabricManager) -> FabricManager:
    """Return *manager* with what *more* knows and it does not, and the messages of both."""

    def better(mine: Maybe[object], other: Maybe[object]) -> Maybe[object]:
        return other if isinstance(mine, Absent) and mine.why in {Why.NOT_ASKED, Why.NOT_GIVEN} else mine

    return msgspec.structs.replace(
        manager,
        unit_state=better(manager.unit_state, more.unit_state),
        running=better(manager.running, more.running),
        version=better(manager.version, more.version),
        messages=(*manager.messages, *more.messages),
    )
