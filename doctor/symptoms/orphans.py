"""Engine cores that outlive their server: vLLM's core and workers run on when the server is killed, and keep their memory."""

from __future__ import annotations

import msgspec

from doctor.history import History
from doctor.snapshot import Engine

CORES = ("::EngineCore", "::DPEngineCore")
"""In the titles of engine cores; workers end by themselves when their core is gone (3 to 12 s, measured, vLLM 0.32.0)."""


class Orphans(msgspec.Struct, frozen=True):
    """The engine cores of a server that is gone."""

    server: Engine
    """As it was last seen."""
    cores: tuple[Engine, ...]
    since: float
    """The first visit without the server."""


def orphans(history: History, settle_seconds: float) -> tuple[Orphans, ...]:
    """Return the engine cores that have run without their server for so long, at two visits at least.

    Only where the server was seen with them before: a program that uses vLLM as a library has cores and no server.
    """
    by_server: dict[str, Orphans] = {}
    for core in history.latest.engines:
        if len(core.command_line) != 1 or not any(title in core.command_line[0] for title in CORES):
            continue
        server, since = _server_of(core, history)
        if server is None or since == history.now or history.now - since < settle_seconds:
            continue
        earlier = by_server.get(server.id)
        cores = (*earlier.cores, core) if earlier is not None else (core,)
        by_server[server.id] = Orphans(server, cores, min(since, earlier.since) if earlier is not None else since)
    return tuple(by_server.values())


def _server_of(core: Engine, history: History) -> tuple[Engine | None, float]:
    """Return the engine that a process belonged to, and the first visit that saw the process without it."""
    since = history.now
    for snapshot in reversed(history.snapshots):
        for engine in snapshot.engines:
            family = {rank.pid for rank in (*engine.cores, *engine.ranks)}
            if engine.pid != core.pid and core.pid in family and not engine.is_left_over:
                return engine, since
        if any(engine.id == core.id for engine in snapshot.engines):
            since = snapshot.at
    return None, since
