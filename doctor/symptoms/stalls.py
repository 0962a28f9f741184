"""Engines that hold requests and make no step: told by their log, and measured on their metrics."""

from __future__ import annotations

import msgspec

from doctor.history import History
from doctor.snapshot import Engine, EngineEvent, EngineMetrics, known
from doctor.symptoms.engine_log import EngineLog, is_progress

_STARTING = frozenset({"engine-version", "engine-config", "non-default-args", "load-started", "weights-loaded", "graphs-captured", "kv-cache-size", "kv-cache-memory"})  # fmt: skip


class Waits(msgspec.Struct, frozen=True):
    """Processes that waited for others since the engine was last seen at work."""

    events: tuple[EngineEvent, ...]
    serving: bool
    """Whether the engine had come up or was seen at work before."""
    starting: bool
    """Whether it was starting when they waited: loading and compiling take minutes, and are no stall."""
    running: float | None
    """Requests that ran at the last statistics line before; None: there was none."""

    @property
    def count(self) -> int:
        """How many such lines."""
        return sum(event.count for event in self.events)


def waits(log: EngineLog) -> Waits:
    """Return the waits of this log after its last sign of progress (vLLM prints one each 60 s while it waits).

    DEBUG records are left out: up to vLLM 0.10 each idle wait printed one.
    """
    events: list[EngineEvent] = []
    serving = starting = False
    running: float | None = None
    for event in log.events:
        if event.signal == "startup-complete":
            serving, starting, events = True, False, []
        elif event.signal == "engine-ready":  # the workers are warm: what follows is no compilation
            starting, events = False, []
        elif event.signal in _STARTING:
            starting = not serving
        elif is_progress(event):
            serving, starting, events = True, False, []
        elif event.signal == "shm-broadcast-wait" and event.level != "DEBUG":
            events.append(event)
        elif event.signal == "shutdown":
            events = []
        if event.signal == "stats":
            value = event.facts.get("running")
            running = float(value) if isinstance(value, int | float) else running
    return Waits(tuple(events), serving, starting, running)


class Flat(msgspec.Struct, frozen=True):
    """An engine whose counters stood still while requests ran."""

    engine: str
    seconds: float
    """From the first visit that saw them at this value to the last."""
    since: float
    running: float
    steps: float | None
    tokens: float | None


def flat_engines(history: History, window_seconds: float, visits_min: int = 3) -> tuple[Flat, ...]:
    """Return the engines that ran requests at every visit of the window and whose counters did not move over it.

    A visit without metrics (a failed scrape) says nothing and breaks nothing; fewer than *visits_min* say too little.
    """
    by_engine: dict[str, list[EngineMetrics]] = {}
    for snapshot in history.snapshots:
        for metrics in snapshot.metrics:
            by_engine.setdefault(metrics.engine, []).append(metrics)
    latest = {metrics.engine for metrics in history.latest.metrics}
    found = [
        _flat(engine, pages) for engine, pages in by_engine.items() if engine in latest and len(pages) >= visits_min
    ]
    return tuple(flat for flat in found if flat is not None and flat.seconds >= window_seconds)


def _flat(engine: str, pages: list[EngineMetrics]) -> Flat | None:
    last = pages[-1]
    work = _work(last)
    if not any(counter is not None for counter in work):
        return None
    still: list[EngineMetrics] = []
    for page in reversed(pages):
        if _work(page) != work or not (known(page.running) and page.running > 0):
            break
        still.append(page)
    if len(still) < 3:  # two equal readings may be one step apart
        return None
    running = last.running if known(last.running) else 0.0
    return Flat(engine, last.at - still[-1].at, still[-1].at, running, work[0], work[1])


def _work(page: EngineMetrics) -> tuple[float | None, float | None, float | None]:
    """Return the counters that move with each step: steps, generated tokens, prompt tokens."""
    counters = (page.steps_total, page.generation_tokens_total, page.prompt_tokens_total)
    steps, generated, prompt = (counter if known(counter) else None for counter in counters)
    return steps, generated, prompt


class Suspicion(msgspec.Struct, frozen=True):
    """What the GPUs and the ranks of a stalled engine do."""

    kind: str
    """`hardware`, `collective`, `software` or `unknown`."""
    text: str
    ranks: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()


BUSY_RATIO = 0.9
"""A GPU whose kernel spins shows a utilisation of 1 (a hung or waiting kernel counts as running); guess: 0.9 leaves room."""
IDLE_RATIO = 0.05
"""guess: an idle GPU shows 0; a sample may catch the end of the last step."""
HANG_MEMORY_RATIO = 0.02
"""A decode step reads the weights, so a working GPU shows memory traffic; guess: under 2 % there is none."""


def suspicion(history: History, engine: Engine) -> Suspicion:
    """Tell hardware, a collective and software apart, from what the engine's ranks and GPUs do at the last visit."""
    stuck = [r for r in engine.ranks if known(r.state) and r.state in ("stopped", "disk-sleep", "zombie", "dead")]
    if stuck:
        text = ", ".join(f"{r.title or r.pid} (pid {r.pid}) is in state {r.state}" for r in stuck[:4])
        kind = "hardware" if any(r.state == "disk-sleep" for r in stuck) else "software"
        return Suspicion(kind, text, tuple(r.title or str(r.pid) for r in stuck))
    uuids = dict.fromkeys(r.gpu for r in engine.ranks if known(r.gpu))
    gpus = [gpu for uuid in uuids if (gpu := history.latest.gpu(uuid)) is not None and known(gpu.activity.gpu_ratio)]
    if not gpus:
        return Suspicion("unknown", "what its GPUs do was not seen")
    ratios = {gpu.index: gpu.activity.gpu_ratio for gpu in gpus if known(gpu.activity.gpu_ratio)}
    idle = [gpu for gpu in gpus if ratios[gpu.index] <= IDLE_RATIO]
    busy = [gpu for gpu in gpus if ratios[gpu.index] >= BUSY_RATIO]
    if len(idle) == len(gpus):
        return Suspicion("software", "all its GPUs are idle: no kernel runs")
    if busy and idle:
        names = ", ".join(f"GPU {gpu.index}" for gpu in idle)
        text = f"{names} is idle while {len(busy)} others spin in a collective: its rank never arrived"
        return Suspicion("collective", text, gpus=tuple(gpu.uuid for gpu in idle))
    quiet = [gpu for gpu in busy if known(gpu.activity.memory_ratio) and gpu.activity.memory_ratio <= HANG_MEMORY_RATIO]
    if quiet and len(busy) == len(gpus):
        text = "its GPUs are fully busy and move no memory: kernels hang or spin"
        return Suspicion("hardware" if len(gpus) == 1 else "collective", text)
    return Suspicion("unknown", "its GPUs are partly busy")
