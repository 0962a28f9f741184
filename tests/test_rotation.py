"""A log that is rotated in every way: each line is read exactly once, save those that no file holds any more."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
import torrent
from hypothesis import example, given
from hypothesis import strategies as st

from doctor.collectors import engine_log, following
from doctor.collectors.collector import Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.following import OUTLIVES_SECONDS, FollowedFile
from doctor.collectors.generation import CHUNK_BYTES, rotated


class Site:
    """A log, whoever writes it, whoever rotates it, and gpu-doctor, which looks at it now and then."""

    def __init__(self, folder: Path, banner: bytes) -> None:
        self.banner = banner
        self.log = folder / "vllm.log"
        self.log.touch()
        self.writer = self.log.open("ab", buffering=0)
        self.now = 1_000_000.0
        self.number = 0
        self.is_in_a_line = False
        self.seen: list[int] = []
        self.lost: set[int] = set()
        """Lines that stood in a file behind the end of its copy when it was truncated, and were not seen till then."""
        self.may_truncate = False
        self.is_copied = 0
        self.place = ""
        self.followed = 0
        """The inode that bore the name at the last visit."""
        self.file: FollowedFile | None = self.follower()
        self.visit()

    def follower(self) -> FollowedFile:
        return FollowedFile(self.log, clock=lambda: self.now)

    def tick(self, path: Path | int) -> None:
        """Give the file a stamp of its own: a real one may be that of the file before, for some milliseconds."""
        self.now += 1.0
        os.utime(path, (self.now, self.now))

    def write(self) -> None:
        self.end_a_line()
        if not os.fstat(self.writer.fileno()).st_size:
            self.writer.write(self.banner)
        for _ in range(3):
            self.writer.write(b"%d %s\n" % (self.number, (b"%d." % self.number * 50)[: self.number * 37 % 150]))
            self.number += 1
        self.tick(self.writer.fileno())

    def begin_a_line(self) -> None:
        self.end_a_line()
        self.writer.write(b"%d half" % self.number)
        self.is_in_a_line = True
        self.number += 1
        self.tick(self.writer.fileno())

    def end_a_line(self) -> None:
        if self.is_in_a_line:
            self.writer.write(b" and the other half of %d\n" % (self.number - 1))
            self.tick(self.writer.fileno())
            self.is_in_a_line = False

    def shift(self) -> None:
        for n in range(30, 0, -1):
            for end in ("", ".gz"):
                old = self.log.with_name(f"vllm.log.{n}{end}")
                if old.exists():
                    old.rename(self.log.with_name(f"vllm.log.{n + 1}{end}"))

    def rename(self) -> None:
        self.truncate()  # a rotation that has begun is ended first
        self.shift()
        self.log.rename(self.log.with_name("vllm.log.1"))
        self.log.touch()
        self.tick(self.log)

    def reopen(self) -> None:
        self.writer.close()
        self.writer = self.log.open("ab", buffering=0)

    def copy(self) -> None:
        if self.log.stat().st_size and not self.may_truncate:
            self.shift()
            copy = self.log.with_name("vllm.log.1")
            shutil.copyfile(self.log, copy)
            self.tick(copy)
            self.may_truncate, self.is_copied = True, copy.stat().st_size

    def truncate(self) -> None:
        if self.may_truncate:
            behind = self.log.read_bytes()[self.is_copied :]
            self.lost |= set(numbers(behind)) - set(self.seen)
            os.truncate(self.log, 0)
            self.tick(self.log)
            self.may_truncate = False

    def copytruncate(self) -> None:
        self.copy()
        self.truncate()

    def compress(self) -> None:
        if os.fstat(self.writer.fileno()).st_ino != self.followed:
            self.reopen()  # or its lines would go into a file that nobody holds
        for n in range(30, 0, -1):
            plain = self.log.with_name(f"vllm.log.{n}")
            if plain.exists() and not self.may_truncate:
                state = plain.stat()
                packed = plain.with_name(f"{plain.name}.gz")
                packed.write_bytes(gzip.compress(plain.read_bytes()))
                os.utime(packed, ns=(state.st_mtime_ns, state.st_mtime_ns))  # as gzip and logrotate do
                plain.unlink()

    def visit(self) -> None:
        if self.file is None:
            self.file = self.follower()
            self.file.go_on([self.place])
        for piece in self.file.pieces():
            self.seen += numbers(piece.data)
        self.followed = self.log.stat().st_ino

    def stop(self) -> None:
        """End gpu-doctor; the next visit is one of its next life.

        It has read enough of the file to know it again, and holds no older one any more.
        """
        if self.file is not None:
            self.truncate()
            self.end_a_line()
            self.reopen()
            self.write()
            self.visit()
            self.now += OUTLIVES_SECONDS + 1
            self.visit()
            self.place = self.file.place
            self.file.close()
            self.file, self.followed = None, 0

    def end(self) -> None:
        self.reopen()
        self.write()
        self.visit()
        self.now += OUTLIVES_SECONDS + 1
        self.visit()
        self.visit()
        assert self.file is not None
        self.file.close()
        self.writer.close()


ALIKE = b'INFO:     10.0.0.5:53211 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n' * 80
"""How any log may begin that one busy proxy writes through one connection."""


def numbers(data: bytes) -> list[int]:
    return [int(line.split()[0]) for line in data.splitlines() if line[:1].isdigit()]


OPERATIONS = ("write", "visit", "rename", "reopen", "copytruncate", "copy", "truncate", "compress", "begin_a_line")


def played(folder: Path, operations: list[str], banner: bytes = b"") -> Site:
    site = Site(folder, banner)
    for operation in operations:
        getattr(site, operation)()
    site.end()
    return site


@given(st.lists(st.sampled_from((*OPERATIONS, "write", "visit", "stop")), max_size=25), st.sampled_from((b"", ALIKE)))
@example(["write", "visit", "write", "rename", "write", "visit", "write", "visit", "reopen", "write"], ALIKE)
@example(["write", "visit", "write", "copytruncate", "write", "copytruncate", "write"], ALIKE)
@example(["write", "visit", "rename", "reopen", "write", "rename", "compress", "reopen", "write"], ALIKE)
@example(["write", "copy", "write", "visit", "truncate", "write", "visit", "copytruncate"], ALIKE)
@example(["write", "stop", "write", "copytruncate", "write", "copytruncate", "compress", "write", "visit"], ALIKE)
def test_every_line_that_a_file_still_holds_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, operations: list[str], banner: bytes
) -> None:
    site = played(tmp_path_factory.mktemp("site"), operations, banner)
    assert sorted(site.seen) == sorted(set(range(site.number)) - site.lost)


def test_of_a_torrent_that_is_rotated_every_matching_line_is_told_once(tmp_path: Path) -> None:
    told = torrent.run(tmp_path, seconds=1.5, mb_per_second=20)
    assert told.rotations
    assert len(told.seen) == len(set(told.seen))
    assert len(told.held - set(told.seen)) <= told.dropped
    assert len(told.held | set(told.seen)) <= told.written


def test_a_backlog_is_said_and_caught_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "vllm.log"
    log.touch()
    logs = EngineLogs(tmp_path, logs=("/vllm.log",))
    logs.collect(Visit(at=0.0))
    for n in range(3):
        with log.open("ab") as file:
            file.write(b"INFO:     served it well\n" * (CHUNK_BYTES // 12) + torrent.FATAL.format(n).encode())
        log.rename(tmp_path / f"vllm.log.{9 - n}")
        log.touch()
        os.utime(tmp_path / f"vllm.log.{9 - n}", (n, n))
    monkeypatch.setattr(engine_log, "READ_SECONDS", 0.0)
    readings = [logs.collect(Visit(at=0.0)) for _ in range(10)]
    logs.close()
    told = [event.text for reading in readings for event in reading.fields["engine_events"]]
    assert told == [f"EngineCore encountered a fatal error. #{n}" for n in range(3)]
    late = [unseen for reading in readings for unseen in reading.unseen]
    assert [str(unseen.why) for unseen in late][:1] == [
        "passed over: written faster than it is read: 6 MB wait for the next visits"
    ]
    assert late[0].what == "end of /vllm.log"
    assert readings[-1].unseen == ()


def test_of_more_than_may_wait_the_oldest_is_given_up_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "vllm.log"
    log.touch()
    logs = EngineLogs(tmp_path, logs=("/vllm.log",))
    logs.collect(Visit(at=0.0))
    for n in range(3):
        log.write_bytes(b"INFO:     served it well\n" * 40_000 + torrent.FATAL.format(n).encode())
        log.rename(tmp_path / f"vllm.log.{9 - n}")
        os.utime(tmp_path / f"vllm.log.{9 - n}", (n, n))
    log.write_bytes(torrent.FATAL.format(3).encode())
    monkeypatch.setattr(following, "BACKLOG_BYTES", 1_500_000)
    reading = logs.collect(Visit(at=0.0))
    again = logs.collect(Visit(at=0.0))
    logs.close()
    told = [event.text.rpartition("#")[2] for event in reading.fields["engine_events"]]
    assert told == ["1", "2", "3"]
    assert [(str(unseen.why), unseen.what) for unseen in reading.unseen] == [
        ("passed over: more waited than may wait: the oldest 2 MB are not read", "part of /vllm.log")
    ]
    assert again.unseen == ()


def test_a_log_that_lagged_gets_what_the_others_leave_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("busy.log", "quiet.log"):
        (tmp_path / name).touch()
    logs = EngineLogs(tmp_path, logs=("/busy.log", "/quiet.log"))
    logs.collect(Visit(at=0.0))
    (tmp_path / "busy.log").write_bytes(b"INFO:     served it well\n" * 200_000)
    monkeypatch.setattr(engine_log, "READ_SECONDS", 0.0)
    assert [unseen.what for unseen in logs.collect(Visit(at=0.0)).unseen] == ["end of /busy.log"]
    monkeypatch.setattr(engine_log, "READ_SECONDS", 60.0)
    reading = logs.collect(Visit(at=0.0))
    assert reading.unseen == ()
    assert [state.log for state in reading.fields["logs"]] == ["/busy.log", "/quiet.log"]
    logs.close()


def test_a_traceback_that_a_rotation_cuts_is_told_whole(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.touch()
    logs = EngineLogs(tmp_path, logs=("/vllm.log",))
    logs.collect(Visit(at=0.0))
    with log.open("ab") as file:
        file.write(b'Traceback (most recent call last):\n  File "a.py", line 1, in f\n')
        file.flush()
        logs.collect(Visit(at=0.0))
        file.write(b"ValueError: it is none\n")
    shutil.copyfile(log, tmp_path / "vllm.log.1")
    os.truncate(log, 0)
    reading = logs.collect(Visit(at=0.0))
    logs.close()
    assert [(event.signal, event.where) for event in reading.fields["engine_events"]] == [("exception", "vllm.log:3")]


def test_what_a_log_holds_in_fifos_and_folders_beside_it_is_left_alone(tmp_path: Path) -> None:
    site = Site(tmp_path, b"")
    os.mkfifo(tmp_path / "vllm.log.1")
    (tmp_path / "vllm.log.2").mkdir()
    site.write()
    site.copytruncate()
    site.end()
    assert site.seen == list(range(6))


@given(
    st.lists(st.one_of(st.integers(-9, 1 << 70), st.text(max_size=4)).map(str), min_size=5, max_size=5).map(":".join)
)
def test_any_place_is_passed_over(tmp_path_factory: pytest.TempPathFactory, place: str) -> None:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    log.write_bytes(b"one\n")
    file = FollowedFile(log)
    file.go_on([place])
    assert b"".join(piece.data for piece in file.pieces()) == b"one\n"
    file.close()


def test_the_descriptor_of_a_running_engine_is_followed_beside_its_real_name(tmp_path: Path) -> None:
    site = Site(tmp_path, b"")
    site.file.close()  # type: ignore[union-attr]
    descriptor = Path(f"/proc/self/fd/{site.writer.fileno()}")
    site.file = FollowedFile(descriptor, beside=site.log, clock=lambda: site.now)
    site.visit()
    site.write()
    site.copytruncate()
    site.write()
    site.visit()
    assert site.seen == list(range(6))
    site.file.close()
    site.writer.close()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("vllm.log.1", True), ("vllm.log.12.gz", True), ("vllm.log-20261121", True), ("vllm.log-20261121-1795246500.gz", True),
        ("vllm.log.2026-11-21_02-10", True), ("vllm-20261121.log", True), ("vllm.2026-11-21.log.gz", True),
        ("vllm.log", False), ("vllm-8001.log", False), ("vllm-1.log", False), ("vllm.log.bak", False), ("vllm.log.old", False),
        ("vllm.log.1.swp", False), ("other.log.1", False), ("vllm.log.gz", False), ("vllm2.log.1", False),
    ],
)  # fmt: skip
def test_rotated_files_are_known_by_their_names(tmp_path: Path, name: str, is_one: bool) -> None:
    (tmp_path / name).touch()
    assert rotated(tmp_path / "vllm.log") == ([tmp_path / name] if is_one else [])
