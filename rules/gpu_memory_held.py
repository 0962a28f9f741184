"""A process that belongs to no engine holds memory of an engine's GPU."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Absent, Engine, Gpu, GpuProcess, Snapshot, Source, Why, known
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.names import listed, name_of

GIB = 1 << 30
MPS_SERVER = "nvidia-cuda-mps-server"
"""It holds what its clients share, and stays as long as they do (NVIDIA, Multi-Process Service)."""

OUT_OF_MEMORY = frozenset({"cuda-out-of-memory", "free-memory-below-utilization"})
"""Errors that name the GPU which had too little left."""


class Limits(msgspec.Struct, frozen=True):
    """How much a stranger may hold."""

    held_bytes: float = 2e9
    """guess: an idle CUDA context takes 0.5 GB on an H100, and a monitor or a desktop no more than two of them."""
    settle_seconds: float = 10.0
    """A process of an engine that is being stopped outlives it by up to 3 s (measured, vLLM 0.32.0); it is none of an
    engine's at every visit of this time, at two visits at least where there are two."""


class Held(msgspec.Struct, frozen=True):
    """A GPU whose memory strangers hold."""

    gpu: Gpu
    strangers: tuple[GpuProcess, ...]

    @property
    def gib(self) -> float:
        """What they hold together."""
        return sum(p.used_bytes for p in self.strangers if known(p.used_bytes)) / GIB


@rule(
    "gpu-memory-held",
    "Another process holds memory of an engine's GPU",
    severity=Severity.WARNING,
    needs=(Source.NVML, Source.PROCESSES),
    explains=("out-of-memory-at-startup",),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Join NVML's processes with the engines': only where an engine's own rank is recognised on the GPU, or one failed there.

    Pids that match nobody's prove nothing: in a container without the host's pids every rank would be a stranger.
    """
    latest = history.latest
    if latest.why_unseen(Source.PROCESSES) is not None:
        return
    starved = _starved(history)
    for gpu in latest.gpus:
        if gpu.mig.enabled is True or gpu.lost is True:
            continue
        if not known(gpu.processes):
            yield gpu.processes
            continue
        held = _held(history, gpu, limits)
        owners = [e for e in latest.engines if not e.is_left_over and _pids(e) & {p.pid for p in gpu.processes}]
        left_over = {pid for engine in latest.engines if engine.is_left_over for pid in _pids(engine)}
        if not held.strangers:
            continue
        if not (owners or gpu.index in starved or {p.pid for p in held.strangers} & left_over):
            if latest.engines and not _is_any_recognised(latest):
                yield Absent(Why.NOT_SUPPORTED, "NVML's pids are no engine's: the doctor needs to see the host's pids")
            continue
        if any(engine.kind != "vllm" for engine in latest.engines):
            yield Absent(Why.NOT_SUPPORTED, "the processes of an engine that is no vLLM are not told from strangers")
            continue
        yield _finding(held, owners, left_over, failed=starved.get(gpu.index))


def _held(history: History, gpu: Gpu, limits: Limits) -> Held:
    """Return who holds memory of the GPU, belongs to no engine, and has done so for long enough."""
    visits = history.window(limits.settle_seconds)
    if len(visits) == 1:
        visits = history.snapshots[-2:]
    lasting = set[int].intersection(*(_strangers(snapshot, gpu.uuid, limits) for snapshot in visits))
    processes = gpu.processes if known(gpu.processes) else ()
    return Held(gpu, tuple(p for p in processes if p.pid in lasting))


def _strangers(snapshot: Snapshot, uuid: str, limits: Limits) -> set[int]:
    gpu = snapshot.gpu(uuid)
    owned = {pid for engine in snapshot.engines if not engine.is_left_over for pid in _pids(engine)}
    return {
        process.pid
        for process in (gpu.processes if gpu is not None and known(gpu.processes) else ())
        if process.pid not in owned
        and known(process.used_bytes)
        and process.used_bytes >= limits.held_bytes
        and MPS_SERVER not in str(process.name)
    }


def _pids(engine: Engine) -> set[int]:
    return {engine.pid, *(rank.pid for rank in engine.ranks)}


def _is_any_recognised(snapshot: Snapshot) -> bool:
    """Whether any process of an engine is among NVML's."""
    seen = {process.pid for gpu in snapshot.gpus if known(gpu.processes) for process in gpu.processes}
    return any(_pids(engine) & seen for engine in snapshot.engines)


def _starved(history: History) -> dict[int, tuple[str, Evidence]]:
    """Return the GPUs that had too little memory for an engine to start, with that engine and its word."""
    found: dict[int, tuple[str, Evidence]] = {}
    for log, incident in incidents(history):
        for event in incident.having(*OUT_OF_MEMORY) if not incident.serving else ():
            index = event.facts.get("gpu")
            if isinstance(index, int):
                found.setdefault(index, (log.engine, Evidence(Source.ENGINE_LOG.value, event.where, event.text)))
    return found


def _finding(held: Held, owners: list[Engine], left_over: set[int], failed: tuple[str, Evidence] | None) -> Finding:
    gpu, strangers = held.gpu, held.strangers
    names = listed(_named(process, left_over) for process in strangers)
    verb = "holds" if len(strangers) == 1 else "hold"
    apart = all(process.pid in left_over for process in strangers)
    beside = "" if apart else " and belongs to no engine" if len(strangers) == 1 else " and belong to no engine"
    then = "; an engine could not start there" if failed else ""
    first = strangers[0]
    return Finding(
        summary=f"{names} {verb} {held.gib:.1f} GiB of {name_of(gpu)}{beside}{then}",
        evidence=(
            *(
                Evidence(
                    Source.NVML.value,
                    f"GPU {gpu.index}: processes",
                    f"pid {p.pid} ({p.name if known(p.name) else 'no name: it may be dead'}) holds {_gib(p)} GiB",
                )
                for p in strangers[:4]
            ),
            *((failed[1],) if failed else ()),
        ),
        confidence=Confidence.HIGH if owners or left_over else Confidence.MEDIUM,
        severity=None if failed else Severity.NOTICE,
        subject=Subject(
            gpus=(gpu.uuid,),
            engine=failed[0] if failed else owners[0].id if len(owners) == 1 else "",
            pids=tuple(p.pid for p in strangers),
        ),
        facts=dict(facts_of_gpu(gpu.index, None, gpu.uuid)) | {"pid": str(first.pid)},
    )


def _named(process: GpuProcess, left_over: set[int]) -> str:
    if process.pid in left_over:
        return f"pid {process.pid}, left over of an engine whose server is gone,"
    name = process.name.rpartition("/")[2] if known(process.name) else ""
    return f"{name} (pid {process.pid})" if name else f"pid {process.pid}"


def _gib(process: GpuProcess) -> str:
    return f"{process.used_bytes / GIB:.1f}" if known(process.used_bytes) else "an unknown amount of"
