"""Puts the simulated NVML under whatever program asks NVML, in the place of the C library; Python imports this by itself.

`daemon_cost.py` hands it over by PYTHONPATH. It counts the calls and the CPU time that goes into answering them, which a
real driver would take in its own way, into a file: two unsigned 64-bit numbers, nanoseconds and calls.
"""

import os
import sys
from pathlib import Path

DRILL, COUNTS = "STAND_IN_DRILL", "STAND_IN_COUNTS"
ASKERS = ("nvml_child", "nvitop")
"""Parts of the command lines of those that ask; the daemon itself never loads NVML."""


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
