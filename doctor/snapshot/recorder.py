"""What one visit saw of gpu-doctor's own flight recorder, and how far the sources that are read on were read."""

from __future__ import annotations

import msgspec

from doctor.snapshot.source import Source


class Recorder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The daemon's flight recorder when the visit began."""

    directory: str = ""
    """Where it writes; empty: nobody asked for one."""
    failing_since: float | None = None
    """Unix time of the first visit that is not on disk; None: all are."""
    failure: str = ""
    """In the operator's words: what the disk answers."""
    waiting: int = 0
    """Visits held in memory until they can be written."""
    lost: int = 0
    """Visits that were given up since the daemon started: too many waited."""
    damaged: int = 0
    """Places of the recording that could not be read back when the daemon started."""


class Position(msgspec.Struct, frozen=True):
    """How far a growing source was read, so that a restarted daemon reads on from there."""

    source: Source
    of: str
    """Which of the source's parts: `Engine.log`; empty where there is one."""
    place: str
    """For the collector alone."""
