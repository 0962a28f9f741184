"""More users at once than one GPU serves well with a model of this size."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, known
from doctor.symptoms.served import served, served_by
from doctor.symptoms.traffic import long_enough


class Limits(msgspec.Struct, frozen=True):
    """What one GPU carries."""

    users_max: float = 50.0
    """Document 4: concurrent users of a 70B model on one H100."""
    parameters_min: float = 50e9
    """guess: the document speaks of 70B; a small model serves many more."""
    window_seconds: float = 600.0
    """guess: sustained; a peak is no ceiling."""
    pages_ratio: float = 0.9
    """Of the pages must show so many users: the gauges may read 0 under load."""


H100 = frozenset({"10de:2330", "10de:2331", "10de:2321"})
"""SXM, PCIe and NVL by PCI device id."""


@rule(
    "concurrency-ceiling",
    "One GPU serves more users than it serves well",
    severity=Severity.NOTICE,
    needs=(Source.ENGINE_METRICS, Source.PROCESSES, Source.NVML),
    explains=("ttft-slow",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Count running and waiting requests of an engine on a single H100."""
    products = {gpu.uuid: gpu.pci_device_id for gpu in history.latest.gpus}
    alone = {
        one.engine.id
        for one in served(history)
        if one.group is not None and one.group.size == 1 and {products.get(uuid) for uuid in one.group.gpus} & H100
    }
    if not alone:
        return
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        one = served_by(history, traffic.engine)
        if one is None or one.engine.id not in alone:
            continue
        if isinstance(one.serving, Absent):
            yield one.serving
            continue
        users = [p.running + p.waiting for p in traffic.pages if known(p.running) and known(p.waiting)]
        many = [count for count in users if count > limits.users_max]
        if one.serving.model.parameters < limits.parameters_min or len(many) < limits.pages_ratio * len(traffic.pages):
            continue
        yield Finding(
            summary=f"{min(many):.0f} to {max(many):.0f} requests at once for {traffic.seconds:.0f} s on one {one.serving.card.name}: "
            f"a model of {one.serving.model.parameters / 1e9:.0f} G parameters serves about {limits.users_max:.0f} well",
            evidence=(
                Evidence(
                    Source.ENGINE_METRICS.value,
                    "vllm:num_requests_running, vllm:num_requests_waiting",
                    f"together {min(many):.0f} to {max(many):.0f} in {len(many)} of {len(traffic.pages)} pages",
                ),
            ),
            confidence=Confidence.LOW,
            subject=Subject(engine=traffic.engine, gpus=one.serving.gpus),
            since=traffic.since,
        )
