"""Why a value is missing: nothing that was not seen may look like a zero or like health."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Why(enum.Enum):
    """The reason for an absence."""

    NOT_ASKED = "not-asked"
    """Nobody looked: this feed or this visit does not ask for it."""
    NOT_GIVEN = "not-given"
    """Triage only: no file with this evidence was among those given."""
    NOT_SUPPORTED = "not-supported"
    """The hardware or the driver says that it has no such thing."""
    NOT_PRESENT = "not-present"
    """There is no such thing on this node (no engine, no fabric manager, no driver)."""
    NO_PERMISSION = "no-permission"
    """It is there, and this process may not read it."""
    MISSING_SYMBOL = "missing-symbol"
    """The driver is older than this question."""
    LOST = "lost"
    """The GPU is gone."""
    TIMED_OUT = "timed-out"
    """No answer within the deadline."""
    PASSED_OVER = "passed-over"
    """It was there to see, beyond a bound that keeps the program small; `detail` says how much."""
    FAILED = "failed"
    """It was asked and failed; `detail` says how."""
    NOT_KNOWN = "not-known"
    """Of a judgement only: it was seen, and what would be right for this hardware is not known here."""
    BROKEN = "broken"
    """Of a judgement only: the rule itself was refused or failed; `detail` says how."""


class Absent(msgspec.Struct, frozen=True, tag="absent", tag_field="absent"):
    """A value that could not be had, and why."""

    why: Why
    detail: str = ""
    """In the operator's words, with the remedy where there is one."""

    def __str__(self) -> str:
        words = self.why.value.replace("-", " ")
        return f"{words}: {self.detail}" if self.detail else words


T = TypeVar("T")

Maybe = T | Absent
"""A value, or the reason for its absence."""

NOT_ASKED = Absent(Why.NOT_ASKED)
NOT_GIVEN = Absent(Why.NOT_GIVEN)


def known(value: Maybe[T]) -> TypeIs[T]:
    """Whether *value* was seen; narrows its type."""
    return not isinstance(value, Absent)


def or_none(value: Maybe[T]) -> T | None:
    """Return the value, or None where it is absent."""
    return None if isinstance(value, Absent) else value
