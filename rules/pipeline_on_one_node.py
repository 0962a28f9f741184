"""Pipeline stages on one node whose GPUs tensor parallelism could use together."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.fit import why_tp_impossible
from doctor.machine.weights import model_of
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, GpuPair, Source, Why, known, or_none
from doctor.symptoms.links import speaks_nvlink
from doctor.symptoms.served import Served, served


class Limits(msgspec.Struct, frozen=True):
    """Where tensor parallelism is almost always preferred."""

    gpus_max: int = 8
    """Document 2: single-node setups with 8 or fewer GPUs."""


@rule(
    "pipeline-on-one-node",
    "Pipeline stages where tensor parallelism would do",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.NVML),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Ask of each engine with stages on this node alone whether heads and links allow as many ranks instead."""
    for one in served(history):
        stages = or_none(one.engine.flags.pipeline_parallel_size) or 1
        ranks = or_none(one.engine.flags.tensor_parallel_size) or 1
        world = stages * ranks
        if stages < 2 or one.has_argument("--nnodes", "-n", "--node-rank", "-r"):
            continue
        gpus = history.latest.gpus
        if not gpus:
            yield Absent(Why.NOT_ASKED, "the node's GPUs were not seen")
        elif world <= min(len(gpus), limits.gpus_max):
            yield from _judged(history, one, stages, world)


def _judged(history: History, one: Served, stages: int, world: int) -> Iterator[Finding | Absent]:
    links = {speaks_nvlink(pair) for pair in _pairs(history, one.engine)}
    if False in links:
        return  # over PCIe stages talk less than ranks
    model = model_of(one.engine.model, or_none(one.engine.flags.quantization))
    if None in links or not links:
        yield Absent(Why.NOT_ASKED, "how the engine's GPUs are linked was not seen")
    elif isinstance(model, Absent):
        yield model
    elif not why_tp_impossible(model, world):
        yield Finding(
            summary=f"Engine {one.engine.pid} runs {stages} pipeline stages on one node with NVLink: TP={world} over the same GPUs "
            "uses all of them for each token, where stages wait for each other",
            evidence=(Evidence(Source.PROCESSES.value, "--pipeline-parallel-size", str(stages)),),
            confidence=Confidence.MEDIUM,
            subject=Subject(engine=one.engine.id),
            facts={"tensor-parallel-size": str(world)},
        )


def _pairs(history: History, engine: Engine) -> list[GpuPair]:
    on = {rank.gpu for rank in engine.ranks if known(rank.gpu)} or set(or_none(engine.visible_gpus) or ())
    pairs = history.latest.pairs
    return [pair for pair in pairs if pair.first in on and pair.second in on] if on else list(pairs)
