"""The model's weights and a usual runtime fill the GPUs: no KV cache is left, or not even the weights fit."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.machine.fit import LEAST_RUNTIME_BYTES, RUNTIME_BYTES
from doctor.machine.serving import Serving
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, EngineEvent, Source, Why
from doctor.symptoms.served import BEYOND_ROOM, Served, unproven

GB = 1e9
SIGNS = ("cuda-out-of-memory", "sampler-warmup-out-of-memory", "no-kv-blocks", "kv-cache-too-small")
"""The engine's own words for a memory that did not suffice."""
WIDER = (2, 4, 8, 16)


@rule(
    "model-does-not-fit",
    "The model does not fit the GPUs that it is given",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.PROCESSES, Source.MODEL),
    explains=("out-of-memory-at-startup", "context-does-not-fit", "engine-crashed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Ask of each engine that has not come up: what do weights and runtime leave? One that serves has proved that it fits."""
    for one in unproven(history):
        lines = one.log.having(*SIGNS) if one.log is not None else ()
        if one.told and not lines:
            continue  # it died of something else before it could run out of memory
        if one.has_argument(*BEYOND_ROOM):
            yield Absent(
                Why.NOT_SUPPORTED, "there is no arithmetic for weights in host memory or a KV cache of fixed size"
            )
        elif isinstance(one.serving, Absent):
            yield one.serving
        elif one.serving.room().kv_bytes <= 0 and not one.serving.obstacles():
            yield _finding(one, one.serving, lines)


def _finding(one: Served, serving: Serving, lines: tuple[EngineEvent, ...]) -> Finding:
    room = serving.room()
    certain = room.kv_bytes_at_most <= 0
    ranks = len(serving.gpus)
    each = f"each of {ranks} GPUs" if ranks > 1 else "the one GPU"
    wider = next(
        (
            tp
            for tp in WIDER
            if tp > ranks and not serving.obstacles(tp) and serving.room(tp).holds(serving.context or 1)
        ),
        None,
    )
    runtime = LEAST_RUNTIME_BYTES if certain else RUNTIME_BYTES
    left = f"{'cannot' if certain else 'is not expected to'} leave memory for any KV cache"
    remedy = f"; tensor parallelism over {wider} such GPUs has room" if wider else ""
    return Finding(
        summary=f"{room.weight_bytes / GB:.1f} GB of weights and {runtime / GB:.1f} GB of runtime on {each} {left}: "
        f"--gpu-memory-utilization {serving.utilization:g} of {serving.card.name} is {room.budget_bytes / GB:.1f} GB{remedy}",
        evidence=(
            Evidence(
                Source.MODEL.value,
                one.config,
                f"{serving.model.parameters / GB:.1f} G parameters, {serving.model.precision.name}, "
                f"{room.weight_bytes / GB:.1f} GB a GPU at TP={ranks}",
            ),
            Evidence(
                Source.NVML.value,
                "memory, PCI device id",
                f"{serving.card.name}, {serving.card.memory_bytes / GB:.1f} GB for CUDA",
            ),
            *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in lines[:2]),
        ),
        confidence=Confidence.HIGH
        if lines
        else Confidence.MEDIUM
        if room.kv_bytes_beside_weights <= 0
        else Confidence.LOW,
        severity=None if certain or lines else Severity.WARNING,
        subject=Subject(engine=one.name, gpus=serving.gpus),
        since=lines[0].at if lines else None,
        facts={"tensor-parallel-size": str(wider)} if wider else {},
    )
