"""A runbook for a person at a terminal: its Markdown, laid out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.readers.runbook import Runbook
from exporters.terminal import Terminal, wrapped

_ITEM = re.compile(r"^(\s*)((?:\d+\.|[-*])\s+)(.*)$")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_EMPHASIS = re.compile(r"(\*{1,2})(?=\S)([^*]+)(?<=\S)\1")

INDENT = "  "


def render(failure_mode: str, runbook: Runbook, terminal: Terminal | None = None) -> str:
    """Return the runbook as text that ends with a newline."""
    terminal = terminal or Terminal()
    lines = [terminal.bold(failure_mode), *wrapped(runbook.title, terminal.width)]
    for heading, markdown in runbook.sections.items():
        lines += ["", terminal.bold(heading), *_laid_out(markdown, terminal)]
    return "\n".join(lines) + "\n"


def _laid_out(markdown: str, terminal: Terminal) -> Iterator[str]:
    """Yield the lines of a section: paragraphs and items wrapped, code and tables as they stand."""
    block: list[str] = []
    lead = rest = INDENT
    fenced, margin = False, 0

    def flush() -> Iterator[str]:
        if block:
            yield from wrapped(_words(" ".join(block)), terminal.width, first=lead, rest=rest)
            block.clear()

    for line in markdown.splitlines():
        item = _ITEM.match(line)
        if line.lstrip().startswith("```"):
            yield from flush()
            fenced = not fenced
            margin = len(line) - len(line.lstrip()) if fenced else 0
        elif fenced or line.startswith("|"):
            yield from flush()
            yield f"{rest}{'  ' if fenced else ''}{line[margin:]}"
        elif not line.strip():
            yield from flush()
            yield ""
        elif line.startswith("### "):
            yield from flush()
            yield INDENT + terminal.bold(line[4:].strip())
        elif item:
            yield from flush()
            lead = INDENT + item[1] + item[2]
            rest = " " * len(lead)
            block.append(item[3])
        else:
            if not block and not line.startswith(" "):
                lead = rest = INDENT
            block.append(line.strip())
    yield from flush()


def _words(text: str) -> str:
    text = _LINK.sub(lambda link: link[2] if link[1] in {"", link[2]} else f"{link[1]} ({link[2]})", text)
    return _EMPHASIS.sub(r"\2", text)
