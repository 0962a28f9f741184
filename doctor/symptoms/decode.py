"""How an engine decodes: how many streams at once, how fast each, and what its memory and links would allow."""

from __future__ import annotations

import msgspec

from doctor.history import History
from doctor.snapshot import Engine, EngineMetrics, Histogram, Maybe, ModelConfig, known
from doctor.symptoms.growth import Growth, growth

BYTES_PER_VALUE = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}


class Decoding(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine did over a window."""

    seconds: float
    tokens: float
    """Generated."""
    steps: float
    running_most: float
    """The most requests that any visit saw running."""
    waiting_most: float
    inter_token_seconds: float | None
    """Mean over the window's tokens; None where the engine exports no histogram, or no token came."""

    @property
    def streams(self) -> float:
        """Tokens a step: how many requests decode together. Speculative decoding raises it."""
        return self.tokens / self.steps if self.steps else 0.0


def decoding(history: History, engine: str, window_seconds: float) -> Decoding | None:
    """Return what an engine (`Engine.id`) decoded over the last *window_seconds*; None where its metrics don't tell."""
    pages = [m for s in history.window(window_seconds) for m in s.metrics if m.engine == engine]
    tokens = _grown(pages, [m.generation_tokens_total for m in pages])
    steps = _grown(pages, [m.steps_total for m in pages])
    if tokens is None or steps is None:
        return None
    return Decoding(
        seconds=tokens.seconds,
        tokens=tokens.amount,
        steps=steps.amount,
        running_most=max((m.running for m in pages if known(m.running)), default=0.0),
        waiting_most=max((m.waiting for m in pages if known(m.waiting)), default=0.0),
        inter_token_seconds=_mean([m.inter_token_seconds for m in pages], pages),
    )


def _grown(pages: list[EngineMetrics], values: list[Maybe[float]]) -> Growth | None:
    return growth(zip((page.at for page in pages), values, strict=True))


def _mean(histograms: list[Maybe[Histogram]], pages: list[EngineMetrics]) -> float | None:
    count = _grown(pages, [h.counts[-1] if known(h) else h for h in histograms])
    total = _grown(pages, [h.sum if known(h) else h for h in histograms])
    return total.amount / count.amount if count and total and count.amount else None


def bytes_read_per_token(model: ModelConfig) -> float | None:
    """Return the weights that one token's pass reads, over all ranks; None where the configuration doesn't tell.

    A mixture of experts reads its chosen experts only; their share follows from the configuration's widths.
    """
    if not known(model.weights_bytes):
        return None
    if not known(model.experts) or not model.experts:
        return float(model.weights_bytes)
    layers, hidden, chosen = model.layers, model.hidden_size, model.experts_per_token
    width = model.moe_intermediate_size if known(model.moe_intermediate_size) else model.intermediate_size
    if not (known(layers) and known(hidden) and known(chosen) and known(width) and known(model.vocab_size)):
        return None
    expert = 3 * hidden * width  # gate, up and down projections
    rest = 4 * hidden * hidden + 2 * model.vocab_size * hidden / layers  # attention and embeddings, a layer
    read = rest + chosen * expert
    return model.weights_bytes * read / (rest + model.experts * expert)


def kv_bytes_per_token(engine: Engine) -> float | None:
    """Return what one token of context holds of the KV cache, over all ranks; None where that isn't known."""
    model, flags = engine.model, engine.flags
    if not (known(model.layers) and known(model.kv_heads) and known(model.head_dim)):
        return None
    fp8 = known(flags.kv_cache_dtype) and flags.kv_cache_dtype.startswith("fp8")
    size = 1.0 if fp8 else BYTES_PER_VALUE.get(model.dtype, 2.0) if known(model.dtype) else 2.0
    return 2.0 * model.layers * model.kv_heads * model.head_dim * size


def context_tokens(engine: Engine) -> int | None:
    """Return the longest request that the engine promises to hold."""
    lengths = (engine.flags.max_model_len, engine.model.max_position_embeddings)
    return next((length for length in lengths if known(length)), None)
