"""A root directory for tests: the files of a node that a collector looks at, on a real file system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

BOOT = 1_780_000_000
TICKS = os.sysconf("SC_CLK_TCK")

CONTAINER = "4f" * 32
POD = "0a1b2c3d-1111-2222-3333-444455556666"


class Root:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.put("proc/stat", f"cpu 1 2 3\nbtime {BOOT}\n")
        self.process(1, ("/sbin/init",), name="systemd")

    def put(self, path: str, content: str | bytes) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def link(self, path: str, target: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).symlink_to(target)

    def process(
        self,
        pid: int,
        arguments: tuple[str, ...],
        *,
        parent: int = 1,
        name: str = "python3",
        state: str = "S",
        started: float = 1000,
        cpu: float = 5,
        padded: bool = False,
    ) -> None:
        line = f"{pid} ({name}) {state} {parent} 1 1 0 -1 0 0 0 0 0 {int(cpu * TICKS)} 0 0 0 20 0 1 0 {int(started * TICKS)} 0 0\n"
        self.put(f"proc/{pid}/stat", line)
        self.put(f"proc/{pid}/cmdline", "\0".join(arguments) + (" " * 60 if padded else "\0"))

    def engine(
        self,
        pid: int = 100,
        arguments: tuple[str, ...] = ("/opt/e/bin/python3", "/opt/e/bin/vllm", "serve", "org/model", "--port", "8123"),
        *,
        environment: dict[str, str] | None = None,
        cgroup: str = "/system.slice/vllm.service",
        output: str | None = "/var/log/vllm.log",
        name: str = "vllm",
    ) -> None:
        self.process(pid, arguments, name=name)
        self.put(f"proc/{pid}/environ", "".join(f"{k}={v}\0" for k, v in (environment or {}).items()))
        self.put(f"proc/{pid}/cgroup", f"0::{cgroup}\n")
        self.link(f"proc/{pid}/root", "../..")
        self.link(f"proc/{pid}/cwd", "/root")
        for number in (1, 2):
            if output is not None:
                self.link(f"proc/{pid}/fd/{number}", output)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be an ordinary user for a while, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
