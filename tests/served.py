"""A daemon over hand-made visits, to be run as a program: `served.py SCRIPT INTERVAL [HOST:PORT [WEB-CONFIG [STATE-DIR]]]`.

SCRIPT names the visits, e.g. `clear,lost,clear`; the last one goes on for ever, or with `stop` at the end no visit comes any more.
The recorder's disk in STATE-DIR does what the file STATE-DIR.disk says: `ENOSPC` or another error's name, `hung`, or nothing.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
import reports

from doctor import daemon
from doctor.door import server
from doctor.door.address import DoorError, address
from doctor.history import History
from doctor.readers import runbook
from doctor.recorder import flight
from doctor.recorder.folder import Bounds
from doctor.rule import Finding, NoLimits, Severity, rule
from doctor.snapshot import Gpu, Snapshot, Source
from rules import recorder_failing


@rule(
    "gpu-lost",
    "A GPU has fallen off the bus",
    severity=Severity.CRITICAL,
    needs=(Source.NVML,),
    limits=NoLimits(),
)
def lost(history: History, limits: NoLimits) -> Iterator[Finding]:
    gone = tuple(gpu.uuid for gpu in history.latest.gpus if gpu.lost)
    if gone:
        subject = msgspec.structs.replace(reports.LOST.subject, gpus=gone)
        yield Finding(
            summary=f"at {history.now}: {len(gone)} lost\x1b[31m", evidence=reports.LOST.evidence, subject=subject
        )


lost.__dict__["runbook"] = runbook.read("## Fix\n1. Drain it.\n")  # the file beside the module, which is no rule's


def gone(*indices: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(uuid=reports.uuid(i), index=i, lost=True) if i in indices else reports.gpu(i) for i in range(4))


VISITS = {
    "clear": reports.FOUR,
    "lost": gone(2),
    "two": gone(2, 3),
}


def visits(script: str, interval: float) -> Generator[Snapshot, None, None]:
    try:
        name = ""
        for name in script.split(","):
            if name == "stop":
                time.sleep(600)
            yield reports.snapshot(VISITS[name], at=time.time())
            time.sleep(interval)
        while True:
            yield reports.snapshot(VISITS[name], at=time.time())
            time.sleep(interval)
    finally:
        print('{"event": "closed"}', file=sys.stderr, flush=True)


def recorder(directory: str) -> flight.FlightRecorder:
    """Return a recorder whose disk can be made to fail."""
    disk, really = Path(f"{directory}.disk"), os.fdatasync

    def sync(file: int) -> None:
        while (state := disk.read_text() if disk.exists() else "") == "hung":
            time.sleep(0.01)
        if state:
            raise OSError(getattr(errno, state), os.strerror(getattr(errno, state)))
        really(file)

    os.fdatasync = sync
    made = flight.FlightRecorder(Path(directory), Bounds(max_bytes=8 << 20, max_age_seconds=86400.0), keep_seconds=3600)
    flight.PATIENCE_SECONDS = flight.FAREWELL_SECONDS = 0.5
    return made


if __name__ == "__main__":
    script, interval, *more = sys.argv[1:]
    listen, web_config, state = [*more, *("127.0.0.1:0", "", "")[len(more) :]]
    server.FOLLOW_SECONDS = 0.1  # who changes the web configuration waits for it
    try:
        daemon.run(
            visits(script, float(interval)),
            (lost, recorder_failing.RULE),
            listen=address(listen),
            interval_seconds=float(interval),
            keep_seconds=3600,
            version="0.0.0",
            web_config=Path(web_config) if web_config else None,
            recorder=recorder(state) if state else None,
        )
    except DoorError as e:
        sys.exit(str(e))
