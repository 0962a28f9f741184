"""A terminal: how wide it is, whether it shows colour, and text laid out for it."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import TextIO

import msgspec

_CODE = re.compile(r"`[^`\n]+`")
_STICKY = "\x00"
"""Stands for a space inside a command while lines are broken; clean text holds none."""

WIDTH = 80
WIDTH_MAX = 100
WIDTH_MIN = 40
ROOM_MIN = 16
"""Text gets this many columns however deep it hangs: on a narrow terminal a long chain of causes runs over the edge."""


class Terminal(msgspec.Struct, frozen=True):
    """What a report is laid out for. The default is a pipe: 80 columns, no colour."""

    width: int = WIDTH
    colour: bool = False

    def bold(self, text: str) -> str:
        """Return *text* in bold."""
        return self._styled(text, "1")

    def dim(self, text: str) -> str:
        """Return *text* held back."""
        return self._styled(text, "2")

    def red(self, text: str) -> str:
        """Return *text* in bold red."""
        return self._styled(text, "1;31")

    def yellow(self, text: str) -> str:
        """Return *text* in bold yellow."""
        return self._styled(text, "1;33")

    def green(self, text: str) -> str:
        """Return *text* in green."""
        return self._styled(text, "32")

    def cyan(self, text: str) -> str:
        """Return *text* in cyan."""
        return self._styled(text, "36")

    def _styled(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text


def terminal_of(stream: TextIO, environment: Mapping[str, str]) -> Terminal:
    """Return what *stream* can show: colour and its width on a terminal, neither when piped or with NO_COLOR."""
    if not stream.isatty():
        return Terminal()
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    colour = not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    return Terminal(width=max(WIDTH_MIN, min(width, WIDTH_MAX)), colour=colour)


def wrapped(text: str, width: int, *, first: str = "", rest: str | None = None, most: int | None = None) -> list[str]:
    """Break *text* into lines of *width*, the first led by *first*, the others by *rest* (default: as many spaces).

    A command in backquotes stays on one line where a line can hold it, so that it can be copied.
    More than *most* lines are cut, which an ellipsis shows.
    """
    rest = " " * len(first) if rest is None else rest
    lead = max(len(first), len(rest))
    width = max(width, lead + ROOM_MIN)
    room = width - lead

    def kept_whole(code: re.Match[str]) -> str:
        return code[0].replace(" ", _STICKY) if len(code[0]) < room else code[0]

    lines = textwrap.wrap(
        _CODE.sub(kept_whole, text),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" …",
    )
    return [line.replace(_STICKY, " ").rstrip() for line in lines] or [first.rstrip()]
