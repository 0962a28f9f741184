"""A log that is rotated in every way: each line is read exactly once, save those that no file holds any more."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from doctor.collectors.following import OUTLIVES_SECONDS, FollowedFile


class Site:
    """A log, whoever writes it, whoever rotates it, and gpu-doctor, which looks at it now and then."""

    def __init__(self, folder: Path) -> None:
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


def numbers(data: bytes) -> list[int]:
    return [int(line.split()[0]) for line in data.splitlines() if line[:1].isdigit()]


OPERATIONS = ("write", "visit", "rename", "reopen", "copytruncate", "copy", "truncate", "compress", "begin_a_line")


def played(folder: Path, operations: list[str]) -> Site:
    site = Site(folder)
    for operation in operations:
        getattr(site, operation)()
    site.end()
    return site


@given(st.lists(st.sampled_from((*OPERATIONS, "write", "visit", "stop")), max_size=25))
@example(["write", "visit", "write", "rename", "write", "visit", "write", "visit", "reopen", "write"])
@example(["write", "visit", "write", "copytruncate", "write", "copytruncate", "write"])
@example(["write", "visit", "rename", "reopen", "write", "rename", "compress", "reopen", "write"])
@example(["write", "copy", "write", "visit", "truncate", "write", "visit", "copytruncate"])
@example(["write", "stop", "write", "copytruncate", "write", "copytruncate", "compress", "write", "visit"])
def test_every_line_that_a_file_still_holds_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, operations: list[str]
) -> None:
    site = played(tmp_path_factory.mktemp("site"), operations)
    assert sorted(site.seen) == sorted(set(range(site.number)) - site.lost)
