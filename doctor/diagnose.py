"""The one path: visits in, reports out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from doctor.history import History
from doctor.report import Report, in_order_of_cause, passed_over, verdict_of
from doctor.rule import AnyRule, Finding, Unjudged
from doctor.silence import Silence, silence_of
from doctor.snapshot import Absent, Snapshot, Source, Why


def watch(
    visits: Iterable[Snapshot],
    rules: Sequence[AnyRule],
    keep: float,
    optional: frozenset[Source] = frozenset(),
    silences: Sequence[Silence] = (),
    *,
    past: Iterable[Snapshot] = (),
) -> Iterator[Report]:
    """Yield a report after each visit. *keep*: how many seconds of visits the rules remember.

    *optional* sources, unseen, don't make a report incomplete; *silences* keep findings out of the verdict. *past*:
    visits before the first, remembered and not reported.
    """
    history: History | None = None
    for snapshot in past:
        history = _after(history, snapshot, keep)
    for snapshot in visits:
        history = _after(history, snapshot, keep)
        yield judge(history, rules, optional, silences)


def _after(history: History | None, snapshot: Snapshot, keep: float) -> History:
    return History((snapshot,), keep) if history is None else history.after(snapshot)


def judge(
    history: History,
    rules: Sequence[AnyRule],
    optional: frozenset[Source] = frozenset(),
    silences: Sequence[Silence] = (),
) -> Report:
    """Ask every rule about the history, and return what they say. A rule that fails stops no other."""
    findings: list[Finding] = []
    unjudged: list[Unjudged] = []
    quiet: list[str] = []
    switched_off: list[str] = []
    for rule in rules:
        if not rule.enabled:
            switched_off.append(rule.id)
            continue
        try:
            found, blind = rule.judge(history)
        except Exception as error:
            found, blind = (), broken(error)
        findings.extend(found)
        if blind is not None:
            unjudged.append(Unjudged(rule.id, blind))
        elif not found:
            quiet.append(rule.id)
    latest = history.latest
    under = [silence_of(finding, silences, history) for finding in findings]
    open_findings = [finding for finding, silence in zip(findings, under, strict=True) if silence is None]
    return Report(
        at=latest.at,
        node=latest.node,
        verdict=verdict_of(open_findings, latest, optional, unjudged),
        findings=in_order_of_cause(findings, under),
        unjudged=tuple(unjudged),
        quiet=tuple(quiet),
        switched_off=tuple(switched_off),
        silences=tuple(sorted(silences, key=Silence.order)),
        unseen=latest.unseen + passed_over(latest),
        snapshot=latest,
    )


def broken(error: Exception) -> Absent:
    """Return why a rule that failed could not judge."""
    return Absent(Why.BROKEN, f"the rule failed: {type(error).__name__}: {error}"[:300])
