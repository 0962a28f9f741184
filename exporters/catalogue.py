"""What the program knows: its failure modes, and the nodes and faults that it can simulate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from doctor.config import Site
from doctor.drop_ins import is_refused
from doctor.report import Report
from doctor.rule import AnyRule
from doctor.silence import Silence
from doctor.simulation.faults import KINDS, TIMES, Parameter
from doctor.simulation.profiles import PROFILES
from exporters.terminal import Terminal, wrapped
from exporters.wording import plain, silence_subject, silenced


def rules_screen(rules: Sequence[AnyRule], report: Report, terminal: Terminal | None = None) -> str:
    """Return every failure mode: its severity, what it needs, and whether the node of the report can judge it."""
    terminal = terminal or Terminal()
    off = frozenset(report.switched_off)
    present = {reported.finding.failure_mode for reported in report.findings}
    blind = {unjudged.failure_mode: plain(str(unjudged.why)) for unjudged in report.unjudged}
    name = 2 + max((len(rule.id) for rule in rules), default=0)
    lines = [terminal.bold(f"{'FAILURE MODE':<{name}}{'SEVERITY':<10}{'HERE':<10}NEEDS")]
    for rule in rules:
        judged = "present" if rule.id in present else "unjudged" if rule.id in blind else "quiet"
        here = "off" if rule.id in off else judged
        lead = f"{rule.id:<{name}}{rule.severity.word:<10}{here:<10}"
        lines += wrapped(_needs(rule), terminal.width, first=lead)
    reasons: dict[str, list[str]] = {}
    for failure_mode, why in blind.items():
        reasons.setdefault(why, []).append(failure_mode)
    if reasons:
        lines += ["", terminal.bold("Unjudged, because")]
    for why, failure_modes in reasons.items():
        lines += wrapped(f"{why}: {', '.join(failure_modes)}", terminal.width, first="  - ")
    if off:
        lines += ["", f"{terminal.bold('Off')}: the site's configuration says `enabled = false`"]
    return "\n".join(lines) + "\n"


def site_screen(site: Site, rules: Sequence[AnyRule], at: float, terminal: Terminal | None = None) -> str:
    """Return what a site's configuration comes to at a moment: what is changed, silenced, added and refused."""
    terminal = terminal or Terminal()
    own = {pattern.id for pattern in site.log_patterns}
    refused = [rule for rule in rules if is_refused(rule)]
    added = [rule for rule in rules if rule.page is not None and rule.id not in own and rule not in refused]
    parts: dict[str, list[str]] = {
        "Sources done without": [source.value for source in site.optional],
        "Logs of engines": [plain(log) for log in site.engine.logs],
        "Pages of engines": [plain(page) for page in site.engine.metrics],
        "Rules changed": [f"{rule.id}: {_changes(site.rules[rule.id])}" for rule in rules if rule.id in site.rules],
        "Silences in force": [
            f"{silence_subject(s)}, {silenced(s)}" for s in sorted(site.silence, key=Silence.order) if s.in_force(at)
        ],
        "Silences that have ended: renew or remove them": [
            f"{silence_subject(s)}, {silenced(s)}"
            for s in sorted(site.silence, key=Silence.order)
            if not s.in_force(at)
        ],
        "Log patterns": [
            f"{p.id} ({p.severity}, {p.source}): {plain(p.text)}" + (f", {plain(p.pattern)}" if p.pattern else "")
            for p in site.log_patterns
        ],
        "The site's own rules": [f"{rule.id} ({rule.severity.word}): {plain(rule.title)}" for rule in added],
        "Refused": [f"{rule.id}: {plain(rule.runbook.sections['Meaning'])}" for rule in refused],
    }
    lines = wrapped(f"{plain(site.file) or 'no configuration'}: {len(rules)} rules", terminal.width)
    for heading, entries in parts.items():
        if entries:
            lines += ["", terminal.bold(heading)]
        for entry in entries:
            lines += wrapped(entry, terminal.width, first="  - ")
    return "\n".join(lines) + "\n"


def _changes(wanted: Mapping[str, object]) -> str:
    if wanted.get("enabled") is False:
        return "off"
    return ", ".join(f"{plain(name)} = {plain(str(value))}" for name, value in wanted.items())


def rules_markdown(rules: Iterable[AnyRule], runbooks: str) -> str:
    """Return every failure mode as a Markdown table; *runbooks* is the way from that page to the runbooks."""
    rows = [
        f"| [`{rule.id}`]({runbooks}{rule.id.replace('-', '_')}.md) | {rule.title} | {rule.severity.word} | {_needs(rule)} |"
        for rule in rules
    ]
    return "\n".join(["| failure mode | what is wrong | severity | needs |", "|---|---|---|---|", *rows]) + "\n"


def _needs(rule: AnyRule) -> str:
    return ", ".join(source.value for source in rule.needs)


def drills_screen(terminal: Terminal | None = None) -> str:
    """Return the profiles and the faults of simulated nodes, each fault with its parameters."""
    terminal = terminal or Terminal()
    lines = [terminal.bold("Profiles"), ""]
    width = 2 + max(map(len, PROFILES))
    for profile in PROFILES.values():
        lines += wrapped(profile.text, terminal.width, first=f"  {profile.name:<{width}}")
    lines += ["", f"{terminal.bold('Faults')} (--fault NAME:PARAMETER=VALUE,…)"]
    for kind in KINDS.values():
        lines += ["", f"  {kind.name}", *wrapped(kind.text, terminal.width, first="    ")]
        lines += _parameters(kind.parameters, terminal)
    lines += ["", "  Every fault takes", *_parameters(TIMES, terminal), ""]
    lines += ["Example: gpu-doctor check --simulate hgx-h100-8 --fault nvlink-down:gpu=2,link=5"]
    return "\n".join(lines) + "\n"


def _parameters(parameters: Sequence[Parameter], terminal: Terminal) -> Iterator[str]:
    for parameter in parameters:
        words = [parameter.text]
        if parameter.choices:
            words.append(f"one of {', '.join(parameter.choices)}")
        if parameter.default is not None:
            words.append(f"default {parameter.default}")
        elif not parameter.optional:
            words.append("must be given")
        yield from wrapped("; ".join(words), terminal.width, first=f"      {parameter.name:<12}")
