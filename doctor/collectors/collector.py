"""What a collector is: one source, one deadline, and it says what it could not see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import msgspec

from doctor.snapshot import Absent, Engine, Source, Unseen


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """What a collector is told about the visit that it works for."""

    at: float
    """Unix time, seconds."""
    engines: tuple[Engine, ...] = ()
    """The engines found by the process collector in this visit; empty for collectors that run beside it."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What a collector saw."""

    fields: dict[str, Any] = {}
    """Fields of `Snapshot` and their values."""
    engine_fields: dict[str, dict[str, Any]] = {}
    """`Engine.id` → fields of that `Engine` and their values."""
    unseen: tuple[Unseen, ...] = ()
    """Parts that could not be seen; the source itself counts as seen."""


class CannotSeeError(Exception):
    """A whole source could not be seen; it becomes `Unseen(source, why)`."""

    def __init__(self, why: Absent, fields: dict[str, Any] | None = None) -> None:
        super().__init__(str(why))
        self.why = why
        self.fields = fields or {}
        """What can be said all the same, e.g. `nvml_blocked_seconds`."""


class Pace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[collectors.<source>]`: how often a source is read, and how long a visit waits for it."""

    interval_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None
    """None: as in `INTERVAL_SECONDS`."""
    deadline_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=60)] | None = None
    """None: the collector's own."""


INTERVAL_SECONDS: Mapping[Source, float] = {Source.STACK: 60.0, Source.MODEL: 60.0}
"""How old the values of a source may get before it is asked again; guess: a package or a download is noticed soon enough.
Another engine, GPU or driver has it asked at once. A source that is not here is asked at every visit: its counters
would seem to stand still, its news come late, or it is judged side by side with what the same visit saw elsewhere."""


DEADLINE_MIN_SECONDS: Mapping[Source, float] = {Source.NVML: 5.5}
"""A shorter wait would take a driver that is slow, or a child that is still starting, for a dead one: `driver-unresponsive`
counts 5 s of silence, and the collector needs half a second to tell of it."""


class Collector(Protocol):
    """One source. A collector keeps what it needs between visits (an offset, a child process) to itself."""

    source: Source
    deadline_seconds: float
    """The visit does not wait longer."""
    after_engines: bool
    """Whether it must know the engines first."""

    def collect(self, visit: Visit) -> Reading:
        """Look once. Raises CannotSeeError when the whole source is missing."""
        ...

    def close(self) -> None:
        """Let go of everything: files, children, sockets."""
        ...
