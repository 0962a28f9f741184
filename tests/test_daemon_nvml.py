"""The daemon and the GPUs: let go of when an operator asks and taken up again; NVML's child stopped and killed; changes followed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from daemons import Daemon, await_true, running

from doctor.collectors.collector import CannotSeeError, Visit
from doctor.collectors.gpu_access import HOLD_MAX_SECONDS, GpuAccess, holders
from doctor.collectors.nvml import NvmlCollector
from doctor.control import ControlError, Request, answer_of_daemon, control
from doctor.feeds import simulated
from doctor.recorder.folder import Folder
from doctor.snapshot import Snapshot, Why

PROGRAM = ("-m", "doctor", "daemon", "--listen", "127.0.0.1:0", "--interval", "0.5")


def told(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "doctor", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def report_of(daemon: Daemon) -> dict[str, object]:
    status, _, body = daemon.get("/report")
    return json.loads(body) if status == 200 else {}


def unseen_of(daemon: Daemon, source: str) -> str | None:
    """The reason why a source was unseen at the last visit; empty: it was seen; None: there is no report."""
    report = report_of(daemon)
    if not report:
        return None
    parts = [u for u in report["unseen"] if u["source"] == source and not u.get("what")]  # type: ignore[attr-defined, index]
    return str(parts[0]["why"]) if parts else ""


def nvml_children(daemon: Daemon) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process(daemon.process.pid).children():
        with suppress(psutil.Error):  # it has just ended
            found += [child] if "doctor.collectors.nvml_child" in child.cmdline() else []
    return found


def events(daemon: Daemon, name: str) -> list[dict[str, object]]:
    return [event for event in daemon.log if event["event"] == name]


def test_an_operator_lets_go_of_the_gpus_and_takes_them_up_again(tmp_path: Path) -> None:
    with running(*PROGRAM, "--simulate", "dgx-h100-4of8", "--state-dir", str(tmp_path)) as daemon:
        await_true(lambda: unseen_of(daemon, "nvml") == "")
        (child,) = nvml_children(daemon)
        done = told("release-gpu", "--for", "10m", "--state-dir", str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("GPU access let go for 10 minutes: gpu-doctor has no GPU open.")
        assert "retake-gpu" in done.stdout
        assert not child.is_running()
        assert nvml_children(daemon) == []

        why = await_true(lambda: unseen_of(daemon, "nvml"))
        assert "GPU access was let go for 10 minutes" in str(why)
        # Each is waited for: a report of a slow machine is stale before the next one comes.
        report = await_true(lambda: report_of(daemon))
        assert isinstance(report, dict)
        assert report["verdict"] != "clear"
        assert "gpu-lost" in {unjudged["failure_mode"] for unjudged in report["unjudged"]}
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        blind = 'gpu_doctor_collector_success{collector="nvml"} 0.0'
        page = await_true(lambda: blind in (text := daemon.get("/metrics")[2].decode()) and text)
        assert "gpu_doctor_gpu_temperature_celsius{" not in str(page)

        assert "taken up again" in told("retake-gpu", "--state-dir", str(tmp_path)).stdout
        await_true(lambda: unseen_of(daemon, "nvml") == "")
        assert len(nvml_children(daemon)) == 1
        assert "nothing to do" in told("retake-gpu", "--state-dir", str(tmp_path)).stdout
        assert len(events(daemon, "gpu access let go")) == len(events(daemon, "gpu access taken up")) == 1
        assert "gpu-lost" not in {event["failure_mode"] for event in events(daemon, "finding appeared")}
        assert daemon.end() == 0
    assert not (tmp_path / "control.sock").exists()


def test_signals_let_go_and_take_up() -> None:
    with running(*PROGRAM, "--simulate", "l40s-4") as daemon:
        await_true(lambda: unseen_of(daemon, "nvml") == "")
        daemon.process.send_signal(signal.SIGUSR1)
        daemon.await_event("gpu access let go")
        await_true(lambda: nvml_children(daemon) == [])
        await_true(lambda: "SIGUSR1" in (unseen_of(daemon, "nvml") or ""))
        daemon.process.send_signal(signal.SIGUSR2)
        assert daemon.await_event("gpu access taken up")["by"] == "SIGUSR2"
        await_true(lambda: unseen_of(daemon, "nvml") == "")


def test_nobody_to_tell_is_one_sentence_that_says_what_else_there_is(tmp_path: Path) -> None:
    done = told("release-gpu", "--state-dir", str(tmp_path))
    assert done.returncode == 3
    assert done.stderr.startswith(f"gpu-doctor: no daemon listens in {tmp_path}")
    assert "SIGUSR1" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("hold", ["5h", "0s", "soon"])
def test_gpus_are_not_let_go_for_ever(hold: str, tmp_path: Path) -> None:
    done = told("release-gpu", "--for", hold, "--state-dir", str(tmp_path))
    assert done.returncode in (2, 3)
    assert "no daemon" not in done.stderr


def test_a_child_that_is_stopped_or_killed_leaves_the_daemon_serving(tmp_path: Path) -> None:
    config = tmp_path / "site.toml"
    config.write_text("[collectors.nvml]\ndeadline_seconds = 5.5\n")
    state = tmp_path / "state"
    with running(*PROGRAM, "--simulate", "hgx-h100-4", "--config", str(config), "--state-dir", str(state)) as daemon:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            await_true(lambda: unseen_of(daemon, "nvml") == "" and nvml_children(daemon))
            (child,) = nvml_children(daemon)
            child.send_signal(number)
            await_true(lambda gone=child.pid: {child.pid for child in nvml_children(daemon)} - {gone})
            await_true(lambda: daemon.get("/healthz")[0] == 200)
            assert not child.is_running()
        await_true(lambda: unseen_of(daemon, "nvml") == "")
        assert len(nvml_children(daemon)) == 1
        assert "gpu-lost" not in {event["failure_mode"] for event in events(daemon, "finding appeared")}
        assert daemon.end() == 0
    told = {u.why.detail for entry in Folder(state).entries() for u in entry.snapshot.unseen}
    assert {why.partition(";")[0] for why in told} >= {
        "the NVML child was stopped (SIGSTOP)",
        "the NVML child was killed by SIGKILL",
    }


def test_a_gpu_that_is_taken_out_and_a_driver_that_is_reloaded_are_followed() -> None:
    faults = ("gpu-removed:gpu=2,start=1", "driver-reloaded:start=2,down=0.5")
    with closing(simulated.node("h100-nvl-4", faults, every=0.3)) as visits:  # type: ignore[type-var]

        def followed() -> Snapshot | None:
            snapshot = next(visits)
            return snapshot if (len(snapshot.gpus), snapshot.stack.driver) == (3, "595.54.03") else None

        snapshot = await_true(followed)
    assert isinstance(snapshot, Snapshot)
    assert all(gpu.lost is False for gpu in snapshot.gpus)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_forgotten_release_ends_by_itself() -> None:
    clock, said = Clock(), []
    access = GpuAccess(clock)
    access.held_by(lambda: None)
    access.tell = lambda event, **facts: said.append((event, facts.get("by")))
    access.release(1e9, "test")
    clock.now += HOLD_MAX_SECONDS - 1
    assert access.why_not() is not None
    assert not access.was_retaken()
    clock.now += 1
    assert access.why_not() is None
    assert access.was_retaken()
    assert not access.was_retaken()
    assert said == [("gpu access let go", "test"), ("gpu access taken up", "the time is over")]


def test_what_was_left_alone_is_asked_again_after_a_release() -> None:
    access = GpuAccess()
    collector = NvmlCollector(root=None, child=("/nonexistent/python",), access=access)
    collector._left_alone["0000:18:00.0"] = False
    access.release(60, "test")
    with pytest.raises(CannotSeeError) as e:
        collector.collect(Visit(at=0.0))
    assert e.value.why.why is Why.NOT_ASKED
    access.retake("test")
    with pytest.raises(CannotSeeError):  # it tries to start a child
        collector.collect(Visit(at=0.0))
    assert collector._left_alone == {}


def test_who_else_has_a_gpu_open_is_named(tmp_path: Path) -> None:
    for pid, name, target in (
        (1633, "nv-hostengine", "/dev/nvidia0"),
        (40, "systemd-journal", "/dev/kmsg"),
        (977, "nvidia-persiste", "/dev/nvidiactl"),
        (2263, "VLLM::Worker_TP", "/dev/nvidia12"),
    ):
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/comm").write_text(f"{name}\n")
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/7/fd").mkdir(parents=True)
    assert holders(tmp_path) == ["nv-hostengine (pid 1633)", "VLLM::Worker_TP (pid 2263)"]


class Log:
    def __init__(self) -> None:
        self.warnings: list[dict[str, object]] = []

    def warning(self, event: str, **facts: object) -> None:
        self.warnings.append({"event": event, **facts})


@contextmanager
def controlled(folder: Path, held_by: int | None = None) -> Iterator[Log]:
    access, log = GpuAccess(), Log()
    access.held_by(lambda: held_by)
    with control(folder, access, log):
        yield log


class TestSocket:
    def test_it_is_its_owners_alone(self, tmp_path: Path) -> None:
        with controlled(tmp_path):
            mode = (tmp_path / "control.sock").stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600

    def test_a_folder_with_a_long_name_will_do(self, tmp_path: Path) -> None:
        folder = tmp_path / ("n" * 200)
        folder.mkdir()
        with controlled(folder) as log:
            assert log.warnings == []
            assert answer_of_daemon([tmp_path, folder], Request(1.0)).was_released is False
            assert answer_of_daemon([folder], Request()).was_released is True

    def test_what_a_killed_daemon_left_is_in_nobodys_way(self, tmp_path: Path) -> None:
        with controlled(tmp_path):
            os.link(tmp_path / "control.sock", tmp_path / "kept")
        (tmp_path / "kept").rename(tmp_path / "control.sock")
        with pytest.raises(ControlError, match="no daemon listens"):
            answer_of_daemon([tmp_path], Request())
        with controlled(tmp_path):
            answer_of_daemon([tmp_path], Request())

    def test_a_folder_that_is_not_there_costs_the_socket_alone(self, tmp_path: Path) -> None:
        with controlled(tmp_path / "none") as log:
            assert [warning["event"] for warning in log.warnings] == ["no control socket"]

    def test_a_child_that_the_kernel_holds_is_named(self, tmp_path: Path) -> None:
        with controlled(tmp_path, held_by=4711), pytest.raises(ControlError, match=r"\(pid 4711\)"):
            answer_of_daemon([tmp_path], Request(60.0))

    @pytest.mark.parametrize("sent", [b"", b"\n", b"nonsense\n", b'{"release_seconds": "x"}\n', b"x" * 100_000])
    def test_bad_requests_are_refused_and_the_next_one_is_heard(self, sent: bytes, tmp_path: Path) -> None:
        import socket

        with controlled(tmp_path):
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(20)
                channel.connect(os.path.relpath(tmp_path / "control.sock"))
                try:
                    channel.sendall(sent)
                    channel.shutdown(socket.SHUT_WR)
                    assert b"the request is none" in channel.recv(4096)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it heard enough
            assert answer_of_daemon([tmp_path], Request()).refusal == ""
        assert not any(thread.name == "control" and thread.is_alive() for thread in settled_threads())


def settled_threads() -> list[threading.Thread]:
    for thread in threading.enumerate():
        if thread.name == "control":
            thread.join(20)
    return threading.enumerate()
