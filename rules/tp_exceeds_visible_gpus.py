"""The engine is to run on more GPUs than it can see."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.engine_log import incidents


@rule(
    "tp-exceeds-visible-gpus",
    "The engine is to run on more GPUs than it can see",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's refusal, two ranks on one GPU, or an ordinal that does not exist where CUDA meets it first."""
    for log, incident in incidents(history):
        cause = incident.cause
        kind = cause.facts.get("kind")
        code = f"{cause.facts.get('code', '')} {cause.facts.get('within', '')}".lower()
        if cause.signal == "launch-error" and kind == "world-size":
            world, gpus = cause.facts.get("world_size"), cause.facts.get("gpus")
            summary = (
                f"The engine needs {world} GPUs and sees {gpus}"
                if world and gpus
                else "The engine needs more GPUs than it sees"
            )
        elif cause.signal == "nccl-duplicate-gpu":
            first, second = cause.facts.get("first"), cause.facts.get("second")
            summary = (
                f"Ranks {first} and {second} were given the same GPU: fewer GPUs are visible than ranks are started, or "
                "the group joins programs that see the same ones"
            )
        elif cause.signal == "cuda-error" and kind == "no-device":
            summary = "The engine sees no GPU at all"
        elif (
            cause.signal == "cuda-error"
            and kind == "invalid-device"
            and "symm_mem" not in code
            and "symmetric" not in code
        ):
            summary = "A rank was given a GPU number that does not exist for it"
        else:
            continue
        yield Finding(
            summary=f"{summary}; look at CUDA_VISIBLE_DEVICES and at what the container was given",
            evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text), *_environment(history, log.engine)),
            confidence=Confidence.HIGH if cause.signal == "launch-error" else Confidence.MEDIUM,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )


def _environment(history: History, engine: str) -> Iterator[Evidence]:
    for found in history.latest.engines:
        if found.id == engine:
            for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
                if name in found.environment:
                    yield Evidence(
                        Source.PROCESSES.value, f"environment of {found.pid}", f"{name}={found.environment[name]}"
                    )
