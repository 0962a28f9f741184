"""Processes and threads in /proc."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor.collectors.host import THREADS_SECONDS, BlockedThreads
from doctor.collectors.tasks import KERNEL_THREAD, PASSED_OVER_SECONDS, Task, Tasks, task_of


def put(root: Path, pid: int, name: str, *, state: str = "S", flags: int = 0x400100) -> None:
    folder = root / f"proc/{pid}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stat").write_text(f"{pid} ({name}) {state} 2 0 0 0 -1 {flags} 0 0 0 0 30 12 0 0 20 0 1 0 4711 0 0\n")


def test_a_task_is_what_stat_says_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path, 7, "a) R 1 (b", state="D")
    (task,) = Tasks(tmp_path)
    assert task == Task(7, "a) R 1 (b", "D", parent=2, flags=0x400100, cpu_ticks=42, start_ticks=4711)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_what_is_no_stat_is_no_task(tmp_path: Path, stat: bytes) -> None:
    (tmp_path / "stat").write_bytes(stat)
    assert task_of(str(tmp_path)) is None


def test_threads_of_the_kernel_are_read_once_a_minute(tmp_path: Path) -> None:
    now = 0.0
    tasks = Tasks(tmp_path, clock=lambda: now)
    put(tmp_path, 9, "kworker/3:1", state="I", flags=0x4208060 | KERNEL_THREAD)
    put(tmp_path, 100, "python3")
    assert [task.pid for task in tasks] == [100]
    put(tmp_path, 9, "vllm")
    assert [task.pid for task in tasks] == [100], "a pid that is given anew is passed over for a while"
    now += PASSED_OVER_SECONDS
    assert sorted(task.pid for task in tasks) == [9, 100]


def test_a_new_process_is_seen_at_once_whoever_was_there(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, clock=lambda: 0.0)
    put(tmp_path, 9, "kworker/3:1", flags=KERNEL_THREAD)
    assert list(tasks) == []
    put(tmp_path, 101, "vllm")
    assert [task.pid for task in tasks] == [101]


def test_threads_of_the_kernel_that_matter_are_told_each_time(tmp_path: Path) -> None:
    tasks = Tasks(tmp_path, of_kernel=lambda name: name.startswith("nv"), clock=lambda: 0.0)
    put(tmp_path, 9, "kworker/3:1", flags=KERNEL_THREAD)
    put(tmp_path, 10, "nv_queue", flags=KERNEL_THREAD)
    assert [task.name for task in tasks] == ["nv_queue"]
    put(tmp_path, 10, "nv_queue", state="D", flags=KERNEL_THREAD)
    assert [task.state for task in tasks] == ["D"]


def test_threads_of_engines_are_looked_at_twice_a_minute_and_each_time_while_one_hangs(tmp_path: Path) -> None:
    now = 0.0
    threads = BlockedThreads(clock=lambda: now)

    def hangs(state: str) -> bool:
        (tmp_path / "100").mkdir(exist_ok=True)
        (tmp_path / "100/stat").write_text(f"100 (worker) {state} 2 0 0 0 -1 0 0 0 0 0 3 7 0 0 20 0 1 0 4711 0 0\n")
        return threads.among(7, str(tmp_path))

    assert not hangs("S")
    assert not hangs("D"), "not looked at"
    now += THREADS_SECONDS
    assert hangs("D")
    assert not hangs("S"), "looked at, since one hung"
    threads.forget_all_but(())
    assert hangs("D"), "another process of this number"
