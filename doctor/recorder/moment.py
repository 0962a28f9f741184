"""Times as people write them on a command line: `02:10`, `2026-11-21 02:10`, `2h`."""

from __future__ import annotations

import datetime
import re

from doctor.recorder.folder import RecorderError

_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def span(text: str) -> float:
    """Return the seconds of `90s`, `30m`, `2h` or `7d`. Raises RecorderError."""
    match = _SPAN.fullmatch(text.strip().lower())
    if match is None:
        raise RecorderError(f"{text!r} is no span of time; 30m is one, or 90s, 2h, 7d")
    return float(match[1]) * _SECONDS[match[2]]


def moment(text: str, now: float, zone: datetime.tzinfo | None = None) -> float:
    """Return the Unix time of a clock time or a date and time in *zone*; None: that of this machine.

    A clock time is the most recent such; one that a change of the clocks repeats is the later that is past, and one
    that it leaves out was not on that day. Raises RecorderError.
    """
    text = text.strip()
    clock = _CLOCK.fullmatch(text)
    if clock:
        time = datetime.time(int(clock[1]), int(clock[2]), int(clock[3] or 0))
        today = datetime.datetime.fromtimestamp(now, zone).date()
        for days in range(1, -8, -1):  # tomorrow too: its night may begin before midnight here
            day = today + datetime.timedelta(days=days)
            for fold in (1, 0):
                at = _instant(datetime.datetime.combine(day, time), zone, fold)
                if at is not None and at <= now:
                    return at
    try:
        told = datetime.datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        told = None
    if told is None or clock or len(text) <= len("2026-11-21"):
        raise RecorderError(f"{text!r} is no moment; 02:10 is one, or 2026-11-21T02:10, with or without a zone")
    at = told.timestamp() if told.tzinfo else _instant(told, zone, 0)
    if at is None:
        raise RecorderError(f"{text} was not: the clocks were put forward over it")
    return at


def moment_or_span(text: str, now: float, zone: datetime.tzinfo | None = None) -> float:
    """Return the Unix time of a moment, or of a span ago. Raises RecorderError."""
    return now - span(text) if _SPAN.fullmatch(text.strip().lower()) else moment(text, now, zone)


def _instant(local: datetime.datetime, zone: datetime.tzinfo | None, fold: int) -> float | None:
    """Return when the clocks of *zone* showed this, or None where they never did."""
    at = local.replace(tzinfo=zone, fold=fold).timestamp()
    return at if datetime.datetime.fromtimestamp(at, zone).replace(tzinfo=None) == local else None
