"""MIG partitions do not fit what the engines do, or leave memory and GPUs unused."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.names import name_of, names_of

GIB = 1 << 30


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
    for gpu in history.latest.gpus:
        if gpu.mig.enabled is True:
            yield from _under_tensor_parallelism(gpu, groups)
        yield from _pending(gpu)
        if gpu.mig.enabled is True and gpu.mig.enabled_after_reset is not False:
            yield from _unused(history, gpu, groups, limits)
    yield from _engine(history)


def _under_tensor_parallelism(gpu: Gpu, groups: list[RankGroup]) -> Iterator[Finding]:
    for group in groups:
        if gpu.uuid not in group.gpus:
            continue
        count = f" ({len(gpu.mig.devices)} instances)" if known(gpu.mig.devices) else ""
        yield Finding(
            summary=f"{name_of(gpu)} is partitioned by MIG{count} and serves a group of {group.size} tensor-parallel "
            "ranks: MIG has neither NVLink nor peer access",
            evidence=(
                Evidence(Source.NVML.value, f"GPU {gpu.index}: nvmlDeviceGetMigMode", "current mode is enabled"),
                Evidence(Source.PROCESSES.value, group.engine, f"tensor-parallel size {group.size}"),
            ),
            confidence=Confidence.HIGH if group.exact else Confidence.MEDIUM,
            subject=Subject(gpus=(gpu.uuid,), engine=group.engine),
            facts={"gpu-index": str(gpu.index)},
        )


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
