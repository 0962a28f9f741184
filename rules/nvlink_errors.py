"""An NVLink retrains, replays or corrupts: it carries data, and not reliably."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, Maybe, NvLink, Source, known
from doctor.symptoms.growth import link_growth, moved_links
from doctor.symptoms.names import gpu_at, listed, name_at, name_of
from doctor.symptoms.xids import XidEvent, was_recovered, xid_events
from rules.tables.xids import XIDS, codes_of

FAULTS = codes_of("nvlink-errors")


class Limits(msgspec.Struct, frozen=True):
    """How many errors are too many."""

    window_seconds: float = 600.0
    """guess: long enough to catch a link that retrains now and then."""
    crc_per_second: float = 100.0
    """CRC errors that NVIDIA's own health check fails at (DCGM 4.6, NVLink watches); any replay or recovery fails it."""


COUNTERS: tuple[tuple[str, Callable[[NvLink], Maybe[int]]], ...] = (
    ("replays", lambda link: link.replay_errors_total),
    ("recoveries", lambda link: link.recovery_errors_total),
    ("CRC errors", lambda link: link.crc_errors_total),
)


@rule(
    "nvlink-errors",
    "An NVLink is unreliable",
    severity=Severity.WARNING,
    needs=(Source.NVML, Source.KERNEL_LOG),
    explains=("nvlink-degraded", "nccl-timeout", "engine-stalled", "engine-crashed", "throughput-below-reference"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Judge counters by their growth, never by their value, and the driver's NVLink Xids unless they say non-fatal."""
    for gpu in history.latest.gpus:
        grown = list(_grown(history, gpu, limits))
        if grown:
            yield Finding(
                summary=f"{name_of(gpu)}: {listed(text for _, text in grown)} in the last {limits.window_seconds / 60:.0f} min",
                evidence=tuple(
                    Evidence(Source.NVML.value, f"GPU {gpu.index}, link {link}: error counters", text)
                    for link, text in grown
                ),
                subject=Subject(
                    gpus=(gpu.uuid,), links=tuple(dict.fromkeys(f"{gpu.uuid}/{link}" for link, _ in grown))
                ),
                facts=dict(facts_of_gpu(gpu.index, None, gpu.uuid)),
            )
    events = [
        event
        for event in xid_events(history)
        if event.code in FAULTS and event.first.severity != "non-fatal" and not was_recovered(history, event)
    ]
    for pci_address in dict.fromkeys(event.pci_address for event in events):
        yield _by_xid(history, pci_address, [event for event in events if event.pci_address == pci_address])


def _grown(history: History, gpu: Gpu, limits: Limits) -> Iterator[tuple[int, str]]:
    moved = moved_links(history, gpu.uuid, limits.window_seconds)
    for link in gpu.links if known(gpu.links) else ():
        for name, count in COUNTERS if link.link in moved else ():
            grown = link_growth(history, gpu.uuid, link.link, count, limits.window_seconds)
            if grown is None or not grown.amount:
                continue
            if name != "CRC errors" or grown.per_second >= limits.crc_per_second:
                yield link.link, f"link {link.link} had {grown.amount:.0f} {name}"


def _by_xid(history: History, pci_address: str, events: list[XidEvent]) -> Finding:
    gpu, first = gpu_at(history.latest, pci_address), events[0]
    row = XIDS[first.code]
    link = f" on link {first.first.link}" if first.first.link is not None else ""
    times = f", {sum(e.count for e in events)} times" if sum(e.count for e in events) > 1 else ""
    return Finding(
        summary=f"{name_at(history.latest, pci_address)}: {row.words}{link} (Xid {first.code}{times})",
        evidence=tuple(Evidence(Source.KERNEL_LOG.value, e.first.where, e.first.text) for e in events),
        confidence=Confidence.HIGH,
        severity=Severity.CRITICAL if any(e.first.severity == "fatal" for e in events) else None,
        subject=Subject(gpus=(gpu.uuid,) if gpu else ()),
        since=first.at,
        facts=dict(facts_of_gpu(gpu.index, pci_address, gpu.uuid)) if gpu else {"pci-address": pci_address},
    )
