"""A night of a real vLLM under the daemon's eyes: it loads, serves, hangs, dies, comes back, and loses its server.

What was done when is kept beside what the daemon served then; its flight recorder holds the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemons import Daemon, running
from engine import Load, Vllm

INTERVAL_SECONDS = 2.0
"""Between visits. Three of them may fail before the door says that it is blind."""

PATIENCE_SECONDS = 90.0
"""For a finding that needs the next visit, on a machine that computes on every processor."""

STATISTICS_SECONDS = 10.0
"""vLLM logs them so often."""

REQUESTS = 12
"""Served before the next thing happens."""

STALL_SECONDS = 240.0
"""For a stall, which is judged over a minute."""


class Night:
    """The machine, the engine's log, and what happened when."""

    def __init__(self, environment: Path, folder: Path) -> None:
        from tiny_llama import write

        self.environment = environment
        self.state = folder / "state"
        self.log = folder / "vllm.log"
        self.rotated = folder / "vllm.log.1"
        self.teed = folder / "teed.log"
        self.model = write(folder / "model")
        self.port = _free_port()
        self.times: dict[str, float] = {}
        """When each step was done, Unix seconds."""
        self.reports: dict[str, dict[str, Any]] = {}
        self.pages: dict[str, dict[str, float]] = {}
        """The samples of /metrics, by name and labels as they stand there."""
        self.pids: dict[str, int] = {}
        self.answered = 0

    def spend(self) -> None:
        """Let everything happen. What does not come is seen in what was kept, not here."""
        with self._daemon() as daemon, self._engine("first", self.log) as first:
            self._note("started")
            first.await_ready()
            self._await(daemon, "ready", lambda: self._figure(daemon, "gpu_doctor_engine_kv_cache_tokens") > 0)
            with Load(self.port) as load:
                self._await(daemon, "loaded", lambda: self._is_loaded_since(daemon, "ready"), STALL_SECONDS)
                _copy_and_truncate(self.log, self.rotated)
                self._note("rotated")
                self._rest(daemon, "just rotated")
                served = self._served(daemon)
                self._await(daemon, "after rotation", lambda: self._served(daemon) >= served + REQUESTS, STALL_SECONDS)
                self.answered = load.answered
                self.pids["worker"] = first.pid_of("VLLM::Worker_TP1")
                os.kill(self.pids["worker"], signal.SIGSTOP)
                self._note("stopped")
                self._await(daemon, "stalled", lambda: self._finds(daemon, "engine-stalled"), STALL_SECONDS)
                daemon.end(signal.SIGKILL)
            self._note("daemon killed")
            with self._daemon() as again, Load(self.port):
                self._await(again, "remembered", lambda: self._finds(again, "engine-stalled"))
                self._rest(again, "still stalled")
                os.kill(self.pids["worker"], signal.SIGCONT)
                self._note("continued")
                self._await(again, "recovered", lambda: self._finds_nothing(again))
                self._rest(again, "well again")
                self.pids["core"] = first.pid_of("VLLM::EngineCore")
                os.kill(self.pids["core"], signal.SIGKILL)
                self._note("core killed")
                self._await(again, "core dead", lambda: self._finds(again, "worker-killed"))
                first.process.wait(PATIENCE_SECONDS)
                self.pids["first"] = first.process.pid
                first.bury()
                self._rest(again, "core buried")
                self._second_half(again)

    def _second_half(self, daemon: Daemon) -> None:
        """Restart the engine, whose output goes through a pipe now, and take its server away."""
        with self._engine("second", self.teed, tee=True) as second:
            self._note("restarted")
            second.await_ready()
            self._await(daemon, "ready again", lambda: self._finds_nothing(daemon))
            with Load(self.port):
                self._await(daemon, "loaded again", lambda: self._is_loaded_since(daemon, "ready again"), STALL_SECONDS)
                self.pids["second core"] = second.pid_of("VLLM::EngineCore")
                os.kill(second.process.pid, signal.SIGKILL)
                self._note("server killed")
                second.process.wait()
            self._await(daemon, "orphaned", lambda: self._finds(daemon, "worker-killed"))
            second.bury()
            self._note("buried")
            self._await(daemon, "over", lambda: self._finds_nothing(daemon))

    # What the daemon says.

    def _await(self, daemon: Daemon, name: str, until: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until something holds, or for as long as it may take; keep what the daemon says then."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            time.sleep(0.5)
        self._keep(daemon, name)

    def _rest(self, daemon: Daemon, name: str) -> None:
        """Let two whole visits pass."""
        begin = time.time()
        self._await(daemon, name, lambda: self._report(daemon).get("at", 0.0) > begin + INTERVAL_SECONDS)

    def _keep(self, daemon: Daemon, name: str) -> None:
        """Keep a report, and the page of the same visit."""
        self._note(name)
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            self.reports[name], self.pages[name] = self._report(daemon), self._page(daemon)
            if self.reports[name] and self._report(daemon).get("at") == self.reports[name]["at"]:
                return

    def _note(self, name: str) -> None:
        self.times[name] = time.time()

    def _report(self, daemon: Daemon) -> dict[str, Any]:
        """The report; an empty one where the last is stale, as on a machine that has no time for the daemon."""
        with contextlib.suppress(OSError):
            status, _, body = daemon.get("/report")
            return json.loads(body) if status == 200 else {}
        return {}

    def _finds(self, daemon: Daemon, failure_mode: str) -> bool:
        return failure_mode in [found["failure_mode"] for found in self._report(daemon).get("findings", ())]

    def _finds_nothing(self, daemon: Daemon) -> bool:
        return self._report(daemon).get("findings") == []

    def _page(self, daemon: Daemon) -> dict[str, float]:
        with contextlib.suppress(OSError):
            text = daemon.get("/metrics")[2].decode()
            samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
            return {name: float(value) for name, value in samples}
        return {}

    def _figure(self, daemon: Daemon, family: str) -> float:
        return self._page(daemon).get(f'{family}{{engine="vllm:{self.port}"}}', 0.0)

    def _served(self, daemon: Daemon) -> float:
        return self._figure(daemon, "gpu_doctor_engine_requests_succeeded_total")

    def _is_loaded_since(self, daemon: Daemon, moment: str) -> bool:
        """Whether it has served some requests, and for so long that it has logged statistics of them."""
        return self._served(daemon) >= REQUESTS and time.time() - self.times[moment] > 2 * STATISTICS_SECONDS

    # What runs.

    @contextmanager
    def _daemon(self) -> Iterator[Daemon]:
        arguments = ["--interval", f"{INTERVAL_SECONDS:g}", "--state-dir", str(self.state), "--listen", "127.0.0.1:0"]
        with running("-m", "doctor", "daemon", *arguments, "--optional", "nvml", "--optional", "kernel-log") as daemon:
            yield daemon

    @contextmanager
    def _engine(self, name: str, log: Path, *, tee: bool = False) -> Iterator[Vllm]:
        engine = Vllm(self.environment, self.model, log, self.port, tee=tee)
        self.pids[name] = engine.process.pid
        try:
            yield engine
        finally:
            engine.bury()


def _copy_and_truncate(log: Path, to: Path) -> None:
    """Rotate a log as logrotate's copytruncate does."""
    shutil.copyfile(log, to)
    with log.open("r+b") as file:
        file.truncate(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
