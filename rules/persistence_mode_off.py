"""Persistence mode is off and nothing keeps the driver awake: each first client pays for the GPUs' start."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source, known
from doctor.symptoms.names import names_of


@rule(
    "persistence-mode-off",
    "The driver falls asleep between clients",
    severity=Severity.NOTICE,
    needs=(Source.NVML,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Name the GPUs without persistence mode that no process holds awake."""
    asleep = [g for g in history.latest.gpus if g.persistence_mode is False and known(g.processes) and not g.processes]
    if asleep:
        yield Finding(
            summary=f"{names_of(history.latest, [g.uuid for g in asleep])}: persistence mode is off and no process is on "
            "them: the next client waits for their start, and settings made meanwhile are lost",
            evidence=tuple(
                Evidence(Source.NVML.value, f"GPU {g.index}: nvmlDeviceGetPersistenceMode", "disabled") for g in asleep
            ),
            subject=Subject(gpus=tuple(g.uuid for g in asleep)),
        )
