"""The ranks of one engine run on GPUs that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.engine_groups import rank_groups
from doctor.symptoms.names import name_of


@rule(
    "mixed-gpus",
    "One engine's ranks run on different GPUs",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=("throughput-below-reference", "out-of-memory-at-startup"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Compare product, memory and VBIOS within each rank group: the group is as fast, and as large, as its least GPU."""
    for group in rank_groups(history):
        gpus = [gpu for gpu in history.latest.gpus if gpu.uuid in group.gpus and gpu.lost is not True]
        products = {gpu.uuid: what for gpu in gpus if (what := _product(gpu))}
        vbioses = {gpu.uuid: gpu.vbios_version for gpu in gpus if known(gpu.vbios_version)}
        for what, values, severity in (
            ("product and memory", products, None),
            ("VBIOS", vbioses, Severity.NOTICE),
        ):
            if len(set(values.values())) > 1:
                common = Counter(values.values()).most_common(1)[0][0]
                odd = next(gpu for gpu in gpus if values.get(gpu.uuid, common) != common)
                yield Finding(
                    summary=f"{name_of(odd)} differs in {what} from its group of {group.size} ranks: {values[odd.uuid]} "
                    f"beside {common}",
                    evidence=tuple(
                        Evidence(Source.NVML.value, f"GPU {gpu.index}: {what}", values[gpu.uuid])
                        for gpu in gpus
                        if gpu.uuid in values
                    ),
                    confidence=Confidence.HIGH if group.exact else Confidence.MEDIUM,
                    severity=severity,
                    subject=Subject(gpus=(odd.uuid,), engine=group.engine),
                )
                break


def _product(gpu: Gpu) -> str:
    """Return product and memory in words; empty where the product was not seen, or MIG makes the memory meaningless."""
    if not known(gpu.pci_device_id) or gpu.mig.enabled is True:
        return ""
    total = gpu.memory.total_bytes
    name = gpu.name if known(gpu.name) else gpu.pci_device_id
    return (
        f"{name} ({gpu.pci_device_id}), {total / (1 << 30):.0f} GiB"
        if known(total)
        else f"{name} ({gpu.pci_device_id})"
    )
