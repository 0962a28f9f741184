"""SXids: how much the NVSwitch driver's codes weigh."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import msgspec

from doctor.snapshot import Sxid


class SxidCode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One SXid code. `SXID_SOURCES` tells where each column comes from; an empty cell: its source is silent."""

    code: int
    symbol: str = ""
    meaning: str = ""
    weight: Literal["always-fatal", "may-be-fatal", "non-fatal", "benign", "note", ""] = ""
    recovery: str = ""
    """What NVIDIA asks for: `restart-host`, `restart-vm`, `reset-all`, `none`, …"""
    gpud: str = ""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    sxid: tuple[SxidCode, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("sxid.toml").read_bytes()
_TABLE = msgspec.toml.decode(_TOML, type=_Table)

SXIDS = {row.code: row for row in _TABLE.sxid}
"""By code."""

SXID_SOURCES = _TABLE.sources
"""By column of the table."""


def is_fatal(sxid: Sxid) -> bool:
    """Return whether a line reports a fatal error: its own word counts, else the table's."""
    if sxid.severity is not None:
        return sxid.severity == "fatal"
    row = SXIDS.get(sxid.code)
    return row is not None and row.weight == "always-fatal"
