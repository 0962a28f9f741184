"""The flight recorder: what was acknowledged is read back, whatever happens to the writer, the disk or the clock."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import msgspec
import nodes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.recorder import flight
from doctor.recorder.flight import FlightRecorder
from doctor.recorder.folder import Bounds, Folder, RecorderError, Shelf
from doctor.recorder.patch import difference, patched
from doctor.recorder.segment import GROUP_VISITS, Entry
from doctor.report import ReportedFinding
from doctor.rule import Finding, Severity
from doctor.snapshot import Node, Snapshot, Why

BOUNDS = Bounds(max_bytes=64 << 20, max_age_seconds=7 * 86400.0)
VISITS = nodes.healthy("hgx-h100-8", visits=8, every=10.0)
SMALL = nodes.healthy("h100-pcie-4", visits=130, every=10.0)


def entries(visits: Sequence[Snapshot]) -> list[Entry]:
    return [Entry(snapshot=visit, findings=(), counted=str(n).encode()) for n, visit in enumerate(visits)]


def written(directory: Path, visits: Sequence[Snapshot], bounds: Bounds | None = None) -> Path:
    shelf = Shelf(directory, bounds or BOUNDS)
    last, _ = Folder(directory).tail(0) if directory.exists() else (0, ())
    for number, entry in enumerate(entries(visits), last + 1):
        shelf.write(entry, number, is_start=number == last + 1)
    shelf.close()
    return directory


def snapshots(directory: Path) -> list[Snapshot]:
    return [entry.snapshot for entry in Folder(directory).entries()]


def in_time(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_a_patch_makes_the_one_visit_into_the_other_to_the_byte() -> None:
    for one, other in pairwise(VISITS):
        patch = msgspec.json.decode(msgspec.json.encode(difference(one, other)))
        assert msgspec.json.encode(patched(one, patch)) == msgspec.json.encode(other)


def test_what_a_patch_leaves_alone_is_the_same_object() -> None:
    one, other = VISITS[:2]
    made = patched(one, msgspec.json.decode(msgspec.json.encode(difference(one, other))))
    assert made.gpus[0].links is one.gpus[0].links
    assert made.host is one.host


def test_a_value_that_vanishes_or_changes_its_kind_is_told() -> None:
    gpu = VISITS[0].gpus[0]
    blind = msgspec.structs.replace(
        VISITS[0], gpus=(msgspec.structs.replace(gpu, links=nodes.Absent(Why.LOST)), *VISITS[0].gpus[2:]), engines=()
    )
    for one, other in ((VISITS[0], blind), (blind, VISITS[0])):
        patch = msgspec.json.decode(msgspec.json.encode(difference(one, other)))
        assert patched(one, patch) == other


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["at", "gpus", "0", "x"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["at", "gpus", "host", "kernel", "unheard-of"]), JSON))
def test_a_patch_that_is_none_is_refused_in_one_way(patch: dict[str, object]) -> None:
    with suppress(msgspec.ValidationError):
        assert isinstance(patched(VISITS[0], patch), Snapshot)


def test_what_was_written_is_read_back_to_the_byte(tmp_path: Path) -> None:
    directory = written(tmp_path / "state", [*VISITS, *SMALL])
    assert [msgspec.json.encode(s) for s in snapshots(directory)] == [msgspec.json.encode(s) for s in [*VISITS, *SMALL]]


def test_nobody_but_the_owner_may_read_it(tmp_path: Path) -> None:
    directory = written(tmp_path / "state", SMALL[:2])
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_two_daemons_do_not_share_a_folder(tmp_path: Path) -> None:
    one = Shelf(tmp_path, BOUNDS)
    one.take()
    with pytest.raises(RecorderError, match="another gpu-doctor daemon records here"):
        Shelf(tmp_path, BOUNDS).take()
    one.close()
    other = Shelf(tmp_path, BOUNDS)
    other.take()
    other.close()


def test_findings_are_told_when_they_change_and_with_every_whole_visit(tmp_path: Path) -> None:
    lost = ReportedFinding(
        finding=Finding(summary="GPU 3 is gone.", evidence=(), failure_mode="gpu-lost", severity=Severity.CRITICAL)
    )
    shelf = Shelf(tmp_path, BOUNDS)
    for number, visit in enumerate(SMALL, 1):
        shelf.write(Entry(snapshot=visit, findings=(lost,) if number >= 10 else ()), number)
    shelf.close()
    told = {n: e.findings for n, e in enumerate(Folder(tmp_path).entries(), 1) if e.findings is not None}
    assert told == {1: (), 10: (lost,), 1 + GROUP_VISITS: (lost,), 1 + 2 * GROUP_VISITS: (lost,)}


WRITER = """
import os
import sys
from pathlib import Path
from test_recorder import BOUNDS, SMALL, entries
from doctor.recorder.folder import Folder, Shelf

