"""The node's power between visits: the GPUs' fast samples laid over each other, so that a common step shows."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Gpu, known

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


@measured_once
def node_draw(history: History) -> Draw | None:
    """Return the GPUs' common draw; None where some GPU has no samples or no limit."""
    gpus = [gpu for gpu in history.latest.gpus if gpu.lost is not True]
    limits = [limit for gpu in gpus if (limit := limit_of(gpu)) is not None]
    series = [_by_bin(history, gpu.uuid) for gpu in gpus]
    if not gpus or len(limits) != len(gpus) or not all(series):
        return None
    moments = _together(series, limits)
    if not moments:
        return None
    return Draw(
        gpus=len(gpus),
        seconds=len(moments) * BIN_SECONDS,
        limit_watts=sum(limits),
        mean_watts=sum(m.watts for m in moments) / len(moments),
        peak=max(moments, key=lambda m: m.watts),
        steps=_steps(moments),
    )


def limit_of(gpu: Gpu) -> float | None:
    """Return the power limit that binds the GPU, watts."""
    power = gpu.power
    return next(
        (w for w in (power.limit_enforced_watts, power.limit_watts, power.limit_default_watts) if known(w)), None
    )


def _by_bin(history: History, uuid: str) -> dict[int, float]:
    oldest = history.now - WINDOW_SECONDS
    recent = (gpu for at, gpu in history.of_gpu(uuid) if at >= oldest)
    return {int(s.at / BIN_SECONDS): s.value for gpu in recent for s in gpu.power.samples}


def _together(series: list[dict[int, float]], limits: list[float]) -> list[Moment]:
    stale = int(STALE_SECONDS / BIN_SECONDS)
    held: list[tuple[int, float] | None] = [None] * len(series)
    moments: list[Moment] = []
    cells = sorted({cell for samples in series for cell in samples})
    for cell in cells:
        for i, samples in enumerate(series):
            if cell in samples:
                held[i] = (cell, samples[cell])
        watts = [h[1] for h in held if h is not None and cell - h[0] <= stale]
        if len(watts) == len(series):
            above = sum(1 for w, limit in zip(watts, limits, strict=True) if w > limit)
            moments.append(Moment(cell * BIN_SECONDS, sum(watts), above))
    return moments


def _steps(moments: list[Moment]) -> tuple[float, ...]:
    """Return the greatest change within each `STEP_SECONDS`, one after the other."""
    steps: list[float] = []
    start = 0
    while start < len(moments):
        end = start
        while end + 1 < len(moments) and moments[end + 1].at - moments[start].at <= STEP_SECONDS:
            end += 1
        watts = [m.watts for m in moments[start : end + 1]]
        steps.append(max(watts) - min(watts))
        start = max(end, start + 1)  # the next one begins where this one ended: a step between them counts
    return tuple(sorted(steps, reverse=True))
