"""A silence: the site knows of a finding, and wants no alarm for it until a date, for a reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from doctor.history import History
from doctor.rule import Finding
from doctor.snapshot import Engine, or_none

Words = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=300)]
"""A sentence of the site's: not empty, and no page."""


class Moment(float):
    """A point in time, Unix seconds."""


class Silence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[silence]]`: findings of one rule that are told, counted, and left out of the verdict."""

    rule: Words
    """The rule's id."""
    until: Moment
    reason: Words
    gpus: tuple[int | str, ...] = ()
    """UUIDs, PCI addresses or NVML's indices; empty: whatever the finding is about."""
    engine: Annotated[str, msgspec.Meta(max_length=300)] = ""
    """Its unit, its model, its log, or `kind:port`; empty: whatever the finding is about."""
    by: Annotated[str, msgspec.Meta(max_length=300)] = ""
    """Who decided it."""

    def in_force(self, at: float) -> bool:
        """Whether it still holds at a moment."""
        return at < self.until

    def order(self) -> tuple[float, str, str, str, str, tuple[str, ...]]:
        """Return what silences are sorted by: the order in the file means nothing."""
        return (self.until, self.rule, self.reason, self.by, self.engine, tuple(map(str, self.gpus)))


def silence_of(finding: Finding, silences: Iterable[Silence], history: History) -> Silence | None:
    """Return the silence that a finding is under now, or None.

    Every GPU that the finding names must be covered, be it by several silences: what is news about one GPU is told.
    Returned is the one whose end ends the silence.
    """
    held = [
        silence
        for silence in silences
        if silence.rule == finding.failure_mode
        and silence.in_force(history.now)
        and (not silence.engine or silence.engine in _names_of_engine(finding.subject.engine, history))
    ]

    def longest(covering: list[Silence]) -> Silence | None:
        return max(covering, key=Silence.order, default=None)

    if not finding.subject.gpus:
        return longest([silence for silence in held if not silence.gpus])
    last: list[Silence] = []
    for uuid in finding.subject.gpus:
        names = _names_of_gpu(uuid, history)
        covering = longest([s for s in held if not s.gpus or not names.isdisjoint(map(_gpu_name, s.gpus))])
        if covering is None:
            return None
        last.append(covering)
    return min(last, key=Silence.order)


def _gpu_name(name: int | str) -> str:
    """Return a GPU's name as it is compared: PCI addresses with a domain of four digits, all in lower case."""
    word = str(name).strip().lower()
    domain, colon, rest = word.partition(":")
    if colon and ":" in rest:  # NVML writes domains of eight digits
        return f"{domain[-4:].rjust(4, '0')}:{rest}"
    return f"0000:{word}" if colon and not word.startswith("index:") else word


def _names_of_gpu(uuid: str, history: History) -> frozenset[str]:
    seen = history.of_gpu(uuid)
    gpu = seen[-1][1] if seen else None  # it may be lost by now
    address = None if gpu is None else or_none(gpu.pci_address)
    index = "" if gpu is None else str(gpu.index)
    return frozenset(_gpu_name(name) for name in (uuid, uuid.removeprefix("index:"), index, address) if name)


def _names_of_engine(engine_id: str, history: History) -> frozenset[str]:
    visits = reversed(history.snapshots)  # it may be dead by now
    engine = next((engine for visit in visits for engine in visit.engines if engine.id == engine_id), None)
    names = {engine_id, engine_id.removeprefix("journal:")}
    if engine is not None:
        names |= _names_of_running(engine)
    names |= {name.removesuffix(".service") for name in names}
    return frozenset(names - {""})


def _names_of_running(engine: Engine) -> set[str]:
    port = or_none(engine.flags.port)
    told = (or_none(engine.unit), or_none(engine.flags.model), or_none(engine.log), port and f"{engine.kind}:{port}")
    return {name for name in told if name}
