"""The daemon for hours in minutes: time runs 20 times faster, faults come and go, and nothing may grow but what it remembers.

    python benchmarks/soak.py [--hours 3] [--speed 20] [--interval 10]

The daemon runs on a simulated `hgx-h100-8` with the flight recorder, and is scraped. Every four minutes of its time another
fault is there for two: each must be found, told in the log and as a metric, and be gone afterwards. For the first hour
memory grows by what the rules remember; from then on memory, threads, descriptors and series must stay as they are.
Exits 1 where they don't.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from daemon_cost import HOME, descendants, free_port, pss_megabytes

PROFILE = "hgx-h100-8"
REMEMBERED_SECONDS = 3600
FAULTS = (
    ("nvlink-down:gpu=2,link=5", "nvlink-degraded"),
    ("overheating:gpu=3", "cooling-insufficient"),
    ("pcie-width:gpu=1", "pcie-link-degraded"),
    ("mig-pending:gpu=6", "mig-misconfigured"),
    ("power-brake", "power-brake"),
    ("remap-pending:gpu=4", "gpu-memory-faulty"),
    ("fabric-manager-dead", "nvswitch-fabric-fault"),
    ("rank-stopped:rank=1", "engine-stalled"),
    ("driver-hung", "driver-unresponsive"),
    ("recovery-action:gpu=7", "recovery-pending"),
    ("fabric-unhealthy:gpu=5", "nvswitch-fabric-fault"),
)
"""Faults that can go again, each with its failure mode."""
FIRST_SECONDS, EVERY_SECONDS, LASTS_SECONDS = 300, 240, 120
QUIET_SECONDS = 900
"""At the end no fault is there for so long: windows of ten minutes empty."""
LOOK_SECONDS = 60.0
"""Of the daemon's time."""

GROWTH_MAX = 0.03
"""guess: of the memory between the second hour and the last; the allocator's own ups and downs are half of it."""


def timetable(seconds: float) -> Iterator[tuple[str, str]]:
    """Yield each fault with its times, as the command line takes it, and its failure mode."""
    starts = range(FIRST_SECONDS, int(seconds) - QUIET_SECONDS - LASTS_SECONDS, EVERY_SECONDS)
    for number, start in enumerate(starts):
        fault, failure_mode = FAULTS[number % len(FAULTS)]
        yield f"{fault}{',' if ':' in fault else ':'}start={start},end={start + LASTS_SECONDS}", failure_mode


class Look:
    """What can be seen of the daemon from outside, at one time."""

    def __init__(self, pid: int, port: int) -> None:
        processes = list(descendants(pid))
        self.pss = sum(map(pss_megabytes, processes))
        self.processes = len(processes)
        self.threads = sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
        self.descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        self.series = sum(not line.startswith("#") for line in lines)
        self.findings = {
            line.partition('failure_mode="')[2].partition('"')[0]
            for line in lines
            if line.startswith("gpu_doctor_finding{")
        }


def looks_at(process: subprocess.Popen[bytes], port: int, seconds: float, speed: float) -> Iterator[Look]:
    """Look once a minute of the daemon's time, for so long."""
    until = time.monotonic() + seconds / speed
    while time.monotonic() < until:
        time.sleep(LOOK_SECONDS / speed)
        if process.poll() is not None:
            sys.exit(f"the daemon ended with {process.returncode}")
        yield Look(process.pid, port)


def main() -> int:
    told = argparse.ArgumentParser()
    told.add_argument("--hours", type=float, default=3.0)
    told.add_argument("--speed", type=float, default=20.0)
    told.add_argument("--interval", type=float, default=10.0)
    given = told.parse_args()
    seconds = given.hours * 3600
    faults = list(timetable(seconds))
    with tempfile.TemporaryDirectory(prefix="gpu-doctor-soak-") as place:
        port, log, config = free_port(), Path(place) / "log", Path(place) / "config.toml"
        config.write_text(f"[collectors.nvml]\ndeadline_seconds = {min(60.0, max(5.5, 3.0 * given.speed))}\n")
        command = [
            *(sys.executable, "-m", "doctor", "daemon", "--simulate", PROFILE, "--interval", f"{given.interval:g}"),
            *("--config", str(config), "--listen", f"127.0.0.1:{port}", "--state-dir", str(Path(place) / "state")),
            *(word for fault, _ in faults for word in ("--fault", fault)),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(HOME / "benchmarks/stand_in"), str(HOME))),
            "STAND_IN_SPEED": str(given.speed),
        }
        with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
            await_event(log, "listening")
            try:
                looks = list(looks_at(process, port, seconds, given.speed))
            finally:
                process.terminate()
                process.wait(60)
        events = [json.loads(line) for line in log.read_text().splitlines()]
    return tell(looks, events, [failure_mode for _, failure_mode in faults], seconds)


def await_event(log: Path, name: str) -> None:
    until = time.monotonic() + 60
    while f'"event": "{name}"' not in log.read_text():
        if time.monotonic() > until:
            sys.exit(f"the daemon does not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def tell(looks: list[Look], events: list[dict[str, Any]], expected: list[str], seconds: float) -> int:
    came = Counter(e["failure_mode"] for e in events if e["event"] == "finding appeared")
    went = Counter(e["failure_mode"] for e in events if e["event"] == "finding cleared")
    shown = set().union(*(look.findings for look in looks))
    wanted = Counter(expected)
    wrong = [
        f"{mode}: {number} faults, appeared {came[mode]}, cleared {went[mode]} times"
        for mode, number in wanted.items()
        if came[mode] < number or went[mode] < came[mode] or mode not in shown or mode in looks[-1].findings
    ]
    others = {mode: number for mode, number in came.items() if mode not in wanted}
    errors = [e for e in events if e.get("level") == "error"]
    print(f"{PROFILE}: {seconds / 3600:.1f} h, {len(looks)} looks, {len(expected)} faults of {len(wanted)} kinds")
    print(f"findings besides, which follow from these or stay: {others or 'none'}; errors in the log: {len(errors)}")
    print("\n".join(wrong) if wrong else "each was found, told and cleared")
    settled = looks[int(len(looks) * REMEMBERED_SECONDS / seconds) :]
    part = max(1, len(settled) // 3)
    failed = bool(wrong or errors)
    for name, limit in (
        ("pss", GROWTH_MAX),
        ("threads", 0.0),
        ("descriptors", 0.0),
        ("series", 0.01),
        ("processes", 0.0),
    ):
        at_first, early, late = (
            median(getattr(look, name) for look in among)
            for among in (looks[:part], settled[:part] or looks, settled[-part:] or looks)
        )
        grew = late / early - 1
        failed |= grew > limit
        print(
            f"{name:12} at first {at_first:7.1f}, from the second hour on {early:7.1f}, at the end {late:7.1f} "
            f"({grew:+.1%}, at most {limit:.0%}), highest {max(getattr(look, name) for look in looks):.1f}"
        )
    by_hour = [median(look.pss for look in looks[at : at + 20]) for at in range(0, len(looks), 20)]
    print("PSS, each third of an hour:", *(f"{pss:.1f}" for pss in by_hour))
    print("FAILED" if failed else "flat")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
