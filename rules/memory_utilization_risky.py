"""The engine takes so much of the GPU's memory that a spike has nowhere to go."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.card import card_of
from doctor.machine.fabric import Fabric, Link, fabric_between
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Maybe, Source, Why, known
from doctor.symptoms.served import Served, served


class Limits(msgspec.Struct, frozen=True):
    """How much is safe."""

    switched: float = 0.95
    """Document 1: on H100 SXM behind NVSwitch."""
    elsewhere: float = 0.92
    """Documents 1 and 4: elsewhere, and on a single H100; vLLM's own default from 0.20 on."""


@rule(
    "memory-utilization-risky",
    "The engine leaves the GPU no memory for spikes",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES,),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Compare the flag with what the wiring allows; an out-of-memory line in service makes it sure."""
    for one in served(history):
        share = one.engine.flags.gpu_memory_utilization
        if not known(share) or share <= limits.elsewhere:
            continue
        fabric = _fabric(history, one)
        if isinstance(fabric, Absent) and share <= limits.switched:
            yield fabric
            continue
        switched = known(fabric) and fabric.link is Link.SWITCH
        safe = limits.switched if switched else limits.elsewhere
        if share <= safe:
            continue
        spikes = one.log.having("cuda-out-of-memory") if one.log is not None and one.log.serving else ()
        where = "behind NVSwitch" if switched else "without NVSwitch" if known(fabric) else "anywhere"
        yield Finding(
            summary=f"Engine {one.engine.pid} takes {share:.0%} of its GPUs' memory; {safe:.0%} is what holds {where}, "
            + (
                f"and it has run out of memory in service {len(spikes)} times"
                if spikes
                else "and what runs beside it may run out"
            ),
            evidence=(
                Evidence(Source.PROCESSES.value, "--gpu-memory-utilization", f"{share:g}"),
                *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in spikes[:1]),
            ),
            confidence=Confidence.HIGH if spikes else Confidence.LOW,
            subject=Subject(engine=one.engine.id),
            since=spikes[0].at if spikes else None,
            facts={"utilization": f"{safe:g}"},
        )


def _fabric(history: History, one: Served) -> Maybe[Fabric]:
    gpus = one.group.gpus if one.group is not None else ()
    gpu = next((gpu for gpu in history.latest.gpus if gpu.uuid in gpus), None)
    if gpu is None:
        return Absent(Why.NOT_ASKED, "which GPUs the engine runs on was not seen")
    card = card_of(gpu)
    return card if isinstance(card, Absent) else fabric_between(card, history.latest.pairs, gpus)
