"""SXids: how much the NVSwitch driver's codes weigh."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import msgspec

from doctor.snapshot import Sxid


class SxidCode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One SXid code."""

    code: int
    symbol: str = ""
    """The driver's own name for it."""
    meaning: str = ""
    weight: Literal["always-fatal", "may-be-fatal", "benign", "note"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sxid: tuple[SxidCode, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("sxid.toml").read_bytes()

SXIDS = {row.code: row for row in msgspec.toml.decode(_TOML, type=_Table).sxid}
"""By code."""


def is_fatal(sxid: Sxid) -> bool:
    """Return whether a line reports a fatal error: its own word counts, else the table's."""
    if sxid.severity is not None:
        return sxid.severity == "fatal"
    row = SXIDS.get(sxid.code)
    return row is not None and row.weight == "always-fatal"
