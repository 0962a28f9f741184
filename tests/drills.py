"""Visits of a simulated node whose clock is turned by hand: an hour of a drill in a second, the same each time.

    visits = drills.visits("hgx-h100-4", "overheating", seconds=range(0, 330, 15))

The same collectors, files and page as `doctor.feeds.simulated` has; NVML is asked in this process, without its child.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import msgspec
import pynvml

from doctor.collectors import nvml_child
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.nvml_frames import Answer, Ask
from doctor.feeds import live, simulated
from doctor.simulation import nvml
from doctor.simulation.physics import Drill
from doctor.snapshot import Absent, Snapshot, Source, Why

BEGINS = 1_790_000_000.0
"""Unix time of each drill's second 0."""
SAMPLED_SECONDS = 2.0
"""How long before a visit the power is sampled; the child does so all the time."""
PATIENCE_SECONDS = 5.0
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A drill writes some hundred small files."""


class Clock:
    """The time of a drill. The visits' own deadlines run by the real one."""

    def __init__(self) -> None:
        self.now = BEGINS

    def time(self) -> float:
        return self.now

    def sleep(self, _seconds: float) -> None:
        """Nobody waits: whoever turns the clock says how far."""

    @property
    def calendar(self) -> SimpleNamespace:
        """What stands in for the module `time` where time itself runs by the real clock."""
        return SimpleNamespace(time=self.time, sleep=self.sleep, monotonic=time.monotonic)

    @property
    def everything(self) -> SimpleNamespace:
        """What stands in for it where nothing waits for anybody."""
        return SimpleNamespace(time=self.time, sleep=self.sleep, monotonic=self.time)


class Nvml:
    """What the NVML child does, done here."""

    source = Source.NVML
    after_engines = False
    deadline_seconds = 30.0

    def __init__(self, drill: Drill, clock: Clock) -> None:
        self._drill = drill
        self._clock = clock
        self._opened: nvml_child.Nvml | None = None
        self._left_alone: set[str] = set()

    def sample(self) -> None:
        if self._opened is not None and self._drill.active("driver-hung", self._clock.now - BEGINS) is None:
            with contextlib.suppress(nvml_child.CannotStartError):
                self._opened.sample()

    def collect(self, visit: Visit) -> Reading:
        if self._drill.active("driver-hung", visit.at - BEGINS):
            silence = Absent(Why.TIMED_OUT, f"NVML has not answered for {PATIENCE_SECONDS:.0f} s")
            raise CannotSeeError(silence, fields={"nvml_blocked_seconds": PATIENCE_SECONDS})
        try:
            answer = self._answer()
        except nvml_child.CannotStartError as e:
            raise CannotSeeError(e.why) from e
        fields = {"gpus": answer.gpus, "pairs": answer.pairs, "stack": answer.stack, "nvml_blocked_seconds": 0.0}
        return Reading(fields=fields, unseen=answer.unseen)

    def _answer(self) -> Answer:
        """Answer, anew where it was opened before and has outlived its driver: then the parent starts a fresh child."""
        while True:
            before, self._opened = self._opened, None
            try:
                opened = before or nvml_child.Nvml(None)
                answer = opened.visit(Ask(1))
            except nvml_child.CannotStartError:
                if before is None:
                    raise
            else:
                self._opened = opened
                return answer

    def close(self) -> None:
        if self._opened is not None:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def visits(profile: str, *faults: str, seconds: Iterable[float] = (0, 15, 30)) -> tuple[Snapshot, ...]:
    """Return what is seen of the node at these seconds of its drill, in order of time."""
    return tuple(stepped(profile, *faults, seconds=seconds))


def stepped(profile: str, *faults: str, seconds: Iterable[float] = (0, 15, 30)) -> Iterator[Snapshot]:
    """Yield the visits one by one."""
    clock = Clock()
    drill = msgspec.structs.replace(simulated.drill_of(profile, faults), started_at=BEGINS)
    with contextlib.ExitStack() as leaving:
        for module, stand_in in ((nvml, clock.calendar), (nvml_child, clock.everything)):
            leaving.enter_context(mock.patch.object(module, "time", stand_in))
        leaving.enter_context(mock.patch.object(pynvml, "nvmlLib", nvml.Library(drill)))
        leaving.enter_context(mock.patch.dict(pynvml._nvmlGetFunctionPointer_cache, clear=True))
        folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="gpu-doctor-drill-", dir=IN_MEMORY)))
        world = simulated.World(drill, folder, clock.time)
        leaving.callback(world.close)
        asked = Nvml(drill, clock)
        clocks = live.Clocks(clock.time, clock.time, clock.sleep)
        told = live.every(1.0, (asked, *world.collectors), node=world.described, clocks=clocks)
        leaving.callback(told.close)  # type: ignore[attr-defined]
        for second in seconds:
            for tenth in range(round(SAMPLED_SECONDS * 10), 0, -1):
                clock.now = max(clock.now, BEGINS + second - tenth / 10)
                asked.sample()
            clock.now = BEGINS + second
            world.advance()
            yield world.as_of_its_own_root(next(told))
