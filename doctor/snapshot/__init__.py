"""What one visit saw: frozen values, units in names, a reason for every absence.

The ground floor: it imports nothing of the project. Every value travels through a recording unchanged.
"""

from __future__ import annotations

import msgspec

from doctor.snapshot.absence import NOT_ASKED, NOT_GIVEN, Absent, Maybe, Why, known, or_none
from doctor.snapshot.engine import (
    CpuShare,
    Engine,
    EngineEvent,
    EngineFlags,
    EngineMetrics,
    EngineStack,
    Fact,
    Histogram,
    LogState,
    ModelConfig,
    Rank,
    SharedMemory,
)
from doctor.snapshot.gpu import (
    EVENT_REASONS,
    Activity,
    Clocks,
    Ecc,
    Fabric,
    Gpu,
    GpuMemory,
    GpuPair,
    GpuProcess,
    Mig,
    MigDevice,
    NvLink,
    Pcie,
    Power,
    Sample,
    Thermal,
)
from doctor.snapshot.host import (
    BlockedTask,
    DriverGpu,
    FabricManager,
    FabricMessage,
    Host,
    Node,
    NvSwitch,
    PciDevice,
    Stack,
)
from doctor.snapshot.kernel import HostMessage, KernelEvent, NvidiaMessage, OomKill, Sxid, Xid
from doctor.snapshot.recorder import Position, Recorder
from doctor.snapshot.source import OF_A_NODE, CollectorRun, Source, Unseen


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one visit saw of a node."""

    at: float
    """Unix time, seconds: the only clock that rules and symptoms know."""
    clock_stepped_seconds: float = 0.0
    """How far the wall clock was set forwards since the visit before; negative: backwards. What was seen before is then
    told in the new time."""
    node: Node = Node()
    seen: tuple[Source, ...] = ()
    """The sources that were looked at with success. A source is in here or in `unseen`, or partly in both."""
    unseen: tuple[Unseen, ...] = ()
    collectors: tuple[CollectorRun, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    nvml_blocked_seconds: float = 0.0
    """How long NVML had not answered when the visit gave up waiting; 0: it answered."""
    kernel: tuple[KernelEvent, ...] = ()
    """New since the last visit; the first visit brings what the log still holds."""
    engines: tuple[Engine, ...] = ()
    engine_events: tuple[EngineEvent, ...] = ()
    """New since the last visit, in the order of each log."""
    logs: tuple[LogState, ...] = ()
    metrics: tuple[EngineMetrics, ...] = ()
    stack: Stack = Stack()
    fabric_manager: FabricManager = FabricManager()
    host: Host = Host()
    recorder: Recorder = Recorder()
    positions: tuple[Position, ...] = ()
    """How far the logs were read; a source that did not answer in time has none."""

    def gpu(self, uuid: str) -> Gpu | None:
        """Return the GPU with this UUID, or None."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)

    def why_unseen(self, source: Source) -> Absent | None:
        """Return why a whole source is missing, or None where it was seen."""
        if source in self.seen:
            return None
        return next((u.why for u in self.unseen if u.source is source and not u.what), NOT_ASKED)


__all__ = [
    "EVENT_REASONS",
    "NOT_ASKED",
    "NOT_GIVEN",
    "OF_A_NODE",
    "Absent",
    "Activity",
    "BlockedTask",
    "Clocks",
    "CollectorRun",
    "CpuShare",
    "DriverGpu",
    "Ecc",
    "Engine",
    "EngineEvent",
    "EngineFlags",
    "EngineMetrics",
    "EngineStack",
    "Fabric",
    "FabricManager",
    "FabricMessage",
    "Fact",
    "Gpu",
    "GpuMemory",
    "GpuPair",
    "GpuProcess",
    "Histogram",
    "Host",
    "HostMessage",
    "KernelEvent",
    "LogState",
    "Maybe",
    "Mig",
    "MigDevice",
    "ModelConfig",
    "Node",
    "NvLink",
    "NvSwitch",
    "NvidiaMessage",
    "OomKill",
    "PciDevice",
    "Pcie",
    "Position",
    "Power",
    "Rank",
    "Recorder",
    "Sample",
    "SharedMemory",
    "Snapshot",
    "Source",
    "Stack",
    "Sxid",
    "Thermal",
    "Unseen",
    "Why",
    "Xid",
    "known",
    "or_none",
]
