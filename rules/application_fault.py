"""A kernel of the workload faulted on a GPU: the first CUDA error poisons the process, and the rest follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import EngineEvent, Source
from doctor.symptoms.engine_log import EngineLog, Incident, incidents
from doctor.symptoms.xids import XidEvent, xid_events
from rules.tables.xids import codes_of

FAULTS = {
    "illegal-memory-access": "an illegal memory access (CUDA error 700)",
    "launch-failure": "an unspecified launch failure (CUDA error 719)",
    "illegal-instruction": "an illegal instruction (CUDA error 715)",
    "misaligned-address": "a misaligned address (CUDA error 716)",
    "invalid-address-space": "an operation on the wrong address space (CUDA error 717)",
    "invalid-program-counter": "an invalid program counter (CUDA error 718)",
    "device-assert": "a failed assertion in a kernel (CUDA error 710)",
    "hardware-stack": "a hardware stack error (CUDA error 714)",
    "launch-timeout": "a kernel that ran into the display watchdog (CUDA error 702)",
}
"""The CUDA errors that end a context, by the kind of the signal `cuda-error` (CUDA runtime API, cudaError_t)."""

APPLICATION_XIDS = codes_of("application-fault")
"""NVIDIA's Xid catalogue says that each is most often the application's, and asks to look at the application first."""

MEMORY_XIDS = codes_of("gpu-memory-faulty") - {156, 157}
"""Uncorrectable memory errors: beside one of these, the fault is the GPU's. A part that was retired is no error."""


class Limits(msgspec.Struct, frozen=True):
    """When an application's fault points to the GPU."""

    suspect_count: int = 2
    """The same application Xid so many times on one GPU, and on no other, points to that GPU (NVSentinel: 31, twice in 24 h)."""
    suspect_seconds: float = 86400.0
    """Within this time, or what of it the history holds."""
    near_seconds: float = 300.0
    """How far from the engine's error an Xid may stand and be the same fault; guess: logs are buffered, stamps are coarse."""


@rule(
    "application-fault",
    "A kernel of the workload faulted",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("nccl-timeout", "engine-stalled", "engine-crashed", "xid-unclassified"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Name the first CUDA error of an incident, and the Xid beside it; an Xid alone is a warning."""
    xids = [event for event in xid_events(history) if event.code in APPLICATION_XIDS]
    used: list[XidEvent] = []
    for log, incident in incidents(history):
        cause = incident.cause
        if cause.signal == "cuda-error" and cause.facts.get("kind") in FAULTS and not _memory_failed(history):
            beside = [xid for xid in xids if _near(xid.at, incident.at, limits.near_seconds)]
            used += beside
            yield _fault(history, log, incident, beside, limits)
    rest = [xid for xid in xids if xid not in used]
    if rest and not used and not _memory_failed(history):
        yield _xids_alone(history, rest, limits)


def _memory_failed(history: History) -> bool:
    return any(event.code in MEMORY_XIDS for event in xid_events(history))


def _near(one: float | None, other: float | None, seconds: float) -> bool:
    return one is None or other is None or abs(one - other) <= seconds


def _fault(history: History, log: EngineLog, incident: Incident, xids: list[XidEvent], limits: Limits) -> Finding:
    cause = incident.cause
    what = FAULTS[str(cause.facts["kind"])]
    who = f"rank {cause.rank}" if cause.rank is not None else cause.process or "the engine"
    if cause.pid is not None:
        who += f" (pid {cause.pid})"
    followers = [event for event in incident.events if event is not cause and event.signal != "cuda-error"]
    suspect = _suspect(xids, limits)
    tail = f"; {suspect}" if suspect else ""
    if not tail and followers:
        tail = f"; the {len(followers)} other error lines of the log follow from it"
    facts = {"log": log.log}
    gpus: tuple[str, ...] = ()
    for xid in xids:
        gpu = next((g for g in history.latest.gpus if g.pci_address == xid.pci_address), None)
        if gpu is not None:
            gpus = (gpu.uuid,)
            facts |= facts_of_gpu(gpu.index, xid.pci_address, gpu.uuid)
    return Finding(
        summary=f"{who} hit {what} in a kernel{_where(cause)}{tail}",
        evidence=(
            Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),
            *(Evidence(Source.KERNEL_LOG.value, xid.first.where, xid.first.text) for xid in xids[:3]),
            *(Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in followers[:2]),
        ),
        confidence=Confidence.HIGH if xids else Confidence.MEDIUM,
        subject=Subject(
            engine=log.engine,
            gpus=gpus,
            ranks=(f"rank{cause.rank}",) if cause.rank is not None else (),
            pids=(cause.pid,) if cause.pid is not None else (),
        ),
        since=incident.at,
        facts=facts,
    )


def _where(cause: EngineEvent) -> str:
    within = str(cause.facts.get("within", ""))
    return f", noticed in {within.rpartition(' > ')[2]}" if within else ""


def _suspect(xids: list[XidEvent], limits: Limits) -> str:
    """Say whom the faults point to: one GPU where the same comes again on it alone, the application where it wanders.

    A fault prints several codes (13, then 43): only the same code, another burst, is another fault.
    """
    newest = max((xid.at for xid in xids if xid.at is not None), default=0.0)
    recent = [xid for xid in xids if xid.at is None or xid.at >= newest - limits.suspect_seconds]
    addresses = dict.fromkeys(xid.pci_address for xid in recent)
    if len(addresses) > 1:
        return f"such faults on {len(addresses)} GPUs: suspect the application"
    for address in addresses:
        often = max(Counter(xid.code for xid in recent).values())
        if often >= limits.suspect_count:
            return f"{often} such faults on the GPU at {address} and on no other: suspect that GPU"
    return ""


def _xids_alone(history: History, xids: list[XidEvent], limits: Limits) -> Finding:
    first = xids[0]
    gpu = next((g for g in history.latest.gpus if g.pci_address == first.pci_address), None)
    who = f"GPU {gpu.index} ({first.pci_address})" if gpu is not None else f"the GPU at {first.pci_address}"
    suspect = _suspect(xids, limits)
    return Finding(
        summary=f"The driver reports Xid {first.code} on {who}: a process' kernel faulted"
        + (f"; {suspect}" if suspect else f" ({len(xids)} events)" if len(xids) > 1 else ""),
        evidence=tuple(Evidence(Source.KERNEL_LOG.value, xid.first.where, xid.first.text) for xid in xids[:4]),
        confidence=Confidence.MEDIUM,
        severity=Severity.WARNING,
        subject=Subject(
            gpus=(gpu.uuid,) if gpu is not None else (),
            pids=(first.first.pid,) if first.first.pid is not None else (),
        ),
        since=first.at,
        facts=dict(facts_of_gpu(gpu.index, first.pci_address, gpu.uuid)) if gpu is not None else {},
    )
