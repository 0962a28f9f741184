"""What engines refuse to start with, in their own words: each refusal has one reason, so that one rule tells it."""

from __future__ import annotations

import enum
import re

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import Engine, EngineEvent, known
from doctor.symptoms.engine_log import EngineLog, Incident, incidents


class Reason(enum.Enum):
    """What is in the way."""

    SPLIT = "split"
    """The tensor-parallel size: a dimension can't be divided so, or not into shares that the kernels take."""
    BLOCKS = "blocks"
    """A share is no whole number of quantization blocks or groups."""
    FORMAT = "format"
    """The quantization: not what the flag says, or nothing that this GPU or engine can run."""
    STAND_IN = "stand-in"
    """The weight-only kernel (Marlin) that stands in for FP8 on a GPU without it can't take the width of a share."""
    TYPE = "type"
    """The data type."""
    SETTINGS = "settings"
    """Anything else that the engine checks before it loads."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's refusal, and where it stands."""

    log: EngineLog
    incident: Incident
    reason: Reason

    @property
    def cause(self) -> EngineEvent:
        """The line that says it."""
        return self.incident.cause


@measured_once
def refusals(history: History) -> tuple[Refusal, ...]:
    """Return every refusal that is not over."""
    engines = {engine.id: engine for engine in history.latest.engines}
    return tuple(
        Refusal(log=log, incident=incident, reason=reason)
        for log, incident in incidents(history)
        if (reason := _reason(incident.cause, log, engines.get(log.engine))) is not None
    )


def refused_for(history: History, reason: Reason) -> tuple[Refusal, ...]:
    """Return the refusals with this reason."""
    return tuple(refusal for refusal in refusals(history) if refusal.reason is reason)


def weight_only(log: EngineLog) -> tuple[EngineEvent, ...]:
    """Return the lines that say that FP8 weights are computed with in 16 bit, by Marlin."""
    chosen = (
        event
        for event in log.having("fp8-linear-kernel", "fp8-moe-backend")
        if "marlin" in str(event.facts.get("kernel", event.facts.get("backend", ""))).lower()
    )
    return (*log.having("fp8-weight-only"), *chosen)


def is_tile(cause: EngineEvent) -> bool:
    """Whether a kernel refuses a width that is no multiple of what it computes at once, whatever the scales need."""
    return _TILE.search(cause.text) is not None


_BY_KIND = {
    "heads-indivisible": Reason.SPLIT,
    "fp8-block": Reason.BLOCKS,
    "quantization-group": Reason.BLOCKS,
    "quantization-mismatch": Reason.FORMAT,
    "quantization-capability": Reason.FORMAT,
    "dtype": Reason.TYPE,
}
"""By the kind of the signal `launch-error`."""

_OF_OTHERS = frozenset({"world-size", "mig-uuid"})
"""Kinds that are about the node's GPUs."""

_TILE = re.compile(r"is not divisible by +(?:tile_|min_thread_)")
"""vLLM's Marlin and BitBLAS kernels (marlin_utils.py, gptq_marlin_repack; 0.5.5 to 0.33)."""
_UNALIGNED = re.compile(r"\b(?P<side>input|output) size is not aligned with the quantized weight shape")
"""vLLM's AWQ and GPTQ: the input size against the group, the output size against what one integer packs."""
_TYPE = re.compile(
    r"float16 is not supported for quantization method|does not support (?:b?float16|half)\b|[Bb]float16 is only supported"
)
_ASSERTED = re.compile(r"\bassert .*% (?:self\.)?(?:tp_size|tp_world_size|tensor_model_parallel_world_size)\b")
"""The line of code of an assertion without words, as the models have them (`assert self.total_num_heads % tp_size == 0`)."""


def _reason(cause: EngineEvent, log: EngineLog, engine: Engine | None) -> Reason | None:
    if cause.signal not in ("launch-error", "exception"):
        return None
    if _TILE.search(cause.text):
        return _reason_of_tile(cause, log, engine)
    if unaligned := _UNALIGNED.search(cause.text):
        return Reason.BLOCKS if unaligned["side"] == "input" else _reason_of_tile(cause, log, engine)
    if _TYPE.search(cause.text):
        return Reason.TYPE
    if cause.signal == "exception":
        return Reason.SPLIT if _ASSERTED.match(str(cause.facts.get("code", ""))) else None
    kind = str(cause.facts.get("kind", ""))
    return None if kind in _OF_OTHERS else _BY_KIND.get(kind, Reason.SETTINGS)


def _reason_of_tile(cause: EngineEvent, log: EngineLog, engine: Engine | None) -> Reason:
    """Return why a shard is too narrow for a kernel: FP8 by Marlin, its blocks, its split, or, unsplit, the format of the checkpoint."""
    split = _is_split(cause, log, engine)
    if split and weight_only(log):
        return Reason.STAND_IN
    if engine is not None and known(engine.model.weight_block_size):
        return Reason.BLOCKS
    return Reason.SPLIT if split else Reason.FORMAT


def _is_split(cause: EngineEvent, log: EngineLog, engine: Engine | None) -> bool:
    told = log.fact("tensor_parallel_size")
    if told.isdigit():
        return int(told) > 1
    if engine is not None and known(engine.flags.tensor_parallel_size):
        return engine.flags.tensor_parallel_size > 1
    return "Worker" in cause.process  # an engine of one rank has no worker processes
