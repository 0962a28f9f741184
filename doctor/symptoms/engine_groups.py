"""Which GPUs an engine's tensor-parallel ranks run on, joined from processes, flags and the engine's own words."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Engine, EngineEvent, Snapshot, known

RUN_BEGINS = frozenset({"engine-version", "non-default-args"})
"""The first lines that an engine writes at a start."""


class RankGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks of one engine."""

    engine: str
    """`Engine.id`, or the log file in triage."""
    size: int
    """Tensor-parallel ranks."""
    gpus: tuple[str, ...]
    """UUIDs; empty where nothing tells which."""
    exact: bool
    """Whether the ranks' own GPUs were seen, rather than inferred from what the engine may use."""


@measured_once
def rank_groups(history: History) -> tuple[RankGroup, ...]:
    """Return one group an engine whose tensor-parallel size is known: from its process, else from its log."""
    latest = history.latest
    groups = [g for engine in latest.engines if (g := _of_engine(engine, history)) is not None]
    logs_of_engines = {engine.log for engine in latest.engines if known(engine.log)}
    for log in logs(history):
        if log in logs_of_engines or latest.engines:
            continue
        size = _size_in_log(current_run(history, log))
        if size is not None:
            groups.append(RankGroup(engine=log, size=size, gpus=_if_whole_node(latest, size), exact=False))
    return tuple(groups)


def _of_engine(engine: Engine, history: History) -> RankGroup | None:
    on = {rank.gpu for rank in engine.ranks if known(rank.gpu)}
    size = engine.flags.tensor_parallel_size
    if not known(size):
        size = _size_in_log(current_run(history, engine.log)) if known(engine.log) else None
        size = size or len(on) or None
    if size is None:
        return None
    seen = len(on) == len(engine.ranks) and len(on) >= size
    if seen:
        gpus = tuple(sorted(on))
    elif known(engine.visible_gpus) and len(engine.visible_gpus) == size:
        gpus = engine.visible_gpus
    else:
        gpus = _if_whole_node(history.latest, size)
    return RankGroup(engine=engine.id, size=size, gpus=gpus, exact=seen)


def _if_whole_node(snapshot: Snapshot, size: int) -> tuple[str, ...]:
    """Return every GPU of the node where the engine needs all of them, else none: which it took is not known."""
    return tuple(gpu.uuid for gpu in snapshot.gpus) if len(snapshot.gpus) == size else ()


def _size_in_log(events: tuple[EngineEvent, ...]) -> int | None:
    for event in reversed(events):
        size = event.facts.get("tensor_parallel_size")
        if size is not None and str(size).isdigit():
            return int(size)
    return None


def logs(history: History) -> tuple[str, ...]:
    """Return the engine logs that any event came from, in the order seen."""
    return tuple(dict.fromkeys(event.log for event in history.engine_events()))


def current_run(history: History, log: str) -> tuple[EngineEvent, ...]:
    """Return the events of a log since the engine last started; all of them where no start stands in it."""
    events = [event for event in history.engine_events() if event.log == log]
    begins = [i for i, event in enumerate(events) if event.signal in RUN_BEGINS]
    if not begins:
        return tuple(events)
    first = begins[-1]
    while first and events[first - 1].signal in RUN_BEGINS:
        first -= 1
    return tuple(events[first:])


def unrecovered(history: History, *signals: str) -> tuple[EngineEvent, ...]:
    """Return the lines with these signals after which the engine neither came up nor served, of each log's current run."""
    found: list[EngineEvent] = []
    for log in logs(history):
        run = current_run(history, log)
        good = max((i for i, e in enumerate(run) if e.signal in ("startup-complete", "request-served")), default=-1)
        found += [event for event in run[good + 1 :] if event.signal in signals]
    return tuple(found)


def engine_of_log(history: History, log: str) -> str:
    """Return the id of the engine that writes this log, or the log itself."""
    return next((engine.id for engine in history.latest.engines if engine.log == log), log)


def engine_of_gpu(history: History, uuid: str) -> str:
    """Return the id of the one engine whose ranks use this GPU, or an empty string where none or several do."""
    users = {group.engine for group in rank_groups(history) if uuid in group.gpus}
    return users.pop() if len(users) == 1 else ""
