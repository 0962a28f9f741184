"""A site's own patterns of log lines: which lines a reader keeps for them, beside those of its own table."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Literal

import msgspec

SEARCHED_CHARACTERS = 400
"""Of a message, from its beginning, `pattern` is searched in so many: what a search costs grows with their third power."""

REPETITIONS_MAX = 2
"""Unbounded repetitions in one pattern. guess: at 400 characters the worst of them costs less than half a second."""

WAYS_MAX = 64
"""Ways through the choices and options of a pattern, which multiply."""

COUNTED_MAX = 32
"""Lines that may be asked for: of more within one visit the readers keep only some (24 and 24, or 32 and every 2^n-th)."""

Sentence = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=300)]


class LogPattern(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[log_patterns]]`: a failure mode that a line of a log tells."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9]{0,40}(-[a-z0-9]{1,40}){0,10}$")]
    title: Sentence
    source: Literal["engine-log", "kernel-log"]
    text: Annotated[str, msgspec.Meta(min_length=4, max_length=200, pattern=r"\S")]
    """What stands in the line's message, as it is. Only such lines are looked at any further."""
    pattern: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """A regular expression that the message must match, too; its named groups fill placeholders of *fix*."""
    severity: Literal["notice", "warning", "critical"] = "warning"
    fix: tuple[Sentence, ...] = ()
    """What to do, step by step."""
    explains: tuple[str, ...] = ()
    """Failure modes that follow from it."""
    at_least: Annotated[int, msgspec.Meta(ge=1, le=COUNTED_MAX)] = 1
    """So many lines make a finding."""
    window_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How long ago they may have been written; None: as long as anything is remembered."""

    def __post_init__(self) -> None:
        """Raise ValueError for a text or a pattern that can't be looked for."""
        if "\n" in self.text:
            raise ValueError("text: a line holds no line end")
        if self.pattern:
            demand_harmless(self.pattern)

    @property
    def signal(self) -> str:
        """What events of its lines are called in a snapshot."""
        return f"site:{self.id}"

    @property
    def gate(self) -> bytes:
        """The literal without which a line is not looked at."""
        return self.text.encode()

    def facts_in(self, message: str) -> dict[str, str] | None:
        """Return what the pattern's named groups hold, or None where the message is none of this pattern's."""
        if self.text not in message:
            return None
        if not self.pattern:
            return {}
        match = _compiled(self.pattern).search(message[:SEARCHED_CHARACTERS])
        if match is None:
            return None
        return {name.replace("_", "-"): value for name, value in match.groupdict().items() if value is not None}


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_TOKEN = re.compile(
    r"(?P<escape>\\(?![1-9]).)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<opens>\((?:\?:|\?P<\w+>|(?!\?)))|(?P<closes>\))"
    r"|(?P<repeats>[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})|(?P<choice>\|)|(?P<plain>[^\\\[(])",
    re.DOTALL,
)


def demand_harmless(pattern: str) -> None:
    """Raise ValueError for a regular expression that is none, or that a line could be made for to search for ages.

    Python's engine tries every way. What makes the ways explode is left out of the language: repetitions of what
    repeats or chooses, many unbounded repetitions, long rows of options, references and looking around.
    """
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern: {error}") from error
    unbounded, ways = 0, 1
    groups = [_Group()]
    last = _Group()
    place, repeated = 0, False
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        if token is None:
            raise ValueError(
                f"pattern: {pattern[place : place + 3]!r} at {place}: of groups there are ( ), (?: ) and (?P<name> ) only"
            )
        place = token.end()
        kind, text = token.lastgroup, token[0]
        if kind == "repeats":
            if repeated:
                if text != "?":
                    raise ValueError(f"pattern: {text!r} at {token.start()} repeats a repetition")
                continue  # as few as possible: the ways are the same
            least, most = _bounds(text)
            if last.varies and most != 1:
                raise ValueError(f"pattern: {text!r} at {token.start()} repeats what repeats or chooses itself")
            groups[-1].varies |= least != most
            if most is None or most - least > 10:
                unbounded += 1
            else:
                ways *= most - least + 1
        elif kind == "opens":
            groups.append(_Group())
        elif kind == "closes":
            last = groups.pop()
            ways *= last.choices
            groups[-1].varies |= last.varies
        elif kind == "choice":
            groups[-1].choices += 1
            groups[-1].varies = True
        repeated = kind == "repeats"
        if kind not in ("repeats", "closes"):
            last = _Group()
    if unbounded > REPETITIONS_MAX:
        raise ValueError(f"pattern: {unbounded} unbounded repetitions, of which there may be {REPETITIONS_MAX}")
    if ways * groups[0].choices > WAYS_MAX:
        raise ValueError(f"pattern: its options and choices come to more than {WAYS_MAX} ways")


class _Group(msgspec.Struct):
    """What is known of a group so far; of a single character nothing varies."""

    varies: bool = False
    choices: int = 1


def _bounds(text: str) -> tuple[int, int | None]:
    """Return how often at least and at most a repetition repeats; None: without bound."""
    if text in ("*", "+"):
        return int(text == "+"), None
    if text == "?":
        return 0, 1
    least, comma, most = text[1:-1].partition(",")
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None
