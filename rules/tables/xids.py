"""Xids: what the driver means by each code, what NVIDIA recommends, and who disagrees."""

from __future__ import annotations

from importlib import resources

import msgspec


class XidCode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One Xid code."""

    code: int
    symbol: str = ""
    """The driver's own name for it."""
    meaning: str = ""
    """In our words; empty where no source explains it."""
    action: str = ""
    """NVIDIA's recommendation: `restart-app`, `reset-gpu`, `reboot`, `ignore`, …"""
    judged_by: str = ""
    """The failure mode that it belongs to; empty: none of its own."""
    differ: str = ""
    """Where other tools disagree."""
    source: str

    @property
    def words(self) -> str:
        """The meaning as it stands within a sentence."""
        article, _, rest = self.meaning.partition(" ")
        return f"{article.lower()} {rest}" if article in ("A", "An", "The", "Single-bit") else self.meaning


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    xid: tuple[XidCode, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("xid.toml").read_bytes()

XIDS = {row.code: row for row in msgspec.toml.decode(_TOML, type=_Table).xid}
"""By code."""


def codes_of(failure_mode: str) -> frozenset[int]:
    """Return the codes that belong to a failure mode."""
    return frozenset(code for code, row in XIDS.items() if row.judged_by == failure_mode)
