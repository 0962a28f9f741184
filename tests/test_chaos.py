"""The whole daemon as a program while its disk fails, its descriptors run out, and somebody kills it again and again.

`CHAOS=full pytest tests/test_chaos.py` is the whole drill: thirty deaths instead of three, ten of a simulated node, and a
flood of the kernel log.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from daemons import PATIENCE_SECONDS, PROGRAM, Daemon, await_true, running
from roots import BOOT, Root

from doctor.recorder.folder import Folder
from doctor.recorder.timeline import timeline

FULL = os.environ.get("CHAOS") == "full"
DEATHS = 30 if FULL else 3

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount, and own a folder that is trusted")


def report_of(daemon: Daemon) -> dict[str, Any]:
    """The last report; empty where there is none."""
    with suppress(OSError):
        status, _, body = daemon.get("/report")
        if status == 200:
            return json.loads(body)
    return {}


def failure_modes(daemon: Daemon) -> set[str]:
    return {found["failure_mode"] for found in report_of(daemon).get("findings", ())}


def samples(daemon: Daemon) -> dict[str, float]:
    """The metrics, by name and labels as they stand there; empty where there are none."""
    with suppress(OSError):
        lines = daemon.get("/metrics")[2].decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}
    return {}


def visits(daemon: Daemon) -> float:
    return samples(daemon).get("gpu_doctor_visits_total", 0.0)


def await_visits(daemon: Daemon, number: int = 2) -> None:
    before = visits(daemon)
    await_true(lambda: visits(daemon) >= before + number, PATIENCE_SECONDS + 2 * number)


def events(daemon: Daemon, name: str) -> list[dict[str, object]]:
    return [event for event in daemon.log if event["event"] == name]


# The disk --------------------------------------------------------------------------------------------------------


def test_a_disk_that_fails_or_hangs_holds_up_nothing_and_loses_nothing(tmp_path: Path) -> None:
    state, disk = tmp_path / "state", tmp_path / "state.disk"
    with running(PROGRAM, "clear", "0.05", "127.0.0.1:0", "", str(state)) as daemon:
        await_visits(daemon)
        for fault in ("ENOSPC", "EROFS", "hung"):
            disk.write_text(fault)
            await_true(lambda: failure_modes(daemon) == {"recorder-failing"})
            await_visits(daemon, 5)
            assert daemon.get("/healthz")[0] == 200
            disk.write_text("")
            await_true(lambda: failure_modes(daemon) == set() and visits(daemon))
        disk.write_text("hung")
        await_true(lambda: failure_modes(daemon) == {"recorder-failing"})
        assert daemon.end() == 0, "a hung disk does not hold the end of the program"
    told = [str(event["event"]) for event in daemon.log if str(event["event"]).startswith("finding")]
    assert told.count("finding appeared") <= 4, "once a fault"
    folder = Folder(state)
    numbers = [frame.number for frame, _ in folder.walk(lambda _: False)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 3 * 5
    assert folder.unread == []
    assert timeline(folder).gaps == ()


def test_a_folder_that_is_removed_again_and_again_is_made_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(PROGRAM, "clear", "0.05", "127.0.0.1:0", "", str(state)) as daemon:
        for _ in range(3):
            await_true(lambda: state.exists() and list(state.glob("flight-*.seg")))
            with suppress(OSError):  # it writes meanwhile
                for path in state.iterdir():
                    path.unlink()
                state.rmdir()
        await_true(lambda: state.exists() and list(state.glob("flight-*.seg")))
        assert daemon.get("/healthz")[0] == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@as_root
def test_a_real_disk_that_is_full_is_told_and_written_on_when_there_is_room(small_disk: Path) -> None:
    state, filler = small_disk / "state", small_disk / "filler"
    with running(PROGRAM, "clear", "0.05", "127.0.0.1:0", "", str(state)) as daemon:
        await_visits(daemon)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        await_true(lambda: failure_modes(daemon) == {"recorder-failing"})
        await_visits(daemon, 5)
        (found,) = report_of(daemon)["findings"]
        assert "No space left on device" in found["summary"]
        filler.unlink()
        await_true(lambda: failure_modes(daemon) == set() and visits(daemon))
        assert daemon.end() == 0
    numbers = [frame.number for frame, _ in Folder(state).walk(lambda _: False)]
    assert numbers == list(range(1, len(numbers) + 1))


# A node with a configuration -------------------------------------------------------------------------------------

CONFIG = """
optional = ["nvml", "engine-metrics"]
rules_folder = "{rules}"

[[log_patterns]]
id = "lease-lost"
title = "A volume's lease was lost"
source = "engine-log"
text = "Lease of volume"
severity = "warning"
at_least = 2
fix = ["Mount it again."]
"""

SILENCE = """
[[silence]]
rule = "tired-kernel"
until = 2099-12-31
reason = "we know"
"""

RULE = """
from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Evidence, Finding, NoLimits, Severity, rule
from doctor.snapshot import Source


