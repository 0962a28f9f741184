"""FP8 was asked for or expected, and the engine does not compute in it."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Engine, EngineEvent, Source, known
from doctor.symptoms.engine_log import EngineLog, engine_logs
from doctor.symptoms.refusals import Reason, Refusal, refused_for, weight_only

FP8_CAPABILITY = (8, 9)
"""Ada and Hopper: the first GPUs whose tensor cores multiply FP8 (NVIDIA, CUDA C++ programming guide)."""
BLOCK_FP8_CAPABILITY = (9, 0)
"""CUTLASS's and DeepGEMM's block-scaled kernels need Hopper (vLLM issue 58241)."""


@rule(
    "fp8-not-engaged",
    "FP8 is asked for and not used in computation",
    severity=Severity.WARNING,
    needs=(Source.ENGINE_LOG,),
    explains=("throughput-below-reference",),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Read what the engine selected: the chosen kernel counts, not the list of those it could choose from."""
    stand_ins = {refusal.log.log: refusal for refusal in refused_for(history, Reason.STAND_IN)}
    for log in engine_logs(history):
        if log.log in stand_ins:
            yield _refused(stand_ins[log.log])
            continue
        engine = next((e for e in history.latest.engines if e.id == log.engine), None)
        missing = log.having("fp8-kernel-missing")
        if missing and log.incident is not None and log.incident.cause in missing:
            yield _kernel_missing(log, missing[0])
            continue
        lines = weight_only(log)
        if lines:
            yield _not_native(history, log, engine, lines)
        elif not _engaged(log) and (asked := _asked_in_vain(log, engine)):
            yield asked


def _refused(refusal: Refusal) -> Finding:
    cause, log = refusal.cause, refusal.log
    return Finding(
        summary="The GPU has no FP8 units, and Marlin, the weight-only kernel that stands in, can't take the width of a rank's share: "
        f'the model was not loaded ("{cause.text[:160]}")',
        evidence=_quotes((cause, *weight_only(log)[:1])),
        severity=Severity.CRITICAL,
        subject=Subject(engine=log.engine),
        since=refusal.incident.at,
        facts={"log": log.log},
    )


def _engaged(log: EngineLog) -> bool:
    return bool(log.having("fp8-linear-kernel", "fp8-moe-backend", "fp8-checkpoint"))


def _kernel_missing(log: EngineLog, event: EngineEvent) -> Finding:
    return Finding(
        summary=f"The engine's build lacks the kernel {event.facts['kernel']} that this FP8 or quantized checkpoint needs here: "
        "a mixed or outdated installation; the model was not loaded",
        evidence=_quotes((event, *log.having("fp8-weight-only")[:1])),
        severity=Severity.CRITICAL,
        subject=Subject(engine=log.engine),
        since=event.at,
        facts={"log": log.log},
    )


def _not_native(history: History, log: EngineLog, engine: Engine | None, lines: tuple[EngineEvent, ...]) -> Finding:
    capability = _capability(history, engine)
    severity, confidence = Severity.WARNING, Confidence.HIGH
    if capability is None:
        why, confidence = (
            "either its GPUs have no FP8 units (before capability 8.9) or Marlin was chosen",
            Confidence.MEDIUM,
        )
    else:
        have = ".".join(map(str, capability))
        if capability < FP8_CAPABILITY:
            why, severity = f"capability {have} has no FP8 units, so this is the best that it can do", Severity.NOTICE
        elif capability < BLOCK_FP8_CAPABILITY:
            why, severity = f"capability {have} has FP8 units, and no kernel for block-scaled FP8", Severity.NOTICE
        else:
            why = f"capability {have} has FP8 units: Marlin was forced (a flag, VLLM_TEST_FORCE_FP8_MARLIN, MIG) or the build is broken"
    return Finding(
        summary=f"The weights are FP8 and the arithmetic is 16 bit (Marlin, weight-only): {why}",
        evidence=(*_quotes(lines[:2]), *_of_gpu(history, engine)),
        severity=severity,
        confidence=confidence,
        subject=Subject(engine=log.engine),
        since=lines[0].at,
        facts={"log": log.log},
    )


def _capability(history: History, engine: Engine | None) -> tuple[int, int] | None:
    """Return the lowest capability among the engine's GPUs, or the node's where its own are not known."""
    wanted = engine.visible_gpus if engine is not None and known(engine.visible_gpus) else None
    gpus = [gpu for gpu in history.latest.gpus if wanted is None or gpu.uuid in wanted]
    return min((gpu.compute_capability for gpu in gpus if known(gpu.compute_capability)), default=None)


def _of_gpu(history: History, engine: Engine | None) -> tuple[Evidence, ...]:
    capability = _capability(history, engine)
    if capability is None:
        return ()
    return (Evidence(Source.NVML.value, "compute capability", ".".join(map(str, capability))),)


def _asked_in_vain(log: EngineLog, engine: Engine | None) -> Finding | None:
    """Return a finding where flag or name say FP8 and the engine's own configuration says that nothing is quantized."""
    configured = next((e for e in log.having("engine-config") if "quantization" in e.facts), None)
    if configured is None or str(configured.facts["quantization"]) != "None":
        return None
    model = str(configured.facts.get("model", ""))
    flag = engine.flags.quantization if engine is not None else None
    if isinstance(flag, str) and flag.lower() == "fp8":
        asked = "the command line asks for --quantization fp8"
    elif "fp8" in model.lower():
        asked = f"the model's name ({model}) says FP8"
    else:
        return None
    return Finding(
        summary=f"{asked}, and the engine runs it unquantized in {configured.facts.get('dtype', '16 bit')}",
        evidence=_quotes((configured,)),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=log.engine),
        since=configured.at,
        facts={"log": log.log},
    )


def _quotes(events: tuple[EngineEvent, ...]) -> tuple[Evidence, ...]:
    return tuple(Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in events)
