"""A restarted daemon reads its logs on from where it stopped: no line is lost, and none is told twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.collectors.collector import Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.following import FollowedFile
from doctor.collectors.kernel_log import KernelLog
from doctor.snapshot import Position, Xid

NOW = 1_770_000_000.0


def read(file: FollowedFile) -> bytes:
    return b"".join(piece.data for piece in file.pieces())


def resumed(path: Path, place: str) -> FollowedFile:
    file = FollowedFile(path)
    file.go_on([place])
    return file


def stopped(path: Path) -> str:
    file = FollowedFile(path)
    read(file)
    place = file.place
    file.close()
    return place


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "vllm.log"
    path.write_bytes(b"one\ntwo\nthr")
    return path


def test_lines_written_meanwhile_are_read_and_the_unfinished_one_whole(log: Path) -> None:
    place = stopped(log)
    with log.open("ab") as file:
        file.write(b"ee\nfour\n")
    (piece,) = resumed(log, place).pieces()
    assert (piece.data, piece.line, piece.joins) == (b"three\nfour\n", 3, False)


def test_a_log_rotated_meanwhile_is_read_to_its_end_before_the_new_one(log: Path) -> None:
    place = stopped(log)
    log.rename(log.with_name("vllm.log.1"))
    with log.with_name("vllm.log.1").open("ab") as file:
        file.write(b"ee\n")
    log.write_bytes(b"new\n")
    assert read(resumed(log, place)) == b"three\nnew\n"


def test_a_log_truncated_and_grown_past_the_place_meanwhile_is_read_anew(log: Path) -> None:
    place = stopped(log)
    log.write_bytes(b"another life\nof the engine\n")
    assert read(resumed(log, place)) == log.read_bytes()


def test_nothing_but_a_file_is_opened_in_search_of_a_rotated_log(log: Path) -> None:
    place = stopped(log)
    log.unlink()
    os.mkfifo(log.with_name("vllm.log.1"))
    with pytest.raises(FileNotFoundError):
        read(resumed(log, place))


@given(st.text(max_size=40))
def test_a_place_that_is_none_is_passed_over(tmp_path_factory: pytest.TempPathFactory, place: str) -> None:
    path = tmp_path_factory.mktemp("log") / "vllm.log"
    path.write_bytes(b"one\n")
    assert read(resumed(path, place)) == b"one\n"


def kernel_root(tmp_path: Path, *numbers: int) -> Path:
    boot = tmp_path / "proc/sys/kernel/random"
    boot.mkdir(parents=True, exist_ok=True)
    (boot / "boot_id").write_text("b0\n")
    (tmp_path / "dev").mkdir(exist_ok=True)
    with (tmp_path / "dev/kmsg").open("a") as file:
        for number in numbers:
            file.write(f"3,{number},{number}000000,-;NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus.\n")
    return tmp_path


def xids(log: KernelLog) -> tuple[list[str], tuple[Position, ...]]:
    fields = log.collect(Visit(at=NOW)).fields
    log.close()
    return [event.where for event in fields["kernel"] if isinstance(event, Xid)], fields["positions"]


def test_the_kernel_log_is_not_told_twice_over_a_restart(tmp_path: Path) -> None:
    told, positions = xids(KernelLog(kernel_root(tmp_path, 1, 2)))
    assert told == ["/dev/kmsg:1", "/dev/kmsg:2"]
    root = kernel_root(tmp_path, 3)
    assert xids(KernelLog(root, positions=positions))[0] == ["/dev/kmsg:3"]


def test_without_a_position_the_kernel_log_is_told_from_its_beginning(tmp_path: Path) -> None:
    root = kernel_root(tmp_path, 1, 2)
    assert len(xids(KernelLog(root))[0]) == len(xids(KernelLog(root))[0]) == 2


def test_an_engines_log_goes_on_over_a_restart(tmp_path: Path) -> None:
    line = "(EngineCore_DP0 pid=7) ERROR 02-02 02:40:0{} [core.py:1] torch.OutOfMemoryError: CUDA out of memory.\n"
    path = tmp_path / "vllm.log"
    path.write_text(line.format(1))
    logs = EngineLogs(tmp_path, logs=("/vllm.log",))
    first = logs.collect(Visit(at=NOW)).fields
    logs.close()
    with path.open("a") as file:
        file.write(line.format(2))
    then = EngineLogs(tmp_path, logs=("/vllm.log",), positions=first["positions"]).collect(Visit(at=NOW)).fields
    assert [event.where for event in (*first["engine_events"], *then["engine_events"])] == ["vllm.log:1", "vllm.log:2"]
    assert then["logs"][0].lines == 1
