"""Engines that hold requests and make no step: told by their log, and measured on their metrics."""

from __future__ import annotations

import math
from statistics import median

import msgspec

from doctor.history import History
from doctor.snapshot import NOT_ASKED, Engine, EngineEvent, EngineMetrics, Gpu, Rank, known
from doctor.symptoms.engine_log import EngineLog, is_progress
from doctor.symptoms.growth import growth
from doctor.symptoms.names import listed

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

    DEBUG records are left out: up to vLLM 0.10 each idle wait printed one. In a log with statistics they tell whether a
    wait is over; an answered request does not, for the line of a stream is written when it begins.
    """
    has_statistics = any(event.signal == "stats" for event in log.events)
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
            serving, starting = True, False
            if event.signal == "stats" or not has_statistics:
                events = []
        elif event.signal == "shm-broadcast-wait" and event.level != "DEBUG":
            events.append(event)
        elif event.signal == "shutdown":
            events = []
        if event.signal == "stats":
            value = event.facts.get("running")
            running = float(value) if isinstance(value, int | float) else running
    return Waits(tuple(events), serving, starting, running)


class Flat(msgspec.Struct, frozen=True):
    """An engine whose counters stood still while requests ran, or while a process of it was stopped."""

    engine: str
    seconds: float
    """From the first visit that saw them at this value to the last."""
    since: float
    running: float
    """Requests. The gauge may stand at 0: it is set by the last step, and those that came since are not in it."""
    steps: float | None
    tokens: float | None


def flat_engines(history: History, window_seconds: float, visits_min: int = 3) -> tuple[Flat, ...]:
    """Return the engines whose counters did not move over the window while requests ran or a process was stopped.

    They do so at every visit of it. A visit without metrics (a failed scrape) says nothing and breaks nothing; fewer than *visits_min* say too little.
    """
    by_engine: dict[str, list[EngineMetrics]] = {}
    for snapshot in history.snapshots:
        for metrics in snapshot.metrics:
            by_engine.setdefault(metrics.engine, []).append(metrics)
    latest = {metrics.engine for metrics in history.latest.metrics}
    found = [
        _flat(engine, pages, _halted_since(history, engine))
        for engine, pages in by_engine.items()
        if engine in latest and len(pages) >= visits_min
    ]
    return tuple(flat for flat in found if flat is not None and flat.seconds >= window_seconds)


class Halted(msgspec.Struct, frozen=True):
    """An engine of which a process was stopped, and whose counters nobody sees."""

    engine: str
    seconds: float
    """From the first visit that saw it stopped to the last."""
    since: float


def halted_engines(history: History, window_seconds: float, visits_min: int = 3) -> tuple[Halted, ...]:
    """Return the engines of which a process was stopped at every visit of the window, where no counters tell more."""
    counted = {page.engine for page in history.latest.metrics}
    found: list[Halted] = []
    for engine in history.latest.engines:
        since = _halted_since(history, engine.id)
        visits = sum(snapshot.at >= since for snapshot in history.snapshots)
        if engine.id not in counted and visits >= visits_min and history.now - since >= window_seconds:
            found.append(Halted(engine.id, history.now - since, since))
    return tuple(found)


def _halted_since(history: History, engine: str) -> float:
    """Return the first visit since when a process of the engine is stopped; infinity: none is."""
    since = math.inf
    for snapshot in reversed(history.snapshots):
        mine = next((e for e in snapshot.engines if e.id == engine), None)
        if mine is not None and not any(rank.state in _STOPPED for rank in _family(mine)):
            break
        since = snapshot.at if mine is not None else since
    return since


def _family(engine: Engine) -> tuple[Rank, ...]:
    """Return the engine's processes: ranks, engine cores, and its server."""
    others = (*engine.ranks, *engine.cores)
    if engine.pid in {rank.pid for rank in others}:
        return others
    return (*others, Rank(pid=engine.pid, title="its server", state=engine.state))


def _flat(engine: str, pages: list[EngineMetrics], halted_since: float) -> Flat | None:
    last = pages[-1]
    work = _work(last)
    if not any(counter is not None for counter in work):
        return None
    still: list[EngineMetrics] = []
    for page in reversed(pages):
        if _work(page) != work or not ((known(page.running) and page.running > 0) or page.at >= halted_since):
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
    """What the GPUs and the processes of a stalled engine do."""

    kind: str
    """`hardware`, `collective`, `software` or `unknown`."""
    text: str
    ranks: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()


