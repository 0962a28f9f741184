"""Engines that have not come up yet, and what the arithmetic should say about them."""

from __future__ import annotations

from typing import Any

import nodes

from doctor.snapshot import Absent, Snapshot, Why

Visits = tuple[Snapshot, ...]

NO_WEIGHTS = Absent(Why.NOT_ASKED)
FOLDER = "/models/served/config.json"
BLOCK_FP8 = {
    "quantization_method": "fp8", "quantization_weight_bits": 8, "quantization_weight_type": "float",
    "weight_block_size": (128, 128), "weights_bytes": NO_WEIGHTS,
}  # fmt: skip
AWQ = {
    "quantization_method": "awq", "quantization_weight_bits": 4, "quantization_weight_type": "int",
    "quantization_group_size": 128, "weights_bytes": NO_WEIGHTS,
}  # fmt: skip
QWEN_72B = {"model_type": "qwen2", "intermediate_size": 29568, "vocab_size": 152064, "weights_bytes": NO_WEIGHTS}


def starting(visits: Visits) -> Visits:
    """Return the visits of an engine that has not come up: no page yet, and a log that stops at its configuration."""

    def early(snapshot: Snapshot) -> Snapshot:
        lines = tuple(e for e in snapshot.engine_events if e.signal != "startup-complete")
        return nodes.put(snapshot, engine_events=lines, metrics=())

    return nodes.each(visits, early)


def launch(profile: str = "hgx-h100-8", tp: int = 8, *, flags: dict[str, Any] | None = None, **model: Any) -> Visits:
    """Return the visits of an engine that starts, its model and its flags changed."""
    model = {"path": FOLDER} | model
    return changed(starting(nodes.healthy(profile, tp=tp)), flags, **model)


def changed(visits: Visits, flags: dict[str, Any] | None = None, **model: Any) -> Visits:
    """Return the visits with another model and other flags."""
    changes = {f"model__{name}": value for name, value in model.items()}
    changes |= {f"flags__{name}": value for name, value in (flags or {}).items()}
    return nodes.each(visits, lambda s: nodes.with_engine(s, **changes))


def gone(visits: Visits, *words: Any) -> Visits:
    """Return the visits of an engine that is gone at the last one, with these last words."""
    return nodes.last(visits, lambda s: nodes.put(nodes.without_engine(s), engine_events=words))


def died(text: str = "EngineCore failed to start.") -> Any:
    """Return the line that says only that it died."""
    return nodes.line("engine-fatal", text, number=99, at=nodes.START + 30)
