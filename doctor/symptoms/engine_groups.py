"""Which GPUs an engine's tensor-parallel ranks run on, joined from processes, flags and the engine's own words."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Engine, Snapshot, known
from doctor.symptoms.engine_log import EngineLog, engine_logs


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
    logs = {log.engine: log for log in engine_logs(history)}
    groups = [_of_engine(engine, latest, logs.get(engine.id)) for engine in latest.engines]
    if not latest.engines:
        groups = [_of_the_dead(log, history) or _of_log(log, latest) for log in logs.values()]
    return tuple(group for group in groups if group is not None)


def _of_the_dead(log: EngineLog, history: History) -> RankGroup | None:
    """Return the group of an engine that is gone, as it was when it was last seen to write this log."""
    for snapshot in reversed(history.snapshots):
        for engine in snapshot.engines:
            if engine.log == log.log and (group := _of_engine(engine, snapshot, log)) is not None:
                return msgspec.structs.replace(group, engine=log.engine)
    return None


def _of_engine(engine: Engine, snapshot: Snapshot, log: EngineLog | None) -> RankGroup | None:
    on = {rank.gpu for rank in engine.ranks if known(rank.gpu)}
    asked = engine.flags.tensor_parallel_size
    size = asked if known(asked) else (log and _size_in(log)) or len(on)
    if not size:
        return None
    seen = len(on) == len(engine.ranks) and len(on) >= size
    if seen:
        gpus = tuple(sorted(on))
    elif known(engine.visible_gpus) and len(engine.visible_gpus) == size:
        gpus = engine.visible_gpus
    else:
        gpus = _if_whole_node(snapshot, size)
    return RankGroup(engine=engine.id, size=size, gpus=gpus, exact=seen)


def _of_log(log: EngineLog, snapshot: Snapshot) -> RankGroup | None:
    size = _size_in(log)
    return RankGroup(engine=log.engine, size=size, gpus=_if_whole_node(snapshot, size), exact=False) if size else None


def _size_in(log: EngineLog) -> int:
    size = log.fact("tensor_parallel_size")
    return int(size) if size.isdigit() else 0


def _if_whole_node(snapshot: Snapshot, size: int) -> tuple[str, ...]:
    """Return every GPU of the node where the engine needs all of them, else none: which it took is not known."""
    return tuple(gpu.uuid for gpu in snapshot.gpus) if len(snapshot.gpus) == size else ()


def gpus_of_engine(history: History, engine: str) -> tuple[str, ...]:
    """Return the GPUs of an engine's ranks, of one that is gone too; empty where nothing tells which."""
    group = next((group for group in rank_groups(history) if group.engine == engine), None)
    return group.gpus if group is not None else _gpus_before(engine, history)


def _gpus_before(engine: str, history: History) -> tuple[str, ...]:
    for snapshot in reversed(history.snapshots):
        seen = next((e for e in snapshot.engines if e.id == engine), None)
        if seen is not None and (group := _of_engine(seen, snapshot, None)) is not None:
            return group.gpus
    return ()


def engine_of_gpu(history: History, uuid: str) -> str:
    """Return the id of the one engine whose ranks use this GPU, or an empty string where none or several do."""
    users = {group.engine for group in rank_groups(history) if uuid in group.gpus}
    return users.pop() if len(users) == 1 else ""