BUSY_RATIO = 0.9
"""A GPU whose kernel spins shows a utilisation of 1 (a hung or waiting kernel counts as running); guess: 0.9 leaves room."""
IDLE_RATIO = 0.05
"""guess: an idle GPU shows 0; a sample may catch the end of the last step."""
HANG_MEMORY_RATIO = 0.02
"""A decode step reads the weights, so a working GPU shows memory traffic; guess: under 2 % there is none."""
COMPUTING_CORES = 0.8
"""CPU seconds a second of an engine core that computes; one that waits sleeps. guess: below 1, for a busy host."""
COMPUTING_SECONDS = 10.0
"""Over so long at least. guess: ten of vLLM's scheduling rounds even with a queue of thousands."""
SLOW_CLOCK_RATIO = 0.5
"""Of the median clock of the group's GPUs. guess: boards of one model under one load differ by a few per cent."""

_STOPPED = ("stopped", "tracing-stop")
"""States of a process that takes no step until somebody lets it."""

_HALTED = {
    "stopped": ("software", "is stopped, by a signal or a debugger"),
    "tracing-stop": ("software", "is held by a debugger"),
    "zombie": ("software", "has ended and is not yet buried"),
    "dead": ("software", "has ended"),
    "disk-sleep": ("hardware", "hangs in the kernel (state D), in a call that does not return"),
}
"""What a process does that takes no part any more, by its state."""


def suspicion(history: History, engine: Engine) -> Suspicion:
    """Tell hardware, a collective and software apart, from what the engine's processes and GPUs do.

    A process that is stopped or blocked is the cause, whatever the others do meanwhile. Then the GPUs decide: all idle
    is software; one idle while others spin is a collective that its rank never entered; busy without memory traffic
    on all of them, or on one alone, is hardware.
    """
    return _by_process(history, engine) or _by_gpu(history, engine)


def _by_process(history: History, engine: Engine) -> Suspicion | None:
    earlier = [e for s in history.snapshots[-2:-1] for e in s.engines if e.id == engine.id]
    before = {rank.pid: rank.state for e in earlier for rank in _family(e)}
    # A healthy process is in state D for moments, while it reads: only who stays there is stuck.
    stuck = [
        rank
        for rank in _family(engine)
        if known(rank.state) and rank.state in _HALTED and before.get(rank.pid, rank.state) == rank.state
    ]
    if not stuck:
        return None
    kinds = {_HALTED[str(rank.state)][0] for rank in stuck}
    return Suspicion(
        kind="hardware" if "hardware" in kinds else "software",
        text=", ".join(f"{_named(rank)} {_HALTED[str(rank.state)][1]}" for rank in stuck[:4]),
        ranks=tuple(rank.title or str(rank.pid) for rank in stuck),
        gpus=tuple(dict.fromkeys(rank.gpu for rank in stuck if known(rank.gpu))),
        pids=tuple(rank.pid for rank in stuck),
    )


