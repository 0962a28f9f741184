"""A GPU hangs: its system processor, a micro-controller or a context switch no longer answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, NvidiaMessage, Source, known
from doctor.symptoms.draw import limit_of
from doctor.symptoms.engine_groups import engine_of_gpu, rank_groups
from doctor.symptoms.names import gpu_at, name_at, name_of
from doctor.symptoms.xids import AGAIN_SECONDS, answered_since, of_this_boot, was_recovered, xid_events
from rules.tables.xids import XIDS, codes_of

HANGS = codes_of("gpu-hung")
SILENCES = frozenset({119, 120})
"""After these NVML does not answer; where it does, the GPU was reset."""


class Limits(msgspec.Struct, frozen=True):
    """What a hang looks like from outside."""

    seconds: float = 60.0
    """The map's: 100 % busy at idle power over a minute."""
    recovered_seconds: float = 900.0
    """A GPU that answers again is still told of this long, as a warning. guess: as for a lost one."""
    power_ratio: float = 0.2
    """Of the limit. An idle H100 draws about 70 to 120 of its 700 W; ranks that spin in a collective draw more. guess."""


@rule(
    "gpu-hung",
    "A GPU hangs",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.KERNEL_LOG),
    explains=(
        "driver-unresponsive",
        "engine-stalled",
        "nccl-timeout",
        "engine-crashed",
        "application-fault",
        "recovery-pending",
    ),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Take the driver's word, an Xid or what it says without one; else a GPU alone among its ranks that is busy for a minute and draws nothing."""
    events = [e for e in xid_events(history) if e.code in HANGS]
    over = {
        e
        for e in events
        if was_recovered(history, e) or (e.code in SILENCES and answered_since(history, e.pci_address, e.last_at))
    }
    events = [
        e for e in events if e not in over or history.now - (e.last_at or history.now) <= limits.recovered_seconds
    ]
    for pci_address in dict.fromkeys(event.pci_address for event in events):
        mine = [event for event in events if event.pci_address == pci_address]
        gpu = gpu_at(history.latest, pci_address)
        row = XIDS[mine[0].code]
        again = all(event in over for event in mine)
        yield Finding(
            summary=f"{name_at(history.latest, pci_address)}: {row.words} (Xid {row.code})"
            + ("; NVML reads it again" if again else ""),
            severity=Severity.WARNING if again else None,
            evidence=tuple(Evidence(Source.KERNEL_LOG.value, e.first.where, e.first.text) for e in mine),
            subject=Subject(gpus=(gpu.uuid,) if gpu else (), engine=engine_of_gpu(history, gpu.uuid) if gpu else ""),
            since=min((e.at for e in mine if e.at is not None), default=None),
            facts=dict(facts_of_gpu(gpu.index, pci_address, gpu.uuid)) if gpu else {"pci-address": pci_address},
        )
    if not events:
        yield from _by_words(history) if not over else ()
        yield from _by_signature(history, limits)


def _by_words(history: History) -> Iterator[Finding]:
    """Take what the driver says of a GPU's system processor where no Xid stands beside it.

    The lines name no address; where NVML reads every GPU at a later visit, they are past.
    """
    said = [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage) and e.kind == "gsp-timeout"]
    if not said:
        return
    latest, last = history.latest, said[-1].at
    alive = bool(latest.gpus) and all(gpu.lost is False and known(gpu.thermal.gpu_celsius) for gpu in latest.gpus)
    if last is not None and alive and latest.at >= last + AGAIN_SECONDS:
        return
    first = said[0]
    only_heart = all("eartbeat" in line.text for line in said)
    yield Finding(
        summary=f"{_spoken_of(first)}: its system processor (GSP) "
        + ("has missed its heartbeat" if only_heart else "does not answer the driver"),
        evidence=tuple(Evidence(Source.KERNEL_LOG.value, line.where, line.text) for line in said[:4]),
        confidence=Confidence.MEDIUM,
        # guess: a late heartbeat alone may come back, a call that was given up does not
        severity=Severity.WARNING if only_heart else None,
        since=first.at,
    )


def _spoken_of(line: NvidiaMessage) -> str:
    number = re.search(r"\bGPU ?(\d{1,3})\b", line.text)
    if line.pci_address:
        return f"The GPU at {line.pci_address}"
    return f"The driver's GPU {number[1]}" if number else "A GPU"


def _by_signature(history: History, limits: Limits) -> Iterator[Finding]:
    stuck = [gpu for gpu in history.latest.gpus if _stuck(history, gpu.uuid, limits)]
    for group in rank_groups(history):
        mine = [gpu for gpu in stuck if gpu.uuid in group.gpus]
        if len(mine) == 1 and group.size > 1:  # several at once wait for somebody else: engine-stalled
            gpu = mine[0]
            watts = f"{gpu.power.average_watts:.0f} W" if known(gpu.power.average_watts) else "idle power"
            text = f"100 % busy at {watts}, with no memory traffic, for {limits.seconds:.0f} s and more"
            yield Finding(
                summary=f"{name_of(gpu)} is {text}, unlike the other ranks' GPUs: a kernel on it hangs",
                evidence=(Evidence(Source.NVML.value, f"GPU {gpu.index}: utilisation and power", text),),
                confidence=Confidence.LOW,
                severity=Severity.WARNING,
                subject=Subject(gpus=(gpu.uuid,), engine=group.engine),
                facts=dict(facts_of_gpu(gpu.index, None, gpu.uuid)),
            )


def _stuck(history: History, uuid: str, limits: Limits) -> bool:
    seen = history.of_gpu(uuid, limits.seconds)
    return (
        bool(seen)
        and seen[-1][0] - seen[0][0] >= limits.seconds
        and all(_busy_for_nothing(gpu, limits) for _, gpu in seen)
    )


def _busy_for_nothing(gpu: Gpu, limits: Limits) -> bool:
    busy, memory, watts, limit = (
        gpu.activity.gpu_ratio,
        gpu.activity.memory_ratio,
        gpu.power.average_watts,
        limit_of(gpu),
    )
    if not (known(busy) and known(memory) and known(watts)) or limit is None:
        return False
    return busy >= 0.99 and memory <= 0.01 and watts <= limits.power_ratio * limit
