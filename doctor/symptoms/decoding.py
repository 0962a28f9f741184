"""How an engine decodes: how many streams at once, and how fast each."""

from __future__ import annotations

import msgspec

from doctor.history import History
from doctor.snapshot import Engine, EngineMetrics, Histogram, Maybe, known
from doctor.symptoms.growth import Growth, growth


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


def lifetime(history: History, engine: Engine) -> Decoding | None:
    """Return what an engine decoded since it started, from the counters of its last page; None where they don't tell."""
    page = next((m for m in history.latest.metrics if m.engine == engine.id), None)
    if page is None or not (known(page.generation_tokens_total) and known(page.steps_total)):
        return None
    times = page.inter_token_seconds
    return Decoding(
        seconds=page.at - engine.started_at,
        tokens=page.generation_tokens_total,
        steps=page.steps_total,
        running_most=page.running if known(page.running) else 0.0,
        waiting_most=page.waiting if known(page.waiting) else 0.0,
        inter_token_seconds=times.sum / times.counts[-1] if known(times) and times.counts[-1] else None,
    )


def _grown(pages: list[EngineMetrics], values: list[Maybe[float]]) -> Growth | None:
    return growth(zip((page.at for page in pages), values, strict=True))


def _mean(histograms: list[Maybe[Histogram]], pages: list[EngineMetrics]) -> float | None:
    count = _grown(pages, [h.counts[-1] if known(h) else h for h in histograms])
    total = _grown(pages, [h.sum if known(h) else h for h in histograms])
    return total.amount / count.amount if count and total and count.amount else None
