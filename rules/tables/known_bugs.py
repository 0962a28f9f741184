"""Known bugs of engine releases, each with the circumstances in which it strikes and its thread."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import msgspec

from rules.tables.stacks import numbers

Circumstance = Literal["tensor-parallel", "mixture", "long-context", "fp8-channel", "hopper", "communication-bound"]


class KnownBug(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bug."""

    engine: str
    """As in `Engine.kind`."""
    since: str
    """First release that has it; empty: from the first on."""
    fixed: str
    """First release without it."""
    when: tuple[Circumstance, ...]
    """All must hold."""
    what: str
    source: str

    def is_in(self, version: str) -> bool:
        """Whether this release has it."""
        there = numbers(version)
        return numbers(self.since) <= there < numbers(self.fixed) if there else False


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bug: tuple[KnownBug, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("known_bugs.toml").read_bytes()

KNOWN_BUGS = msgspec.toml.decode(_TOML, type=_Table).bug
