"""Hard-wrapped pastes: lines that a terminal broke at its edge, mid-word, put together again."""

from __future__ import annotations

import re

WIDTH_MIN, WIDTH_MAX = 60, 250
"""Columns of a terminal whose edge is looked for. guess: narrower ones nobody serves from, wider ones break few lines."""
PASTE_MAX_BYTES = 256 << 10
"""Nobody copies more than this out of a terminal; longer texts are files, which have no edge."""
_CONTINUED_SHARE = 0.75
"""Of the lines that end at the edge, how many must go on in the next one. guess: ranks say the same, in lines of one length,
and the line after such a line begins with something."""

_BEGINNING = re.compile(
    rb"\s*$|\s{2,}|\s*[(\[{<>|+$#~^*=`\xe2-]|\s*\d{4}[-/]\d|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|Traceback |Process |During handling |The above "
    rb"|Exception |frame #|File \"|Loading |Capturing |(?:[A-Za-z_]\w*\.){0,8}[A-Z]\w*(?:Error|Exception|Warning)\b|[A-Z][a-z]{2} [ \d]\d \d\d:"
    rb"|[\w.-]+\s+\| |[\w.-]+:\d+:\d+ "
)
"""How a line may begin that is none's continuation."""


def unwrapped(text: bytes) -> bytes:
    """Return *text* with the lines whole that were broken at a terminal's edge; other texts as they are.

    The line ends that are taken out follow the whole line, so that lines keep their numbers.
    """
    if len(text) > PASTE_MAX_BYTES:
        return text
    raw = [line.rstrip(b"\r") for line in text.split(b"\n")]
    lines = [line.rstrip() for line in raw]
    width = max(map(len, lines))
    if not WIDTH_MIN <= width <= WIDTH_MAX:
        return text
    at_edge = [n for n, line in enumerate(raw[:-1]) if len(line) >= width and len(lines[n]) >= width - 1]
    broken = {n for n in at_edge if not _BEGINNING.match(lines[n + 1])}
    if len({lines[n] for n in broken}) < 2 or len(broken) < _CONTINUED_SHARE * len(at_edge):
        return text
    whole: list[bytes] = []
    gap = b""
    for n, line in enumerate(lines):
        whole.append(raw[n][:width] if n in broken else line)
        if n in broken:
            gap += b"\n"
        elif n + 1 < len(lines):
            whole.append(gap + b"\n")
            gap = b""
    return b"".join(whole)
