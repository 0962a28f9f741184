"""All GPUs step their power together, beyond what the supply was sized for."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.draw import Draw, node_draw
from doctor.symptoms.growth import gpu_growth
from doctor.symptoms.names import names_of


class Limits(msgspec.Struct, frozen=True):
    """How far the GPUs may go together."""

    overshoot_ratio: float = 1.10
    """Peak of all GPUs over the sum of their limits. The documents name 3200 W (stack page) and 4000 W (combo page) over
    4 × 700 W, 1.14 and 1.43; one loaded H100's instant reading jitters by 7 % (capture, driver 590)."""
    brake_swing_ratio: float = 0.25
    """A common step of this share of the limits beside an engaged power brake. guess."""
    swing_ratio: float = 0.5
    """A common step of this share of the limits, again and again, is worth a notice. guess."""
    swings: int = 5
    swing_seconds: float = 5.0
    """At least one such step in this time on average. guess: sporadic requests step less often."""
    window_seconds: float = 600.0
    """guess: as for cooling."""


@rule(
    "power-transient",
    "The GPUs' common power steps exceed their limits",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=("power-brake", "gpu-lost", "throughput-below-reference"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Judge the samples between visits, summed over GPUs at the same moments: averages hide what trips a supply."""
    draw = node_draw(history)
    if draw is None:
        if history.latest.gpus:
            yield Absent(Why.NOT_ASKED, "no fast power samples of every GPU: averages hide transients")
        return
    over = draw.peak.watts / draw.limit_watts
    braked = _braked(history, limits)
    step = draw.steps[0] if draw.steps else 0.0
    peak = (
        f"{draw.gpus} GPUs drew {draw.peak.watts / 1e3:.2f} kW together, {over:.0%} of their limits "
        f"({draw.limit_watts / 1e3:.2f} kW), while their mean was {draw.mean_watts / 1e3:.2f} kW"
    )
    if braked and step >= limits.brake_swing_ratio * draw.limit_watts:
        who = names_of(history.latest, [uuid for uuid, _ in braked])
        text = (
            f"{who} engaged the power brake while the GPUs stepped by {step / 1e3:.2f} kW within half a second; {peak}"
        )
        yield _finding(history, draw, text, more=tuple(evidence for _, evidence in braked))
    elif over >= limits.overshoot_ratio and draw.peak.above >= min(2, draw.gpus):
        yield _finding(history, draw, peak)
    elif (count := _swings(draw, limits)) >= max(limits.swings, draw.seconds / limits.swing_seconds):
        text = (
            f"{draw.gpus} GPUs step their power together by up to {step / 1e3:.2f} kW, {count} times in "
            f"{draw.seconds:.0f} s: within their limits, and hard on a supply sized for the mean"
        )
        yield _finding(history, draw, text, severity=Severity.NOTICE)


def _swings(draw: Draw, limits: Limits) -> int:
    return sum(1 for step in draw.steps if step >= limits.swing_ratio * draw.limit_watts)


def _braked(history: History, limits: Limits) -> list[tuple[str, Evidence]]:
    """Return the GPUs whose external power brake was engaged, with the proof."""
    found: list[tuple[str, Evidence]] = []
    for gpu in history.latest.gpus:
        grown = gpu_growth(history, gpu.uuid, lambda g: g.clocks.power_brake_seconds, limits.window_seconds)
        now = known(gpu.clocks.event_reasons) and "hw-power-brake" in gpu.clocks.event_reasons
        if now or (grown is not None and grown.amount > 0):
            text = f"engaged for {grown.amount:.1f} s" if grown is not None and grown.amount > 0 else "engaged now"
            found.append((gpu.uuid, Evidence(Source.NVML.value, f"GPU {gpu.index}: hw-power-brake", text)))
    return found


def _finding(
    history: History, draw: Draw, text: str, *, severity: Severity | None = None, more: tuple[Evidence, ...] = ()
) -> Finding:
    samples = (
        f"peak {draw.peak.watts:.0f} W, mean {draw.mean_watts:.0f} W, greatest step {draw.steps[0]:.0f} W over "
        f"{draw.seconds:.0f} s; the sensor sees about a quarter of the time, so the true peak may be higher"
    )
    return Finding(
        summary=text,
        evidence=(*more, Evidence(Source.NVML.value, "instant power, all GPUs at the same moment", samples)),
        confidence=Confidence.MEDIUM if severity is Severity.NOTICE else Confidence.HIGH,
        severity=severity,
        subject=Subject(gpus=tuple(gpu.uuid for gpu in history.latest.gpus)),
        facts={"watts": f"{draw.peak.watts:.0f}"},
    )
