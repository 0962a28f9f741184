"""The data type asked for suits neither the GPU nor the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known, or_none
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.refusals import Reason, Refusal, refused_for
from doctor.symptoms.served import Served, served

BFLOAT16_FROM = (8, 0)
"""Compute capability of Ampere: document 2; vLLM refuses below it."""
_REFUSES_HALF = re.compile(r"(?<!b)float16 is not supported|not support float16|not support half")
HALVES = ("float16", "half")


@rule(
    "dtype-unsuited",
    "The data type does not suit the GPU or the model",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES,),
    explains=("launch-refused", "engine-crashed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Take the engine's refusal; else compare flag, capability and the checkpoint's own type."""
    broken = {log.engine for log, _ in incidents(history)}
    for refusal in refused_for(history, Reason.TYPE):
        yield _refused(refusal)
    for one in served(history):
        if one.engine.id not in broken:  # advice waits until the incident is over
            yield from _asked(history, one)


def _refused(refusal: Refusal) -> Finding:
    cause = refusal.cause
    if cause.facts.get("kind") == "dtype":
        summary, better = (
            "The engine refuses bfloat16: its GPU is older than Ampere (compute capability 8.0); float16 is what it has",
            "float16",
        )
    else:
        refused, better = ("float16", "bfloat16") if _REFUSES_HALF.search(cause.text) else ("bfloat16", "float16")
        what = "this quantization" if "quantization method" in cause.text else "this model"
        summary = f"The engine refuses {refused} for {what}; {better} is what it takes"
    return Finding(
        summary=summary,
        evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
        confidence=Confidence.HIGH,
        severity=Severity.CRITICAL,
        subject=Subject(engine=refusal.log.engine),
        since=refusal.incident.at,
        facts={"dtype": better},
    )


def _asked(history: History, one: Served) -> Iterator[Finding | Absent]:
    flag, stored = or_none(one.engine.flags.dtype), or_none(one.engine.model.dtype)
    if flag == "bfloat16":
        gpus = one.group.gpus if one.group is not None else ()
        seen = [gpu.compute_capability for gpu in history.latest.gpus if gpu.uuid in gpus or not gpus]
        old = [capability for capability in seen if known(capability) and capability < BFLOAT16_FROM]
        if old:
            words = ".".join(map(str, min(old)))
            yield _finding(
                one, f"--dtype bfloat16 on compute capability {words}: units for it begin with 8.0", "float16", stored
            )
        elif not seen or not all(known(capability) for capability in seen):
            yield Absent(Why.NOT_ASKED, "the compute capability of the engine's GPUs was not seen")
    elif flag in HALVES and stored == "bfloat16" and not known(one.engine.model.quantization_method):
        yield _finding(
            one,
            "--dtype float16 for a model that is stored in bfloat16: values above 65504 overflow, which shows as broken "
            "text in long contexts",
            "bfloat16",
            stored,
        )


def _finding(one: Served, what: str, better: str, stored: str | None) -> Finding:
    return Finding(
        summary=f"Engine {one.engine.pid}: {what}",
        evidence=(
            Evidence(Source.PROCESSES.value, "--dtype", str(or_none(one.engine.flags.dtype))),
            Evidence(Source.MODEL.value, "config.json", f"torch_dtype {stored or 'not seen'}"),
        ),
        confidence=Confidence.LOW,
        subject=Subject(engine=one.engine.id),
        facts={"dtype": better},
    )
