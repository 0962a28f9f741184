"""Engines joined with the arithmetic: what each serves, on which GPUs, as far as both are known."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.machine.fit import Obstacle, obstacles_in
from doctor.machine.serving import Serving, serving_of
from doctor.snapshot import Absent, Engine, EngineEvent, Gpu, Maybe, Source, Why, known, or_none
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.engine_log import REPORTS_OF_DEATH, EngineLog, engine_logs

_CUSTOM_OFF = (
    "custom-allreduce-off-pcie",
    "custom-allreduce-off-p2p",
    "custom-allreduce-off-world-size",
    "custom-allreduce-off-nodes",
)

SPARE_BYTES = 2e9
"""What an unused GPU holds at most: the driver's own, 0.6 GB on an idle H100, and a monitor's context. guess."""


BEYOND_ROOM = (
    "--cpu-offload-gb",
    "--kv-cache-memory-bytes",
    "--kv-cache-memory",
    "--num-gpu-blocks-override",
    "--decode-context-parallel-size",
    "-dcp",
    "--prefill-context-parallel-size",
    "-pcp",
    "--hf-overrides",
    "--nnodes",
)
"""Flags that change what a GPU holds, or how many GPUs hold it, as the arithmetic does not know."""

START_SECONDS = 7200.0
"""An engine that has run so long has started, whatever was seen of it. guess: 700 GB over 1 Gbit/s take 1.6 hours."""


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

    @property
    def name(self) -> str:
        """Who a finding about it is about: as its log's findings say, so that they join."""
        return self.log.engine if self.log is not None else self.engine.id

    @property
    def ranks(self) -> int | None:
        """How many tensor-parallel ranks it has; None where nothing tells. Without a flag it has one."""
        if self.group is not None:
            return self.group.size
        flag = self.engine.flags.tensor_parallel_size
        return 1 if isinstance(flag, Absent) and flag.why is Why.NOT_GIVEN else None

    @property
    def told(self) -> bool:
        """Whether its own log names why it died: more than that it died, and more than an assertion without words."""
        incident = self.log.incident if self.log is not None else None
        if incident is None or incident.cause.signal in REPORTS_OF_DEATH:
            return False
        facts = incident.cause.facts
        return facts.get("type") != "AssertionError" or bool(facts.get("message", True))

    @property
    def config(self) -> str:
        """Where its `config.json` lies."""
        return self.engine.model.path or "config.json"

    @property
    def last_words(self) -> tuple[EngineEvent, ...]:
        """The line by which it died, where its log has one."""
        incident = self.log.incident if self.log is not None else None
        return (incident.cause,) if incident is not None else ()

    def obstacles(self, ranks: int) -> Maybe[tuple[Obstacle, ...]]:
        """Return what keeps its model from being split over so many ranks, by config.json and flags: see `obstacles_in`."""
        flags = self.engine.flags
        return obstacles_in(
            self.engine.model,
            ranks,
            quantization=or_none(flags.quantization),
            expert_parallel=or_none(flags.expert_parallel) is True,
        )

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


@measured_once
def unproven(history: History) -> tuple[Served, ...]:
    """Return the vLLM engines whose settings have not been seen to work, with their GPUs as far as they can be told.

    They start, or they vanished before they served. An engine proves its settings by its log, by its metrics page, or
    by running for hours; and the same command line that has served within the history will serve again.
    """
    candidates = [
        one
        for one in (*served(history), *_vanished(history))
        if not one.came_up and not (one.engine.started_at and history.now - one.engine.started_at > START_SECONDS)
    ]
    if not candidates:
        return ()
    proven = {page.engine for snapshot in history.snapshots for page in snapshot.metrics}
    lines = {e.command_line for s in history.snapshots for e in s.engines if e.id in proven and len(e.command_line) > 1}
    return tuple(
        msgspec.structs.replace(one, serving=_expected(history, one))
        for one in candidates
        if one.engine.id not in proven and one.engine.command_line not in lines
    )


def unexplained(history: History) -> tuple[Served, ...]:
    """Return those that are `unproven` and whose own log does not name why they died: there is something to foretell."""
    return tuple(one for one in unproven(history) if not one.told)


def _vanished(history: History) -> tuple[Served, ...]:
    """Return the engines that earlier visits saw and the last one does not, unless somebody stopped or replaced them."""
    if history.latest.why_unseen(Source.PROCESSES) is not None:
        return ()
    here = history.latest.engines
    taken = {part for engine in here for part in _places(engine)}
    seen = {engine.id for engine in here}
    logs = {log.log: log for log in engine_logs(history)}
    found: list[Served] = []
    for number in range(len(history.snapshots) - 2, -1, -1):
        new = {e.id for e in history.snapshots[number].engines if e.kind == "vllm" and e.id not in seen}
        if not new:
            continue
        seen |= new
        for one in served(History(history.snapshots[: number + 1], history.keep)):
            log = logs.get(or_none(one.engine.log) or "")
            places = _places(one.engine)
            if one.engine.id in new and not taken & places and not (log is not None and log.stopped):
                found.append(msgspec.structs.replace(one, log=log))
                taken |= places
    return tuple(found)


def _places(engine: Engine) -> set[str]:
    """Return what only one engine at a time can have: the port, the unit, the log."""
    return {f"port {port_of(engine)}", *(part for part in (or_none(engine.unit), or_none(engine.log)) if part)}


def _expected(history: History, one: Served) -> Maybe[Serving]:
    """Return what is served; where nothing tells which of several equal GPUs will be taken, on the first of them."""
    ranks = one.ranks
    if known(one.serving) or ranks is None or (one.group is not None and one.group.gpus):
        return one.serving
    visible = or_none(one.engine.visible_gpus) or tuple(gpu.uuid for gpu in history.latest.gpus)
    products = {gpu.pci_device_id for gpu in history.latest.gpus if gpu.uuid in visible}
    if len(products) != 1 or len(visible) < ranks:
        return one.serving
    return serving_of(history.latest, one.engine, visible[:ranks])


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
