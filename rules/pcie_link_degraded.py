"""A GPU's PCIe link runs with fewer lanes or a lower generation than it could, or replays too often."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import msgspec

from doctor.history import History
from doctor.rule import Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.growth import gpu_growth
from doctor.symptoms.names import name_of

REPLAYS_PER_MINUTE_AND_LANE = {1: 0.15, 2: 0.3, 3: 0.48, 4: 0.96, 5: 1.92, 6: 3.84}
"""By generation; times the lanes, rounded up, it is what NVIDIA's health check fails at (DCGM 4.6): 31 at gen 5 x16."""


class Limits(msgspec.Struct, frozen=True):
    """When a link is judged."""

    busy_ratio: float = 0.5
    """Share of time with work from which the generation counts. guess: idle GPUs lower it, loaded ones don't."""
    window_seconds: float = 600.0
    least_seconds: float = 60.0
    """Of replays seen; a rate a minute needs a minute."""


@rule(
    "pcie-link-degraded",
    "A GPU's PCIe link is slower than it could be",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=("throughput-below-reference", "ttft-slow"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Judge the width at any time, the generation under load only (idle GPUs save power), replays by their rate."""
    for gpu in history.latest.gpus:
        signs = [*_width(gpu), *_generation(history, gpu, limits), *_replays(history, gpu, limits)]
        if signs:
            yield Finding(
                summary=f"{name_of(gpu)}: {'; '.join(text for _, text in signs)}",
                evidence=tuple(Evidence(*_place(gpu, field), text) for field, text in signs),
                severity=None if _is_told_apart(history, gpu) else Severity.NOTICE,
                subject=Subject(gpus=(gpu.uuid,)),
                facts=dict(facts_of_gpu(gpu.index, gpu.pci_address if known(gpu.pci_address) else None, gpu.uuid)),
            )


def _place(gpu: Gpu, field: str) -> tuple[str, str]:
    """Return source and place of a value of the link."""
    told_by = gpu.pcie.told_by
    if told_by == "lspci" and known(gpu.pci_address):
        return Source.HOST.value, f"lspci, {gpu.pci_address}: {field}"
    return (told_by or Source.NVML.value), f"GPU {gpu.index}: {field}"


def _is_told_apart(history: History, gpu: Gpu) -> bool:
    """Whether the link is slower than the slot's own: in a virtual machine the slot is not seen, only the neighbours are.

    Clouds pass GPUs through at half width by design (T4 and A10G at x8 of x16 on AWS g4dn and g5).
    """
    latest = history.latest
    if latest.host.virtual_machine is not True:
        return True
    widths = [other.pcie.width for other in latest.gpus if other.uuid != gpu.uuid and other.name == gpu.name]
    return any(known(width) and known(gpu.pcie.width) and width > gpu.pcie.width for width in widths)


def _width(gpu: Gpu) -> Iterator[tuple[str, str]]:
    now, full = gpu.pcie.width, gpu.pcie.width_max
    if known(now) and known(full) and 0 < now < full:
        yield "PCIe link width", f"its PCIe link has {now} of {full} lanes"


def _generation(history: History, gpu: Gpu, limits: Limits) -> Iterator[tuple[str, str]]:
    now, full = gpu.pcie.generation, gpu.pcie.generation_max
    visits = [seen for _, seen in history.of_gpu(gpu.uuid)[-2:]]
    loaded = all(known(s.activity.gpu_ratio) and s.activity.gpu_ratio >= limits.busy_ratio for s in visits)
    if known(now) and known(full) and 0 < now < full and loaded and all(s.pcie.generation == now for s in visits):
        yield "PCIe link generation", f"its PCIe link runs at generation {now} of {full} under load"


def _replays(history: History, gpu: Gpu, limits: Limits) -> Iterator[tuple[str, str]]:
    grown = gpu_growth(history, gpu.uuid, lambda g: g.pcie.replays_total, limits.window_seconds)
    generation, width = gpu.pcie.generation, gpu.pcie.width
    if grown is None or grown.seconds < limits.least_seconds or not (known(generation) and known(width)):
        return
    most = ceil(width * REPLAYS_PER_MINUTE_AND_LANE.get(generation, 3.84))
    rate = grown.per_second * 60
    if rate > most:
        yield (
            "PCIe replay counter",
            f"its PCIe link replays {rate:.0f} times a minute (NVIDIA's check fails above {most})",
        )
