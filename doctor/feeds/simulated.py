"""Visits of a node that does not exist: the same collectors, on a simulated NVML, a real root and a real page."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from doctor.collectors.collector import Pace
from doctor.collectors.gpu_access import GpuAccess
from doctor.collectors.kernel_log import KMSG, KernelLog
from doctor.collectors.nvml import NvmlCollector
from doctor.feeds import live
from doctor.readers.patterns import LogPattern
from doctor.simulation import faults as registry
from doctor.simulation import serving
from doctor.simulation.engine import MetricsServer, SimulatedEngine
from doctor.simulation.faults import Fault
from doctor.simulation.physics import Drill
from doctor.simulation.profiles import Profile, Workload
from doctor.simulation.root import SimulatedRoot
from doctor.simulation.script import READY_SECONDS, STARTS_SECONDS
from doctor.snapshot import Node, Snapshot, Source

TICK_SECONDS = 0.1
"""How often the node's files are brought up to its time."""


def node(
    profile: str,
    faults: Iterable[str] = (),
    *,
    every: float = 1.0,
    times: int | None = None,
    patience_seconds: float = 5.0,
    patterns: Sequence[LogPattern] = (),
    access: GpuAccess | None = None,
    paces: Mapping[Source, Pace] | None = None,
) -> Iterator[Snapshot]:
    """Yield the visits of a simulated node, one each *every* seconds; nothing of it is left when they end.

    Raises FaultError for a profile or a fault that is none.
    """
    drill = drill_of(profile, faults)
    nvml = NvmlCollector(
        root=None,
        library="doctor.simulation.nvml",
        spec=msgspec.json.encode(drill).decode(),
        patience_seconds=patience_seconds,
        access=access,
    )
    return _visits(drill, nvml, patterns, every=every, times=times, paces=paces)


def drill_of(profile: str, faults: Iterable[str] = ()) -> Drill:
    """Return the drill of a profile and faults as they are written on a command line. Raises FaultError."""
    there = registry.profile(profile)
    wanted = registry.parse_all(faults, there)
    engine = _engine(there, wanted)
    all_faults = tuple(part for fault in wanted for part in _parts(fault, there, engine))
    return Drill(profile=profile, started_at=time.time(), faults=all_faults, workload=engine)


def _engine(there: Profile, faults: tuple[Fault, ...]) -> Workload:
    """Return the engine that these faults need."""
    engine = there.workload
    for fault in faults:
        if fault.name == "single-stream":
            engine = msgspec.structs.replace(engine, requests=1, model=serving.LLAMA_70B_FP8)
        elif fault.name == "fp8-not-engaged":
            engine = msgspec.structs.replace(engine, model=serving.LLAMA_70B_FP8)
        elif fault.name in STARTS_SECONDS:
            engine = msgspec.structs.replace(engine, started_seconds=fault.start_seconds - STARTS_SECONDS[fault.name])
    return engine


def _parts(fault: Fault, there: Profile, engine: Workload) -> Iterator[Fault]:
    """Yield the fault and what NVML shows of the same.

    A fault of NVML's side that stands first decides what its GPUs do.
    """

    def also(name: str, *, start: float | None = None, **params: registry.Value) -> Fault:
        begins = fault.start_seconds if start is None else start
        return Fault(name=name, params=params, start_seconds=begins, end_seconds=fault.end_seconds)

    if fault.name in {"nccl-timeout", "rank-stopped", "rank-blocked"}:
        gpu = engine.gpus[int(fault.params["rank"])]
        fault = msgspec.structs.replace(fault, params=fault.params | {"gpu": gpu})
    elif fault.name == "engine-stalled" and fault.params["kind"] == "collective":
        yield also("gpu-idle", gpu=engine.gpus[-1])
    elif fault.name == "engine-stalled" and fault.params["kind"] == "software":
        yield from (also("gpu-idle", gpu=gpu) for gpu in engine.gpus)
    elif fault.name == "kernel-hung":
        yield from (also("gpu-idle", gpu=gpu) for gpu in engine.gpus if gpu != fault.params["gpu"])
    elif fault.name == "gpu-memory-fault":
        yield also("ecc-uncorrected", gpu=fault.params["gpu"], count=1)
        yield also("remap-pending", gpu=fault.params["gpu"])
        yield also("recovery-action", gpu=fault.params["gpu"], action="reset")
    elif fault.name == "gpu-memory-held":
        yield also(
            "foreign-process", start=engine.started_seconds - 3600, gpu=fault.params["gpu"], gib=fault.params["gib"]
        )
    elif fault.name == "fabric-manager-dead-at-start":
        yield also("fabric-manager-dead", start=engine.started_seconds - 600)
    elif fault.name == "driver-too-old":
        yield also("driver-old", branch=550)
    elif fault.name == "fabric-manager-version" and there.fabric:
        yield also("fabric-incomplete")
    elif fault.name == "pcie-fallback":
        # Unless a moment is named, the links were down when the engine started and chose its way.
        early = engine.started_seconds - READY_SECONDS
        yield also("nvlinks-all-down", start=early if fault.start_seconds == registry.START_SECONDS else None)
    yield fault


