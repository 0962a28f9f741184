"""Cooling does not carry the heat away: GPUs slow down under load, or are about to."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Gpu, Maybe, Source, known
from doctor.symptoms.growth import gpu_growth
from doctor.symptoms.names import name_of, names_of
from rules.tables.products import product_of


class Limits(msgspec.Struct, frozen=True):
    """How much heat is too much."""

    window_seconds: float = 600.0
    """guess: long enough to average over bursts, short enough to end with the cause."""
    software_share: float = 0.05
    """Share of the window in software thermal slowdown. guess: DCGM's "any at all" is what users call too sensitive
    (DCGM#242, #270)."""
    hardware_share: float = 0.01
    """Share of the window in hardware thermal slowdown, which never happens on a cooled board. guess, as above."""
    least_seconds: float = 0.2
    """Shorter growth of a duration counter is noise. guess: a fifth of the second between the two visits of a check."""
    near_celsius: float = 2.0
    """This close to the slowdown reference, at every visit of the last `near_seconds`, is worth a notice. guess."""
    near_seconds: float = 60.0
    neighbour_celsius: float = 10.0
    """This much hotter than the median of its neighbours points to one module's cooling, not to the room. guess: the
    spread over the captures of eight-GPU nodes is 5 to 8."""


class Heat(msgspec.Struct, frozen=True):
    """A GPU that is too hot, and what shows it."""

    gpu: Gpu
    text: str
    evidence: tuple[Evidence, ...]
    severity: Severity


@rule(
    "cooling-insufficient",
    "Cooling does not carry the heat away",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=("gpu-lost", "throughput-below-reference", "ttft-slow"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Judge by slowdown that happened, then by the margin to it; never by `87 - temperature`, which is not the margin."""
    hot = [heat for gpu in history.latest.gpus if (heat := _heat(history, gpu, limits)) is not None]
    if not hot:
        return
    worst = max(hot, key=lambda h: (h.severity, -_margin(h.gpu)))
    lonely = _hotter_than_neighbours(history, worst.gpu)
    others = f" ({len(hot)} of {len(history.latest.gpus)} GPUs are too hot)" if len(hot) > 1 else ""
    where = (
        f"; it is {lonely:.0f} °C hotter than the median of its neighbours: look at its own cooling first"
        if len(hot) == 1 and lonely is not None and lonely >= limits.neighbour_celsius
        else ""
    )
    yield Finding(
        summary=f"{name_of(worst.gpu)} {worst.text}{others}{where}",
        evidence=tuple(e for heat in (worst, *(h for h in hot if h is not worst)) for e in heat.evidence),
        confidence=Confidence.MEDIUM if len(history.snapshots) == 1 else Confidence.HIGH,
        severity=worst.severity,
        subject=Subject(gpus=tuple(h.gpu.uuid for h in hot)),
        facts={"gpu-index": str(worst.gpu.index), "gpus": names_of(history.latest, [h.gpu.uuid for h in hot])},
    )


def _heat(history: History, gpu: Gpu, limits: Limits) -> Heat | None:
    evidence = _temperatures(gpu)
    for kind, severity, share in (
        ("hw", Severity.CRITICAL, limits.hardware_share),
        ("sw", Severity.WARNING, limits.software_share),
    ):
        slowed = _slowed(history, gpu, kind, share, limits)
        if slowed:
            text = f"was in {'hardware' if kind == 'hw' else 'software'} thermal slowdown {slowed.text}"
            return Heat(gpu, f"{text} at {_celsius(gpu)}", (slowed, *evidence), severity)
    now, most = gpu.thermal.gpu_celsius, gpu.thermal.gpu_max_celsius
    if known(now) and known(most) and now > most:
        text = f"is at {now:.0f} °C, above the {most:.0f} °C that it may reach in operation"
        return Heat(gpu, text, evidence, Severity.WARNING)
    return _near(history, gpu, limits, evidence)


def _slowed(history: History, gpu: Gpu, kind: str, share: float, limits: Limits) -> Evidence | None:
    """Return proof of slowdown: its duration counter grew, or, where only one visit saw the GPU, its reason is set."""

    def duration(seen: Gpu) -> Maybe[float]:
        return seen.clocks.hw_thermal_seconds if kind == "hw" else seen.clocks.sw_thermal_seconds

    reason = f"{kind}-thermal-slowdown"
    grown = gpu_growth(history, gpu.uuid, duration, limits.window_seconds)
    if grown is not None:
        if grown.amount >= limits.least_seconds and grown.amount >= share * grown.seconds:
            text = f"for {grown.amount:.1f} of the last {grown.seconds:.0f} s"
            return Evidence(Source.NVML.value, f"GPU {gpu.index}: {reason} duration", text)
        return None
    visits = [seen for _, seen in history.of_gpu(gpu.uuid)[-2:]]
    if all(known(seen.clocks.event_reasons) and reason in seen.clocks.event_reasons for seen in visits):
        return Evidence(Source.NVML.value, f"GPU {gpu.index}: clocks event reasons", "when it was looked at")
    return None


def _near(history: History, gpu: Gpu, limits: Limits, evidence: tuple[Evidence, ...]) -> Heat | None:
    left = [_left(seen) for _, seen in history.of_gpu(gpu.uuid, limits.near_seconds)]
    if all(celsius is not None and celsius <= limits.near_celsius for celsius in left) and len(left) > 1:
        return Heat(
            gpu, f"has {left[-1]:.0f} °C left before it slows down, at {_celsius(gpu)}", evidence, Severity.NOTICE
        )
    return None


def _left(gpu: Gpu) -> float | None:
    """Return the degrees left before the hardware slows the GPU down, by the margin, or on older boards by temperature."""
    thermal, product = gpu.thermal, product_of(gpu)
    if known(thermal.margin_celsius):
        floor = thermal.slowdown_margin_celsius
        if not known(floor):
            floor = product.slowdown_margin_celsius if product and product.slowdown_margin_celsius is not None else 0.0
        return thermal.margin_celsius - floor
    limit = thermal.slowdown_celsius
    if not known(limit):
        limit = product.slowdown_celsius if product else None
    if limit is None or not known(thermal.gpu_celsius):
        return None
    return limit - thermal.gpu_celsius


def _margin(gpu: Gpu) -> float:
    left = _left(gpu)
    return left if left is not None else float("inf")


def _celsius(gpu: Gpu) -> str:
    thermal = gpu.thermal
    parts = [f"{thermal.gpu_celsius:.0f} °C"] if known(thermal.gpu_celsius) else []
    if known(thermal.memory_celsius):
        parts.append(f"memory {thermal.memory_celsius:.0f} °C")
    return ", ".join(parts) or "a temperature that was not seen"


def _temperatures(gpu: Gpu) -> tuple[Evidence, ...]:
    left = _left(gpu)
    margin = f", {left:.0f} °C left before slowdown" if left is not None else ""
    return (Evidence(Source.NVML.value, f"GPU {gpu.index}: temperatures", f"{_celsius(gpu)}{margin}"),)


def _hotter_than_neighbours(history: History, gpu: Gpu) -> float | None:
    def celsius(seen: Gpu) -> float | None:
        return seen.thermal.gpu_celsius if known(seen.thermal.gpu_celsius) else None

    others = [c for seen in history.latest.gpus if seen.uuid != gpu.uuid and (c := celsius(seen)) is not None]
    mine = celsius(gpu)
    return mine - median(others) if others and mine is not None else None
