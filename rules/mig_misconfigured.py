"""MIG partitions do not fit what the engines do, or leave memory and GPUs unused."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.engine_log import engine_logs, incidents
from doctor.symptoms.names import listed, name_of, names_of

GIB = 1 << 30
NO_PEERS = ("custom-allreduce-off-pcie", "custom-allreduce-off-p2p")
"""vLLM's word that its ranks don't reach each other."""


class Limits(msgspec.Struct, frozen=True):
    """What a partition may waste."""

    allocated_ratio_min: float = 0.8
    """Share of the GPU's memory that its instances hold together. Seven 1g.10gb of an H100 leave 14 % by design
    (9984 of 81559 MiB each, real capture); more than 20 % is an instance that nobody made."""


@rule(
    "mig-misconfigured",
    "MIG partitions do not fit what the engines do",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=(
        "nvlink-degraded",
        "pcie-fallback",
        "p2p-blocked",
        "nccl-timeout",
        "engine-crashed",
        "launch-refused",
        "tp-exceeds-visible-gpus",
        "out-of-memory-at-startup",
        "fp8-not-engaged",
        "idle-gpus",
    ),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Ask of each partitioned GPU whether a rank group needs it whole, a reset is due, and its memory is given out."""
    groups = [group for group in rank_groups(history) if group.size > 1]
    for group in groups:
        yield from _under_tensor_parallelism(history, group)
    for gpu in history.latest.gpus:
        yield from _pending(gpu)
        if gpu.mig.enabled is True and gpu.mig.enabled_after_reset is not False:
            yield from _unused(history, gpu, groups, limits)
    yield from _engine(history)


def _under_tensor_parallelism(history: History, group: RankGroup) -> Iterator[Finding]:
    latest = history.latest
    gpus = [gpu for gpu in latest.gpus if gpu.uuid in group.gpus and gpu.mig.enabled is True]
    if not gpus:
        return
    first = gpus[0]
    if len(gpus) == 1:
        count = f" ({len(first.mig.devices)} instances)" if known(first.mig.devices) else ""
        who = f"{name_of(first)} is partitioned by MIG{count} and serves"
    else:
        who = f"{names_of(latest, [gpu.uuid for gpu in gpus])} are partitioned by MIG and serve"
    yield Finding(
        summary=f"{who} a group of {group.size} tensor-parallel ranks: MIG has neither NVLink nor peer access",
        evidence=(
            *(
                Evidence(Source.NVML.value, f"GPU {gpu.index}: nvmlDeviceGetMigMode", "current mode is enabled")
                for gpu in gpus
            ),
            Evidence(Source.PROCESSES.value, group.engine, f"tensor-parallel size {group.size}"),
            *_what_follows(history, group, {gpu.uuid for gpu in gpus}),
        ),
        confidence=Confidence.HIGH if group.exact else Confidence.MEDIUM,
        subject=Subject(gpus=tuple(gpu.uuid for gpu in gpus), engine=group.engine),
        facts={"gpu-index": str(first.index)},
    )


def _what_follows(history: History, group: RankGroup, partitioned: set[str]) -> Iterator[Evidence]:
    """Yield what links, peer access and the engine look like under MIG: none of it is a fault of its own."""
    latest = history.latest
    unlinked = [gpu.index for gpu in latest.gpus if gpu.uuid in partitioned and not _has_link(gpu)]
    if unlinked:
        text = "no NVLink is up: MIG turns them off"
        yield Evidence(Source.NVML.value, f"GPU {listed(map(str, unlinked))}: nvmlDeviceGetNvLinkState", text)
    pairs = [pair for pair in latest.pairs if {pair.first, pair.second} <= set(group.gpus)]
    apart = [p for p in pairs if {p.first, p.second} & partitioned and known(p.p2p_read) and p.p2p_read != "ok"]
    if apart:
        text = f"P2P read: {str(apart[0].p2p_read).replace('-', ' ')}"
        yield Evidence(Source.NVML.value, f"P2P status of {len(apart)} of {len(pairs)} pairs", text)
    off = [e for log in engine_logs(history) if log.engine == group.engine for e in log.having(*NO_PEERS)]
    yield from (Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in off[:1])


