"""The log of an engine whose output goes through a pipe to another program: `vllm serve … | tee vllm.log`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemons import await_true
from roots import BOOT, Root

from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.processes import Processes
from doctor.snapshot import Engine

READY = "INFO:     Application startup complete.\n"
FATAL = "(EngineCore pid=110) ERROR 05-29 10:00:00 [core.py:1] EngineCore encountered a fatal error.\n"

WRITES = "pos:\t0\nflags:\t0100001\nmnt_id:\t1\n"
READS = "pos:\t0\nflags:\t0100000\nmnt_id:\t1\n"


def engines_of(folder: Path) -> tuple[Engine, ...]:
    return Processes(folder).collect(Visit(at=time.time())).fields["engines"]


def told(collector: EngineLogs, engine: Engine) -> tuple[object, list[str]]:
    """Which log it is, and the signals that are new in it."""
    reading: Reading = collector.collect(Visit(at=BOOT + 5000.0, engines=(engine,)))
    return reading.engine_fields[engine.id]["log"], [event.signal for event in reading.fields["engine_events"]]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    root.engine(output="pipe:[4711]")
    return root


def program(root: Root, pid: int, name: str, *, reads: str, writes: dict[int, str]) -> None:
    """A process of the fake root with open descriptors."""
    root.process(pid, (name,), name=name)
    root.link(f"proc/{pid}/root", "../..")
    root.link(f"proc/{pid}/fd/0", reads)
    root.put(f"proc/{pid}/fdinfo/0", READS)
    for number, target in writes.items():
        root.link(f"proc/{pid}/fd/{number}", target)
        root.put(f"proc/{pid}/fdinfo/{number}", WRITES)


def test_the_log_that_tee_writes_is_the_engines(root: Root) -> None:
    root.put("srv/vllm.log", READY)
    root.put("srv/complaints", FATAL)
    writes = {1: "/dev/pts/0", 2: "/srv/complaints", 3: "/srv/vllm.log"}
    program(root, 200, "tee", reads="pipe:[4711]", writes=writes)
    (engine,) = engines_of(root.folder)
    assert told(EngineLogs(root.folder), engine) == ("/srv/vllm.log", ["startup-complete"])


def test_a_log_is_found_behind_several_programs_and_beside_their_locks(root: Root) -> None:
    root.put("srv/lock", "")
    root.put("srv/current", READY)
    program(root, 200, "grep", reads="pipe:[4711]", writes={1: "pipe:[4712]"})
    program(root, 201, "svlogd", reads="pipe:[4712]", writes={4: "/srv/lock", 5: "/srv/current"})
    (engine,) = engines_of(root.folder)
    assert told(EngineLogs(root.folder), engine) == ("/srv/current", ["startup-complete"])


def test_what_a_program_only_reads_is_no_log(root: Root) -> None:
    root.put("etc/patterns", READY)
    program(root, 200, "grep", reads="pipe:[4711]", writes={1: "/dev/pts/0"})
    root.link("proc/200/fd/3", "/etc/patterns")
    root.put("proc/200/fdinfo/3", READS)
    (engine,) = engines_of(root.folder)
    with pytest.raises(CannotSeeError, match="its output goes to pipe; name it in the configuration"):
        told(EngineLogs(root.folder), engine)


def test_a_pipe_without_a_reader_and_one_that_runs_in_a_circle_end(root: Root) -> None:
    (engine,) = engines_of(root.folder)
    with pytest.raises(CannotSeeError, match="its output goes to pipe"):
        told(EngineLogs(root.folder), engine)
    program(root, 200, "cat", reads="pipe:[4711]", writes={1: "pipe:[4711]"})
    with pytest.raises(CannotSeeError, match="its output goes to pipe"):
        told(EngineLogs(root.folder), engine)


def test_errors_in_a_file_and_output_through_a_pipe_are_one_log(root: Root) -> None:
    (root.folder / "proc/100/fd/2").unlink()
    root.link("proc/100/fd/2", "/srv/err.log")
    root.put("srv/err.log", FATAL)
    root.put("srv/out.log", READY)
    program(root, 200, "tee", reads="pipe:[4711]", writes={3: "/srv/out.log"})
    (engine,) = engines_of(root.folder)
    log, signals = told(EngineLogs(root.folder), engine)
    assert log == "/srv/out.log"
    assert sorted(signals) == ["engine-fatal", "startup-complete"]


def test_a_real_tee_is_followed_until_after_its_end(tmp_path: Path) -> None:
    """On this machine's own /proc: a program called vllm, `cat` and `tee`."""
    named = tmp_path / "vllm"
    named.write_text("import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n")
    log = tmp_path / "serve.log"
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(["tee", log], stdin=pipe, stdout=subprocess.DEVNULL) as tee,
        subprocess.Popen(["cat"], stdin=pipe, stdout=tee.stdin) as cat,
        subprocess.Popen(
            [sys.executable, str(named), "serve", "org/model"],
            stdin=pipe,
            stdout=cat.stdin,
            stderr=cat.stdin,
            text=True,
        ) as vllm,
    ):
        assert vllm.stdin is not None
        assert tee.stdin is not None
        assert cat.stdin is not None
        tee.stdin.close()
        cat.stdin.close()
        vllm.stdin.write(READY)
        vllm.stdin.flush()
        await_true(lambda: log.exists() and log.stat().st_size == len(READY))
        engine = next(e for e in engines_of(Path("/")) if e.pid == vllm.pid)
        collector = EngineLogs()
        assert told(collector, engine) == (str(log), ["startup-complete"])
        vllm.stdin.write(FATAL)
        vllm.stdin.close()
        vllm.wait(20)
        cat.wait(20)
        tee.wait(20)
        reading = collector.collect(Visit(at=BOOT + 5010.0))
        assert [event.signal for event in reading.fields["engine_events"]] == ["engine-fatal"]
        collector.close()