def _visits(
    drill: Drill,
    nvml: NvmlCollector,
    patterns: Sequence[LogPattern],
    *,
    every: float,
    times: int | None,
    paces: Mapping[Source, Pace] | None,
) -> Iterator[Snapshot]:
    with contextlib.ExitStack() as leaving:
        folder = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix="gpu-doctor-simulated-")))
        world = World(drill, folder, patterns=patterns)
        leaving.callback(world.close)
        life = _Life(world)
        leaving.callback(life.close)
        collectors = (nvml, *world.collectors)
        for snapshot in live.every(every, collectors, times, node=world.described, paces=paces):
            yield world.as_of_its_own_root(snapshot)


class World:
    """All of a drill but NVML: its files under *folder*, its engine's page, and the collectors that read them.

    *clock* tells Unix time; the drill's second 0 is its `started_at`.
    """

    def __init__(
        self,
        drill: Drill,
        folder: Path,
        clock: Callable[[], float] = time.time,
        *,
        patterns: Sequence[LogPattern] = (),
    ) -> None:
        self._drill = drill
        self._folder = folder
        self._clock = clock
        engine = SimulatedEngine(drill)
        lock = threading.Lock()  # the physics steps forward: one thread at a time

        def page() -> str:
            with lock:
                return engine.page(self._seconds)

        self._server = MetricsServer(page)
        self._root = root = SimulatedRoot(folder, drill, self._server.port)
        root.write()
        # The engine may be gone by the first visit: then only its name leads to its log, as at a real site.
        logs = () if root.absent or root.has("engine-log-missing") else (serving.LOG,)
        opens = _refused if root.has("kernel-log-denied") else os.open
        kernel_log = KernelLog(folder, open_file=opens, patterns=patterns)
        self.collectors = live.without_nvml(folder, logs=logs, kernel_log=kernel_log, patterns=patterns)
        self.described = Node(name=f"simulated-{drill.profile}", simulated=True)

    @property
    def _seconds(self) -> float:
        return self._clock() - self._drill.started_at

    def advance(self) -> None:
        """Bring files and page up to the clock."""
        seconds = self._seconds
        self._root.advance(seconds)
        ready = self._drill.engine.started_seconds + READY_SECONDS <= seconds < self._drill.engine_ends_seconds
        if ready and not self._root.absent and self._drill.active("metrics-down", seconds) is None:
            self._server.open()
        else:
            self._server.close()

    def as_of_its_own_root(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with paths as a process of the simulated node would write them."""
        told = msgspec.json.encode(snapshot)
        return msgspec.json.decode(told.replace(str(self._folder).encode(), b""), type=Snapshot)

    def close(self) -> None:
        """Take the page down; the files are its owner's."""
        self._server.close()


def _refused(path: str, flags: int) -> int:  # noqa: ARG001 - as os.open
    if path.endswith(KMSG):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class _Life:
    """The drill's time: a thread that keeps its world up with the clock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._pass, name="simulated-node", daemon=True)
        world.advance()
        self._thread.start()

    def _pass(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with contextlib.suppress(OSError):  # no space left, or its port was taken: it stays as it is
                self._world.advance()

    def close(self) -> None:
        """Stop the time."""
        self._over.set()
        self._thread.join()
