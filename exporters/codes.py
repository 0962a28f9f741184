"""The tables of Xids and SXids for people: a page of all of them, and a screen of one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from exporters.terminal import Terminal, wrapped
from rules.tables.sxids import SXID_SOURCES, SXIDS, SxidCode
from rules.tables.xids import XID_SOURCES, XIDS, XidCode

_NAME = re.compile(r"(s?xid)[- ]?(\d{1,9})", re.IGNORECASE)

SWITCH_MODE = "nvswitch-fabric-fault"
"""The failure mode that fatal SXids belong to."""
ELSE_MODE = "xid-unclassified"


def code_screen(name: str, terminal: Terminal | None = None) -> str | None:
    """Return the row of `xid-79` or `sxid-20034` for a terminal; None where the name is no such code's."""
    match = _NAME.fullmatch(name.strip())
    if match is None:
        return None
    terminal = terminal or Terminal()
    kind, code = match[1].lower(), int(match[2])
    if kind == "xid":
        row = XIDS.get(code)
        cells, sources = (list(_xid_cells(row)) if row else []), XID_SOURCES
    else:
        row = SXIDS.get(code)
        cells, sources = (list(_sxid_cells(row)) if row else []), SXID_SOURCES
    title = terminal.bold(f"{'Xid' if kind == 'xid' else 'SXid'} {code}")
    if row is None:
        lines = wrapped(
            "Neither the driver's source nor NVIDIA's documents, as far as read, know this code.", terminal.width
        )
        return "\n".join([title, *lines]) + "\n"
    width = max(len(label) for label, _, _ in cells) + 2
    lines = [title]
    for label, text, _ in cells:
        lines += wrapped(text, terminal.width, first=f"  {label:<{width}}")
    lines += ["", terminal.bold("Sources")]
    for label, _, column in cells:
        lines += wrapped(sources[column], terminal.width, first=f"  {label:<{width}}")
    return "\n".join(lines) + "\n"


def _xid_cells(row: XidCode) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and column of what is known of an Xid."""
    if row.symbol:
        yield "driver's name", row.symbol, "symbol"
    if row.mnemonic:
        yield "catalogue's name", row.mnemonic, "mnemonic"
    if row.meaning:
        yield "meaning", row.meaning, "meaning"
    if row.action:
        yield "NVIDIA's action", _spaced(row.action), "action"
    if row.then:
        yield "and if it repeats", _spaced(row.then), "then"
    if row.applies is not None:
        yield "applies to", ", ".join(row.applies) or "nothing since the A100: the catalogue calls it unused", "applies"
    if row.recovery_since is not None:
        yield "recovery action", f"follows it from driver {row.recovery_since} on", "recovery_since"
    if row.informational:
        yield "failure mode", f"none alone; beside others: {row.judged_by}", "informational"
    else:
        mode = row.judged_by or ELSE_MODE
        yield "failure mode", f"{mode} (`gpu-doctor explain {mode}`)", "judged_by"
    for label, text in (("gpud", row.gpud), ("dcgm", row.dcgm and f"takes it for {row.dcgm}"), ("others", row.others)):
        if text:
            yield f"{label} say" if label == "others" else label, text, label


def _sxid_cells(row: SxidCode) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and column of what is known of an SXid."""
    if row.symbol:
        yield "driver's name", row.symbol, "symbol"
    if row.meaning:
        yield "meaning", row.meaning, "meaning"
    silent = "no document weighs it: what its own line says counts"
    yield "weight", _spaced(row.weight) if row.weight else silent, "weight"
    if row.recovery:
        yield "recovery", _spaced(row.recovery), "recovery"
    if row.gpud:
        yield "gpud", row.gpud, "gpud"


def _spaced(action: str) -> str:
    return action.replace("-", " ")


def codes_markdown(runbooks: str) -> str:
    """Return all codes as a Markdown page; *runbooks* is the way from that page to the runbooks."""
    return "\n".join([*_xids_markdown(runbooks), "", *_sxids_markdown(runbooks)]) + "\n"


def _xids_markdown(runbooks: str) -> Iterator[str]:
    used = [row for row in XIDS.values() if row.applies != ()]
    unused = [row for row in XIDS.values() if row.applies == ()]
    yield "# Xids and SXids"
    yield ""
    yield "Generated from `rules/tables/` by `make docs`. `gpu-doctor explain xid-79` shows one row with its sources."
    yield "An empty cell means that the source of its column is silent. Where tools disagree, NVIDIA's action counts here."
    yield ""
    yield "## Xids"
    yield ""
    yield "| Xid | name | meaning | NVIDIA's action | and if it repeats | applies to | failure mode here | who differs |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in used:
        applies = "" if row.applies is None else "all" if len(row.applies) == 4 else ", ".join(row.applies)
        cells = (
            str(row.code),
            f"`{row.name}`",
            row.meaning,
            _spaced(row.action),
            _spaced(row.then),
            applies,
            "none alone" if row.informational else _mode(row.judged_by, runbooks),
            row.differ,
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "*All*: A100, H100, B100 and GB200, the products that the catalogue names; it speaks of Ampere and newer."
    yield ""
    yield f"The catalogue calls {len(unused)} further codes unused, with the action *contact support*; one of them is a notice:"
    yield ""
    for row in unused:
        differ = f" ({row.differ})" if row.differ else ""
        yield f"- {row.code} `{row.name}`{differ}"
    yield ""
    yield "Sources of the columns:"
    yield ""
    for column, source in XID_SOURCES.items():
        yield f"- `{column}`: {source}"


def _sxids_markdown(runbooks: str) -> Iterator[str]:
    weighed = [row for row in SXIDS.values() if row.weight]
    yield "## SXids"
    yield ""
    yield f"What a line says of itself (`Fatal`, `Non-fatal`) counts; fatal ones are {_mode(SWITCH_MODE, runbooks)}."
    yield f"The driver names {len(SXIDS)} codes, all in `rules/tables/sxid.toml`; these are the ones that a document weighs:"
    yield ""
    yield "| SXid | name | meaning | weight | recovery | gpud |"
    yield "|---|---|---|---|---|---|"
    for row in weighed:
        cells = (str(row.code), f"`{row.symbol}`", row.meaning, _spaced(row.weight), _spaced(row.recovery), row.gpud)
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Sources of the columns:"
    yield ""
    for column, source in SXID_SOURCES.items():
        yield f"- `{column}`: {source}"


def _mode(failure_mode: str, runbooks: str) -> str:
    return f"[`{failure_mode}`]({runbooks}{failure_mode.replace('-', '_')}.md)" if failure_mode else ""
