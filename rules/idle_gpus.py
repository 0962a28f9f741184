"""GPUs do nothing while others serve, or one rank works unlike the others."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.names import name_of, names_of
from doctor.symptoms.served import spare_gpus
from doctor.symptoms.traffic import too_short


class Limits(msgspec.Struct, frozen=True):
    """When a GPU is idle, and when its neighbours are not."""

    window_seconds: float = 300.0
    """guess: an engine that starts on the free GPUs shows within five minutes."""
    busy_ratio: float = 0.5
    """Mean utilisation of the engine's GPUs; guess: below it there is no load to share."""
    idle_ratio: float = 0.05
    """guess: what an unused GPU shows, with some slack for a monitor."""
    uneven_ratio: float = 0.5
    """One rank's mean over the median of its group; guess: ranks work in step, so half is far off."""


@rule(
    "idle-gpus",
    "GPUs are idle while others serve",
    severity=Severity.NOTICE,
    needs=(Source.NVML, Source.PROCESSES),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Look under load for GPUs that nobody has taken, and for ranks that don't work like their group."""
    groups = [group for group in rank_groups(history) if group.gpus]
    spare = [gpu.uuid for gpu in spare_gpus(history)]
    if not groups or len(groups) < len(history.latest.engines):
        if history.latest.engines and spare:
            yield Absent(Why.NOT_ASKED, "which GPUs the engines run on was not seen")
        return
    uneven = any(len(group.gpus) > 1 for group in groups)
    if not spare and not uneven:
        return
    if history.span_seconds < 0.8 * limits.window_seconds:
        yield too_short(history.span_seconds)
        return
    means = _means(history, limits)
    busy = [group for group in groups if _of(group, means) and median(_of(group, means)) >= limits.busy_ratio]
    idle = [uuid for uuid in spare if means.get(uuid, 1.0) <= limits.idle_ratio]
    if busy and idle:
        yield _unused(history, busy, idle, means)
    for group in busy:
        yield from _uneven(history, group, means, limits)


def _means(history: History, limits: Limits) -> dict[str, float]:
    """Return the mean utilisation of each GPU over the window."""
    ratios: dict[str, list[float]] = {}
    for snapshot in history.window(limits.window_seconds):
        for gpu in snapshot.gpus:
            if known(gpu.activity.gpu_ratio):
                ratios.setdefault(gpu.uuid, []).append(gpu.activity.gpu_ratio)
    return {uuid: sum(seen) / len(seen) for uuid, seen in ratios.items()}


def _of(group: RankGroup, means: dict[str, float]) -> list[float]:
    return [means[uuid] for uuid in group.gpus if uuid in means]


def _unused(history: History, busy: list[RankGroup], idle: list[str], means: dict[str, float]) -> Finding:
    serving = [uuid for group in busy for uuid in group.gpus]
    engines = {group.engine for group in busy}
    visible = next((e.environment.get("CUDA_VISIBLE_DEVICES") for e in history.latest.engines if e.id in engines), None)
    return Finding(
        summary=f"{names_of(history.latest, idle)} do nothing, with no process on them, while {names_of(history.latest, serving)} "
        f"are {sum(means.get(u, 0.0) for u in serving) / len(serving):.0%} busy",
        evidence=(
            Evidence(
                Source.NVML.value, "utilisation, processes", f"{names_of(history.latest, idle)}: none, for minutes"
            ),
            Evidence(
                Source.PROCESSES.value,
                "--tensor-parallel-size",
                " and ".join(str(group.size) for group in busy)
                + (f"; CUDA_VISIBLE_DEVICES={visible}" if visible else ""),
            ),
        ),
        confidence=Confidence.HIGH,
        subject=Subject(gpus=tuple(idle)),
    )


def _uneven(history: History, group: RankGroup, means: dict[str, float], limits: Limits) -> Iterator[Finding]:
    usual = median(_of(group, means))
    for gpu in history.latest.gpus:
        mine = means.get(gpu.uuid)
        if gpu.uuid in group.gpus and mine is not None and mine < limits.uneven_ratio * usual and group.exact:
            yield Finding(
                summary=f"{name_of(gpu)} is {mine:.0%} busy and its {group.size - 1} neighbours in the group {usual:.0%}: "
                "ranks work in step, so this one does not work like them",
                evidence=(
                    Evidence(
                        Source.NVML.value,
                        "utilisation",
                        f"mean of {limits.window_seconds:.0f} s: {mine:.0%}, median {usual:.0%}",
                    ),
                ),
                confidence=Confidence.LOW,
                subject=Subject(gpus=(gpu.uuid,), engine=group.engine),
                facts={"gpu-index": str(gpu.index)},
            )
