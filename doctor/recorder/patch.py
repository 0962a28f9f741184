"""What is different between two values of one type: most of a node is at each visit as it was at the visit before.

A patch is JSON: of a struct, or of a tuple of structs, an object that names what differs, by field or by place; of
anything else a list with the new value in it. What the patch leaves alone is the very same object afterwards, so that
an hour of visits takes the memory of what changed in it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

Patch = dict[str, Any]


def difference(base: msgspec.Struct, new: msgspec.Struct) -> Patch:
    """Return what makes *base* into *new*, which is of the same type; its leaves are values of the new one."""
    patch: Patch = {}
    for name in base.__struct_fields__:
        old, now = getattr(base, name), getattr(new, name)
        if old is now or (type(old) is type(now) and old == now):  # a leaf 1 is not 1.0: a replay is exact to the byte
            continue
        if isinstance(now, msgspec.Struct) and type(old) is type(now):
            patch[name] = difference(old, now)
        elif pairs := _pairs(old, now):
            patch[name] = {
                str(place): difference(one, other) for place, (one, other) in enumerate(pairs) if one != other
            }
        else:
            patch[name] = [now]
    return patch


def _pairs(old: object, now: object) -> list[tuple[msgspec.Struct, msgspec.Struct]]:
    """Return the structs at the same places of two tuples, where both hold as many, of the same types; else nothing."""
    if not (isinstance(old, tuple) and isinstance(now, tuple)):
        return []
    olds, nows = cast("tuple[object, ...]", old), cast("tuple[object, ...]", now)
    pairs = [
        (one, other)
        for one, other in zip(olds, nows, strict=False)
        if isinstance(one, msgspec.Struct) and isinstance(other, msgspec.Struct) and type(one) is type(other)
    ]
    is_array = bool(pairs) and pairs[0][0].__struct_config__.array_like  # a list of numbers: shorter told anew
    return pairs if len(pairs) == len(olds) == len(nows) and not is_array else []


def patched(base: S, patch: Patch) -> S:
    """Return *base* with the differences in it. Raises msgspec.ValidationError where the patch is none of this type.

    What is LookupError, TypeError or AttributeError elsewhere is a ValidationError here: a patch comes from a disk.
    """
    try:
        return _patched(base, patch)
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise msgspec.ValidationError(f"no patch of {type(base).__name__}: {e!r}") from e


def _patched(base: S, patch: Patch) -> S:
    types = _types(type(base))
    return msgspec.structs.replace(
        base,
        **{
            name: _value(getattr(base, name), change, types[name])
            for name, change in patch.items()
            if name in types  # a newer program writes fields that this one does not know
        },
    )


def _value(old: Any, change: Any, wanted: Any) -> Any:
    if isinstance(change, list):
        (told,) = cast("list[Any]", change)
        return msgspec.convert(told, wanted)
    if isinstance(old, tuple):
        values = list(cast("tuple[msgspec.Struct, ...]", old))
        for place, inner in change.items():
            values[int(place)] = _patched(values[int(place)], inner)
        return tuple(values)
    return _patched(old, change)


@cache
def _types(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct)}
