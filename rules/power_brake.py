"""An external power brake slows GPUs down: the supply asks for less."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.growth import gpu_growth
from doctor.symptoms.names import names_of


class Limits(msgspec.Struct, frozen=True):
    """How much braking counts."""

    window_seconds: float = 600.0
    """guess: as for cooling."""
    share: float = 0.01
    """Of the window. On SXM boards the brake is never on in normal work (NVML API reference)."""


@rule(
    "power-brake",
    "The power brake slows GPUs down",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=("throughput-below-reference", "ttft-slow"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Judge the brake's duration counter; its reason alone only where two visits in a row, or the only one, show it."""
    braked = {gpu.uuid: proof for gpu in history.latest.gpus if (proof := _braked(history, gpu, limits)) is not None}
    if braked:
        yield Finding(
            summary=f"{names_of(history.latest, braked)}: the external power brake {next(iter(braked.values())).text}",
            evidence=tuple(braked.values()),
            confidence=Confidence.MEDIUM if len(history.snapshots) == 1 else Confidence.HIGH,
            subject=Subject(gpus=tuple(braked)),
        )


def _braked(history: History, gpu: Gpu, limits: Limits) -> Evidence | None:
    grown = gpu_growth(history, gpu.uuid, lambda g: g.clocks.power_brake_seconds, limits.window_seconds)
    if grown is not None:
        if grown.amount <= 0 or grown.amount < limits.share * grown.seconds:
            return None
        text = f"was engaged for {grown.amount:.1f} of the last {grown.seconds:.0f} s"
        return Evidence(Source.NVML.value, f"GPU {gpu.index}: hw-power-brake duration", text)
    visits = [seen for _, seen in history.of_gpu(gpu.uuid)[-2:]]
    if all(known(s.clocks.event_reasons) and "hw-power-brake" in s.clocks.event_reasons for s in visits):
        return Evidence(Source.NVML.value, f"GPU {gpu.index}: clocks event reasons", "is engaged")
    return None