for _ in range(100):
    if child := os.fork():
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    print("pid", os.getpid(), flush=True)
    shelf = Shelf(Path(sys.argv[1]), BOUNDS)
    shelf.take()
    first = Folder(shelf.directory).tail(0)[0] + 1
    for number, entry in enumerate(entries(SMALL), first):
        shelf.write(entry, number, is_start=number == first)
        print(number, flush=True)
    os._exit(0)
"""


def test_a_writer_killed_a_hundred_times_loses_nothing_that_it_had_acknowledged(tmp_path: Path) -> None:
    acknowledged: set[int] = set()
    forks = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", "."])}
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root, env=forks
    ) as writer:
        assert writer.stdout is not None
        child, seen, deaths = 0, 0, 0
        for line in writer.stdout:
            if line.startswith("pid"):
                child, seen = int(line.split()[1]), 0
            elif line.startswith("dead"):
                deaths += 1
            else:
                acknowledged.add(int(line))
                seen += 1
                if seen == 1 + deaths % 7:
                    os.kill(child, signal.SIGKILL)
    assert deaths == 100
    folder = Folder(tmp_path)
    last, _ = folder.tail(0)
    read = sum(1 for _ in folder.entries())
    assert read >= len(acknowledged) >= 100
    assert last >= max(acknowledged)
    assert all(unread.why.endswith("broken off") for unread in folder.unread)


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = written(tmp_path_factory.mktemp("whole"), SMALL)
    (path,) = Folder(directory).segments()
    return path.read_bytes()


@given(cut=st.integers(0, 10**9))
def test_a_segment_cut_off_anywhere_costs_at_most_its_last_record(
    segment: bytes, tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    size = cut % len(segment)
    (directory / "flight-000000000001.seg").write_bytes(segment[:size])
    read = snapshots(directory)
    assert read == list(SMALL[: len(read)])
    (directory / "flight-000000000001.seg").write_bytes(segment)
    assert len(read) >= int(len(SMALL) * size / len(segment)) - GROUP_VISITS


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 255)), min_size=1, max_size=3))
def test_damaged_bytes_cost_what_they_touch_and_are_told(
    segment: bytes, tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(segment)
    for place, flip in flips:
        data[place % len(data)] ^= flip
    directory = tmp_path_factory.mktemp("flipped")
    (directory / "flight-000000000001.seg").write_bytes(bytes(data))
    folder = Folder(directory)
    read = [entry.snapshot for entry in folder.entries()]
    assert all(snapshot in SMALL for snapshot in read)
    assert [s.at for s in read] == sorted(s.at for s in read)
    assert len(read) >= len(SMALL) - len(flips) * GROUP_VISITS
    assert bytes(data) == segment or folder.unread


@given(st.binary(max_size=400))
def test_any_bytes_are_read_without_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("any")
    (directory / "flight-000000000001.seg").write_bytes(data)
    folder = Folder(directory)
    assert list(folder.entries()) == []
    assert bool(folder.unread) is bool(data)


def test_files_that_are_no_segments_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "flight-1.seg.bak").write_bytes(b"")
    (tmp_path / "flight-000000000000.seg").write_bytes(b"")
    assert snapshots(written(tmp_path, SMALL[:3])) == list(SMALL[:3])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RecorderError, match="nowhere: can't be read: No such file"):
        list(Folder(tmp_path / "nowhere").entries())


def test_the_folder_stays_within_its_bytes_and_the_newest_stays(tmp_path: Path) -> None:
    bounds = Bounds(max_bytes=1 << 20, max_age_seconds=86400.0)
    for _ in range(6):
        written(tmp_path, VISITS * 12, bounds)
    assert sum(path.stat().st_size for path in Folder(tmp_path).segments()) <= bounds.max_bytes
    assert snapshots(tmp_path)[-1] == VISITS[-1]


def test_a_clock_that_jumps_ahead_costs_one_segment_at_most(tmp_path: Path) -> None:
    for _ in range(3):
        written(tmp_path, SMALL[:2])
    ahead = [msgspec.structs.replace(SMALL[0], at=time.time() + 10 * 365 * 86400.0)]
    written(tmp_path, ahead)
    assert len(Folder(tmp_path).segments()) == 3


def test_visits_come_in_the_order_in_which_they_were_made_whatever_the_clock_did(tmp_path: Path) -> None:
    back = [msgspec.structs.replace(visit, at=visit.at - 3600.0) for visit in SMALL[3:6]]
    written(tmp_path, [*SMALL[:3], *back, *SMALL[6:8]])
    assert snapshots(tmp_path) == [*SMALL[:3], *back, *SMALL[6:8]]


def test_visits_are_read_while_they_are_written(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, BOUNDS)
    for number, entry in enumerate(entries(SMALL[:5]), 1):
        shelf.write(entry, number)
        assert len(snapshots(tmp_path)) == number
    shelf.close()


def test_the_tail_is_that_of_the_last_seconds(tmp_path: Path) -> None:
    written(tmp_path, SMALL[:100])
    written(tmp_path, SMALL[100:])
    last, past = Folder(tmp_path).tail(600.0)
    assert last == len(SMALL)
    assert [entry.snapshot for entry in past] == list(SMALL[GROUP_VISITS:])  # from a whole one on
    assert past[-1].counted == b"29"


@pytest.mark.parametrize("step", [-10 * 86400.0, -3600.0, 30 * 86400.0])
def test_a_clock_that_was_set_does_not_swell_the_tail(tmp_path: Path, step: float) -> None:
    def at(begin: float, count: int) -> list[Snapshot]:
        return [msgspec.structs.replace(SMALL[0], at=begin + 600.0 * n) for n in range(count)]

    began = SMALL[0].at
    written(tmp_path, at(began, 20))
    written(tmp_path, [*at(began + 12_000.0, 20), *at(began + 24_000.0 + step, 4)])
    last, past = Folder(tmp_path).tail(3600.0)
    assert last == 44
    assert 4 <= len(past) <= 44 - 20
    assert past[-1].snapshot.at == began + 24_000.0 + step + 1800.0


def test_old_segments_go_first_whatever_the_clock_says(tmp_path: Path) -> None:
    bounds = Bounds(max_bytes=100 << 10, max_age_seconds=86400.0)
    for life in range(4):
        ahead = -life * 90 * 86400.0  # each life's clock stands further back
        written(tmp_path, [msgspec.structs.replace(visit, at=visit.at + ahead) for visit in VISITS * 12], bounds)
    numbers = [frame.number for frame, _ in Folder(tmp_path).walk(lambda _: False)]
    assert numbers == list(range(numbers[0], 4 * len(VISITS) * 12 + 1))
    assert numbers[0] > 1


class FullDisk:
    """fdatasync that a test can make fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, file: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._real(file)


