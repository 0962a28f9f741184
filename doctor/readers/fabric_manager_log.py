"""NVIDIA's fabric manager log: `/var/log/fabricmanager.log` or its lines in the journal in, messages out.

The texts are those of public logs of fabric managers 535 to 610.
"""

from __future__ import annotations

import datetime
import re

from doctor.snapshot import FabricMessage

TEXT_MAX = 600
"""Characters of a line that a message keeps."""

KINDS = (
    ("version-mismatch", re.compile(r"driver interface version \S+ (?:don['’]t|doesn['’]t|does not) match")),
    ("nothing-to-do", re.compile(r"NV_WARN_NOTHING_TO_DO")),
    ("non-fatal", re.compile(r"detected NVSwitch non-?fatal error", re.IGNORECASE)),
    ("fatal", re.compile(r"detected NVSwitch fatal error|\bfatal error\b.*NVSwitch", re.IGNORECASE)),
    # guess: the words of the user guide's error list; no public log of a failed training was at hand
    ("link-failure", re.compile(r"NVLink.*(?:fail|not trained|contain)|(?:training|trunk).*fail", re.IGNORECASE)),
    ("started", re.compile(r"Successfully configured all the available|is running with the following configuration")),
    ("terminated", re.compile(r"[Tt]erminat|[Ss]hutting down|signal (?:\d+|SIG[A-Z]+)")),
)
"""Kind by text, the first match wins."""

_STAMP = re.compile(r"^\[(\w{3}) +(\d{1,2}) (\d{4}) (\d\d):(\d\d):(\d\d)\] ?(?:\[(\w+)\] ?)?(?:\[tid \d+\] ?)?")
_VERSION = re.compile(r"Fabric Manager version (?:is *: *)?(\d+(?:\.\d+)+)", re.IGNORECASE)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TROUBLE = {"ERROR", "CRITICAL", "ALERT", "EMERGENCY"}


def read(
    text: str, name: str = "fabricmanager.log", *, first_line: int = 1, utc_offset_seconds: float = 0.0
) -> tuple[FabricMessage, ...]:
    """Return the messages that some symptom can use. Stamps are the host's local time, *utc_offset_seconds* east of UTC."""
    messages: list[FabricMessage] = []
    for number, line in enumerate(text.splitlines(), first_line):
        stamp = _STAMP.match(line)
        body = line[stamp.end() :] if stamp else line
        kind = next((kind for kind, pattern in KINDS if pattern.search(body)), None)
        if kind is None and stamp and stamp[7] in _TROUBLE:
            kind = "other"
        if kind is not None:
            at = _unix(stamp, utc_offset_seconds) if stamp else None
            messages.append(FabricMessage(text=body[:TEXT_MAX].strip(), where=f"{name}:{number}", at=at, kind=kind))
    return tuple(messages)


def version(text: str) -> str | None:
    """Return the version that the log tells last: the one that runs, or ran."""
    versions = _VERSION.findall(text)
    return versions[-1] if versions else None


def _unix(stamp: re.Match[str], utc_offset_seconds: float) -> float | None:
    month, day, year, hour, minute, second = stamp.groups()[:6]
    if month not in _MONTHS:
        return None
    try:
        moment = datetime.datetime(
            int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second),
            tzinfo=datetime.timezone.utc,
        )  # fmt: skip
    except ValueError:
        return None
    return moment.timestamp() - utc_offset_seconds
