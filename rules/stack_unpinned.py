"""Versions changed from one start of an engine to the next, or an image is named by a tag that moves."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Engine, Source, Why, known

MOVING = re.compile(r"^(?:\S*/)?vllm/vllm-openai(?::(?:latest|nightly)\S*)?$")
"""An image without a tag is `latest` too."""
PARTS = ("engine", "torch", "torch_cuda", "nccl", "python")
WORDS = {"engine": "vLLM", "torch": "PyTorch", "torch_cuda": "CUDA", "nccl": "NCCL", "python": "Python"}


@rule(
    "stack-unpinned",
    "The engine's versions drift between starts",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.STACK),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Compare the starts of the same service that the history holds; a service is its unit, else its model and port."""
    if len(history.snapshots) < 2 and history.latest.engines:
        yield Absent(Why.NOT_ASKED, "one visit shows one start: the daemon sees restarts")
    for engine in history.latest.engines:
        tags = [word for word in engine.command_line if MOVING.match(word)]
        before = _start_before(history, engine)
        changes = _changes(before, engine) if before is not None else ()
        if changes:
            yield Finding(
                summary=f"{_name(engine)} came back with other versions: {', '.join(changes)}",
                evidence=(Evidence(Source.STACK.value, "the engine's own environment", "; ".join(changes)),),
                confidence=Confidence.HIGH,
                subject=Subject(engine=engine.id),
                since=engine.started_at,
            )
        elif tags:
            yield Finding(
                summary=f"The image {tags[0]} is named by a tag that moves: the next pull may bring another version",
                evidence=(Evidence(Source.PROCESSES.value, "command line", tags[0]),),
                confidence=Confidence.MEDIUM,
                subject=Subject(engine=engine.id),
            )


def _start_before(history: History, engine: Engine) -> Engine | None:
    """Return the last earlier start of the same service whose environment was read."""
    for snapshot in reversed(history.snapshots):
        for other in snapshot.engines:
            if (
                other.started_at < engine.started_at
                and other.kind == engine.kind
                and _service(other) == _service(engine)
            ):
                return other
    return None


def _service(engine: Engine) -> tuple[str, str, str]:
    unit = engine.unit if known(engine.unit) else ""
    return unit, str(engine.flags.model), str(engine.flags.port)


def _changes(before: Engine, after: Engine) -> tuple[str, ...]:
    pairs = ((WORDS[part], getattr(before.stack, part), getattr(after.stack, part)) for part in PARTS)
    return tuple(f"{word} {old} → {new}" for word, old, new in pairs if known(old) and known(new) and old != new)


def _name(engine: Engine) -> str:
    return engine.unit if known(engine.unit) else f"Engine {engine.pid}"
