"""A shard of the model is not a whole number of quantization blocks."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known
from doctor.symptoms.refusals import Reason, Refusal, refused_for
from doctor.symptoms.served import Served, unexplained

FIELDS = {"fp8-block": "weight_block_size", "group": "group_size"}
"""Kind of obstacle → where `quantization_config` says its unit."""
SMALLER = (8, 4, 2, 1)


@rule(
    "fp8-block-misaligned",
    "A shard is not a whole number of quantization blocks",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Take the engine's refusal, with the shard's width and the block's; before it refuses, divide."""
    for refusal in refused_for(history, Reason.BLOCKS):
        yield _refused(refusal)
    for one in unexplained(history):
        yield from _predicted(one)


def _refused(refusal: Refusal) -> Finding:
    cause, log = refusal.cause, refusal.log
    size, block = cause.facts.get("size"), cause.facts.get("block")
    tensor_parallel = log.fact("tensor_parallel_size")
    under = f" at tensor-parallel size {tensor_parallel}" if tensor_parallel else ""
    word = "block" if cause.facts.get("kind") == "fp8-block" else "group"
    width = f" of width {size}" if size else ""
    multiple = f" of {block}" if block else ""
    return Finding(
        summary=f"A shard{width}{under} is not a multiple of the quantization {word}{multiple}: the weights can't be split so",
        evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
        confidence=Confidence.HIGH,
        subject=Subject(engine=log.engine),
        since=refusal.incident.at,
        facts={"log": log.log},
    )


def _predicted(one: Served) -> Iterator[Finding | Absent]:
    ranks, model = one.ranks, one.engine.model
    method = model.quantization_method
    if isinstance(method, Absent) and method.why is not Why.NOT_PRESENT:
        yield Absent(method.why, method.detail or "whether the checkpoint is quantized was not seen")
        return
    if ranks is None or ranks < 2 or not (known(model.weight_block_size) or known(model.quantization_group_size)):
        return  # one rank splits nothing, and without blocks there is nothing to misalign
    found = one.obstacles(ranks)
    if isinstance(found, Absent):
        yield found
        return
    if not found or any(obstacle.kind not in FIELDS for obstacle in found):
        return  # what can't be divided at all is refused before its blocks are looked at
    blocks = any(obstacle.kind == "fp8-block" for obstacle in found)
    smaller = next((n for n in SMALLER if n < ranks and one.obstacles(n) == ()), None)
    would = f"; TP={smaller} would do" if smaller else ""
    yield Finding(
        summary=f"{'; '.join(obstacle.sentence(ranks) for obstacle in found)}: "
        f"the engine {'will not load' if blocks else 'may not load'} (computed from config.json){would}",
        evidence=(
            *(Evidence(Source.MODEL.value, f"{one.config}: {o.field}", str(o.size)) for o in found),
            Evidence(
                Source.MODEL.value, f"{one.config}: quantization_config.{FIELDS[found[0].kind]}", str(found[0].unit)
            ),
            Evidence(Source.PROCESSES.value, "--tensor-parallel-size", str(ranks)),
            *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in one.last_words),
        ),
        # Groups: the refusal is known up to vLLM 0.24; later releases may choose another kernel.
        confidence=Confidence.MEDIUM if blocks else Confidence.LOW,
        severity=None if blocks else Severity.WARNING,
        subject=Subject(engine=one.name),
        facts={"tensor-parallel-size": str(smaller)} if smaller else {},
    )
