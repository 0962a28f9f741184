"""All-reduces take more than their share of a decode step, by the fabric, the model and the load that are there."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, or_none
from doctor.symptoms.served import Served, served, served_by
from doctor.symptoms.traffic import Load, Traffic, load_of, long_enough


class Limits(msgspec.Struct, frozen=True):
    """How much communication is too much."""

    communication_ratio: float = 0.30
    """Document 3: more than 30 % of a step is dominant."""
    prefill_share_max: float = 0.5
    """Of the time in prompts, predicted; above it the load is prefill-heavy, where document 3 finds a wide TP right."""
    window_seconds: float = 300.0
    """guess: five minutes of load are a load."""


@rule(
    "allreduce-dominant",
    "Communication between the ranks dominates a step",
    severity=Severity.NOTICE,
    needs=(Source.NVML, Source.PROCESSES, Source.ENGINE_METRICS, Source.MODEL),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Predict a step at the measured batch. Nothing here measures the time in NCCL, so this is a notice, never an alarm."""
    if not any(one.group is not None and one.group.size > 1 for one in served(history)):
        return
    for traffic in long_enough(history, limits.window_seconds):
        if isinstance(traffic, Absent):
            yield traffic
            continue
        one, load = served_by(history, traffic.engine), load_of(traffic)
        if one is None or load is None or one.group is None or one.group.size < 2:
            continue
        yield from (
            (one.serving,) if isinstance(one.serving, Absent) else _judged(one, one.serving, traffic, load, limits)
        )


def _judged(one: Served, serving: Serving, traffic: Traffic, load: Load, limits: Limits) -> Iterator[Finding | Absent]:
    step = serving.decode(load.batch, load.context)
    prompt = serving.prefill(max(1, round(load.computed_tokens)))
    fabric = serving.fabric()
    if isinstance(fabric, Absent) or isinstance(step, Absent) or isinstance(prompt, Absent):
        yield Absent(Why.NOT_ASKED, "how the engine's GPUs are linked was not seen")
        return
    # Each request brings one prompt, and its tokens come batch by batch.
    in_prompts = prompt.seconds / (prompt.seconds + load.generated_tokens / load.batch * step.seconds)
    if step.communication_ratio < limits.communication_ratio or in_prompts > limits.prefill_share_max:
        return
    ranks = len(serving.gpus)
    half = or_none(serving.decode(load.batch, load.context, ranks // 2)) if _may_halve(serving) else None
    narrower = (
        f"; TP={ranks // 2} would spend {half.communication_ratio:.0%} of {half.seconds * 1e3:.1f} ms" if half else ""
    )
    yield Finding(
        summary=f"At {load.batch} streams a step of TP={ranks} is predicted to take {step.seconds * 1e3:.1f} ms, "
        f"{step.communication_ratio:.0%} of it in all-reduces over {fabric.link.value}{narrower}",
        evidence=(
            Evidence(
                Source.NVML.value,
                "topology",
                f"{fabric.link.value}, {fabric.bytes_per_second / 1e9:.0f} GB/s one way a GPU, "
                f"{'the engine has its own' if fabric.custom else 'NCCL runs the'} all-reduce kernels",
            ),
            Evidence(
                Source.ENGINE_METRICS.value,
                "vllm:generation_tokens_total, vllm:iteration_tokens_total_count",
                f"{load.streams:.1f} tokens a step over {traffic.seconds:.0f} s",
            ),
        ),
        confidence=Confidence.LOW,
        subject=Subject(engine=one.engine.id, gpus=serving.gpus),
        facts={"tensor-parallel-size": str(ranks // 2), "pid": str(one.engine.pid)},
    )


def _may_halve(serving: Serving) -> bool:
    half = len(serving.gpus) // 2
    return not serving.obstacles(half) and serving.room(half).kv_bytes > 0
