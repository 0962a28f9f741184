"""A flooded kernel log: memory, time and series stay bounded, and each code of each GPU is told with its count."""

from __future__ import annotations

import errno
import os
import socket
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import reports

from doctor.collectors import kernel_log
from doctor.collectors.collector import Reading, Visit
from doctor.collectors.kernel_log import KernelLog
from doctor.diagnose import watch
from doctor.recorder.folder import Bounds, Folder, Shelf
from doctor.recorder.segment import Entry
from doctor.report import Report
from doctor.snapshot import Gpu, Snapshot, Source, Xid
from exporters import console
from exporters import json as json_report
from exporters.prometheus import Tally
from exporters.terminal import Terminal
from rules import RULES

BOOT = 1_780_000_000
NOW = BOOT + 300.0
FLOOD = 100_000
GPUS = tuple(f"0000:{bus:02x}:00.0" for bus in range(0x10, 0x18))
CODES = (13, 31, 43, 63, 94)


def xid(number: int, code: int, address: str, name: str = "python3") -> str:
    text = f"NVRM: Xid (PCI:{address[:-2]}): {code}, pid={number}, name={name}, Ch 00000008"
    return f"3,{number},{1_000_000 + number * 1000},-;{text}\n"


def flood(names: int = 1) -> str:
    """A hundred thousand Xids of five codes on eight GPUs, and at the very end one GPU falls off the bus."""
    lines = [
        xid(n, CODES[n // len(GPUS) % len(CODES)], GPUS[n % len(GPUS)], f"python{n % names}") for n in range(FLOOD - 1)
    ]
    return (
        "".join(lines)
        + f"3,{FLOOD},{1_000_000 + FLOOD * 1000},-;NVRM: Xid (PCI:0000:13:00): 79, GPU has fallen off the bus.\n"
    )


def node(folder: Path) -> Path:
    (folder / "dev").mkdir()
    (folder / "proc").mkdir()
    (folder / "proc/stat").write_text(f"btime {BOOT}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return node(tmp_path)


@pytest.fixture(scope="module", params=[1, FLOOD], ids=["one process", "each of another process"])
def flooded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Reading]:
    """What is read of a log that was empty at the first visit and flooded before the second."""
    root = node(tmp_path_factory.mktemp("root"))
    (root / "dev/kmsg").write_text("")
    collector = KernelLog(root)
    assert xids(collector.collect(Visit(at=NOW))) == []
    (root / "dev/kmsg").write_text(flood(request.param))
    readings = until_read(collector)
    collector.close()
    return readings


def xids(reading: Reading) -> list[Xid]:
    return [event for event in reading.fields["kernel"] if isinstance(event, Xid)]


def until_read(collector: KernelLog) -> list[Reading]:
    readings = [collector.collect(Visit(at=NOW))]
    while readings[-1].unseen:
        readings.append(collector.collect(Visit(at=NOW)))
    return readings


def test_of_a_flood_the_first_of_each_code_on_each_gpu_is_kept_and_all_are_counted(flooded: list[Reading]) -> None:
    told = [event for reading in flooded for event in xids(reading)]
    first: dict[tuple[int, str], int | None] = {}
    for event in told:
        first.setdefault((event.code, event.pci_address), event.pid)
    expected = {(CODES[n // 8 % 5], GPUS[n % 8]): n for n in reversed(range(40))}
    assert first == {**expected, (79, "0000:13:00.0"): None}
    counted = Counter[tuple[int, str]]()
    for event in told:
        counted[event.code, event.pci_address] += event.count
    assert sum(counted.values()) == FLOOD
    assert all(abs(count - FLOOD / 40) <= 1 for (code, _), count in counted.items() if code != 79)
    assert len(told) <= 2 * kernel_log.EVENTS_A_VISIT * len(flooded)


def test_a_storm_that_goes_on_is_told_at_each_visit_in_a_few_events(root: Path) -> None:
    (root / "dev/kmsg").write_text("")
    collector = KernelLog(root)
    told: list[list[Xid]] = []
    for visit in range(20):
        with (root / "dev/kmsg").open("a") as file:
            file.writelines(xid(100 * visit + n, 13, GPUS[n % 8]) for n in range(800))
        told.append(xids(collector.collect(Visit(at=NOW + visit))))
    assert all(sum(event.count for event in events) == 800 for events in told)
    assert all(8 <= len(events) <= 16 for events in told[1:])
    assert xids(collector.collect(Visit(at=NOW))) == []
    with (root / "dev/kmsg").open("a") as file:
        file.writelines(xid(n, 13, GPUS[0]) for n in range(20))
    assert len(xids(collector.collect(Visit(at=NOW)))) == 20, "after a quiet visit, each line is told again"
    collector.close()


def test_a_flood_takes_little_memory(root: Path) -> None:
    (root / "dev/kmsg").write_text(flood(FLOOD)[: 1 << 20])
    collector = KernelLog(root)
    tracemalloc.start()
    collector.collect(Visit(at=NOW))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    collector.close()
    assert peak < 16 << 20  # of which the events that are kept, 4000 of a few hundred bytes each


def judged(kernel: tuple[Xid, ...]) -> Report:
    gpus = tuple(Gpu(uuid=reports.uuid(i), index=i, pci_address=address) for i, address in enumerate(GPUS))
    seen = (Source.KERNEL_LOG, Source.NVML)
    (report,) = watch([Snapshot(at=NOW, gpus=gpus, kernel=kernel, seen=seen)], RULES, 3600.0)
    return report


def test_the_verdict_on_a_flood_is_right_short_and_cheap_to_keep(flooded: list[Reading], tmp_path: Path) -> None:
    report = judged(tuple(event for reading in flooded for event in xids(reading)))
    assert report.findings[0].finding.failure_mode == "gpu-lost"
    assert reports.uuid(3) in report.findings[0].finding.subject.gpus
    tally = Tally()
    tally.add(report)
    assert len(tally.xids) == len(CODES) * len(GPUS) + 1
    assert sum(tally.xids.values()) == FLOOD
    screen = console.render(report, Terminal())
    assert len(screen.splitlines()) < 200
    assert len(json_report.render(report)) < 200_000
    shelf = Shelf(tmp_path / "state", Bounds(max_bytes=64 << 20, max_age_seconds=86400.0))
    shelf.write(Entry(snapshot=report.snapshot, findings=report.findings), 1)
    shelf.close()
    (segment,) = Folder(tmp_path / "state").segments()
    assert segment.stat().st_size < 500_000 * len(flooded)


class Kmsg:
    """A kernel log buffer: a record a read, and EPIPE where the reader was overtaken."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (root / "dev/kmsg").symlink_to("/dev/null")  # a device, as the real one
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs = theirs
        theirs.setblocking(False)
        self.is_overtaken = False
        self._read = os.read
        monkeypatch.setattr(kernel_log.os, "read", self.read)

    def open(self, path: str, flags: int) -> int:
        return os.dup(self.theirs.fileno())

    def read(self, file: int, size: int) -> bytes:
        if self.is_overtaken:
            self.is_overtaken = False
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        return self._read(file, size)

    def say(self, *numbers: int) -> None:
        for number in numbers:
            self.ours.send(xid(number, 13, GPUS[0]).encode())


@pytest.fixture
def kmsg(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kmsg]:
    kmsg = Kmsg(root, monkeypatch)
    yield kmsg
    kmsg.ours.close()
    kmsg.theirs.close()


def test_records_that_the_kernel_overwrote_are_told_and_the_rest_is_read(root: Path, kmsg: Kmsg) -> None:
    collector = KernelLog(root, open_file=kmsg.open)
    kmsg.say(500, 501)  # what was overwritten before the program began is nobody's loss
    assert collector.collect(Visit(at=NOW)).unseen == ()
    kmsg.is_overtaken = True
    kmsg.say(900, 901)
    reading = collector.collect(Visit(at=NOW))
    assert [event.where for event in xids(reading)] == ["/dev/kmsg:900", "/dev/kmsg:901"]
    assert [str(unseen.why) for unseen in reading.unseen] == [
        "passed over: records that the kernel overwrote before they were read: 398"
    ]
    assert collector.collect(Visit(at=NOW)).unseen == ()
    collector.close()


def test_what_was_overwritten_while_the_daemon_was_away_is_told(root: Path, kmsg: Kmsg) -> None:
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    (root / "proc/sys/kernel/random/boot_id").write_text("b0\n")
    collector = KernelLog(root, open_file=kmsg.open)
    kmsg.say(1, 2)
    positions = collector.collect(Visit(at=NOW)).fields["positions"]
    collector.close()
    kmsg.say(2, 5)
    again = KernelLog(root, open_file=kmsg.open, positions=positions)
    reading = again.collect(Visit(at=NOW))
    again.close()
    assert [event.where for event in xids(reading)] == ["/dev/kmsg:5"]
    assert "overwrote before they were read: 2" in reading.unseen[0].why.detail


def test_more_records_than_a_visit_has_time_for_wait_for_the_next(
    root: Path, kmsg: Kmsg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_log, "READ_SECONDS", 0.0)
    monkeypatch.setattr(kernel_log, "BATCH_RECORDS", 3)
    collector = KernelLog(root, open_file=kmsg.open)
    kmsg.say(*range(7))
    readings = until_read(collector)
    collector.close()
    assert [len(xids(reading)) for reading in readings] == [3, 3, 1]
    assert readings[0].unseen[0].why.detail == kernel_log.LAGS


def test_a_recording_of_before_counts_is_read_as_ones() -> None:
    line = b'{"type":"xid","text":"t","where":"w","code":13,"pci_address":"0000:10:00.0"}'
    assert msgspec.json.decode(line, type=Xid).count == 1
