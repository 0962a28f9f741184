"""The wall clock was set: what was seen before, told in the new time, so that spans of time stay what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from doctor.snapshot import Snapshot

TIMES = frozenset(("at", "started_at", "booted_at", "last_at", "failing_since"))
"""Fields that hold a Unix time, wherever they stand in a snapshot."""

T = TypeVar("T", bound=msgspec.Struct)


def in_new_time(snapshot: Snapshot, seconds: float) -> Snapshot:
    """Return a snapshot of before the clock was set by *seconds*; engines keep their names."""
    moved = _moved(snapshot, seconds)
    return msgspec.structs.replace(
        moved,
        node=_moved(snapshot.node, seconds),
        kernel=_all_moved(snapshot.kernel, seconds),
        engines=tuple(
            msgspec.structs.replace(_moved(engine, seconds), identity=engine.id) for engine in snapshot.engines
        ),
        engine_events=_all_moved(snapshot.engine_events, seconds),
        logs=_all_moved(snapshot.logs, seconds),
        metrics=_all_moved(snapshot.metrics, seconds),
        fabric_manager=msgspec.structs.replace(
            snapshot.fabric_manager, messages=_all_moved(snapshot.fabric_manager.messages, seconds)
        ),
        recorder=_moved(snapshot.recorder, seconds),
        gpus=tuple(
            msgspec.structs.replace(
                gpu, power=msgspec.structs.replace(gpu.power, samples=_all_moved(gpu.power.samples, seconds))
            )
            for gpu in snapshot.gpus
        ),
    )


def _all_moved(values: tuple[T, ...], seconds: float) -> tuple[T, ...]:
    return tuple(_moved(value, seconds) for value in values)


def _moved(value: T, seconds: float) -> T:
    """Return a value with its own times in the new time."""
    times = {
        name: time + seconds
        for name in value.__struct_fields__
        if name in TIMES and isinstance(time := getattr(value, name), (int, float))
    }
    return msgspec.structs.replace(value, **times) if times else value
