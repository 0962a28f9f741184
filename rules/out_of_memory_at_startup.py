"""A GPU had too little memory for the engine to start."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import EngineEvent, Gpu, Source, known
from doctor.symptoms.engine_log import EngineLog, Incident, incidents
from doctor.symptoms.names import listed

GIB = 1 << 30

SIGNALS = frozenset(
    {
        "cuda-out-of-memory",
        "free-memory-below-utilization",
        "sampler-warmup-out-of-memory",
        "memory-profiling-disturbed",
        "host-memory-too-small",
    }
)

PHASES = {
    "determine_num_available_blocks": "while profiling",
    "profile_run": "while profiling",
    "_dummy_run": "while profiling",
    "determine_available_memory": "while profiling",
    "capture_model": "while capturing CUDA graphs",
    "capture": "while capturing CUDA graphs",
    "_allocate_kv_cache": "while allocating the KV cache",
    "initialize_kv_cache": "while allocating the KV cache",
    "initialize_cache": "while allocating the KV cache",
    "load_model": "while loading the weights",
    "load_weights": "while loading the weights",
    "create_weights": "while loading the weights",
}
"""Functions of vLLM 0.5 to 0.33 that tell the phase, outermost meaning first."""


@rule(
    "out-of-memory-at-startup",
    "A GPU had too little memory for the engine to start",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused", "worker-killed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Say how much was asked for and free, in which phase, and who else holds memory; an OOM in service is another matter."""
    for log, incident in incidents(history):
        if incident.cause.signal in SIGNALS and not incident.serving:
            yield _finding(history, log, incident)


def _finding(history: History, log: EngineLog, incident: Incident) -> Finding:
    cause = _fullest(incident)
    holders = _holders(history, cause)
    index = cause.facts.get("gpu")
    gpu = next((g for g in history.latest.gpus if g.index == index), None)
    facts = {"log": log.log}
    if isinstance(index, int):
        facts["gpu-index"] = str(index)
    return Finding(
        summary=f"{_what(incident.cause if incident.cause.signal != 'cuda-out-of-memory' else cause)}{holders}",
        evidence=(
            Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),
            *(_of_gpu(gpu) if gpu is not None else ()),
        ),
        confidence=Confidence.HIGH if cause.facts else Confidence.MEDIUM,
        subject=Subject(engine=log.engine, gpus=(gpu.uuid,) if gpu is not None else ()),
        since=incident.at,
        facts=facts,
    )


def _fullest(incident: Incident) -> EngineEvent:
    """Return the line about the same failure that tells most; the traceback's last line comes after the first report."""
    same = [event for event in incident.events if event.signal == incident.cause.signal]
    return max(same, key=lambda event: len(event.facts), default=incident.cause)


def _what(cause: EngineEvent) -> str:
    facts = cause.facts
    gpu = f"GPU {facts['gpu']}" if "gpu" in facts else "A GPU"
    if cause.signal == "free-memory-below-utilization" and "free_bytes" in facts:
        return (
            f"{gpu} has {_gib(facts['free_bytes'])} of {_gib(facts['total_bytes'])} GiB free, the engine wants "
            f"{_gib(facts['wanted_bytes'])} (utilization {facts['utilization']}): "
            f"about {_gib(_number(facts['total_bytes']) - _number(facts['free_bytes']))} GiB are held by somebody else"
        )
    if cause.signal == "host-memory-too-small":
        return f"The host has too little free memory for the engine's cache: {cause.text[:160]}"
    if cause.signal == "memory-profiling-disturbed":
        return "Another process changed its use of a GPU's memory while the engine measured it"
    if cause.signal == "sampler-warmup-out-of-memory":
        return f"A GPU ran out of memory while warming up with {facts.get('requests', 'many')} dummy requests: --max-num-seqs is too high"
    phase = _phase(cause)
    tried = f" for another {_gib(facts['tried_bytes'])} GiB" if "tried_bytes" in facts else ""
    of = f" ({_gib(facts['free_bytes'])} of {_gib(facts['total_bytes'])} GiB free)" if "free_bytes" in facts else ""
    return f"{gpu} had no room{tried}{of} {phase}"


def _phase(cause: EngineEvent) -> str:
    told = f"{cause.facts.get('within', '')} {cause.text}"
    return next((phase for name, phase in PHASES.items() if name in told), "while the engine started")


def _holders(history: History, cause: EngineEvent) -> str:
    """Name the other processes that hold memory, where the line names them.

    In a container torch can't tell its own process from others: one process that holds nearly what PyTorch says it
    allocated itself is the engine.
    """
    pids = [pid for pid in str(cause.facts.get("process_pids", "")).split(",") if pid]
    mine = {str(rank.pid) for engine in history.latest.engines for rank in engine.ranks}
    allocated = _number(cause.facts.get("allocated_bytes", 0))
    largest = _number(cause.facts.get("process_bytes", 0))
    if "own_bytes" not in cause.facts and allocated and largest - allocated < 0.1 * largest:
        return ""
    others = [pid for pid in pids if pid not in mine and pid != str(cause.pid)]
    if not others:
        return ""
    noun = "process" if len(others) == 1 else "processes"
    return (
        f"; {noun} {listed(others)} hold{'s' if len(others) == 1 else ''} memory there too, up to {_gib(largest)} GiB"
    )


def _of_gpu(gpu: Gpu) -> Iterator[Evidence]:
    if known(gpu.processes):
        for process in gpu.processes[:4]:
            used = f"{_gib(process.used_bytes)} GiB" if known(process.used_bytes) else "an unknown amount"
            yield Evidence(Source.NVML.value, f"GPU {gpu.index}: processes", f"pid {process.pid} holds {used}")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _gib(value: object) -> str:
    return f"{_number(value) / GIB:.2f}".rstrip("0").rstrip(".")
