"""The driver reported an Xid that no other rule judges."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Source
from doctor.symptoms.names import gpu_at, name_at
from doctor.symptoms.xids import XidEvent, was_recovered, xid_events
from rules.tables.xids import XIDS

UNKNOWN_MEANING = "no source that we know explains it"


@rule(
    "xid-unclassified",
    "The driver reported another Xid",
    severity=Severity.WARNING,
    needs=(Source.KERNEL_LOG,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Give NVIDIA's meaning and action for each code that belongs to no failure mode, and say who disagrees."""
    others = [
        event
        for event in xid_events(history)
        if (event.code not in XIDS or not XIDS[event.code].judged_by) and not was_recovered(history, event)
    ]
    for key in dict.fromkeys((event.pci_address, event.code) for event in others):
        yield _finding(history, [e for e in others if (e.pci_address, e.code) == key])


def _finding(history: History, events: list[XidEvent]) -> Finding:
    first = events[0]
    row = XIDS.get(first.code)
    meaning = (row.words if row and row.meaning else row.name if row else "") or UNKNOWN_MEANING
    action = f"; NVIDIA's action: {row.action.replace('-', ' ')}" if row and row.action else ""
    if row is not None and row.applies == ():
        action = "; NVIDIA calls the code unused"
    differ = f" ({row.differ})" if row and row.differ else ""
    times = sum(event.count for event in events)
    gpu = gpu_at(history.latest, first.pci_address)
    return Finding(
        summary=f"{name_at(history.latest, first.pci_address)}: Xid {first.code}"
        f"{f', {times} times' if times > 1 else ''}: {meaning}{action}{differ}",
        evidence=tuple(Evidence(Source.KERNEL_LOG.value, e.first.where, e.first.text) for e in events[:3]),
        confidence=Confidence.MEDIUM,
        severity=Severity.NOTICE if row is None or row.is_mild else None,
        subject=Subject(gpus=(gpu.uuid,) if gpu else ()),
        since=first.at,
        facts={"xid": str(first.code)}
        | dict(facts_of_gpu(gpu.index, first.pci_address, gpu.uuid) if gpu else {"pci-address": first.pci_address}),
    )
