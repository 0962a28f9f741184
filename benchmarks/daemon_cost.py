"""What the daemon costs beside another exporter on the same simulated NVML: CPU, memory and the time of a scrape.

    python benchmarks/daemon_cost.py [--minutes 3] [--interval 10] [--processes 1500] [--peers DIR] [--alone]

A simulated eight-GPU node with a serving engine lives in this process: its files, its engine's page. The daemon runs on them
as it does on a node, with `--root`, its NVML child, all rules, the flight recorder, and an hour of visits that it remembers; nvitop-exporter runs at the same time
and at the same interval, from an environment of its own (made in DIR the first time). Both ask the same stand-in for NVML at the
C boundary. What goes into answering them is the simulation's, not theirs: it is counted call by call, and told apart. What a
real driver takes instead of it can't be told without one.

CPU time is the kernel's account of every process and its ended children over the whole time, since visits come in bursts; a busy
machine changes it little. Memory is PSS; it and the scrapes are told as medians.
Exits 1 where the daemon takes 1 % of a core, 80 MB, or 5 ms a scrape.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from doctor.cli import KEEP_SECONDS
from doctor.collectors.nvml import NvmlCollector
from doctor.feeds import live
from doctor.feeds.simulated import World, drill_of
from doctor.recorder.folder import Bounds, Shelf
from doctor.recorder.segment import Entry
from doctor.simulation.physics import Drill
from doctor.snapshot.clock import in_new_time

HOME = Path(__file__).parent.parent
PROFILE = "hgx-h100-8"
PEER = "nvitop-exporter"
WARM_UP_SECONDS = 30.0
SCRAPE_SECONDS = 15.0
ADVANCE_SECONDS = 1.0
CPU_RATIO_MAX, PSS_MB_MAX, SCRAPE_MS_MAX = 0.01, 80.0, 5.0

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
ACCEPT = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
"""As Prometheus asks."""


class Subject:
    """A program that is measured, with its children."""

    def __init__(self, name: str, command: list[str], port: int, environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._counts = folder / f"{name}.counts"
        self._log = (folder / f"{name}.log").open("w")
        told = {**os.environ, **environment, "STAND_IN_COUNTS": str(self._counts)}
        self._process = subprocess.Popen(command, env=told, stdout=self._log, stderr=self._log)
        self._port = port
        self.cpu_seconds: list[float] = []
        """By stretch, the simulation's part taken out."""
        self.simulation_seconds: list[float] = []
        self.calls: list[int] = []
        self.cpu_by_process: dict[int, float] = {}
        """Since the beginning, the simulation's part in it."""
        self.pss_megabytes: list[float] = []
        self.scrape_seconds: list[float] = []
        self.page_bytes = 0
        self.samples = 0
        self._before = (0.0, 0.0, 0)

    def processes(self) -> list[int]:
        return list(descendants(self._process.pid))

    def pss_by_process(self) -> list[float]:
        return [pss_megabytes(pid) for pid in self.processes()]

    def scrape(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.connect()
        began = time.perf_counter()
        connection.request("GET", "/metrics", headers=ACCEPT)
        body = connection.getresponse().read()
        self.scrape_seconds.append(time.perf_counter() - began)
        self.page_bytes = len(body)
        connection.close()

    def count_samples(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().splitlines()
        self.samples = sum(not line.startswith(b"#") for line in lines)
        connection.close()

    def await_page(self) -> None:
        until = time.monotonic() + 60
        while self.samples < 10:
            if time.monotonic() > until or self._process.poll() is not None:
                sys.exit(f"{self.name} serves no page: {Path(self._log.name).read_text()[-2000:]}")
            time.sleep(0.2)
            try:
                self.count_samples()
            except OSError:
                continue

    def begin(self) -> None:
        self._before = self._spent()
        self.cpu_by_process = {pid: -cpu_seconds(pid) for pid in self.processes()}
        self.scrape_seconds.clear()

    def end_stretch(self) -> None:
        spent, before = self._spent(), self._before
        self.simulation_seconds.append(spent[1] - before[1])
        self.cpu_seconds.append(spent[0] - before[0] - self.simulation_seconds[-1])
        self.calls.append(spent[2] - before[2])
        self.pss_megabytes.append(sum(self.pss_by_process()))
        self._before = spent

    def _spent(self) -> tuple[float, float, int]:
        """CPU seconds, those of the simulation among them, and calls to NVML, since the beginning."""
        counts = [
            struct.unpack("=QQ", path.read_bytes()) for path in self._counts.parent.glob(f"{self._counts.name}.*")
        ]
        cpu = sum(cpu_seconds(pid) for pid in self.processes()) + ended_seconds(self._process.pid)
        return cpu, sum(nanoseconds for nanoseconds, _ in counts) / 1e9, sum(calls for _, calls in counts)

    def end(self) -> None:
        self.count_samples()
        for pid in self.cpu_by_process:
            self.cpu_by_process[pid] += cpu_seconds(pid)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def descendants(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from descendants(int(child))
    except OSError:
        return


def cpu_seconds(pid: int) -> float:
    """Of all its threads, ended ones too, to the nanosecond: the clock that clock_getcpuclockid(3) names."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0  # it ended meanwhile


def ended_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(words[13]) + int(words[14])) / TICKS_PER_SECOND


def pss_megabytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def crowd(root: Path, number: int) -> None:
    """Add the processes that every server has besides: of three two are threads of its kernel."""
    for pid in range(20_000, 20_000 + number):
        folder = root / f"proc/{pid}"
        folder.mkdir()
        if pid % 3:
            name, state, flags, command = f"kworker/{pid % 96}:1", "I", 0x4208060, ""
        else:
            name, state, flags, command = "agent", "S", 0x400100, f"/usr/lib/something/agent\0--number\0{pid}\0"
        (folder / "stat").write_text(f"{pid} ({name}) {state} 2 0 0 0 -1 {flags} 0 0 0 0 3 7 0 0 20 0 1 0 {pid} 0 0\n")
        (folder / "cmdline").write_text(command)


def remember_an_hour(root: Path, drill: Drill, state: Path, interval: float) -> None:
    """Record an hour of visits that end now: what a daemon remembers that has run for long."""
    nvml = NvmlCollector(root=None, library="doctor.simulation.nvml", spec=msgspec.json.encode(drill).decode())
    seen = list(live.every(2.0, (nvml, *live.without_nvml(root)), times=5))[1:]
    shelf = Shelf(state, Bounds(max_bytes=64 << 20, max_age_seconds=24 * KEEP_SECONDS))
    shelf.take()
    now, number = time.time(), int(KEEP_SECONDS / interval)
    for back in range(number, 0, -1):
        visit = seen[back % len(seen)]
        entry = Entry(snapshot=in_new_time(visit, now - back * interval - visit.at), findings=())
        shelf.write(entry, 1 + number - back, is_start=back == number)
    shelf.close()


def peer_program(peers: Path) -> str:
    """Return the other exporter, put into an environment of its own where it is not yet."""
    program = peers / "bin" / PEER
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", peers], check=True)
        pip = [peers / "bin/pip", "install", "-q", PEER, "msgspec"]  # the stand-in needs msgspec
        subprocess.run(pip, check=True)
    return str(program)


def subjects(given: argparse.Namespace, folder: Path, root: Path, drill: str) -> list[Subject]:
    environment = {
        "PYTHONPATH": os.pathsep.join((str(HOME / "benchmarks/stand_in"), str(HOME))),
        "STAND_IN_DRILL": drill,
    }
    port = free_port()
    daemon = [
        *(sys.executable, "-m", "doctor", "daemon", "--root", str(root), "--interval", f"{given.interval:g}"),
        *("--listen", f"127.0.0.1:{port}", "--state-dir", str(folder / "state")),
    ]
    found = [Subject("gpu-doctor", daemon, port, environment, folder)]
    if not given.alone:
        port = free_port()
        peer = [
            *(peer_program(given.peers), "--interval", f"{given.interval:g}", "--hostname", "node"),
            *("--bind-address", "127.0.0.1", "--port", str(port)),
        ]
        found.append(Subject(PEER, peer, port, environment, folder))
    return found


def pass_time(seconds: float, world: World, measured: list[Subject], each_stretch: Callable[[], None]) -> None:
    """Let the node live for so long, scraped and measured as it would be."""
    began = time.monotonic()
    next_scrape = next_stretch = 0.0
    while (passed := time.monotonic() - began) < seconds:
        world.advance()
        if passed >= next_scrape:
            next_scrape += SCRAPE_SECONDS
            for subject in measured:
                subject.scrape()
        if passed >= next_stretch + 2 * SCRAPE_SECONDS:
            next_stretch += 2 * SCRAPE_SECONDS
            each_stretch()
        time.sleep(ADVANCE_SECONDS)


def main() -> int:
    told = argparse.ArgumentParser()
    told.add_argument("--minutes", type=float, default=3.0)
    told.add_argument("--interval", type=float, default=10.0)
    told.add_argument("--processes", type=int, default=1500, help="how many other processes the node has")
    told.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "gpu-doctor-peers")
    told.add_argument("--alone", action="store_true", help="measure the daemon only")
    given = told.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-doctor-cost-") as place:
        folder = Path(place)
        root = folder / "root"
        root.mkdir()
        drill = drill_of(PROFILE)
        world = World(drill, root)
        crowd(root, given.processes)
        remember_an_hour(root, drill, folder / "state", given.interval)
        measured = subjects(given, folder, root, msgspec.json.encode(drill).decode())
        try:
            for subject in measured:
                subject.await_page()
            pass_time(WARM_UP_SECONDS, world, measured, lambda: None)
            for subject in measured:
                subject.begin()
            began = time.monotonic()

            def end_stretch() -> None:
                for subject in measured:
                    subject.end_stretch()

            pass_time(given.minutes * 60, world, measured, end_stretch)
            end_stretch()
            seconds = time.monotonic() - began
            for subject in measured:
                subject.end()
            parts = {subject.name: subject.pss_by_process() for subject in measured}
        finally:
            for subject in measured:
                subject.close()
            world.close()
    return tell(measured, seconds, parts, given)


def tell(measured: list[Subject], seconds: float, parts: dict[str, list[float]], given: argparse.Namespace) -> int:
    print(f"{PROFILE}, a visit each {given.interval:g} s, {given.processes} other processes, {seconds:.0f} s")
    head = ("", "CPU", "answering it", "calls/s", "PSS", "scrape", "samples", "page")
    print("{:18}{:>10}{:>14}{:>9}{:>9}{:>11}{:>9}{:>8}".format(*head))
    for subject in measured:
        cpu, simulation = sum(subject.cpu_seconds) / seconds, sum(subject.simulation_seconds) / seconds
        print(
            f"{subject.name:18}{cpu:10.3%}{simulation:14.3%}{sum(subject.calls) / seconds:9.1f}"
            f"{median(subject.pss_megabytes):6.1f} MB{1e3 * median(subject.scrape_seconds):8.2f} ms{subject.samples:9}"
            f"{subject.page_bytes / 1024:5.1f} K"
        )
    for subject in measured:
        each = zip(subject.cpu_by_process.values(), parts[subject.name], strict=False)
        print(
            f"{subject.name}, by process, answering in it:",
            *(f"{cpu / seconds:.3%} {megabytes:.1f} MB," for cpu, megabytes in each),
        )
    ours = measured[0]
    ours_cpu = sum(ours.cpu_seconds) / seconds
    for other in measured[1:]:
        print(
            f"ratio to {other.name}: CPU {sum(ours.cpu_seconds) / sum(other.cpu_seconds):.1f}, PSS "
            f"{median(ours.pss_megabytes) / median(other.pss_megabytes):.2f}, scrape "
            f"{median(ours.scrape_seconds) / median(other.scrape_seconds):.2f}, "
            f"samples {ours.samples / other.samples:.1f}; CPU a call to NVML "
            f"{mean(ours.cpu_seconds) / mean(ours.calls) / (mean(other.cpu_seconds) / mean(other.calls)):.2f}"
        )
    within = (
        ours_cpu < CPU_RATIO_MAX
        and median(ours.pss_megabytes) < PSS_MB_MAX
        and 1e3 * median(ours.scrape_seconds) < SCRAPE_MS_MAX
    )
    print(
        f"{'within' if within else 'OVER'} {CPU_RATIO_MAX:.0%} of a core, {PSS_MB_MAX:g} MB, {SCRAPE_MS_MAX:g} ms a scrape"
    )
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