def test_a_full_disk_is_told_and_loses_nothing_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    recorder = FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0)
    made = entries(SMALL[:6])
    recorder.keep(made[0])
    assert in_time(lambda: len(snapshots(tmp_path)) == 1)
    disk.full = True
    for entry in made[1:5]:
        recorder.keep(entry)
        assert in_time(lambda: recorder.state().failing_since is not None)
    assert len(snapshots(tmp_path)) == 1
    state = recorder.state()
    assert (state.failing_since, state.failure) == (SMALL[1].at, "No space left on device")
    assert state.waiting == 4
    disk.full = False
    recorder.keep(made[5])
    assert in_time(lambda: recorder.state().failing_since is None)
    recorder.close()
    assert snapshots(tmp_path) == list(SMALL[:6])
    assert Folder(tmp_path).unread == []


def test_a_file_that_may_not_grow_leaves_no_torn_record_behind(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from test_recorder import BOUNDS, SMALL, entries
from doctor.recorder.folder import Shelf
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
shelf = Shelf(Path(sys.argv[1]), BOUNDS)
refused = 0
for number, entry in enumerate(entries(SMALL), 1):
    try:
        shelf.write(entry, number)
    except OSError:
        refused += 1
print(refused)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", "."])}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    folder = Folder(tmp_path)
    read = [entry.snapshot for entry in folder.entries()]
    assert folder.unread == []
    assert int(done.stdout) > 0
    assert len(read) == len(SMALL) - int(done.stdout)


def test_a_folder_that_can_not_be_made_is_told_and_the_daemon_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = FlightRecorder(tmp_path / "file" / "state", BOUNDS, keep_seconds=3600.0)
    recorder.keep(entries(SMALL[:1])[0])
    assert in_time(lambda: recorder.state().failing_since == SMALL[0].at)
    assert recorder.state().failure == "Not a directory"
    recorder.close()


def test_a_disk_that_comes_late_is_written_on_where_it_stood(tmp_path: Path) -> None:
    state = written(tmp_path / "state", SMALL[:5])
    away = state.rename(tmp_path / "away")
    state.write_text("")  # nothing is mounted there yet
    recorder = FlightRecorder(state, BOUNDS, keep_seconds=3600.0)
    made = entries(SMALL[5:8])
    recorder.keep(made[0])
    assert in_time(lambda: recorder.state().failing_since is not None)
    state.unlink()
    away.rename(state)
    recorder.keep(made[1])
    recorder.keep(made[2])
    assert in_time(lambda: recorder.state().failing_since is None)
    recorder.close()
    assert snapshots(state) == list(SMALL[:8])
    assert [frame.number for frame, _ in Folder(state).walk(lambda _: False)] == list(range(1, 9))


def test_a_disk_that_hangs_at_the_start_does_not_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = written(tmp_path / "state", SMALL[:5])
    gate = threading.Event()
    tail = Folder.tail

    def hung(folder: Folder, seconds: float) -> tuple[int, tuple[Entry, ...]]:
        gate.wait()
        return tail(folder, seconds)

    monkeypatch.setattr(Folder, "tail", hung)
    monkeypatch.setattr(flight, "PATIENCE_SECONDS", 0.05)
    recorder = FlightRecorder(state, BOUNDS, keep_seconds=3600.0)
    assert recorder.past == ()
    for entry in entries(SMALL[5:8]):
        recorder.keep(entry)
    assert in_time(lambda: recorder.state().failing_since == SMALL[5].at)
    assert "a write has not returned" in recorder.state().failure
    gate.set()
    assert in_time(lambda: recorder.state().failing_since is None)
    recorder.close()
    assert snapshots(state) == list(SMALL[:8])
    assert recorder.past == (), "nobody would take it any more"


def test_a_second_daemon_is_refused_at_its_start(tmp_path: Path) -> None:
    one = FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0)
    with pytest.raises(RecorderError, match="another gpu-doctor daemon records here"):
        FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0)
    one.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    import shutil

    shelf = Shelf(tmp_path / "state", BOUNDS)
    made = entries(SMALL[:4])
    shelf.write(made[0], 1)
    shutil.rmtree(tmp_path / "state")
    shelf.write(made[1], 2)
    shelf.close()
    assert snapshots(tmp_path / "state") == [SMALL[1]]


def test_a_restarted_recorder_brings_back_the_last_hour(tmp_path: Path) -> None:
    one = FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0, simulated=True)
    for entry in entries(SMALL[:20]):
        one.keep(entry)
    one.close()
    other = FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0, simulated=True)
    assert [entry.snapshot for entry in other.past] == list(SMALL[:20])
    other.keep(entries(SMALL[20:21])[0])
    other.close()
    assert snapshots(tmp_path) == list(SMALL[:21])


def test_a_drill_and_the_real_node_share_a_folder_and_no_past(tmp_path: Path) -> None:
    drill = list(SMALL[:5])
    real = [msgspec.structs.replace(visit, node=Node(name="gpu-17")) for visit in SMALL[5:8]]
    written(tmp_path, [*drill, *real])
    for simulated, own in ((True, drill), (False, real)):
        recorder = FlightRecorder(tmp_path, BOUNDS, keep_seconds=3600.0, simulated=simulated)
        recorder.close()
        assert [entry.snapshot for entry in recorder.past] == own
