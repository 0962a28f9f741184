"""A runbook: what a person does about a failure mode, as Markdown with fixed headings."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

HEADINGS = ("Meaning", "Impact", "Diagnosis", "Fix", "False positives", "References")
"""The headings of every runbook, in this order."""

_PLACEHOLDER = re.compile(r"<([a-z][a-z0-9-]*)>")
_ITEM = re.compile(r"^(?:\d+\.|[-*])\s+(.*)$")


class Runbook(msgspec.Struct, frozen=True):
    """A parsed runbook."""

    title: str
    sections: dict[str, str]
    """Markdown by heading."""

    def advice(self, facts: Mapping[str, str], most: int = 3) -> tuple[str, ...]:
        """Return the first items of *Fix*, one line each, with `<placeholders>` filled in from *facts*.

        A placeholder that the finding says nothing about stays as it is, so that the reader sees what to fill in.
        """
        items: list[str] = []
        for line in self.sections.get("Fix", "").splitlines():
            item = _ITEM.match(line)
            if item:
                items.append(item[1].strip())
            elif items and line.startswith((" ", "\t")) and line.strip():
                items[-1] += " " + line.strip()
            elif items and line.strip():
                break
        return tuple(_PLACEHOLDER.sub(lambda m: facts.get(m[1], m[0]), item) for item in items[:most])


def read(text: str) -> Runbook:
    """Parse a runbook; text before the first heading is dropped, an unknown heading is kept."""
    title = ""
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if not fenced and line.startswith("# ") and not title:
            title = line[2:].strip()
        elif not fenced and line.startswith("## "):
            current = sections.setdefault(line[3:].strip(), [])
        elif current is not None:
            current.append(line)
    return Runbook(title, {heading: "\n".join(lines).strip() for heading, lines in sections.items()})
