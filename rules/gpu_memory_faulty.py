"""A GPU's memory failed: an uncorrectable error, or a repair that is pending or has failed."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, Source
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.names import name_of
from doctor.symptoms.xids import XidEvent, was_recovered, xid_events
from rules.tables.xids import XIDS, codes_of

FAULTS = codes_of("gpu-memory-faulty")
"""Without 63, which alone is a repair that succeeded."""

MILD_XIDS = frozenset({94, 156, 157})
"""94 ended the application that met the error and no other; a retired part (156, 157) is out of use, and the rest works
(NVIDIA's Xid catalogue)."""


class Limits(msgspec.Struct, frozen=True):
    """How long the past is told."""

    recovered_seconds: float = 900.0
    """An error after which the driver asks for nothing any more is told this long, as a warning. guess: as for a lost GPU."""


_BESIDE_MILD = frozenset({"ECC: volatile uncorrected", "row remapper: pending"})
"""What a contained error leaves in the GPU's own counters."""


@rule(
    "gpu-memory-faulty",
    "A GPU's memory has failed",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.KERNEL_LOG),
    explains=(
        "application-fault",
        "nccl-timeout",
        "engine-crashed",
        "engine-stalled",
        "worker-killed",
        "recovery-pending",
    ),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Join the GPU's own counters of this driver load, the kernel's Xids and the engine's word; corrected errors are none."""
    xids = [e for e in xid_events(history) if e.code in FAULTS]
    over = {e for e in xids if was_recovered(history, e)}
    xids = [e for e in xids if e not in over or history.now - (e.last_at or history.now) <= limits.recovered_seconds]
    told: set[str] = set()
    for gpu in history.latest.gpus:
        mine = [xid for xid in xids if xid.pci_address == gpu.pci_address]
        words = _words(gpu)
        if mine or words:
            told |= {xid.pci_address for xid in mine}
            yield _finding(gpu, mine, words, over)
    for xid in xids:
        if xid.pci_address not in told:
            told.add(xid.pci_address)
            mine = [other for other in xids if other.pci_address == xid.pci_address]
            yield Finding(
                summary=f"The GPU at {xid.pci_address}: {XIDS[xid.code].words} (Xid {xid.code})",
                evidence=tuple(Evidence(Source.KERNEL_LOG.value, e.first.where, e.first.text) for e in mine[:3]),
                severity=Severity.WARNING if _is_mild(mine, [], over) else Severity.CRITICAL,
                since=xid.at,
                facts={"pci-address": xid.pci_address},
            )
    if not told:
        yield from _engine_says_so(history)


def _words(gpu: Gpu) -> list[tuple[str, str]]:
    """Return what NVML says, with its field."""
    ecc = gpu.ecc
    said = (
        (ecc.remap_failed is True, "a row could not be remapped", "row remapper: failure"),
        (ecc.sram_threshold_exceeded is True, "its SRAM passed the error threshold", "ECC: SRAM threshold exceeded"),
        (ecc.remap_pending is True, "a row waits to be remapped: reset the GPU", "row remapper: pending"),
        (
            isinstance(ecc.uncorrected_volatile, int) and ecc.uncorrected_volatile > 0,
            f"{ecc.uncorrected_volatile} uncorrectable errors since the driver was loaded",
            "ECC: volatile uncorrected",
        ),
    )
    return [(words, field) for holds, words, field in said if holds]


def _finding(gpu: Gpu, xids: list[XidEvent], words: list[tuple[str, str]], over: set[XidEvent]) -> Finding:
    pci_address = gpu.pci_address if isinstance(gpu.pci_address, str) else None
    parts = [text for text, _ in words] + [f"{XIDS[xid.code].words} (Xid {xid.code})" for xid in xids[:3]]
    only_pending = not xids and [field for _, field in words] == ["row remapper: pending"]
    again = "; the driver asks for nothing any more" if xids and not words and over.issuperset(xids) else ""
    return Finding(
        summary=f"{name_of(gpu)}: {'; '.join(parts)}{again}",
        evidence=(
            *(Evidence(Source.KERNEL_LOG.value, xid.first.where, xid.first.text) for xid in xids[:3]),
            *(Evidence(Source.NVML.value, f"GPU {gpu.index}: {field}", text) for text, field in words),
        ),
        severity=Severity.WARNING if only_pending or _is_mild(xids, words, over) else Severity.CRITICAL,
        subject=Subject(gpus=(gpu.uuid,)),
        since=min((xid.at for xid in xids if xid.at is not None), default=None),
        facts=dict(facts_of_gpu(gpu.index, pci_address, gpu.uuid)),
    )


def _is_mild(xids: list[XidEvent], words: list[tuple[str, str]], over: set[XidEvent]) -> bool:
    """Whether every error was contained or is over, and the GPU says nothing worse."""
    mild = bool(xids) and all(xid.code in MILD_XIDS or xid in over for xid in xids)
    return mild and {field for _, field in words} <= _BESIDE_MILD


def _engine_says_so(history: History) -> Iterator[Finding]:
    for log, incident in incidents(history):
        proof = incident.having("cuda-error", kinds=("ecc",))
        if proof:
            yield Finding(
                summary="CUDA reported an uncorrectable ECC error to the engine: the memory of one of its GPUs has failed",
                evidence=(Evidence(Source.ENGINE_LOG.value, proof[0].where, proof[0].text),),
                confidence=Confidence.HIGH,
                subject=Subject(
                    engine=log.engine, ranks=(f"rank{proof[0].rank}",) if proof[0].rank is not None else ()
                ),
                since=incident.at,
            )
