"""What the program knows: its failure modes, and the nodes and faults that it can simulate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from doctor.report import Report
from doctor.rule import AnyRule
from doctor.simulation.faults import KINDS, TIMES, Parameter
from doctor.simulation.profiles import PROFILES
from exporters.terminal import Terminal, wrapped
from exporters.wording import plain


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
