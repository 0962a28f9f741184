"""The engine's release has a known bug that its model, flags or GPUs call up."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.machine.serving import Serving
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Maybe, Source, Why, known, or_none
from doctor.symptoms.served import Served, served
from doctor.symptoms.traffic import load_of, traffics
from rules.tables.known_bugs import KNOWN_BUGS, Circumstance


class Limits(msgspec.Struct, frozen=True):
    """When a circumstance holds."""

    communication_ratio: float = 0.30
    """Of a decode step: document 3's limit for an all-reduce that matters."""
    context: int = 32768
    """Tokens: beyond it the experts' buffer was sliced (vllm PR 13693)."""
    window_seconds: float = 600.0
    """Over which the load is measured; guess."""


@rule(
    "runtime-outdated",
    "The engine's release has a known bug that applies here",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.STACK),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Look up the release, and ask whether the circumstances of each of its bugs hold; a circumstance unseen does not."""
    for one in served(history):
        said = one.log.fact("version") if one.log is not None else ""
        version = or_none(one.engine.stack.engine) or said
        if not version:
            yield Absent(Why.NOT_ASKED, f"the release of engine {one.engine.pid} was not seen")
            continue
        for bug in KNOWN_BUGS:
            if bug.engine != one.engine.kind or not bug.is_in(version):
                continue
            if not all(_holds(circumstance, history, one, limits) for circumstance in bug.when):
                continue
            yield Finding(
                summary=f"vLLM {version} has a known bug that applies here: {bug.what}; {bug.fixed} is past it",
                evidence=(
                    Evidence(Source.STACK.value, "vLLM's version", version),
                    Evidence(Source.STACK.value, "known_bugs.toml", f"{', '.join(bug.when)}: {bug.source}"),
                ),
                confidence=Confidence.LOW if "unverified" in bug.source else Confidence.MEDIUM,
                subject=Subject(engine=one.engine.id),
                facts={"version": bug.fixed},
            )


def _holds(circumstance: Circumstance, history: History, one: Served, limits: Limits) -> bool:
    model, flags = one.engine.model, one.engine.flags
    match circumstance:
        case "tensor-parallel":
            return one.group is not None and one.group.size > 1
        case "mixture":
            return known(model.experts) and model.experts > 0
        case "long-context":
            lengths = (flags.max_model_len, model.max_position_embeddings)
            return (next((n for n in lengths if known(n) and n > 0), 0)) > limits.context
        case "fp8-channel":
            return or_none(model.quantization_method) == "compressed-tensors" and (
                or_none(model.quantization_weight_bits) == 8 and or_none(model.quantization_weight_type) == "float"
            )
        case "hopper":
            mine = set(one.group.gpus) if one.group else set[str]()
            seen = {gpu.compute_capability for gpu in history.latest.gpus if gpu.uuid in mine}
            return seen == {(9, 0)}
        case "communication-bound":
            return _communication_ratio(history, one, one.serving, limits) >= limits.communication_ratio


def _communication_ratio(history: History, one: Served, serving: Maybe[Serving], limits: Limits) -> float:
    """Return the predicted share of all-reduces in a step at the measured load; 0 where either is unknown."""
    mine = [t for t in traffics(history, limits.window_seconds) if t.engine == one.engine.id]
    load = load_of(mine[0]) if mine else None
    if load is None or isinstance(serving, Absent):
        return 0.0
    step = serving.decode(load.batch, load.context)
    return step.communication_ratio if known(step) else 0.0
