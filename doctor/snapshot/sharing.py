"""What is as it was at the visit before, told by the very same objects: an hour of visits takes the memory of what changed."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import msgspec

from doctor.snapshot.gpu import Sample

T = TypeVar("T")


def shared(value: T, before: object) -> T:
    """Return *value*, made of what *before* is made of wherever that is equal. Numbers are left as they are."""
    if value is before or type(value) is not type(before):
        return value
    if isinstance(value, (str, bytes)):
        return cast("T", before) if value == before else value
    if isinstance(value, msgspec.Struct):
        return cast("T", before) if value == before else _shared_struct(value, before)
    if isinstance(value, tuple):
        values, befores = cast("tuple[Any, ...]", value), cast("tuple[Any, ...]", before)
        return cast("T", befores if values == befores else _shared_tuple(values, befores))
    return value


S = TypeVar("S", bound=msgspec.Struct)


def _shared_struct(value: S, before: object) -> S:
    same: dict[str, object] = {}
    for name in value.__struct_fields__:
        now = getattr(value, name)
        known = shared(now, getattr(before, name))
        if known is not now:
            same[name] = known
    return msgspec.structs.replace(value, **same) if same else value


def _shared_tuple(values: tuple[object, ...], befores: tuple[object, ...]) -> tuple[object, ...]:
    if values and type(values[0]) is Sample:
        return values  # of each visit its own
    return (*map(shared, values, befores), *values[len(befores) :])
