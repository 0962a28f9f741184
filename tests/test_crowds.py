"""Processes that come and go by the thousand while a visit looks through /proc: it sees the engines, in time."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from roots import Root

from doctor.collectors.collector import Visit
from doctor.collectors.processes import Processes
from doctor.snapshot import Engine

CROWD = 1000


def engines(collector: Processes) -> list[Engine]:
    return list(collector.collect(Visit(at=time.time())).fields["engines"])


@contextmanager
def churning(root: Root, errors: list[BaseException]) -> Iterator[None]:
    """Let a thousand processes appear and die, over and over, some of them half there."""
    over = threading.Event()

    def churn() -> None:
        try:
            while not over.is_set():
                for pid in range(5000, 5000 + CROWD):
                    root.process(pid, ("/usr/bin/python3", "-c", "pass"), parent=100 if pid % 3 else 1)
                    if pid % 5 == 0:
                        (root.folder / f"proc/{pid}/cmdline").unlink()
                    if pid >= 5200:
                        shutil.rmtree(root.folder / f"proc/{pid - 200}", ignore_errors=True)
        except OSError as e:
            errors.append(e)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_crowd_that_churns_hides_no_engine_and_breaks_no_visit(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.engine()
    collector = Processes(tmp_path)
    errors: list[BaseException] = []
    took: list[float] = []
    with churning(root, errors):
        for _ in range(8):
            began = time.thread_time()
            found = engines(collector)
            took.append(time.thread_time() - began)
            assert [engine.pid for engine in found] == [100]
    assert errors == []
    assert min(took) < collector.deadline_seconds / 3
    assert len(collector._before) < 3 * CROWD


def test_real_processes_that_live_for_a_moment_break_no_visit() -> None:
    collector = Processes()
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do for j in 1 2 3 4 5 6 7 8 9 10; do /bin/true & done; done; wait"
    for _ in range(3):
        with subprocess.Popen(["/bin/sh", "-c", script]) as crowd:
            while crowd.poll() is None:
                engines(collector)


@pytest.mark.parametrize("parent", [101, 6099], ids=["its own child", "the end of a long line"])
def test_numbers_that_were_given_anew_make_no_circle(tmp_path: Path, parent: int) -> None:
    root = Root(tmp_path)
    root.engine()
    root.process(101, ("VLLM::EngineCore",), parent=100)
    root.process(102, ("VLLM::Worker_TP0",), parent=101)
    for pid in range(5000, 5000 + 1100):  # and a line of descendants longer than Python's stack
        root.process(pid, ("sh",), parent=pid - 1 if pid > 5000 else 100)
    root.process(100, ("/opt/e/bin/python3", "/opt/e/bin/vllm", "serve", "org/model"), parent=parent)
    found = engines(Processes(tmp_path))
    assert [engine.pid for engine in found] in ([], [100])


def test_what_is_remembered_of_engines_goes_with_them(tmp_path: Path) -> None:
    root = Root(tmp_path)
    collector = Processes(tmp_path)
    for pid in range(200, 230):  # one that crashes and is started again
        root.engine(pid=pid)
        assert [engine.pid for engine in engines(collector)] == [pid]
        shutil.rmtree(tmp_path / f"proc/{pid}")
    assert len(collector._environments) == 1
