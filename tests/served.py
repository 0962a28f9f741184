"""A daemon over hand-made visits, to be run as a program: `served.py SCRIPT INTERVAL [HOST:PORT [WEB-CONFIG]]`.

SCRIPT names the visits, e.g. `clear,lost,clear`; the last one goes on for ever, or with `stop` at the end no visit comes any more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
import reports

from doctor import daemon
from doctor.door.address import DoorError, address
from doctor.history import History
from doctor.readers import runbook
from doctor.rule import Finding, NoLimits, Severity, rule
from doctor.snapshot import Gpu, Snapshot, Source


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


if __name__ == "__main__":
    try:
        daemon.run(
            visits(sys.argv[1], float(sys.argv[2])),
            (lost,),
            listen=address(sys.argv[3] if len(sys.argv) > 3 else "127.0.0.1:0"),
            interval_seconds=float(sys.argv[2]),
            keep_seconds=3600,
            version="0.0.0",
            web_config=Path(sys.argv[4]) if len(sys.argv) > 4 else None,
        )
    except DoorError as e:
        sys.exit(str(e))
