"""The one path: visits in, reports out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from doctor.history import History
from doctor.report import Report, in_order_of_cause, passed_over, verdict_of
from doctor.rule import AnyRule, Finding, Unjudged
from doctor.snapshot import Snapshot, Source


def watch(
    visits: Iterable[Snapshot],
    rules: Sequence[AnyRule],
    keep: float,
    optional: frozenset[Source] = frozenset(),
) -> Iterator[Report]:
    """Yield a report after each visit. *keep*: how many seconds of visits the rules remember.

    *optional* sources, unseen, don't make a report incomplete.
    """
    history: History | None = None
    for snapshot in visits:
        history = History((snapshot,), keep) if history is None else history.after(snapshot)
        yield judge(history, rules, optional)


def judge(history: History, rules: Sequence[AnyRule], optional: frozenset[Source] = frozenset()) -> Report:
    """Ask every rule about the history, and return what they say."""
    findings: list[Finding] = []
    unjudged: list[Unjudged] = []
    quiet: list[str] = []
    for rule in rules:
        found, blind = rule.judge(history)
        findings.extend(found)
        if blind is not None:
            unjudged.append(Unjudged(rule.id, blind))
        elif not found:
            quiet.append(rule.id)
    latest = history.latest
    return Report(
        at=latest.at,
        node=latest.node,
        verdict=verdict_of(findings, latest, optional),
        findings=in_order_of_cause(findings),
        unjudged=tuple(unjudged),
        quiet=tuple(quiet),
        unseen=latest.unseen + passed_over(latest),
        snapshot=latest,
    )
