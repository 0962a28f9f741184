"""What an engine's own metrics say about its requests over a window: totals, histograms and gauges of one life."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import attrgetter

import msgspec

from doctor.history import History
from doctor.snapshot import Absent, EngineMetrics, Histogram, Maybe, Why, known

_counted = attrgetter("generation_tokens_total", "prompt_tokens_total", "requests_succeeded_total", "steps_total")
"""Any of these below its predecessor: the engine began anew."""


class Traffic(msgspec.Struct, frozen=True):
    """The pages of an engine over a window, oldest first, all of its present life: after a restart of the counters."""

    engine: str
    """`Engine.id`, or the file given to triage."""
    pages: tuple[EngineMetrics, ...]

    @property
    def seconds(self) -> float:
        """Time from the first page to the last."""
        return self.pages[-1].at - self.pages[0].at

    @property
    def since(self) -> float:
        """When the first page was read, Unix seconds."""
        return self.pages[0].at

    def grown(self, read: Callable[[EngineMetrics], Maybe[float]]) -> float | None:
        """Return what a counter gained from the first page to the last; None where either lacks it."""
        before, after = read(self.pages[0]), read(self.pages[-1])
        return max(after - before, 0.0) if known(before) and known(after) else None

    def requests(self, read: Callable[[EngineMetrics], Maybe[Histogram]]) -> Histogram | None:
        """Return the histogram of what came between the first page and the last; None where either lacks it."""
        before, after = read(self.pages[0]), read(self.pages[-1])
        if not (known(before) and known(after)) or before.bounds != after.bounds:
            return None
        gained = tuple(now - then for then, now in zip(before.counts, after.counts, strict=True))
        return Histogram(bounds=after.bounds, counts=gained, sum=after.sum - before.sum) if min(gained) >= 0 else None

    def gauge(self, read: Callable[[EngineMetrics], Maybe[float]]) -> tuple[float, ...]:
        """Return a gauge's values, a page each; pages without it are left out."""
        return tuple(value for page in self.pages if known(value := read(page)))


def traffics(history: History, window_seconds: float) -> tuple[Traffic, ...]:
    """Return the traffic over the last *window_seconds* of each engine whose page the last visit read."""
    pages: dict[str, list[EngineMetrics]] = {page.engine: [] for page in history.latest.metrics}
    for snapshot in history.window(window_seconds):
        for page in snapshot.metrics:
            if page.engine in pages:
                pages[page.engine].append(page)
    return tuple(Traffic(engine, _present_life(mine)) for engine, mine in pages.items())


def long_enough(
    history: History, window_seconds: float, least_seconds: float | None = None
) -> Iterator[Traffic | Absent]:
    """Yield each engine's traffic over the window, or why it says too little.

    *least_seconds*: how much of the window must have been seen; left out, four fifths of it.
    """
    least = 0.8 * window_seconds if least_seconds is None else least_seconds
    for traffic in traffics(history, window_seconds):
        if traffic.seconds < least or len(traffic.pages) < 3:
            yield too_short(traffic.seconds)
        else:
            yield traffic


def too_short(seconds: float) -> Absent:
    """Return why a load that was seen over *seconds* is not judged: one sentence for all rules, so that it stands once."""
    return Absent(
        Why.NOT_ASKED, f"a load is judged over minutes, and was seen over {seconds:.0f} s: the daemon sees more"
    )


def _present_life(pages: list[EngineMetrics]) -> tuple[EngineMetrics, ...]:
    begun = 0
    for i, (before, after) in enumerate(pairwise(map(_counted, pages)), start=1):
        if any(map(_fell, before, after)):
            begun = i
    return tuple(pages[begun:])


def _fell(before: Maybe[float], after: Maybe[float]) -> bool:
    return known(before) and known(after) and after < before


def share_above(histogram: Histogram, value: float) -> float:
    """Return the share of observations that are surely above *value*: those beyond the next bound. 0 for none."""
    total = histogram.counts[-1]
    return 1.0 - histogram.counts[bisect_left(histogram.bounds, value)] / total if total else 0.0


def quantile_at_most(histogram: Histogram, share: float) -> float | None:
    """Return the bound under which *share* of the observations lie; None where only +Inf is such a bound."""
    needed = share * histogram.counts[-1]
    return next((b for b, n in zip(histogram.bounds, histogram.counts, strict=False) if n >= needed), None)


def mean(histogram: Histogram) -> float | None:
    """Return the mean of the observations; None where there are none."""
    return histogram.sum / histogram.counts[-1] if histogram.counts[-1] else None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of an engine's work over a window: means, a request or a step."""

    tokens: float
    """Generated."""
    streams: float
    """Tokens a step: how many requests decode together (with data parallelism, in each replica)."""
    prompt_tokens: float
    """Of a request."""
    computed_tokens: float
    """Of a prompt: without those that the prefix cache held."""
    generated_tokens: float
    """Of a request."""

    @property
    def context(self) -> int:
        """The mean length of a request while it is decoded."""
        return round(self.prompt_tokens + self.generated_tokens / 2)

    @property
    def batch(self) -> int:
        """The streams as a whole number, one at least."""
        return max(1, round(self.streams))


def load_of(traffic: Traffic) -> Load | None:
    """Return the load; None where a counter is missing, or nothing was generated and finished."""
    tokens = traffic.grown(lambda page: page.generation_tokens_total)
    steps = traffic.grown(lambda page: page.steps_total)
    prompts = traffic.grown(lambda page: page.prompt_tokens_total)
    finished = traffic.grown(lambda page: page.requests_succeeded_total)
    if not tokens or not steps or not finished or prompts is None:
        return None
    asked = traffic.grown(lambda page: page.prefix_cache_queries_total)
    hits = traffic.grown(lambda page: page.prefix_cache_hits_total)
    cached = min(hits / asked, 1.0) if hits is not None and asked else 0.0
    return Load(
        tokens=tokens,
        streams=tokens / steps,
        prompt_tokens=prompts / finished,
        computed_tokens=prompts / finished * (1.0 - cached),
        generated_tokens=tokens / finished,
    )
