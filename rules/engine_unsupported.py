"""An engine runs here whose logs and metrics this program does not read."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source, known

NAMES = {
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "tgi": "Text Generation Inference",
    "llama.cpp": "llama.cpp",
}


@rule(
    "engine-unsupported",
    "An engine runs here that is judged only in part",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Say of each engine other than vLLM that its silence means little."""
    for engine in history.latest.engines:
        if engine.kind == "vllm":
            continue
        name = NAMES.get(engine.kind, engine.kind)
        model = f" with {engine.flags.model}" if known(engine.flags.model) else ""
        command = " ".join(engine.command_line) or engine.kind
        yield Finding(
            summary=f"{name}{model} (pid {engine.pid}) runs here: hardware, kernel log and drivers are judged, its own log, "
            "metrics, model and memory are not read",
            evidence=(
                Evidence(
                    Source.PROCESSES.value, f"pid {engine.pid}", command if len(command) <= 300 else command[:299] + "…"
                ),
            ),
            confidence=Confidence.HIGH,
            subject=Subject(engine=engine.id, pids=(engine.pid,)),
            facts={"pid": str(engine.pid)},
        )
