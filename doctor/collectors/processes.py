"""Serving engines and their workers, found in /proc, in containers too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.redaction import (
    command_line_without_secrets,
    environment_without_secrets,
    text_without_secrets,
)
from doctor.collectors.tasks import Task, Tasks
from doctor.readers import command_line
from doctor.snapshot import (
    NOT_ASKED,
    Absent,
    Engine,
    EngineFlags,
    Maybe,
    Rank,
    SharedMemory,
    Source,
    Unseen,
    Why,
    known,
    or_none,
)

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

STATES = {
    "R": "running", "S": "sleeping", "D": "disk-sleep", "T": "stopped", "t": "tracing-stop", "Z": "zombie",
    "X": "dead", "I": "idle", "P": "parked",
}  # fmt: skip
"""By the letter of /proc/PID/stat, in psutil's words (proc_pid_stat(5))."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process as /proc shows it to anyone."""

    pid: int
    parent: int
    name: str
    """The kernel's `comm`."""
    state: str
    started_at: float
    """Unix time, seconds."""
    cpu_seconds: float
    arguments: tuple[str, ...] = ()
    """Empty for a zombie."""

    @property
    def title(self) -> str:
        """What the process calls itself: the title that vLLM sets, or the kernel's short name."""
        return self.arguments[0] if len(self.arguments) == 1 else self.name


def booted_at(root: Path) -> float:
    """Return when the kernel was started, Unix seconds. Raises OSError or ValueError."""
    for line in files.text_of(root / "proc/stat", 4 << 20).splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    msg = "no btime in /proc/stat"
    raise ValueError(msg)


def process_of(proc: Path, task: Task, boot: float, before: Mapping[int, Process]) -> Process | None:
    """Return the process that a task of /proc is, or None when it is gone.

    *before*: what is known from an earlier look. A process that hangs in the kernel is known by that alone: reading
    its command line waits for its memory map, and whoever reads may hang with it.
    """
    started_at = round(boot + task.start_ticks / TICKS_PER_SECOND, 2)
    if task.state == "D":
        earlier = before.get(task.pid)
        arguments = earlier.arguments if earlier is not None and earlier.started_at == started_at else ()
    else:
        try:
            arguments = _arguments(files.piece_of(f"{proc}/{task.pid}/cmdline", files.PIECE_BYTES))
        except OSError:
            return None
    return Process(
        pid=task.pid,
        parent=task.parent,
        name=task.name,
        state=STATES.get(task.state, task.state),
        started_at=started_at,
        cpu_seconds=task.cpu_ticks / TICKS_PER_SECOND,
        arguments=arguments,
    )


def _arguments(command: bytes) -> tuple[str, ...]:
    text = command.decode("utf-8", "backslashreplace")
    if "\0" in text.rstrip("\0 "):
        return tuple(text.rstrip("\0").split("\0"))
    title = text.strip("\0 ")  # setproctitle pads the old command line with blanks or zeros
    return (title,) if title else ()


def environment_of(root: Path, pid: int) -> dict[str, str]:
    """Return a process's environment as it was at its start, secrets and all. Raises OSError."""
    raw = files.text_of(root / f"proc/{pid}/environ", 4 << 20)
    return dict(pair.split("=", 1) for pair in raw.split("\0") if "=" in pair)


# What is an engine -----------------------------------------------------------------------------------------------

_PYTHON = re.compile(r"^(?:python|pypy)[\d.]*$")

_MODULES = {
    "vllm.entrypoints.openai.api_server": "vllm",
    "vllm.entrypoints.openai.rpc.api_server": "vllm",
    "vllm.entrypoints.api_server": "vllm",
    "vllm.entrypoints.cli.main": "vllm",
    "vllm": "vllm",
    "sglang.launch_server": "sglang",
    "sglang.srt.server": "sglang",
    "tensorrt_llm.commands.serve": "tensorrt-llm",
}
"""`python -m MODULE`, or the same as a path of a script."""

_PROGRAMS = {
    "vllm": "vllm",
    "sglang": "sglang",
    "trtllm-serve": "tensorrt-llm",
    "text-generation-launcher": "tgi",
    "text-generation-server": "tgi",
    "text-generation-router": "tgi",
    "llama-server": "llama.cpp",
}

_SERVES = {"vllm": "serve", "sglang": "serve"}
"""Programs that do other things too: only this subcommand is an engine."""


def engine_kind(arguments: Iterable[str]) -> str | None:
    """Return which engine this command line starts, or None.

    The program itself must be the engine: a shell, `sudo`, `docker run` or `grep` that names one is none.
    """
    words = list(arguments)
    if not words:
        return None
    program = words[0].rpartition("/")[2]
    if _PYTHON.match(program):
        return _kind_of_script(words[1:])
    return _kind_of_program(program, words[1:])


