"""Recordings: what was written is replayed unchanged; what is damaged is refused in one sentence."""

from __future__ import annotations

import contextlib
import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor.feeds import recording
from doctor.snapshot import (
    Absent,
    Clocks,
    Engine,
    EngineEvent,
    Gpu,
    GpuPair,
    Snapshot,
    Source,
    Thermal,
    Unseen,
    Why,
    Xid,
)

VISITS = (
    Snapshot(
        at=1000.0,
        seen=(Source.NVML,),
        unseen=(Unseen(Source.KERNEL_LOG, Absent(Why.NO_PERMISSION, "needs CAP_SYSLOG")),),
        gpus=(
            Gpu(
                uuid="GPU-1",
                index=0,
                thermal=Thermal(gpu_celsius=41.0, memory_celsius=Absent(Why.NOT_SUPPORTED)),
                clocks=Clocks(event_reasons=("idle",)),
                compute_capability=(9, 0),
            ),
        ),
        pairs=(GpuPair(first="GPU-1", second="GPU-2", nvlinks=18),),
        kernel=(Xid(text="x", where="/dev/kmsg:1", code=79, pci_address="0000:18:00.0"),),
        engines=(Engine(pid=1, started_at=2.5, kind="vllm", environment={"NCCL_DEBUG": "WARN"}),),
    ),
    Snapshot(at=1001.0, engine_events=(EngineEvent(signal="stats", text="…", where="l:1", facts={"running": 2}),)),
)


def recorded(path: Path, visits: tuple[Snapshot, ...] = VISITS) -> Path:
    for _ in recording.write(visits, path, "test"):
        pass
    return path


def test_a_recording_replays_what_was_written(tmp_path: Path) -> None:
    assert tuple(recording.read(recorded(tmp_path / "a.rec"))) == VISITS


def test_the_same_visits_give_the_same_bytes(tmp_path: Path) -> None:
    assert recorded(tmp_path / "a").read_bytes() == recorded(tmp_path / "b").read_bytes()


def test_a_recording_may_be_unpacked_and_still_read(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(recorded(tmp_path / "a.rec").read_bytes()))
    assert tuple(recording.read(plain)) == VISITS


def test_each_visit_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    for number, _ in enumerate(recording.write(VISITS, path, "test"), start=1):
        assert len(list(recording.read(path))) == number


def test_a_torn_recording_gives_its_whole_visits_and_says_where_it_ends(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.rec")
    path.write_bytes(path.read_bytes()[:-20])
    visits = recording.read(path)
    assert next(visits) == VISITS[0]
    with pytest.raises(recording.RecordingError, match=r"a\.rec: line 3: .*cut off"):
        next(visits)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello\n", "line 1: not a recording"),
        (b'{"recording":99,"program":"x"}\n', "format 99"),
        (b'{"recording":1,"program":"x"}\n{"at":"noon"}\n', "line 2: not a snapshot"),
        (b"\x1f\x8b\x00garbage", "can't be read"),
        (b"\xff\xfe\x00\x01", "line 1: not a recording"),
    ],
)
def test_what_is_no_recording_is_refused_with_file_and_place(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.rec"
    path.write_bytes(content)
    with pytest.raises(recording.RecordingError, match=says) as error:
        list(recording.read(path))
    assert str(error.value).startswith(str(path))


def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(recording.RecordingError, match="No such file"):
        list(recording.read(tmp_path / "none.rec"))


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_raise_anything_but_recording_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.rec"
    path.write_bytes(content)
    with contextlib.suppress(recording.RecordingError):
        list(recording.read(path))


@given(st.integers(min_value=0, max_value=1200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recording_cut_anywhere_never_gives_a_visit_that_was_not_written(tmp_path: Path, cut: int) -> None:
    path = recorded(tmp_path / "a.rec")
    path.write_bytes(path.read_bytes()[:cut])
    got: list[Snapshot] = []
    with contextlib.suppress(recording.RecordingError):
        got.extend(recording.read(path))
    assert tuple(got) == VISITS[: len(got)]
