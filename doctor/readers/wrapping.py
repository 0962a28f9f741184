"""Wrapped pastes: lines that a terminal broke at its edge, mid-word, or a mail program between words, put together again."""

from __future__ import annotations

import re

WIDTH_MIN, WIDTH_MAX = 60, 250
"""Columns of a terminal whose edge is looked for. guess: narrower ones nobody serves from, wider ones break few lines."""
PASTE_MAX_BYTES = 256 << 10
"""Nobody copies more than this out of a terminal; longer texts are files, which have no edge."""
MAIL_WIDTH_MIN, MAIL_WIDTH_MAX = 60, 100
"""Columns at which mail programs and editors wrap between words: 72, 76, 78, 80. guess, as above."""
_CONTINUED_SHARE = 0.75
"""Of the lines that end at the edge, how many must go on in the next one. guess: ranks say the same, in lines of one length,
and the line after such a line begins with something."""
_FILLED_SHARE = 0.9
"""Of the lines that may have been broken, how many end at the edge where a terminal broke them. guess: a mail's end anywhere."""

_RECORD_BEGINNING = (
    rb"\s*\d{4}[-/]\d|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|Traceback |Process |During handling |The above "
    rb"|Killed\b|Aborted\b|Segmentation fault|Bus error|NVRM: "
    rb"|Exception |frame #|File \"|Loading |Capturing |(?:[A-Za-z_]\w*\.){0,8}[A-Z]\w*(?:Error|Exception|Warning)\b|[A-Z][a-z]{2} [ \d]\d \d\d:"
    rb"|[\w.-]+\s+\| |[\w.-]+:\d+:\d+ "
)
_BEGINNING = re.compile(rb"\s*$|\s{2,}|\s*[(\[{<>|+$#~^*=`\xe2-]|" + _RECORD_BEGINNING)
"""How a line may begin that is none's continuation."""
_BEGINNING_IN_MAIL = re.compile(
    rb"\s*$|\s{2,}|\s*[{<>|+$#~^*=`\xe2-]|(?:\x1b?\[[\d;]{1,12}m)*\(\w+ [^()]{0,40}pid=\d|\[rank\d|\[ *\d+\.\d|\[\w{3} \w{3} |\[\d{4}-|\[[EWIF]\d|"
    + _RECORD_BEGINNING
)
"""The same where words are whole: a sentence may go on with a bracket, but for those of stamps, ranks and processes."""
_RECORD = re.compile(
    rb"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d|NVRM: |NCCL (?:WARN|INFO) |Traceback \(most recent|ProcessGroupNCCL"
    rb"|\[rank\d+\]:|\w(?:Error|Exception): "
)
"""Words between which only a log is wrapped; prose without any of these is left as it is."""


def unwrapped(text: bytes) -> bytes:
    """Return *text* with the lines whole that were broken at a terminal's edge or between words; other texts as they are.

    The line ends that are taken out follow the whole line, so that lines keep their numbers.
    """
    if len(text) > PASTE_MAX_BYTES:
        return text
    raw = [line.rstrip(b"\r") for line in text.split(b"\n")]
    lines = [line.rstrip() for line in raw]
    width = max(map(len, lines))
    at_edge = _broken_at_edge(raw, lines, width) if WIDTH_MIN <= width <= WIDTH_MAX else set[int]()
    between = _broken_between_words(lines)
    if at_edge and len(at_edge) >= _FILLED_SHARE * len(between):  # a terminal fills its lines, a mail program can't
        return _joined([raw[n][:width] if n in at_edge else line for n, line in enumerate(lines)], at_edge, b"")
    if between:
        return _joined(lines, between, b" ")
    return text


def _broken_at_edge(raw: list[bytes], lines: list[bytes], width: int) -> set[int]:
    """Return the lines that go on in the next one because a terminal had no column left."""
    at_edge = [n for n, line in enumerate(raw[:-1]) if len(line) >= width and len(lines[n]) >= width - 1]
    broken = {n for n in at_edge if not _BEGINNING.match(lines[n + 1])}
    few = len({lines[n] for n in broken}) < 2 or len(broken) < _CONTINUED_SHARE * len(at_edge)
    return set() if few else broken


def _broken_between_words(lines: list[bytes]) -> set[int]:
    """Return the lines that go on in the next one because its first word had no room: a mail's 72 columns."""
    width = max((len(line) for line in lines if b" " in line.strip()), default=0)  # one long word stands out alone
    if not MAIL_WIDTH_MIN <= width <= MAIL_WIDTH_MAX or not any(map(_RECORD.search, lines)):
        return set()
    going_on = [n for n in range(len(lines) - 1) if lines[n] and not _BEGINNING_IN_MAIL.match(lines[n + 1])]
    broken = {n for n in going_on if len(lines[n]) + 1 + len(lines[n + 1].split(b" ", 1)[0]) > width}
    few = len({lines[n] for n in broken}) < 2 or len(broken) < _CONTINUED_SHARE * len(going_on)
    return set() if few else broken


def _joined(lines: list[bytes], broken: set[int], between: bytes) -> bytes:
    whole: list[bytes] = []
    gap = b""
    for n, line in enumerate(lines):
        whole.append(line)
        if n in broken:
            whole.append(between)
            gap += b"\n"
        elif n + 1 < len(lines):
            whole.append(gap + b"\n")
            gap = b""
    return b"".join(whole)