def _kind_of_program(program: str, rest: list[str]) -> str | None:
    kind = _PROGRAMS.get(program)
    needed = _SERVES.get(program)
    return kind if needed is None or rest[:1] == [needed] else None


def _kind_of_script(words: list[str]) -> str | None:
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option == "-m" and words:
            module = words.pop(0)
            if module in {"vllm", "vllm.entrypoints.cli.main"} and words[:1] != ["serve"]:
                return None
            return _MODULES.get(module)
        if option == "-c":
            return None
        if option in {"-X", "-W"} and words:
            words.pop(0)
    if not words:
        return None
    script = words[0]
    if script.endswith(".py"):
        dotted = script.removesuffix(".py").replace("/", ".")
        return next(
            (kind for module, kind in _MODULES.items() if "." in module and dotted.endswith("." + module)), None
        )
    return _kind_of_program(script.rpartition("/")[2], words[1:])


_TITLE = re.compile(
    r"^(?P<prefix>[^\s:][^:]*)::(?P<role>DPEngineCore|EngineCore|Worker|APIServer|DPCoordinator|DPSupervisor)"
    r"(?P<parts>(?:_?[A-Z]*\d+)*)(?=[\s_]|$)"
)
"""`VLLM::Worker_DP0_TP1_EP1`; the prefix is VLLM_PROCESS_NAME_PREFIX (vLLM 0.10.1 and newer)."""

_PART = re.compile(r"(DP|PP|PCP|TP|DCP|EP)(\d+)")

_CUT_ROLES = ("EngineCor", "DPEngineC", "Worker")
"""What is left of the roles in a name that the kernel has cut, with the usual prefix."""

_CORES = ("EngineCore", "DPEngineCore", "EngineCor", "DPEngineC")


class _Title(msgspec.Struct, frozen=True):
    """A process title of vLLM, taken apart."""

    role: str
    parts: dict[str, int] = {}
    """Coordinates: `TP` → 3."""

    @property
    def works(self) -> bool:
        """Whether it is a worker. 0.10.1 called its workers `EngineCore_TP0`."""
        return self.role == "Worker" or bool(self.parts.keys() & {"TP", "PP"})


def _title_of(process: Process) -> _Title | None:
    match = _TITLE.match(process.title)
    if match:
        parts = {name: int(number) for name, number in _PART.findall(match["parts"])}
        return _Title(match["role"], parts)
    if process.name.startswith("VLLM::") and not process.arguments:
        cut = process.name.removeprefix("VLLM::")
        return next((_Title(role) for role in _CUT_ROLES if cut.startswith(role)), None)
    return None


class _Found(msgspec.Struct, frozen=True):
    """An engine and the processes below it."""

    front: Process
    kind: str
    family: tuple[Process, ...]
    is_embedded: bool = False
    """As `Engine.is_embedded`."""


def _found(every: Iterable[Process]) -> list[_Found]:
    """Return the engines among the processes: the topmost process of each family that serves.

    An engine core whose front is gone (killed by `kill -9` or the OOM killer, it keeps its GPUs) counts too.
    """
    by_pid = {process.pid: process for process in every}
    children: dict[int, list[Process]] = {}
    for process in by_pid.values():
        children.setdefault(process.parent, []).append(process)
    kinds: dict[int, str] = {}
    for process in by_pid.values():
        kind = engine_kind(process.arguments)
        title = _title_of(process) if kind is None else None
        if kind or (title is not None and title.role not in {"DPCoordinator", "DPSupervisor"}):
            kinds[process.pid] = kind or "vllm"

    def below(process: Process) -> Iterator[Process]:
        """Yield the descendants; while /proc is read, numbers are given anew, so that one may seem its own ancestor."""
        seen = {process.pid}
        waiting = [process]
        while waiting:
            parent = waiting.pop()
            if parent is not process:
                yield parent
            new = [child for child in children.get(parent.pid, ()) if child.pid not in seen]
            seen.update(child.pid for child in new)
            waiting += sorted(new, key=lambda child: child.pid, reverse=True)

    found: list[_Found] = []
    for pid, kind in sorted(kinds.items()):
        process = by_pid[pid]
        if not any(parent in kinds for parent in _ancestors(process, by_pid)):
            is_embedded = engine_kind(process.arguments) is None and _is_python(by_pid.get(process.parent))
            found.append(_Found(process, kind, tuple(below(process)), is_embedded))
    return found


