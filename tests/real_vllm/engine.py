"""A real vLLM on the CPU as a program of its own, and clients that keep it busy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

from daemons import await_true

STARTING_SECONDS = 300.0
"""It starts in 20 s on two idle processors; a busy machine takes several times as long."""

TOKENS = 200
"""Of each answer."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}
"""Offline, told to nobody, with 1 GiB of cache, and a processor for each of two ranks."""


class Vllm:
    """Two tensor-parallel ranks behind one server. *tee*: its output goes through a pipe to `tee`, which writes *log*."""

    def __init__(self, environment: Path, model: Path, log: Path, port: int, *, tee: bool = False) -> None:
        self.port = port
        command = [
            "nice", str(environment / "bin/vllm"), "serve", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", "2", "--enforce-eager",
            "--max-model-len", "1024", "--max-num-seqs", "8",
        ]  # fmt: skip
        self._tee: subprocess.Popen[bytes] | None = None
        with contextlib.ExitStack() as ours:
            if tee:
                self._tee = subprocess.Popen(
                    ["tee", "-a", str(log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
                )
                assert self._tee.stdin is not None
                output = ours.enter_context(self._tee.stdin)
            else:
                output = ours.enter_context(log.open("ab"))
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip

    @property
    def is_ready(self) -> bool:
        """Whether its server says that it serves."""
        assert self.process.poll() is None, f"vLLM ended with {self.process.returncode} while it started"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                return connection.getresponse().status == http.client.OK
        except OSError:
            return False

    def await_ready(self) -> None:
        await_true(lambda: self.is_ready, STARTING_SECONDS)

    def pid_of(self, title: str) -> int:
        """The process of this engine that bears a title, e.g. `VLLM::Worker_TP1`."""
        (pid,) = (pid for pid in _of_session(self.process.pid) if _title(pid) == title)
        return pid

    def end(self) -> int:
        """Ask it to end, and return its exit code; nothing of it is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.bury()

    def bury(self) -> None:
        """Kill what is left of it."""
        for pid in _of_session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        await_true(lambda: not _of_session(self.process.pid))
        if self._tee is not None:
            self._tee.wait(20)


def _of_session(leader: int) -> list[int]:
    """The living processes of a session; those of a vLLM stay in its own, orphans too."""
    return [pid for pid in _pids() if _words(pid)[3:4] == [str(leader)] and _words(pid)[0] != "Z"]


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _words(pid: int) -> list[str]:
    """State, parent, group, session and so on, as /proc/PID/stat has them; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() or [""]
    except OSError:
        return [""]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").strip("\0 ")
    except OSError:
        return ""


class Load:
    """Clients that each ask for one stream of tokens after the other; a server that is gone stops none of them."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self.port = port
        self.answered = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ask()
                self.answered += 1

    def _ask(self) -> None:
        asked = {"model": "tiny", "prompt": "a b c", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
            for _ in connection.getresponse():
                if self._over.is_set():
                    return