@rule("tired-kernel", "The kernel has said something of a GPU", severity=Severity.WARNING, needs=(Source.KERNEL_LOG,), limits=NoLimits())
def RULE(history: History, limits: NoLimits) -> Iterator[Finding]:
    events = list(history.kernel_events())
    if events:
        yield Finding(summary=f"{len(events)} words", evidence=(Evidence("kernel-log", events[0].where, events[0].text),))
"""


class Node:
    """A root with an engine, its log and the kernel's, and a daemon that is pointed at it."""

    def __init__(self, folder: Path) -> None:
        self.root = Root(folder / "root")
        self.root.engine()
        self.log = self.root.put("var/log/vllm.log", "")
        self.kmsg = self.root.put("dev/kmsg", "")
        self.root.put("proc/sys/kernel/random/boot_id", "b0\n")
        self.config = folder / "config.toml"
        self.rules = folder / "rules.d"
        self.rules.mkdir(mode=0o755)
        self.config.write_text(CONFIG.format(rules=self.rules))
        self.state = folder / "state"
        self.xids = 0
        self.leases = 0

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            "-m", "doctor", "daemon", "--root", str(self.root.folder), "--config", str(self.config), "--interval", "0.1",
            "--state-dir", str(self.state), "--listen", "127.0.0.1:0",
        )  # fmt: skip

    def xid(self, number: int = 1) -> None:
        microseconds = int((time.time() - BOOT) * 1e6)
        with self.kmsg.open("a") as file:
            for _ in range(number):
                self.xids += 1
                gpu, code = 0x18 + self.xids % 8, (13, 31, 43)[self.xids % 3]
                text = f"NVRM: Xid (PCI:0000:{gpu:02x}:00): {code}, pid={self.xids}, name=p{self.xids}, Graphics"
                file.write(f"3,{self.xids},{microseconds},-;{text}\n")

    def lease(self) -> None:
        self.leases += 1
        with self.log.open("a") as file:
            file.write(f"WARNING [storage.py:9] Lease of volume {self.leases} was lost\n")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as leaving:
        folder = tmp_path
        if os.geteuid() == 0:  # a rule runs only where nobody else could have written it, and on no way of pytest's
            import tempfile

            folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="gpu-doctor-node-")))
            folder.chmod(0o755)
        yield Node(folder)


def counted(daemon: Daemon, name: str) -> float:
    return sum(value for metric, value in samples(daemon).items() if metric.startswith(name))


@as_root
def test_silences_rules_and_patterns_of_the_site_hold_in_the_daemon(node: Node) -> None:
    for name, content in (("tired_kernel.py", RULE), ("tired_kernel.md", "## Meaning\n\nSo.\n\n## Fix\n\n1. Rest.\n")):
        (node.rules / name).write_text(content)
        (node.rules / name).chmod(0o644)
    with node.config.open("a") as config:
        config.write(SILENCE)
    with running(*node.arguments) as daemon:
        await_visits(daemon)
        assert failure_modes(daemon).isdisjoint({"lease-lost", "tired-kernel"})
        node.lease()
        node.lease()
        node.xid()
        await_true(lambda: failure_modes(daemon) >= {"lease-lost", "tired-kernel"})
        found = {each["failure_mode"]: each for each in report_of(daemon)["findings"]}
        assert found["tired-kernel"]["silenced"]["reason"] == "we know"
        assert found["lease-lost"]["advice"] == ["Mount it again."]
        text = "\n".join(samples(daemon))
        assert 'failure_mode="tired-kernel"' in text
        await_visits(daemon, 5)
        told = [event for event in events(daemon, "finding appeared") if event["failure_mode"] in found]
    of_each = {str(event["failure_mode"]): event for event in told}
    assert len(told) == len(of_each), "each is told once"
    assert of_each["tired-kernel"]["level"] == "info"
    assert of_each["lease-lost"]["level"] == "warning"


def await_recorded(state: Path, number: int) -> None:
    """Wait until so many further visits are on record."""
    last = Folder(state).tail(0)[0]
    await_true(lambda: Folder(state).tail(0)[0] >= last + number)


