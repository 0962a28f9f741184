"""Engines joined with the arithmetic: what each serves, on which GPUs, as far as both are known."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.machine.serving import Serving, serving_of
from doctor.snapshot import Absent, Engine, Gpu, Maybe, Why, known
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.engine_log import EngineLog, engine_logs

_CUSTOM_OFF = (
    "custom-allreduce-off-pcie",
    "custom-allreduce-off-p2p",
    "custom-allreduce-off-world-size",
    "custom-allreduce-off-nodes",
)

SPARE_BYTES = 2e9
"""What an unused GPU holds at most: the driver's own, 0.6 GB on an idle H100, and a monitor's context. guess."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """An engine of the last visit."""

    engine: Engine
    group: RankGroup | None
    """None: nothing tells how many tensor-parallel ranks it has."""
    log: EngineLog | None
    serving: Maybe[Serving]

    @property
    def came_up(self) -> bool:
        """Whether its own log says that it serves, or has served."""
        return self.log is not None and self.log.serving

    def has_argument(self, *flags: str) -> bool:
        """Whether one of these flags (with their dashes) stands on its command line."""
        return any(word.partition("=")[0] in flags for word in self.engine.command_line)


@measured_once
def served(history: History) -> tuple[Served, ...]:
    """Return every vLLM engine of the last visit."""
    groups = {group.engine: group for group in rank_groups(history)}
    logs = {log.engine: log for log in engine_logs(history)}
    return tuple(
        _served(history, engine, groups.get(engine.id), logs.get(engine.id))
        for engine in history.latest.engines
        if engine.kind == "vllm"
    )


def _served(history: History, engine: Engine, group: RankGroup | None, log: EngineLog | None) -> Served:
    custom = log is None or not log.having(*_CUSTOM_OFF)
    serving: Maybe[Serving] = Absent(Why.NOT_ASKED, "which GPUs the engine runs on was not seen")
    if group is not None and group.gpus:
        serving = serving_of(history.latest, engine, group.gpus, custom=custom)
    return Served(engine=engine, group=group, log=log, serving=serving)


def served_by(history: History, engine: str) -> Served | None:
    """Return the engine with this id, or None."""
    return next((one for one in served(history) if one.engine.id == engine), None)


def port_of(engine: Engine) -> str:
    """Return the port of the engine's own pages, vLLM's default where none is given."""
    return str(engine.flags.port) if known(engine.flags.port) else "8000"


def spare_gpus(history: History) -> tuple[Gpu, ...]:
    """Return the GPUs that no engine and no other process uses at the last visit; those whose processes are unseen are not."""
    used = {uuid for group in rank_groups(history) for uuid in group.gpus}
    return tuple(
        gpu
        for gpu in history.latest.gpus
        if gpu.uuid not in used
        and gpu.processes == ()
        and gpu.mig.enabled is not True
        and gpu.lost is not True
        and known(gpu.memory.used_bytes)
        and gpu.memory.used_bytes < SPARE_BYTES
    )