def _is_python(process: Process | None) -> bool:
    """Whether a process is a program in Python, or an actor of Ray: what may have an engine core as its child.

    Who takes in orphans (init, `tini`, a container's shim) is none.
    """
    if process is None:
        return False
    program = process.arguments[0].rpartition("/")[2] if process.arguments else process.name
    return bool(_PYTHON.match(program)) or process.name.startswith(("python", "ray::"))


def _ancestors(process: Process, by_pid: dict[int, Process]) -> Iterator[int]:
    seen = {process.pid}
    while process.parent in by_pid and process.parent not in seen:
        process = by_pid[process.parent]
        seen.add(process.pid)
        yield process.pid


def _ranks(found: _Found, flags: EngineFlags) -> tuple[Rank, ...]:
    """Return the workers of a vLLM, each with its rank over all of tensor, pipeline and data parallelism."""
    titled = [(process, title) for process in (found.front, *found.family) if (title := _title_of(process))]
    workers = [(process, title) for process, title in titled if title.works]
    if not workers:  # one GPU: the engine core is its own worker
        workers = [(process, title) for process, title in titled if title.role.endswith("EngineCore")]
    if not workers:
        return tuple(
            _rank(process, Absent(Why.NOT_SUPPORTED, "a vLLM before 0.10.1 gives its workers no titles"))
            for process in found.family
            if _untitled_worker(process, found.front)
        )
    tp = max(or_none(flags.tensor_parallel_size) or 1, 1 + max(t.parts.get("TP", 0) for _, t in workers))
    pp = max(or_none(flags.pipeline_parallel_size) or 1, 1 + max(t.parts.get("PP", 0) for _, t in workers))

    def number(title: _Title) -> Maybe[int]:
        if not title.parts and len(workers) > 1:
            return Absent(Why.NOT_PRESENT, "its title does not tell yet: the engine starts, or the process ends")
        parts = title.parts
        return (parts.get("DP", 0) * pp + parts.get("PP", 0)) * tp + parts.get("TP", 0)

    ranks = [_rank(process, number(title)) for process, title in workers]
    return tuple(sorted(ranks, key=lambda rank: (rank.rank if known(rank.rank) else 1 << 30, rank.pid)))


def _cores(found: _Found) -> tuple[Rank, ...]:
    """Return the engine cores that have workers of their own."""
    titled = [(process, title) for process in (found.front, *found.family) if (title := _title_of(process))]
    if not any(title.works for _, title in titled):
        return ()
    return tuple(_rank(process, NOT_ASKED) for process, title in titled if title.role in _CORES and not title.works)


def _rank(process: Process, number: Maybe[int]) -> Rank:
    return Rank(pid=process.pid, rank=number, title=process.title, state=process.state, cpu_seconds=process.cpu_seconds)


def _untitled_worker(process: Process, front: Process) -> bool:
    """Whether a child of an old vLLM is a worker: forked with the front's command line, or spawned by multiprocessing."""
    forked = process.arguments == front.arguments
    spawned = any("multiprocessing.spawn" in argument for argument in process.arguments)
    return forked or spawned


# Where an engine lives -------------------------------------------------------------------------------------------

_CONTAINER = re.compile(r"(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/|$)")


class _Place(msgspec.Struct, frozen=True):
    """Where a process stands in the control groups."""

    path: str
    controller: str
    """`` on cgroup 2; on cgroup 1 the hierarchy that counts memory."""

    @property
    def container(self) -> str | None:
        ids = _CONTAINER.findall(self.path)
        return ids[-1] if ids else None

    @property
    def unit(self) -> str | None:
        units = [part for part in self.path.split("/") if part.endswith(".service") and not part.startswith("user@")]
        return units[-1] if units else None