def _has_link(gpu: Gpu) -> bool:
    return known(gpu.links) and any(link.active is True for link in gpu.links)


def _pending(gpu: Gpu) -> Iterator[Finding]:
    now, later = gpu.mig.enabled, gpu.mig.enabled_after_reset
    if known(now) and known(later) and now != later:
        turned = "on" if later else "off"
        yield Finding(
            summary=f"{name_of(gpu)}: MIG was turned {turned} and waits for a reset of the GPU; until then it is "
            f"{'on' if now else 'off'}",
            evidence=(
                Evidence(
                    Source.NVML.value,
                    f"GPU {gpu.index}: nvmlDeviceGetMigMode",
                    f"current {'enabled' if now else 'disabled'}, pending {'enabled' if later else 'disabled'}",
                ),
            ),
            subject=Subject(gpus=(gpu.uuid,)),
            facts={"gpu-index": str(gpu.index)},
        )


def _unused(history: History, gpu: Gpu, groups: list[RankGroup], limits: Limits) -> Iterator[Finding]:
    devices, total = gpu.mig.devices, gpu.memory.total_bytes
    if not known(devices) or not known(total) or not total:
        return
    sizes = {d.gpu_instance if known(d.gpu_instance) else d.uuid: d.memory_total_bytes for d in devices}
    held = sum(size for size in sizes.values() if known(size))
    where = f"GPU {gpu.index}: MIG devices"
    subject, facts = Subject(gpus=(gpu.uuid,)), {"gpu-index": str(gpu.index)}
    if all(known(size) for size in sizes.values()) and held < limits.allocated_ratio_min * total:
        text = f"{len(devices)} instances hold {held / GIB:.0f} of {total / GIB:.0f} GiB"
        yield Finding(
            summary=f"{name_of(gpu)} is in MIG mode and {(total - held) / GIB:.0f} of its {total / GIB:.0f} GiB belong "
            "to no instance: nothing can use them",
            evidence=(Evidence(Source.NVML.value, where, text),),
            subject=subject,
            facts=facts,
        )
        return
    whole = [u for group in groups for u in group.gpus if u != gpu.uuid]
    idle = devices and all(known(d.processes) and not d.processes for d in devices)
    if whole and idle and not any(gpu.uuid in group.gpus for group in groups):
        yield Finding(
            summary=f"{name_of(gpu)} is still partitioned ({len(devices)} instances, no process in any), while an "
            f"engine spreads over {names_of(history.latest, dict.fromkeys(whole))} without it",
            evidence=(Evidence(Source.NVML.value, where, "no instance has a process"),),
            confidence=Confidence.MEDIUM,
            severity=Severity.NOTICE,
            subject=subject,
            facts=facts,
        )


def _engine(history: History) -> Iterator[Finding]:
    for log, incident in incidents(history):
        for event in incident.having("launch-error", kinds=("mig-uuid",))[:1]:
            yield Finding(
                summary="the engine was given a MIG instance by its UUID and can't read it: "
                "this vLLM takes only whole numbers in CUDA_VISIBLE_DEVICES",
                evidence=(Evidence(Source.ENGINE_LOG.value, event.where, event.text),),
                subject=Subject(engine=log.engine),
                since=incident.at,
                severity=Severity.CRITICAL,
            )
        partitioned = [gpu for gpu in history.latest.gpus if gpu.mig.enabled is True]
        for event in incident.having("nccl-duplicate-gpu")[:1] if partitioned else ():
            yield Finding(
                summary=f"two ranks were put on instances of one GPU ({names_of(history.latest, [g.uuid for g in partitioned])} "
                "in MIG mode): to NCCL that is one GPU twice, and it refuses",
                evidence=(Evidence(Source.ENGINE_LOG.value, event.where, event.text),),
                subject=Subject(engine=log.engine),
                since=incident.at,
                severity=Severity.CRITICAL,
                facts={"gpu-index": str(partitioned[0].index)},
            )
