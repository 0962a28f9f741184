"""GPUs can't reach each other although nothing is wrong with the cabling."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Gpu, GpuPair, Source, known
from doctor.symptoms.engine_log import EngineLog, Incident, incidents
from doctor.symptoms.links import way_between
from doctor.symptoms.names import names_of
from rules.tables.products import product_of

REASONS = {
    "chipset-not-supported": "the chipset does not let peers through: look at IOMMU and ACS",
    "topology-not-supported": "the topology does not let peers through: a virtual machine or a container shows only part of it",
    "disabled-by-regkey": "a driver option forbids it",
    "gpu-not-supported": "the driver says that the GPU can't",
    "not-supported": "the driver says that it is not supported",
}
"""NVML's reasons (nvmlGpuP2PStatus_t) and what stands behind them on a board whose GPUs are linked."""


@rule(
    "p2p-blocked",
    "GPUs can't reach each other directly",
    severity=Severity.CRITICAL,
    needs=(Source.NVML,),
    explains=("pcie-fallback", "allreduce-dominant"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take what stopped the engine, and pairs that are linked and may not reach each other.

    That vLLM turned its own all-reduce off for want of peer access is `pcie-fallback`.
    """
    for log, incident in incidents(history):
        if told := _fatal(incident.cause):
            yield _finding(log, incident, told)
    blocked = [pair for pair in history.latest.pairs if _is_blocked(history, pair)]
    if blocked:
        yield _by_matrix(history, blocked)


def _is_blocked(history: History, pair: GpuPair) -> bool:
    """Whether two GPUs of a board with NVLink are linked and may not read each other's memory.

    MIG, a fabric that is not registered and links that are down have failure modes of their own.
    """
    gpus = [history.latest.gpu(uuid) for uuid in (pair.first, pair.second)]
    linked = not known(pair.nvlinks) or pair.nvlinks > 0  # `topo -p2p` alone shows no links: the product tells
    return linked and pair.p2p_read in REASONS and all(gpu is not None and _could(gpu) for gpu in gpus)


def _could(gpu: Gpu) -> bool:
    product = product_of(gpu)
    waits = gpu.fabric.state in ("not-started", "in-progress")
    return product is not None and product.has_board_nvlink and gpu.mig.enabled is not True and not waits


def _by_matrix(history: History, blocked: list[GpuPair]) -> Finding:
    latest = history.latest
    gpus = tuple(dict.fromkeys(uuid for pair in blocked for uuid in (pair.first, pair.second)))
    first = blocked[0]
    reason = str(first.p2p_read)
    text = f"{way_between(first)}, P2P read: {reason.replace('-', ' ')}"
    return Finding(
        summary=f"{len(blocked)} of {len(latest.pairs)} pairs of GPUs are linked and may not reach each other's memory: "
        + REASONS[reason],
        evidence=(Evidence(Source.NVML.value, f"P2P status of {names_of(latest, (first.first, first.second))}", text),),
        severity=Severity.WARNING,
        subject=Subject(gpus=gpus),
    )


def _fatal(cause: EngineEvent) -> str:
    if cause.signal == "p2p-probe-failed":
        return (
            "its test of peer access between GPUs failed to run; that is no proof that peer access is broken: "
            "the lines behind it say what the test program died of"
        )
    if cause.signal == "nccl-p2p-disabled":
        first, second = cause.facts.get("first"), cause.facts.get("second")
        return f"GPUs {first} and {second} are joined by NVLink and may not reach each other"
    if cause.signal == "cuda-error" and cause.facts.get("kind") == "peer-unsupported":
        return "CUDA has no peer access between two of its GPUs"
    return ""


def _finding(log: EngineLog, incident: Incident, words: str) -> Finding:
    event = incident.cause
    return Finding(
        summary=f"The engine says: {words}",
        evidence=(Evidence(Source.ENGINE_LOG.value, event.where, event.text),),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=log.engine),
        since=incident.at,
        facts={"log": log.log},
    )
