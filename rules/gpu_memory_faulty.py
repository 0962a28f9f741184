"""A GPU's memory failed: an uncorrectable error, or a repair that is pending or has failed."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, Source
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.names import name_of
from doctor.symptoms.xids import XidEvent, xid_events

UNCORRECTABLE_XIDS = (48, 94, 95, 140)
"""Double-bit error, contained and uncontained error, unrecovered ECC error (NVIDIA's Xid catalogue). 63 alone is a repair
that succeeded."""
FAILED_REPAIR_XID = 64

CONTAINED_XID = 94
"""It ended the application that met the error and no other; NVIDIA's action is to restart that application (`xid.toml`)."""

_BESIDE_CONTAINED = frozenset({"ECC: volatile uncorrected", "row remapper: pending"})
"""What a contained error leaves in the GPU's own counters."""


@rule(
    "gpu-memory-faulty",
    "A GPU's memory has failed",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.KERNEL_LOG),
    explains=("application-fault", "nccl-timeout", "engine-crashed", "engine-stalled", "worker-killed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Join the GPU's own counters of this driver load, the kernel's Xids and the engine's word; corrected errors are none."""
    xids = [e for e in xid_events(history) if e.code in (*UNCORRECTABLE_XIDS, FAILED_REPAIR_XID)]
    told: set[str] = set()
    for gpu in history.latest.gpus:
        mine = [xid for xid in xids if xid.pci_address == gpu.pci_address]
        words = _words(gpu)
        if mine or words:
            told |= {xid.pci_address for xid in mine}
            yield _finding(gpu, mine, words)
    for xid in xids:
        if xid.pci_address not in told:
            told.add(xid.pci_address)
            mine = [other for other in xids if other.pci_address == xid.pci_address]
            yield Finding(
                summary=f"The GPU at {xid.pci_address} reported an uncorrectable memory error (Xid {xid.code})",
                evidence=(Evidence(Source.KERNEL_LOG.value, xid.first.where, xid.first.text),),
                severity=Severity.WARNING if _is_contained(mine, []) else Severity.CRITICAL,
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


def _finding(gpu: Gpu, xids: list[XidEvent], words: list[tuple[str, str]]) -> Finding:
    pci_address = gpu.pci_address if isinstance(gpu.pci_address, str) else None
    parts = [text for text, _ in words] + [f"Xid {xid.code}" for xid in xids[:3]]
    only_pending = not xids and [field for _, field in words] == ["row remapper: pending"]
    return Finding(
        summary=f"{name_of(gpu)}: {'; '.join(parts)}",
        evidence=(
            *(Evidence(Source.KERNEL_LOG.value, xid.first.where, xid.first.text) for xid in xids[:3]),
            *(Evidence(Source.NVML.value, f"GPU {gpu.index}: {field}", text) for text, field in words),
        ),
        severity=Severity.WARNING if only_pending or _is_contained(xids, words) else Severity.CRITICAL,
        subject=Subject(gpus=(gpu.uuid,)),
        since=min((xid.at for xid in xids if xid.at is not None), default=None),
        facts=dict(facts_of_gpu(gpu.index, pci_address, gpu.uuid)),
    )


def _is_contained(xids: list[XidEvent], words: list[tuple[str, str]]) -> bool:
    """Whether every error was contained, and the GPU says nothing worse."""
    return {xid.code for xid in xids} == {CONTAINED_XID} and {field for _, field in words} <= _BESIDE_CONTAINED


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
