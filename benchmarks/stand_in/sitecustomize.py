"""What programs are run upon that are measured. Python imports this by itself; PYTHONPATH hands it over.

`daemon_cost.py` puts the simulated NVML under whatever program asks NVML, in the place of the C library. It counts the calls
and the CPU time that goes into answering them, which a real driver would take in its own way, into a file: two unsigned
64-bit numbers, nanoseconds and calls.

`soak.py` lets time run faster: the clocks that the program reads, its sleeps, and the deadlines of its waiting. What happens
several times a second happens as often as before, so seldom in the program's time: the power's samples, the drill's files.
"""

import os
import sys
from pathlib import Path

DRILL, COUNTS, SPEED = "STAND_IN_DRILL", "STAND_IN_COUNTS", "STAND_IN_SPEED"
ASKERS = ("nvml_child", "nvitop")
"""Parts of the command lines of those that ask; the daemon itself never loads NVML."""
DEADLINE_SECONDS = 1.0
"""Who waits shorter than this waits for the next tick, not for an answer."""


def put(drill: str, counts: Path) -> None:
    """Let this process's pynvml speak to the simulation."""
    import mmap
    import struct
    from time import thread_time_ns

    import pynvml

    from doctor.simulation.nvml import library

    simulated = library(drill)
    counts.write_bytes(bytes(16))
    with counts.open("r+b") as file:
        told = mmap.mmap(file.fileno(), 16)
    numbers = struct.Struct("=QQ")

    class Counted:
        def __getattr__(self, name: str) -> object:
            function = getattr(simulated, name)

            def call(*arguments: object) -> object:
                began = thread_time_ns()
                try:
                    return function(*arguments)
                finally:
                    nanoseconds, calls = numbers.unpack_from(told)
                    numbers.pack_into(told, 0, nanoseconds + thread_time_ns() - began, calls + 1)

            return call

    pynvml.nvmlLib = Counted()


if DRILL in os.environ and any(asker in word for word in sys.orig_argv for asker in ASKERS):
    put(os.environ[DRILL], Path(os.environ[COUNTS] + f".{os.getpid()}"))


def hurry(speed: float) -> None:
    """Let this process's time run so many times faster, from one common moment on, so that its children's clocks agree."""
    import select
    import threading
    import time

    began = float(os.environ.setdefault("STAND_IN_BEGAN", repr(time.time())))
    steady_began = float(os.environ.setdefault("STAND_IN_STEADY_BEGAN", repr(time.monotonic())))
    real_time, real_monotonic, real_sleep = time.time, time.monotonic, time.sleep
    real_poll, real_wait = select.poll, threading.Condition.wait
    time.time = lambda: began + (real_time() - began) * speed
    time.monotonic = lambda: steady_began + (real_monotonic() - steady_began) * speed
    time.sleep = lambda seconds: real_sleep(seconds / speed)

    class Poll:
        def __init__(self) -> None:
            self._poll = real_poll()
            self.register = self._poll.register

        def poll(self, milliseconds: float | None = None) -> list[tuple[int, int]]:
            return self._poll.poll(None if milliseconds is None else milliseconds / speed)

    def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        is_deadline = timeout is not None and timeout >= DEADLINE_SECONDS
        return real_wait(condition, timeout / speed if is_deadline else timeout)

    select.poll, threading.Condition.wait = Poll, wait


if SPEED in os.environ:
    hurry(float(os.environ[SPEED]))