def _place(folder: Path) -> _Place:
    """Return a process's control group. Raises OSError."""
    by_controller: dict[str, str] = {}
    for line in files.text_of(folder / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            by_controller[controller] = path
    if "memory" in by_controller:
        return _Place(by_controller["memory"], "memory")
    return _Place(by_controller.get("", "/"), "")


def _oom_kills(root: Path, place: _Place) -> Maybe[int]:
    file = "memory.oom_control" if place.controller else "memory.events"
    path = root / "sys/fs/cgroup" / place.controller / place.path.lstrip("/") / file

    def count(text: str) -> int:
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    try:
        return files.maybe(path, count)
    except KeyError:
        return Absent(Why.NOT_SUPPORTED, f"{path} does not count OOM kills")


def _shared_memory(root: Path, pid: int) -> SharedMemory:
    """Return size and use of `/dev/shm` as the engine sees it."""
    folder = root / f"proc/{pid}/root/dev/shm"
    try:
        if folder.stat().st_dev == folder.parent.stat().st_dev:
            absent = Absent(Why.NOT_PRESENT, "nothing is mounted at /dev/shm of the engine")
            return SharedMemory(total_bytes=absent, used_bytes=absent)
        size = os.statvfs(folder)
    except OSError as e:
        absent = files.why_not(e, folder)
        return SharedMemory(total_bytes=absent, used_bytes=absent)
    return SharedMemory(
        total_bytes=size.f_blocks * size.f_frsize, used_bytes=(size.f_blocks - size.f_bfree) * size.f_frsize
    )


# The collector ---------------------------------------------------------------------------------------------------


class Processes:
    """The serving engines of a root and their worker processes."""

    source = Source.PROCESSES
    deadline_seconds = 3.0
    after_engines = False

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._tasks = Tasks(root)
        self._before: dict[int, Process] = {}
        self._environments: dict[tuple[int, float], dict[str, str]] = {}
        """By pid and start: what /proc shows is the environment at the start, and never changes."""

    def collect(self, visit: Visit) -> Reading:  # noqa: ARG002 - the protocol's
        """Look for engines. Raises CannotSeeError when /proc can't be read."""
        try:
            self._before = {process.pid: process for process in self._processes()}
            found = _found(self._before.values())
        except (OSError, ValueError) as e:
            why = files.why_not(e, self.root / "proc") if isinstance(e, OSError) else Absent(Why.FAILED, str(e))
            raise CannotSeeError(why) from e
        unseen: list[Unseen] = []
        if not (self.root / "proc/1").exists():
            why = Absent(Why.NO_PERMISSION, "/proc is mounted with hidepid: run as root to see other users' processes")
            unseen.append(Unseen(self.source, why, "processes of other users"))
        engines = tuple(self._engine(each, unseen) for each in found)
        there = {(engine.pid, engine.started_at) for engine in engines}
        self._environments = {key: told for key, told in self._environments.items() if key in there}
        return Reading(fields={"engines": engines}, unseen=tuple(unseen))

    def _processes(self) -> Iterator[Process]:
        """Yield the processes but those of the kernel. Raises OSError or ValueError."""
        boot = booted_at(self.root)
        proc = self.root / "proc"
        for task in self._tasks:
            process = process_of(proc, task, boot, self._before)
            if process is not None:
                yield process

    def _engine(self, found: _Found, unseen: list[Unseen]) -> Engine:
        front = found.front
        folder = self.root / f"proc/{front.pid}"
        flags = _flags(front.arguments)
        visible: Maybe[tuple[str, ...]] = NOT_ASKED
        environment = self._environment(front)
        if isinstance(environment, Absent):
            unseen.append(Unseen(self.source, environment, f"environment of engine {front.pid}"))
            environment, visible = {}, environment
        try:
            place = _place(folder)
            nowhere = Absent(Why.NOT_PRESENT)
            unit, container, cgroup = place.unit or nowhere, place.container or nowhere, place.path
            oom_kills = _oom_kills(self.root, place)
        except (OSError, ValueError) as e:
            why = files.why_not(e, "its cgroup") if isinstance(e, OSError) else Absent(Why.FAILED, f"its cgroup: {e}")
            unit = container = cgroup = oom_kills = why
        return Engine(
            pid=front.pid,
            started_at=front.started_at,
            kind=found.kind,
            command_line=command_line_without_secrets(front.arguments),
            environment=environment,
            flags=flags,
            ranks=_ranks(found, flags) if found.kind == "vllm" else (),
            cores=_cores(found) if found.kind == "vllm" else (),
            visible_gpus=visible,
            unit=unit,
            container=container,
            cgroup=cgroup,
            oom_kills_total=oom_kills,
            shared_memory=_shared_memory(self.root, front.pid),
            cpu_seconds=front.cpu_seconds,
            state=front.state,
            is_embedded=found.is_embedded,
        )

    def _environment(self, front: Process) -> dict[str, str] | Absent:
        key = (front.pid, front.started_at)
        if key not in self._environments:
            if front.state == STATES["D"]:
                return Absent(Why.FAILED, "the process hangs in the kernel, and whoever reads it may hang with it")
            try:
                found = environment_without_secrets(environment_of(self.root, front.pid))
            except OSError as e:
                return files.why_not(e, "the engine's environment")
            self._environments[key] = found
        return self._environments[key]

    def close(self) -> None:
        """Nothing is held open."""


def _flags(arguments: tuple[str, ...]) -> EngineFlags:
    flags = command_line.read(arguments)
    if known(flags.speculative):
        flags = msgspec.structs.replace(flags, speculative=text_without_secrets(flags.speculative))
    return msgspec.structs.replace(flags, unknown=tuple(text_without_secrets(flag) for flag in flags.unknown))
