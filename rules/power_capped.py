"""A power limit is set below the product's default."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Gpu, Source, known
from doctor.symptoms.engine_groups import rank_groups
from doctor.symptoms.names import names_of


class Limits(msgspec.Struct, frozen=True):
    """How far below the default counts."""

    ratio: float = 0.95
    """Of the default limit. guess: below this decode loses more than noise."""


@rule(
    "power-capped",
    "GPUs run with a lowered power limit",
    severity=Severity.NOTICE,
    needs=(Source.NVML,),
    explains=("throughput-below-reference",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Compare limits with defaults: a notice, and a warning where one rank is capped and the others wait for it.

    A cap that binds at the default limit (the SW power cap reason) is how a loaded 700 W part works.
    """
    capped = {gpu.uuid: text for gpu in history.latest.gpus if (text := _capped(gpu, limits))}
    if not capped:
        return
    uneven = [g for g in rank_groups(history) if g.size > 1 and 0 < len(set(g.gpus) & set(capped)) < len(g.gpus)]
    tail = ": the other ranks of its group wait for it" if uneven else ""
    yield Finding(
        summary=f"{names_of(history.latest, capped)}: power limit {next(iter(capped.values()))}{tail}",
        evidence=tuple(
            Evidence(Source.NVML.value, f"GPU {gpu.index}: power limits", capped[gpu.uuid])
            for gpu in history.latest.gpus
            if gpu.uuid in capped
        ),
        severity=Severity.WARNING if uneven else None,
        subject=Subject(gpus=tuple(capped), engine=uneven[0].engine if len(uneven) == 1 else ""),
    )


def _capped(gpu: Gpu, limits: Limits) -> str:
    power = gpu.power
    set_to = next((w for w in (power.limit_enforced_watts, power.limit_watts) if known(w)), None)
    default = power.limit_default_watts
    if set_to is None or not known(default) or set_to >= limits.ratio * default:
        return ""
    return f"{set_to:.0f} W of {default:.0f} W"