def test_counters_are_not_shown_before_the_first_visit_has_brought_them_up_to_date(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with running(PROGRAM, "clear", "0.05", "127.0.0.1:0", "", state) as daemon:
        await_visits(daemon)
        await_recorded(Path(state), 1)
        killed(daemon)
    with running(PROGRAM, "stop", "0.05", "127.0.0.1:0", "", state) as daemon:
        told = samples(daemon)
        assert "gpu_doctor_visits_total" not in told
        assert "gpu_doctor_process_start_time_seconds" in told
        killed(daemon)


def killed(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait()


def test_a_daemon_that_is_killed_again_and_again_goes_on_where_it_stood(node: Node) -> None:
    appeared: list[str] = []
    since: list[object] = []
    counts: list[tuple[float, float]] = []
    for life in range(DEATHS):
        with running(*node.arguments) as daemon:
            node.xid()
            node.lease()
            await_true(lambda: counted(daemon, "gpu_doctor_xids_total") >= node.xids)
            if life:
                await_true(lambda: "lease-lost" in failure_modes(daemon))
                found = {each["failure_mode"]: each for each in report_of(daemon)["findings"]}
                since.append(found["lease-lost"].get("since"))
            assert counted(daemon, "gpu_doctor_xids_total") == node.xids, "each is counted once"
            counts.append((visits(daemon), counted(daemon, "gpu_doctor_engine_log_lines_total")))
            await_recorded(node.state, 2)
            time.sleep(life % 10 / 100)  # at another moment of the visit
            killed(daemon)
            appeared += [str(e["failure_mode"]) for e in events(daemon, "finding appeared")]
    assert appeared.count("lease-lost") == 1, "at the second line, which was written in the second life"
    assert len(set(appeared)) == len(appeared)
    assert len(set(since)) == 1
    assert all(one < other for (one, _), (other, _) in pairwise(counts))
    assert counts[-1][1] == node.leases
    folder = Folder(node.state)
    numbers = [frame.number for frame, _ in folder.walk(lambda _: False)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(unread.why.endswith("broken off") for unread in folder.unread)


@pytest.mark.skipif(not FULL, reason="each life of a simulated node takes seconds; the test above is the short one")
def test_a_simulated_node_keeps_its_findings_over_ten_kills(tmp_path: Path) -> None:
    arguments = ("-m", "doctor", "daemon", "--simulate", "h100-pcie-4", "--fault", "pcie-width:gpu=1,width=8")
    arguments += ("--interval", "0.3", "--state-dir", str(tmp_path / "state"), "--listen", "127.0.0.1:0")
    told: list[list[str]] = []
    made: list[float] = []
    for _ in range(10):
        with running(*arguments) as daemon:
            await_true(lambda: "pcie-link-degraded" in failure_modes(daemon))
            made.append(visits(daemon))
            await_recorded(tmp_path / "state", 1)
            killed(daemon)
        told.append([str(event["failure_mode"]) for event in events(daemon, "finding appeared")])
    assert "pcie-link-degraded" in told[0]
    assert all("pcie-link-degraded" not in events for events in told[1:])
    assert all(one < other for one, other in pairwise(made))


# Descriptors -----------------------------------------------------------------------------------------------------


def test_a_daemon_without_descriptors_lives_says_so_and_recovers(node: Node) -> None:
    with running(*node.arguments) as daemon, ExitStack() as leaving:
        await_visits(daemon)
        pid, limits = daemon.process.pid, resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        crowd = [leaving.enter_context(socket.create_connection((daemon.host, daemon.port))) for _ in range(100)]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))  # none more, though some of its own be closed
        await_true(lambda: "Too many open files" in str(events(daemon, "source unseen")))
        time.sleep(0.5)
        assert daemon.process.poll() is None
        for client in crowd:
            client.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        daemon.await_event("source seen again")
        await_visits(daemon)
        assert daemon.get("/healthz")[0] == 200
        node.xid()
        await_true(lambda: counted(daemon, "gpu_doctor_xids_total") == 1)
        assert daemon.end() == 0
    of_processes = [event for event in events(daemon, "source unseen") if event["source"] == "processes"]
    assert len(of_processes) == 1, "once, however many visits failed"


def test_nothing_is_said_twice_while_nothing_changes(node: Node) -> None:
    with running(*node.arguments) as daemon:
        await_visits(daemon, 6)
        before = len(daemon.log)
        await_visits(daemon, 200 if FULL else 12)
        assert daemon.log[before:] == []
        assert daemon.end(signal.SIGTERM) == 0


@pytest.mark.skipif(not FULL, reason="takes ten seconds; test_floods.py is the short one")
def test_a_flood_of_the_kernel_log_is_counted_and_holds_up_nothing(node: Node) -> None:
    with running(*node.arguments) as daemon:
        await_visits(daemon)
        node.xid(100_000)
        await_true(lambda: counted(daemon, "gpu_doctor_xids_total") == 100_000, 120.0)
        told = samples(daemon)
        assert len([name for name in told if name.startswith("gpu_doctor_xids_total")]) == 24
        assert len(told) < 2000
        memory = {name: value for name, value in told.items() if name.startswith("gpu_doctor_process_resident_memory")}
        assert 0 < sum(memory.values()) < 300e6, memory
        await_visits(daemon)
        assert len(daemon.get("/report")[2]) < 500_000