def _by_gpu(history: History, engine: Engine) -> Suspicion:
    mine = dict.fromkeys(rank.gpu for rank in engine.ranks if known(rank.gpu))
    gpus = [gpu for uuid in mine if (gpu := history.latest.gpu(uuid)) is not None]
    lost = [gpu for gpu in gpus if gpu.lost is True]
    if lost:
        return Suspicion("hardware", f"{_listed(lost)} is lost", gpus=tuple(gpu.uuid for gpu in lost))
    seen = [gpu for gpu in gpus if known(gpu.activity.gpu_ratio)]
    if not seen:
        return Suspicion("unknown", "what its GPUs do was not seen")
    idle = [gpu for gpu in seen if _at_rest(history, gpu)]
    spins = [gpu for gpu in seen if _spins(history, gpu)]
    if len(idle) == len(seen):
        return _software(history, engine)
    if len(spins) == 1 < len(idle) and len(idle) + 1 == len(seen):
        text = f"{_drawn(spins)} is fully busy and moves no memory while the others are idle: a kernel on it hangs"
        return Suspicion("hardware", text, gpus=(spins[0].uuid,))
    busy = [gpu for gpu in seen if _is_busy(history, gpu)]
    if busy and idle:
        late = [rank for rank in engine.ranks if rank.gpu in {gpu.uuid for gpu in idle}]
        whose = f" ({', '.join(_named(rank) for rank in late[:4])})" if late else ""
        verb = "is" if len(idle) == 1 else "are"
        others = f"{_listed(busy)} {'spins' if len(busy) == 1 else 'spin'}"
        return Suspicion(
            "collective",
            f"{_listed(idle)} {verb} idle{whose} while {others} in a collective that it never entered",
            ranks=tuple(rank.title or str(rank.pid) for rank in late),
            gpus=tuple(gpu.uuid for gpu in idle),
            pids=tuple(rank.pid for rank in late),
        )
    if len(spins) == len(seen):
        slow = _slow(spins)
        if slow is not None:
            text = f"{_listed([slow])} runs at {slow.clocks.sm_mhz} MHz, half or less of the others' clock: they wait for it"
            return Suspicion("hardware", text, gpus=(slow.uuid,))
        verb = "is" if len(spins) == 1 else "are all"
        text = f"{_drawn(spins)} {verb} fully busy and move{'s' if len(spins) == 1 else ''} no memory: kernels hang"
        return Suspicion("hardware", text)
    return Suspicion("unknown", "its GPUs are partly busy")


def _software(history: History, engine: Engine) -> Suspicion:
    busy = [core for core in engine.cores if _computes(history, engine, core)]
    if not busy:
        return Suspicion("software", "all its GPUs are idle: no kernel runs")
    who = ", ".join(_named(core) for core in busy)
    text = f"all its GPUs are idle, and {who} fills a core: it computes, and schedules nothing"
    return Suspicion("software", text, tuple(core.title for core in busy), pids=tuple(core.pid for core in busy))


def _computes(history: History, engine: Engine, core: Rank) -> bool:
    readings = (
        (
            s.at,
            next(
                (c.cpu_seconds for e in s.engines if e.id == engine.id for c in e.cores if c.pid == core.pid), NOT_ASKED
            ),
        )
        for s in history.snapshots[-3:]
    )
    spent = growth(readings)
    return spent is not None and spent.seconds >= COMPUTING_SECONDS and spent.per_second >= COMPUTING_CORES


def _lately(history: History, gpu: Gpu) -> list[Gpu]:
    """Return the GPU at the last two visits: one look may catch the end of a step, or a pause between two."""
    return [seen for _, seen in history.of_gpu(gpu.uuid)[-2:]]


def _at_rest(history: History, gpu: Gpu) -> bool:
    return all(known(r := seen.activity.gpu_ratio) and r <= IDLE_RATIO for seen in _lately(history, gpu))


def _is_busy(history: History, gpu: Gpu) -> bool:
    return all(known(busy := seen.activity.gpu_ratio) and busy >= BUSY_RATIO for seen in _lately(history, gpu))


def _spins(history: History, gpu: Gpu) -> bool:
    """Whether it is fully busy and, where that was seen, moves no memory."""
    return _is_busy(history, gpu) and not any(
        known(moved := seen.activity.memory_ratio) and moved > HANG_MEMORY_RATIO for seen in _lately(history, gpu)
    )


def _slow(gpus: list[Gpu]) -> Gpu | None:
    clocks = {gpu.uuid: gpu.clocks.sm_mhz for gpu in gpus if known(gpu.clocks.sm_mhz)}
    if len(clocks) < 2:
        return None
    slowest = min((gpu for gpu in gpus if gpu.uuid in clocks), key=lambda gpu: clocks[gpu.uuid])
    return slowest if clocks[slowest.uuid] <= SLOW_CLOCK_RATIO * median(clocks.values()) else None


def _drawn(gpus: list[Gpu]) -> str:
    watts = [w for gpu in gpus if known(w := gpu.power.average_watts)]
    return (
        f"{_listed(gpus)} ({sum(watts) / len(watts):.0f} W{' each' if len(watts) > 1 else ''})"
        if watts
        else _listed(gpus)
    )


def _listed(gpus: list[Gpu]) -> str:
    return f"GPU {listed(str(gpu.index) for gpu in gpus)}"


def _named(rank: Rank) -> str:
    return f"{rank.title} (pid {rank.pid})" if rank.title else f"pid {rank.pid}"
