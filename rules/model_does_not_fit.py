"""The model's weights and a usual runtime fill the GPUs: no KV cache is left, or not even the weights fit."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.machine.fit import LEAST_RUNTIME_BYTES, RUNTIME_BYTES
from doctor.machine.serving import Serving, serving_of
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Maybe, Source, Why, known, or_none
from doctor.symptoms.served import Served, served

GB = 1e9
SIGNS = ("cuda-out-of-memory", "sampler-warmup-out-of-memory", "no-kv-blocks", "kv-cache-too-small")
"""The engine's own words for a memory that did not suffice."""
WIDER = (2, 4, 8, 16)


@rule(
    "model-does-not-fit",
    "The model does not fit the GPUs that it is given",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.PROCESSES, Source.MODEL),
    explains=("out-of-memory-at-startup", "context-does-not-fit"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Ask of each engine that has not come up: what do weights and runtime leave? One that serves has proved that it fits."""
    serves = {page.engine for page in history.latest.metrics}
    for one in served(history):
        if one.came_up or one.engine.id in serves:
            continue
        if one.has_argument("--cpu-offload-gb", "--kv-cache-memory-bytes", "--kv-cache-memory"):
            yield Absent(
                Why.NOT_SUPPORTED, "there is no arithmetic for weights in host memory or a KV cache of fixed size"
            )
            continue
        serving = _serving(history, one)
        if isinstance(serving, Absent):
            yield serving
        elif serving.room().kv_bytes <= 0:
            yield _finding(one, serving)


def _serving(history: History, one: Served) -> Maybe[Serving]:
    """Return what is served; where nothing tells which of several equal GPUs will be taken, on the first of them."""
    if known(one.serving) or one.group is None or one.group.gpus:
        return one.serving
    visible = or_none(one.engine.visible_gpus) or tuple(gpu.uuid for gpu in history.latest.gpus)
    products = {gpu.pci_device_id for gpu in history.latest.gpus if gpu.uuid in visible}
    if len(products) != 1 or len(visible) < one.group.size:
        return one.serving
    return serving_of(history.latest, one.engine, visible[: one.group.size])


def _finding(one: Served, serving: Serving) -> Finding:
    room = serving.room()
    certain = room.kv_bytes_at_most <= 0
    ranks = len(serving.gpus)
    each = f"each of {ranks} GPUs" if ranks > 1 else "the one GPU"
    lines = one.log.having(*SIGNS) if one.log is not None else ()
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
                "config.json",
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
        confidence=Confidence.HIGH if lines else Confidence.LOW,
        severity=None if certain or lines else Severity.WARNING,
        subject=Subject(engine=one.engine.id, gpus=serving.gpus),
        since=lines[0].at if lines else None,
        facts={"tensor-parallel-size": str(wider)} if wider else {},
    )
