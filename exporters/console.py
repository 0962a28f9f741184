"""The report for a person at a terminal: the verdict, each incident with its root cause first, then the blind spots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from doctor.report import Report, ReportedFinding, Verdict, essential_sources, is_open
from doctor.rule import Evidence, Finding, Severity
from doctor.snapshot import Absent, Snapshot, Unseen, Why, known, or_none
from exporters.terminal import Terminal, wrapped
from exporters.wording import (
    SOURCE_NAMES,
    counted,
    gpu_number,
    headline,
    listed,
    moment,
    plain,
    remedy,
    severity_of,
    silence_subject,
    silenced,
    who,
)

LABEL = 9
"""Columns of `who`, `proof`, `try` and `runbook`."""

PROOFS_OF_A_CAUSE = 5
PROOFS_OF_A_CONSEQUENCE = 2
LINES_OF_A_PROOF = 3

NAMES_OF_A_REASON = 5
"""Failure modes named where one reason blinds more; `gpu-doctor rules` and the JSON name them all."""

ABOUT_LINKS = frozenset({"pcie-fallback", "nvlink-degraded", "nvlink-errors", "p2p-blocked", "nvswitch-fabric-fault"})
"""Failure modes that the matrix of the topology helps to see."""

EXPECTED_GAPS = frozenset({Why.NOT_SUPPORTED, Why.NOT_PRESENT, Why.NOT_ASKED, Why.NOT_GIVEN})
"""Parts that are missing for these reasons need no line: nobody can do anything about them on this node."""


def render(report: Report, terminal: Terminal | None = None) -> str:
    """Return the report as text that ends with a newline."""
    terminal = terminal or Terminal()
    lines = [*_verdict(report, terminal), *_incidents(report, terminal)]
    if any(_is_about_links(reported.finding) for reported in report.open):
        lines += _topology(report, terminal)
    lines += [
        *_silenced(report, terminal),
        *_unjudged(report, terminal),
        *_unseen(report, terminal),
        *_quiet(report, terminal),
    ]
    return "\n".join(lines) + "\n"


def _verdict(report: Report, terminal: Terminal) -> Iterator[str]:
    paint = {
        Verdict.CRITICAL: terminal.red,
        Verdict.WARNING: terminal.yellow,
        Verdict.INCOMPLETE: terminal.yellow,
        Verdict.NOTICE: terminal.cyan,
        Verdict.CLEAR: terminal.green,
    }[report.verdict]
    word = report.verdict.value.upper()
    lead = f"{word}  "
    first, *rest = wrapped(headline(report, terminal.width - len(lead)), terminal.width, first=lead)
    yield paint(word) + first[len(word) :]
    yield from rest
    for line in wrapped(_node(report), terminal.width):
        yield terminal.dim(line)


def _node(report: Report) -> str:
    snapshot = report.snapshot
    gpus = Counter(plain(or_none(gpu.name) or "unnamed GPU") for gpu in snapshot.gpus)
    driver = or_none(snapshot.stack.driver)
    parts = [
        plain(report.node.name) or "unnamed node",
        moment(report.at),
        *(f"{number}× {name}" for name, number in gpus.items()),
        *([f"driver {plain(driver)}"] if driver else []),
        *(["simulated"] if report.node.simulated else []),
    ]
    return ", ".join(parts)


def _incidents(report: Report, terminal: Terminal) -> Iterator[str]:
    number = 0
    advised: dict[tuple[str, ...], int] = {}
    shown = [reported for incident in report.incidents if is_open(incident) for reported in incident]
    for reported in shown:
        yield ""
        if reported.depth == 0:
            number += 1
            yield from _cause(reported, report.snapshot, terminal, number, advised)
        else:
            yield from _consequence(reported, report.snapshot, terminal)


def _cause(
    reported: ReportedFinding, snapshot: Snapshot, terminal: Terminal, number: int, advised: dict[tuple[str, ...], int]
) -> Iterator[str]:
    finding = reported.finding
    lead = f"{number}. "
    indent = " " * len(lead)
    yield from _name(reported, terminal, lead, indent)
    yield from wrapped(plain(finding.summary), terminal.width, first=indent)
    about = who(finding, snapshot)
    if about:
        yield from _labelled("who", [about], terminal, indent)
    yield from _labelled("proof", _proofs(finding.evidence, PROOFS_OF_A_CAUSE), terminal, indent, LINES_OF_A_PROOF)
    if finding.advice:
        before = advised.setdefault(finding.advice, number)
        steps = [f"{i}. {plain(step)}" for i, step in enumerate(finding.advice, 1)]
        yield from _labelled("try", steps if before == number else [f"as for {before}."], terminal, indent)
    yield from _labelled("runbook", [f"gpu-doctor explain {finding.failure_mode}"], terminal, indent)


def _consequence(reported: ReportedFinding, snapshot: Snapshot, terminal: Terminal) -> Iterator[str]:
    finding = reported.finding
    lead = "   " * reported.depth + "└─ "
    indent = " " * len(lead)
    yield from _name(reported, terminal, lead, indent)
    yield from wrapped(plain(finding.summary), terminal.width, first=indent)
    about = who(finding, snapshot)
    if about:
        yield from _labelled("who", [about], terminal, indent)
    proofs = _proofs(finding.evidence, PROOFS_OF_A_CONSEQUENCE)
    yield from _labelled("proof", proofs, terminal, indent, LINES_OF_A_PROOF)


def _name(reported: ReportedFinding, terminal: Terminal, lead: str, indent: str) -> Iterator[str]:
    finding = reported.finding
    severity = severity_of(finding)
    paint = {Severity.CRITICAL: terminal.red, Severity.WARNING: terminal.yellow, Severity.NOTICE: terminal.cyan}[
        severity
    ]
    if reported.silence is not None:
        paint = terminal.dim
    facts = [
        f"{severity.word}, {finding.confidence.word} confidence",
        *([f"because of {listed(reported.caused_by)}"] if reported.depth else []),
        *([f"since {moment(finding.since)}"] if finding.since is not None else []),
    ]
    first, *rest = wrapped(f"{finding.failure_mode} ({'; '.join(facts)})", terminal.width, first=lead, rest=indent)
    yield first.replace(finding.failure_mode, paint(finding.failure_mode), 1)
    yield from rest
    if reported.silence is not None:
        yield from _labelled("silenced", [silenced(reported.silence)], terminal, indent)


def _proofs(evidence: tuple[Evidence, ...], most: int) -> list[str]:
    proofs = [_proof(piece) for piece in evidence[:most]]
    left = len(evidence) - len(proofs)
    return [*proofs, f"and {left} more; `--format json` shows all"] if left > 0 else proofs


def _proof(piece: Evidence) -> str:
    place = " ".join(filter(None, (plain(piece.source), plain(piece.where))))
    return ": ".join(filter(None, (place, plain(piece.text))))


def _labelled(
    label: str, texts: Iterable[str], terminal: Terminal, indent: str, most: int | None = None
) -> Iterator[str]:
    for number, text in enumerate(texts):
        lead = indent + (label if number == 0 else "").ljust(LABEL)
        first, *rest = wrapped(text, terminal.width, first=lead, rest=" " * (len(lead) + 2), most=most)
        yield first.replace(label, terminal.dim(label), 1) if number == 0 else first
        yield from rest


def _is_about_links(finding: Finding) -> bool:
    return finding.failure_mode in ABOUT_LINKS or bool(finding.subject.links)


def _topology(report: Report, terminal: Terminal) -> list[str]:
    snapshot = report.snapshot
    ways: dict[tuple[int, int], str] = {}
    for pair in snapshot.pairs:
        first, second = gpu_number(pair.first, snapshot), gpu_number(pair.second, snapshot)
        if first is None or second is None:
            continue
        way = f"NV{pair.nvlinks}" if known(pair.nvlinks) and pair.nvlinks else plain(or_none(pair.ancestor) or "?")
        ways[first, second] = ways[second, first] = way
    numbers = sorted({number for pair in ways for number in pair})
    cell = 1 + max((len(way) for way in ways.values()), default=0)
    if not numbers or (cell := max(cell, 6)) * (len(numbers) + 1) + 2 > terminal.width:
        return []
    found = {
        gpu_number(gpu, snapshot)
        for reported in report.findings
        if _is_about_links(reported.finding)
        for gpu in reported.finding.subject.gpus
    }
    lines = ["", f"{terminal.bold('Topology')} (NVn: n NVLinks, else PCIe; *: named above)"]
    lines.append("  " + "".join(word.rjust(cell) for word in ("", *(f"GPU{n}" for n in numbers))))
    for row in numbers:
        name = f"{'*' if row in found else ''}GPU{row}"
        cells = ("X" if row == column else ways.get((row, column), "?") for column in numbers)
        lines.append("  " + "".join(word.rjust(cell) for word in (name, *cells)))
    return lines


def _silenced(report: Report, terminal: Terminal) -> Iterator[str]:
    quiet = [reported for incident in report.incidents if not is_open(incident) for reported in incident]
    if quiet:
        yield ""
        yield f"{terminal.bold('Silenced by the site')}: {counted(len(quiet), 'finding')}, not in the verdict"
    for reported in quiet:
        if reported.silence is not None:
            finding = reported.finding
            name = f"{finding.failure_mode} ({severity_of(finding).word})"
            yield from wrapped(f"{name} {silenced(reported.silence)}", terminal.width, first="  - ")
            yield from wrapped(plain(finding.summary), terminal.width, first="    ")
    if report.ended_silences:
        yield ""
        yield f"{terminal.bold('Silences that have ended')}: renew or remove them"
    for silence in report.ended_silences:
        yield from wrapped(f"{silence_subject(silence)}, {silenced(silence)}", terminal.width, first="  - ")


def _unjudged(report: Report, terminal: Terminal) -> Iterator[str]:
    if not report.unjudged:
        return
    asked = len(report.unjudged) + len(report.quiet) + len({f.finding.failure_mode for f in report.findings})
    yield ""
    yield f"{terminal.bold('Could not be judged')}: {len(report.unjudged)} of {counted(asked, 'failure mode')}"
    reasons: dict[str, list[str]] = {}
    for unjudged in report.unjudged:
        reasons.setdefault(_reason(unjudged.why, report), []).append(unjudged.failure_mode)
    for reason, failure_modes in reasons.items():
        yield from wrapped(f"{reason}: {listed(failure_modes, NAMES_OF_A_REASON)}", terminal.width, first="  - ")


def _reason(why: Absent, report: Report) -> str:
    """Return why a failure mode could not be judged; a source that was not seen gives its own reason further below."""
    for unseen in report.unseen:
        given = unseen.why.why is Why.NOT_GIVEN
        if (
            not unseen.what
            and not given
            and unseen.why.why is why.why
            and why.detail.startswith(f"{unseen.source.value} ")
        ):
            return f"{SOURCE_NAMES[unseen.source]} could not be seen"
    return plain(str(why))


def _unseen(report: Report, terminal: Terminal) -> Iterator[str]:
    gaps: dict[str, list[Unseen]] = {}
    essential = essential_sources(report.snapshot)
    for unseen in report.unseen:
        why = unseen.why.why
        if why is Why.NOT_GIVEN:
            continue  # the rules that would have used it say so
        if why is Why.NOT_PRESENT and not unseen.what and unseen.source not in essential:
            gaps.setdefault("not on this node", []).append(unseen)
        elif not unseen.what or why not in EXPECTED_GAPS:
            gaps.setdefault(f"{SOURCE_NAMES[unseen.source]}: {plain(str(unseen.why))}", []).append(unseen)
    if gaps:
        yield ""
        yield f"{terminal.bold('Not seen')}, and how to change that"
    for reason, missing in gaps.items():
        absent = reason == "not on this node"
        parts = listed(
            [SOURCE_NAMES[u.source] if absent else plain(u.what) for u in missing if absent or u.what], most=3
        )
        yield from wrapped(f"{reason}{f' ({parts})' if parts else ''}", terminal.width, first="  - ")
        for way in dict.fromkeys(filter(None, (remedy(u.source, u.why) for u in missing))):
            yield from wrapped(way, terminal.width, first="    → ")


def _quiet(report: Report, terminal: Terminal) -> Iterator[str]:
    if report.verdict is Verdict.INCOMPLETE:
        seen = listed(SOURCE_NAMES[source] for source in report.snapshot.seen) or "nothing"
        judged = f"Judged by that and not present: {', '.join(report.quiet)}."
        yield ""
        yield from wrapped(
            f"Seen all the same: {seen}. {judged if report.quiet else 'That alone judges no failure mode.'}",
            terminal.width,
        )
    elif report.quiet and report.findings:
        yield ""
        yield terminal.dim(f"Asked about and not present: {counted(len(report.quiet), 'other failure mode')}.")
    if report.switched_off:
        yield ""
        off = wrapped(f"Switched off by the site: {listed(report.switched_off, NAMES_OF_A_REASON)}.", terminal.width)
        yield from map(terminal.dim, off)
