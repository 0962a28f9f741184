"""What keeps an engine's processes from the processors, over a window: its quota, or others that want them too."""

from __future__ import annotations

import msgspec

from doctor.history import History
from doctor.snapshot import CpuShare, Maybe, known
from doctor.symptoms.growth import growth


class Throttling(msgspec.Struct, frozen=True, kw_only=True):
    """How often a quota ran out."""

    cgroup: str
    quota_cores: float
    period_ratio: float
    """Of the periods in which the group had something to run, those in which it was stopped."""
    stopped_seconds: float
    """Summed over its processors."""
    seconds: float
    """The window that was seen."""


def throttling(history: History, engine: str, window_seconds: float) -> Throttling | None:
    """Return how an engine's quota bound it over the window; None where it has none, or it was not seen twice.

    Visits at which another group had the smallest quota are left out: its counters are others.
    """
    seen = [(at, share) for at, share in _shares(history, engine, window_seconds) if known(share.cgroup)]
    if not seen:
        return None
    latest = seen[-1][1]
    mine = [(at, share) for at, share in seen if share.cgroup == latest.cgroup]

    periods = growth((at, share.periods_total) for at, share in mine)
    stopped = growth((at, share.throttled_periods_total) for at, share in mine)
    waited = growth((at, share.throttled_seconds_total) for at, share in mine)
    if periods is None or stopped is None or not periods.amount or not known(latest.quota_cores):
        return None
    return Throttling(
        cgroup=str(latest.cgroup),
        quota_cores=latest.quota_cores,
        period_ratio=stopped.amount / periods.amount,
        stopped_seconds=waited.amount if waited else 0.0,
        seconds=periods.seconds,
    )


def cpu_pressure(history: History, engine: str, window_seconds: float) -> float | None:
    """Return the mean share of the window in which a task of the engine waited for a processor; None: not seen."""
    return _mean([share.pressure_ratio for _, share in _shares(history, engine, window_seconds)])


def host_cpu_pressure(history: History, window_seconds: float) -> float | None:
    """Return the same of the whole node."""
    return _mean([snapshot.host.cpu_pressure_ratio for snapshot in history.window(window_seconds)])


def _shares(history: History, engine: str, window_seconds: float) -> list[tuple[float, CpuShare]]:
    return [
        (snapshot.at, one.cpu_share)
        for snapshot in history.window(window_seconds)
        for one in snapshot.engines
        if one.id == engine
    ]


def _mean(values: list[Maybe[float]]) -> float | None:
    seen = [value for value in values if known(value)]
    return sum(seen) / len(seen) if seen else None
