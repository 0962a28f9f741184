"""The node's power between visits: the GPUs' fast samples laid over each other, so that a common step shows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Gpu, Sample, Snapshot, known

BIN_SECONDS = 0.1
"""Power sensors of A100 and H100 change about this often (arXiv 2312.02741); finer bins would compare stale values."""

STALE_SECONDS = 0.5
"""A GPU's last sample stands for it no longer than this. guess: five sensor periods."""

STEP_SECONDS = 0.5
"""A change within this time is a step. guess: slower ones a power supply follows."""


WINDOW_SECONDS = 600.0
"""How far back samples are laid over each other. guess: as for cooling; an hour of ten samples a second is too much."""


class Moment(msgspec.Struct, frozen=True):
    """What all GPUs drew at one time."""

    at: float
    watts: float
    above: int
    """How many GPUs drew more than their own limit."""


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """The power of all GPUs together over the last `WINDOW_SECONDS`."""

    gpus: int
    seconds: float
    """Time covered by samples of every GPU."""
    limit_watts: float
    """Sum of the GPUs' limits."""
    mean_watts: float
    peak: Moment
    steps: tuple[float, ...]
    """Watts of each rise or fall within `STEP_SECONDS`, largest first, none counted twice."""


class Stretch(msgspec.Struct, frozen=True):
    """What a visit adds to the draw. It stays true as long as the visit before and the limits are the same."""

    before: Snapshot | None
    """None: the first visit of the window."""
    visit: Snapshot
    limits: tuple[tuple[str, float], ...]
    """UUID and watts."""
    moments: tuple[Moment, ...]


@measured_once
def node_draw(history: History) -> Draw | None:
    """Return the GPUs' common draw; None where some GPU has no samples or no limit."""
    moments: list[Moment] = []
    for stretch in _stretches(history):
        while stretch.moments and moments and moments[-1].at >= stretch.moments[0].at:
            moments.pop()  # told again, with the samples of GPUs that were asked earlier in the visit
        moments += stretch.moments
    if not moments:
        return None
    watts = [moment.watts for moment in moments]
    limits = [limit for gpu in _present(history) if (limit := limit_of(gpu)) is not None]
    return Draw(
        gpus=len(limits),
        seconds=len(moments) * BIN_SECONDS,
        limit_watts=sum(limits),
        mean_watts=sum(watts) / len(watts),
        peak=moments[watts.index(max(watts))],
        steps=_steps([moment.at for moment in moments], watts),
    )


def _present(history: History) -> list[Gpu]:
    return [gpu for gpu in history.latest.gpus if gpu.lost is not True]


@measured_once
def _stretches(history: History) -> tuple[Stretch, ...]:
    """Return what each visit of the window adds; only the last one is laid out anew, and the first."""
    gpus = _present(history)
    limits = tuple((gpu.uuid, limit) for gpu in gpus if (limit := limit_of(gpu)) is not None)
    if not gpus or len(limits) != len(gpus):
        return ()
    done = {stretch.visit.at: stretch for stretch in history.measured_before(_stretches) or ()}
    stretches: list[Stretch] = []
    before = None
    for visit in history.window(WINDOW_SECONDS):
        stretch = done.get(visit.at)
        if stretch is None or stretch.visit is not visit or stretch.before is not before or stretch.limits != limits:
            stretch = Stretch(before, visit, limits, tuple(_together(before, visit, limits)))
        stretches.append(stretch)
        before = visit
    return tuple(stretches)


def limit_of(gpu: Gpu) -> float | None:
    """Return the power limit that binds the GPU, watts."""
    power = gpu.power
    return next(
        (w for w in (power.limit_enforced_watts, power.limit_watts, power.limit_default_watts) if known(w)), None
    )


def _together(before: Snapshot | None, visit: Snapshot, limits: tuple[tuple[str, float], ...]) -> Iterator[Moment]:
    """Yield the moments since the visit's first sample at which every GPU's draw is known, oldest first."""
    new = [_samples(visit, uuid) for uuid, _ in limits]
    begun = min((int(samples[0].at / BIN_SECONDS) for samples in new if samples), default=None)
    if begun is None:
        return
    stale = int(STALE_SECONDS / BIN_SECONDS)
    series: list[dict[int, float]] = []
    for (uuid, _), samples in zip(limits, new, strict=True):
        old = takewhile(lambda s: s.at / BIN_SECONDS >= begun - stale, reversed(_samples(before, uuid)))
        series.append({int(s.at / BIN_SECONDS): s.value for s in (*reversed((*old,)), *samples)})
    held: list[tuple[int, float] | None] = [None] * len(series)
    for cell in sorted({cell for samples in series for cell in samples}):
        for i, samples in enumerate(series):
            if cell in samples:
                held[i] = (cell, samples[cell])
        watts = [h[1] for h in held if h is not None and cell - h[0] <= stale]
        if cell >= begun and len(watts) == len(series):
            above = sum(1 for w, (_, limit) in zip(watts, limits, strict=True) if w > limit)
            yield Moment(cell * BIN_SECONDS, sum(watts), above)


def _samples(visit: Snapshot | None, uuid: str) -> tuple[Sample, ...]:
    gpu = visit.gpu(uuid) if visit is not None else None
    return gpu.power.samples if gpu is not None else ()


def _steps(times: list[float], watts: list[float]) -> tuple[float, ...]:
    """Return the greatest change within each `STEP_SECONDS`, one after the other."""
    steps: list[float] = []
    start = 0
    while start < len(times):
        end = start
        while end + 1 < len(times) and times[end + 1] - times[start] <= STEP_SECONDS:
            end += 1
        within = watts[start : end + 1]
        steps.append(max(within) - min(within))
        start = max(end, start + 1)  # the next one begins where this one ended: a step between them counts
    return tuple(sorted(steps, reverse=True))
