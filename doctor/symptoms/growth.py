"""How counters and durations grew over a window: only growth tells, a standing number is history."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import msgspec

from doctor.history import History
from doctor.snapshot import NOT_ASKED, Gpu, Maybe, NvLink, known


class Growth(msgspec.Struct, frozen=True):
    """What a counter gained between the first and the last visit of a window that saw it."""

    amount: float
    seconds: float

    @property
    def per_second(self) -> float:
        """The rate."""
        return self.amount / self.seconds if self.seconds else 0.0


def growth(readings: Iterable[tuple[float, Maybe[float]]]) -> Growth | None:
    """Return a counter's growth over (time, value) readings, oldest first; None where fewer than two were seen.

    A value below its predecessor means that the counter began anew (driver or engine restarted): it counts from zero.
    """
    seen = [(at, float(value)) for at, value in readings if known(value)]
    if len(seen) < 2:
        return None
    amount = sum(now - before if now >= before else now for (_, before), (_, now) in pairwise(seen))
    return Growth(amount, seen[-1][0] - seen[0][0])


def gpu_growth(
    history: History, uuid: str, read: Callable[[Gpu], Maybe[float]], window_seconds: float
) -> Growth | None:
    """Return the growth of one GPU's counter over the last *window_seconds*."""
    return growth((at, read(gpu)) for at, gpu in history.of_gpu(uuid, window_seconds))


def link_growth(
    history: History, uuid: str, link: int, read: Callable[[NvLink], Maybe[int]], window_seconds: float
) -> Growth | None:
    """Return the growth of a counter of one NVLink of a GPU over the last *window_seconds*."""

    def of_link(gpu: Gpu) -> Maybe[float]:
        links = gpu.links if known(gpu.links) else ()
        return next((read(seen) for seen in links if seen.link == link), NOT_ASKED)

    return gpu_growth(history, uuid, of_link, window_seconds)


def moved_links(history: History, uuid: str, window_seconds: float) -> frozenset[int]:
    """Return the NVLinks of a GPU that did not read the same at every visit of the last *window_seconds*.

    Whole GPUs are compared first: it is seldom that any link moves.
    """
    readings = [gpu.links for _, gpu in history.of_gpu(uuid, window_seconds) if known(gpu.links)]
    return frozenset(link.link for before, now in pairwise(readings) if before != now for link in {*before} ^ {*now})
