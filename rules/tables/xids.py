"""Xids: what the driver means by each code, what NVIDIA recommends, and who disagrees."""

from __future__ import annotations

from importlib import resources

import msgspec

MILD_ACTIONS = frozenset({"", "ignore", "see-previous", "restart-app"})
"""They ask nothing of the node. A code for which NVIDIA publishes no action is not therefore grave."""


class XidCode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One Xid code. `XID_SOURCES` tells where each column comes from; an empty cell: its source is silent."""

    code: int
    symbol: str = ""
    mnemonic: str = ""
    meaning: str = ""
    action: str = ""
    """NVIDIA's immediate action: `restart-app`, `reset-gpu`, `reboot`, `ignore`, …"""
    then: str = ""
    """What NVIDIA asks for when it comes again."""
    applies: tuple[str, ...] | None = None
    """Products; none: the catalogue calls the code unused; None: it does not know it."""
    recovery_since: int | None = None
    """Driver branch from which the GPU's recovery action follows this code."""
    judged_by: str = ""
    """The failure mode that it belongs to; empty: none of its own."""
    informational: bool = False
    """Alone it is no fault, and nothing is said."""
    gpud: str = ""
    dcgm: str = ""
    others: str = ""

    @property
    def name(self) -> str:
        """The driver's name for it, or the catalogue's."""
        return self.symbol or self.mnemonic

    @property
    def words(self) -> str:
        """The meaning as it stands within a sentence."""
        article, _, rest = self.meaning.partition(" ")
        return f"{article.lower()} {rest}" if article in ("A", "An", "The", "Single-bit") else self.meaning

    @property
    def differ(self) -> str:
        """Where other tools are of another mind than NVIDIA."""
        told = (self.gpud and f"gpud: {self.gpud}", self.dcgm and f"DCGM takes it for {self.dcgm}", self.others)
        return "; ".join(text for text in told if text)

    @property
    def is_mild(self) -> bool:
        """Whether NVIDIA asks nothing of the node for it, or calls it unused."""
        return self.action in MILD_ACTIONS or self.applies == ()


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    xid: tuple[XidCode, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("xid.toml").read_bytes()
_TABLE = msgspec.toml.decode(_TOML, type=_Table)

XIDS = {row.code: row for row in _TABLE.xid}
"""By code."""

XID_SOURCES = _TABLE.sources
"""By column of the table."""


def codes_of(failure_mode: str) -> frozenset[int]:
    """Return the codes that belong to a failure mode, without those that are no fault alone."""
    return frozenset(code for code, row in XIDS.items() if row.judged_by == failure_mode and not row.informational)
