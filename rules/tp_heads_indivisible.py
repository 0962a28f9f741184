"""The tensor-parallel size does not divide the model: its attention heads, or another dimension that it has to."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.machine.fit import Obstacle
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why
from doctor.symptoms.refusals import Reason, Refusal, is_tile, refused_for
from doctor.symptoms.served import Served, unexplained

SPLIT = frozenset({"heads", "kv-heads", "width"})
"""Kinds of obstacles that have to do with the number of ranks alone."""
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
"""Tensor-parallel sizes that somebody may want on one node."""


@rule(
    "tp-heads-indivisible",
    "The tensor-parallel size does not divide the model",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Take the engine's refusal, and name the sizes that divide; before it refuses, divide."""
    for refusal in refused_for(history, Reason.SPLIT):
        yield _refused(refusal)
    for one in unexplained(history):
        yield from _predicted(one)


def _refused(refusal: Refusal) -> Finding:
    cause, log = refusal.cause, refusal.log
    heads, size = cause.facts.get("heads"), cause.facts.get("tensor_parallel_size") or log.fact("tensor_parallel_size")
    at = f" at tensor-parallel size {size}" if size else ""
    summary = f"The tensor-parallel size does not divide the model's attention heads, or another of its dimensions{at}"
    if isinstance(heads, int) and heads > 0 and size:
        fits = [n for n in range(1, 17) if heads % n == 0]
        summary = f"{heads} attention heads can't be split over {size} GPUs; {', '.join(map(str, fits))} would do"
    elif is_tile(cause):
        width, unit = cause.facts.get("size"), cause.facts.get("block")
        of = f" of width {width}" if width is not None else ""
        multiple = f" of {unit}" if unit is not None else " of what it computes at once"
        summary = f"A shard{of}{at} is no multiple{multiple}, as the kernel for this quantization needs it"
    return Finding(
        summary=summary,
        evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
        confidence=Confidence.HIGH,
        subject=Subject(engine=log.engine),
        since=refusal.incident.at,
        facts={"log": log.log},
    )


def _predicted(one: Served) -> Iterator[Finding | Absent]:
    ranks = one.ranks
    if ranks is None:
        yield Absent(Why.NOT_ASKED, "the tensor-parallel size of the engine that starts was not seen")
        return
    found = _obstacles(one, ranks)
    if isinstance(found, Absent):
        heads = one.engine.model.attention_heads
        if isinstance(heads, Absent) and ranks > 1:
            yield Absent(heads.why, heads.detail or "the model's config.json was not seen")
    elif found:
        would = [n for n in SIZES if n < ranks and not _obstacles(one, n)]
        wider = [n for n in SIZES if n > ranks and not _obstacles(one, n)]
        sizes = [*would, *wider[:1]]
        yield Finding(
            summary=f"{'; '.join(obstacle.sentence(ranks) for obstacle in found)}: the engine will not load "
            f"(computed from config.json){'; ' + ', '.join(map(str, sizes)) + ' would do' if sizes else ''}",
            evidence=(
                *(Evidence(Source.MODEL.value, f"{one.config}: {o.field}", str(o.size)) for o in found),
                Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(ranks)),
                *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in one.last_words),
            ),
            confidence=Confidence.MEDIUM,
            subject=Subject(engine=one.name),
        )


def _obstacles(one: Served, ranks: int) -> tuple[Obstacle, ...] | Absent:
    found = one.obstacles(ranks)
    return found if isinstance(found, Absent) else tuple(o for o in found if o.kind in SPLIT)
